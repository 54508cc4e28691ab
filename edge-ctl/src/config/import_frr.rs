//! `config import frr`: an FRR or Quagga `bgpd` configuration as `[bgp]`, and what is wrong with it. Pure.
//!
//! What has no counterpart is named with its line and left out. A prefix list that a route map refers to becomes the terms
//! of `import` or `export`; route maps of several entries whose lists deny something are named, since FRR then goes on with
//! the next entry, which a list of terms cannot say.

mod parse;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
};

use self::parse::{Action, Configuration, ListEntry, MapEntry, Neighbour};

/// What became of a configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Imported {
    /// `[bgp]` and what belongs to it, TOML.
    pub toml: String,
    /// What is wrong with the original, or needs a look, each with its line.
    pub findings: Vec<String>,
}

/// Reads the text of a `frr.conf`, `bgpd.conf` or `show running-config`.
///
/// # Errors
/// Where there is no `router bgp` in it.
pub fn import(text: &str) -> Result<Imported, String> {
    let configuration = parse::parse(text);
    let mut import = Import { configuration: &configuration, findings: configuration.findings.clone() };
    let toml = import.write()?;
    let mut findings = import.findings;
    findings.sort_by_key(|(line, _)| *line);
    findings.dedup();
    let findings = findings.into_iter().map(|(line, text)| format!("line {line}: {text}")).collect();
    Ok(Imported { toml, findings })
}

struct Import<'a> {
    configuration: &'a Configuration,
    findings: Vec<(usize, String)>,
}

