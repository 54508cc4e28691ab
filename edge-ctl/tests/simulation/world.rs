//! Time, faults, and the queue of everything that is still to happen.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use edge_ctl::bgp::{
    fsm::{Event, Now},
    wire::{self, Notification},
};
use ipnet::IpNet;

use super::{
    network::{Arrival, Connection, ConnectionId, Random, pieces},
    node::{LATEST, Node, RESTART, Wish, prefix},
};

/// What may go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Faults {
    Any,
    /// The network only delays, and clocks are in time.
    CrashOfOne,
}

#[derive(Debug)]
enum Happening {
    Poll(usize),
    Connect { dialler: usize, dial: u64 },
    Confirm { dialler: usize, dial: u64, connection: ConnectionId },
    Accept { connection: ConnectionId },
    Arrive { connection: ConnectionId, end: usize, what: Arrival },
    Refused { dialler: usize, dial: u64 },
    Start { node: usize, restarted: bool },
    Restarted { node: usize, life: u64 },
}

/// How long faults happen, and how long everything then has to come to rest.
const CHAOS: Duration = Duration::from_secs(90);
/// Longer than a hold time that begins with the last fault, a backoff, a restart time and the stale timer's End-of-RIB.
const REST: Duration = Duration::from_secs(150);

pub struct World {
    random: Random,
    faults: Faults,
    now: Duration,
    sequence: u64,
    queue: BTreeMap<(Duration, u64), Happening>,
    nodes: [Option<Node>; 2],
    /// What a node announces, over its lives.
    announces: [BTreeSet<IpNet>; 2],
    /// Lives so far: what was meant for an earlier one is not delivered.
    lives: [u64; 2],
    /// The dial under way of each node.
    dials: [Option<u64>; 2],
    connections: Vec<Connection>,
    cut_until: Duration,
    calm: bool,
    notification: bool,
    story: String,
}

impl World {
    pub fn new(seed: u64, faults: Faults) -> Self {
        let mut random = Random::new(seed);
        let notification = random.percent(30);
        let mut world = Self {
            random,
            faults,
            now: Duration::ZERO,
            sequence: 0,
            queue: BTreeMap::new(),
            nodes: [None, None],
            announces: [BTreeSet::new(), BTreeSet::new()],
            lives: [0, 0],
            dials: [None, None],
            connections: Vec::new(),
            cut_until: Duration::ZERO,
            calm: faults == Faults::CrashOfOne,
            notification,
            story: String::new(),
        };
        for node in 0..2 {
            for number in 0..1 + world.random.below(3) {
                world.announces[node].insert(prefix(node, number));
            }
            let at = world.random.millis(0, 3000);
            world.later(at, Happening::Start { node, restarted: false });
        }
        world
    }

    pub fn story(self) -> String {
        self.story
    }

    fn tell(&mut self, what: std::fmt::Arguments<'_>) {
        let _ = writeln!(self.story, "{:>9.3} {what}", self.now.as_secs_f64());
    }

    fn later(&mut self, delay: Duration, what: Happening) {
        self.at(self.now + delay, what);
    }

    fn at(&mut self, time: Duration, what: Happening) {
        self.sequence += 1;
        self.queue.insert((time, self.sequence), what);
    }

    fn moment(&mut self) -> Now {
        Now { time: self.now, random: self.random.next() as u32 }
    }

    /// Faults for a while.
    pub fn run_chaos(&mut self) {
        while self.now < CHAOS {
            let next = self.now + self.random.millis(10, 8000);
            self.run_until(next);
            self.fault();
        }
        self.calm = true;
        self.cut_until = self.now;
    }

    /// No faults any more, until everything has come to rest.
    pub fn settle(&mut self) {
        let end = self.now + REST;
        self.run_until(end);
    }

