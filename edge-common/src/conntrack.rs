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
//! A client's SYN or datagram on a flow whose idle timeout has passed starts a new flow in every state. Sequence numbers of FIN and RST are
//! not checked: a closing flow still forwards, so that a forged RST costs a flow its place in the established table
//! and not its connection.

use crate::flow::{TCP, UDP};
use crate::maps::flow_flag;

/// Life of a flow, as kept in `Flow::state`.
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

/// Which way an entry's packets go, as kept in `Flow::direction`.
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
        UDP => step_udp(state, direction, flow_flags, expired),
        _ => step_tcp(state, direction, flow_flags, ack_floor, expired, segment),
    }
}

#[inline(always)]
const fn step_udp(state: State, direction: Direction, flow_flags: u16, expired: bool) -> Step {
    match (state, direction) {
        (_, Direction::Forward) if expired => Step::Reopen,
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
            Direction::Forward
                if flags & (SYN | ACK) == ACK
                    && flow_flags & flow_flag::SYN_ACK_SEEN != 0
                    && acknowledges(ack_floor, segment.ack) =>
            {
                return Step::Promote(added);
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

#[cfg(test)]
mod tests {
    use super::tcp_flag::{ACK, FIN, RST, SYN};
    use super::*;
    use proptest::prelude::*;

    fn tcp(flags: u8, seq: u32, ack: u32) -> Segment {
        Segment { protocol: TCP, flags, seq, ack }
    }

    fn udp() -> Segment {
        Segment { protocol: UDP, flags: 0, seq: 0, ack: 0 }
    }

    const STATES: [State; 3] = [State::HalfOpen, State::Established, State::Closing];
    const DIRECTIONS: [Direction; 2] = [Direction::Forward, Direction::Reply];

    #[test]
    fn the_backend_s_syn_ack_tells_what_the_client_must_acknowledge() {
        let segment = tcp(SYN | ACK, u32::MAX, 7);
        assert_eq!(step(State::HalfOpen, Direction::Reply, 0, 0, false, &segment), Step::Expect(0));
        assert_eq!(step(State::HalfOpen, Direction::Forward, 0, 0, false, &segment), Step::Stay);
        assert_eq!(step(State::Established, Direction::Reply, 0, 0, false, &segment), Step::Stay);
    }

    #[test]
    fn the_fin_that_promotes_is_remembered() {
        let segment = tcp(FIN | ACK, 1, 100);
        let flags = flow_flag::SYN_ACK_SEEN;
        let promoted = step(State::HalfOpen, Direction::Forward, flags, 100, false, &segment);
        assert_eq!(promoted, Step::Promote(flow_flag::CLIENT_FIN));
    }

    #[test]
    fn a_second_fin_of_the_same_side_changes_nothing() {
        let segment = tcp(FIN | ACK, 1, 1);
        let flags = flow_flag::CLIENT_FIN;
        assert_eq!(step(State::Established, Direction::Forward, flags, 0, false, &segment), Step::Stay);
    }

    #[test]
    fn only_a_backend_that_was_first_is_marked_as_having_closed_first() {
        let segment = tcp(FIN | ACK, 1, 1);
        let first = step(State::Established, Direction::Reply, 0, 0, false, &segment);
        assert_eq!(first, Step::Flag(flow_flag::BACKEND_FIN | flow_flag::BACKEND_CLOSED_FIRST));
        let second = step(State::Established, Direction::Reply, flow_flag::CLIENT_FIN, 0, false, &segment);
        assert_eq!(second, Step::Close(flow_flag::BACKEND_FIN));
    }

    #[test]
    fn udp_needs_an_answer_before_it_is_established() {
        assert_eq!(step(State::HalfOpen, Direction::Forward, 0, 0, false, &udp()), Step::Stay);
        assert_eq!(step(State::HalfOpen, Direction::Reply, 0, 0, false, &udp()), Step::Flag(flow_flag::REPLIED));
        let answered = flow_flag::REPLIED;
        assert_eq!(step(State::HalfOpen, Direction::Forward, answered, 0, false, &udp()), Step::Promote(0));
        assert_eq!(step(State::Established, Direction::Reply, answered, 0, false, &udp()), Step::Stay);
        assert_eq!(step(State::HalfOpen, Direction::Forward, answered, 0, true, &udp()), Step::Reopen);
    }

    #[test]
    fn a_port_rests_long_only_where_a_time_wait_may_be_left_at_the_backend() {
        assert_eq!(rest_seconds(TCP, flow_flag::BACKEND_CLOSED_FIRST, 60), 60);
        assert_eq!(rest_seconds(TCP, flow_flag::CLIENT_FIN | flow_flag::BACKEND_FIN, 60), 2);
        assert_eq!(rest_seconds(TCP, 0, 1), 1);
        assert_eq!(rest_seconds(UDP, 0, 60), 60);
    }

    proptest! {
        #[test]
        fn only_an_acknowledgement_in_the_window_promotes(floor in any::<u32>(), ack in any::<u32>(), near in 0u32..1 << 21) {
            for ack in [ack, floor.wrapping_add(near)] {
                let promoted =
                    step(State::HalfOpen, Direction::Forward, flow_flag::SYN_ACK_SEEN, floor, false, &tcp(ACK, 0, ack));
                let inside = u64::from(ack.wrapping_sub(floor)) < 1 << 20;
                prop_assert_eq!(promoted == Step::Promote(0), inside);
                let blind = step(State::HalfOpen, Direction::Forward, 0, floor, false, &tcp(ACK, 0, ack));
                prop_assert_eq!(blind, Step::Stay);
            }
        }

        #[test]
        fn no_packet_reopens_a_flow_but_the_client_s_syn(
            flags in any::<u8>(), seq in any::<u32>(), ack in any::<u32>(), flow_flags in 0u16..32, expired in any::<bool>(),
        ) {
            for state in STATES {
                for direction in DIRECTIONS {
                    let next = step(state, direction, flow_flags, 0, expired, &tcp(flags, seq, ack));
                    let syn = direction == Direction::Forward && flags & (SYN | ACK | RST | FIN) == SYN;
                    let past = expired || state == State::Closing;
                    prop_assert_eq!(next == Step::Reopen, syn && past);
                }
            }
        }

        #[test]
        fn a_reset_closes_every_open_flow_and_nothing_leaves_closing_but_by_a_syn(
            flags in any::<u8>(), flow_flags in 0u16..32, seq in any::<u32>(),
        ) {
            for direction in DIRECTIONS {
                for state in [State::HalfOpen, State::Established] {
                    let next = step(state, direction, flow_flags, 0, false, &tcp(flags | RST, seq, 0));
                    prop_assert_eq!(next, Step::Close(0));
                }
                let next = step(State::Closing, direction, flow_flags, 0, false, &tcp(flags | ACK, seq, 0));
                prop_assert_eq!(next, Step::Stay);
            }
        }

        #[test]
        fn a_touch_comes_before_an_eighth_of_the_timeout_and_within_sixteen_seconds(
            now in 0u64..1 << 60, timeout in 8u32..1_000_000, jitter in any::<u32>(),
        ) {
            let wait = next_touch(now, timeout, jitter).wrapping_sub(ticks(now));
            let nanoseconds = u64::from(wait) << TICK_SHIFT;
            prop_assert!(nanoseconds <= u64::from(timeout) * SECOND / 8 && nanoseconds <= 16 * SECOND);
            prop_assert!(wait >= 1 && (wait as u64) << TICK_SHIFT >= SECOND / 2);
        }

        #[test]
        fn due_holds_across_the_wrap_of_the_clock(at in any::<u32>(), later in 0u32..1 << 31) {
            prop_assert!(due(at, at.wrapping_add(later)));
            prop_assert!(later == 0 || !due(at.wrapping_add(later), at));
        }

        #[test]
        fn expiry_needs_the_whole_timeout(seen in 0u64..1 << 62, timeout in 0u32..1 << 20, past in 1u64..1 << 40) {
            let end = seen + u64::from(timeout) * SECOND;
            prop_assert!(!expired(seen, timeout, end) && expired(seen, timeout, end + past));
            // A coarse clock may step back between CPUs.
            prop_assert!(!expired(seen, timeout, seen.saturating_sub(past)));
        }
    }
}
