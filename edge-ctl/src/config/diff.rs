//! What differs between two configurations, in words: what `reload` prints. Pure.

use std::{collections::BTreeMap, fmt::Display};

use super::valid::{Bgp, Config, Peer};
use crate::model::{Service, bgp_session::SessionSettings};

/// One line for each difference.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// What a reload can apply.
    pub applied: Vec<String>,
    /// What takes effect at the next start only.
    pub needs_restart: Vec<String>,
}

impl Changes {
    /// True where the two are the same.
    pub fn is_empty(&self) -> bool {
        self.applied.is_empty() && self.needs_restart.is_empty()
    }
}

/// The differences from `old` to `new`.
pub fn changes(old: &Config, new: &Config) -> Changes {
    let mut changes = Changes::default();
    let restart = &mut changes.needs_restart;
    let (a, b) = (&old.edge, &new.edge);
    for (key, differs) in [
        ("[edge] pin_path", a.pin_path != b.pin_path),
        ("[edge] socket", a.socket != b.socket),
        ("[edge] state_dir", a.state_dir != b.state_dir),
        ("[edge] seed_file", a.seed_file != b.seed_file),
        ("[edge.tables]", a.tables != b.tables),
        ("[api] http", old.http != new.http),
    ] {
        if differs {
            restart.push(key.to_owned());
        }
    }
    for (key, differs) in [
        ("interfaces", a.interfaces != b.interfaces),
        ("hook", a.hook != b.hook),
        ("pod_networks", a.pod_networks != b.pod_networks),
    ] {
        if differs {
            changes.applied.push(format!("[edge] {key} changed"));
        }
    }
    if old.access_log != new.access_log {
        changes.applied.push("[log] changed".to_owned());
    }
    compare("resolver", &old.resolvers, &new.resolvers, &mut changes.applied);
    compare("service", &old.services, &new.services, &mut changes.applied);
    match (&old.bgp, &new.bgp) {
        (Some(old), Some(new)) => bgp(old, new, &mut changes),
        (None, None) => {}
        _ => changes.needs_restart.push("[bgp]".to_owned()),
    }
    changes
}

/// Something that serves now and that a change means something for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Touched {
    /// A service.
    Service {
        /// Its name.
        name: String,
        /// What happens to its flows.
        what: String,
    },
    /// A BGP session.
    Session {
        /// The peer's address.
        peer: String,
        /// What happens to it.
        what: String,
    },
}

/// What the way from `old` to `new` means for flows and sessions that there are.
pub fn touches(old: &Config, new: &Config) -> Vec<Touched> {
    let mut touched = Vec::new();
    for (name, before) in &old.services {
        let what = match new.services.get(name) {
            None => "takes no new flows; those that there are go on until they end".to_owned(),
            Some(after) if after != before => service(before, after),
            Some(_) => continue,
        };
        touched.push(Touched::Service { name: name.clone(), what });
    }
    let (Some(old), Some(new)) = (&old.bgp, &new.bgp) else { return touched };
    let speaker = (old.asn, old.router_id) != (new.asn, new.router_id);
    for (address, before) in &old.peers {
        let what = match new.peers.get(address) {
            None => "ends",
            Some(after) if speaker || needs_new_session(before, after) => "starts anew",
            Some(after) if after != before => "stays",
            Some(_) => continue,
        };
        touched.push(Touched::Session { peer: address.to_string(), what: what.to_owned() });
    }
    touched
}

/// True where a change from `old` to `new` needs a new session.
pub fn needs_new_session(old: &Peer, new: &Peer) -> bool {
    let transport = |peer: &Peer| {
        (peer.remote_asn, peer.port, peer.passive, peer.local_address, peer.keepalive, peer.hold, peer.ebgp_multihop)
    };
    // BFD watches a session and is not part of it.
    let session = |peer: &Peer| SessionSettings { bfd: None, ..peer.session.clone() };
    transport(old) != transport(new) || session(old) != session(new) || old.intake.add_path != new.intake.add_path
}

fn service(before: &Service, after: &Service) -> String {
    let gone = before.listen.iter().filter(|frontend| !after.listen.contains(frontend)).count();
    let mut parts = Vec::new();
    if gone > 0 {
        parts.push(format!("{gone} of {} listen addresses take no new flows", before.listen.len()));
    }
    if before.mode != after.mode {
        parts.push(format!("new flows are {}, those that there are stay {}", after.mode, before.mode));
    }
    if before.backends != after.backends {
        parts.push("the pool is read anew".to_owned());
    }
    if parts.is_empty() {
        parts.push("new flows only".to_owned());
    }
    parts.join("; ") + "; no flow ends"
}

