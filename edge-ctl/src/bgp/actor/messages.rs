//! What connections bring: messages, decoded and given to the state machine, the RIB and graceful restart.

use std::net::IpAddr;

use bytes::Bytes;

use super::{
    super::{
        fsm::{Event, Side},
        session::{LinkEvent, LinkId},
        wire::{self, EncodeError, Family, Message, Notification, Refresh, Update, cease},
    },
    Actor,
};
use crate::model::scope;

/// A peer that asks for refreshes and does not read them is cut off at this many queued messages.
const LONGEST_OUTBOX: u64 = 65_536;
impl Actor {
    pub(super) fn on_link(&mut self, address: IpAddr, id: LinkId, event: LinkEvent) {
        match event {
            LinkEvent::Frames(frames) => {
                for frame in frames {
                    // Any message may have closed the connection, or its whole peer.
                    let Some(side) = self.peers.get(&address).and_then(|peer| peer.side_of(id)) else { return };
                    let bytes = frame.len();
                    self.on_frame(address, side, frame);
                    if let Some(link) = self.peers.get(&address).and_then(|peer| peer.link(side)) {
                        link.processed(bytes);
                    }
                }
            }
            LinkEvent::BadHeader(notification) => {
                if let Some(side) = self.peers.get(&address).and_then(|peer| peer.side_of(id)) {
                    self.feed(address, Event::MessageError(side, notification));
                }
            }
            LinkEvent::Stuck => {
                if let Some(side) = self.peers.get(&address).and_then(|peer| peer.side_of(id)) {
                    self.feed(address, Event::SendHoldTimerExpires(side));
                }
            }
            LinkEvent::Closed(reason) => {
                if let Some(side) = self.peers.get(&address).and_then(|peer| peer.side_of(id)) {
                    self.feed(address, Event::TcpConnectionFails(side, reason));
                }
            }
        }
    }

    fn on_frame(&mut self, address: IpAddr, side: Side, frame: Bytes) {
        let now = self.start.elapsed();
        let Some(peer) = self.peers.get_mut(&address) else { return };
        if let Some((local, remote)) = peer.link(side).map(|link| (link.local, link.remote)) {
            peer.history.message(false, local, remote, &frame);
        }
        if self.repeated(address, side, &frame) {
            return;
        }
        let Some(peer) = self.peers.get_mut(&address) else { return };
        match wire::decode(frame.clone(), peer.context()) {
            Err(notification) => self.feed(address, Event::MessageError(side, notification)),
            Ok(message) => {
                peer.count(match &message {
                    Message::Open(_) => "open_received",
                    Message::Update(_) => "update_received",
                    Message::Notification(_) => "notification_received",
                    Message::Keepalive => "keepalive_received",
                    Message::RouteRefresh(_) => "route_refresh_received",
                });
                match message {
                    Message::Open(open) => self.feed(address, Event::BgpOpen(side, open)),
                    Message::Keepalive => self.feed(address, Event::KeepAliveMsg(side)),
                    Message::Notification(notification) => {
                        peer.history.error(false, notification.to_string(), now);
                        self.feed(address, Event::NotifMsg(side, notification));
                    }
                    Message::Update(mut update) => {
                        if let Some(interface) = scope::interface(address) {
                            let hops = update.announced.iter_mut().map(|announcement| &mut announcement.next_hop);
                            hops.for_each(|hop| *hop = scope::on(*hop, &interface));
                        }
                        self.feed(address, Event::UpdateMsg(side));
                        self.on_update(address, side, &frame, &update);
                    }
                    Message::RouteRefresh(family) => {
                        self.feed(address, Event::UpdateMsg(side));
                        self.on_refresh(address, side, family);
                    }
                }
            }
        }
    }

    /// An UPDATE with attributes that the session has sent before, which is most of a full table; true where it was one,
    /// and is dealt with.
    fn repeated(&mut self, address: IpAddr, side: Side, frame: &[u8]) -> bool {
        let now = self.start.elapsed();
        let Some(peer) = self.peers.get_mut(&address) else { return false };
        let Some(session) = peer.session.as_mut().filter(|session| session.side == side) else { return false };
        if session.out.terms.context.add_path.contains(Family::Ipv4) {
            return false;
        }
        let (withdrawn, announced) = &mut self.nlri;
        withdrawn.clear();
        announced.clear();
        let Some(route) = session.recent.find(frame, withdrawn, announced) else { return false };
        session.last_update = now;
        self.rib.repeat(address, route, withdrawn, announced, now);
        peer.count("update_received");
        self.feed(address, Event::UpdateMsg(side));
        self.limit(address);
        true
    }

    fn on_update(&mut self, address: IpAddr, side: Side, frame: &[u8], update: &Update) {
        let now = self.start.elapsed();
        let Some(peer) = self.peers.get_mut(&address) else { return };
        let Some(session) = peer.session.as_mut().filter(|session| session.side == side) else { return };
        session.last_update = now;
        session.end_of_rib.extend(update.end_of_rib);
        for problem in &update.problems {
            tracing::warn!(peer = %address, attribute = problem.attribute, withdraws = problem.withdraws,
                detail = %problem.detail, "malformed BGP UPDATE");
        }
        if !update.problems.is_empty() {
            let withdraws = update.problems.iter().any(|problem| problem.withdraws);
            let name = if withdraws { "update_treat_as_withdraw" } else { "update_attribute_discard" };
            *peer.malformed.entry(name).or_default() += 1;
        }
        if let Some(route) = self.rib.update(address, update, now)
            && let Some(session) = self.peers.get_mut(&address).and_then(|peer| peer.session.as_mut())
        {
            session.recent.remember(frame, update, route);
        }
        if let Some(family) = update.end_of_rib {
            self.completed(address, family);
        }
        if !update.announced.is_empty() {
            self.limit(address);
        }
    }

    fn on_refresh(&mut self, address: IpAddr, side: Side, asked: Option<(Family, Refresh)>) {
        let Some(peer) = self.peers.get_mut(&address) else { return };
        let (Some(_), Some((family, what))) = (peer.session.as_ref().filter(|s| s.side == side), asked) else { return };
        if what != Refresh::Ask {
            return self.on_refresh_mark(address, family, what);
        }
        if peer.link(side).is_some_and(|link| link.unsent() > LONGEST_OUTBOX) {
            let notification = Notification::cease(cease::OUT_OF_RESOURCES);
            return self.feed(address, Event::MessageError(side, notification));
        }
        self.tell_again(address, side, family);
    }

    pub(super) fn send_updates(&mut self, address: IpAddr, side: Side, messages: Result<Vec<Bytes>, EncodeError>) {
        match messages {
            Ok(messages) => {
                messages.into_iter().for_each(|message| self.send(address, side, "update_sent", Ok(message)))
            }
            Err(error) => tracing::error!(peer = %address, %error, "BGP routes not announced"),
        }
    }
}