    fn fault(&mut self) {
        let node = self.random.below(2) as usize;
        match self.random.below(10) {
            0 | 1 => self.reset_all(),
            2 => {
                let cut = self.random.millis(100, 45_000);
                self.tell(format_args!("the way is cut for {cut:?}"));
                self.cut_until = self.cut_until.max(self.now + cut);
            }
            3 | 4 => self.crash(node),
            5 => {
                let number = self.random.below(4);
                self.change(node, prefix(node, number));
            }
            6 => self.order(node),
            _ => {
                // Both at once, as at the end of a power cut.
                if self.random.percent(10) {
                    self.crash(0);
                    self.crash(1);
                }
            }
        }
    }

    fn reset_all(&mut self) {
        self.tell(format_args!("all connections are reset"));
        for connection in 0..self.connections.len() {
            for end in 0..2 {
                if self.connections[connection].held[end] && self.random.percent(90) {
                    let delay = self.random.millis(0, 50);
                    self.later(delay, Happening::Arrive { connection, end, what: Arrival::Closed });
                }
            }
        }
    }

    fn change(&mut self, node: usize, prefix: IpNet) {
        let now = self.now;
        let gone = self.announces[node].remove(&prefix);
        self.tell(format_args!("node {node} {} {prefix}", if gone { "withdraws" } else { "announces" }));
        if !gone {
            self.announces[node].insert(prefix);
        }
        if let Some(speaker) = &mut self.nodes[node] {
            if gone { speaker.withdraw(&prefix, now) } else { speaker.announce(prefix, now) }
        }
        self.grant(node);
    }

    /// An administrator clears the session.
    fn order(&mut self, node: usize) {
        self.tell(format_args!("node {node} clears"));
        let (first, second) = (self.moment(), self.moment());
        if let Some(speaker) = &mut self.nodes[node] {
            speaker.feed(first, Event::ManualStop(Notification::reset()));
            speaker.feed(second, Event::ManualStart);
        }
        self.grant(node);
    }

    /// Kills a node without a goodbye. Its kernel mostly closes its connections; a power cut does not.
    fn crash(&mut self, node: usize) {
        let Some(dead) = self.nodes[node].take() else { return };
        self.lives[node] += 1;
        self.dials[node] = None;
        let told = self.random.percent(80) || self.faults == Faults::CrashOfOne;
        self.tell(format_args!("node {node} is killed, and its peer {}", if told { "is told" } else { "is not told" }));
        for connection in 0..self.connections.len() {
            let end = self.connections[connection].end_of(node);
            if std::mem::take(&mut self.connections[connection].held[end]) && told {
                self.close_towards(connection, 1 - end);
            }
        }
        drop(dead);
        let away = match self.faults {
            Faults::Any => self.random.millis(10, 80_000),
            Faults::CrashOfOne => self.random.millis(10, RESTART.as_millis() as u64 / 2),
        };
        // A host that comes back from a power cut has forwarded nothing meanwhile.
        let restarted = told;
        self.later(away, Happening::Start { node, restarted });
    }

    /// The peer of a killed node has every route of it until the end of the restart.
    pub fn crash_and_restart_without_withdrawals(&mut self) {
        let node = self.random.below(2) as usize;
        let other = 1 - node;
        self.nodes[other].as_mut().unwrap().withdrawn.clear();
        self.crash(node);
        let end = self.now + REST;
        self.run_until(end);
        let witness = self.nodes[other].as_ref().unwrap();
        assert!(witness.withdrawn.is_empty(), "withdrawn over the restart: {:?}\n{}", witness.withdrawn, self.story);
        assert!(!witness.has_stale(), "{}", self.story);
    }

    pub fn assert_converged(&self) {
        for node in 0..2 {
            let speaker = self.nodes[node].as_ref().unwrap_or_else(|| panic!("node {node} is there\n{}", self.story));
            assert!(speaker.is_up(), "node {node} has no session: {:?}\n{}", speaker.fsm, self.story);
            let learnt: BTreeSet<IpNet> = speaker.routes.keys().copied().collect();
            assert_eq!(learnt, self.announces[1 - node], "what node {node} has learnt\n{}", self.story);
            assert!(!speaker.has_stale(), "node {node} keeps stale routes\n{}", self.story);
            assert_eq!(speaker.links().len(), 1, "connections of node {node}\n{}", self.story);
        }
        let links = |node: usize| self.nodes[node].as_ref().map(Node::links);
        assert_eq!(links(0), links(1), "both ends of one connection\n{}", self.story);
    }

