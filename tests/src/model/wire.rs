//! Packets as the RFCs describe them: headers read from bytes, checksums summed up from scratch.

use std::ops::Range;

use edge_common::flow::FlowKeyV4;

/// Bytes of an Ethernet header.
pub const ETHERNET: usize = 14;
/// TCP's IP protocol number (RFC 9293).
pub const TCP: u8 = 6;
/// UDP's IP protocol number (RFC 768).
pub const UDP: u8 = 17;

/// An IPv4 header (RFC 791), as far as it was sent.
#[derive(Clone, Copy, Debug)]
pub struct Ip {
    /// Source, in the packet's byte order.
    pub src: u32,
    /// Destination, in the packet's byte order.
    pub dst: u32,
    /// Header length, bytes.
    pub header_len: usize,
    /// Length from the IP header on.
    pub total_len: usize,
    /// IP protocol number.
    pub protocol: u8,
    /// Time to live.
    pub ttl: u8,
    /// "Don't fragment".
    pub dont_fragment: bool,
    /// Part of a fragmented packet.
    pub fragment: bool,
    /// Part of a fragmented packet, without its beginning.
    pub later_fragment: bool,
    /// Identification.
    pub id: u16,
}

/// A TCP or UDP packet.
#[derive(Clone, Copy, Debug)]
pub struct Segment {
    /// Its IP header.
    pub ip: Ip,
    /// Its tuple.
    pub key: FlowKeyV4,
    /// Offset of the layer-4 header in the frame.
    pub l4: usize,
    /// Bytes of IP and layer-4 headers.
    pub headers: usize,
    /// TCP flags; 0 for UDP.
    pub flags: u8,
    /// TCP sequence number.
    pub seq: u32,
    /// TCP acknowledgement number.
    pub ack: u32,
}

/// A big-endian 16-bit word.
pub fn word(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn long(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn as_sent(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// The IPv4 header of a frame; `None` for what is no IPv4 or has no whole header.
pub fn ipv4(frame: &[u8]) -> Option<Ip> {
    let ip = frame.get(ETHERNET..)?;
    if word(frame, 12)? != 0x0800 || ip.len() < 20 || ip[0] >> 4 != 4 {
        return None;
    }
    let fragment = word(ip, 6)?;
    Some(Ip {
        src: as_sent(ip, 12)?,
        dst: as_sent(ip, 16)?,
        header_len: usize::from(ip[0] & 15) * 4,
        total_len: usize::from(word(ip, 2)?),
        protocol: ip[9],
        ttl: ip[8],
        dont_fragment: fragment & 0x4000 != 0,
        fragment: fragment & 0x3fff != 0,
        later_fragment: fragment & 0x1fff != 0,
        id: word(ip, 4)?,
    })
}

/// The layer-4 header; `None` where lengths contradict each other or the frame.
pub fn segment(frame: &[u8], ip: Ip) -> Option<Segment> {
    if ip.header_len < 20 || ip.total_len < ip.header_len || ETHERNET + ip.total_len > frame.len() {
        return None;
    }
    let l4 = ETHERNET + ip.header_len;
    let header = frame.get(l4..)?;
    let tcp = ip.protocol == TCP;
    let l4_len = match tcp {
        true if header.len() < 20 => return None,
        true => usize::from(header[12] >> 4) * 4,
        false => 8,
    };
    if l4_len < if tcp { 20 } else { 8 } || header.len() < 8 || ip.header_len + l4_len > ip.total_len {
        return None;
    }
    let port = |at: usize| word(header, at).map(u16::to_be);
    Some(Segment {
        ip,
        key: FlowKeyV4 {
            src: ip.src,
            dst: ip.dst,
            src_port: port(0)?,
            dst_port: port(2)?,
            protocol: ip.protocol,
            _pad: [0; 3],
        },
        l4,
        headers: ip.header_len + l4_len,
        flags: if tcp { header[13] } else { 0 },
        seq: if tcp { long(header, 4)? } else { 0 },
        ack: if tcp { long(header, 8)? } else { 0 },
    })
}

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

fn pseudo(ip: &[u8], l4_len: usize) -> [u8; 12] {
    let mut bytes = [0; 12];
    bytes[..8].copy_from_slice(&ip[12..20]);
    bytes[9] = ip[9];
    bytes[10..].copy_from_slice(&(l4_len as u16).to_be_bytes());
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
pub fn ip_check(old: &[u8], new: &[u8], header_len: usize) -> Option<Check> {
    let header = ETHERNET..ETHERNET + header_len;
    let (old_ip, new_ip) = (old.get(header.clone())?, new.get(header)?);
    Some(after(word(old_ip, 10)?, right(&[], old_ip, 10), right(&[], new_ip, 10)))
}

/// The IPv4 header checksum and the layer-4 checksum that `new` must have, given that `old` was rewritten to it.
pub fn checks(old: &[u8], new: &[u8], segment: &Segment) -> (Check, Check) {
    let end = ETHERNET + segment.ip.total_len;
    let (old_ip, new_ip) = (&old[ETHERNET..segment.l4], &new[ETHERNET..segment.l4]);
    let field = |bytes: &[u8], at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
    let ip = after(field(old_ip, 10), right(&[], old_ip, 10), right(&[], new_ip, 10));
    let (old_l4, new_l4) = (&old[segment.l4..end], &new[segment.l4..end]);
    let udp = segment.key.protocol == UDP;
    let at = check_offset(udp);
    let found = field(old_l4, at);
    let whole = |ip: &[u8], l4: &[u8]| match right(&pseudo(ip, l4.len()), l4, at) {
        0 if udp => 0xffff,
        check => check,
    };
    let l4 =
        if udp && found == 0 { Check::Exactly(0) } else { after(found, whole(old_ip, old_l4), whole(new_ip, new_l4)) };
    (ip, l4)
}

/// The checksum at `at`, which covers the bytes of `range`, all of which are there.
pub fn recomputed(old: &[u8], new: &[u8], range: Range<usize>, at: usize) -> Check {
    let field = u16::from_be_bytes([old[at], old[at + 1]]);
    let right = |bytes: &[u8]| right(&[], &bytes[range.clone()], at - range.start);
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
pub fn check_offset(udp: bool) -> usize {
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
