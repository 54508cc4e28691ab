//! The finite state machine of one peer (RFC 4271 8), with both connections that a collision can bring (6.8).
//!
//! Pure: `step(state, now, event)` returns what to do; time and randomness come in with [`Now`]. RFC event names stand
//! above each arm. Delay Open and Tcp track-by-packet events are not implemented; both are optional in the RFC.
//!
//! Transitions. The peer as a whole (no connection in OpenSent or later):
//!
//! | State   | Event                                     | Next    | Actions                                        |
//! |---------|-------------------------------------------|---------|------------------------------------------------|
//! | Idle    | ManualStart, IdleHoldTimer_Expires        | Connect | Dial (passive peers: Active, nothing)          |
//! | Idle    | TcpConnectionConfirmed (incoming)         | Idle    | Cease/Connection Rejected, Close               |
//! | Connect | TcpConnectionConfirmed (outgoing)         | OpenSent| Send OPEN                                      |
//! | Connect | TcpConnectionConfirmed (incoming)         | OpenSent| Send OPEN; the dial goes on                    |
//! | Connect | BGPOpen, incoming; our dial would win     | Connect | the incoming one: Cease/7                      |
//! | Active  | the dial ends, incoming in OpenConfirm    | Active  | the dialled one: Cease/7, no OPEN              |
//! | Connect | TcpConnectionFails, ConnectTimer_Expires  | Active  | retry with backoff                             |
//! | Active  | ConnectRetryTimer_Expires                 | Connect | Dial                                           |
//! | Active  | TcpConnectionConfirmed (incoming)         | OpenSent| Send OPEN                                      |
//! | any     | ManualStop                                | Stopped | Cease with the given subcode, Close            |
//! | Stopped | anything but ManualStart                  | Stopped | none; incoming connections are rejected        |
//!
//! One connection:
//!
//! | State       | Event                        | Next        | Actions                                          |
//! |-------------|------------------------------|-------------|--------------------------------------------------|
//! | OpenSent    | BGPOpen, acceptable          | OpenConfirm | collision resolution; StopDial; Send KEEPALIVE   |
//! | OpenSent    | BGPOpen, not acceptable      | (closed)    | NOTIFICATION 2/n; peer Idle                      |
//! | OpenSent    | HoldTimer_Expires (4 min)    | (closed)    | NOTIFICATION 4/0; peer Idle                      |
//! | OpenSent    | TcpConnectionFails           | (closed)    | peer Active                                      |
//! | OpenSent    | other messages               | (closed)    | NOTIFICATION 5/1; peer Idle                      |
//! | OpenConfirm | KeepAliveMsg                 | Established | Up; the other connection, if any: Cease/7        |
//! | OpenConfirm | other messages               | (closed)    | NOTIFICATION 5/2; peer Idle                      |
//! | Established | KeepAliveMsg, UpdateMsg      | Established | hold timer restarts                              |
//! | Established | BGPOpen                      | (closed)    | NOTIFICATION 5/3; Down; peer Idle                |
//! | Established | TcpConnectionFails           | (closed)    | Down; peer Active                                |
//! | Established | TcpConnectionConfirmed (new) | Established | the new one: Cease/7; with graceful restart: OPEN|
//! | Established | BGPOpen on the new one, R    | (closed)    | Down, kept; the new one goes on as in OpenSent   |
//! | Established | BGPOpen on the new one, no R | Established | the new one: Cease/7                             |
//! | any         | NotifMsg                     | (closed)    | Cease: peer Active; else Idle                    |
//! | any         | header, OPEN or UPDATE error | (closed)    | the NOTIFICATION; Down if up; peer Idle          |
//! | confirm/est.| KeepaliveTimer_Expires       | same        | Send KEEPALIVE                                   |
//! | confirm/est.| HoldTimer_Expires            | (closed)    | NOTIFICATION 4/0; Down if up; peer Idle          |
//! | any         | SendHoldTimer_Expires        | (closed)    | NOTIFICATION 8/0; Down if up; peer Idle          |
//! | Established | BFD down                     | (closed)    | Cease/10; Down, not kept; peer Idle              |
//! | any other   | BFD down                     | same        | none                                             |
//!
//! Routes are kept over a Down (RFC 4724 4.2) that no NOTIFICATION belongs to; where both sides have N (RFC 8538), over
//! every Down but a Hard Reset's and our own stop's, which is then sent as one. RFC 4724 takes any new connection of an
//! established peer for its restart. Here only one whose OPEN says so counts, because doubled peerings must not flap.

mod collision;
mod negotiate;
mod vocabulary;

use std::time::Duration;

use super::wire::{Capability, Notification, Open, cease};

pub use negotiate::Negotiated;
pub use vocabulary::{Action, Event, Name, Now, Settings, Side};

/// Hold timer until the peer's OPEN has come (RFC 4271 8.2.2 suggests four minutes).
const OPEN_HOLD: Duration = Duration::from_secs(240);
/// How long a dial may take before it is given up.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// First wait between two dials; doubles with every failure.
const RETRY_FIRST: Duration = Duration::from_secs(1);
/// A session that lasted so long forgives the failures before it; shorter ones count as one more, so that two sides that
/// agree on OPENs and on nothing else do not spin.
const STABLE: Duration = Duration::from_secs(30);
/// What the peer does about getting a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Stopped,
    Idle { until: Duration },
    Connect { until: Duration },
    Active { until: Option<Duration> },
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Connection {
    stage: Stage,
    hold_at: Option<Duration>,
    keepalive_at: Option<Duration>,
    /// Since when it is established.
    since: Option<Duration>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Stage {
    OpenSent,
    OpenConfirm(Negotiated),
    Established(Negotiated),
}

impl Connection {
    const fn negotiated(&self) -> Option<&Negotiated> {
        match &self.stage {
            Stage::OpenSent => None,
            Stage::OpenConfirm(negotiated) | Stage::Established(negotiated) => Some(negotiated),
        }
    }
}

/// State of one peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    settings: Settings,
    phase: Phase,
    failures: u32,
    outgoing: Option<Connection>,
    incoming: Option<Connection>,
}

impl State {
    /// A peer that has not been started.
    pub const fn new(settings: Settings) -> Self {
        Self { settings, phase: Phase::Stopped, failures: 0, outgoing: None, incoming: None }
    }

    /// The state's name.
    pub fn name(&self) -> Name {
        let stage = |connection: &Connection| match connection.stage {
            Stage::OpenSent => Name::OpenSent,
            Stage::OpenConfirm(_) => Name::OpenConfirm,
            Stage::Established(_) => Name::Established,
        };
        let connected = self.outgoing.iter().chain(&self.incoming).map(stage).max();
        connected.unwrap_or(match self.phase {
            Phase::Stopped | Phase::Idle { .. } => Name::Idle,
            Phase::Connect { .. } => Name::Connect,
            Phase::Active { .. } => Name::Active,
        })
    }

