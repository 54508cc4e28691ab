//! The thread that runs all sessions: sockets and clock, no decisions.

use std::{
    collections::BTreeMap,
    hash::{BuildHasher, Hasher, RandomState},
    io,
    net::{IpAddr, SocketAddr},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use futures::future::{pending, select_all};
use tokio::{
    net::UdpSocket,
    sync::mpsc,
    time::{Instant, sleep_until},
};

use super::{
    super::{fsm::Now, socket::origin},
    Command, Counters, Report, Status, Target,
    packet::{LENGTH, Name, Packet},
    session::{self, Action, Event, State},
    socket,
};

/// A listening socket that could not be had is tried again after this.
const RETRY: Duration = Duration::from_secs(1);

pub(super) fn start(
    commands: mpsc::UnboundedReceiver<Command>,
    reports: mpsc::UnboundedSender<Report>,
) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let thread = std::thread::Builder::new().name("bfd".to_owned());
    thread.spawn(move || runtime.block_on(Driver::new(reports).run(commands))).map(drop)
}

struct Session {
    target: Target,
    state: State,
    counters: Arc<Counters>,
    /// What packets leave by; `None`: it could not be had yet.
    sender: Option<std::net::UdpSocket>,
    retry_at: Option<Instant>,
    /// What was last reported.
    told: Option<Status>,
}

struct Driver {
    sessions: BTreeMap<IpAddr, Session>,
    /// By family (true: IPv4) and port.
    listeners: BTreeMap<(bool, u16), UdpSocket>,
    reports: mpsc::UnboundedSender<Report>,
    start: Instant,
    random: RandomState,
    draws: u64,
}

impl Driver {
    fn new(reports: mpsc::UnboundedSender<Report>) -> Self {
        Self {
            sessions: BTreeMap::new(),
            listeners: BTreeMap::new(),
            reports,
            start: Instant::now(),
            random: RandomState::new(),
            draws: 0,
        }
    }

    async fn run(mut self, mut commands: mpsc::UnboundedReceiver<Command>) {
        loop {
            let deadline = self.next_deadline().unwrap_or_else(|| Instant::now() + Duration::from_secs(3600));
            tokio::select! {
                // What has arrived counts before the clock does: a thread that was not run must not see silence.
                biased;
                key = readable(&self.listeners) => self.receive(key),
                command = commands.recv() => match command {
                    Some(Command::Watch(target, counters)) => self.watch(target, counters),
                    Some(Command::Forget(peer)) => self.forget(peer),
                    None => break,
                },
                () = sleep_until(deadline) => self.due(),
            }
        }
        let peers: Vec<IpAddr> = self.sessions.keys().copied().collect();
        peers.into_iter().for_each(|peer| self.forget(peer));
    }

    fn now(&mut self) -> Now {
        Now { time: self.start.elapsed(), random: self.draw() }
    }

    fn draw(&mut self) -> u32 {
        self.draws += 1;
        let mut hasher = self.random.build_hasher();
        hasher.write_u64(self.draws);
        (hasher.finish() >> 32) as u32
    }

    fn next_deadline(&self) -> Option<Instant> {
        let next = |session: &Session| {
            let due = session.state.next_deadline().map(|at| self.start + at);
            due.into_iter().chain(session.retry_at).min()
        };
        self.sessions.values().filter_map(next).min()
    }

    fn watch(&mut self, target: Target, counters: Arc<Counters>) {
        let peer = target.peer;
        self.forget(peer);
        let now = self.now();
        let discriminator = self.discriminator();
        let state = State::new(target.settings, discriminator, now);
        self.sessions.insert(peer, Session { target, state, counters, sender: None, retry_at: None, told: None });
        self.open(peer);
    }

    /// RFC 5880 6.8.1: not 0, random, and no other session's.
    fn discriminator(&mut self) -> u32 {
        loop {
            let number = self.draw();
            if number != 0 && self.sessions.values().all(|session| session.state.discriminator() != number) {
                return number;
            }
        }
    }

    /// Opens what a session needs; tries again later where that fails.
    fn open(&mut self, peer: IpAddr) {
        let random = self.draw();
        let Some(session) = self.sessions.get_mut(&peer) else { return };
        let Target { local, remote, settings, .. } = session.target;
        let port = if settings.multihop { socket::MULTIHOP } else { socket::SINGLE_HOP };
        let key = (remote.is_ipv4(), port);
        let listening = match self.listeners.contains_key(&key) {
            true => Ok(()),
            false => socket::listen(key.0, port).and_then(UdpSocket::from_std).map(|socket| {
                self.listeners.insert(key, socket);
            }),
        };
        let listening = listening.map_err(|error| {
            format!("UDP port {port} cannot be had: {error}; does another BFD daemon (bfdd, bird) run on this host?")
        });
        let opened = listening.and_then(|()| {
            socket::sender(local, remote, settings.multihop, random)
                .map_err(|error| format!("no socket from {} to {}: {error}", local.ip(), remote.ip()))
        });
        match opened {
            Ok(socket) => {
                (session.sender, session.retry_at) = (Some(socket), None);
                self.report(peer);
            }
            Err(why) => {
                session.told = None;
                let first = session.retry_at.replace(Instant::now() + RETRY).is_none();
                if first {
                    let _ = self.reports.send(Report { peer, status: Err(why) });
                }
            }
        }
    }

