//! One speaker: the pure parts, and as little glue between them as there can be.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
    time::Duration,
};

use bytes::Bytes;
use edge_ctl::{
    bgp::{
        advertise::{AdjRibOut, Candidate, Originated, Terms},
        fsm::{self, Action, Event, Negotiated, Now, Settings, Side},
        graceful::{self, Helper},
        offer::{self, Circumstances},
        policy::{Local, Policy},
        rib::Rib,
        wire::{self, AddPath, Context, Message},
    },
    config::valid,
    model::{
        PathAttributes,
        bgp_session::{GracefulRestart, SessionSettings},
    },
};
use ipnet::IpNet;

use super::network::ConnectionId;

pub const ASN: u32 = 64512;
pub const HOLD: u64 = 30;
pub const RESTART: Duration = Duration::from_secs(60);
/// How late a node's timers may run.
pub const LATEST: Duration = Duration::from_millis(2000);

const CONTEXT: Context = Context { four_octet_as: true, internal: true, extended: true, add_path: AddPath::None };

/// What a node wants of the world.
#[derive(Debug)]
pub enum Wish {
    Dial,
    StopDial,
    Send(ConnectionId, Bytes),
    Close(ConnectionId),
}

struct Session {
    side: Side,
    negotiated: Negotiated,
    out: AdjRibOut,
    owes_end_of_rib: bool,
    last_received: Duration,
    last_sent: Duration,
}

pub struct Node {
    pub address: IpAddr,
    pub peer: IpAddr,
    pub fsm: fsm::State,
    pub rib: Rib,
    helper: Helper,
    pub originated: Originated,
    settings: GracefulRestart,
    config: valid::Peer,
    links: BTreeMap<Side, ConnectionId>,
    session: Option<Session>,
    restarting: bool,
    preserved: bool,
    /// What the rest of the daemon was told: prefixes with next hops.
    pub routes: BTreeMap<IpNet, Vec<IpAddr>>,
    /// Prefixes that lost their last next hop since somebody looked.
    pub withdrawn: BTreeSet<IpNet>,
    pub ups: u64,
    pub wishes: Vec<Wish>,
    seen_failures: u32,
}

