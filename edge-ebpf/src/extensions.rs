//! IPv6 extension headers: which are walked over, how many, and where a walk ends.

use edge_common::address::Wide;
use network_types::tcp::TcpHdr;

use crate::{
    packet::Packet,
    parse::{IP, Ip},
};

/// Headers that are looked at, the last of which is to be none of those walked over: a packet with more than seven of them is the
/// stack's business.
const EXTENSIONS: u32 = 8;
/// Next-header number of the fragment header (RFC 8200, section 4.5).
pub const FRAGMENT: u8 = 44;
/// Length of the fragment header, bytes.
pub const FRAGMENT_LEN: u16 = 8;
/// Offset in 8-byte units and "more fragments", without the two reserved bits between them.
const OFFSET_AND_MORE: u16 = 0xfff9;
const OFFSET: u16 = 0xfff8;
/// What the verifier lets an offset into a packet be; more than [`EXTENSIONS`] headers of 2 KiB come to.
const PLACES: u16 = 0x7fff;

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const DESTINATION: u8 = 60;

/// A header in a packet: what it is, and where.
#[derive(Clone, Copy)]
pub struct Place {
    /// Its number.
    pub next: u8,
    /// Its offset from the start of the frame, bytes.
    pub offset: u16,
}

impl Place {
    /// The offset, with a bound that the verifier sees.
    #[inline(always)]
    pub fn offset(&self) -> usize {
        usize::from(self.offset & PLACES)
    }
}

/// How a walk over extension headers ended.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Upper {
    /// At another header.
    Header,
    /// At the fragment header of a packet in several pieces.
    Fragment,
    /// At what the stack must judge: a routing header that is not done with (a router has to act on it, RFC 8200,
    /// section 4.4), or too many headers.
    Stack,
    /// The packet ends before its headers do.
    Short,
}

/// Walks from the header that `ip` says is next; number and offset of where it ends are noted there.
#[inline(always)]
pub fn skip<P: Packet>(packet: &mut P, ip: &mut Ip<Wide>) -> Upper {
    let mut place = Place { next: ip.protocol, offset: IP as u16 + ip.header_len };
    let upper = walk(packet, &mut place);
    ip.protocol = place.next;
    ip.header_len = place.offset.wrapping_sub(IP as u16);
    upper
}

/// Walks hop-by-hop options, routing, destination options and the fragment header of an unfragmented packet (RFC 6946)
/// up to the first header of another kind. Authentication (AH) is not skipped: a translated packet would fail it.
#[inline(never)]
pub fn walk<P: Packet>(packet: &mut P, place: &mut Place) -> Upper {
    for _ in 0..EXTENSIONS {
        let (kind, offset) = (place.next, place.offset());
        if kind != HOP_BY_HOP && kind != ROUTING && kind != FRAGMENT && kind != DESTINATION {
            packet.pull_anew(offset + TcpHdr::LEN);
            return Upper::Header;
        }
        packet.pull_anew(offset + 8);
        let Some(header) = packet.header_anew::<[u8; 8]>(offset) else {
            return Upper::Short;
        };
        let mut length = (u16::from(header[1]) + 1) << 3;
        if kind == FRAGMENT {
            if u16::from_be_bytes([header[2], header[3]]) & OFFSET_AND_MORE != 0 {
                return Upper::Fragment;
            }
            length = FRAGMENT_LEN;
        } else if kind == ROUTING && header[3] != 0 {
            return Upper::Stack;
        }
        place.next = header[0];
        place.offset += length;
    }
    Upper::Stack
}

/// What a fragment header says.
pub struct FragmentHeader {
    /// Number of the header that follows it in the first fragment.
    pub next: u8,
    /// It is not the first: what follows is data.
    pub later: bool,
    /// Identification, as in the packet.
    pub id: u32,
}

/// The fragment header at `offset`.
#[inline(always)]
pub fn fragment<P: Packet>(packet: &mut P, offset: usize) -> Option<FragmentHeader> {
    let header = packet.header_anew::<[u8; FRAGMENT_LEN as usize]>(offset)?;
    Some(FragmentHeader {
        next: header[0],
        later: u16::from_be_bytes([header[2], header[3]]) & OFFSET != 0,
        id: u32::from_ne_bytes([header[4], header[5], header[6], header[7]]),
    })
}