    fn forget(&mut self, peer: IpAddr) {
        self.feed(peer, Event::Stop);
        self.sessions.remove(&peer);
    }

    fn due(&mut self) {
        let now = Instant::now();
        let peers: Vec<IpAddr> = self.sessions.keys().copied().collect();
        for peer in peers {
            let Some(session) = self.sessions.get(&peer) else { continue };
            let retry = session.retry_at.is_some_and(|at| at <= now);
            let due = session.state.next_deadline().is_some_and(|at| self.start + at <= now);
            if retry {
                self.open(peer);
            }
            if due {
                self.feed(peer, Event::Due);
            }
        }
    }

    /// Reads everything that has arrived on a socket.
    fn receive(&mut self, key: (bool, u16)) {
        let mut buffer = [0; 256];
        loop {
            let Some(socket) = self.listeners.get(&key) else { return };
            match socket.try_recv_from(&mut buffer) {
                Ok((length, from)) => self.packet(key.1, from, buffer.get(..length).unwrap_or_default()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // An ICMP error of an earlier packet, mostly: nobody listens there.
                Err(_) => {}
            }
        }
    }

    /// RFC 5880 6.8.6: by discriminator where the other side knows ours, else by address.
    fn packet(&mut self, port: u16, from: SocketAddr, bytes: &[u8]) {
        let packet = match Packet::parse(bytes) {
            Ok(packet) => packet,
            Err(why) => return tracing::debug!(%from, why, "BFD packet discarded"),
        };
        // A link-local address is a neighbour's only together with its interface.
        let peer = origin(from);
        let Some(session) = self.sessions.get(&peer) else { return };
        let multihop = session.target.settings.multihop;
        let right_port = (port == socket::MULTIHOP) == multihop;
        if !right_port || (packet.yours != 0 && packet.yours != session.state.discriminator()) {
            return tracing::debug!(%from, "BFD packet of another session discarded");
        }
        session.counters.received.fetch_add(1, Ordering::Relaxed);
        self.feed(peer, Event::Received(packet));
    }

    fn feed(&mut self, peer: IpAddr, event: Event) {
        let now = self.now();
        let Some(session) = self.sessions.get_mut(&peer) else { return };
        for action in session::step(&mut session.state, now, event) {
            if let Action::Send(packet) = action {
                send(session, &packet.encode());
            }
        }
        // Not the state alone: the peer's intervals and its C-bit may come with a later packet. AdminDown is our own end.
        if session.sender.is_some() && session.state.name() != Name::AdminDown {
            self.report(peer);
        }
    }

    /// Tells how a session stands, unless that was told already.
    fn report(&mut self, peer: IpAddr) {
        let Some(session) = self.sessions.get_mut(&peer) else { return };
        let status = status(&session.state);
        if session.told.replace(status) != Some(status) {
            // The actor is gone where this fails, and this thread will be.
            let _ = self.reports.send(Report { peer, status: Ok(status) });
        }
    }
}

fn status(state: &State) -> Status {
    let remote = state.remote();
    Status {
        state: state.name(),
        diagnostic: state.diagnostic(),
        remote_state: remote.state,
        remote_diagnostic: remote.diagnostic,
        independent: remote.independent,
        transmit: state.transmit_interval(),
        detection: state.detection_time(),
    }
}

/// A packet that cannot be sent is one that is lost: the other side's detection time is what counts.
fn send(session: &Session, packet: &[u8; LENGTH]) {
    let Some(socket) = &session.sender else { return };
    match socket.send(packet) {
        Ok(_) => drop(session.counters.sent.fetch_add(1, Ordering::Relaxed)),
        // The answer to an earlier one (nobody listens) is told here once, and the packet was not sent.
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => drop(socket.send(packet)),
        Err(error) => tracing::debug!(peer = %session.target.peer, %error, "BFD packet not sent"),
    }
}

/// The first of the sockets that has something.
async fn readable(listeners: &BTreeMap<(bool, u16), UdpSocket>) -> (bool, u16) {
    if listeners.is_empty() {
        return pending().await;
    }
    let ready = listeners.iter().map(|(key, socket)| {
        Box::pin(async move {
            // An error is found again, and told, by who reads.
            let _ = socket.readable().await;
            *key
        })
    });
    select_all(ready).await.0
}