impl Import<'_> {
    fn find(&mut self, line: usize, text: String) {
        self.findings.push((line, text));
    }

    fn write(&mut self) -> Result<String, String> {
        let configuration = self.configuration;
        let asn = configuration.asn.ok_or("there is no `router bgp NUMBER` in it")?;
        self.check_references();
        let mut out = format!("[bgp]\nasn = {asn}\n");
        if let Some(router_id) = &configuration.router_id {
            let _ = writeln!(out, "router_id = \"{router_id}\"");
        }
        if !configuration.networks.is_empty() {
            let _ = writeln!(out, "networks = [{}]", quoted(configuration.networks.iter().map(|(_, network)| network)));
        }
        for (name, group) in configuration.neighbours.iter().filter(|(_, neighbour)| neighbour.is_group) {
            let _ = writeln!(out, "\n[bgp.group.{}]", key(name));
            self.settings(&mut out, name, group, asn);
        }
        for (address, peer) in configuration.neighbours.iter().filter(|(_, neighbour)| !neighbour.is_group) {
            let key = if peer.on_link { "interface" } else { "address" };
            let _ = writeln!(out, "\n[[bgp.peer]]\n{key} = \"{address}\"");
            if let Some(interface) = &peer.interface {
                let _ = writeln!(out, "interface = \"{interface}\"");
            }
            if let Some(group) = &peer.group {
                let _ = writeln!(out, "group = \"{group}\"");
                if !configuration.neighbours.get(group).is_some_and(|group| group.is_group) {
                    self.find(peer.line, format!("neighbor {address}: peer-group {group} is not defined"));
                }
            }
            self.settings(&mut out, address, peer, asn);
        }
        Ok(out)
    }

    /// Lists and maps that somebody refers to and nobody defined.
    fn check_references(&mut self) {
        let configuration = self.configuration;
        for (name, entries) in &configuration.maps {
            for entry in entries {
                if let Some(list) = &entry.prefix_list
                    && !configuration.lists.contains_key(list)
                {
                    let text = format!(
                        "route-map {name} refers to prefix-list {list}, which nobody defined: the entry matches nothing"
                    );
                    self.find(entry.line, text);
                }
            }
        }
        for (name, neighbour) in &configuration.neighbours {
            for (line, map) in neighbour.map_in.iter().chain(&neighbour.map_out) {
                if !configuration.maps.contains_key(map) {
                    let text = format!("neighbor {name}: route-map {map} is not defined: everything is refused");
                    self.find(*line, text);
                }
            }
            for (line, list) in neighbour.list_in.iter().chain(&neighbour.list_out) {
                if !configuration.lists.contains_key(list) {
                    self.find(*line, format!("neighbor {name}: prefix-list {list} is not defined"));
                }
            }
        }
    }

    fn settings(&mut self, out: &mut String, name: &str, neighbour: &Neighbour, asn: u32) {
        if let Some(remote) = neighbour.remote_asn {
            let _ = writeln!(out, "remote_asn = {remote}");
        }
        if let Some(description) = &neighbour.description {
            let _ = writeln!(out, "description = {}", string(description));
        }
        if let Some((line, port)) = neighbour.port {
            let _ = writeln!(out, "port = {port}");
            let text = format!("neighbor {name}: port {port} works only where the other side listens on it too");
            self.find(line, text);
        }
        if let Some(line) = neighbour.password {
            let file = format!("/etc/edge/bgp-{name}.password");
            let _ = writeln!(out, "password_file = {}", string(&file));
            let text = format!("neighbor {name}: the password is not copied; put it into {file}, mode 0600");
            self.find(line, text);
        }
        if let Some((keepalive, hold)) = neighbour.timers {
            let _ = writeln!(out, "timers = {{ keepalive = \"{keepalive}s\", hold = \"{hold}s\" }}");
        }
        if let Some(local) = &neighbour.update_source {
            let _ = writeln!(out, "local_address = \"{local}\"");
        }
        if let Some(hops) = neighbour.multihop {
            let _ = writeln!(out, "ebgp_multihop = {hops}");
        }
        if neighbour.passive {
            out.push_str("passive = true\n");
        }
        if let Some((limit, warning, restart)) = &neighbour.maximum {
            let restart = restart.map(|minutes| format!(", restart = \"{minutes}m\"")).unwrap_or_default();
            let _ = writeln!(out, "max_prefixes = {{ limit = {limit}, warning = {warning}{restart} }}");
        }
        let external = self.remote_of(neighbour).is_some_and(|remote| remote != asn);
        if let Some(terms) = self.policy(name, &neighbour.map_in, &neighbour.list_in, external) {
            let _ = writeln!(out, "import = {terms}");
        }
        if let Some(terms) = self.policy(name, &neighbour.map_out, &neighbour.list_out, false) {
            let _ = writeln!(out, "export = {terms}");
        }
    }

    fn remote_of(&self, neighbour: &Neighbour) -> Option<u32> {
        let group = neighbour.group.as_ref().and_then(|group| self.configuration.neighbours.get(group));
        neighbour.remote_asn.or(group.and_then(|group| group.remote_asn))
    }

    /// `vips`: what comes in are service addresses, /32 each, from outside our AS.
    fn policy(
        &mut self,
        name: &str,
        map: &Option<(usize, String)>,
        list: &Option<(usize, String)>,
        vips: bool,
    ) -> Option<String> {
        let configuration = self.configuration;
        let mut terms = Vec::new();
        if let Some((line, map)) = map {
            let entries = configuration.maps.get(map).map(Vec::as_slice).unwrap_or_default();
            for (position, entry) in entries.iter().enumerate() {
                let last = position + 1 == entries.len();
                self.entry(name, *line, entry, last, vips, &mut terms);
            }
        } else if let Some((_, list)) = list {
            let entries = configuration.lists.get(list).map(Vec::as_slice).unwrap_or_default();
            let pass = MapEntry::default();
            self.list(name, entries, &pass, true, vips, &mut terms);
        } else {
            return None;
        }
        Some(format!("[{}]", terms.join(", ")))
    }

    fn entry(&mut self, name: &str, line: usize, entry: &MapEntry, last: bool, vips: bool, terms: &mut Vec<String>) {
        let Some(list) = &entry.prefix_list else { return terms.push(term(&[], entry)) };
        // FRR: a list that is not there matches nothing.
        let Some(entries) = self.configuration.lists.get(list) else { return };
        if !last && entries.iter().any(|one| one.action == Action::Deny && !one.is_everything()) {
            let text =
                format!("neighbor {name}: prefix-list {list} denies, and FRR goes on with the next entry; look at it");
            self.find(line, text);
        }
        self.list(name, entries, entry, last, vips, terms);
    }

    fn list(
        &mut self,
        name: &str,
        entries: &[ListEntry],
        map: &MapEntry,
        last: bool,
        vips: bool,
        terms: &mut Vec<String>,
    ) {
        for entry in entries {
            match entry.action {
                Action::Permit => {
                    if vips && entry.is_exact() {
                        let text = format!(
                            "neighbor {name}: `permit {0}` matches that prefix alone; service addresses come as /{1}, so \
                             that none is accepted: `{0} le {1}` is meant",
                            entry.prefix,
                            if entry.prefix.contains(':') { 128 } else { 32 },
                        );
                        self.find(entry.line, text);
                    }
                    if entry.is_everything() && vips {
                        let text = format!(
                            "neighbor {name}: `permit {}` lets everything in, default routes too",
                            entry.text()
                        );
                        self.find(entry.line, text);
                    }
                    terms.push(term(&[entry.text()], map));
                }
                // What no term matches is refused anyway.
                Action::Deny if entry.is_everything() && last => {}
                Action::Deny => terms.push(format!("{{ prefixes = [\"{}\"], action = \"deny\" }}", entry.text())),
            }
        }
    }
}

