//! What a reload changes, in words. Pure.

use std::collections::BTreeSet;

use super::valid::Config;

/// Changes between two configurations, one line each, for users: what took effect, and what needs a restart.
pub fn changes(old: &Config, new: &Config) -> (Vec<String>, Vec<String>) {
    let mut applied = Vec::new();
    let names: BTreeSet<_> = old.services.keys().chain(new.services.keys()).collect();
    for name in names {
        match (old.services.get(name), new.services.get(name)) {
            (None, Some(_)) => applied.push(format!("service {name} added")),
            (Some(_), None) => applied.push(format!("service {name} removed")),
            (old, new) if old != new => applied.push(format!("service {name} changed")),
            _ => {}
        }
    }
    if old.resolvers != new.resolvers {
        applied.push("resolvers changed".to_owned());
    }
    if let (Some(old), Some(new)) = (&old.bgp, &new.bgp) {
        for peer in new.peers.keys().filter(|peer| !old.peers.contains_key(*peer)) {
            applied.push(format!("BGP peer {peer} added"));
        }
        for (peer, before) in &old.peers {
            match new.peers.get(peer) {
                None => applied.push(format!("BGP peer {peer} removed")),
                Some(after) if after != before => applied.push(format!("BGP peer {peer} changed")),
                Some(_) => {}
            }
        }
        if old.networks != new.networks {
            applied.push("BGP networks changed".to_owned());
        }
    }
    if (&old.edge.interfaces, old.edge.hook) != (&new.edge.interfaces, new.edge.hook) {
        applied.push("interfaces or hook changed".to_owned());
    }
    if old.edge.pod_networks != new.edge.pod_networks {
        applied.push("pod_networks changed".to_owned());
    }
    let mut restart = Vec::new();
    let fixed = [
        ("[edge] pin_path", old.edge.pin_path != new.edge.pin_path),
        ("[edge] socket", old.edge.socket != new.edge.socket),
        ("[edge] state_dir", old.edge.state_dir != new.edge.state_dir),
        ("[edge] seed_file", old.edge.seed_file != new.edge.seed_file),
        ("[edge.tables]", old.edge.tables != new.edge.tables),
        ("[api] http", old.http != new.http),
        ("[bgp] added or removed", old.bgp.is_some() != new.bgp.is_some()),
        ("[bgp] asn", old.bgp.as_ref().map(|bgp| bgp.asn) != new.bgp.as_ref().map(|bgp| bgp.asn)),
        ("[bgp] router_id", old.bgp.as_ref().map(|b| b.router_id) != new.bgp.as_ref().map(|b| b.router_id)),
    ];
    restart.extend(fixed.into_iter().filter(|(_, changed)| *changed).map(|(what, _)| what.to_owned()));
    (applied, restart)
}
