//! Connection tracking: the pure transitions of a flow, and its clocks.
//!
//! | state | packet | becomes |
//! |---|---|---|
//! | half-open | backend's SYN-ACK | half-open, the client's half remembers what must be acknowledged (latest wins) |
//! | half-open | client's ACK of it, within 2^20 | established |
//! | half-open | client's SYN again, backend silent | half-open; from [`RETRIES`] on a new flow, to another backend |
//! | half-open | client's SYN again after a SYN-ACK, ACK of anything else, data without ACK | half-open |
//! | half-open, crossing | client's ACK, no SYN-ACK seen | half-open, remembered |
//! | half-open, crossing | client's ACK, in the window of the one remembered | established, if the quota has room |
//! | half-open, adopted | backend's ACK | established, if the quota has room, else the client must acknowledge it |
//! | half-open | backend's datagram | half-open, answered; of a one-reply service closing |
//! | half-open | client's datagram after an answer | established |
//! | half-open, established | RST from either side, or the second FIN | closing |
//! | half-open, established | first FIN | unchanged, remembered; who closed first decides how long the port rests |
//! | established | SYN, data, ACK, datagram | established |
//! | closing | client's SYN, client's datagram | a new flow |
//! | closing by RST, was established | anything but SYN and RST, from the side that the RST was said to be from | established |
//! | closing | anything else | closing |
//!
//! A client's SYN or datagram on a flow whose idle timeout has passed starts a new flow in every state. Sequence numbers of FIN and RST are
//! not checked: a closing flow still forwards, and whoever sent a RST sends nothing else afterwards (RFC 9293, 3.10.7), so that
//! a side that goes on shows that its RST was forged. A forged RST thus shortens a flow's timeout until its next packet.
//!
//! *Crossing*: of a dnat service, whose replies may come by another edge. *Adopted*: begun in mid-flow.

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
/// A client's repeated SYN, by its number from 1, that gets another backend where the one before has said nothing. The first
/// one may have been lost on its way.
pub const RETRIES: u32 = 2;
/// As [`RETRIES`], of a crossing flow, whose SYN-ACK may have gone by another edge: 15 s after the first SYN.
pub const RETRIES_CROSSING: u32 = 4;
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
    /// The client has repeated its SYN so often, and nobody has answered.
    Repeat(u32),
    /// Start a new flow for this SYN, at another backend.
    Elsewhere,
    /// Remember this acknowledgement of the client's, and set these bits on both halves.
    Note(u32, u16),
    /// As [`Step::Promote`] if the quota of flows seen from one side has room, else as [`Step::Note`] of the packet's
    /// acknowledgement, or as [`Step::Expect`] of what a backend's packet says.
    PromoteOneSided(u16),
    /// From the closing to the established table: the RST was forged.
    Restore,
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
        (State::Closing, Direction::Forward) => Step::Reopen,
        (State::HalfOpen, Direction::Reply) if flow_flags & flow_flag::ONE_REPLY != 0 => {
            Step::Close(flow_flag::REPLIED)
        }
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
        return match state {
            _ if expired => Step::Reopen,
            State::Closing => Step::Reopen,
            State::HalfOpen => step_repeated_syn(flow_flags, ack_floor),
            State::Established => Step::Stay,
        };
    }
    if matches!(state, State::Closing) {
        let forged = flags & (SYN | RST) == 0 && flow_flags & reset_flag(direction) != 0;
        return if forged { Step::Restore } else { Step::Stay };
    }
    if flags & RST != 0 {
        return Step::Close(if matches!(state, State::Established) { reset_flag(direction) } else { 0 });
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
            Direction::Forward if flags & (SYN | ACK) == ACK && one_sided(flow_flags) => {
                let second = flow_flags & flow_flag::CLIENT_ACKED != 0 && acknowledges(ack_floor, segment.ack);
                return if second { Step::PromoteOneSided(added) } else { Step::Note(segment.ack, added) };
            }
            Direction::Reply if flags & (SYN | ACK) == ACK && flow_flags & flow_flag::ADOPTED != 0 => {
                return Step::PromoteOneSided(added);
            }
            _ => {}
        }
    }
    if added & !flow_flags != 0 { Step::Flag(added) } else { Step::Stay }
}

/// A crossing flow of which this edge has seen no SYN-ACK.
#[inline(always)]
const fn one_sided(flow_flags: u16) -> bool {
    flow_flags & (flow_flag::CROSSING | flow_flag::SYN_ACK_SEEN) == flow_flag::CROSSING
}

/// `ack_floor` counts the repetitions until there is something to acknowledge.
#[inline(always)]
const fn step_repeated_syn(flow_flags: u16, ack_floor: u32) -> Step {
    if flow_flags & (flow_flag::SYN_ACK_SEEN | flow_flag::CLIENT_ACKED) != 0 {
        return Step::Stay;
    }
    let times = ack_floor.wrapping_add(1);
    let patience = if flow_flags & flow_flag::CROSSING == 0 { RETRIES } else { RETRIES_CROSSING };
    if times >= patience { Step::Elsewhere } else { Step::Repeat(times) }
}

/// The mark of a RST of an established flow from this side.
#[inline(always)]
const fn reset_flag(direction: Direction) -> u16 {
    match direction {
        Direction::Forward => flow_flag::RESET_BY_CLIENT,
        Direction::Reply => flow_flag::RESET_BY_BACKEND,
    }
}

