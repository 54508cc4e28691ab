//! What the program reports: records of ended flows through a ring buffer, and per-backend signals of how well its
//! connections go.

use super::{Flow, flow_flag};
use crate::{address::Address, conntrack::Direction, verdict::Reason};

/// Bytes of the events ring buffer; a power of two of pages. Room for some 26,000 records, a quarter of a second of ends at
/// 100,000 a second.
pub const EVENTS_BYTES: u32 = 4 << 20;

/// Kinds of a record, in its first byte.
pub mod event {
    /// [`super::FlowEnd`].
    pub const FLOW_END: u8 = 1;
    /// [`super::DropSample`].
    pub const DROP: u8 = 2;
}

/// How a flow ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum End {
    /// Both sides sent FIN.
    Fin = 1,
    /// The client sent RST.
    ClientReset = 2,
    /// The backend sent RST.
    BackendReset = 3,
    /// Neither side sent anything for the idle timeout.
    Idle = 4,
    /// It was taken out on the operator's order.
    Killed = 5,
    /// The backend answered the client's SYN with RST.
    Refused = 6,
}

impl End {
    /// The end of this number.
    pub const fn from_number(number: u8) -> Option<Self> {
        Some(match number {
            1 => Self::Fin,
            2 => Self::ClientReset,
            3 => Self::BackendReset,
            4 => Self::Idle,
            5 => Self::Killed,
            6 => Self::Refused,
            _ => return None,
        })
    }

    /// The name users see.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Fin => "fin",
            Self::ClientReset => "client-rst",
            Self::BackendReset => "backend-rst",
            Self::Idle => "idle",
            Self::Killed => "killed",
            Self::Refused => "refused",
        }
    }

    /// The end of a TCP flow that is closed by a packet in `direction`, `reset` where it carries RST; `answered` where
    /// the backend had accepted the connection.
    #[inline(always)]
    pub const fn of(direction: Direction, reset: bool, answered: bool) -> Self {
        match (reset, direction) {
            (false, _) => Self::Fin,
            (true, Direction::Forward) => Self::ClientReset,
            (true, Direction::Reply) if answered => Self::BackendReset,
            (true, Direction::Reply) => Self::Refused,
        }
    }
}

/// A flow that has ended. Addresses are 16 bytes in network order, IPv4 as `::ffff:a.b.c.d`; ports in network order.
/// 152 bytes, alignment 8.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlowEnd {
    /// [`event::FLOW_END`].
    pub kind: u8,
    /// An [`End`] number.
    pub end: u8,
    /// IP protocol number.
    pub protocol: u8,
    /// Zero.
    pub _pad: [u8; 5],
    /// Service number.
    pub service: u32,
    /// Backend number.
    pub backend: u32,
    /// The client.
    pub client: [u32; 4],
    /// The address it connected to.
    pub vip: [u32; 4],
    /// The address the backend saw.
    pub source: [u32; 4],
    /// The backend.
    pub target: [u32; 4],
    /// The client's port.
    pub client_port: u16,
    /// The port it connected to.
    pub vip_port: u16,
    /// The port the backend saw.
    pub source_port: u16,
    /// The backend's port.
    pub target_port: u16,
    /// Packets from the client.
    pub packets_in: u64,
    /// Bytes from the client, from the IP header on.
    pub bytes_in: u64,
    /// Packets to the client.
    pub packets_out: u64,
    /// Bytes to the client, from the IP header on.
    pub bytes_out: u64,
    /// When it began, ns of CLOCK_MONOTONIC.
    pub created: u64,
    /// When it ended, ns of CLOCK_MONOTONIC; for an idle flow its last packet.
    pub ended: u64,
    /// The backend's last packet, ns of CLOCK_MONOTONIC; up to 16 s late where only the client still sent.
    pub last_reply: u64,
    /// Microseconds from the start to the backend's SYN-ACK or first datagram; 0: none.
    pub answered_after: u32,
    /// Microseconds from the start to the backend's first byte of payload; 0: none.
    pub first_byte_after: u32,
}

