//! ICMP messages of the edge's own (RFC 792, RFC 1191, RFC 4443): what the sender of a packet is told, from whom, and about what.

use edge_common::address::Wide;

use super::{
    checksum::sum,
    compare::hex,
    icmp::{HEADER, number},
    wire::{self, ETHERNET, addresses_at, plain_header},
};

/// What a message says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// The TTL or hop limit ended here.
    Expired,
    /// Longer than this, from the IP header on, which is what goes on from here; and not to be fragmented.
    TooBig(u32),
}

/// A message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Told {
    /// What it says.
    pub what: What,
    /// The edge's address towards the sender.
    pub own: Wide,
}

impl Told {
    /// Type, code, and the second word.
    fn head(&self, v6: bool) -> (u8, u8, u32) {
        match (self.what, v6) {
            (What::Expired, false) => (11, 0, 0),
            (What::Expired, true) => (3, 0, 0),
            (What::TooBig(mtu), false) => (3, 4, mtu & 0xffff),
            (What::TooBig(mtu), true) => (2, 0, mtu),
        }
    }

    /// Holds a message against what it must be.
    ///
    /// # Errors
    /// What differs.
    pub fn judge(&self, input: &[u8], got: &[u8]) -> Result<(), String> {
        let wrong = |what: &str| format!("{what} of {self:?}\n  packet {}\n  got    {}", hex(input), hex(got));
        let asked = wire::ip(input).ok_or_else(|| wrong("no IP packet was answered"))?;
        let sent = wire::ip(got).ok_or_else(|| wrong("no IP packet"))?;
        let (v6, front) = (asked.v6, ETHERNET + plain_header(asked.v6));
        // At most 576 bytes (RFC 1812, 4.3.2.3), or 1280 (RFC 4443, 2.4 (c)).
        let most = if v6 { 1280 } else { 576 };
        let quoted = asked.total_len.min(most - plain_header(v6) - HEADER) & !3;
        if got.len() != front + HEADER + quoted || sent.total_len != got.len() - ETHERNET {
            return Err(wrong("length"));
        }
        if got[..12] != [&input[6..12], &input[..6]].concat() {
            return Err(wrong("MACs"));
        }
        let ends = (sent.v6, sent.protocol, sent.src, sent.dst, sent.fragment);
        if ends != (v6, number(v6), self.own, asked.src, false) || sent.ttl < 32 {
            return Err(wrong("IP header"));
        }
        if got.get(front + HEADER..) != input.get(ETHERNET..ETHERNET + quoted) {
            return Err(wrong("quote"));
        }
        let word = |at: usize| u32::from_be_bytes([got[at], got[at + 1], got[at + 2], got[at + 3]]);
        if (got[front], got[front + 1], word(front + 4)) != self.head(v6) {
            return Err(wrong("type, code or second word"));
        }
        let mut pseudo = Vec::new();
        if v6 {
            let place = addresses_at(true);
            pseudo.extend(&got[ETHERNET + place.start..ETHERNET + place.end]);
            pseudo.extend(((HEADER + quoted) as u32).to_be_bytes());
            pseudo.extend([0, 0, 0, number(true)]);
        }
        // With its own checksum, all of it sums up to nothing.
        if sum(&[&pseudo, &got[front..]]) != 0xffff {
            return Err(wrong("ICMP checksum"));
        }
        if !v6 && sum(&[&got[ETHERNET..front]]) != 0xffff {
            return Err(wrong("IP checksum"));
        }
        Ok(())
    }
}
