//! Rows for users.

use std::{net::IpAddr, time::Duration};

use ipnet::IpNet;

use super::{
    advertise::{Candidate, Originated, Outgoing},
    fsm::Side,
    peer::{Admitted, Peer, Watched},
    rib::{Rib, Route, Standing},
    wire::{AsPath, Attributes, Capability, Origin},
};
use crate::{
    config::valid,
    model::{
        scope,
        view::{BfdRow, BgpPeerRow, BgpRouteRow, BgpStaleRow},
    },
};

/// The row of one peer.
pub fn peer_row(peer: &Peer, rib: &Rib, version: u64, now: Duration) -> BgpPeerRow {
    let (received, accepted) = rib.counts(peer.config.address);
    let session = peer.session.as_ref();
    let links = || [Side::Outgoing, Side::Incoming].into_iter().filter_map(|side| peer.link(side));
    let total = |suffix: &str| {
        peer.messages.iter().filter(|(name, _)| name.ends_with(suffix)).map(|(_, count)| count).sum::<u64>()
    };
    let mut messages: std::collections::BTreeMap<String, u64> =
        peer.messages.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect();
    messages.extend(peer.malformed.iter().map(|(name, count)| ((*name).to_owned(), *count)));
    BgpPeerRow {
        neighbor: scope::shown(peer.config.address),
        v: 4,
        asn: peer.config.remote_asn,
        msg_rcvd: total("_received"),
        msg_sent: total("_sent"),
        tbl_ver: session.map_or(0, |_| version),
        in_q: links().map(super::session::Link::unread).sum(),
        out_q: links().map(super::session::Link::unsent).sum(),
        up_down: peer.changed.map(|changed| now.saturating_sub(changed).as_secs()),
        // As FRR has it.
        state: if peer.limited.is_some() { "Idle (PfxCt)" } else { peer.fsm.name().as_str() }.to_owned(),
        pfx_rcd: accepted,
        pfx_snt: session.map_or(0, |session| session.out.len() as u64),
        desc: peer.config.description.clone(),
        group: peer.config.group.clone(),
        router_id: session.map(|session| session.negotiated.peer.router_id.to_string()),
        kind: kind(peer.policy.internal),
        hold: session.map_or(0, |session| u64::from(session.negotiated.hold)),
        keepalive: session.map_or(0, |session| session.negotiated.keepalive.as_secs()),
        capabilities: session.map(capabilities).unwrap_or_default(),
        pfx_received: received,
        max_prefixes: peer.config.intake.max_prefixes.map(|max| u64::from(max.limit)),
        messages,
        last_reset: last_reset(peer),
        next_connect: peer.fsm.next_connect().map(|at| at.saturating_sub(now).as_secs()),
        established_count: peer.established_count,
        hostname: session.and_then(hostname),
        local: session.and_then(|session| Some(peer.link(session.side)?.local.to_string())),
        remote: session.and_then(|session| Some(peer.link(session.side)?.remote.to_string())),
        hold_left: left(peer.fsm.session_timers().and_then(|(hold, _)| hold), now),
        keepalive_left: left(peer.fsm.session_timers().and_then(|(_, keepalive)| keepalive), now),
        failures: u64::from(peer.fsm.failures()),
        shutdown: peer.shutdown.clone(),
        dynamic: peer.admitted != Admitted::Configured,
        capabilities_sent: session.map(|s| texts(&s.negotiated.offered)).unwrap_or_default(),
        capabilities_received: session.map(|s| texts(&s.negotiated.peer.capabilities)).unwrap_or_default(),
        error_sent: peer.history.errors(now).0,
        error_received: peer.history.errors(now).1,
        flaps: peer.history.flaps(now),
        pfx_stale: if peer.helper.next_deadline().is_some() { rib.stale_count(peer.config.address) } else { 0 },
        bfd: peer.bfd.as_ref().map(|watched| bfd_row(watched, now)),
        stale: peer.helper.rows().map(|(family, stage, until)| stale_row(family, stage, until, now)).collect(),
    }
}

