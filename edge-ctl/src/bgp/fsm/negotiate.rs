//! What two OPENs settle: the checks of RFC 4271 6.2, and each capability that both sides have.

use std::time::Duration;

use super::{
    super::wire::{Capability, Family, Notification, Open, open_error},
    Settings,
};

/// What both OPENs settled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Negotiated {
    /// The peer's OPEN.
    pub peer: Open,
    /// What we offered.
    pub offered: Vec<Capability>,
    /// Hold time, seconds: the lesser of both; 0: no keepalives.
    pub hold: u16,
    /// Keepalive interval; zero with a hold time of zero.
    pub keepalive: Duration,
    /// Families that both sides speak.
    pub families: Vec<Family>,
    /// Both sides use 4-octet AS numbers.
    pub four_octet_as: bool,
    /// The peer takes ROUTE-REFRESH.
    pub route_refresh: bool,
    /// Refreshes begin and end with a mark (RFC 7313).
    pub enhanced_refresh: bool,
    /// Messages may be longer than 4,096 octets (RFC 8654).
    pub extended_message: bool,
    /// Families whose prefixes may have an IPv6 next hop (RFC 8950).
    pub extended_next_hop: Vec<Family>,
    /// Families in which the peer sends several paths to a prefix (RFC 7911), because we asked for them.
    pub add_path: Vec<Family>,
    /// Both sides know graceful restart (RFC 4724).
    pub graceful: bool,
    /// Both sides restart gracefully after NOTIFICATIONs too (RFC 8538).
    pub notification_restart: bool,
}

impl Negotiated {
    /// Families whose routes stay when the session is lost, and for how long the peer has asked us to keep them.
    pub fn kept(&self) -> Option<(Vec<Family>, Duration)> {
        let restart = self.peer.restart().filter(|_| self.graceful)?;
        // RFC 4724 4.2: a speaker without families only helps others.
        let families: Vec<Family> = self.families.iter().copied().filter(|family| lists(restart, *family)).collect();
        (!families.is_empty()).then(|| (families, Duration::from_secs(restart.time.into())))
    }

    /// True where the peer has kept its forwarding state of a family over its restart (F).
    pub fn preserved(&self, family: Family) -> bool {
        let restart = self.peer.restart().filter(|_| self.graceful);
        restart.is_some_and(|restart| restart.families.contains(&(family, true)))
    }
}

fn lists(restart: &super::super::wire::Restart, family: Family) -> bool {
    restart.families.iter().any(|(listed, _)| *listed == family)
}

/// Judges the peer's OPEN.
///
/// # Errors
/// The NOTIFICATION that it deserves, and why in words.
pub(super) fn negotiate(settings: &Settings, open: Open) -> Result<Negotiated, (Notification, String)> {
    acceptable(settings, &open).map_err(|(subcode, why)| (Notification::open_error(subcode), why))?;
    let hold = settings.hold.min(open.hold);
    let keepalive =
        if hold == 0 { Duration::ZERO } else { settings.keepalive.min(Duration::from_secs(u64::from(hold)) / 3) };
    let ours = Open {
        asn: settings.local_asn,
        hold: settings.hold,
        router_id: settings.router_id,
        capabilities: settings.capabilities.clone(),
    };
    let both = |capability: &Capability| ours.has(capability) && open.has(capability);
    let common = |ours: Vec<Family>, theirs: Vec<Family>| -> Vec<Family> {
        Family::ALL.into_iter().filter(|family| ours.contains(family) && theirs.contains(family)).collect()
    };
    let restarts = ours.restart().zip(open.restart());
    Ok(Negotiated {
        hold,
        keepalive,
        families: common(ours.families(), open.families()),
        four_octet_as: ours.four_octet_as() && open.four_octet_as(),
        route_refresh: open.has(&Capability::RouteRefresh),
        enhanced_refresh: both(&Capability::EnhancedRouteRefresh),
        extended_message: both(&Capability::ExtendedMessage),
        extended_next_hop: common(ours.extended_next_hop(), open.extended_next_hop()),
        add_path: common(ours.receives_paths(), open.sends_paths()),
        graceful: restarts.is_some(),
        notification_restart: restarts.is_some_and(|(ours, theirs)| ours.notification && theirs.notification),
        offered: ours.capabilities,
        peer: open,
    })
}

fn acceptable(settings: &Settings, open: &Open) -> Result<(), (u8, String)> {
    if open.asn != settings.remote_asn {
        let reason = format!("the peer is in AS {}, configured is AS {}", open.asn, settings.remote_asn);
        return Err((open_error::BAD_PEER_AS, reason));
    }
    let internal = settings.remote_asn == settings.local_asn;
    // RFC 6286: non-zero, and within one AS unique.
    if open.router_id.is_unspecified() || (internal && open.router_id == settings.router_id) {
        return Err((open_error::BAD_BGP_IDENTIFIER, format!("router id {} is not usable", open.router_id)));
    }
    if (1..3).contains(&open.hold) {
        return Err((open_error::UNACCEPTABLE_HOLD_TIME, format!("hold time {} s is below 3 s", open.hold)));
    }
    if internal { Ok(()) } else { roles(settings, open).map_err(|why| (open_error::ROLE_MISMATCH, why)) }
}

