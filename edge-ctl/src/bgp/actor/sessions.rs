//! Sessions coming and going: graceful restart on either side, passwords, peers out of a range, and what administrators
//! order.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use ipnet::IpNet;

use super::{
    super::{
        BgpEvent, OrderError, PeerOrder,
        advertise::AdjRibOut,
        fsm::{self, Event, Side},
        graceful,
        offer::{self, Circumstances},
        password::{self, Counters, Password},
        peer::{Admitted, Peer, Session},
        wire::{self, Family, Notification, Refresh},
    },
    Actor, routes,
};
use crate::{config::valid, model::scope};

/// Within this time a peer has to end the refresh that it began; without a limit stale routes could stay for ever.
const REFRESH_LIMIT: Duration = Duration::from_secs(360);
/// Peers out of ranges at one time; more would let a network that is let in exhaust our memory.
const MOST_DYNAMIC: usize = 1024;

/// The daemon's own restart (RFC 4724 4.1).
#[derive(Clone, Debug, Default)]
pub(super) struct OwnRestart {
    /// An earlier life's forwarding state was found: until then, on the actor's clock, peers are told that we restart.
    pub until: Option<Duration>,
    /// What an earlier life forwarded has been forwarded since.
    pub preserved: bool,
}

impl Actor {
    /// Brings the offer for a peer up to date, before a connection sends it.
    pub(super) fn renew_offer(&mut self, address: IpAddr) {
        let Some(peer) = self.peers.get_mut(&address) else { return };
        let circumstances = Circumstances {
            host: self.host.clone(),
            restarting: self.restart.until.is_some(),
            preserved: self.restart.preserved || peer.established_count > 0,
        };
        peer.fsm.offer(offer::capabilities(self.config.asn, &peer.config, &circumstances));
    }

    pub(super) fn up(&mut self, address: IpAddr, side: Side, negotiated: fsm::Negotiated, now: Duration) {
        let Some(peer) = self.peers.get_mut(&address) else { return };
        let Some(link) = peer.link(side) else { return };
        let local = link.local.ip();
        if negotiated.extended_message {
            link.take_up_to(wire::MAX_EXTENDED_MESSAGE);
        }
        tracing::info!(peer = %address, hold = negotiated.hold, "BGP session established");
        peer.established_count += 1;
        peer.last_failure = None;
        peer.changed = Some(now);
        peer.history.flap(true, String::new(), now);
        let interface = scope::interface(address);
        self.rib.local_address(interface.map_or(local, |interface| scope::on(local, &interface)));
        self.rib.peer_up(address, peer.policy.clone(), negotiated.peer.router_id);
        let terms = routes::terms(&self.config, peer, &negotiated, local);
        let kept = peer.helper.back(&negotiated, peer.config.session.graceful_restart.as_ref(), now);
        // Whoever kept our routes wants all of them first. It delays nobody: a peer that restarts at the same time does
        // not wait for one that says so too (RFC 4724 4.1).
        let owes_end_of_rib = self.restart.until.is_some() && negotiated.graceful;
        peer.session = Some(Session {
            side,
            out: AdjRibOut::new(terms),
            negotiated,
            end_of_rib: Default::default(),
            last_update: now,
            recent: Default::default(),
            owes_end_of_rib,
        });
        self.helped(address, kept);
        self.watch(address);
        self.pending.push_back(BgpEvent::PeerUp { address });
        self.sync(address);
        if !owes_end_of_rib {
            self.send_end_of_rib(address);
        }
    }

    /// For every family that is spoken, whether or not there was anything to tell: peers wait for it.
    fn send_end_of_rib(&mut self, address: IpAddr) {
        let Some(session) = self.peers.get_mut(&address).and_then(|peer| peer.session.as_mut()) else { return };
        session.owes_end_of_rib = false;
        let (side, families) = (session.side, session.negotiated.families.clone());
        for family in families {
            self.send(address, side, "update_sent", wire::encode_end_of_rib(family));
        }
    }

