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
//! | OpenSent    | BGPOpen, acceptable          | OpenConfirm | Send KEEPALIVE; collision resolution             |
//! | OpenSent    | BGPOpen, not acceptable      | (closed)    | NOTIFICATION 2/n; peer Idle                      |
//! | OpenSent    | HoldTimer_Expires (4 min)    | (closed)    | NOTIFICATION 4/0; peer Idle                      |
//! | OpenSent    | TcpConnectionFails           | (closed)    | peer Active                                      |
//! | OpenSent    | other messages               | (closed)    | NOTIFICATION 5/1; peer Idle                      |
//! | OpenConfirm | KeepAliveMsg                 | Established | Up; the other connection, if any: Cease/7        |
//! | OpenConfirm | other messages               | (closed)    | NOTIFICATION 5/2; peer Idle                      |
//! | Established | KeepAliveMsg, UpdateMsg      | Established | hold timer restarts                              |
//! | Established | BGPOpen                      | (closed)    | NOTIFICATION 5/3; Down; peer Idle                |
//! | Established | TcpConnectionFails           | (closed)    | Down; peer Active                                |
//! | Established | TcpConnectionConfirmed (new) | Established | the new one: Cease/7                             |
//! | any         | NotifMsg                     | (closed)    | Cease: peer Active; else Idle                    |
//! | any         | header, OPEN or UPDATE error | (closed)    | the NOTIFICATION; Down if up; peer Idle          |
//! | confirm/est.| KeepaliveTimer_Expires       | same        | Send KEEPALIVE                                   |
//! | confirm/est.| HoldTimer_Expires            | (closed)    | NOTIFICATION 4/0; Down if up; peer Idle          |

use std::{net::Ipv4Addr, time::Duration};

use super::wire::{Family, Notification, Open, cease, open_error};

/// Hold timer until the peer's OPEN has come (RFC 4271 8.2.2 suggests four minutes).
const OPEN_HOLD: Duration = Duration::from_secs(240);
/// How long a dial may take before it is given up.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// First wait between two dials; doubles with every failure.
const RETRY_FIRST: Duration = Duration::from_secs(1);
/// Longest wait between two dials. Nodes come back in seconds: RFC 4271's 120 s would keep their pods unreachable.
const RETRY_LONGEST: Duration = Duration::from_secs(30);

/// The moment of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    /// Time since some fixed point; never goes back.
    pub time: Duration,
    /// A fresh random number, for jitter.
    pub random: u32,
}

/// What the configuration says about the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Our AS number.
    pub local_asn: u32,
    /// Our BGP identifier.
    pub router_id: Ipv4Addr,
    /// The AS number that the peer must have.
    pub remote_asn: u32,
    /// Hold time we propose, seconds; 0: no keepalives.
    pub hold: u16,
    /// Keepalive interval we wish for.
    pub keepalive: Duration,
    /// Never dial.
    pub passive: bool,
}

/// Which side opened a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Side {
    /// We dialled.
    Outgoing,
    /// The peer dialled.
    Incoming,
}

impl Side {
    /// The other side.
    pub const fn other(self) -> Self {
        match self {
            Self::Outgoing => Self::Incoming,
            Self::Incoming => Self::Outgoing,
        }
    }
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The peer was configured, or enabled again.
    ManualStart,
    /// The peer is being removed, or the daemon stops: say so with this NOTIFICATION.
    ManualStop(Notification),
    /// The idle hold timer ran out.
    IdleHoldTimerExpires,
    /// The connect retry timer ran out, between dials or during one.
    ConnectRetryTimerExpires,
    /// No message for a hold time.
    HoldTimerExpires(Side),
    /// It is time for a KEEPALIVE.
    KeepaliveTimerExpires(Side),
    /// A connection is up.
    TcpConnectionConfirmed(Side),
    /// A dial failed, or a connection ended.
    TcpConnectionFails(Side, String),
    /// OPEN, decoded.
    BgpOpen(Side, Open),
    /// KEEPALIVE.
    KeepAliveMsg(Side),
    /// UPDATE, decoded (its content is the RIB's business), or ROUTE-REFRESH.
    UpdateMsg(Side),
    /// NOTIFICATION.
    NotifMsg(Side, Notification),
    /// BGPHeaderErr, BGPOpenMsgErr or UpdateMsgErr: what cannot be decoded, with the answer it deserves.
    MessageError(Side, Notification),
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Open a connection to the peer.
    Dial,
    /// Give up the dial that is under way.
    StopDial,
    /// Send an OPEN.
    SendOpen(Side, Open),
    /// Send a KEEPALIVE.
    SendKeepalive(Side),
    /// Send a NOTIFICATION.
    SendNotification(Side, Notification),
    /// Close a connection once what was sent is out.
    Close(Side),
    /// The session is established.
    Up(Side, Negotiated),
    /// The established session is gone: withdraw its routes.
    Down(String),
    /// An attempt that never was established failed; for the operator.
    Failed(String),
}

