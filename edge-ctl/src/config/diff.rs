//! What differs between two configurations, in words: what `reload` prints. Pure.

use std::{collections::BTreeMap, fmt::Display};

use super::valid::{Bgp, Config};

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
        ("[edge] interfaces", a.interfaces != b.interfaces),
        ("[edge] hook", a.hook != b.hook),
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
    if a.pod_networks != b.pod_networks {
        changes.applied.push("[edge] pod_networks changed".to_owned());
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

fn bgp(old: &Bgp, new: &Bgp, changes: &mut Changes) {
    for (key, differs) in [
        ("[bgp] asn", old.asn != new.asn),
        ("[bgp] router_id", old.router_id != new.router_id),
        ("[bgp] listen_port", old.listen_port != new.listen_port),
    ] {
        if differs {
            changes.needs_restart.push(key.to_owned());
        }
    }
    if old.networks != new.networks {
        changes.applied.push("[bgp] networks changed".to_owned());
    }
    compare("peer", &old.peers, &new.peers, &mut changes.applied);
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
        let changes = changes(&config(EXAMPLE), &config(&new));
        assert_eq!(changes.needs_restart, ["[edge] interfaces", "[bgp] asn"]);
        let expected = [
            "service ingress-https changed",
            "service web added",
            "service ingress-http removed",
            "peer 172.16.1.80 changed",
            "peer 172.16.1.81 changed",
            "peer 172.16.1.83 added",
            "peer 172.16.1.82 removed",
        ];
        assert_eq!(changes.applied, expected);
    }
}
