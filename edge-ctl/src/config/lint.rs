//! What is allowed but probably not meant: warnings of `config check`. Pure.

use std::{collections::BTreeSet, net::IpAddr};

use ipnet::IpNet;

use super::valid::{Bgp, Config, Peer, PrefixRule, Term};
use crate::model::{Frontend, Mode, Service, scope};

/// One line for each thing worth a second look.
pub fn warnings(config: &Config) -> Vec<String> {
    let mut warnings = Vec::new();
    if let Some(http) = config.http.filter(|http| !http.ip().is_loopback()) {
        warnings.push(format!(
            "[api] http = \"{http}\": metrics can be read from other hosts, without authentication; the default is 127.0.0.1:9180"
        ));
    }
    if let Some(bgp) = &config.bgp {
        for peer in bgp.peers.values() {
            peer_warnings(bgp, peer, &config.edge.pod_networks, &mut warnings);
        }
        unannounced(config, bgp, &mut warnings);
    }
    let every_port = |service: &&Service| service.mode == Mode::Dnat && service.backends.keeps_ports();
    warnings.extend(config.services.values().filter(every_port).map(|service| {
        format!(
            "service {}: in dnat mode whatever backends with port `*` send out through this edge counts as replies; connections that \
             they begin themselves have to be masqueraded by their nodes",
            service.name
        )
    }));
    for resolver in config.resolvers.values() {
        let used = config.services.values().any(|service| match &service.backends {
            crate::model::BackendSource::Dns { resolver: name, .. } => *name == resolver.name,
            crate::model::BackendSource::Static(_) => false,
        });
        if !used {
            warnings.push(format!("[resolver.{}]: no service uses it", resolver.name));
        }
    }
    warnings
}

fn peer_warnings(bgp: &Bgp, peer: &Peer, pod_networks: &[IpNet], warnings: &mut Vec<String>) {
    let address = scope::shown(peer.address);
    match &peer.import {
        None if peer.remote_asn != bgp.asn => warnings.push(format!(
            "peer {address}: eBGP without `import` accepts nothing (RFC 8212); give a list, or `import = []` to say so"
        )),
        Some(terms) => warnings.extend(rules(terms).filter(|rule| is_exact_cover(rule, pod_networks)).map(|rule| {
            format!(
                "peer {address}: `import` \"{0}\" accepts that prefix only, not the nodes' blocks inside it; meant \
                 \"{0} le 32\"?",
                rule.prefix
            )
        })),
        None => {}
    }
    let all = |rule: &&PrefixRule| rule.prefix.prefix_len() == 0 && rule.max_length > 0;
    for rule in peer.import.iter().flat_map(|terms| rules(terms)).filter(all) {
        warnings.push(format!(
            "peer {address}: `import` \"{} le {}\" accepts every network that the peer names; list those that it has",
            rule.prefix, rule.max_length
        ));
    }
    for network in &peer.client_networks {
        if pod_networks.iter().any(|pods| pods.contains(network)) {
            warnings.push(format!(
                "peer {address}: `client_networks` {network} lies inside `pod_networks`: the node would send packets to \
                 pods this way"
            ));
        }
    }
    for rule in peer.export.iter().flat_map(|terms| rules(terms)).filter(|rule| matches_no_host(rule)) {
        warnings.push(format!(
            "peer {address}: `export` \"{0}\" lets that network out and no VIP in it; meant \"{0} le {1}\"?",
            rule.prefix,
            rule.prefix.max_prefix_len()
        ));
    }
}

/// A list element for a network that no VIP, a /32 or /128, can match.
fn matches_no_host(rule: &PrefixRule) -> bool {
    rule.max_length < rule.prefix.max_prefix_len()
}

/// Frontends of every port that are not served, since the host has their address on an interface.
pub fn not_dedicated(config: &Config, own: &BTreeSet<IpAddr>) -> Vec<String> {
    let listen = config.services.values().flat_map(|service| service.listen.iter().map(move |it| (&service.name, it)));
    let refused = listen.filter(|(_, frontend)| frontend.takes_what_is_the_hosts(own));
    let tell = |(service, frontend): (&String, &Frontend)| {
        format!(
            "service {service} ({frontend}) is not served: the host has that address on an interface, and ssh and BGP with it would \
             go to the backends; use an address that is the VIP alone"
        )
    };
    refused.map(tell).collect()
}

/// Peers that are in none of this host's networks, although a session with them may not leave the link.
pub fn unconnected(config: &Config, networks: &[IpNet]) -> Vec<String> {
    let Some(bgp) = config.bgp.as_ref().filter(|_| !networks.is_empty()) else { return Vec::new() };
    let same_family = |peer: &Peer| networks.iter().any(|network| network.addr().is_ipv4() == peer.address.is_ipv4());
    let far = |peer: &&Peer| {
        peer.ebgp_multihop < 2
            && scope::number_of(peer.address).is_none()
            && !networks.iter().any(|network| network.contains(&peer.address))
    };
    let peers = bgp.peers.values().filter(|peer| same_family(peer)).filter(far);
    peers
        .map(|peer| format!("peer {}: in no network that this host is connected to; a wrong address?", peer.address))
        .collect()
}

fn rules(terms: &[Term]) -> impl Iterator<Item = &PrefixRule> {
    terms.iter().filter(|term| !term.deny).flat_map(|term| &term.prefixes)
}

fn matches_prefix(term: &Term, prefix: &IpNet) -> bool {
    term.prefixes.is_empty() || term.prefixes.iter().any(|rule| rule.matches(prefix))
}

/// A rule without lengths on a prefix that pods are numbered from: nodes announce parts of it.
fn is_exact_cover(rule: &PrefixRule, pod_networks: &[IpNet]) -> bool {
    rule.max_length == rule.prefix.prefix_len()
        && rule.max_length < 24
        && pod_networks.iter().any(|network| rule.prefix.contains(network) || network.contains(&rule.prefix))
}

fn unannounced(config: &Config, bgp: &Bgp, warnings: &mut Vec<String>) {
    for service in config.services.values().filter(|service| service.announce.is_some()) {
        for frontend in &service.listen {
            let vip = IpNet::from(frontend.address.ip());
            let announced = bgp.peers.values().any(|peer| match &peer.export {
                Some(terms) => terms.iter().any(|term| !term.deny && matches_prefix(term, &vip)),
                None => peer.remote_asn == bgp.asn,
            });
            if !announced {
                warnings
                    .push(format!("service {}: no peer's `export` lets {vip} out, so nobody learns it", service.name));
            }
        }
    }
}
