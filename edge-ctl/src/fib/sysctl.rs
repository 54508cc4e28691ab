//! Kernel settings without which the stack drops what the program hands to it: read and judged, never written.

use std::{fmt, fs, path::Path};

use crate::model::HostFault;

/// The settings of one host, as read; `None`: could not be read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// `net.ipv4.ip_forward`.
    pub ip_forward: Option<u32>,
    /// `net.ipv4.conf.all.rp_filter`.
    pub all_rp_filter: Option<u32>,
    /// `net.ipv4.conf.all.accept_local`.
    pub all_accept_local: Option<u32>,
    /// `net.ipv6.conf.all.forwarding`.
    pub ipv6_forwarding: Option<u32>,
    /// Settings of the interfaces in use.
    pub interfaces: Vec<InterfaceSettings>,
}

/// `net.ipv4.conf.INTERFACE`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InterfaceSettings {
    /// Interface name.
    pub name: String,
    /// `rp_filter`.
    pub rp_filter: Option<u32>,
    /// `accept_local`.
    pub accept_local: Option<u32>,
}

/// A setting that keeps packets from being forwarded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SysctlProblem {
    /// Name of the setting, dots as separators (slashes where an interface name holds a dot).
    pub key: String,
    /// Its value; `None`: could not be read.
    pub value: Option<u32>,
    /// What it breaks.
    pub breaks: HostFault,
    /// The same in words.
    pub effect: String,
    /// The command that corrects it.
    pub fix: String,
}

impl fmt::Display for SysctlProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.value {
            Some(value) => write!(f, "{} is {value}: {}; correct it with `{}`", self.key, self.effect, self.fix),
            None => write!(f, "{} cannot be read: {}", self.key, self.effect),
        }
    }
}

/// Reads the settings of the present network namespace and judges them; empty: all is well.
///
/// `full_nat`: at least one service is full-nat. Its rewritten packets carry a local source address in both directions,
/// and every one that needs a neighbour or fragmentation goes through the stack. `ipv6`: at least one VIP is an IPv6
/// address; IPv6 has neither reverse-path filtering nor `accept_local`.
pub fn check(interfaces: &[String], full_nat: bool, ipv6: bool) -> Vec<SysctlProblem> {
    let settings = read(Path::new("/proc/sys"), interfaces);
    let mut problems = evaluate(&settings, full_nat);
    problems.extend(ipv6.then(|| forwarding_ipv6(&settings)).flatten());
    problems
}

fn forwarding_ipv6(settings: &Settings) -> Option<SysctlProblem> {
    (settings.ipv6_forwarding != Some(1)).then(|| SysctlProblem {
        key: "net.ipv6.conf.all.forwarding".into(),
        value: settings.ipv6_forwarding,
        breaks: HostFault::Ipv6,
        effect: "the kernel forwards no IPv6, and bpf_fib_lookup refuses".into(),
        fix: "sysctl -w net.ipv6.conf.all.forwarding=1".into(),
    })
}

/// Reads the settings below `root` (`/proc/sys`).
pub fn read(root: &Path, interfaces: &[String]) -> Settings {
    let value = |path: &str| -> Option<u32> { fs::read_to_string(root.join(path)).ok()?.trim().parse().ok() };
    let conf = |interface: &str, name: &str| value(&format!("net/ipv4/conf/{interface}/{name}"));
    Settings {
        ip_forward: value("net/ipv4/ip_forward"),
        all_rp_filter: conf("all", "rp_filter"),
        all_accept_local: conf("all", "accept_local"),
        ipv6_forwarding: value("net/ipv6/conf/all/forwarding"),
        interfaces: interfaces
            .iter()
            // One that is not there has no settings yet; attaching to it names it, and it is judged once it appears.
            .filter(|name| root.join("net/ipv4/conf").join(name).is_dir())
            .map(|name| InterfaceSettings {
                name: name.clone(),
                rp_filter: conf(name, "rp_filter"),
                accept_local: conf(name, "accept_local"),
            })
            .collect(),
    }
}