fn term(prefixes: &[String], map: &MapEntry) -> String {
    let plain = map.set.is_empty() && map.action == Action::Permit;
    if let ([prefix], true) = (prefixes, plain) {
        return format!("\"{prefix}\"");
    }
    let mut parts = Vec::new();
    if !prefixes.is_empty() {
        parts.push(format!("prefixes = [{}]", quoted(prefixes.iter())));
    }
    if map.action == Action::Deny {
        parts.push("action = \"deny\"".to_owned());
    } else if !map.set.is_empty() {
        parts.push(format!("set = {{ {} }}", map.set.join(", ")));
    } else if prefixes.is_empty() {
        parts.push("action = \"permit\"".to_owned());
    }
    format!("{{ {} }}", parts.join(", "))
}

fn quoted<T: AsRef<str>>(texts: impl Iterator<Item = T>) -> String {
    let unique: BTreeSet<String> = texts.map(|text| format!("\"{}\"", text.as_ref())).collect();
    unique.into_iter().collect::<Vec<_>>().join(", ")
}

/// A TOML string.
fn string(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

/// A bare key, or a quoted one.
fn key(name: &str) -> String {
    let bare = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte));
    if bare { name.to_owned() } else { string(name) }
}

type Named<T> = BTreeMap<String, T>;

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::{self, valid::Config};

    const FEDORA1: &str = include_str!("../../../tests/fixtures/frr/fedora1.conf");
    const FEDORA2: &str = include_str!("../../../tests/fixtures/frr/fedora2.conf");
    const NGINX_EDGE: &str = include_str!("../../../tests/fixtures/frr/nginx-edge.conf");
    const REST: &str = "[edge]\ninterfaces = [\"ens33\"]\npod_networks = [\"10.1.0.0/16\"]\n\
                        [service.web]\nlisten = [\"172.16.1.88:80/tcp\"]\nbackends = { static = [\"10.1.0.4:80\"] }\n";

    fn valid(imported: &Imported) -> Config {
        // Passwords are read when a session starts; whether they can be configured is no concern of this test.
        let lines = imported.toml.lines().filter(|line| !line.starts_with("password_file"));
        let text = lines.collect::<Vec<_>>().join("\n") + "\n" + REST;
        config::parse(&text, Path::new("edge.toml")).unwrap_or_else(|error| panic!("{error}\n{text}"))
    }

    fn finding<'a>(imported: &'a Imported, words: &[&str]) -> &'a str {
        let found = imported.findings.iter().find(|finding| words.iter().all(|word| finding.contains(word)));
        found.unwrap_or_else(|| panic!("no finding with {words:?} in {:#?}", imported.findings))
    }

    #[test]
    fn the_quagga_configuration_beside_an_nginx_edge_becomes_peers_of_one_group() {
        let imported = import(NGINX_EDGE).unwrap();
        let bgp = valid(&imported).bgp.unwrap();
        assert_eq!((bgp.asn, bgp.router_id.to_string()), (64512, "172.16.1.88".to_owned()));
        assert_eq!(bgp.networks, ["172.16.1.0/24".parse().unwrap()]);
        let peers: Vec<_> = bgp.peers.values().map(|peer| (peer.description.as_str(), peer.remote_asn)).collect();
        assert_eq!(peers, [("kcontrol", 64512), ("knode1", 64512), ("knode2", 64512)]);
        finding(&imported, &["capability dynamic", "left out"]);
    }

    #[test]
    fn the_faults_of_the_frr_configurations_before_a_cilium_cluster_are_named_with_their_lines() {
        let first = import(FEDORA1).unwrap();
        let bgp = valid(&first).bgp.unwrap();
        let kube = &bgp.peers[&"192.168.99.12".parse::<std::net::IpAddr>().unwrap()];
        assert_eq!((kube.port, kube.remote_asn, kube.group.as_deref()), (32179, 65432, Some("KUBE_AS")));
        assert_eq!((kube.keepalive.as_secs(), kube.hold.as_secs()), (30, 90));
        let list = kube.import.as_ref().unwrap();
        assert_eq!((list.len(), list[0].prefixes[0].max_length), (1, 24), "as it stands, not as it is meant");
        assert!(finding(&first, &["192.168.77.0/24 le 32", "meant"]).starts_with("line 6: "), "{:#?}", first.findings);
        finding(&first, &["port 32179", "other side"]);
        finding(&first, &["password is not copied"]);

        let second = import(FEDORA2).unwrap();
        finding(&second, &["FILTER_IN", "MDHFILTER", "nobody defined"]);
        assert!(!second.findings.iter().any(|finding| finding.contains("port")), "only one of the two has a port");
        valid(&second);
    }

    #[test]
    fn route_maps_become_terms_with_their_changes() {
        let text = "ip prefix-list A permit 10.1.0.0/16 ge 24 le 26\nip prefix-list A deny 10.0.0.0/8 le 32\n\
                    route-map M permit 10\n match ip address prefix-list A\n set local-preference 200\n set metric 5\n \
                    set community 64512:1 no-export additive\n set as-path prepend 64512 64512\nexit\n\
                    router bgp 64512\n bgp router-id 172.16.1.88\n neighbor 172.16.1.80 remote-as 65001\n \
                    neighbor 172.16.1.80 maximum-prefix 100 80 restart 5\n \
                    address-family ipv4 unicast\n  neighbor 172.16.1.80 route-map M in\n exit-address-family\n";
        let imported = import(text).unwrap();
        let bgp = valid(&imported).bgp.unwrap();
        let peer = bgp.peers.values().next().unwrap();
        let terms = peer.import.as_ref().unwrap();
        assert_eq!((terms.len(), terms[1].deny), (2, true));
        let set = &terms[0].set;
        assert_eq!((set.local_pref, set.med, set.prepend, set.add.len()), (Some(200), Some(5), 2, 2));
        assert_eq!(peer.intake.max_prefixes.unwrap().limit, 100);
    }

    #[test]
    fn neighbours_on_links_and_link_local_ones_keep_their_interface() {
        let imported = import(
            "router bgp 64512\n bgp router-id 172.16.1.88\n neighbor TOR peer-group\n neighbor TOR remote-as 65001\n \
             neighbor eth0 interface remote-as 65001\n neighbor eth1 interface v6only peer-group TOR\n \
             neighbor fe80::2 remote-as 65001\n neighbor fe80::2 interface eth2\n neighbor eth3 interface remote-as external\n",
        )
        .unwrap();
        let text = imported.toml.replace("\n[[bgp.peer]]\ninterface = \"eth3\"\n", "");
        let bgp = valid(&Imported { toml: text, findings: Vec::new() }).bgp.unwrap();
        let links: Vec<_> =
            bgp.links.iter().map(|(name, peer)| (name.as_str(), peer.remote_asn, peer.group.as_deref())).collect();
        assert_eq!(links, [("eth0", 65001, None), ("eth1", 65001, Some("TOR"))]);
        let peers: Vec<_> = bgp.peers.keys().map(|address| crate::model::scope::shown(*address)).collect();
        assert_eq!(peers, ["fe80::2%eth2"]);
        finding(&imported, &["neighbor eth3 interface remote-as external", "left out"]);
    }

    #[test]
    fn what_is_not_understood_is_named_and_left_out() {
        let imported =
            import("router bgp 1\n bgp router-id 1.1.1.1\n neighbor 10.0.0.1 remote-as 2\n frobnicate\n").unwrap();
        assert_eq!(imported.findings, ["line 4: `frobnicate` has no counterpart and is left out"]);
        assert!(import("hostname x\n").unwrap_err().contains("router bgp"));
    }
}
