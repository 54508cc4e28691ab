//! Attaching the program to an interface: which hook, which link, and never twice.
//!
//! Links are pinned, so that forwarding outlives the daemon. A link that runs this object's program is adopted without a
//! write; one that runs another of ours is switched over in one atomic update, never detached. On kernels before 6.6 TC
//! has no links: there the clsact filter, which the kernel keeps by itself, is replaced at each start.

use std::fs;

use aya::programs::{
    LinkOrder, ProgramError, ProgramInfo, SchedClassifier, TcAttachType, Xdp, XdpMode,
    links::{FdLink, PinnedLink},
    tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle},
    xdp::XdpLink,
};
use aya_obj::programs::XdpAttachType;

use super::{
    interfaces::Interface,
    loader::LoadError,
    pins::{Pins, chain},
    sys::{self, LinkTarget},
};
use crate::config::valid::Hook;

/// Name of the XDP program in the object.
pub const XDP_PROGRAM: &str = "edge_xdp";
/// Name of the TC program in the object.
pub const TC_PROGRAM: &str = "edge_tc";
/// Priority and handle of our filter where TC has no links.
const CLSACT_PRIORITY: u16 = 100;
const CLSACT_HANDLE: TcHandle = TcHandle::new(0, 1);

/// Where a program runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttachedHook {
    /// XDP in the driver.
    XdpNative,
    /// XDP on socket buffers.
    XdpGeneric,
    /// TC ingress by a tcx link.
    Tcx,
    /// TC ingress by a clsact filter.
    Clsact,
}

impl AttachedHook {
    /// The name that users see.
    pub const fn name(self) -> &'static str {
        match self {
            Self::XdpNative => "xdp-native",
            Self::XdpGeneric => "xdp-generic",
            Self::Tcx => "tcx",
            Self::Clsact => "clsact",
        }
    }

    /// True for both kinds of XDP.
    pub const fn is_xdp(self) -> bool {
        matches!(self, Self::XdpNative | Self::XdpGeneric)
    }
}

/// How an interface came to have the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// It was there.
    Adopted,
    /// Its link was switched to this object's program.
    Updated,
    /// It was attached.
    Attached,
}

/// The program on an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// Interface index.
    pub ifindex: u32,
    /// Where it runs.
    pub hook: AttachedHook,
    /// How it came there.
    pub how: How,
    /// Why not on a better hook.
    pub reason: Option<String>,
    /// Kernel id of the program.
    pub program: u32,
    /// Kernel id of the link, where there is one.
    pub link: Option<u32>,
}

/// What of an interface decides about its hook.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traits {
    /// It is a veth, or a bond of such.
    pub veth: bool,
    /// Its driver takes VLAN tags off before XDP sees the frame, which would then look untagged.
    pub strips_tags: bool,
}

const VETH: &str = "veth: packets of local sockets reach XDP with unfinished checksums";