/// Judges settings. Reverse-path filtering is the stricter of `all` and the interface's own; `accept_local` is on
/// where either says so (Linux, Documentation/networking/ip-sysctl.rst).
pub fn evaluate(settings: &Settings, full_nat: bool) -> Vec<SysctlProblem> {
    let mut problems = Vec::new();
    if settings.ip_forward != Some(1) {
        problems.push(SysctlProblem {
            key: "net.ipv4.ip_forward".into(),
            value: settings.ip_forward,
            breaks: HostFault::Ipv4,
            effect: "the kernel forwards nothing, and bpf_fib_lookup refuses".into(),
            fix: "sysctl -w net.ipv4.ip_forward=1".into(),
        });
    }
    if !full_nat {
        return problems;
    }
    // rp_filter counts as max(all, interface) and 1 is strict, 2 loose: a loose interface is loose whatever `all` says.
    let all = settings.all_rp_filter;
    for interface in &settings.interfaces {
        let effective = all.max(interface.rp_filter);
        if effective == Some(1) {
            let key = key(&interface.name, "rp_filter");
            problems.push(SysctlProblem {
                fix: format!("sysctl -w {key}=2"),
                key,
                value: interface.rp_filter,
                breaks: HostFault::FullNat,
                effect: strict_effect(all, &interface.name),
            });
        }
        let accepts = settings.all_accept_local == Some(1) || interface.accept_local == Some(1);
        if !accepts {
            let key = key(&interface.name, "accept_local");
            problems.push(SysctlProblem {
                fix: format!("sysctl -w {key}=1"),
                key,
                value: interface.accept_local,
                breaks: HostFault::FullNat,
                effect: "the stack drops full-nat packets, whose source is an address of this host".into(),
            });
        }
    }
    problems
}

fn strict_effect(all: Option<u32>, interface: &str) -> String {
    let cause = if all == Some(1) { " (net.ipv4.conf.all.rp_filter is 1)" } else { "" };
    format!("reverse-path filtering on {interface} is strict{cause} and drops full-nat packets")
}

/// `sysctl` swaps dots and slashes where a name is written with slashes, which an interface such as `ens33.10` needs.
fn key(interface: &str, name: &str) -> String {
    if interface.contains('.') {
        format!("net/ipv4/conf/{interface}/{name}")
    } else {
        format!("net.ipv4.conf.{interface}.{name}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(all: u32, own: u32, accept_local: u32) -> Settings {
        Settings {
            ip_forward: Some(1),
            all_rp_filter: Some(all),
            all_accept_local: Some(0),
            ipv6_forwarding: Some(0),
            interfaces: vec![InterfaceSettings {
                name: "ens33".into(),
                rp_filter: Some(own),
                accept_local: Some(accept_local),
            }],
        }
    }

    #[test]
    fn a_host_that_is_set_up_has_no_problem() {
        for (all, own) in [(0, 0), (0, 2), (2, 0), (2, 2), (1, 2), (2, 1)] {
            assert_eq!(evaluate(&settings(all, own, 1), true), [], "all {all}, own {own}");
        }
    }

    #[test]
    fn strict_filtering_is_the_maximum_of_all_and_the_interface() {
        for (all, own) in [(1, 0), (0, 1), (1, 1)] {
            let problems = evaluate(&settings(all, own, 1), true);
            assert_eq!(problems.len(), 1, "all {all}, own {own}");
            assert_eq!(problems[0].fix, "sysctl -w net.ipv4.conf.ens33.rp_filter=2");
        }
    }

    #[test]
    fn forwarding_off_is_named_with_its_fix_in_both_modes() {
        let mut off = settings(0, 0, 1);
        off.ip_forward = Some(0);
        for full_nat in [false, true] {
            let problems = evaluate(&off, full_nat);
            assert_eq!(problems.len(), 1);
            assert!(problems[0].to_string().contains("`sysctl -w net.ipv4.ip_forward=1`"));
        }
    }

    #[test]
    fn ipv6_forwarding_is_named_with_its_fix() {
        let mut settings = settings(0, 0, 1);
        let problem = forwarding_ipv6(&settings).map(|problem| problem.fix);
        assert_eq!(problem.as_deref(), Some("sysctl -w net.ipv6.conf.all.forwarding=1"));
        settings.ipv6_forwarding = Some(1);
        assert_eq!(forwarding_ipv6(&settings), None);
    }

    #[test]
    fn without_full_nat_only_forwarding_is_judged() {
        assert_eq!(evaluate(&settings(1, 1, 0), false), []);
    }

    #[test]
    fn accept_local_is_on_where_all_or_the_interface_says_so() {
        assert_eq!(evaluate(&settings(0, 0, 0), true)[0].key, "net.ipv4.conf.ens33.accept_local");
        let mut all = settings(0, 0, 0);
        all.all_accept_local = Some(1);
        assert_eq!(evaluate(&all, true), []);
    }

    #[test]
    fn an_interface_with_a_dot_gets_a_fix_that_sysctl_understands() {
        let mut dotted = settings(1, 1, 1);
        dotted.interfaces[0].name = "ens33.10".into();
        assert_eq!(evaluate(&dotted, true)[0].fix, "sysctl -w net/ipv4/conf/ens33.10/rp_filter=2");
    }

    #[test]
    fn settings_that_cannot_be_read_are_problems() {
        let nothing = Settings { interfaces: vec![InterfaceSettings::default()], ..Settings::default() };
        assert_eq!(evaluate(&nothing, true).len(), 2);
    }
}