    /// Everything that an earlier life announced is announced again, or never will be.
    pub(super) fn restarted(&mut self) {
        self.restart.until = None;
        let addresses: Vec<IpAddr> = self.peers.keys().copied().collect();
        for address in addresses {
            let owes = self.peers.get(&address).and_then(|peer| peer.session.as_ref());
            if owes.is_some_and(|session| session.owes_end_of_rib) {
                self.send_end_of_rib(address);
            }
        }
    }

    pub(super) fn down(&mut self, address: IpAddr, reason: String, keep: bool, now: Duration) {
        let Some(peer) = self.peers.get_mut(&address) else { return };
        let Some(session) = peer.session.take() else { return };
        peer.changed = Some(now);
        peer.last_reset = Some(reason.clone());
        peer.history.flap(false, reason.clone(), now);
        let settings = peer.config.session.graceful_restart.as_ref();
        let kept = peer.helper.lost(&session.negotiated, settings, keep, now);
        let away = peer.helper.is_away();
        let peer_edge = peer.config.peer_edge;
        tracing::warn!(peer = %address, %reason, kept = away, "BGP session down");
        if away {
            self.helped(address, kept);
        } else {
            self.rib.peer_down(address);
        }
        self.pending.push_back(BgpEvent::PeerDown { address, reason, peer_edge });
    }

    /// Carries out what graceful restart decided about a peer's routes.
    pub(super) fn helped(&mut self, address: IpAddr, actions: Vec<graceful::Action>) {
        for action in actions {
            match action {
                graceful::Action::Mark(family) => self.rib.mark_stale(address, family),
                graceful::Action::Sweep(family) => self.rib.sweep_stale(address, family),
                graceful::Action::Degrade(family) => self.rib.degrade_stale(address, family),
                graceful::Action::Withdraw(family) => self.rib.withdraw_family(address, family),
            }
        }
        if let Some(peer) = self.peers.get(&address)
            && peer.session.is_none()
            && !peer.helper.is_away()
        {
            self.rib.peer_down(address);
        }
    }

    /// Timers of graceful restart, ours and the peers'; peers out of a range that are gone.
    pub(super) fn run_session_timers(&mut self, now: Duration) {
        if self.restart.until.is_some_and(|until| until <= now) {
            tracing::info!(
                "graceful restart: not everything was announced in time; telling the peers that this is all"
            );
            self.restarted();
        }
        let due: Vec<(IpAddr, Vec<graceful::Action>)> = self
            .peers
            .iter_mut()
            .filter(|(_, peer)| peer.helper.next_deadline().is_some_and(|at| at <= now))
            .map(|(address, peer)| (*address, peer.helper.due(now)))
            .collect();
        for (address, actions) in due {
            self.helped(address, actions);
        }
        let idle = |peer: &Peer| {
            let connected = peer.outgoing.is_some() || peer.incoming.is_some();
            peer.admitted == Admitted::Range && !connected && !peer.helper.is_away() && peer.shutdown.is_none()
        };
        let gone: Vec<IpAddr> = self.peers.iter().filter(|(_, peer)| idle(peer)).map(|(address, _)| *address).collect();
        for address in gone {
            self.watch_no_longer(address);
            self.peers.remove(&address);
        }
    }

    pub(super) fn next_session_deadline(&self) -> Option<Duration> {
        let helpers = self.peers.values().filter_map(|peer| peer.helper.next_deadline());
        helpers.chain(self.restart.until).min()
    }

    /// A family's table is complete.
    pub(super) fn completed(&mut self, address: IpAddr, family: Family) {
        let actions = self.peers.get_mut(&address).map(|peer| peer.helper.complete(family));
        self.helped(address, actions.unwrap_or_default());
    }

