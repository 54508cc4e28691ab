//! The neighbour on a link, found by its router advertisements: each such link of the configuration has one peer at a time.

use std::{collections::BTreeSet, net::IpAddr, time::Duration};

use super::{
    super::{
        discovery::Discovery,
        peer::{Admitted, Peer},
        show,
        wire::cease,
    },
    Actor, Input,
};
use crate::{
    config::valid,
    model::{scope, view::BgpPeerRow},
};

/// Once another router is heard on its link, a neighbour without a session has so long to answer our solicitations, one each
/// second, before it makes room.
const ANSWER_WITHIN: Duration = Duration::from_secs(3);

impl Actor {
    /// Brings what is listened on up to the configuration.
    pub(super) fn discover(&mut self) {
        let wanted: BTreeSet<String> = self.config.links.keys().cloned().collect();
        if matches!(&self.discovery, Ok(Some(discovery)) if *discovery.interfaces() == wanted) {
            return;
        }
        self.discovery = Ok(None);
        if wanted.is_empty() {
            return;
        }
        let input = self.input.clone();
        let started = Discovery::start(wanted, move |found| {
            let input = input.clone();
            async move {
                let _ = input.send(Input::Found(found)).await;
            }
        });
        if let Err(error) = &started {
            tracing::error!(%error, "no peer is found by its router advertisements");
        }
        self.discovery = started.map(Some);
    }

    /// The kernel's networks have changed: a link may have come back.
    pub(super) fn ask_links_again(&self) {
        if let Ok(Some(discovery)) = &self.discovery {
            discovery.ask_again();
        }
    }

    /// A router has been heard on a link, or has connected from it. `None`: it is not, or no longer, the one on that link.
    pub(super) fn found(&mut self, interface: &str, address: IpAddr) -> Option<()> {
        let template = self.config.links.get(interface)?;
        let now = self.start.elapsed();
        if let Some(peer) = self.peers.get_mut(&address) {
            if let Admitted::Link { challenged } = &mut peer.admitted {
                *challenged = None;
            }
            return Some(());
        }
        let config = valid::Peer { address, ..template.clone() };
        if let Some(before) = self.on_link_of(interface) {
            if !self.makes_room(before, now) {
                tracing::debug!(peer = %scope::shown(address), "not the first router on {interface}: left alone");
                return None;
            }
            self.remove(before, cease::PEER_DECONFIGURED);
        }
        tracing::info!(peer = %scope::shown(address), "BGP peer found on {interface}");
        let mut peer = Peer::new(&self.config, &config);
        peer.admitted = Admitted::Link { challenged: None };
        peer.shutdown = self.shut.remove(&address);
        self.peers.insert(address, peer);
        self.give_listeners_passwords();
        self.start_unless_shut(address);
        Some(())
    }

    /// Another router has been heard on a peer's link.
    fn makes_room(&mut self, address: IpAddr, now: Duration) -> bool {
        let Some(peer) = self.peers.get_mut(&address).filter(|peer| peer.session.is_none()) else { return false };
        let Admitted::Link { challenged } = &mut peer.admitted else { return false };
        match challenged {
            Some(since) => now >= *since + ANSWER_WITHIN,
            None => {
                *challenged = Some(now);
                self.ask_links_again();
                false
            }
        }
    }

    /// The peer that was found on a link.
    fn on_link_of(&self, interface: &str) -> Option<IpAddr> {
        let number = scope::number(interface);
        let found = |(address, peer): &(&IpAddr, &Peer)| {
            matches!(peer.admitted, Admitted::Link { .. }) && scope::number_of(**address) == Some(number)
        };
        self.peers.iter().find(found).map(|(address, _)| *address)
    }

    /// Links on which nobody was heard.
    pub(super) fn silent_links(&self) -> impl Iterator<Item = (&String, &valid::Peer)> {
        self.config.links.iter().filter(|(interface, _)| self.on_link_of(interface).is_none())
    }

    /// Their rows.
    pub(super) fn link_rows(&self) -> impl Iterator<Item = BgpPeerRow> {
        self.silent_links().map(|(interface, peer)| {
            let why = self.discovery.as_ref().err();
            show::link_row(interface, peer, peer.remote_asn == self.config.asn, why.map(String::as_str))
        })
    }
}