    /// The side whose connection is established, and what it settled.
    pub fn established(&self) -> Option<(Side, &Negotiated)> {
        [Side::Outgoing, Side::Incoming].into_iter().find_map(|side| match &self.connection(side)?.stage {
            Stage::Established(negotiated) => Some((side, negotiated)),
            _ => None,
        })
    }

    /// From the next connection on, this is what we offer.
    pub fn offer(&mut self, capabilities: Vec<Capability>) {
        self.settings.capabilities = capabilities;
    }

    /// Makes room for another connection of the peer beside the established one that it opened: from now on that one
    /// counts as ours. Who opened it has no meaning any more once it is established. True where there is room now.
    pub fn make_room(&mut self) -> bool {
        let graceful = self.established().is_some_and(|(side, n)| side == Side::Incoming && n.kept().is_some());
        if !graceful || self.outgoing.is_some() || matches!(self.phase, Phase::Connect { .. }) {
            return false;
        }
        self.outgoing = self.incoming.take();
        true
    }

    /// True where the peer was stopped, or never started.
    pub fn stopped(&self) -> bool {
        self.phase == Phase::Stopped
    }

    /// Attempts in a row that brought no lasting session.
    pub const fn failures(&self) -> u32 {
        self.failures
    }

    /// When the hold timer of the established session runs out, and when its next KEEPALIVE is due.
    pub fn session_timers(&self) -> Option<(Option<Duration>, Option<Duration>)> {
        let (side, _) = self.established()?;
        self.connection(side).map(|connection| (connection.hold_at, connection.keepalive_at))
    }

    /// True where a connection of this side exists.
    pub fn connected(&self, side: Side) -> bool {
        self.connection(side).is_some()
    }

    /// When the next dial begins, if one is planned.
    pub const fn next_connect(&self) -> Option<Duration> {
        match self.phase {
            Phase::Idle { until } => Some(until),
            Phase::Active { until } => until,
            Phase::Stopped | Phase::Connect { .. } => None,
        }
    }

    /// When [`State::due`] has something next.
    pub fn next_deadline(&self) -> Option<Duration> {
        let phase = match self.phase {
            Phase::Stopped => None,
            Phase::Idle { until } | Phase::Connect { until } => Some(until),
            Phase::Active { until } => until,
        };
        let timers = self.outgoing.iter().chain(&self.incoming).flat_map(|c| [c.hold_at, c.keepalive_at]);
        timers.chain([phase]).flatten().min()
    }

    /// A timer that has run out. Feed it to [`step`], which restarts or clears it, and ask again.
    pub fn due(&self, time: Duration) -> Option<Event> {
        for side in [Side::Outgoing, Side::Incoming] {
            let Some(connection) = self.connection(side) else { continue };
            if connection.hold_at.is_some_and(|at| at <= time) {
                return Some(Event::HoldTimerExpires(side));
            }
            if connection.keepalive_at.is_some_and(|at| at <= time) {
                return Some(Event::KeepaliveTimerExpires(side));
            }
        }
        match self.phase {
            Phase::Idle { until } if until <= time => Some(Event::IdleHoldTimerExpires),
            Phase::Connect { until } | Phase::Active { until: Some(until) } if until <= time => {
                Some(Event::ConnectRetryTimerExpires)
            }
            _ => None,
        }
    }

    const fn connection(&self, side: Side) -> Option<&Connection> {
        match side {
            Side::Outgoing => self.outgoing.as_ref(),
            Side::Incoming => self.incoming.as_ref(),
        }
    }

    const fn slot(&mut self, side: Side) -> &mut Option<Connection> {
        match side {
            Side::Outgoing => &mut self.outgoing,
            Side::Incoming => &mut self.incoming,
        }
    }

    const fn idle(&self) -> bool {
        self.outgoing.is_none() && self.incoming.is_none()
    }

    /// The wait before the next attempt: exponential, and jittered down to three quarters (RFC 4271 10).
    fn backoff(&mut self, now: Now) -> Duration {
        let wait = RETRY_FIRST.saturating_mul(1 << self.failures.min(16)).min(self.settings.longest_retry);
        self.failures = self.failures.saturating_add(1);
        jitter(wait, now.random)
    }

    fn dial(&mut self, now: Now, actions: &mut Vec<Action>) {
        if self.settings.passive {
            self.phase = Phase::Active { until: None };
        } else {
            self.phase = Phase::Connect { until: now.time + CONNECT_TIMEOUT };
            actions.push(Action::Dial);
        }
    }

    /// After a loss that is nobody's fault: listen at once, dial after the backoff.
    fn await_peer(&mut self, now: Now) {
        let wait = self.backoff(now);
        self.phase = Phase::Active { until: (!self.settings.passive).then_some(now.time + wait) };
    }

    /// After an error: rest, and refuse connections meanwhile, so that two sides that disagree do not spin.
    fn rest(&mut self, now: Now, actions: &mut Vec<Action>) {
        if matches!(self.phase, Phase::Connect { .. }) {
            actions.push(Action::StopDial);
        }
        let wait = self.backoff(now);
        self.phase = Phase::Idle { until: now.time + wait };
    }
}

/// Three quarters to all of `wait`.
fn jitter(wait: Duration, random: u32) -> Duration {
    wait.mul_f64(0.75 + 0.25 * f64::from(random) / f64::from(u32::MAX))
}

/// Where the peer goes when its connections are gone.
#[derive(Clone, Copy)]
enum Then {
    Active,
    Idle,
}

/// How a connection ends.
struct End {
    /// What the peer is told.
    send: Option<Notification>,
    reason: String,
    then: Then,
    /// A NOTIFICATION, of either side, that ends more than the connection: see [`Notification::is_final`].
    notified: Option<Notification>,
}

impl End {
    const fn lost(reason: String) -> Self {
        Self { send: None, reason, then: Then::Active, notified: None }
    }

    fn sent(notification: Notification, reason: String) -> Self {
        Self { send: Some(notification.clone()), reason, then: Then::Idle, notified: Some(notification) }
    }

    fn received(notification: Notification) -> Self {
        let then = if notification.code == 6 { Then::Active } else { Then::Idle };
        Self { send: None, reason: format!("received {notification}"), then, notified: Some(notification) }
    }
}

