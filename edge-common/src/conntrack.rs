//! Connection tracking: the pure transitions of a flow, and its clocks.
//!
//! | state | packet | becomes |
//! |---|---|---|
//! | half-open | backend's SYN-ACK | half-open, the client's half remembers what must be acknowledged (latest wins) |
//! | half-open | client's ACK of it, within 2^20 | established |
//! | half-open | client's SYN again, ACK of anything else, data without ACK | half-open |
//! | half-open | backend's datagram | half-open, answered |
//! | half-open | client's datagram after an answer | established |
//! | half-open, established | RST from either side, or the second FIN | closing |
//! | half-open, established | first FIN | unchanged, remembered; who closed first decides how long the port rests |
//! | established | SYN, data, ACK, datagram | established |
//! | closing | client's SYN | a new flow |
//! | closing | anything else | closing |
//!
//! A SYN on a flow whose idle timeout has passed starts a new flow in every state. Sequence numbers of FIN and RST are
//! not checked: a closing flow still forwards, so that a forged RST costs a flow its place in the established table
//! and not its connection.

use crate::flow::{TCP, UDP};
use crate::maps::flow_flag;

/// Life of a flow, as kept in `FlowV4::state`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    /// SYN or first datagram seen.
    HalfOpen = 1,
    /// Both ends proved that they are there.
    Established = 2,
    /// After RST or both FINs.
    Closing = 3,
}

impl State {
    /// The state of this number.
    #[inline(always)]
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::HalfOpen),
            2 => Some(Self::Established),
            3 => Some(Self::Closing),
            _ => None,
        }
    }

    /// The name users see.
    pub const fn name(self) -> &'static str {
        match self {
            Self::HalfOpen => "half-open",
            Self::Established => "established",
            Self::Closing => "closing",
        }
    }
}

/// Which way an entry's packets go, as kept in `FlowV4::direction`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Direction {
    /// Client to backend.
    Forward = 0,
    /// Backend to client.
    Reply = 1,
}

impl Direction {
    /// The direction of this number; everything but 0 is [`Direction::Reply`].
    #[inline(always)]
    pub const fn from_number(number: u8) -> Self {
        if number == 0 { Self::Forward } else { Self::Reply }
    }

    /// The other one.
    #[inline(always)]
    pub const fn opposite(self) -> Self {
        match self {
            Self::Forward => Self::Reply,
            Self::Reply => Self::Forward,
        }
    }

    /// The name users see.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Forward => "forward",
            Self::Reply => "reply",
        }
    }
}

/// TCP header flags, as in the 14th byte of the header (RFC 9293).
pub mod tcp_flag {
    /// No more data from the sender.
    pub const FIN: u8 = 0x01;
    /// Synchronise sequence numbers.
    pub const SYN: u8 = 0x02;
    /// Reset.
    pub const RST: u8 = 0x04;
    /// The acknowledgement field counts.
    pub const ACK: u8 = 0x10;
}

/// How far above `ack_floor` a promoting acknowledgement may lie: room for data the server sent early.
pub const ACK_WINDOW: u32 = 1 << 20;
/// A SNAT port whose client closed first rests this long: no TIME_WAIT at the backend, only packets still under way.
pub const SHORT_REST_SECONDS: u32 = 2;
/// Longest time between two touches of a flow, seconds.
pub const TOUCH_SECONDS: u32 = 16;
/// A tick is 2^20 ns (about 1.05 ms).
pub const TICK_SHIFT: u32 = 20;
const SECOND: u64 = 1_000_000_000;

/// What a packet says that matters to its flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// IP protocol number.
    pub protocol: u8,
    /// [`tcp_flag`] bits; 0 for UDP.
    pub flags: u8,
    /// TCP sequence number, host order.
    pub seq: u32,
    /// TCP acknowledgement number, host order.
    pub ack: u32,
}

/// What to do with a flow because of a packet. The packet itself is forwarded in any case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing changes.
    Stay,
    /// Set these [`flow_flag`] bits on both halves.
    Flag(u16),
    /// The client's half must see this acknowledged: the backend's initial sequence number + 1.
    Expect(u32),
    /// To the established table, with these bits added.
    Promote(u16),
    /// To the closing table, with these bits added.
    Close(u16),
    /// The entry is of the past: start a new flow for this SYN.
    Reopen,
}

/// True for a SYN that may start a flow.
#[inline(always)]
pub const fn opens(flags: u8) -> bool {
    use tcp_flag::*;
    flags & (SYN | ACK | RST | FIN) == SYN
}

