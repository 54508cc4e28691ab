//! The actor: owns every peer, the RIB and what we originate, and turns decisions into I/O.

mod bfd;
mod links;
mod messages;
mod reload;
mod routes;
mod sessions;

use std::{
    collections::{BTreeMap, VecDeque},
    hash::{BuildHasher, Hasher, RandomState},
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use bytes::Bytes;
use ipnet::IpNet;
use sessions::OwnRestart;
use tokio::{
    net::TcpStream,
    sync::mpsc,
    time::{Instant, sleep_until},
};

use super::{
    BgpError, BgpEvent, CONVERGENCE_SILENCE, CONVERGENCE_TIMEOUT, Command, Leaving,
    advertise::Originated,
    bfd::{Handle, Report},
    discovery::{Discovery, Found},
    fsm::{self, Action, Event, Now, Side},
    listener::Listener,
    offer,
    password::Counters,
    peer::{self, Peer},
    rib::Rib,
    session::{self, LinkEvent, LinkId},
    show, socket,
    wire::{self, EncodeError, Family, Nlri, Notification, cease},
};
use crate::config::valid;

/// Link events processed in one go before routes are handed on.
const BURST: usize = 64;
/// Timers are looked at so long after something has happened at the latest: there are as many as peers, several times over,
/// and none that a hundredth of a second matters to.
const TIMER_SLACK: Duration = Duration::from_millis(10);
/// How long a shutdown waits for the last NOTIFICATIONs to be written.
const SHUTDOWN_WAIT: Duration = Duration::from_millis(500);

/// What connections, dials and listeners report.
enum Input {
    Accepted(TcpStream, SocketAddr),
    Dialled(IpAddr, LinkId, std::io::Result<TcpStream>),
    Link(IpAddr, LinkId, LinkEvent),
    Found(Found),
}

/// See the module.
pub struct Actor {
    config: valid::Bgp,
    peers: BTreeMap<IpAddr, Peer>,
    listeners: BTreeMap<Family, Listener>,
    rib: Rib,
    originated: Originated,
    /// Grows with every change of what we originate.
    version: u64,
    events: Option<mpsc::Sender<BgpEvent>>,
    /// Events other than routes that wait for the daemon.
    pending: VecDeque<BgpEvent>,
    converged: bool,
    commands: mpsc::Receiver<Command>,
    inputs: mpsc::Receiver<Input>,
    input: mpsc::Sender<Input>,
    next_link: LinkId,
    random: RandomState,
    draws: u64,
    start: Instant,
    restart: OwnRestart,
    /// Networks whose hosts must sign.
    signed: Vec<IpNet>,
    /// Our host name.
    host: String,
    /// Room for the prefixes of one UPDATE, withdrawn and announced.
    nlri: (Vec<Nlri>, Vec<Nlri>),
    /// When timers are looked at next.
    look_at: Duration,
    /// BFD, once a peer is to be watched.
    bfd: Option<Handle>,
    bfd_report: mpsc::UnboundedSender<Report>,
    bfd_reports: mpsc::UnboundedReceiver<Report>,
    /// Finds the neighbours on links; `None`: there are no such links. Or why it cannot.
    discovery: Result<Option<Discovery>, String>,
    /// Shut down by an administrator before they were found, with their messages.
    shut: BTreeMap<IpAddr, String>,
}

impl Actor {
    /// Binds the listeners and prepares every peer.
    pub fn new(
        config: valid::Bgp,
        events: mpsc::Sender<BgpEvent>,
        commands: mpsc::Receiver<Command>,
    ) -> Result<Self, BgpError> {
        let (input, inputs) = mpsc::channel(BURST);
        let (bfd_report, bfd_reports) = mpsc::unbounded_channel();
        let listeners = reload::listen(&config, &input)?;
        let local = peer::local(&config);
        let mut actor = Self {
            peers: config.peers.iter().map(|(address, peer)| (*address, Peer::new(&config, peer))).collect(),
            config,
            listeners,
            rib: Rib::new(local),
            originated: Originated::default(),
            version: 0,
            events: Some(events),
            pending: VecDeque::new(),
            converged: false,
            commands,
            inputs,
            input,
            next_link: 0,
            random: RandomState::new(),
            draws: 0,
            start: Instant::now(),
            restart: OwnRestart::default(),
            signed: Vec::new(),
            host: host_name(),
            nlri: Default::default(),
            look_at: Duration::ZERO,
            bfd: None,
            bfd_report,
            bfd_reports,
            discovery: Ok(None),
            shut: BTreeMap::new(),
        };
        actor.give_listeners_passwords();
        actor.rib.watch_best(actor.config.transit);
        actor.originated.set_networks(&actor.config.networks.clone());
        actor.originated_changed();
        Ok(actor)
    }

    /// See [`super::Speaker::restarting`].
    pub fn restarting(&mut self) {
        let limit = offer::longest_restart(self.config.peers.values().chain(self.config.links.values()));
        self.restart = OwnRestart { until: Some(self.start.elapsed() + limit), preserved: true };
    }

    /// See [`super::Speaker::shut_down`].
    pub fn shut_at_start(&mut self, peers: &BTreeMap<IpAddr, String>) {
        for (address, message) in peers {
            if let Some(peer) = self.peers.get_mut(address) {
                peer.shutdown = Some(message.clone());
            } else {
                self.shut.insert(*address, message.clone());
            }
        }
    }

    /// Runs until shut down.
    pub async fn run(mut self) {
        let addresses: Vec<IpAddr> = self.peers.keys().copied().collect();
        for address in addresses {
            self.start_unless_shut(address);
        }
        self.discover();
        loop {
            let now = self.start.elapsed();
            if self.look_at <= now {
                self.run_timers();
                self.check_convergence();
                self.look_at = self.next_deadline();
            }
            self.pass_on();
            let events = self.events.clone();
            let waiting = self.rib.has_changes() || !self.pending.is_empty();
            let deadline = self.start + self.look_at;
            let mut happened = true;
            tokio::select! {
                Some(report) = self.bfd_reports.recv() => self.on_bfd(report),
                Some(input) = self.inputs.recv() => {
                    self.on_input(input);
                    for _ in 1..BURST {
                        // A peer that is lost does not wait for the routes of others.
                        let Ok(input) = self.inputs.try_recv() else { break };
                        self.on_input(input);
                        while let Ok(report) = self.bfd_reports.try_recv() {
                            self.on_bfd(report);
                        }
                    }
                }
                command = self.commands.recv() => match command {
                    Some(Command::Shutdown(reply)) => {
                        self.shut_down().await;
                        let _ = reply.send(());
                        return;
                    }
                    Some(command) => self.on_command(command),
                    None => return self.shut_down().await,
                },
                permit = reserve(events), if waiting => match permit {
                    Some(permit) => self.emit(permit),
                    // The daemon no longer listens; sessions stay up until it lets go of the handle too.
                    None => self.events = None,
                },
                () = sleep_until(deadline) => happened = false,
            }
            // Whatever happens may set a timer.
            if happened {
                self.look_at = self.look_at.min(now + TIMER_SLACK);
            }
            if self.events.is_none() {
                self.pending.clear();
                self.rib.take_changes();
            }
        }
    }

    fn now(&mut self) -> Now {
        self.draws += 1;
        let mut hasher = self.random.build_hasher();
        hasher.write_u64(self.draws);
        Now { time: self.start.elapsed(), random: (hasher.finish() >> 32) as u32 }
    }

    fn next_deadline(&self) -> Duration {
        let timers = self.peers.values().filter_map(|peer| peer.fsm.next_deadline());
        let now = self.start.elapsed();
        let silence =
            self.peers.values().filter_map(|peer| Some(peer.session.as_ref()?.last_update + CONVERGENCE_SILENCE));
        let silence = silence.filter(|at| !self.converged && *at > now);
        let timeout = (!self.converged).then_some(CONVERGENCE_TIMEOUT);
        timers
            .chain(silence)
            .chain(timeout)
            .chain(self.next_session_deadline())
            .chain(self.next_release())
            .min()
            .unwrap_or(now + Duration::from_secs(3600))
    }

    fn run_timers(&mut self) {
        self.release();
        let addresses: Vec<IpAddr> = self.peers.keys().copied().collect();
        let time = self.start.elapsed();
        for address in addresses {
            while let Some(event) = self.peers.get(&address).and_then(|peer| peer.fsm.due(time)) {
                self.feed(address, event);
            }
        }
        self.run_session_timers(time);
    }

    fn check_convergence(&mut self) {
        if self.converged {
            return;
        }
        let now = self.start.elapsed();
        let complete = |peer: &Peer| {
            let session = peer.session.as_ref();
            peer.shutdown.is_some() || session.is_some_and(|s| s.converged(now, CONVERGENCE_SILENCE))
        };
        let all = self.peers.values().all(complete) && self.silent_links().next().is_none();
        if now >= CONVERGENCE_TIMEOUT || all {
            self.converged = true;
            self.pending.push_back(BgpEvent::Converged);
        }
    }

    /// Routes go first, so that what an event speaks of has been told before it.
    fn emit(&mut self, permit: mpsc::OwnedPermit<BgpEvent>) {
        if self.rib.has_changes() {
            permit.send(BgpEvent::Routes(self.rib.take_changes()));
        } else if let Some(event) = self.pending.pop_front() {
            permit.send(event);
        }
    }

    /// One step of a peer's state machine and everything that follows from it.
    fn feed(&mut self, address: IpAddr, event: Event) {
        let now = self.now();
        if matches!(event, Event::TcpConnectionConfirmed(_)) {
            self.renew_offer(address);
        }
        let silence = (event == Event::ConnectRetryTimerExpires).then(|| self.silence(address)).flatten();
        let Some(peer) = self.peers.get_mut(&address) else { return };
        let before = peer.fsm.name();
        let actions = fsm::step(&mut peer.fsm, now, event);
        let after = peer.fsm.name();
        if before != after {
            tracing::debug!(peer = %address, from = before.as_str(), to = after.as_str(), "BGP state");
        }
        for action in actions {
            let action = match (action, &silence) {
                (Action::Failed(reason), Some(more)) => Action::Failed(format!("{reason}; {more}")),
                (action, _) => action,
            };
            self.act(address, action, now.time);
        }
    }

    fn act(&mut self, address: IpAddr, action: Action, now: Duration) {
        match action {
            Action::Dial => self.dial(address),
            Action::StopDial => {
                if let Some((_, task)) = self.peers.get_mut(&address).and_then(|peer| peer.dial.take()) {
                    task.abort();
                }
            }
            Action::SendOpen(side, open) => self.send(address, side, "open_sent", open.encode()),
            Action::SendKeepalive(side) => self.send(address, side, "keepalive_sent", wire::encode_keepalive()),
            Action::SendNotification(side, notification) => {
                if let Some(peer) = self.peers.get_mut(&address).filter(|peer| peer.link(side).is_some()) {
                    peer.history.error(true, notification.to_string(), now);
                }
                self.send(address, side, "notification_sent", notification.encode());
            }
            Action::Close(side) => {
                if let Some(peer) = self.peers.get_mut(&address) {
                    *peer.link_mut(side) = None;
                }
            }
            Action::Up(side, negotiated) => self.up(address, side, negotiated, now),
            Action::Down { reason, keep } => self.down(address, reason, keep, now),
            Action::Failed(reason) => {
                if let Some(peer) = self.peers.get_mut(&address) {
                    tracing::info!(peer = %address, %reason, "BGP connection failed");
                    // The loser of a collision may end after the winner is up; that is no failure of the peer.
                    if peer.session.is_none() {
                        peer.last_failure = Some(reason);
                    }
                }
            }
        }
    }

    fn send(&mut self, address: IpAddr, side: Side, name: &'static str, message: Result<Bytes, EncodeError>) {
        let Some(peer) = self.peers.get_mut(&address) else { return };
        match message {
            Ok(message) => {
                if let Some(link) = peer.link(side) {
                    let (local, remote) = (link.local, link.remote);
                    link.send(message.clone());
                    peer.count(name);
                    peer.history.message(true, local, remote, &message);
                }
            }
            Err(error) => tracing::error!(peer = %address, %error, "BGP message not sent"),
        }
    }

    fn dial(&mut self, address: IpAddr) {
        self.next_link += 1;
        let id = self.next_link;
        let Some(peer) = self.peers.get_mut(&address) else { return };
        let (config, internal, input) = (peer.config.clone(), peer.policy.internal, self.input.clone());
        let password = peer.password.clone();
        peer.signatures = Counters::now();
        let task = tokio::spawn(async move {
            let result = match password {
                Ok(password) => session::dial(&config, internal, &password).await,
                Err(why) => Err(std::io::Error::other(why)),
            };
            // The actor is gone where this fails, and so is the reason to dial.
            let _ = input.send(Input::Dialled(address, id, result)).await;
        });
        peer.dial = Some((id, task.abort_handle()));
    }

    fn on_input(&mut self, input: Input) {
        match input {
            Input::Accepted(stream, remote) => self.accepted(stream, remote),
            Input::Dialled(address, id, result) => self.dialled(address, id, result),
            Input::Link(address, id, event) => self.on_link(address, id, event),
            Input::Found(found) => drop(self.found(&found.interface, found.address)),
        }
    }

    fn accepted(&mut self, stream: TcpStream, remote: SocketAddr) {
        let address = socket::origin(remote);
        if !self.peers.contains_key(&address) && self.dynamic_peer(address).is_none() {
            tracing::info!(%remote, "BGP connection refused: no such peer is configured");
            return;
        }
        let Some(peer) = self.peers.get_mut(&address) else { return };
        if let Err(why) = &peer.password {
            tracing::warn!(%remote, %why, "BGP connection refused");
            return;
        }
        // The peer may have restarted without our noticing: its OPEN will tell.
        if peer.incoming.is_some() && peer.fsm.make_room() {
            std::mem::swap(&mut peer.incoming, &mut peer.outgoing);
            if let Some(session) = &mut peer.session {
                session.side = Side::Outgoing;
            }
        }
        if peer.incoming.is_some() {
            if peer.fsm.established().is_some_and(|(side, _)| side == Side::Incoming) {
                return session::refuse(stream, &Notification::cease(cease::CONNECTION_COLLISION_RESOLUTION));
            }
            // A peer that dials again has given up its first attempt, even if no FIN has told us.
            let reason = "replaced by a newer connection of the peer".to_owned();
            self.feed(address, Event::TcpConnectionFails(Side::Incoming, reason));
        }
        let Some(peer) = self.peers.get(&address) else { return };
        match session::prepare_accepted(&stream, &peer.config, peer.policy.internal) {
            Ok(()) => self.connected(address, Side::Incoming, stream),
            Err(error) => tracing::warn!(%remote, %error, "BGP connection refused: socket options"),
        }
    }

    fn dialled(&mut self, address: IpAddr, id: LinkId, result: std::io::Result<TcpStream>) {
        let Some(peer) = self.peers.get_mut(&address) else { return };
        if peer.dial.as_ref().is_none_or(|(current, _)| *current != id) {
            return;
        }
        peer.dial = None;
        match result {
            Ok(stream) => self.connected(address, Side::Outgoing, stream),
            Err(error) => {
                let reason = Self::diagnose(peer, &error);
                self.feed(address, Event::TcpConnectionFails(Side::Outgoing, reason));
            }
        }
    }

    fn connected(&mut self, address: IpAddr, side: Side, stream: TcpStream) {
        self.next_link += 1;
        let id = self.next_link;
        let input = self.input.clone();
        let Some(send_hold) = self.peers.get(&address).map(|peer| session::send_hold(&peer.config)) else { return };
        let link = session::start(id, stream, send_hold, move |event| {
            let input = input.clone();
            async move {
                let _ = input.send(Input::Link(address, id, event)).await;
            }
        });
        let link = match link {
            Ok(link) => link,
            Err(error) => {
                let reason = format!("connection lost: {error}");
                return self.feed(address, Event::TcpConnectionFails(side, reason));
            }
        };
        if let Some(peer) = self.peers.get_mut(&address) {
            *peer.link_mut(side) = Some(link);
        }
        self.feed(address, Event::TcpConnectionConfirmed(side));
    }

    fn on_command(&mut self, command: Command) {
        let now = self.start.elapsed();
        match command {
            Command::Announce(prefix, attributes, reply) => {
                self.originated.announce(prefix, attributes);
                self.originated_changed();
                let _ = reply.send(());
            }
            Command::Withdraw(prefix, reply) => {
                self.originated.withdraw(&prefix);
                self.originated_changed();
                let _ = reply.send(());
            }
            Command::Summary(reply) => {
                let row = |peer| show::peer_row(peer, &self.rib, self.version, now);
                let _ = reply.send(self.peers.values().map(row).chain(self.link_rows()).collect());
            }
            Command::Routes(reply) => {
                let _ = reply.send(show::routes(&self.rib, &self.originated, now));
            }
            Command::Received(peer, reply) => {
                let _ = reply.send(show::received(&self.rib, peer, now));
            }
            Command::Advertised(peer, reply) => {
                let rows = self.peers.get(&peer).map(|peer| show::advertised(peer, &self.rib, &self.originated));
                let _ = reply.send(rows.unwrap_or_default());
            }
            Command::Messages(peer, reply) => {
                let rows = self.peers.get(&peer).map(|peer| peer.history.messages());
                let _ = reply.send(rows.unwrap_or_default());
            }
            Command::Order(order, reply) => {
                let _ = reply.send(self.order(order));
            }
            Command::Originated(reply) => {
                let _ = reply.send(self.originated.prefixes());
            }
            Command::Restarted(reply) => {
                self.restarted();
                let _ = reply.send(());
            }
            Command::Reload(config, reply) => {
                let _ = reply.send(self.reload(*config));
            }
            Command::Leave(step, reply) => {
                match step {
                    Leaving::Ask => self.originated.leave(),
                    Leaving::Withdraw => self.originated.clear(),
                }
                self.originated_changed();
                let _ = reply.send(());
            }
            Command::Policy(question, reply) => {
                let _ = reply.send(self.judge(&question));
            }
            Command::Kernel(routes, reply) => {
                self.rib.kernel(routes);
                self.ask_links_again();
                let _ = reply.send(());
            }
            // Handled where the loop can end.
            Command::Shutdown(reply) => drop(reply),
        }
    }

    async fn shut_down(&mut self) {
        self.listeners.clear();
        let notification = Notification::shutdown("edge is shutting down");
        let addresses: Vec<IpAddr> = self.peers.keys().copied().collect();
        // Connections end by themselves once their link is dropped; give them the time to write.
        let mut ending = Vec::new();
        for address in addresses {
            if let Some(peer) = self.peers.get(&address) {
                ending.extend(
                    [Side::Outgoing, Side::Incoming].into_iter().filter_map(|s| peer.link(s)).map(|l| l.ended()),
                );
            }
            self.feed(address, Event::ManualStop(notification.clone()));
        }
        let all = async {
            for ended in ending {
                ended.await;
            }
        };
        let _ = tokio::time::timeout(SHUTDOWN_WAIT, all).await;
    }
}

/// Empty where the kernel has none that can be shown.
fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname").map(|name| name.trim().to_owned()).unwrap_or_default()
}

async fn reserve(events: Option<mpsc::Sender<BgpEvent>>) -> Option<mpsc::OwnedPermit<BgpEvent>> {
    events?.reserve_owned().await.ok()
}