/// The hooks to try, best first, and why the list is not longer.
///
/// # Errors
/// Why the hook asked for must not be used, and what to do about it. veth is exempt: it leaves tags in frames that come
/// with them, and labs ask for XDP there.
pub fn candidates(
    hook: Hook,
    traits: Traits,
    tc: AttachedHook,
) -> Result<(Vec<AttachedHook>, Option<&'static str>), &'static str> {
    let blind = traits.strips_tags && !traits.veth;
    Ok(match hook {
        Hook::Auto if traits.veth => (vec![tc], Some(VETH)),
        Hook::Auto if blind => (
            vec![tc],
            Some(
                "rx-vlan-offload hides VLAN tags from XDP; `ethtool -K INTERFACE rxvlan off` and a restart give native XDP",
            ),
        ),
        Hook::XdpNative | Hook::XdpGeneric if blind => {
            return Err(
                "rx-vlan-offload hides VLAN tags from XDP, so that tagged frames would be taken for untagged ones; \
                        `ethtool -K INTERFACE rxvlan off`, or hook = \"auto\" or \"tc\"",
            );
        }
        Hook::Auto => (vec![AttachedHook::XdpNative, tc], None),
        Hook::XdpNative => (vec![AttachedHook::XdpNative], None),
        Hook::XdpGeneric => (vec![AttachedHook::XdpGeneric], Some("hook = \"xdp-generic\"")),
        Hook::Tc => (vec![tc], Some("hook = \"tc\"")),
    })
}

/// The kind of TC attachment that this kernel has.
pub fn tc_hook() -> AttachedHook {
    if super::host::kernel_is_at_least(6, 6) { AttachedHook::Tcx } else { AttachedHook::Clsact }
}

/// Attaches to an interface, or adopts what is there.
///
/// `known` are all interfaces of the host: a bond's ports decide about its hook.
/// `program` loads or adopts the pinned XDP (`true`) or TC program of this object; where it fails before anything of ours
/// runs on the interface, nothing has been changed.
///
/// # Errors
/// A foreign XDP program, or no hook that works; names both.
pub fn attach(
    pins: &Pins,
    hook: Hook,
    interface: &Interface,
    known: &[Interface],
    mut program: impl FnMut(bool) -> Result<(), LoadError>,
) -> Result<Attachment, LoadError> {
    let traits = traits(interface, known, |name| sys::strips_vlan_tags(name).unwrap_or(false));
    let (wanted, limit) = candidates(hook, traits, tc_hook())
        .map_err(|reason| LoadError::Hook { interface: interface.name.clone(), reason: reason.to_owned() })?;
    let links = links(pins, interface);
    let kept =
        links.iter().find(|(hook, target)| target.ifindex == interface.ifindex && wanted.contains(hook)).copied();
    refuse_foreign(pins, interface, hook)?;
    // Before anything is taken off the interface: verifying a program takes seconds.
    if let Some(hook) = kept.map(|(hook, _)| hook).or(wanted.first().copied()) {
        program(hook.is_xdp())?;
    }
    for (hook, _) in links.iter().filter(|(hook, _)| kept.is_none_or(|(kept, _)| kept != *hook)) {
        detach_pin(&pins.link(&interface.name, hook.is_xdp()));
    }
    if let Some((hook, target)) = kept {
        let id = program_id(pins, hook.is_xdp())?;
        let reason = (wanted.first() != Some(&hook)).then_some("the better hook was refused when it was attached");
        let how = if target.program == id {
            How::Adopted
        } else {
            update(pins, interface, hook)?;
            How::Updated
        };
        let reason = reason.or(limit).map(str::to_owned);
        return Ok(Attachment { ifindex: interface.ifindex, hook, how, reason, program: id, link: Some(target.id) });
    }
    // Whatever of ours was there is detached by now.
    refuse_foreign(pins, interface, hook)?;
    let mut refusals: Vec<String> = limit.map(str::to_owned).into_iter().collect();
    for hook in wanted {
        program(hook.is_xdp())?;
        if hook.is_xdp() && tc_hook() == AttachedHook::Clsact {
            // A filter of an earlier configuration would see each packet a second time.
            detach_clsact(&interface.name);
        }
        match attach_new(pins, interface, hook) {
            Ok(link) => {
                let reason = (!refusals.is_empty()).then(|| refusals.join("; "));
                let program = program_id(pins, hook.is_xdp())?;
                return Ok(Attachment { ifindex: interface.ifindex, hook, how: How::Attached, reason, program, link });
            }
            Err(reason) => refusals.push(format!("{}: {reason}", hook.name())),
        }
    }
    Err(LoadError::Hook { interface: interface.name.clone(), reason: refusals.join("; ") })
}

/// What decides about the hook of an interface; of a bond its ports do, whose drivers run its native XDP programs.
fn traits(interface: &Interface, known: &[Interface], strips_tags: impl Fn(&str) -> bool) -> Traits {
    let own = |interface: &Interface| Traits { veth: interface.veth, strips_tags: strips_tags(&interface.name) };
    if !interface.bond {
        return own(interface);
    }
    let ports: Vec<Traits> = known.iter().filter(|port| port.controller == Some(interface.ifindex)).map(own).collect();
    // A veth leaves tags in the frames, whatever it says.
    let blind = ports.iter().any(|port| port.strips_tags && !port.veth);
    Traits { veth: !blind && ports.iter().any(|port| port.veth), strips_tags: blind }
}

/// Fails where somebody else's XDP program is in the way.
fn refuse_foreign(pins: &Pins, interface: &Interface, hook: Hook) -> Result<(), LoadError> {
    if hook == Hook::Tc || pins.link(&interface.name, true).exists() {
        return Ok(());
    }
    interface_xdp(interface).map_or(Ok(()), |(id, _)| {
        Err(LoadError::ForeignXdp { interface: interface.name.clone(), program: program_name(id), id })
    })
}

/// The XDP program on the interface now: what was detached a moment ago no longer counts.
fn interface_xdp(interface: &Interface) -> Option<(u32, bool)> {
    interface.xdp?;
    let now = super::interfaces::list().ok()?;
    now.into_iter().find(|candidate| candidate.ifindex == interface.ifindex)?.xdp
}

/// The pinned links under this interface's name, XDP first. Those on another interface (the name was given to a new one), on
/// a hook that is no longer wanted, or beside a better one must go: never two on one interface.
fn links(pins: &Pins, interface: &Interface) -> Vec<(AttachedHook, LinkTarget)> {
    let link = |xdp| {
        let target = sys::link_target(&pins.link(&interface.name, xdp)).ok()?;
        let hook = match (target.xdp, interface.xdp) {
            (true, Some((_, true))) => AttachedHook::XdpGeneric,
            (true, _) => AttachedHook::XdpNative,
            (false, _) => AttachedHook::Tcx,
        };
        Some((hook, target))
    };
    [true, false].into_iter().filter_map(link).collect()
}

/// Detaches a pinned link and removes the pin. A link whose interface is gone has nothing left to detach.
pub fn detach_pin(pin: &std::path::Path) {
    if let Err(error) = sys::detach_link(pin) {
        tracing::debug!(pin = %pin.display(), %error, "link not detached");
    }
    if let Err(error) = fs::remove_file(pin) {
        tracing::warn!(pin = %pin.display(), %error, "pin not removed");
    }
}

/// Detaches our filter from an interface where TC has no links.
pub fn detach_clsact(interface: &str) {
    if let Err(error) = tc::qdisc_detach_program(interface, TcAttachType::Ingress, TC_PROGRAM) {
        tracing::debug!(interface, %error, "no clsact filter detached");
    }
}

/// Kernel id of the pinned program of this object.
///
/// # Errors
/// Where it is not pinned.
pub fn program_id(pins: &Pins, xdp: bool) -> Result<u32, LoadError> {
    let pin = pins.program(if xdp { XDP_PROGRAM } else { TC_PROGRAM });
    let info = ProgramInfo::from_pin(&pin).map_err(|error| LoadError::Object {
        what: format!("opening the program {}", pin.display()),
        reason: chain(&error),
    })?;
    Ok(info.id())
}

/// The name of a loaded program, for users; finding it takes CAP_SYS_ADMIN.
fn program_name(id: u32) -> String {
    let mut programs = aya::programs::loaded_programs().flatten();
    let program = programs.find(|program| program.id() == id);
    program
        .and_then(|program| program.name_as_str().map(str::to_owned))
        .unwrap_or_else(|| "name not readable".to_owned())
}

fn open_xdp(pins: &Pins) -> Result<Xdp, String> {
    Xdp::from_pin(pins.program(XDP_PROGRAM), XdpAttachType::Interface).map_err(|error| chain(&error))
}

fn open_tc(pins: &Pins) -> Result<SchedClassifier, String> {
    SchedClassifier::from_pin(pins.program(TC_PROGRAM)).map_err(|error| chain(&error))
}

/// Switches a pinned link to this object's program, atomically.
fn update(pins: &Pins, interface: &Interface, hook: AttachedHook) -> Result<(), LoadError> {
    let pin = pins.link(&interface.name, hook.is_xdp());
    let run = || -> Result<(), String> {
        let link = FdLink::from(PinnedLink::from_pin(&pin).map_err(|error| chain(&error))?);
        if hook.is_xdp() {
            let link = XdpLink::try_from(link).map_err(|error| chain(&error))?;
            open_xdp(pins)?.attach_to_link(link).map_err(|error| chain(&error))?;
        } else {
            let link = SchedClassifierLink::try_from(link).map_err(|error| chain(&error))?;
            open_tc(pins)?.attach_to_link(link).map_err(|error| chain(&error))?;
        }
        Ok(())
    };
    run().map_err(|reason| LoadError::Hook {
        interface: interface.name.clone(),
        reason: format!("switching the {} link to the new program: {reason}", hook.name()),
    })
}

/// Attaches and pins; the link's kernel id, where there is a link.
fn attach_new(pins: &Pins, interface: &Interface, hook: AttachedHook) -> Result<Option<u32>, String> {
    let link: FdLink = match hook {
        AttachedHook::XdpNative | AttachedHook::XdpGeneric => {
            let mode = if hook == AttachedHook::XdpNative { XdpMode::Driver } else { XdpMode::Skb };
            let mut program = open_xdp(pins)?;
            let id = program.attach_to_if_index(interface.ifindex, mode).map_err(|error| refusal(&error))?;
            let link = program.take_link(id).map_err(|error| chain(&error))?;
            link.try_into().map_err(|error: aya::programs::links::LinkError| chain(&error))?
        }
        AttachedHook::Tcx => {
            let mut program = open_tc(pins)?;
            let options = TcAttachOptions::TcxOrder(LinkOrder::default());
            let id = program
                .attach_with_options(&interface.name, TcAttachType::Ingress, options)
                .map_err(|error| refusal(&error))?;
            let link = program.take_link(id).map_err(|error| chain(&error))?;
            link.try_into().map_err(|error: aya::programs::links::LinkError| chain(&error))?
        }
        AttachedHook::Clsact => return attach_clsact(pins, interface).map(|()| None),
    };
    let id = link.info().map_err(|error| chain(&error))?.id();
    link.pin(pins.link(&interface.name, hook.is_xdp())).map_err(|error| chain(&error))?;
    Ok(Some(id))
}

/// Replaces our filter, or adds it. The filter belongs to the qdisc, so it stays when this process ends.
fn attach_clsact(pins: &Pins, interface: &Interface) -> Result<(), String> {
    match tc::qdisc_add_clsact(&interface.name).map_err(|error| chain(&error)) {
        // EEXIST: it is there.
        Err(reason) if !reason.contains("os error 17") => return Err(reason),
        _ => {}
    }
    let mut program = open_tc(pins)?;
    let ingress = TcAttachType::Ingress;
    let replaced = SchedClassifierLink::attached(&interface.name, ingress, CLSACT_PRIORITY, CLSACT_HANDLE, None)
        .map_err(|error| error.to_string())
        .and_then(|link| program.attach_to_link(link).map_err(|error| refusal(&error)));
    let id = match replaced {
        Ok(id) => id,
        Err(_) => {
            let options = NlOptions { priority: CLSACT_PRIORITY, handle: CLSACT_HANDLE, classid: None };
            program
                .attach_with_options(&interface.name, ingress, TcAttachOptions::Netlink(options))
                .map_err(|error| refusal(&error))?
        }
    };
    // Dropping the link would detach the filter.
    std::mem::forget(program.take_link(id).map_err(|error| chain(&error))?);
    Ok(())
}

fn refusal(error: &ProgramError) -> String {
    let text = chain(error);
    if text.contains("os error 95") { format!("not supported by this driver ({text})") } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_prefers_native_xdp_and_falls_back_to_tc_but_never_to_generic_xdp() {
        let (tc, nic) = (AttachedHook::Tcx, Traits::default());
        assert_eq!(candidates(Hook::Auto, nic, tc), Ok((vec![AttachedHook::XdpNative, tc], None)));
        assert_eq!(candidates(Hook::XdpNative, nic, tc), Ok((vec![AttachedHook::XdpNative], None)));
        assert_eq!(candidates(Hook::XdpGeneric, nic, tc).unwrap().0, [AttachedHook::XdpGeneric]);
        assert_eq!(candidates(Hook::Tc, nic, AttachedHook::Clsact).unwrap().0, [AttachedHook::Clsact]);
    }

    #[test]
    fn veth_gets_tc_unless_xdp_is_asked_for() {
        let (tc, veth) = (AttachedHook::Tcx, Traits { veth: true, strips_tags: true });
        assert_eq!(candidates(Hook::Auto, veth, tc), Ok((vec![tc], Some(VETH))));
        assert_eq!(candidates(Hook::XdpNative, veth, tc).unwrap().0, [AttachedHook::XdpNative]);
    }

    #[test]
    fn where_the_driver_takes_tags_off_auto_is_tc_and_xdp_is_refused_with_the_command_that_helps() {
        let (tc, nic) = (AttachedHook::Tcx, Traits { veth: false, strips_tags: true });
        let (hooks, reason) = candidates(Hook::Auto, nic, tc).unwrap();
        assert_eq!(hooks, [tc]);
        assert!(reason.unwrap().contains("rxvlan off"));
        for hook in [Hook::XdpNative, Hook::XdpGeneric] {
            assert!(candidates(hook, nic, tc).unwrap_err().contains("rxvlan off"));
        }
        assert_eq!(candidates(Hook::Tc, nic, tc).unwrap().0, [tc]);
    }
    #[test]
    fn a_bond_s_ports_decide_for_it_whatever_it_says_of_itself() {
        let bond = Interface { name: "bond0".to_owned(), ifindex: 2, bond: true, ..Interface::default() };
        let port = |name: &str, ifindex: u32, veth: bool| Interface {
            name: name.to_owned(),
            ifindex,
            veth,
            controller: Some(2),
            ..Interface::default()
        };
        let of = |ports: &[Interface], stripping: &str| traits(&bond, ports, |name| name == stripping);
        let nics = [port("eth0", 3, false), port("eth1", 4, false)];
        assert_eq!(of(&nics, "bond0"), Traits::default());
        assert_eq!(of(&nics, "eth1"), Traits { veth: false, strips_tags: true });
        let elsewhere = Interface { controller: Some(9), ..port("eth1", 4, false) };
        assert_eq!(of(&[port("eth0", 3, false), elsewhere], "eth1"), Traits::default());
        assert_eq!(of(&[port("veth0", 3, true)], "veth0"), Traits { veth: true, strips_tags: false });
        assert_eq!(
            of(&[port("veth0", 3, true), port("eth1", 4, false)], "eth1"),
            Traits { veth: false, strips_tags: true }
        );
    }
}