/// What both OPENs settled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Negotiated {
    /// The peer's OPEN.
    pub peer: Open,
    /// Hold time, seconds: the lesser of both; 0: no keepalives.
    pub hold: u16,
    /// Keepalive interval; zero with a hold time of zero.
    pub keepalive: Duration,
    /// Families that both sides speak.
    pub families: Vec<Family>,
    /// Both sides use 4-octet AS numbers.
    pub four_octet_as: bool,
    /// The peer takes ROUTE-REFRESH.
    pub route_refresh: bool,
}

/// State of the peer as users see it (RFC 4271 8.2.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Name {
    /// Stopped, or resting after an error.
    Idle,
    /// Dialling.
    Connect,
    /// Waiting for the peer or for the next dial.
    Active,
    /// OPEN sent.
    OpenSent,
    /// OPEN received, waiting for its confirmation.
    OpenConfirm,
    /// Up.
    Established,
}

impl Name {
    /// The name in the RFC.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Idle => "Idle",
            Self::Connect => "Connect",
            Self::Active => "Active",
            Self::OpenSent => "OpenSent",
            Self::OpenConfirm => "OpenConfirm",
            Self::Established => "Established",
        }
    }
}

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

    const fn established(&self) -> bool {
        matches!(self.stage, Stage::Established(_))
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
        let wait = RETRY_FIRST.saturating_mul(1 << self.failures.min(5)).min(RETRY_LONGEST);
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
    fn to_active(&mut self, now: Now) {
        let wait = self.backoff(now);
        self.phase = Phase::Active { until: (!self.settings.passive).then_some(now.time + wait) };
    }

    /// After an error: rest, and refuse connections meanwhile, so that two sides that disagree do not spin.
    fn to_idle(&mut self, now: Now, actions: &mut Vec<Action>) {
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
                state.to_active(now);
            }
            Phase::Active { .. } if state.outgoing.is_none() => state.dial(now, &mut actions),
            _ => {}
        },
        // Event 10: HoldTimer_Expires
        Event::HoldTimerExpires(side) => {
            let hold =
                state.connection(side).and_then(Connection::negotiated).map_or(OPEN_HOLD.as_secs(), |n| n.hold.into());
            let reason = format!("hold timer expired: nothing received for {hold} s");
            fail(state, now, side, Some(Notification::hold_timer_expired()), reason, Then::Idle, &mut actions);
        }
        // Event 11: KeepaliveTimer_Expires
        Event::KeepaliveTimerExpires(side) => {
            restart_keepalive(state, now, side);
            actions.push(Action::SendKeepalive(side));
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
        Event::NotifMsg(side, notification) => {
            let then = if notification.code == 6 { Then::Active } else { Then::Idle };
            fail(state, now, side, None, format!("received {notification}"), then, &mut actions);
        }
        // Events 21, 22 and 28: BGPHeaderErr, BGPOpenMsgErr, UpdateMsgErr
        Event::MessageError(side, notification) => {
            let reason = format!("sent {notification}");
            fail(state, now, side, Some(notification), reason, Then::Idle, &mut actions);
        }
    }
    actions
}

fn reject(side: Side, subcode: u8, actions: &mut Vec<Action>) {
    actions.push(Action::SendNotification(side, Notification::cease(subcode)));
    actions.push(Action::Close(side));
}

