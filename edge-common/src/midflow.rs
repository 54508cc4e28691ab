//! Packets in the middle of a connection that this edge does not know: what they are answered with, and how often a flow seen
//! from one side only may enter the established table.

use crate::conntrack::tcp_flag::{ACK, FIN, RST, SYN};

/// Nobody is told that a connection is unknown for so long after the program was attached, or after another edge was lost:
/// its packets may yet find the edge that knows it.
pub const QUIET_SECONDS: u64 = 30;
/// Flows seen from one side that a CPU promotes in a second, and at once. An edge that takes another's flows over gets
/// through a million of them within minutes; until then they are forwarded as half-open ones.
pub const PROMOTIONS: u32 = 4000;

/// A RST that answers a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reset {
    /// Sequence number, host order.
    pub seq: u32,
    /// Acknowledgement number, host order.
    pub ack: u32,
    /// TCP flags.
    pub flags: u8,
}

/// The RST that a closed port sends (RFC 9293, 3.10.7.1): the receiver takes it, since it answers what it sent.
/// `payload` bytes of data; sequence numbers in host order.
#[inline(always)]
pub const fn reset(flags: u8, seq: u32, ack: u32, payload: u32) -> Reset {
    if flags & ACK != 0 {
        return Reset { seq: ack, ack: 0, flags: RST };
    }
    let length = payload + (flags & SYN != 0) as u32 + (flags & FIN != 0) as u32;
    Reset { seq: 0, ack: seq.wrapping_add(length), flags: RST | ACK }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reset_answers_with_what_the_segment_acknowledged_or_with_what_it_took() {
        assert_eq!(reset(ACK, 7, 9, 100), Reset { seq: 9, ack: 0, flags: RST });
        assert_eq!(reset(FIN, u32::MAX, 9, 1), Reset { seq: 0, ack: 1, flags: RST | ACK });
        assert_eq!(reset(0, 7, 9, 0), Reset { seq: 0, ack: 7, flags: RST | ACK });
    }
}