/// The row of a link whose neighbour has not been found.
pub fn link_row(interface: &str, config: &valid::Peer, internal: bool, why: Option<&str>) -> BgpPeerRow {
    let silence = format!("no router has advertised itself on {interface}");
    BgpPeerRow {
        neighbor: interface.to_owned(),
        v: 4,
        asn: config.remote_asn,
        state: "Idle".to_owned(),
        desc: config.description.clone(),
        group: config.group.clone(),
        kind: kind(internal),
        max_prefixes: config.intake.max_prefixes.map(|max| u64::from(max.limit)),
        last_reset: Some(why.map_or(silence, str::to_owned)),
        dynamic: true,
        ..BgpPeerRow::default()
    }
}

fn kind(internal: bool) -> String {
    if internal { "ibgp" } else { "ebgp" }.to_owned()
}

fn bfd_row(watched: &Watched, now: Duration) -> BfdRow {
    let (sent, received) = watched.counters.read();
    let milliseconds = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    let row = BfdRow {
        age: now.saturating_sub(watched.changed).as_secs(),
        multihop: watched.target.settings.multihop,
        downs: watched.downs,
        sent,
        received,
        ..BfdRow::default()
    };
    match &watched.status {
        Err(why) => BfdRow { state: "Failed".to_owned(), error: Some(why.clone()), ..row },
        Ok(status) => BfdRow {
            state: status.state.as_str().to_owned(),
            diagnostic: status.diagnostic.to_string(),
            remote_state: status.remote_state.as_str().to_owned(),
            remote_diagnostic: status.remote_diagnostic.to_string(),
            independent: status.independent,
            transmit_ms: status.transmit.map(milliseconds),
            detection_ms: milliseconds(status.detection),
            ..row
        },
    }
}

fn left(at: Option<Duration>, now: Duration) -> Option<u64> {
    at.map(|at| at.saturating_sub(now).as_secs())
}

fn texts(capabilities: &[Capability]) -> Vec<String> {
    capabilities.iter().map(ToString::to_string).collect()
}

fn hostname(session: &super::peer::Session) -> Option<String> {
    session.negotiated.peer.capabilities.iter().find_map(|capability| match capability {
        Capability::Fqdn { host, .. } => Some(host.clone()),
        _ => None,
    })
}

fn stale_row(family: super::wire::Family, stage: &str, until: Duration, now: Duration) -> BgpStaleRow {
    let left = until.saturating_sub(now).as_secs();
    BgpStaleRow { family: family.to_string(), stage: stage.to_owned(), left }
}

/// Why the last session ended, and what keeps the next one from coming up.
fn last_reset(peer: &Peer) -> Option<String> {
    match (&peer.last_reset, &peer.last_failure) {
        (Some(reset), Some(failure)) => Some(format!("{reset}; since then: {failure}")),
        (reset, failure) => reset.clone().or_else(|| failure.clone()),
    }
}

/// What both sides offered and so is in force.
fn capabilities(session: &super::peer::Session) -> Vec<String> {
    let negotiated = &session.negotiated;
    let mut list: Vec<String> = negotiated.families.iter().map(ToString::to_string).collect();
    if negotiated.route_refresh {
        list.push("route-refresh".to_owned());
    }
    if negotiated.four_octet_as {
        list.push("4-octet-as".to_owned());
    }
    let extended_next_hop = !negotiated.extended_next_hop.is_empty();
    for (in_force, name) in [
        (negotiated.enhanced_refresh, "enhanced-route-refresh"),
        (negotiated.extended_message, "extended-message"),
        (extended_next_hop, "extended-next-hop"),
        (negotiated.graceful, "graceful-restart"),
        (negotiated.notification_restart, "notification-restart"),
    ] {
        if in_force {
            list.push(name.to_owned());
        }
    }
    if !negotiated.add_path.is_empty() {
        list.push("add-path".to_owned());
    }
    list
}

/// The Loc-RIB: our own prefixes and every accepted path.
pub fn routes(rib: &Rib, originated: &Originated, now: Duration) -> Vec<BgpRouteRow> {
    let own: std::collections::BTreeMap<_, _> = originated.iter().collect();
    let mut rows = Vec::new();
    for (prefix, _, standings) in rib.iter(true) {
        if let Some(attributes) = own.get(&prefix) {
            rows.push(BgpRouteRow {
                status: "*>".to_owned(),
                network: prefix.to_string(),
                next_hop: "-".to_owned(),
                metric: attributes.med,
                locprf: attributes.local_pref,
                path: path_text(&AsPath::default(), Origin::Igp),
                peer: "local".to_owned(),
                communities: attributes.communities.iter().map(ToString::to_string).collect(),
                ..BgpRouteRow::default()
            });
        }
        let accepted = standings.iter().filter(|standing| standing.path.rejection().is_none());
        rows.extend(accepted.map(|standing| path_row(&prefix, standing, standing.path.used(), now)));
    }
    rows
}