    fn run_until(&mut self, end: Duration) {
        while let Some(entry) = self.queue.first_entry() {
            let (time, _) = *entry.key();
            if time > end {
                break;
            }
            let happening = entry.remove();
            self.now = time;
            self.happen(happening);
        }
        self.now = end;
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::Start { node, restarted } => self.start(node, restarted),
            Happening::Restarted { node, life } => {
                let now = self.now;
                if let Some(speaker) = self.nodes[node].as_mut().filter(|_| self.lives[node] == life) {
                    speaker.restarted(now);
                }
                self.grant(node);
            }
            Happening::Poll(node) => {
                let now = self.moment();
                if let Some(speaker) = &mut self.nodes[node]
                    && speaker.next_deadline().is_some_and(|at| at <= now.time)
                {
                    speaker.run_timers(now);
                    self.grant(node);
                }
            }
            Happening::Connect { dialler, dial } => self.connect(dialler, dial),
            Happening::Refused { dialler, dial } => {
                if self.dials[dialler] == Some(dial) {
                    self.dials[dialler] = None;
                    let now = self.moment();
                    let event = Event::TcpConnectionFails(edge_ctl::bgp::fsm::Side::Outgoing, "refused".to_owned());
                    if let Some(speaker) = &mut self.nodes[dialler] {
                        speaker.feed(now, event);
                    }
                    self.grant(dialler);
                }
            }
            Happening::Confirm { dialler, dial, connection } => {
                if self.dials[dialler] != Some(dial) {
                    // The dial was given up meanwhile: the kernel closes what it brought.
                    self.connections[connection].held[0] = false;
                    return self.close_towards(connection, 1);
                }
                self.dials[dialler] = None;
                let now = self.moment();
                if let Some(speaker) = &mut self.nodes[dialler] {
                    speaker.dialled(connection, now);
                }
                self.grant(dialler);
            }
            Happening::Accept { connection } => {
                let node = self.connections[connection].nodes[1];
                let now = self.moment();
                match &mut self.nodes[node] {
                    Some(speaker) if self.connections[connection].held[1] => speaker.accepted(connection, now),
                    _ => return,
                }
                self.grant(node);
            }
            Happening::Arrive { connection, end, what } => self.arrive(connection, end, what),
        }
    }

    fn start(&mut self, node: usize, restarted: bool) {
        self.tell(format_args!("node {node} starts{}", if restarted { " again" } else { "" }));
        let mut speaker = Node::new(node, self.notification, restarted);
        let now = self.moment();
        // As the daemon: what was announced before comes some time after the start, then the end of the restart is told.
        if !restarted {
            self.announces[node].iter().for_each(|prefix| speaker.announce(*prefix, now.time));
        }
        speaker.feed(now, Event::ManualStart);
        self.nodes[node] = Some(speaker);
        self.grant(node);
        if restarted {
            let delay = self.random.millis(10, 5000);
            let life = self.lives[node];
            let at = self.now + delay;
            self.at(at, Happening::Restarted { node, life });
            // Before the end of the restart, all at once.
            let prefixes: Vec<IpNet> = self.announces[node].iter().copied().collect();
            let now = self.now;
            if let Some(speaker) = &mut self.nodes[node] {
                prefixes.into_iter().for_each(|prefix| speaker.announce(prefix, now));
            }
            self.grant(node);
        }
    }

    /// A dial reaches the other side, or does not.
    fn connect(&mut self, dialler: usize, dial: u64) {
        if self.dials[dialler] != Some(dial) || self.now < self.cut_until {
            // Into the void: the state machine gives it up.
            return;
        }
        let listener = 1 - dialler;
        if self.nodes[listener].is_none() {
            let delay = self.delay();
            return self.later(delay, Happening::Refused { dialler, dial });
        }
        let connection = self.connections.len();
        self.connections.push(Connection {
            nodes: [dialler, listener],
            held: [true, true],
            busy: [self.now; 2],
            buffer: [BytesMut::new(), BytesMut::new()],
        });
        let (confirm, accept) = (self.delay(), self.delay());
        self.later(confirm, Happening::Confirm { dialler, dial, connection });
        self.later(accept, Happening::Accept { connection });
        // Nothing arrives at an end before the end is there.
        self.connections[connection].busy = [self.now + confirm, self.now + accept];
    }

    fn arrive(&mut self, connection: ConnectionId, end: usize, what: Arrival) {
        let node = self.connections[connection].nodes[end];
        if !self.connections[connection].held[end] {
            // Nobody has this end any more: its kernel says so, if there is one.
            if self.nodes[node].is_some() && matches!(what, Arrival::Octets(_)) {
                self.close_towards(connection, 1 - end);
            }
            return;
        }
        let octets = match what {
            Arrival::Octets(octets) => octets,
            Arrival::Closed => {
                self.connections[connection].held[end] = false;
                let now = self.moment();
                if let Some(speaker) = &mut self.nodes[node] {
                    speaker.closed(connection, now);
                }
                return self.grant(node);
            }
        };
        self.connections[connection].buffer[end].extend_from_slice(&octets);
        loop {
            let buffer = &mut self.connections[connection].buffer[end];
            let frame: Bytes = match wire::message_length(buffer, wire::MAX_MESSAGE).unwrap() {
                Some(length) if buffer.len() >= length => buffer.split_to(length).freeze(),
                _ => break,
            };
            let now = self.moment();
            if let Some(speaker) = &mut self.nodes[node] {
                speaker.message(connection, frame, now);
            }
            self.grant(node);
        }
    }

    /// Carries out what a node wishes, and looks at its timers.
    fn grant(&mut self, node: usize) {
        let Some(speaker) = &mut self.nodes[node] else { return };
        let (wishes, deadline) = (std::mem::take(&mut speaker.wishes), speaker.next_deadline());
        for wish in wishes {
            match wish {
                Wish::Dial => {
                    self.sequence += 1;
                    let dial = self.sequence;
                    self.dials[node] = Some(dial);
                    let delay = self.delay();
                    self.later(delay, Happening::Connect { dialler: node, dial });
                }
                Wish::StopDial => self.dials[node] = None,
                Wish::Send(connection, message) => self.send(connection, node, &message),
                Wish::Close(connection) => {
                    let end = self.connections[connection].end_of(node);
                    self.connections[connection].held[end] = false;
                    self.close_towards(connection, 1 - end);
                }
            }
        }
        if let Some(deadline) = deadline {
            let late = if !self.calm && self.random.percent(5) { self.random.millis(0, 1900) } else { Duration::ZERO };
            debug_assert!(late < LATEST);
            self.at(deadline.max(self.now) + late, Happening::Poll(node));
        }
    }

    fn send(&mut self, connection: ConnectionId, node: usize, message: &Bytes) {
        let end = 1 - self.connections[connection].end_of(node);
        for piece in pieces(message, &mut self.random) {
            let at = self.arrival(connection, end);
            self.at(at, Happening::Arrive { connection, end, what: Arrival::Octets(piece) });
        }
    }

    /// Tells an end that the other one has closed, behind all that is under way.
    fn close_towards(&mut self, connection: ConnectionId, end: usize) {
        let at = self.arrival(connection, end);
        self.at(at, Happening::Arrive { connection, end, what: Arrival::Closed });
    }

    /// When what is sent now arrives: in order, after the cut, later where it was lost and sent again.
    fn arrival(&mut self, connection: ConnectionId, end: usize) -> Duration {
        let mut delay = self.delay();
        if !self.calm && self.random.percent(2) {
            delay += self.random.millis(200, 3000);
        }
        let at = self.connections[connection].busy[end].max(self.now.max(self.cut_until) + delay);
        self.connections[connection].busy[end] = at;
        at
    }

    fn delay(&mut self) -> Duration {
        let most = if self.random.percent(5) { 400 } else { 20 };
        self.random.millis(0, most)
    }
}