    /// The peer begins or ends to tell a family anew (RFC 7313 4).
    pub(super) fn on_refresh_mark(&mut self, address: IpAddr, family: Family, what: Refresh) {
        let now = self.start.elapsed();
        let Some(peer) = self.peers.get_mut(&address) else { return };
        let enhanced = peer.session.as_ref().is_some_and(|session| session.negotiated.enhanced_refresh);
        let actions = match what {
            Refresh::Begin if enhanced => peer.helper.refresh(family, REFRESH_LIMIT, now),
            Refresh::End if enhanced => peer.helper.complete(family),
            _ => return,
        };
        self.helped(address, actions);
    }

    /// Reads the passwords of all peers again and gives them to listeners and connections, which stay.
    pub(super) fn renew_passwords(&mut self) {
        for peer in self.peers.values_mut() {
            let source = peer.config.session.password.as_ref();
            let new = source.map_or_else(|| Ok(Password::default()), password::read);
            if let Err(error) = &new {
                tracing::error!(peer = %peer.config.address, %error, "no connection without its password");
            }
            if let (Ok(old), Ok(new)) = (&peer.password, &new)
                && old != new
            {
                for link in [&peer.outgoing, &peer.incoming].into_iter().flatten() {
                    if let Err(error) = link.set_password(new) {
                        tracing::error!(peer = %peer.config.address, %error, "TCP MD5 password not changed");
                    }
                }
            }
            peer.password = new;
        }
        self.give_listeners_passwords();
    }

    pub(super) fn give_listeners_passwords(&mut self) {
        let mut wanted: Vec<(IpNet, Password)> = Vec::new();
        for range in &self.config.ranges {
            match range.template.session.password.as_ref().map(password::read) {
                Some(Ok(password)) => wanted.push((range.network, password)),
                Some(Err(error)) => tracing::error!(range = %range.network, %error, "the range is not served"),
                None => {}
            }
        }
        for (address, peer) in self.peers.iter().filter(|(_, peer)| peer.admitted != Admitted::Range) {
            if let Ok(password) = &peer.password
                && !password.bytes().is_empty()
            {
                wanted.push((IpNet::from(scope::bare(*address)), password.clone()));
            }
        }
        let gone: Vec<IpNet> =
            self.signed.iter().filter(|network| !wanted.iter().any(|(other, _)| other == *network)).copied().collect();
        let all = wanted.iter().map(|(network, password)| (*network, password.clone()));
        for (network, password) in all.chain(gone.into_iter().map(|network| (network, Password::default()))) {
            let Some(listener) = self.listeners.get(&Family::of(&network)) else { continue };
            if let Err(error) = listener.set_password(network, &password) {
                tracing::error!(%network, %error, "TCP MD5 password not set on the listening socket");
            }
        }
        self.signed = wanted.into_iter().map(|(network, _)| network).collect();
    }

    /// Why a dial failed, with what the kernel knows about signatures.
    pub(super) fn diagnose(peer: &Peer, error: &std::io::Error) -> String {
        let (address, port) = (peer.config.address, peer.config.port);
        let remote = match scope::interface(address) {
            Some(_) => format!("[{}]:{port}", scope::shown(address)),
            None => SocketAddr::new(address, port).to_string(),
        };
        let signed = peer.password.as_ref().is_ok_and(|password| !password.bytes().is_empty());
        let remark = Counters::now().remark(peer.signatures, signed);
        match remark {
            Some(remark) => format!("cannot connect to {remote}: {error}; {remark}"),
            None => format!("cannot connect to {remote}: {error}"),
        }
    }

    /// What to add to "no connection within 10 s": a silent peer is how a password that differs looks from outside.
    pub(super) fn silence(&self, address: IpAddr) -> Option<String> {
        let peer = self.peers.get(&address)?;
        let signed = peer.password.as_ref().is_ok_and(|password| !password.bytes().is_empty());
        let hint = "no answer at all: is its TCP MD5 password another one?".to_owned();
        Counters::now().remark(peer.signatures, signed).or(signed.then_some(hint))
    }