/// Adj-RIB-In of one peer, before policy.
pub fn received(rib: &Rib, peer: IpAddr, now: Duration) -> Vec<BgpRouteRow> {
    rib.received(peer).map(|(prefix, standing)| path_row(&prefix, &standing, &standing.path.received, now)).collect()
}

/// Adj-RIB-Out of one peer: the path as the peer sees it; and what it does not get, with the reason. Of learnt paths
/// only with transit: without it none is meant to go anywhere.
pub fn advertised(peer: &Peer, rib: &Rib, originated: &Originated) -> Vec<BgpRouteRow> {
    let Some(session) = &peer.session else { return Vec::new() };
    let row = |prefix: &IpNet, out: &Outgoing| BgpRouteRow {
        status: "*>".to_owned(),
        peer: scope::shown(peer.config.address),
        ..route_row(prefix, &out.attributes, out.next_hop)
    };
    let mut rows: Vec<(IpNet, BgpRouteRow)> =
        session.out.iter().map(|(prefix, out)| (*prefix, row(prefix, out))).collect();
    let mut withhold = |prefix: IpNet, candidate: Candidate<'_>, origin: String| {
        if let Err(why) = session.out.terms.judge(&peer.policy, &prefix, candidate) {
            let row = BgpRouteRow {
                status: "r".to_owned(),
                network: prefix.to_string(),
                next_hop: "-".to_owned(),
                peer: scope::shown(peer.config.address),
                reason: Some(format!("{why}{origin}")),
                ..BgpRouteRow::default()
            };
            rows.push((prefix, row));
        }
    };
    for (prefix, own) in originated.iter().chain(originated.for_one(&peer.policy.client_networks)) {
        withhold(prefix, Candidate::Own(&own), String::new());
    }
    if session.out.terms.transit {
        for prefix in rib.prefixes().filter(|prefix| !peer.policy.client_networks.contains(prefix)) {
            if let Some(best) = rib.best(&prefix) {
                withhold(prefix, Candidate::Learnt(best), format!(" (best path is from {})", best.peer));
            }
        }
    }
    rows.sort_by_key(|(prefix, _)| *prefix);
    rows.into_iter().map(|(_, row)| row).collect()
}

fn route_row(prefix: &IpNet, attributes: &Attributes, next_hop: IpAddr) -> BgpRouteRow {
    BgpRouteRow {
        network: prefix.to_string(),
        next_hop: scope::shown(next_hop),
        metric: attributes.med,
        locprf: attributes.local_pref,
        path: path_text(&attributes.as_path, attributes.origin),
        communities: attributes.community_texts(),
        ..BgpRouteRow::default()
    }
}

fn path_row(prefix: &IpNet, standing: &Standing<'_>, route: &Route, now: Duration) -> BgpRouteRow {
    let path = standing.path;
    let mut status = String::new();
    status.push(match (path.rejection().is_some(), standing.usable) {
        (true, _) => 'r',
        (false, true) => '*',
        (false, false) => 'u',
    });
    if standing.best {
        status.push('>');
    } else if standing.multipath {
        status.push('=');
    }
    if standing.internal {
        status.push('i');
    }
    if path.stale {
        status.push('S');
    }
    let reason = path.rejection().map(|why| why.to_string()).or(standing.reason.map(|why| why.to_string()));
    let unreachable = || format!("next hop {} cannot be reached", path.used().next_hop);
    BgpRouteRow {
        status,
        peer: scope::shown(standing.peer),
        age: now.saturating_sub(path.learnt()).as_secs(),
        reason: reason.or_else(|| (!standing.usable).then(unreachable)),
        path_id: (path.id != 0).then_some(path.id),
        via: standing.gateways.iter().map(ToString::to_string).collect(),
        steps: standing.steps.clone(),
        ..route_row(prefix, &route.attributes, route.next_hop)
    }
}

fn path_text(path: &AsPath, origin: Origin) -> String {
    let path = path.to_string();
    if path.is_empty() { origin.to_string() } else { format!("{path} {origin}") }
}