fn stop(state: &mut State, notification: &Notification, actions: &mut Vec<Action>) {
    let was_up = state.established().is_some();
    for side in [Side::Outgoing, Side::Incoming] {
        if state.slot(side).take().is_some() {
            actions.push(Action::SendNotification(side, notification.clone()));
            actions.push(Action::Close(side));
        }
    }
    if matches!(state.phase, Phase::Connect { .. }) {
        actions.push(Action::StopDial);
    }
    if was_up {
        actions.push(Action::Down(format!("sent {notification}")));
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
    if state.established().is_some() || state.connected(side) {
        return reject(side, cease::CONNECTION_COLLISION_RESOLUTION, actions);
    }
    *state.slot(side) =
        Some(Connection { stage: Stage::OpenSent, hold_at: Some(now.time + OPEN_HOLD), keepalive_at: None });
    let settings = &state.settings;
    actions.push(Action::SendOpen(side, Open::ours(settings.local_asn, settings.hold, settings.router_id)));
    // While this connection tries its luck no further dial is planned; a dial under way goes on.
    if let Phase::Active { until } = &mut state.phase {
        *until = None;
    }
}

fn connection_fails(state: &mut State, now: Now, side: Side, reason: String, actions: &mut Vec<Action>) {
    if state.connected(side) {
        fail(state, now, side, None, reason, Then::Active, actions);
    } else if side == Side::Outgoing && matches!(state.phase, Phase::Connect { .. }) {
        // Only the dial failed.
        if state.idle() {
            actions.push(Action::Failed(reason));
            state.to_active(now);
        } else {
            state.phase = Phase::Active { until: None };
        }
    }
}

/// Ends one connection. The peer changes phase only where no other connection is left.
fn fail(
    state: &mut State,
    now: Now,
    side: Side,
    notification: Option<Notification>,
    reason: String,
    then: Then,
    actions: &mut Vec<Action>,
) {
    let Some(connection) = state.slot(side).take() else { return };
    if let Some(notification) = notification {
        actions.push(Action::SendNotification(side, notification));
    }
    actions.push(Action::Close(side));
    actions.push(if connection.established() { Action::Down(reason) } else { Action::Failed(reason) });
    if !state.idle() || (matches!(state.phase, Phase::Connect { .. }) && matches!(then, Then::Active)) {
        return;
    }
    match then {
        Then::Active => state.to_active(now),
        Then::Idle => state.to_idle(now, actions),
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
    fail(state, now, side, Some(Notification::fsm_error(subcode)), reason, Then::Idle, actions);
}

fn opened(state: &mut State, now: Now, side: Side, open: Open, actions: &mut Vec<Action>) {
    match state.connection(side).map(|connection| &connection.stage) {
        None => return,
        Some(Stage::OpenSent) => {}
        Some(_) => return unexpected(state, now, side, "OPEN", actions),
    }
    let negotiated = match negotiate(&state.settings, open) {
        Ok(negotiated) => negotiated,
        Err((subcode, reason)) => {
            let notification = Notification::open_error(subcode);
            let reason = format!("sent {notification}: {reason}");
            return fail(state, now, side, Some(notification), reason, Then::Idle, actions);
        }
    };
    let loser = collision(state, side, negotiated.peer.router_id);
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
    actions.push(Action::SendKeepalive(side));
}

/// The OPEN checks of RFC 4271 6.2.
fn negotiate(settings: &Settings, open: Open) -> Result<Negotiated, (u8, String)> {
    if open.asn != settings.remote_asn {
        let reason = format!("the peer is in AS {}, configured is AS {}", open.asn, settings.remote_asn);
        return Err((open_error::BAD_PEER_AS, reason));
    }
    let internal = settings.remote_asn == settings.local_asn;
    // RFC 6286: non-zero, and within one AS unique.
    if open.router_id.is_unspecified() || (internal && open.router_id == settings.router_id) {
        return Err((open_error::BAD_BGP_IDENTIFIER, format!("router id {} is not usable", open.router_id)));
    }
    if (1..3).contains(&open.hold) {
        return Err((open_error::UNACCEPTABLE_HOLD_TIME, format!("hold time {} s is below 3 s", open.hold)));
    }
    let hold = settings.hold.min(open.hold);
    let keepalive =
        if hold == 0 { Duration::ZERO } else { settings.keepalive.min(Duration::from_secs(u64::from(hold)) / 3) };
    let theirs = open.families(false);
    let families = Family::ALL.into_iter().filter(|family| theirs.contains(family)).collect();
    Ok(Negotiated {
        hold,
        keepalive,
        families,
        four_octet_as: open.four_octet_as(),
        route_refresh: open.route_refresh(),
        peer: open,
    })
}

/// RFC 4271 6.8 and RFC 6286 2.3: which connection is closed, where the other one has also received its OPEN. The one
/// that the side with the higher identifier opened survives; with equal identifiers, the higher AS decides.
fn collision(state: &State, side: Side, peer_id: Ipv4Addr) -> Option<Side> {
    let other = state.connection(side.other())?;
    match other.stage {
        Stage::OpenSent => None,
        Stage::Established(_) => Some(side),
        Stage::OpenConfirm(_) => {
            let settings = &state.settings;
            let ours = (settings.router_id, settings.local_asn);
            let theirs = (peer_id, settings.remote_asn);
            Some(if ours < theirs { Side::Outgoing } else { Side::Incoming })
        }
    }
}

fn keepalive(state: &mut State, now: Now, side: Side, actions: &mut Vec<Action>) {
    match state.slot(side).as_mut().map(|connection| &mut connection.stage) {
        None => {}
        Some(Stage::OpenSent) => unexpected(state, now, side, "KEEPALIVE", actions),
        Some(Stage::Established(_)) => restart_hold(state, now, side),
        Some(stage @ Stage::OpenConfirm(_)) => {
            let Stage::OpenConfirm(negotiated) = stage.clone() else { return };
            *stage = Stage::Established(negotiated.clone());
            restart_hold(state, now, side);
            state.failures = 0;
            if state.slot(side.other()).take().is_some() {
                reject(side.other(), cease::CONNECTION_COLLISION_RESOLUTION, actions);
            }
            if matches!(state.phase, Phase::Connect { .. }) {
                actions.push(Action::StopDial);
            }
            state.phase = Phase::Active { until: None };
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