/// The transition of a flow in `state` with `flow_flags` and `ack_floor`, hit by `segment` in `direction`;
/// `expired` where the idle timeout had passed before it came.
#[inline(always)]
pub const fn step(
    state: State,
    direction: Direction,
    flow_flags: u16,
    ack_floor: u32,
    expired: bool,
    segment: &Segment,
) -> Step {
    match segment.protocol {
        UDP => step_udp(state, direction, flow_flags),
        _ => step_tcp(state, direction, flow_flags, ack_floor, expired, segment),
    }
}

#[inline(always)]
const fn step_udp(state: State, direction: Direction, flow_flags: u16) -> Step {
    match (state, direction) {
        (State::HalfOpen, Direction::Reply) => Step::Flag(flow_flag::REPLIED),
        (State::HalfOpen, Direction::Forward) if flow_flags & flow_flag::REPLIED != 0 => Step::Promote(0),
        _ => Step::Stay,
    }
}

#[inline(always)]
const fn step_tcp(
    state: State,
    direction: Direction,
    flow_flags: u16,
    ack_floor: u32,
    expired: bool,
    segment: &Segment,
) -> Step {
    use tcp_flag::{ACK, FIN, RST, SYN};
    let flags = segment.flags;
    if matches!(direction, Direction::Forward) && opens(flags) {
        return if expired || matches!(state, State::Closing) { Step::Reopen } else { Step::Stay };
    }
    if matches!(state, State::Closing) {
        return Step::Stay;
    }
    if flags & RST != 0 {
        return Step::Close(0);
    }
    let added = if flags & FIN != 0 { fin_flags(direction, flow_flags) } else { 0 };
    let both = flow_flag::CLIENT_FIN | flow_flag::BACKEND_FIN;
    if (flow_flags | added) & both == both {
        return Step::Close(added);
    }
    if matches!(state, State::HalfOpen) {
        match direction {
            Direction::Reply if flags & (SYN | ACK) == SYN | ACK => return Step::Expect(segment.seq.wrapping_add(1)),
            Direction::Forward if flags & (SYN | ACK) == ACK && flow_flags & flow_flag::SYN_ACK_SEEN != 0 => {
                if acknowledges(ack_floor, segment.ack) {
                    return Step::Promote(added);
                }
            }
            _ => {}
        }
    }
    if added & !flow_flags != 0 { Step::Flag(added) } else { Step::Stay }
}

#[inline(always)]
const fn fin_flags(direction: Direction, flow_flags: u16) -> u16 {
    match direction {
        Direction::Forward => flow_flag::CLIENT_FIN,
        Direction::Reply if flow_flags & flow_flag::CLIENT_FIN == 0 => {
            flow_flag::BACKEND_FIN | flow_flag::BACKEND_CLOSED_FIRST
        }
        Direction::Reply => flow_flag::BACKEND_FIN,
    }
}

/// True for an acknowledgement in `[floor, floor + 2^20)`, modulo 2^32.
#[inline(always)]
pub const fn acknowledges(floor: u32, ack: u32) -> bool {
    ack.wrapping_sub(floor) < ACK_WINDOW
}

/// True where `timeout_seconds` have passed since `last_seen`; both times ns of the same clock.
#[inline(always)]
pub const fn expired(last_seen: u64, timeout_seconds: u32, now: u64) -> bool {
    now.saturating_sub(last_seen) > timeout_seconds as u64 * SECOND
}

/// How long a closed flow's SNAT port rests, seconds, before another client may have it.
#[inline(always)]
pub const fn rest_seconds(protocol: u8, flow_flags: u16, closing_timeout: u32) -> u32 {
    if protocol == TCP && flow_flags & flow_flag::BACKEND_CLOSED_FIRST == 0 && closing_timeout > SHORT_REST_SECONDS {
        SHORT_REST_SECONDS
    } else {
        closing_timeout
    }
}

/// A time in ticks; wraps after 52 days, so compare with [`due`].
#[inline(always)]
pub const fn ticks(now: u64) -> u32 {
    (now >> TICK_SHIFT) as u32
}

/// When a flow touched at `now` is to be touched again, in ticks: after an eighth of its idle timeout, 16 s at
/// most, less up to a quarter of that by `jitter`, so that flows opened together do not stay together.
#[inline(always)]
pub const fn next_touch(now: u64, timeout_seconds: u32, jitter: u32) -> u32 {
    let eighth = ((timeout_seconds as u64 * SECOND) >> TICK_SHIFT >> 3) as u32;
    let longest = ((TOUCH_SECONDS as u64 * SECOND) >> TICK_SHIFT) as u32;
    let interval = if eighth < longest { eighth } else { longest };
    ticks(now).wrapping_add(interval - (interval >> 2) * (jitter & 0xff) / 256)
}

/// True once `now` (ticks) has reached `at` (ticks), across a wrap.
#[inline(always)]
pub const fn due(at: u32, now: u32) -> bool {
    now.wrapping_sub(at) as i32 >= 0
}
