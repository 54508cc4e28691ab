//! Applying a new configuration to a running speaker.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    net::IpAddr,
};

use tokio::sync::mpsc;

use super::{
    super::{
        BgpError,
        fsm::Event,
        listener::{self, Listener},
        peer::{self, Admitted, Peer},
        wire::{self, Family, Notification, Refresh, cease},
    },
    Actor, Input,
};
use crate::{
    config::{diff::needs_new_session, valid},
    model::scope,
};

impl Actor {
    /// Listeners first: where one cannot be bound nothing else has changed.
    pub(super) fn reload(&mut self, config: valid::Bgp) -> Result<(), BgpError> {
        if config.listen_port != self.config.listen_port {
            let listeners = listen(&config, &self.input)?;
            self.listeners = listeners;
        } else {
            let missing = peer::families(&config).into_iter().filter(|family| !self.listeners.contains_key(family));
            let added = bind(missing, config.listen_port, &self.input)?;
            self.listeners.extend(added);
            let wanted = peer::families(&config);
            self.listeners.retain(|family, _| wanted.contains(family));
        }
        let everyone = config.asn != self.config.asn || config.router_id != self.config.router_id;
        let known: Vec<IpAddr> = self.peers.keys().copied().collect();
        for address in known {
            let dynamic = self.peers.get(&address).is_some_and(|peer| peer.admitted != Admitted::Configured);
            if dynamic && !config.peers.contains_key(&address) {
                self.reload_dynamic(&config, everyone, address);
                continue;
            }
            match (config.peers.get(&address), self.peers.get(&address)) {
                (None, _) => self.remove(address, cease::PEER_DECONFIGURED),
                (Some(new), Some(old)) if everyone || needs_new_session(&old.config, new) => {
                    self.remove(address, cease::OTHER_CONFIGURATION_CHANGE);
                }
                (Some(new), _) => self.change_policy(&config, address, new),
            }
        }
        self.rib.identify(peer::local(&config));
        self.rib.watch_best(config.transit);
        self.config = config;
        self.renew_passwords();
        for (address, new) in self.config.peers.clone() {
            if let Entry::Vacant(vacant) = self.peers.entry(address) {
                vacant.insert(Peer::new(&self.config, &new));
                self.feed(address, Event::ManualStart);
            }
        }
        self.discover();
        self.give_listeners_passwords();
        let transit = self.config.transit;
        self.peers.values_mut().filter_map(|peer| peer.session.as_mut()).for_each(|s| s.out.terms.transit = transit);
        self.originated.set_networks(&self.config.networks);
        self.originated_changed();
        Ok(())
    }

    /// A peer out of a range, or on a link, stays as long as that gives it the same session.
    fn reload_dynamic(&mut self, config: &valid::Bgp, everyone: bool, address: IpAddr) {
        let template = match self.peers.get(&address).map(|peer| peer.admitted) {
            Some(Admitted::Link { .. }) => scope::interface(address).and_then(|interface| config.links.get(&interface)),
            _ => config.ranges.iter().find(|range| range.network.contains(&address)).map(|range| &range.template),
        };
        let new = template.map(|template| valid::Peer { address, ..template.clone() });
        match (new, self.peers.get(&address)) {
            (Some(new), Some(old)) if !everyone && !needs_new_session(&old.config, &new) => {
                self.change_policy(config, address, &new);
            }
            _ => self.remove(address, cease::PEER_DECONFIGURED),
        }
    }

    pub(super) fn remove(&mut self, address: IpAddr, subcode: u8) {
        self.feed(address, Event::ManualStop(Notification::cease(subcode)));
        // What was kept of a peer that is away goes too.
        self.rib.peer_down(address);
        self.watch_no_longer(address);
        self.peers.remove(&address);
    }

    fn change_policy(&mut self, bgp: &valid::Bgp, address: IpAddr, new: &valid::Peer) {
        let Some(peer) = self.peers.get_mut(&address) else { return };
        let limit_changed = peer.config.intake.max_prefixes != new.intake.max_prefixes;
        peer.config = new.clone();
        self.watch(address);
        let Some(peer) = self.peers.get_mut(&address) else { return };
        if limit_changed && peer.limited.take().is_some() {
            self.feed(address, Event::ManualStart);
        } else if limit_changed {
            self.limit(address);
        }
        let Some(peer) = self.peers.get_mut(&address) else { return };
        let policy = peer::policy(bgp, new);
        if policy == peer.policy {
            return;
        }
        let import_changed = policy.import != peer.policy.import;
        peer.policy = policy.clone();
        if import_changed {
            self.rib.set_policy(address, policy);
            let session = self.peers.get(&address).and_then(|peer| peer.session.as_ref());
            if let Some(session) = session.filter(|session| session.negotiated.route_refresh) {
                let (side, families) = (session.side, session.negotiated.families.clone());
                for family in families {
                    self.send(address, side, "route_refresh_sent", wire::encode_route_refresh(family, Refresh::Ask));
                }
            }
        }
        // The export list takes effect with the sync at the end of the reload.
    }
}

/// Binds what the configuration asks for.
pub(super) fn listen(config: &valid::Bgp, input: &mpsc::Sender<Input>) -> Result<BTreeMap<Family, Listener>, BgpError> {
    bind(peer::families(config).into_iter(), config.listen_port, input)
}

fn bind(
    families: impl Iterator<Item = Family>,
    port: Option<u16>,
    input: &mpsc::Sender<Input>,
) -> Result<BTreeMap<Family, Listener>, BgpError> {
    let Some(port) = port else { return Ok(BTreeMap::new()) };
    families
        .map(|family| {
            let input = input.clone();
            let listener = listener::listen(family, port, move |stream, remote| {
                let input = input.clone();
                async move {
                    let _ = input.send(Input::Accepted(stream, remote)).await;
                }
            })?;
            Ok((family, listener))
        })
        .collect()
}