    /// The peer that somebody who connects becomes, out of a range or as the neighbour on a link; `None`: it is in none, or
    /// there are too many.
    pub(super) fn dynamic_peer(&mut self, address: IpAddr) -> Option<()> {
        if let Some(interface) = scope::interface(address).filter(|name| self.config.links.contains_key(name)) {
            return self.found(&interface, address);
        }
        let range = self.config.ranges.iter().find(|range| range.network.contains(&address))?;
        if self.peers.values().filter(|peer| peer.admitted == Admitted::Range).count() >= MOST_DYNAMIC {
            tracing::warn!(peer = %address, most = MOST_DYNAMIC, "BGP connection refused: too many peers out of ranges");
            return None;
        }
        let config = valid::Peer { address, ..range.template.clone() };
        tracing::info!(peer = %address, range = %range.network, "BGP peer out of a range");
        let mut peer = Peer::new(&self.config, &config);
        peer.admitted = Admitted::Range;
        self.peers.insert(address, peer);
        self.feed(address, Event::ManualStart);
        Some(())
    }

    /// What an administrator ordered.
    pub(super) fn order(&mut self, order: PeerOrder) -> Result<(), OrderError> {
        let addresses: Vec<IpAddr> = match order.peer {
            Some(address) if self.peers.contains_key(&address) => vec![address],
            Some(address) => return Err(OrderError::Unknown(address)),
            None => self.peers.keys().copied().collect(),
        };
        for address in addresses {
            match &order.what {
                super::super::Order::Clear => {
                    self.feed(address, Event::ManualStop(Notification::reset()));
                    self.start_unless_shut(address);
                }
                super::super::Order::Refresh => self.refresh_both_ways(address),
                super::super::Order::Shutdown(message) => {
                    if let Some(peer) = self.peers.get_mut(&address) {
                        peer.shutdown = Some(message.clone());
                    }
                    self.watch_no_longer(address);
                    self.feed(address, Event::ManualStop(Notification::shutdown(message)));
                }
                super::super::Order::Enable => {
                    if let Some(peer) = self.peers.get_mut(&address) {
                        peer.shutdown = None;
                    }
                    self.start_unless_shut(address);
                }
            }
        }
        Ok(())
    }

    /// Starts a peer, unless an administrator has shut it down. What it had too much of is forgiven.
    pub(super) fn start_unless_shut(&mut self, address: IpAddr) {
        let Some(peer) = self.peers.get_mut(&address) else { return };
        if peer.shutdown.is_none() {
            peer.limited = None;
            self.feed(address, Event::ManualStart);
        }
    }

    /// Asks the peer for its routes again and tells it ours again; the session stays.
    fn refresh_both_ways(&mut self, address: IpAddr) {
        let Some(session) = self.peers.get(&address).and_then(|peer| peer.session.as_ref()) else { return };
        let (side, families) = (session.side, session.negotiated.families.clone());
        let asks = session.negotiated.route_refresh;
        for family in families {
            if asks {
                self.send(address, side, "route_refresh_sent", wire::encode_route_refresh(family, Refresh::Ask));
            }
            self.tell_again(address, side, family);
        }
    }

    /// Says everything of a family again, between marks where the peer knows them (RFC 7313 4).
    pub(super) fn tell_again(&mut self, address: IpAddr, side: Side, family: Family) {
        let Some(session) = self.peers.get(&address).and_then(|peer| peer.session.as_ref()) else { return };
        let (messages, marked) = (session.out.refresh(family), session.negotiated.enhanced_refresh);
        if marked {
            self.send(address, side, "route_refresh_sent", wire::encode_route_refresh(family, Refresh::Begin));
        }
        self.send_updates(address, side, messages);
        if marked {
            self.send(address, side, "route_refresh_sent", wire::encode_route_refresh(family, Refresh::End));
        }
    }
}