impl Node {
    pub fn new(number: usize, notification: bool, restarted: bool) -> Self {
        let address = |number: usize| IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1 + number as u8));
        let settings = GracefulRestart { time: RESTART, notification, ..GracefulRestart::default() };
        let (own, peer) = (address(number), address(1 - number));
        let session = SessionSettings { graceful_restart: Some(settings), ..SessionSettings::default() };
        let config = valid::Peer {
            address: peer,
            remote_asn: ASN,
            port: 179,
            description: String::new(),
            group: None,
            passive: false,
            local_address: None,
            keepalive: Duration::from_secs(HOLD / 3),
            hold: Duration::from_secs(HOLD),
            peer_edge: false,
            ebgp_multihop: 1,
            session,
            import: None,
            export: None,
            client_networks: vec![],
            intake: valid::Intake::default(),
        };
        let IpAddr::V4(router_id) = own else { unreachable!() };
        let fsm = fsm::State::new(Settings {
            local_asn: ASN,
            router_id,
            remote_asn: ASN,
            hold: HOLD as u16,
            keepalive: config.keepalive,
            passive: false,
            longest_retry: Duration::from_secs(8),
            role: None,
            role_strict: false,
            capabilities: vec![],
        });
        Self {
            address: own,
            peer,
            fsm,
            rib: Rib::new(Local { asn: ASN, router_id: Some(router_id), addresses: [own].into(), ..Local::default() }),
            helper: Helper::default(),
            originated: Originated::default(),
            settings,
            config,
            links: BTreeMap::new(),
            session: None,
            restarting: restarted,
            preserved: restarted,
            routes: BTreeMap::new(),
            withdrawn: BTreeSet::new(),
            ups: 0,
            wishes: Vec::new(),
            seen_failures: 0,
        }
    }

    fn policy() -> Policy {
        Policy { internal: true, ..Policy::default() }
    }

    pub fn is_up(&self) -> bool {
        self.session.is_some()
    }

    pub fn links(&self) -> Vec<ConnectionId> {
        self.links.values().copied().collect()
    }

    pub fn announce(&mut self, prefix: IpNet, now: Duration) {
        self.originated.announce(prefix, PathAttributes::default());
        self.sync(now);
    }

    pub fn withdraw(&mut self, prefix: &IpNet, now: Duration) {
        self.originated.withdraw(prefix);
        self.sync(now);
    }

    /// Everything that an earlier life announced is announced again.
    pub fn restarted(&mut self, now: Duration) {
        self.restarting = false;
        if self.session.as_ref().is_some_and(|session| session.owes_end_of_rib) {
            self.end_of_rib(now);
        }
    }

    pub fn feed(&mut self, now: Now, event: Event) {
        if matches!(event, Event::TcpConnectionConfirmed(_)) {
            let circumstances = Circumstances {
                host: String::new(),
                restarting: self.restarting,
                preserved: self.preserved || self.ups > 0,
            };
            self.fsm.offer(offer::capabilities(ASN, &self.config, &circumstances));
        }
        for action in fsm::step(&mut self.fsm, now, event) {
            self.act(action, now.time);
        }
        self.check(now.time);
    }

    fn act(&mut self, action: Action, now: Duration) {
        match action {
            Action::Dial => self.wishes.push(Wish::Dial),
            Action::StopDial => self.wishes.push(Wish::StopDial),
            Action::SendOpen(side, open) => self.send(side, open.encode().unwrap(), now),
            Action::SendKeepalive(side) => self.send(side, wire::encode_keepalive().unwrap(), now),
            Action::SendNotification(side, notification) => self.send(side, notification.encode().unwrap(), now),
            Action::Close(side) => {
                if let Some(link) = self.links.remove(&side) {
                    self.wishes.push(Wish::Close(link));
                }
            }
            Action::Up(side, negotiated) => self.up(side, negotiated, now),
            Action::Down { keep, .. } => self.down(keep, now),
            Action::Failed(_) => {}
        }
    }

    fn send(&mut self, side: Side, message: Bytes, now: Duration) {
        if let Some(link) = self.links.get(&side) {
            self.wishes.push(Wish::Send(*link, message));
        }
        if let Some(session) = self.session.as_mut().filter(|session| session.side == side) {
            session.last_sent = now;
        }
    }

    fn up(&mut self, side: Side, negotiated: Negotiated, now: Duration) {
        assert!(self.session.is_none(), "a second session beside an established one");
        self.ups += 1;
        self.rib.peer_up(self.peer, Self::policy(), negotiated.peer.router_id);
        let terms = Terms {
            local_asn: ASN,
            remote_asn: ASN,
            peer: self.peer,
            next_hop: self.address,
            families: negotiated.families.clone(),
            extended_next_hop: vec![],
            context: CONTEXT,
            transit: false,
        };
        let owes_end_of_rib = self.restarting && negotiated.graceful;
        let kept = self.helper.back(&negotiated, Some(&self.settings), now);
        self.session = Some(Session {
            side,
            out: AdjRibOut::new(terms),
            negotiated,
            owes_end_of_rib,
            last_received: now,
            last_sent: now,
        });
        self.helped(kept);
        self.sync(now);
        if !owes_end_of_rib {
            self.end_of_rib(now);
        }
    }

    fn down(&mut self, keep: bool, now: Duration) {
        let session = self.session.take().expect("a session that was up");
        let kept = self.helper.lost(&session.negotiated, Some(&self.settings), keep, now);
        if self.helper.is_away() { self.helped(kept) } else { self.rib.peer_down(self.peer) }
    }

    fn helped(&mut self, actions: Vec<graceful::Action>) {
        for action in actions {
            match action {
                graceful::Action::Mark(family) => self.rib.mark_stale(self.peer, family),
                graceful::Action::Sweep(family) => self.rib.sweep_stale(self.peer, family),
                graceful::Action::Degrade(family) => self.rib.degrade_stale(self.peer, family),
                graceful::Action::Withdraw(family) => self.rib.withdraw_family(self.peer, family),
            }
        }
        if self.session.is_none() && !self.helper.is_away() {
            self.rib.peer_down(self.peer);
        }
    }

    fn sync(&mut self, now: Duration) {
        let Some(session) = &mut self.session else { return };
        let own: Vec<(IpNet, PathAttributes)> = self.originated.iter().collect();
        let own = own.iter().map(|(prefix, attributes)| (*prefix, Candidate::Own(attributes)));
        let (side, messages) = (session.side, session.out.sync(&Self::policy(), own).unwrap());
        messages.into_iter().for_each(|message| self.send(side, message, now));
    }

    fn end_of_rib(&mut self, now: Duration) {
        let Some(session) = &mut self.session else { return };
        session.owes_end_of_rib = false;
        let (side, families) = (session.side, session.negotiated.families.clone());
        for family in families {
            self.send(side, wire::encode_end_of_rib(family).unwrap(), now);
        }
    }

    /// A connection of the peer; where it is refused, it is closed.
    pub fn accepted(&mut self, connection: ConnectionId, now: Now) {
        let side = Side::Incoming;
        if self.links.contains_key(&side) && self.fsm.make_room() {
            let link = self.links.remove(&side).unwrap();
            self.links.insert(Side::Outgoing, link);
            if let Some(session) = &mut self.session {
                session.side = Side::Outgoing;
            }
        }
        if self.links.contains_key(&side) {
            if self.fsm.established().is_some_and(|(established, _)| established == side) {
                return self.wishes.push(Wish::Close(connection));
            }
            self.feed(now, Event::TcpConnectionFails(side, "replaced".to_owned()));
        }
        self.links.insert(side, connection);
        self.feed(now, Event::TcpConnectionConfirmed(side));
    }

    /// Our dial has succeeded.
    pub fn dialled(&mut self, connection: ConnectionId, now: Now) {
        self.links.insert(Side::Outgoing, connection);
        self.feed(now, Event::TcpConnectionConfirmed(Side::Outgoing));
    }

    pub fn side_of(&self, connection: ConnectionId) -> Option<Side> {
        self.links.iter().find(|(_, link)| **link == connection).map(|(side, _)| *side)
    }

    pub fn closed(&mut self, connection: ConnectionId, now: Now) {
        if let Some(side) = self.side_of(connection) {
            self.feed(now, Event::TcpConnectionFails(side, "closed".to_owned()));
        }
    }

    pub fn message(&mut self, connection: ConnectionId, frame: Bytes, now: Now) {
        let Some(side) = self.side_of(connection) else { return };
        if let Some(session) = self.session.as_mut().filter(|session| session.side == side) {
            session.last_received = now.time;
        }
        match wire::decode(frame, CONTEXT).expect("what our own encoder says") {
            Message::Open(open) => self.feed(now, Event::BgpOpen(side, open)),
            Message::Keepalive => self.feed(now, Event::KeepAliveMsg(side)),
            Message::Notification(notification) => self.feed(now, Event::NotifMsg(side, notification)),
            Message::RouteRefresh(_) => self.feed(now, Event::UpdateMsg(side)),
            Message::Update(update) => {
                self.feed(now, Event::UpdateMsg(side));
                if self.session.as_ref().is_some_and(|session| session.side == side) {
                    assert!(update.problems.is_empty(), "{:?}", update.problems);
                    self.rib.update(self.peer, &update, now.time);
                    if let Some(family) = update.end_of_rib {
                        let actions = self.helper.complete(family);
                        self.helped(actions);
                    }
                }
            }
        }
        self.check(now.time);
    }

    pub fn next_deadline(&self) -> Option<Duration> {
        [self.fsm.next_deadline(), self.helper.next_deadline()].into_iter().flatten().min()
    }

    pub fn run_timers(&mut self, now: Now) {
        while let Some(event) = self.fsm.due(now.time) {
            self.feed(now, event);
        }
        let actions = self.helper.due(now.time);
        self.helped(actions);
        self.check(now.time);
    }

    /// What must hold after every step.
    fn check(&mut self, now: Duration) {
        for change in self.rib.take_changes() {
            if change.next_hops.is_empty() {
                self.routes.remove(&change.prefix);
                self.withdrawn.insert(change.prefix);
            } else {
                self.routes.insert(change.prefix, change.next_hops);
            }
        }
        // One session at most, and the state machine, the glue and the links agree about it.
        let established = self.fsm.established().map(|(side, _)| side);
        assert_eq!(established, self.session.as_ref().map(|session| session.side), "who is established");
        for side in [Side::Outgoing, Side::Incoming] {
            assert_eq!(self.fsm.connected(side), self.links.contains_key(&side), "{side:?}");
        }
        // No route without a source that is live, or away and awaited.
        let paths = self.rib.received(self.peer).count();
        assert!(paths == 0 || self.is_up() || self.helper.is_away(), "{paths} routes of nobody");
        let stale = self.rib.stale_count(self.peer);
        assert!(stale == 0 || self.helper.next_deadline().is_some(), "{stale} stale routes that nothing ends");
        if !self.is_up() {
            assert!(
                self.rib.received(self.peer).all(|(_, standing)| standing.path.stale),
                "a fresh route without a session"
            );
        }
        if let Some(session) = &self.session {
            let hold = Duration::from_secs(session.negotiated.hold.into());
            assert!(
                now <= session.last_received + hold + LATEST,
                "established without hearing anything for a hold time"
            );
            assert!(now <= session.last_sent + hold / 3 + LATEST, "no keepalive in time");
        }
        self.check_backoff(now);
    }

    /// Each failure in a row waits at least as long as the one before, but for the jitter, up to the longest wait.
    fn check_backoff(&mut self, now: Duration) {
        let failures = self.fsm.failures();
        if failures > self.seen_failures
            && let Some(next) = self.fsm.next_connect()
        {
            let base = Duration::from_secs(1 << (failures - 1).min(16)).min(Duration::from_secs(8));
            let wait = next.saturating_sub(now);
            assert!(
                wait <= base && wait >= base * 3 / 4,
                "after failure {failures} the wait is {wait:?}, not {base:?}"
            );
        }
        self.seen_failures = failures;
    }

    pub fn has_stale(&self) -> bool {
        self.rib.stale_count(self.peer) > 0 || self.helper.next_deadline().is_some()
    }
}

/// The prefix number `number` of a node.
pub fn prefix(node: usize, number: u64) -> IpNet {
    IpNet::V4(ipnet::Ipv4Net::new(Ipv4Addr::new(10, 100 + node as u8, number as u8, 0), 24).unwrap())
}
