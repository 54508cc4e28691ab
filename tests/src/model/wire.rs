//! Packets as the RFCs describe them: headers read from bytes.

use std::ops::Range;

use edge_common::address::Wide;

use super::flow::Key;

/// Bytes of an Ethernet header.
pub const ETHERNET: usize = 14;
/// TCP's IP protocol number (RFC 9293).
pub const TCP: u8 = 6;
/// UDP's IP protocol number (RFC 768).
pub const UDP: u8 = 17;
/// The number of IPv6's fragment header (RFC 8200, 4.5).
pub const FRAGMENT: u8 = 44;
/// Bytes of that.
const FRAGMENT_LEN: usize = 8;
/// Extension headers in front of what a packet carries: one with more is the stack's.
const MOST_EXTENSIONS: usize = 7;

/// An IP header (RFC 791, RFC 8200), as far as it was sent.
#[derive(Clone, Copy, Debug)]
pub struct Ip {
    /// IPv6.
    pub v6: bool,
    /// Source.
    pub src: Wide,
    /// Destination.
    pub dst: Wide,
    /// Header length with options, bytes; of IPv6 with the extension headers that [`upper`] has walked over.
    pub header_len: usize,
    /// Length from the IP header on.
    pub total_len: usize,
    /// IP protocol number; of IPv6 that of the header at `header_len`.
    pub protocol: u8,
    /// Time to live, or hop limit.
    pub ttl: u8,
    /// Routers must not fragment it, as they never do with IPv6.
    pub dont_fragment: bool,
    /// Part of a fragmented packet.
    pub fragment: bool,
    /// Part of a fragmented packet, without its beginning.
    pub later_fragment: bool,
    /// Identification: 16 bits, or of an IPv6 fragment 32.
    pub id: u32,
    /// Offset of an IPv6 packet's fragment header in the frame.
    pub fragment_at: usize,
}

impl Ip {
    /// The number that fragments of one packet have in common: of IPv6 the fragment header's, since all but the first need
    /// not repeat what follows it (RFC 8200, 4.5).
    pub fn kind(&self) -> u8 {
        if self.v6 { FRAGMENT } else { self.protocol }
    }
}

/// A TCP or UDP packet.
#[derive(Clone, Copy, Debug)]
pub struct Segment {
    /// Its IP header.
    pub ip: Ip,
    /// Its tuple.
    pub key: Key,
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
    /// UDP over IPv6 without a checksum: its receiver discards it (RFC 8200, 8.1).
    pub lacks_checksum: bool,
}

