//! Routes between the RIB and the sessions: what each peer is told, and how much of it we take.

use std::{collections::BTreeMap, net::IpAddr, time::Duration};

use ipnet::IpNet;

use super::{
    super::{
        advertise::{Candidate, Terms},
        fsm::{Event, Negotiated},
        peer::Peer,
        policy_test,
        wire::{AddPath, Context, Family, Notification},
    },
    Actor,
};
use crate::{
    config::valid,
    model::{PathAttributes, query::PolicyQuestion, view::PolicyRow},
};

/// What a session that has just come up is.
pub(super) fn terms(bgp: &valid::Bgp, peer: &Peer, negotiated: &Negotiated, local: IpAddr) -> Terms {
    Terms {
        local_asn: bgp.asn,
        remote_asn: peer.config.remote_asn,
        peer: peer.config.address,
        next_hop: local,
        families: negotiated.families.clone(),
        extended_next_hop: negotiated.extended_next_hop.clone(),
        context: Context {
            four_octet_as: negotiated.four_octet_as,
            internal: peer.policy.internal,
            extended: negotiated.extended_message,
            add_path: AddPath::of(negotiated.add_path.iter().copied()),
        },
        transit: bgp.transit,
    }
}

impl Actor {
    /// Brings one peer to what it should have from us.
    pub(super) fn sync(&mut self, address: IpAddr) {
        let Some(peer) = self.peers.get_mut(&address) else { return };
        let Some(session) = &mut peer.session else { return };
        let all = self.originated.iter().chain(self.originated.for_one(&peer.policy.client_networks));
        let own: Vec<(IpNet, PathAttributes)> = all.collect();
        let own = own.iter().map(|(prefix, attributes)| (*prefix, Candidate::Own(attributes)));
        let side = session.side;
        let messages = if session.out.terms.transit {
            let rib = &self.rib;
            let learnt = rib.prefixes().filter_map(|prefix| Some((prefix, Candidate::Learnt(rib.best(&prefix)?))));
            // Of two candidates for one prefix the last counts.
            session.out.sync(&peer.policy, learnt.chain(own))
        } else {
            session.out.sync(&peer.policy, own)
        };
        self.send_updates(address, side, messages);
    }

    pub(super) fn originated_changed(&mut self) {
        self.version += 1;
        self.rib.originate(self.originated.prefixes());
        let addresses: Vec<IpAddr> = self.peers.keys().copied().collect();
        addresses.into_iter().for_each(|address| self.sync(address));
    }

    /// Announces what was learnt, where transit is on: prefixes whose best path may have changed since the last time.
    pub(super) fn pass_on(&mut self) {
        let moved = self.rib.take_moved();
        if moved.is_empty() {
            return;
        }
        let addresses: Vec<IpAddr> = self.peers.keys().copied().collect();
        for address in addresses {
            let Some(peer) = self.peers.get_mut(&address) else { continue };
            let Some(session) = &mut peer.session else { continue };
            let alone: BTreeMap<_, _> = self.originated.for_one(&peer.policy.client_networks).collect();
            let of = |prefix: &IpNet| self.originated.get(prefix).or_else(|| alone.get(prefix).cloned());
            let own: Vec<Option<PathAttributes>> = moved.iter().map(of).collect();
            let rib = &self.rib;
            let candidates = moved.iter().zip(&own).map(|(prefix, own)| {
                let candidate = match own {
                    Some(own) => Some(Candidate::Own(own)),
                    None => rib.best(prefix).map(Candidate::Learnt),
                };
                (*prefix, candidate)
            });
            let (side, messages) = (session.side, session.out.touch(&peer.policy, candidates));
            self.send_updates(address, side, messages);
        }
    }

    /// What a peer's policy says of a path; without a session by its configuration alone.
    pub(super) fn judge(&self, question: &PolicyQuestion) -> Option<PolicyRow> {
        let peer = self.peers.get(&question.peer)?;
        let without = || Terms {
            local_asn: self.config.asn,
            remote_asn: peer.config.remote_asn,
            peer: question.peer,
            next_hop: peer.config.local_address.unwrap_or(match Family::of_address(question.peer) {
                Family::Ipv4 => IpAddr::from([0; 4]),
                Family::Ipv6 => IpAddr::from([0; 16]),
            }),
            families: Family::ALL.to_vec(),
            extended_next_hop: Vec::new(),
            context: peer.context(),
            transit: self.config.transit,
        };
        let terms = peer.session.as_ref().map_or_else(without, |session| session.out.terms.clone());
        Some(policy_test::test(question, &peer.policy, &terms, &self.rib, &self.originated))
    }

    /// After an UPDATE: a peer that sends more prefixes than it may loses its session (RFC 4486 4).
    pub(super) fn limit(&mut self, address: IpAddr) {
        let (received, _) = self.rib.counts(address);
        let now = self.start.elapsed();
        let Some(peer) = self.peers.get_mut(&address) else { return };
        let Some(limit) = peer.config.intake.max_prefixes else { return };
        if received > u64::from(limit.limit) {
            tracing::error!(peer = %address, received, limit = limit.limit, "too many prefixes: the session ends");
            peer.limited = Some(limit.restart.map(|restart| now + restart));
            peer.warned = false;
            let notification = Notification::too_many_prefixes(Family::of_address(address), limit.limit);
            self.feed(address, Event::ManualStop(notification));
        } else if received < u64::from(limit.warning) {
            peer.warned = false;
        } else if !std::mem::replace(&mut peer.warned, true) {
            tracing::warn!(peer = %address, received, limit = limit.limit, "the peer's prefixes come near its limit");
        }
    }

    /// When the next peer that had too many prefixes may come back.
    pub(super) fn next_release(&self) -> Option<Duration> {
        self.peers.values().filter_map(|peer| peer.limited?).min()
    }

    /// Peers that had too many prefixes, and have waited long enough, may come back.
    pub(super) fn release(&mut self) {
        let now = self.start.elapsed();
        let due = |peer: &Peer| matches!(peer.limited, Some(Some(at)) if at <= now);
        let due: Vec<IpAddr> = self.peers.iter().filter(|(_, peer)| due(peer)).map(|(address, _)| *address).collect();
        for address in due {
            if let Some(peer) = self.peers.get_mut(&address) {
                peer.limited = None;
            }
            self.start_unless_shut(address);
        }
    }
}