impl FlowEnd {
    /// Writes who talked to whom, from the half of the client's packets.
    #[inline(always)]
    pub fn describe<A: Address>(&mut self, forward: &Flow<A>) {
        self.kind = event::FLOW_END;
        self.protocol = forward.key.protocol;
        self.service = forward.service;
        self.backend = forward.backend;
        self.client = forward.key.src.wide();
        self.vip = forward.key.dst.wide();
        self.source = forward.new_src.wide();
        self.target = forward.new_dst.wide();
        self.client_port = forward.key.src_port;
        self.vip_port = forward.key.dst_port;
        self.source_port = forward.new_src_port;
        self.target_port = forward.new_dst_port;
        self.created = forward.created;
    }

    /// As [`FlowEnd::describe`], from the backend's half.
    #[inline(always)]
    pub fn describe_reversed<A: Address>(&mut self, reply: &Flow<A>) {
        self.kind = event::FLOW_END;
        self.protocol = reply.key.protocol;
        self.service = reply.service;
        self.backend = reply.backend;
        self.client = reply.new_dst.wide();
        self.vip = reply.new_src.wide();
        self.source = reply.key.dst.wide();
        self.target = reply.key.src.wide();
        self.client_port = reply.new_dst_port;
        self.vip_port = reply.new_src_port;
        self.source_port = reply.key.dst_port;
        self.target_port = reply.key.src_port;
        self.created = reply.created;
    }

    /// Adds what only one of the halves counts.
    #[inline(always)]
    pub const fn count<A: Address>(&mut self, half: &Flow<A>) {
        if half.direction == Direction::Forward as u8 {
            self.packets_in += half.packets;
            self.bytes_in += half.bytes;
        } else {
            self.packets_out += half.packets;
            self.bytes_out += half.bytes;
            self.last_reply = half.last_seen;
            self.answered_after = half.answered_after;
            self.first_byte_after = half.first_byte_after;
        }
    }

    /// Adds the packet of `bytes` that ended the flow.
    #[inline(always)]
    pub const fn count_last(&mut self, direction: Direction, bytes: u64, now: u64) {
        match direction {
            Direction::Forward => {
                self.packets_in += 1;
                self.bytes_in += bytes;
            }
            Direction::Reply => {
                self.packets_out += 1;
                self.bytes_out += bytes;
                self.last_reply = now;
            }
        }
    }
}

/// A dropped packet, one of many. 56 bytes, alignment 8.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DropSample {
    /// [`event::DROP`].
    pub kind: u8,
    /// [`Reason`] number.
    pub reason: u8,
    /// IP protocol number.
    pub protocol: u8,
    /// TCP flags.
    pub flags: u8,
    /// Service number; 0: none.
    pub service: u32,
    /// Source, as in [`FlowEnd`].
    pub source: [u32; 4],
    /// Destination.
    pub destination: [u32; 4],
    /// Source port, network order.
    pub source_port: u16,
    /// Destination port, network order.
    pub destination_port: u16,
    /// Bytes from the IP header on.
    pub length: u32,
    /// ns of CLOCK_MONOTONIC.
    pub time: u64,
}

/// Drops of each reason that one CPU reports at once; then one in each [`SAMPLE_EVERY`].
pub const SAMPLE_FIRST: u64 = 16;
/// See [`SAMPLE_FIRST`]; a power of two.
pub const SAMPLE_EVERY: u64 = 1024;

/// True where the drop that made a counter `count` is one to report.
#[inline(always)]
pub const fn is_sampled(count: u64) -> bool {
    count <= SAMPLE_FIRST || count & (SAMPLE_EVERY - 1) == 0
}

/// Per-CPU signals of a backend's health, as seen in its connections. 64 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BackendSignals {
    /// Connections whose SYN the client had to repeat because nothing came back, each counted once.
    pub unanswered: u64,
    /// Connections that the backend refused (RST to the SYN).
    pub refused: u64,
    /// Connections that the backend reset before it had sent any payload.
    pub reset_early: u64,
    /// Connections and UDP flows that the backend answered.
    pub answered: u64,
    /// Sum of their times from the client's first packet to the answer, microseconds.
    pub answered_us: u64,
    /// Flows with payload from the backend.
    pub first_bytes: u64,
    /// Sum of their times from the client's first packet to that payload, microseconds.
    pub first_byte_us: u64,
    /// Monotonic time of the latest failure (unanswered, refused or reset early), ns; 0: none.
    pub last_failure: u64,
}