/// A big-endian 16-bit word.
pub fn word(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn long(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// Where both addresses stand in an IP header.
pub fn addresses_at(v6: bool) -> Range<usize> {
    if v6 { 8..40 } else { 12..20 }
}

/// Where the TTL or hop limit stands in an IP header.
pub fn ttl_at(v6: bool) -> usize {
    if v6 { 7 } else { 8 }
}

/// Bytes of a plain IP header.
pub fn plain_header(v6: bool) -> usize {
    if v6 { 40 } else { 20 }
}

/// The address at the beginning of `bytes`.
fn address(bytes: &[u8], v6: bool) -> Option<Wide> {
    let word = |at: usize| Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    Some(if v6 { [word(0)?, word(4)?, word(8)?, word(12)?] } else { [0, 0, 0xffff_u32.to_be(), word(0)?] })
}

/// Source and destination of an IP header.
pub fn addresses(ip: &[u8], v6: bool) -> Option<(Wide, Wide)> {
    let both = ip.get(addresses_at(v6))?;
    let (src, dst) = both.split_at(both.len() / 2);
    Some((address(src, v6)?, address(dst, v6)?))
}

/// Writes source and destination into the IP header at `at`.
pub fn readdress(frame: &mut [u8], at: usize, v6: bool, (src, dst): (Wide, Wide)) {
    let bytes = |wide: Wide| {
        let words = if v6 { &wide[..] } else { &wide[3..] };
        words.iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<u8>>()
    };
    let place = addresses_at(v6);
    frame[at + place.start..at + place.end].copy_from_slice(&[bytes(src), bytes(dst)].concat());
}

/// The IP header of a frame; `None` for what is neither IPv4 nor IPv6, or has no whole header.
pub fn ip(frame: &[u8]) -> Option<Ip> {
    match word(frame, 12)? {
        0x0800 => ipv4(frame),
        0x86dd => ipv6(frame),
        _ => None,
    }
}

/// As [`ip`], of a frame of this family.
pub fn header(frame: &[u8], v6: bool) -> Option<Ip> {
    if v6 { ipv6(frame) } else { ipv4(frame) }
}

fn ipv4(frame: &[u8]) -> Option<Ip> {
    let ip = frame.get(ETHERNET..)?;
    if ip.len() < 20 || ip[0] >> 4 != 4 {
        return None;
    }
    let fragment = word(ip, 6)?;
    let (src, dst) = addresses(ip, false)?;
    Some(Ip {
        v6: false,
        src,
        dst,
        header_len: usize::from(ip[0] & 15) * 4,
        total_len: usize::from(word(ip, 2)?),
        protocol: ip[9],
        ttl: ip[8],
        dont_fragment: fragment & 0x4000 != 0,
        fragment: fragment & 0x3fff != 0,
        later_fragment: fragment & 0x1fff != 0,
        id: word(ip, 4)?.into(),
        fragment_at: 0,
    })
}

fn ipv6(frame: &[u8]) -> Option<Ip> {
    let ip = frame.get(ETHERNET..)?;
    if ip.len() < 40 || ip[0] >> 4 != 6 {
        return None;
    }
    let (src, dst) = addresses(ip, true)?;
    Some(Ip {
        v6: true,
        src,
        dst,
        header_len: 40,
        total_len: 40 + usize::from(word(ip, 4)?),
        protocol: ip[6],
        ttl: ip[7],
        dont_fragment: true,
        fragment: false,
        later_fragment: false,
        id: 0,
        fragment_at: 0,
    })
}

/// How a walk over extension headers ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Walk {
    /// At a header that is none of those walked over.
    Upper,
    /// At the fragment header of a packet in pieces.
    Fragment,
    /// At what a router has to judge: a routing header that is not done with, or too many headers.
    Stack,
    /// The packet ends before.
    Short,
}

/// Walks over IPv6 extension headers: hop-by-hop options, routing (done with), destination options, and the fragment header of a
/// packet that is whole (RFC 6946). IPv4 has none.
pub fn upper(frame: &[u8], ip: &mut Ip) -> Walk {
    if !ip.v6 {
        return Walk::Upper;
    }
    for walked in 0.. {
        let known = matches!(ip.protocol, 0 | 43 | 60 | FRAGMENT);
        if walked > MOST_EXTENSIONS {
            return Walk::Stack;
        }
        if !known {
            return Walk::Upper;
        }
        let at = ETHERNET + ip.header_len;
        let Some(header) = frame.get(at..at + 8) else { return Walk::Short };
        let mut length = 8 * (1 + usize::from(header[1]));
        if ip.protocol == FRAGMENT {
            // Thirteen bits of offset, two that mean nothing, one for "more".
            let bits = u16::from_be_bytes([header[2], header[3]]);
            if bits & !0b110 != 0 {
                (ip.fragment, ip.later_fragment, ip.fragment_at) = (true, bits >> 3 != 0, at);
                ip.id = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
                return Walk::Fragment;
            }
            length = FRAGMENT_LEN;
        }
        if ip.protocol == 43 && header[3] != 0 {
            return Walk::Stack;
        }
        ip.protocol = header[0];
        ip.header_len += length;
    }
    Walk::Stack
}

/// From the fragment header at which a walk has ended to what the first fragment carries.
pub fn inside_first(frame: &[u8], ip: &mut Ip) -> Walk {
    if !ip.v6 {
        return Walk::Upper;
    }
    let Some(next) = frame.get(ip.fragment_at) else { return Walk::Short };
    ip.protocol = *next;
    ip.header_len += FRAGMENT_LEN;
    let first = *ip;
    let walk = upper(frame, ip);
    // A fragment in a fragment has an ID of its own.
    (ip.fragment_at, ip.id) = (first.fragment_at, first.id);
    walk
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
        key: Key { v6: ip.v6, src: ip.src, dst: ip.dst, src_port: port(0)?, dst_port: port(2)?, protocol: ip.protocol },
        l4,
        headers: ip.header_len + l4_len,
        flags: if tcp { header[13] } else { 0 },
        seq: if tcp { long(header, 4)? } else { 0 },
        ack: if tcp { long(header, 8)? } else { 0 },
        lacks_checksum: ip.v6 && !tcp && word(header, 6)? == 0,
    })
}

/// The identification that a frame has, as far as it is a fragment or IPv4.
pub fn id(frame: &[u8]) -> u32 {
    ip(frame).map_or(0, |mut ip| {
        upper(frame, &mut ip);
        ip.id
    })
}

/// A frame's TCP or UDP header, whatever is in front of it.
pub fn whole_segment(frame: &[u8]) -> Option<Segment> {
    let mut ip = ip(frame)?;
    let mut walk = upper(frame, &mut ip);
    if walk == Walk::Fragment && !ip.later_fragment {
        walk = inside_first(frame, &mut ip);
    }
    if walk == Walk::Upper { segment(frame, ip) } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An IPv6 frame of these extension headers (number, length in units of 8 bytes beyond the first), then TCP's number.
    fn frame(headers: &[(u8, u8)]) -> Vec<u8> {
        let mut frame = vec![0; ETHERNET + 40];
        frame[12..15].copy_from_slice(&[0x86, 0xdd, 0x60]);
        let numbers: Vec<u8> = headers.iter().map(|(number, _)| *number).chain([TCP]).collect();
        frame[ETHERNET + 6] = numbers[0];
        for ((_, units), next) in headers.iter().zip(&numbers[1..]) {
            let mut header = vec![0; 8 * (1 + usize::from(*units))];
            (header[0], header[1]) = (*next, *units);
            frame.extend(header);
        }
        frame
    }

    fn walked(frame: &[u8]) -> Option<(Walk, usize)> {
        let mut ip = ip(frame)?;
        Some((upper(frame, &mut ip), ip.header_len))
    }

    #[test]
    fn a_walk_ends_at_the_upper_header_or_after_seven() {
        assert_eq!(walked(&frame(&[])), Some((Walk::Upper, 40)));
        assert_eq!(
            walked(&frame(&[(0, 1), (60, 0), (43, 0), (FRAGMENT, 9)])),
            Some((Walk::Upper, 40 + 16 + 8 + 8 + 8))
        );
        assert_eq!(walked(&frame(&[(60, 0); 7])).map(|(walk, _)| walk), Some(Walk::Upper));
        assert_eq!(walked(&frame(&[(60, 0); 8])).map(|(walk, _)| walk), Some(Walk::Stack));
        assert_eq!(walked(&frame(&[(60, 0)])[..58]).map(|(walk, _)| walk), Some(Walk::Short));
    }
}