/// What `new` makes of a daemon that runs with `running`: what takes effect at the next start only stays as it is, and is
/// found again by the next comparison.
pub fn until_restart(running: &Config, new: Config) -> Config {
    let mut config = new;
    if running.bgp.is_some() != config.bgp.is_some() {
        config.bgp = running.bgp.clone();
    }
    if let (Some(running), Some(bgp)) = (&running.bgp, &mut config.bgp) {
        bgp.next_hops = running.next_hops;
    }
    let edge = &running.edge;
    config.edge.pin_path.clone_from(&edge.pin_path);
    config.edge.socket.clone_from(&edge.socket);
    config.edge.state_dir.clone_from(&edge.state_dir);
    config.edge.seed_file.clone_from(&edge.seed_file);
    config.edge.tables = edge.tables;
    config.http = running.http;
    config
}

fn bgp(old: &Bgp, new: &Bgp, changes: &mut Changes) {
    if old.next_hops != new.next_hops {
        changes.needs_restart.push("[bgp] next_hops".to_owned());
    }
    for (key, differs) in [
        ("[bgp] asn", old.asn != new.asn),
        ("[bgp] router_id", old.router_id != new.router_id),
        ("[bgp] listen_port", old.listen_port != new.listen_port),
        ("[bgp] networks", old.networks != new.networks),
        ("[bgp.group.*] listen_range", old.ranges != new.ranges),
    ] {
        if differs {
            changes.applied.push(format!("{key} changed"));
        }
    }
    compare("peer", &old.peers, &new.peers, &mut changes.applied);
    compare("peer on", &old.links, &new.links, &mut changes.applied);
}

fn compare<K: Ord + Display, V: PartialEq>(
    kind: &str,
    old: &BTreeMap<K, V>,
    new: &BTreeMap<K, V>,
    out: &mut Vec<String>,
) {
    for (name, value) in new {
        match old.get(name) {
            None => out.push(format!("{kind} {name} added")),
            Some(before) if before != value => out.push(format!("{kind} {name} changed")),
            Some(_) => {}
        }
    }
    out.extend(old.keys().filter(|name| !new.contains_key(name)).map(|name| format!("{kind} {name} removed")));
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    const EXAMPLE: &str = include_str!("../../../deploy/edge.toml");

    fn config(text: &str) -> Config {
        super::super::parse(text, Path::new("edge.toml")).unwrap()
    }

    #[test]
    fn the_same_configuration_has_no_changes() {
        assert!(changes(&config(EXAMPLE), &config(EXAMPLE)).is_empty());
    }

    #[test]
    fn every_difference_is_named_once_and_says_whether_it_needs_a_restart() {
        let new = EXAMPLE
            .replace("ens33", "ens34")
            .replace("port = 443", "port = 8443")
            .replace("[service.ingress-http]", "[service.web]")
            .replace("\"172.16.1.82\"", "\"172.16.1.83\"")
            .replace("asn = 64512", "asn = 64513");
        let mut new = config(&new);
        new.edge.state_dir = "/srv/edge".into();
        let changes = changes(&config(EXAMPLE), &new);
        assert_eq!(changes.needs_restart, ["[edge] state_dir"]);
        let expected = [
            "[edge] interfaces changed",
            "service ingress-https changed",
            "service web added",
            "service ingress-http removed",
            "[bgp] asn changed",
            "peer 172.16.1.80 changed",
            "peer 172.16.1.81 changed",
            "peer 172.16.1.83 added",
            "peer 172.16.1.82 removed",
        ];
        assert_eq!(changes.applied, expected);
    }

    #[test]
    fn bgp_that_comes_or_goes_with_a_reload_waits_for_the_restart_and_is_not_forgotten() {
        let with = config(EXAMPLE);
        let without = Config { bgp: None, ..with.clone() };
        for (running, new) in [(&with, &without), (&without, &with)] {
            let in_force = until_restart(running, new.clone());
            assert_eq!(in_force.bgp, running.bgp);
            assert_eq!(changes(&in_force, new).needs_restart, ["[bgp]"]);
        }
    }
}