impl BackendSignals {
    /// Both together; the latest of both times.
    #[must_use]
    pub const fn plus(self, other: Self) -> Self {
        let later = if self.last_failure > other.last_failure { self.last_failure } else { other.last_failure };
        Self {
            unanswered: self.unanswered.wrapping_add(other.unanswered),
            refused: self.refused.wrapping_add(other.refused),
            reset_early: self.reset_early.wrapping_add(other.reset_early),
            answered: self.answered.wrapping_add(other.answered),
            answered_us: self.answered_us.wrapping_add(other.answered_us),
            first_bytes: self.first_bytes.wrapping_add(other.first_bytes),
            first_byte_us: self.first_byte_us.wrapping_add(other.first_byte_us),
            last_failure: later,
        }
    }
}

/// Microseconds from `created` to `now` as a field of a flow: at least 1, since 0 means "not yet"; at most 71 minutes.
#[inline(always)]
pub const fn micros_since(created: u64, now: u64) -> u32 {
    let micros = now.saturating_sub(created) / 1000;
    match micros {
        0 => 1,
        _ if micros > u32::MAX as u64 => u32::MAX,
        _ => micros as u32,
    }
}

/// True where a client's repeated SYN shows for the first time that the backend has not answered.
#[inline(always)]
pub const fn shows_silence<A: Address>(flow: &Flow<A>) -> bool {
    flow.flags & (flow_flag::SYN_ACK_SEEN | flow_flag::UNANSWERED) == 0
}

const _: () = {
    assert!(size_of::<FlowEnd>() == 152 && align_of::<FlowEnd>() == 8);
    assert!(size_of::<DropSample>() == 56 && align_of::<DropSample>() == 8);
    assert!(size_of::<BackendSignals>() == 64);
    assert!(Reason::NoSnatAddress as u32 <= u8::MAX as u32);
};

#[cfg(feature = "user")]
mod pod {
    #![allow(unsafe_code, reason = "aya::Pod is an unsafe marker; this is the one place that asserts it")]
    use super::*;
    // SAFETY: repr(C), integers only, explicit padding (asserted above), Copy and 'static.
    unsafe impl aya::Pod for FlowEnd {}
    // SAFETY: as above.
    unsafe impl aya::Pod for DropSample {}
    // SAFETY: as above.
    unsafe impl aya::Pod for BackendSignals {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::maps::FlowV4;

    #[test]
    fn a_record_is_the_sum_of_both_halves_and_the_last_packet() {
        let forward = FlowV4 { packets: 3, bytes: 300, created: 5, ..FlowV4::default() };
        let reply = FlowV4 {
            packets: 2,
            bytes: 200,
            direction: Direction::Reply as u8,
            last_seen: 9,
            first_byte_after: 7,
            ..FlowV4::default()
        };
        let mut record = FlowEnd::default();
        record.describe(&forward);
        record.count(&forward);
        record.count(&reply);
        record.count_last(Direction::Reply, 40, 11);
        assert_eq!((record.packets_in, record.bytes_in), (3, 300));
        assert_eq!((record.packets_out, record.bytes_out, record.last_reply), (3, 240, 11));
        assert_eq!((record.created, record.first_byte_after), (5, 7));
    }

    #[test]
    fn a_reset_is_told_by_its_sender_and_one_before_any_answer_is_a_refusal() {
        assert_eq!(End::of(Direction::Forward, true, true), End::ClientReset);
        assert_eq!(End::of(Direction::Reply, true, true), End::BackendReset);
        assert_eq!(End::of(Direction::Reply, true, false), End::Refused);
        assert_eq!(End::of(Direction::Reply, false, true), End::Fin);
    }

    #[test]
    fn the_first_drops_are_all_sampled_and_then_one_in_a_thousand() {
        assert!((1..=SAMPLE_FIRST).all(is_sampled));
        assert_eq!((SAMPLE_FIRST + 1..=4 * SAMPLE_EVERY).filter(|count| is_sampled(*count)).count(), 4);
    }

    #[test]
    fn a_time_of_zero_never_looks_like_none() {
        assert_eq!(micros_since(10, 10), 1);
        assert_eq!(micros_since(0, 5_000_000), 5000);
        assert_eq!(micros_since(0, u64::MAX), u32::MAX);
    }
}