/// One step.
pub fn step(state: &mut State, now: Now, event: Event) -> Vec<Action> {
    let mut actions = Vec::new();
    if state.phase == Phase::Stopped {
        match event {
            Event::ManualStart => state.dial(now, &mut actions),
            Event::TcpConnectionConfirmed(side) => reject(side, cease::CONNECTION_REJECTED, &mut actions),
            _ => {}
        }
        return actions;
    }
    match event {
        // Event 1: ManualStart, already running
        Event::ManualStart => {}
        // Event 2: ManualStop
        Event::ManualStop(notification) => stop(state, &notification, &mut actions),
        // Event 13: IdleHoldTimer_Expires
        Event::IdleHoldTimerExpires => {
            if matches!(state.phase, Phase::Idle { .. }) {
                state.dial(now, &mut actions);
            }
        }
        // Event 9: ConnectRetryTimer_Expires
        Event::ConnectRetryTimerExpires => match state.phase {
            Phase::Connect { .. } => {
                actions.push(Action::StopDial);
                actions.push(Action::Failed(format!("no connection within {} s", CONNECT_TIMEOUT.as_secs())));
                state.await_peer(now);
            }
            Phase::Active { .. } if state.outgoing.is_none() => state.dial(now, &mut actions),
            _ => {}
        },
        // Event 10: HoldTimer_Expires
        Event::HoldTimerExpires(side) => {
            let hold =
                state.connection(side).and_then(Connection::negotiated).map_or(OPEN_HOLD.as_secs(), |n| n.hold.into());
            let reason = format!("hold timer expired: nothing received for {hold} s");
            fail(state, now, side, End::sent(Notification::hold_timer_expired(), reason), &mut actions);
        }
        // Event 29 (RFC 9687): SendHoldTimer_Expires
        Event::SendHoldTimerExpires(side) => {
            let reason = "send hold timer expired: the peer reads nothing (RFC 9687)".to_owned();
            fail(state, now, side, End::sent(Notification::send_hold_timer_expired(), reason), &mut actions);
        }
        // RFC 5882 4.3.1, RFC 9384
        Event::BfdDown(why) => bfd_down(state, now, &why, &mut actions),
        // Event 11: KeepaliveTimer_Expires
        Event::KeepaliveTimerExpires(side) => {
            if state.connected(side) {
                restart_keepalive(state, now, side);
                actions.push(Action::SendKeepalive(side));
            }
        }
        // Events 16 and 17: Tcp_CR_Acked, TcpConnectionConfirmed
        Event::TcpConnectionConfirmed(side) => connected(state, now, side, &mut actions),
        // Event 18: TcpConnectionFails
        Event::TcpConnectionFails(side, reason) => connection_fails(state, now, side, reason, &mut actions),
        // Event 19: BGPOpen
        Event::BgpOpen(side, open) => opened(state, now, side, open, &mut actions),
        // Event 26: KeepAliveMsg
        Event::KeepAliveMsg(side) => keepalive(state, now, side, &mut actions),
        // Event 27: UpdateMsg
        Event::UpdateMsg(side) => match state.connection(side).map(|connection| &connection.stage) {
            Some(Stage::Established(_)) => restart_hold(state, now, side),
            Some(_) => unexpected(state, now, side, "UPDATE", &mut actions),
            None => {}
        },
        // Events 24 and 25: NotifMsgVerErr, NotifMsg
        Event::NotifMsg(side, notification) => fail(state, now, side, End::received(notification), &mut actions),
        // Events 21, 22 and 28: BGPHeaderErr, BGPOpenMsgErr, UpdateMsgErr
        Event::MessageError(side, notification) => {
            let reason = format!("sent {notification}");
            fail(state, now, side, End::sent(notification, reason), &mut actions);
        }
    }
    actions
}

/// The path is broken while the peer's BGP has not restarted: its routes lead nowhere, graceful restart or not (RFC 5882
/// 4.3.2.3).
fn bfd_down(state: &mut State, now: Now, why: &str, actions: &mut Vec<Action>) {
    let Some((side, negotiated)) = state.established() else { return };
    let notification = Notification::cease(cease::BFD_DOWN);
    let hard = negotiated.notification_restart;
    let notification = if hard { notification.hard() } else { notification };
    fail(state, now, side, End::sent(notification, format!("BFD session down: {why}")), actions);
}

fn reject(side: Side, subcode: u8, actions: &mut Vec<Action>) {
    actions.push(Action::SendNotification(side, Notification::cease(subcode)));
    actions.push(Action::Close(side));
}

fn stop(state: &mut State, notification: &Notification, actions: &mut Vec<Action>) {
    let was_up = state.established().is_some();
    for side in [Side::Outgoing, Side::Incoming] {
        if let Some(connection) = state.slot(side).take() {
            // RFC 8538 4: with N anything but a Hard Reset would leave our routes in place.
            let hard = connection.negotiated().is_some_and(|negotiated| negotiated.notification_restart);
            let notification = if hard { notification.hard() } else { notification.clone() };
            actions.push(Action::SendNotification(side, notification));
            actions.push(Action::Close(side));
        }
    }
    if matches!(state.phase, Phase::Connect { .. }) {
        actions.push(Action::StopDial);
    }
    if was_up {
        actions.push(Action::Down { reason: format!("sent {notification}"), keep: false });
    }
    state.phase = Phase::Stopped;
    state.failures = 0;
}

fn connected(state: &mut State, now: Now, side: Side, actions: &mut Vec<Action>) {
    if matches!(state.phase, Phase::Idle { .. }) {
        return reject(side, cease::CONNECTION_REJECTED, actions);
    }
    if side == Side::Outgoing {
        state.phase = Phase::Active { until: None };
    }
    // With graceful restart the new connection's OPEN will tell whether the peer has restarted.
    let graceful = state.established().is_none_or(|(_, negotiated)| negotiated.kept().is_some());
    // Crossed connections: see `collision::loser`.
    let settled = state.connection(side.other()).is_some_and(|other| matches!(other.stage, Stage::OpenConfirm(_)));
    if !graceful || state.connected(side) || (side == Side::Outgoing && settled) {
        return reject(side, cease::CONNECTION_COLLISION_RESOLUTION, actions);
    }
    *state.slot(side) = Some(Connection {
        stage: Stage::OpenSent,
        hold_at: Some(now.time + OPEN_HOLD),
        keepalive_at: None,
        since: None,
    });
    let settings = &state.settings;
    let open = Open {
        asn: settings.local_asn,
        hold: settings.hold,
        router_id: settings.router_id,
        capabilities: settings.capabilities.clone(),
    };
    actions.push(Action::SendOpen(side, open));
    // While this connection tries its luck no further dial is planned; a dial under way goes on.
    if let Phase::Active { until } = &mut state.phase {
        *until = None;
    }
}