/// What the client of an adopted flow must acknowledge at least where this backend's packet was seen: what is under way may
/// be half the window behind it or ahead.
#[inline(always)]
pub const fn floor_of(segment: &Segment) -> u32 {
    segment.seq.wrapping_sub(ACK_WINDOW / 2)
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
    let over = if protocol == TCP {
        // A reset may have been forged, and its flow come back.
        flow_flags & (flow_flag::BACKEND_CLOSED_FIRST | flow_flag::RESET) == 0
    } else {
        flow_flags & flow_flag::ONE_REPLY != 0
    };
    if over && closing_timeout > SHORT_REST_SECONDS { SHORT_REST_SECONDS } else { closing_timeout }
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
        assert_eq!(rest_seconds(UDP, flow_flag::ONE_REPLY, 60), 2);
        assert_eq!(rest_seconds(TCP, flow_flag::RESET_BY_BACKEND, 60), 60);
    }

    #[test]
    fn a_repeated_syn_that_nobody_answers_goes_elsewhere_the_second_time() {
        let half_open = |flags, times| step(State::HalfOpen, Direction::Forward, flags, times, false, &tcp(SYN, 1, 0));
        assert_eq!((half_open(0, 0), half_open(0, 1)), (Step::Repeat(1), Step::Elsewhere));
        assert_eq!(half_open(flow_flag::CROSSING, 1), Step::Repeat(2));
        assert_eq!(half_open(flow_flag::CROSSING, 3), Step::Elsewhere);
        assert_eq!(half_open(flow_flag::SYN_ACK_SEEN, 1), Step::Stay, "the number is an acknowledgement");
        assert_eq!(half_open(flow_flag::CROSSING | flow_flag::CLIENT_ACKED, 1), Step::Stay);
    }

    #[test]
    fn a_reset_is_taken_back_by_the_side_that_it_was_said_to_be_from_and_by_nothing_else() {
        for (side, other) in [(Direction::Forward, Direction::Reply), (Direction::Reply, Direction::Forward)] {
            let Step::Close(mark) = step(State::Established, side, 0, 0, false, &tcp(RST, 1, 0)) else {
                panic!("a reset closes");
            };
            let closing = |direction, flags| step(State::Closing, direction, mark, 0, false, &tcp(flags, 2, 2));
            assert_eq!(closing(side, ACK), Step::Restore);
            assert_eq!(closing(other, ACK), Step::Stay, "what was under way when the reset came");
            assert_eq!(
                (closing(side, RST), closing(side, RST | ACK), closing(side, SYN | ACK)),
                (Step::Stay, Step::Stay, Step::Stay)
            );
        }
        let refused = step(State::HalfOpen, Direction::Reply, 0, 0, false, &tcp(RST | ACK, 0, 1));
        assert_eq!(refused, Step::Close(0), "a flow that never was established does not become so");
    }

    #[test]
    fn a_flow_seen_from_the_client_s_side_only_needs_two_acknowledgements_that_agree() {
        let client =
            |flags, floor, ack| step(State::HalfOpen, Direction::Forward, flags, floor, false, &tcp(ACK, 1, ack));
        let (crossing, noted) = (flow_flag::CROSSING, flow_flag::CROSSING | flow_flag::CLIENT_ACKED);
        assert_eq!(client(crossing, 0, 100), Step::Note(100, 0));
        assert_eq!(client(noted, 100, 100), Step::PromoteOneSided(0));
        assert_eq!(client(noted, 100, 99), Step::Note(99, 0));
        assert_eq!(client(noted, 100, 100 + ACK_WINDOW), Step::Note(100 + ACK_WINDOW, 0));
        assert_eq!(client(0, 100, 100), Step::Stay, "the replies of a full-nat flow come by this edge");
        assert_eq!(client(crossing | flow_flag::SYN_ACK_SEEN, 100, 99), Step::Stay);
    }

    #[test]
    fn a_backend_s_acknowledgement_promotes_an_adopted_flow_only() {
        let reply = |flags, bits| step(State::HalfOpen, Direction::Reply, flags, 0, false, &tcp(bits, 1, 1));
        let adopted = flow_flag::CROSSING | flow_flag::ADOPTED;
        assert_eq!(reply(adopted, ACK), Step::PromoteOneSided(0));
        assert_eq!(reply(flow_flag::CROSSING, ACK), Step::Stay);
        assert_eq!(reply(adopted, SYN | ACK), Step::Expect(2));
        assert_eq!(reply(adopted, RST | ACK), Step::Close(0));
    }

    #[test]
    fn a_one_reply_flow_ends_with_its_reply_and_the_next_datagram_starts_another() {
        let one = flow_flag::ONE_REPLY;
        assert_eq!(step(State::HalfOpen, Direction::Forward, one, 0, false, &udp()), Step::Stay);
        assert_eq!(step(State::HalfOpen, Direction::Reply, one, 0, false, &udp()), Step::Close(flow_flag::REPLIED));
        assert_eq!(step(State::Closing, Direction::Forward, one, 0, false, &udp()), Step::Reopen);
        assert_eq!(step(State::Closing, Direction::Reply, one, 0, false, &udp()), Step::Stay);
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
                    let mark = if state == State::Established { reset_flag(direction) } else { 0 };
                    prop_assert_eq!(next, Step::Close(mark));
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
