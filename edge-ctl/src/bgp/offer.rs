//! What our OPEN offers a peer. Pure.

use std::time::Duration;

use super::wire::{Capability, Family, Restart};
use crate::{config::valid::Peer, model::bgp_session::SessionSettings};

/// What the offer depends on beside the configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Circumstances {
    /// Our host name; empty: not told.
    pub host: String,
    /// The daemon has restarted and has not announced everything yet (R).
    pub restarting: bool,
    /// Forwarding went on since the peer last heard of us (F).
    pub preserved: bool,
}

/// Families that the peer is offered.
pub fn families(settings: &SessionSettings) -> Vec<Family> {
    let offered = |family: &Family| match family {
        Family::Ipv4 => settings.ipv4,
        Family::Ipv6 => settings.ipv6,
    };
    Family::ALL.into_iter().filter(offered).collect()
}

/// The capabilities, in the order of our OPEN.
pub fn capabilities(local_asn: u32, peer: &Peer, circumstances: &Circumstances) -> Vec<Capability> {
    let settings = &peer.session;
    let families = families(settings);
    let mut list: Vec<Capability> = families.iter().copied().map(Capability::Multiprotocol).collect();
    list.extend([
        Capability::RouteRefresh,
        Capability::EnhancedRouteRefresh,
        Capability::FourOctetAs(local_asn),
        Capability::ExtendedMessage,
    ]);
    if peer.intake.add_path {
        list.push(Capability::AddPath(families.iter().map(|family| (*family, 1)).collect()));
    }
    if settings.extended_next_hop && settings.ipv4 {
        list.push(Capability::ExtendedNextHop(vec![Family::Ipv4]));
    }
    if let Some(role) = settings.role {
        list.push(Capability::Role(role));
    }
    if let Some(graceful) = &settings.graceful_restart {
        // Only what is configured: a peer waits for the End-of-RIB of every family that is listed.
        let listed = || families.iter().map(|family| (*family, circumstances.preserved));
        list.push(Capability::GracefulRestart(Restart {
            restarting: circumstances.restarting,
            notification: graceful.notification,
            time: u16::try_from(graceful.time.as_secs()).unwrap_or(u16::MAX).min(4095),
            families: listed().collect(),
        }));
        if !graceful.long_lived.is_zero() {
            let time = u32::try_from(graceful.long_lived.as_secs()).unwrap_or(u32::MAX).min(0xff_ffff);
            list.push(Capability::LongLived(listed().map(|(family, forwarding)| (family, forwarding, time)).collect()));
        }
    }
    if !circumstances.host.is_empty() {
        list.push(Capability::Fqdn { host: circumstances.host.clone(), domain: String::new() });
    }
    list
}

/// Longest restart time of any peer: how long after a restart we may still owe somebody our End-of-RIB.
pub fn longest_restart<'a>(peers: impl Iterator<Item = &'a Peer>) -> Duration {
    peers.filter_map(|peer| Some(peer.session.graceful_restart?.time)).max().unwrap_or_default()
}