fn connection_fails(state: &mut State, now: Now, side: Side, reason: String, actions: &mut Vec<Action>) {
    if state.connected(side) {
        fail(state, now, side, End::lost(reason), actions);
    } else if side == Side::Outgoing && matches!(state.phase, Phase::Connect { .. }) {
        // Only the dial failed.
        if state.idle() {
            actions.push(Action::Failed(reason));
            state.await_peer(now);
        } else {
            state.phase = Phase::Active { until: None };
        }
    }
}

/// Ends one connection. The peer changes phase only where no other connection is left.
fn fail(state: &mut State, now: Now, side: Side, end: End, actions: &mut Vec<Action>) {
    let Some(connection) = state.slot(side).take() else { return };
    if let Some(notification) = end.send {
        actions.push(Action::SendNotification(side, notification));
    }
    actions.push(Action::Close(side));
    if connection.since.is_some_and(|since| now.time.saturating_sub(since) >= STABLE) {
        state.failures = 0;
    }
    actions.push(match &connection.stage {
        Stage::Established(negotiated) => {
            let is_final = |notification: &Notification| notification.is_final(negotiated.notification_restart);
            let keep = negotiated.kept().is_some() && !end.notified.as_ref().is_some_and(is_final);
            Action::Down { reason: end.reason, keep }
        }
        _ => Action::Failed(end.reason),
    });
    if !state.idle() || (matches!(state.phase, Phase::Connect { .. }) && matches!(end.then, Then::Active)) {
        return;
    }
    match end.then {
        Then::Active => state.await_peer(now),
        Then::Idle => state.rest(now, actions),
    }
}

fn unexpected(state: &mut State, now: Now, side: Side, what: &str, actions: &mut Vec<Action>) {
    let Some(connection) = state.connection(side) else { return };
    let (subcode, name) = match connection.stage {
        Stage::OpenSent => (1, Name::OpenSent),
        Stage::OpenConfirm(_) => (2, Name::OpenConfirm),
        Stage::Established(_) => (3, Name::Established),
    };
    let reason = format!("unexpected {what} in {}", name.as_str());
    fail(state, now, side, End::sent(Notification::fsm_error(subcode), reason), actions);
}

fn opened(state: &mut State, now: Now, side: Side, open: Open, actions: &mut Vec<Action>) {
    match state.connection(side).map(|connection| &connection.stage) {
        None => return,
        Some(Stage::OpenSent) => {}
        Some(_) => return unexpected(state, now, side, "OPEN", actions),
    }
    let negotiated = match negotiate::negotiate(&state.settings, open) {
        Ok(negotiated) => negotiated,
        Err((notification, reason)) => {
            let reason = format!("sent {notification}: {reason}");
            return fail(state, now, side, End::sent(notification, reason), actions);
        }
    };
    if state.connection(side.other()).is_some_and(|other| collision::outlived(other, &negotiated.peer, now)) {
        fail(state, now, side.other(), End::lost("the peer has restarted".to_owned()), actions);
    }
    let loser = collision::loser(state, now, side, &negotiated.peer);
    if let Some(loser) = loser {
        *state.slot(loser) = None;
        reject(loser, cease::CONNECTION_COLLISION_RESOLUTION, actions);
        if loser == side {
            return;
        }
    }
    if let Some(connection) = state.slot(side) {
        connection.stage = Stage::OpenConfirm(negotiated);
    }
    restart_hold(state, now, side);
    restart_keepalive(state, now, side);
    if matches!(state.phase, Phase::Connect { .. }) {
        // Before the peer can be established, see `collision::loser`.
        state.phase = Phase::Active { until: None };
        actions.push(Action::StopDial);
    }
    actions.push(Action::SendKeepalive(side));
}

fn keepalive(state: &mut State, now: Now, side: Side, actions: &mut Vec<Action>) {
    match state.slot(side).as_mut().map(|connection| &mut connection.stage) {
        None => {}
        Some(Stage::OpenSent) => unexpected(state, now, side, "KEEPALIVE", actions),
        Some(Stage::Established(_)) => restart_hold(state, now, side),
        Some(stage @ Stage::OpenConfirm(_)) => {
            let Stage::OpenConfirm(negotiated) = stage.clone() else { return };
            *stage = Stage::Established(negotiated.clone());
            if let Some(connection) = state.slot(side) {
                connection.since = Some(now.time);
            }
            restart_hold(state, now, side);
            if state.slot(side.other()).take().is_some() {
                reject(side.other(), cease::CONNECTION_COLLISION_RESOLUTION, actions);
            }
            actions.push(Action::Up(side, negotiated));
        }
    }
}

fn restart_hold(state: &mut State, now: Now, side: Side) {
    if let Some(connection) = state.slot(side) {
        let hold = connection.negotiated().map_or(0, |negotiated| negotiated.hold);
        connection.hold_at = (hold > 0).then(|| now.time + Duration::from_secs(u64::from(hold)));
    }
}

