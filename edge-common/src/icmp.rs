//! ICMP as far as it concerns flows: which messages are errors, how much of a packet is quoted, how often one is sent.

/// IP protocol number of ICMP.
pub const ICMP: u8 = 1;
/// IP protocol number of ICMPv6.
pub const ICMPV6: u8 = 58;
/// Bytes of an ICMP or ICMPv6 header.
pub const HEADER: usize = 8;

/// Type numbers (RFC 792).
pub mod kind {
    /// Destination unreachable.
    pub const UNREACHABLE: u8 = 3;
    /// Time exceeded.
    pub const TIME_EXCEEDED: u8 = 11;
    /// Parameter problem.
    pub const PARAMETER_PROBLEM: u8 = 12;
}

/// Type numbers of ICMPv6 (RFC 4443).
pub mod kind_v6 {
    /// Destination unreachable.
    pub const UNREACHABLE: u8 = 1;
    /// Packet too big; the MTU is all of the second word.
    pub const TOO_BIG: u8 = 2;
    /// Time exceeded.
    pub const TIME_EXCEEDED: u8 = 3;
    /// Parameter problem.
    pub const PARAMETER_PROBLEM: u8 = 4;
}

/// Code of [`kind::UNREACHABLE`]: fragmentation needed (RFC 1191).
pub const FRAGMENTATION_NEEDED: u8 = 4;

/// True for a message about a packet, which it quotes (RFC 792). Source quench is deprecated (RFC 6633), and a redirect is
/// for the host that gets it.
#[inline(always)]
pub const fn is_error(kind: u8) -> bool {
    matches!(kind, kind::UNREACHABLE | kind::TIME_EXCEEDED | kind::PARAMETER_PROBLEM)
}

/// As [`is_error`], of ICMPv6 (RFC 4443). Types below 128 that are not assigned are left to the stack, as are ping and
/// neighbour discovery above it.
#[inline(always)]
pub const fn is_error_v6(kind: u8) -> bool {
    matches!(kind, kind_v6::UNREACHABLE | kind_v6::TOO_BIG | kind_v6::TIME_EXCEEDED | kind_v6::PARAMETER_PROBLEM)
}

/// Most bytes of a packet that are quoted: the message is to have at most 576 (RFC 1812, 4.3.2.3).
pub const QUOTE: usize = 576 - 20 - HEADER;
/// As [`QUOTE`], of an IPv6 packet: as much as fits the smallest MTU that IPv6 allows (RFC 4443, 2.4 (c)).
pub const QUOTE_V6: usize = 1280 - 40 - HEADER;

/// How much of a packet of `total_len` bytes is quoted: whole 32-bit words, so that a message's length is even.
#[inline(always)]
pub const fn quote_len(total_len: usize, most: usize) -> usize {
    (if total_len < most { total_len } else { most }) & !3
}

/// Nanoseconds between two messages at the full rate, for each CPU: 1000 a second.
pub const INTERVAL: u64 = 1_000_000;
/// Messages that a CPU may send at once.
pub const BURST: u64 = 64;

/// Whether a message may be sent at `now`: what `due` becomes, or `None`. `due` is when the next one would be sent at the
/// full rate (the generic cell rate algorithm, a token bucket in one number). Nanoseconds.
#[inline(always)]
pub const fn paced(due: u64, now: u64) -> Option<u64> {
    let due = if due < now { now } else { due };
    if due - now > (BURST - 1) * INTERVAL { None } else { Some(due + INTERVAL) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_let_through_then_the_rate() {
        let send = |due: &mut u64, now| paced(*due, now).map(|next| *due = next).is_some();
        let (mut due, now) = (0, 5_000_000_000);
        assert_eq!((0..1000).filter(|_| send(&mut due, now)).count() as u64, BURST);
        assert!(!send(&mut due, now + INTERVAL - 1));
        assert!(send(&mut due, now + INTERVAL));
        assert!(!send(&mut due, now + INTERVAL));
        assert_eq!((0..1000).filter(|i| send(&mut due, now + INTERVAL * (2 + i))).count(), 1000);
        assert_eq!((0..1000).filter(|_| send(&mut due, now * 2)).count() as u64, BURST);
    }

    #[test]
    fn a_quote_has_the_header_and_eight_bytes_at_least() {
        assert_eq!([28, 29, 31, 547, 548, 1500].map(|len| quote_len(len, QUOTE)), [28, 28, 28, 544, 548, 548]);
        assert_eq!([48, 1231, 1232, 1500].map(|len| quote_len(len, QUOTE_V6)), [48, 1228, 1232, 1232]);
    }
}