/// RFC 9234 4.2: roles must be a pair, and where we insist there must be one.
fn roles(settings: &Settings, open: &Open) -> Result<(), String> {
    let Some(ours) = settings.role else { return Ok(()) };
    let mut theirs = open.roles();
    let Some(first) = theirs.next() else {
        return if settings.role_strict {
            Err(format!("the peer tells no role, and we, {ours}, insist on one"))
        } else {
            Ok(())
        };
    };
    if theirs.any(|other| other != first) {
        return Err("the peer claims several roles".to_owned());
    }
    if first == ours.counterpart() {
        Ok(())
    } else {
        Err(format!("the peer is {first} and we are {ours}; it should be {}", ours.counterpart()))
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use crate::model::bgp_session::Role;

    fn settings() -> Settings {
        Settings {
            local_asn: 64512,
            router_id: Ipv4Addr::new(10, 0, 0, 1),
            remote_asn: 64513,
            hold: 90,
            keepalive: Duration::from_secs(30),
            passive: false,
            longest_retry: Duration::from_secs(30),
            role: None,
            role_strict: false,
            capabilities: vec![Capability::Multiprotocol(Family::Ipv4), Capability::Multiprotocol(Family::Ipv6)],
        }
    }

    fn peer(capabilities: Vec<Capability>) -> Open {
        Open { asn: 64513, hold: 90, router_id: Ipv4Addr::new(10, 0, 0, 2), capabilities }
    }

    fn restart(families: Vec<(Family, bool)>, notification: bool) -> Capability {
        let restart = super::super::super::wire::Restart { restarting: false, notification, time: 120, families };
        Capability::GracefulRestart(restart)
    }

    #[test]
    fn every_pair_of_roles_is_judged_as_rfc_9234_has_it() {
        use Role::{Customer, Peer, Provider, RouteServer, RouteServerClient};
        let pairs = [(Provider, Customer), (RouteServer, RouteServerClient), (Peer, Peer)];
        for ours in Role::ALL {
            for theirs in Role::ALL {
                let settings = Settings { role: Some(ours), ..settings() };
                let allowed = pairs.contains(&(ours, theirs)) || pairs.contains(&(theirs, ours));
                let result = negotiate(&settings, peer(vec![Capability::Role(theirs)]));
                let subcode = result.as_ref().err().map(|(notification, _)| (notification.code, notification.subcode));
                assert_eq!(subcode, (!allowed).then_some((2, 11)), "{ours} towards {theirs}");
            }
        }
    }

    #[test]
    fn a_peer_without_a_role_is_refused_only_where_we_insist() {
        let role = Settings { role: Some(Role::Provider), ..settings() };
        assert!(negotiate(&role, peer(vec![])).is_ok());
        assert!(negotiate(&Settings { role_strict: true, ..role.clone() }, peer(vec![])).is_err());
        let two = vec![Capability::Role(Role::Customer), Capability::Role(Role::Peer)];
        assert!(negotiate(&role, peer(two.clone())).is_err());
        assert!(negotiate(&settings(), peer(two)).is_ok(), "without a role of ours the peer's is ignored");
        let internal = Settings { remote_asn: 64512, ..role };
        let open = Open { asn: 64512, ..peer(vec![Capability::Role(Role::Provider)]) };
        assert!(negotiate(&internal, open).is_ok(), "roles are for external sessions");
    }

    #[test]
    fn routes_are_kept_for_the_families_that_both_speak_and_the_peer_lists() {
        let mut ours = settings();
        ours.capabilities.push(restart(vec![], false));
        let lists_both = restart(vec![(Family::Ipv4, true), (Family::Ipv6, false)], true);
        let ipv4_only = peer(vec![Capability::Multiprotocol(Family::Ipv4), lists_both.clone()]);
        let negotiated = negotiate(&ours, ipv4_only).unwrap();
        assert_eq!(negotiated.kept(), Some((vec![Family::Ipv4], Duration::from_secs(120))));
        assert!(negotiated.preserved(Family::Ipv4) && !negotiated.preserved(Family::Ipv6));
        assert!(!negotiated.notification_restart, "we did not offer N");
        let helper = peer(vec![Capability::Multiprotocol(Family::Ipv4), restart(vec![], false)]);
        assert_eq!(negotiate(&ours, helper).unwrap().kept(), None);
        let unwilling = negotiate(&settings(), peer(vec![lists_both])).unwrap();
        assert_eq!((unwilling.kept(), unwilling.graceful), (None, false));
    }

    #[test]
    fn what_only_one_side_has_is_not_in_force() {
        let ours = Settings {
            capabilities: vec![
                Capability::Multiprotocol(Family::Ipv4),
                Capability::ExtendedMessage,
                Capability::EnhancedRouteRefresh,
                Capability::ExtendedNextHop(vec![Family::Ipv4]),
            ],
            ..settings()
        };
        let bare = negotiate(&ours, peer(vec![])).unwrap();
        assert!(!bare.extended_message && !bare.enhanced_refresh && bare.extended_next_hop.is_empty());
        let full = negotiate(&ours, peer(ours.capabilities.clone())).unwrap();
        assert!(full.extended_message && full.enhanced_refresh);
        assert_eq!(full.extended_next_hop, [Family::Ipv4]);
        let ipv6 = negotiate(&ours, peer(vec![Capability::Multiprotocol(Family::Ipv6)])).unwrap();
        assert!(ipv6.families.is_empty(), "we do not offer IPv6 here");
    }
}