fn restart_keepalive(state: &mut State, now: Now, side: Side) {
    if let Some(connection) = state.slot(side) {
        let interval = connection.negotiated().map_or(Duration::ZERO, |negotiated| negotiated.keepalive);
        connection.keepalive_at = (!interval.is_zero()).then(|| now.time + jitter(interval, now.random));
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::{super::wire::Family, *};

    const PEER_ID: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);

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
            capabilities: offered(),
        }
    }

    fn offered() -> Vec<Capability> {
        let mut capabilities: Vec<_> = Family::ALL.map(Capability::Multiprotocol).into();
        capabilities.extend([Capability::RouteRefresh, Capability::FourOctetAs(64513)]);
        capabilities
    }

    /// The middle of the jitter range would hide a missing jitter; its top makes waits equal their nominal value.
    fn at(seconds: u64) -> Now {
        Now { time: Duration::from_secs(seconds), random: u32::MAX }
    }

    fn open() -> Open {
        Open { asn: 64513, hold: 180, router_id: PEER_ID, capabilities: offered() }
    }

    /// Started, and fed with `events` at time zero.
    fn after(settings: Settings, events: impl IntoIterator<Item = Event>) -> (State, Vec<Action>) {
        let mut state = State::new(settings);
        let mut last = step(&mut state, at(0), Event::ManualStart);
        for event in events {
            last = step(&mut state, at(0), event);
        }
        (state, last)
    }

    fn up(side: Side) -> [Event; 3] {
        [Event::TcpConnectionConfirmed(side), Event::BgpOpen(side, open()), Event::KeepAliveMsg(side)]
    }

    fn closed_with(actions: &[Action], side: Side, code: u8, subcode: u8) -> bool {
        let says = |action: &Action| matches!(action, Action::SendNotification(to, n) if *to == side && (n.code, n.subcode) == (code, subcode));
        actions.iter().any(says) && actions.contains(&Action::Close(side))
    }

    #[test]
    fn manual_start_dials_and_a_passive_peer_waits() {
        let (state, actions) = after(settings(), []);
        assert_eq!((state.name(), actions.as_slice()), (Name::Connect, &[Action::Dial][..]));
        let (state, actions) = after(Settings { passive: true, ..settings() }, []);
        assert_eq!((state.name(), actions.as_slice()), (Name::Active, &[][..]));
        assert_eq!(state.next_deadline(), None);
    }

    #[test]
    fn tcp_connection_confirmed_sends_our_open_with_both_families_refresh_and_four_octets() {
        let (state, actions) = after(settings(), [Event::TcpConnectionConfirmed(Side::Outgoing)]);
        assert_eq!(state.name(), Name::OpenSent);
        let [Action::SendOpen(Side::Outgoing, open)] = actions.as_slice() else { panic!("{actions:?}") };
        assert_eq!((open.asn, open.hold, open.router_id), (64512, 90, Ipv4Addr::new(10, 0, 0, 1)));
        assert_eq!(open.families(), Family::ALL);
        assert!(open.has(&Capability::RouteRefresh) && open.four_octet_as());
    }

    #[test]
    fn bgp_open_then_keepalive_establish_with_the_lesser_hold_time() {
        let (mut state, actions) =
            after(settings(), [Event::TcpConnectionConfirmed(Side::Outgoing), Event::BgpOpen(Side::Outgoing, open())]);
        assert_eq!(state.name(), Name::OpenConfirm);
        assert_eq!(actions, [Action::SendKeepalive(Side::Outgoing)]);
        let actions = step(&mut state, at(1), Event::KeepAliveMsg(Side::Outgoing));
        let [Action::Up(Side::Outgoing, negotiated)] = actions.as_slice() else { panic!("{actions:?}") };
        assert_eq!((negotiated.hold, negotiated.keepalive), (90, Duration::from_secs(30)));
        assert_eq!(state.name(), Name::Established);
    }

    #[test]
    fn the_keepalive_interval_is_at_most_a_third_of_the_negotiated_hold_time() {
        let short = Open { hold: 9, ..open() };
        let events = [Event::TcpConnectionConfirmed(Side::Incoming), Event::BgpOpen(Side::Incoming, short)];
        let (state, _) = after(settings(), events);
        let negotiated = state.incoming.as_ref().and_then(Connection::negotiated).unwrap();
        assert_eq!((negotiated.hold, negotiated.keepalive), (9, Duration::from_secs(3)));
    }

    #[test]
    fn a_hold_time_of_zero_turns_both_timers_off() {
        let zero = Open { hold: 0, ..open() };
        let side = Side::Incoming;
        let events = [Event::TcpConnectionConfirmed(side), Event::BgpOpen(side, zero), Event::KeepAliveMsg(side)];
        let (state, _) = after(Settings { passive: true, ..settings() }, events);
        assert_eq!(state.name(), Name::Established);
        assert_eq!(state.next_deadline(), None);
    }

    #[test]
    fn hold_timer_expires_after_the_last_message_and_not_before() {
        let (mut state, _) = after(settings(), up(Side::Outgoing));
        step(&mut state, at(50), Event::UpdateMsg(Side::Outgoing));
        step(&mut state, at(50), Event::KeepaliveTimerExpires(Side::Outgoing));
        assert_eq!(state.due(Duration::from_secs(79)), None);
        step(&mut state, at(139), Event::KeepaliveTimerExpires(Side::Outgoing));
        assert_eq!(state.due(Duration::from_secs(139)), None);
        assert_eq!(state.due(Duration::from_secs(140)), Some(Event::HoldTimerExpires(Side::Outgoing)));
        let actions = step(&mut state, at(140), Event::HoldTimerExpires(Side::Outgoing));
        assert!(closed_with(&actions, Side::Outgoing, 4, 0), "{actions:?}");
        let reason = "hold timer expired: nothing received for 90 s".to_owned();
        assert!(actions.contains(&Action::Down { reason, keep: false }));
        assert_eq!(state.name(), Name::Idle);
    }

    #[test]
    fn keepalive_timer_expires_every_interval_jittered_down_to_three_quarters() {
        let (mut state, _) = after(settings(), up(Side::Outgoing));
        assert_eq!(state.due(Duration::from_secs(30)), Some(Event::KeepaliveTimerExpires(Side::Outgoing)));
        let early = Now { random: 0, ..at(30) };
        assert_eq!(
            step(&mut state, early, Event::KeepaliveTimerExpires(Side::Outgoing)),
            [Action::SendKeepalive(Side::Outgoing)]
        );
        assert_eq!(state.next_deadline(), Some(Duration::from_millis(52_500)));
    }

    #[test]
    fn a_connection_whose_open_never_comes_is_given_up_after_four_minutes() {
        let (mut state, _) =
            after(Settings { passive: true, ..settings() }, [Event::TcpConnectionConfirmed(Side::Incoming)]);
        assert_eq!(state.next_deadline(), Some(OPEN_HOLD));
        let event = state.due(OPEN_HOLD).unwrap();
        let actions = step(&mut state, at(240), event);
        assert!(closed_with(&actions, Side::Incoming, 4, 0), "{actions:?}");
        assert!(actions.iter().all(|action| !matches!(action, Action::Down { .. })));
    }

    #[test]
    fn tcp_connection_fails_while_dialling_retries_with_growing_waits_up_to_the_limit() {
        let (mut state, _) = after(settings(), []);
        let mut time = 0;
        for wait in [1, 2, 4, 8, 16, 30, 30] {
            let fails = Event::TcpConnectionFails(Side::Outgoing, "refused".to_owned());
            let actions = step(&mut state, at(time), fails);
            assert_eq!(actions, [Action::Failed("refused".to_owned())]);
            assert_eq!(state.name(), Name::Active);
            assert_eq!(state.next_connect(), Some(Duration::from_secs(time + wait)));
            time += wait;
            let event = state.due(at(time).time).unwrap();
            assert_eq!(step(&mut state, at(time), event), [Action::Dial]);
        }
    }

    #[test]
    fn connect_retry_timer_expires_during_a_dial_gives_it_up() {
        let (mut state, _) = after(settings(), []);
        assert_eq!(state.due(CONNECT_TIMEOUT), Some(Event::ConnectRetryTimerExpires));
        let actions = step(&mut state, at(10), Event::ConnectRetryTimerExpires);
        assert_eq!(actions[0], Action::StopDial);
        assert_eq!(state.name(), Name::Active);
    }

    #[test]
    fn a_session_that_lasted_resets_the_backoff_and_one_that_did_not_lets_it_grow() {
        let (mut state, _) = after(settings(), []);
        for _ in 0..5 {
            step(&mut state, at(0), Event::TcpConnectionFails(Side::Outgoing, String::new()));
            step(&mut state, at(0), Event::ConnectRetryTimerExpires);
        }
        up(Side::Outgoing).into_iter().for_each(|event| drop(step(&mut state, at(100), event)));
        let actions = step(&mut state, at(130), Event::TcpConnectionFails(Side::Outgoing, "gone".to_owned()));
        let down = Action::Down { reason: "gone".to_owned(), keep: false };
        assert_eq!(actions, [Action::Close(Side::Outgoing), down]);
        assert_eq!((state.name(), state.next_connect()), (Name::Active, Some(Duration::from_secs(131))));
        up(Side::Outgoing).into_iter().for_each(|event| drop(step(&mut state, at(131), event)));
        step(&mut state, at(132), Event::TcpConnectionFails(Side::Outgoing, "gone again".to_owned()));
        assert_eq!(state.next_connect(), Some(Duration::from_secs(134)), "one second of session forgives nothing");
    }

    fn graceful(notification: bool) -> Capability {
        let families = Family::ALL.map(|family| (family, true)).into();
        Capability::GracefulRestart(super::super::wire::Restart { restarting: false, notification, time: 60, families })
    }

    /// Established with graceful restart on both sides.
    fn graceful_session(notification: bool) -> State {
        let mut local = settings();
        local.capabilities.push(graceful(notification));
        let mut open = open();
        open.capabilities.push(graceful(notification));
        let side = Side::Outgoing;
        let events = [Event::TcpConnectionConfirmed(side), Event::BgpOpen(side, open), Event::KeepAliveMsg(side)];
        after(local, events).0
    }

    fn kept(actions: &[Action]) -> Option<bool> {
        actions.iter().find_map(|action| match action {
            Action::Down { keep, .. } => Some(*keep),
            _ => None,
        })
    }

    #[test]
    fn routes_are_kept_over_a_lost_connection_and_over_notifications_only_with_n() {
        let side = Side::Outgoing;
        let hard = Notification::shutdown("for good").hard();
        let cases = [
            (Event::TcpConnectionFails(side, "reset".to_owned()), true, true),
            (Event::NotifMsg(side, Notification::shutdown("bye")), false, true),
            (Event::NotifMsg(side, hard), false, false),
            (Event::HoldTimerExpires(side), false, true),
            (Event::SendHoldTimerExpires(side), false, true),
            (Event::ManualStop(Notification::shutdown("bye")), false, false),
        ];
        for (event, without, with) in cases {
            for (notification, expected) in [(false, without), (true, with)] {
                let actions = step(&mut graceful_session(notification), at(1), event.clone());
                assert_eq!(kept(&actions), Some(expected), "N {notification}: {event:?}: {actions:?}");
            }
        }
    }

    #[test]
    fn our_own_stop_is_a_hard_reset_where_the_peer_would_keep_our_routes() {
        for (notification, subcode) in [(false, cease::ADMINISTRATIVE_SHUTDOWN), (true, cease::HARD_RESET)] {
            let stop = Event::ManualStop(Notification::shutdown("bye"));
            let actions = step(&mut graceful_session(notification), at(1), stop);
            assert!(closed_with(&actions, Side::Outgoing, 6, subcode), "{actions:?}");
        }
    }

    #[test]
    fn a_second_connection_replaces_the_session_only_where_its_open_says_restarted() {
        for restarted in [false, true] {
            let mut state = graceful_session(false);
            let actions = step(&mut state, at(10), Event::TcpConnectionConfirmed(Side::Incoming));
            assert!(matches!(actions.as_slice(), [Action::SendOpen(Side::Incoming, _)]), "{actions:?}");
            let mut again = open();
            let Capability::GracefulRestart(restart) = graceful(false) else { unreachable!() };
            let restart = super::super::wire::Restart { restarting: restarted, ..restart };
            again.capabilities.push(Capability::GracefulRestart(restart));
            let actions = step(&mut state, at(10), Event::BgpOpen(Side::Incoming, again));
            assert_eq!(kept(&actions), restarted.then_some(true), "{actions:?}");
            assert_eq!(closed_with(&actions, Side::Incoming, 6, 7), !restarted);
            assert_eq!(state.established().is_some(), !restarted);
            step(&mut state, at(10), Event::KeepAliveMsg(Side::Incoming));
            assert_eq!(state.name(), Name::Established);
            assert_eq!(state.connected(Side::Incoming), restarted);
        }
    }

    #[test]
    fn two_connections_that_crossed_in_one_restart_do_not_end_each_other() {
        let mut local = settings();
        local.capabilities.push(graceful(false));
        let mut restarted = open();
        let Capability::GracefulRestart(restart) = graceful(false) else { unreachable!() };
        let restart = super::super::wire::Restart { restarting: true, ..restart };
        restarted.capabilities.push(Capability::GracefulRestart(restart));
        let mut over = open();
        over.capabilities.push(graceful(false));
        let (first, second) = (Side::Outgoing, Side::Incoming);
        // The restart may have come to its end between the peer's two OPENs, and that of the earlier one may arrive later.
        for (established, new_life_from) in [(&restarted, 40), (&over, 6)] {
            let events = [
                Event::TcpConnectionConfirmed(first),
                Event::BgpOpen(first, established.clone()),
                Event::KeepAliveMsg(first),
                Event::TcpConnectionConfirmed(second),
            ];
            let (state, _) = after(local.clone(), events);
            let actions = step(&mut state.clone(), at(1), Event::BgpOpen(second, restarted.clone()));
            assert!(closed_with(&actions, second, 6, 7) && kept(&actions).is_none(), "{actions:?}");
            let later = step(&mut state.clone(), at(new_life_from), Event::BgpOpen(second, restarted.clone()));
            assert_eq!(kept(&later), Some(true), "a second restart: {later:?}");
        }
    }

    #[test]
    fn there_is_room_for_another_connection_of_a_peer_that_opened_the_established_one() {
        let mut local = settings();
        local.capabilities.push(graceful(false));
        let (side, mut theirs) = (Side::Incoming, open());
        theirs.capabilities.push(graceful(false));
        let events = [Event::TcpConnectionConfirmed(side), Event::BgpOpen(side, theirs), Event::KeepAliveMsg(side)];
        let (mut state, _) = after(local, events);
        assert!(state.make_room() && !state.connected(Side::Incoming) && state.connected(Side::Outgoing));
        assert!(!state.make_room(), "one is enough");
        let (mut plain, _) = after(settings(), up(Side::Incoming));
        assert!(!plain.make_room(), "without graceful restart there is nothing to look for");
    }

    #[test]
    fn bgp_open_from_the_wrong_as_is_answered_bad_peer_as_and_names_both_numbers() {
        let wrong = Open { asn: 65000, ..open() };
        let (mut state, actions) =
            after(settings(), [Event::TcpConnectionConfirmed(Side::Incoming), Event::BgpOpen(Side::Incoming, wrong)]);
        assert!(closed_with(&actions, Side::Incoming, 2, 2), "{actions:?}");
        let told =
            |action: &Action| matches!(action, Action::Failed(why) if why.contains("65000") && why.contains("64513"));
        assert!(actions.iter().any(told), "{actions:?}");
        assert_eq!(state.name(), Name::Idle);
        // While it rests, connections are refused: two sides that disagree do not spin.
        let actions = step(&mut state, at(0), Event::TcpConnectionConfirmed(Side::Incoming));
        assert!(closed_with(&actions, Side::Incoming, 6, 5), "{actions:?}");
        assert_eq!(state.due(Duration::from_secs(1)), Some(Event::IdleHoldTimerExpires));
    }

    #[test]
    fn bgp_open_with_a_bad_identifier_or_hold_time_is_refused() {
        let bad = |open: Open, settings: Settings| {
            let events = [Event::TcpConnectionConfirmed(Side::Incoming), Event::BgpOpen(Side::Incoming, open)];
            after(settings, events).1
        };
        let zero = Open { router_id: Ipv4Addr::UNSPECIFIED, ..open() };
        assert!(closed_with(&bad(zero, settings()), Side::Incoming, 2, 3));
        let ours = Open { asn: 64512, router_id: settings().router_id, ..open() };
        let internal = Settings { remote_asn: 64512, ..settings() };
        assert!(closed_with(&bad(ours, internal), Side::Incoming, 2, 3));
        // RFC 6286: across ASes the identifier need not be unique.
        let same = Open { router_id: settings().router_id, ..open() };
        assert_eq!(bad(same, settings()), [Action::StopDial, Action::SendKeepalive(Side::Incoming)]);
        for hold in [1, 2] {
            assert!(closed_with(&bad(Open { hold, ..open() }, settings()), Side::Incoming, 2, 6));
        }
    }

    #[test]
    fn a_peer_without_multiprotocol_capabilities_speaks_ipv4() {
        let bare = Open { capabilities: vec![], ..open() };
        let side = Side::Incoming;
        let events = [Event::TcpConnectionConfirmed(side), Event::BgpOpen(side, bare), Event::KeepAliveMsg(side)];
        let (state, _) = after(settings(), events);
        let (_, negotiated) = state.established().unwrap();
        assert_eq!(negotiated.families, [Family::Ipv4]);
        assert!(!negotiated.four_octet_as && !negotiated.route_refresh);
    }

    /// Both connections are up; `first` has received its OPEN, now the other one does. Returns what was done about either.
    fn collide(local: Settings, first: Side) -> (State, Vec<Action>) {
        let (mut state, _) = crossed(local);
        let mut actions = step(&mut state, at(0), Event::BgpOpen(first, open()));
        actions.extend(step(&mut state, at(0), Event::BgpOpen(first.other(), open())));
        (state, actions)
    }

    /// Both connections are up and have sent their OPENs.
    fn crossed(local: Settings) -> (State, Vec<Action>) {
        after(local, [Side::Incoming, Side::Outgoing].map(Event::TcpConnectionConfirmed))
    }

    fn higher() -> Settings {
        Settings { router_id: Ipv4Addr::new(10, 0, 0, 3), ..settings() }
    }

    #[test]
    fn in_a_collision_the_connection_opened_by_the_higher_identifier_survives_whatever_the_order() {
        for first in [Side::Outgoing, Side::Incoming] {
            let (state, actions) = collide(settings(), first);
            assert!(closed_with(&actions, Side::Outgoing, 6, 7), "{first:?}: {actions:?}");
            assert!(state.connected(Side::Incoming) && !state.connected(Side::Outgoing));
            let (state, actions) = collide(higher(), first);
            assert!(closed_with(&actions, Side::Incoming, 6, 7), "{first:?}: {actions:?}");
            assert!(state.connected(Side::Outgoing) && !state.connected(Side::Incoming));
        }
    }

    #[test]
    fn the_higher_identifier_never_confirms_a_connection_that_its_own_would_replace() {
        let (mut state, _) = crossed(higher());
        let actions = step(&mut state, at(1), Event::BgpOpen(Side::Incoming, open()));
        assert!(closed_with(&actions, Side::Incoming, 6, 7), "{actions:?}");
        assert!(!actions.contains(&Action::SendKeepalive(Side::Incoming)), "{actions:?}");
        // The lower one cannot know yet, and waits for what the peer decides.
        let (mut state, _) = crossed(settings());
        let actions = step(&mut state, at(1), Event::BgpOpen(Side::Incoming, open()));
        assert_eq!(actions, [Action::SendKeepalive(Side::Incoming)]);
        let (mut state, _) = crossed(settings());
        let actions = step(&mut state, at(1), Event::BgpOpen(Side::Outgoing, open()));
        assert_eq!(actions, [Action::SendKeepalive(Side::Outgoing)]);
    }

    #[test]
    fn a_dial_that_ends_once_the_peers_connection_is_confirmed_says_no_open() {
        // The higher one's dial has been on its way for too long to count.
        for (local, second) in [(settings(), 0), (higher(), 1)] {
            let (mut state, _) = after(local, [Event::TcpConnectionConfirmed(Side::Incoming)]);
            let actions = step(&mut state, at(second), Event::BgpOpen(Side::Incoming, open()));
            assert_eq!(actions, [Action::StopDial, Action::SendKeepalive(Side::Incoming)]);
            let actions = step(&mut state, at(second), Event::TcpConnectionConfirmed(Side::Outgoing));
            assert!(closed_with(&actions, Side::Outgoing, 6, 7), "{actions:?}");
            assert!(!actions.iter().any(|action| matches!(action, Action::SendOpen(..))), "{actions:?}");
            step(&mut state, at(second), Event::KeepAliveMsg(Side::Incoming));
            assert_eq!(state.established().unwrap().0, Side::Incoming);
        }
    }

    #[test]
    fn a_young_dial_of_the_higher_identifier_counts_as_its_connection() {
        let (mut state, _) = after(higher(), [Event::TcpConnectionConfirmed(Side::Incoming)]);
        let actions = step(&mut state, at(0), Event::BgpOpen(Side::Incoming, open()));
        assert!(closed_with(&actions, Side::Incoming, 6, 7), "{actions:?}");
        assert!(!actions.contains(&Action::StopDial) && !actions.contains(&Action::SendKeepalive(Side::Incoming)));
        for event in up(Side::Outgoing) {
            step(&mut state, at(0), event);
        }
        assert_eq!(state.established().unwrap().0, Side::Outgoing);
        // A dial that comes to nothing keeps nobody away.
        let (mut state, _) = after(higher(), [Event::TcpConnectionFails(Side::Outgoing, "refused".to_owned())]);
        for event in up(Side::Incoming) {
            step(&mut state, at(0), event);
        }
        assert_eq!(state.established().unwrap().0, Side::Incoming);
    }

    #[test]
    fn a_connection_whose_open_does_not_come_keeps_no_other_one_away() {
        let (state, _) = crossed(higher());
        for (second, taken) in [(4, false), (5, true)] {
            let mut state = state.clone();
            let actions = step(&mut state, at(second), Event::BgpOpen(Side::Incoming, open()));
            assert_eq!(actions.contains(&Action::SendKeepalive(Side::Incoming)), taken, "{second} s: {actions:?}");
        }
    }

    #[test]
    fn with_equal_identifiers_the_higher_as_decides_the_collision() {
        let same = Settings { router_id: PEER_ID, ..settings() };
        let (state, _) = collide(same, Side::Outgoing);
        assert!(state.connected(Side::Incoming), "the peer's AS 64513 is higher than our 64512");
    }

    #[test]
    fn an_established_session_is_not_disturbed_by_a_second_connection() {
        let (mut state, _) = after(settings(), up(Side::Outgoing));
        let actions = step(&mut state, at(1), Event::TcpConnectionConfirmed(Side::Incoming));
        assert!(closed_with(&actions, Side::Incoming, 6, 7), "{actions:?}");
        assert_eq!(state.name(), Name::Established);
    }

    #[test]
    fn the_second_connection_is_closed_once_the_first_is_established() {
        let events = [Event::TcpConnectionConfirmed(Side::Outgoing)].into_iter().chain(up(Side::Incoming));
        let (state, actions) = after(settings(), events);
        assert!(closed_with(&actions, Side::Outgoing, 6, 7), "{actions:?}");
        assert_eq!(state.established().unwrap().0, Side::Incoming);
    }

    #[test]
    fn a_dial_under_way_is_given_up_before_the_incoming_connection_is_confirmed() {
        let (mut state, actions) = after(settings(), up(Side::Incoming).into_iter().take(2));
        assert_eq!(actions, [Action::StopDial, Action::SendKeepalive(Side::Incoming)]);
        let actions = step(&mut state, at(0), Event::KeepAliveMsg(Side::Incoming));
        assert!(matches!(actions[..], [Action::Up(Side::Incoming, _)]), "{actions:?}");
        assert_eq!((state.name(), state.next_connect()), (Name::Established, None));
    }

    #[test]
    fn the_loss_of_one_of_two_connections_leaves_the_other_alone() {
        let (mut state, _) = after(
            settings(),
            [Event::TcpConnectionConfirmed(Side::Incoming), Event::TcpConnectionConfirmed(Side::Outgoing)],
        );
        step(&mut state, at(0), Event::TcpConnectionFails(Side::Incoming, "reset".to_owned()));
        assert_eq!(state.name(), Name::OpenSent);
        assert_eq!(state.next_connect(), None);
    }

    #[test]
    fn messages_out_of_turn_are_finite_state_machine_errors() {
        let side = Side::Outgoing;
        let confirmed = [Event::TcpConnectionConfirmed(side)];
        let opened = [Event::TcpConnectionConfirmed(side), Event::BgpOpen(side, open())];
        let cases = [
            (confirmed.to_vec(), Event::UpdateMsg(side), 1),
            (confirmed.to_vec(), Event::KeepAliveMsg(side), 1),
            (opened.to_vec(), Event::UpdateMsg(side), 2),
            (opened.to_vec(), Event::BgpOpen(side, open()), 2),
            (up(side).to_vec(), Event::BgpOpen(side, open()), 3),
        ];
        for (events, last, subcode) in cases {
            let (mut state, _) = after(settings(), events);
            let actions = step(&mut state, at(1), last.clone());
            assert!(closed_with(&actions, side, 5, subcode), "{last:?}: {actions:?}");
            assert_eq!(state.name(), Name::Idle);
        }
    }

    #[test]
    fn notif_msg_of_a_cease_leaves_us_listening_and_any_other_rests() {
        for (notification, expected) in
            [(Notification::shutdown("reboot"), Name::Active), (Notification::open_error(2), Name::Idle)]
        {
            let (mut state, _) = after(settings(), up(Side::Outgoing));
            let actions = step(&mut state, at(1), Event::NotifMsg(Side::Outgoing, notification.clone()));
            assert_eq!(
                actions,
                [
                    Action::Close(Side::Outgoing),
                    Action::Down { reason: format!("received {notification}"), keep: false }
                ],
                "a NOTIFICATION is never answered with one"
            );
            assert_eq!(state.name(), expected);
        }
    }

    #[test]
    fn manual_stop_ceases_on_every_connection_and_then_nothing_starts_it_but_manual_start() {
        let (mut state, _) = after(settings(), up(Side::Outgoing));
        let actions = step(&mut state, at(1), Event::ManualStop(Notification::cease(cease::PEER_DECONFIGURED)));
        assert!(closed_with(&actions, Side::Outgoing, 6, 3), "{actions:?}");
        assert!(actions.iter().any(|action| matches!(action, Action::Down { .. })));
        assert_eq!((state.name(), state.next_deadline()), (Name::Idle, None));
        let actions = step(&mut state, at(2), Event::TcpConnectionConfirmed(Side::Incoming));
        assert!(closed_with(&actions, Side::Incoming, 6, 5), "{actions:?}");
        assert_eq!(step(&mut state, at(3), Event::ManualStart), [Action::Dial]);
    }

    #[test]
    fn events_of_a_connection_that_is_gone_do_nothing() {
        let (mut state, _) = after(Settings { passive: true, ..settings() }, []);
        let before = state.clone();
        for side in [Side::Outgoing, Side::Incoming] {
            for event in [
                Event::HoldTimerExpires(side),
                Event::TcpConnectionFails(side, String::new()),
                Event::BgpOpen(side, open()),
                Event::KeepAliveMsg(side),
                Event::UpdateMsg(side),
                Event::NotifMsg(side, Notification::cease(2)),
                Event::MessageError(side, Notification::new(1, 1, Default::default())),
            ] {
                assert_eq!(step(&mut state, at(1), event.clone()), [], "{event:?}");
                assert_eq!(state, before, "{event:?}");
            }
        }
    }
}
