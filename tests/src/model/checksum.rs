//! Checksums (RFC 1071), summed up from scratch, and what one must be after rewriting.

use std::ops::Range;

use super::wire::{ETHERNET, Ip, Segment, UDP, addresses_at, word};

/// The ones'-complement sum (RFC 1071) of parts, each but the last of even length.
pub fn sum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0u64;
    for part in parts {
        for pair in part.chunks(2) {
            sum += u64::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
        }
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// What a checksum must be after rewriting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Check {
    /// Exactly this: the packet came with a right checksum, or a UDP one without.
    Exactly(u16),
    /// It came wrong, and must leave wrong by the same difference: this value, where 0 and 0xffff are the same number.
    /// For UDP not 0, which would say that there is none.
    Wrong(u16),
}

impl Check {
    /// True where the field found in the packet is right.
    pub fn admits(self, found: u16, udp: bool) -> bool {
        match self {
            Self::Exactly(value) => found == value,
            Self::Wrong(value) => found % 0xffff == value % 0xffff && !(udp && found == 0),
        }
    }
}

/// The right value of a checksum field at `at`, all of `parts` being what it covers (the field lies in the last part).
fn right(prefix: &[u8], covered: &[u8], at: usize) -> u16 {
    let mut zeroed = covered.to_vec();
    zeroed[at..at + 2].fill(0);
    !sum(&[prefix, &zeroed])
}

/// The pseudo-header (RFC 9293, 3.1; RFC 8200, 8.1) of `len` bytes of this protocol; the fields of both families' sum up alike.
fn pseudo(frame: &[u8], v6: bool, protocol: u8, len: usize) -> Vec<u8> {
    let place = addresses_at(v6);
    let mut bytes = frame[ETHERNET + place.start..ETHERNET + place.end].to_vec();
    bytes.extend((len as u32).to_be_bytes());
    bytes.extend([0, 0, 0, protocol]);
    bytes
}

fn after(old: u16, old_right: u16, new_right: u16) -> Check {
    if old == old_right {
        Check::Exactly(new_right)
    } else {
        // In arithmetic modulo 0xffff, in which the checksum is a negated sum.
        let value = u32::from(new_right) + u32::from(old) + 0xffff - u32::from(old_right);
        Check::Wrong((value % 0xffff) as u16)
    }
}

/// The checksum that the IPv4 header of `new` must have, given that `old` was rewritten to it; `None` where the header is
/// longer than the frame or shorter than a header.
pub fn of_ipv4(old: &[u8], new: &[u8], header_len: usize) -> Option<Check> {
    let header = ETHERNET..ETHERNET + header_len;
    let (old_ip, new_ip) = (old.get(header.clone())?, new.get(header)?);
    if header_len < 20 {
        return None;
    }
    Some(after(word(old_ip, 10)?, right(&[], old_ip, 10), right(&[], new_ip, 10)))
}

/// The layer-4 checksum that `new` must have, given that `old` was rewritten to it.
pub fn of_segment(old: &[u8], new: &[u8], segment: &Segment) -> Check {
    let end = ETHERNET + segment.ip.total_len;
    let (old_l4, new_l4) = (&old[segment.l4..end], &new[segment.l4..end]);
    let (v6, protocol) = (segment.ip.v6, segment.key.protocol);
    let udp = protocol == UDP;
    let at = offset(udp);
    let found = u16::from_be_bytes([old_l4[at], old_l4[at + 1]]);
    let whole = |frame: &[u8], l4: &[u8]| match right(&pseudo(frame, v6, protocol, l4.len()), l4, at) {
        0 if udp => 0xffff,
        check => check,
    };
    if udp && found == 0 { Check::Exactly(0) } else { after(found, whole(old, old_l4), whole(new, new_l4)) }
}

/// The checksum at `at`, which covers the bytes of `range`, all of which are there.
pub fn recomputed(old: &[u8], new: &[u8], range: Range<usize>, at: usize) -> Check {
    let field = u16::from_be_bytes([old[at], old[at + 1]]);
    let right = |bytes: &[u8]| right(&[], &bytes[range.clone()], at - range.start);
    after(field, right(old), right(new))
}

/// The checksum of an ICMP message, which is the bytes of `range`: ICMPv6's covers the pseudo-header, too (RFC 4443, 2.3).
pub fn of_icmp(old: &[u8], new: &[u8], range: Range<usize>, ip: &Ip) -> Check {
    let at = range.start + 2;
    let field = u16::from_be_bytes([old[at], old[at + 1]]);
    let right = |bytes: &[u8]| {
        let pseudo = if ip.v6 { pseudo(bytes, true, ip.protocol, range.len()) } else { Vec::new() };
        right(&pseudo, &bytes[range.clone()], 2)
    };
    after(field, right(old), right(new))
}

/// The checksum at `at` of what is cut off: it changes by what the bytes of `ranges` change by. A UDP one that says that there
/// is none stays so.
pub fn moved(old: &[u8], new: &[u8], at: usize, udp: bool, ranges: [Range<usize>; 2]) -> Check {
    let field = u16::from_be_bytes([old[at], old[at + 1]]);
    if udp && field == 0 {
        return Check::Exactly(0);
    }
    let [first, second] = ranges;
    let part = |bytes: &[u8]| u32::from(sum(&[&bytes[first.clone()], &bytes[second.clone()]]));
    // Modulo 0xffff, in which the checksum is a negated sum.
    Check::Wrong(((u32::from(field) + part(old) + 0xffff - part(new)) % 0xffff) as u16)
}

/// Where the checksum stands in the layer-4 header.
pub fn offset(udp: bool) -> usize {
    if udp { 6 } else { 16 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_of_rfc_1071_sums_up() {
        assert_eq!(sum(&[&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]]), 0xddf2);
    }

    #[test]
    fn a_wrong_checksum_must_stay_wrong_by_the_same_difference() {
        assert_eq!(after(10, 7, 100), Check::Wrong(103));
        assert!(Check::Wrong(0).admits(0xffff, true) && !Check::Wrong(0).admits(0, true));
        assert_eq!(after(7, 7, 100), Check::Exactly(100));
    }
}
