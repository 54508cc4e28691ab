//! Rows for users.

use std::{net::IpAddr, time::Duration};

use super::{
    advertise::Originated,
    fsm::Side,
    peer::Peer,
    rib::{Rib, Standing},
    wire::{AsPath, Attributes, Capability, Origin},
};
use crate::model::{
    PathAttributes,
    view::{BgpPeerRow, BgpRouteRow, BgpStaleRow},
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
        neighbor: peer.config.address.to_string(),
        v: 4,
        asn: peer.config.remote_asn,
        msg_rcvd: total("_received"),
        msg_sent: total("_sent"),
        tbl_ver: session.map_or(0, |_| version),
        in_q: links().map(super::session::Link::unread).sum(),
        out_q: links().map(super::session::Link::unsent).sum(),
        up_down: peer.changed.map(|changed| now.saturating_sub(changed).as_secs()),
        state: peer.fsm.name().as_str().to_owned(),
        pfx_rcd: accepted,
        pfx_snt: session.map_or(0, |session| session.out.len() as u64),
        desc: peer.config.description.clone(),
        group: peer.config.group.clone(),
        router_id: session.map(|session| session.negotiated.peer.router_id.to_string()),
        kind: if peer.policy.internal { "ibgp" } else { "ebgp" }.to_owned(),
        hold: session.map_or(0, |session| u64::from(session.negotiated.hold)),
        keepalive: session.map_or(0, |session| session.negotiated.keepalive.as_secs()),
        capabilities: session.map(capabilities).unwrap_or_default(),
        pfx_received: received,
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
        dynamic: peer.dynamic,
        capabilities_sent: session.map(|s| texts(&s.negotiated.offered)).unwrap_or_default(),
        capabilities_received: session.map(|s| texts(&s.negotiated.peer.capabilities)).unwrap_or_default(),
        error_sent: peer.history.errors(now).0,
        error_received: peer.history.errors(now).1,
        flaps: peer.history.flaps(now),
        pfx_stale: if peer.helper.next_deadline().is_some() { rib.stale_count(peer.config.address) } else { 0 },
        stale: peer.helper.rows().map(|(family, stage, until)| stale_row(family, stage, until, now)).collect(),
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
    list
}

/// The Loc-RIB: our own prefixes and every accepted path.
pub fn routes(rib: &Rib, originated: &Originated, now: Duration) -> Vec<BgpRouteRow> {
    let own: std::collections::BTreeMap<_, _> = originated.iter().collect();
    let mut rows = Vec::new();
    for (prefix, _, standings) in rib.iter() {
        if let Some(attributes) = own.get(prefix) {
            rows.push(BgpRouteRow {
                status: "*>".to_owned(),
                network: prefix.to_string(),
                next_hop: "-".to_owned(),
                peer: "local".to_owned(),
                ..originated_row(attributes, &AsPath::default())
            });
        }
        let accepted = standings.iter().filter(|standing| standing.path.rejection.is_none());
        rows.extend(accepted.map(|standing| path_row(prefix, standing, now)));
    }
    rows
}

/// Adj-RIB-In of one peer.
pub fn received(rib: &Rib, peer: IpAddr, now: Duration) -> Vec<BgpRouteRow> {
    rib.received(peer).map(|(prefix, standing)| path_row(prefix, &standing, now)).collect()
}

/// Adj-RIB-Out of one peer: the path as the peer sees it.
pub fn advertised(peer: &Peer, local_asn: u32) -> Vec<BgpRouteRow> {
    let Some(session) = &peer.session else { return Vec::new() };
    let internal = peer.policy.internal;
    let path = if internal { AsPath::default() } else { AsPath(vec![super::wire::Segment::Sequence(vec![local_asn])]) };
    session
        .out
        .iter()
        .map(|(prefix, attributes)| BgpRouteRow {
            status: "*>".to_owned(),
            network: prefix.to_string(),
            next_hop: session.out.next_hop().to_string(),
            peer: peer.config.address.to_string(),
            locprf: internal.then(|| attributes.local_pref.unwrap_or(100)),
            ..originated_row(attributes, &path)
        })
        .collect()
}

fn originated_row(attributes: &PathAttributes, path: &AsPath) -> BgpRouteRow {
    BgpRouteRow {
        metric: attributes.med,
        locprf: attributes.local_pref,
        path: path_text(path, Origin::Igp),
        communities: attributes.communities.iter().map(|(high, low)| format!("{high}:{low}")).collect(),
        ..BgpRouteRow::default()
    }
}

fn path_row(prefix: &ipnet::IpNet, standing: &Standing<'_>, now: Duration) -> BgpRouteRow {
    let path = standing.path;
    let attributes: &Attributes = &path.attributes;
    let mut status = String::new();
    status.push(if path.rejection.is_some() { 'r' } else { '*' });
    if standing.best {
        status.push('>');
    } else if standing.multipath {
        status.push('=');
    }
    if standing.internal {
        status.push('i');
    }
    BgpRouteRow {
        status,
        network: prefix.to_string(),
        next_hop: path.next_hop.to_string(),
        metric: attributes.med,
        locprf: attributes.local_pref,
        path: path_text(&attributes.as_path, attributes.origin),
        peer: path.peer.to_string(),
        age: now.saturating_sub(path.learnt).as_secs(),
        reason: path.rejection.map(|why| why.to_string()).or(standing.reason.map(|why| why.to_string())),
        communities: attributes.communities.iter().map(|value| community(*value)).collect(),
    }
}

fn path_text(path: &AsPath, origin: Origin) -> String {
    let path = path.to_string();
    if path.is_empty() { origin.to_string() } else { format!("{path} {origin}") }
}

/// `64512:100`, or the registered name of a well-known one.
fn community(value: u32) -> String {
    match value {
        0xffff_0000 => "graceful-shutdown".to_owned(),
        0xffff_029a => "blackhole".to_owned(),
        0xffff_ff01 => "no-export".to_owned(),
        0xffff_ff02 => "no-advertise".to_owned(),
        0xffff_ff03 => "no-export-subconfed".to_owned(),
        _ => format!("{}:{}", value >> 16, value & 0xffff),
    }
}
