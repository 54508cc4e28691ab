//! What makes a packet a fragment in either family: the IPv4 header's own fields (RFC 791), or the fragment header of IPv6
//! (RFC 8200, section 4.5).

use edge_common::{
    address::Wide,
    checksum::{self, add, fold},
    flow::{TCP, UDP},
    fragment,
    verdict::{Reason, Verdict},
};
use network_types::ip::Ipv4Hdr;

use crate::{
    extensions::{self, FRAGMENT, FRAGMENT_LEN, Upper},
    maps::FlowTables,
    packet::Packet,
    parse::{self, IP, Ip},
    stats::because,
};

/// What a fragment says.
pub struct Piece {
    /// Offset of the header that says so, from the start of the frame.
    pub at: u16,
    /// Not the first: without ports.
    pub later: bool,
    /// Number of the header after [`Piece::at`]'s; only the first fragment's counts.
    next: u8,
    /// Identification, as in the packet.
    pub id: u32,
}

impl Piece {
    /// In one register.
    #[inline(always)]
    pub fn pack(&self) -> u64 {
        u64::from(self.id) << 32 | u64::from(self.next) << 24 | u64::from(self.later) << 16 | u64::from(self.at)
    }

    /// From the form of [`Piece::pack`].
    #[inline(always)]
    pub fn unpack(packed: u64) -> Self {
        Self { id: (packed >> 32) as u32, next: (packed >> 24) as u8, later: packed >> 16 & 1 != 0, at: packed as u16 }
    }
}

/// A first fragment that may be ours.
pub const FIRST: Verdict = Verdict::UNDECIDED;

/// Fragments of one family.
pub trait Pieces: FlowTables {
    /// The fragment that the packet is, and its headers up to what is fragmented.
    fn piece<P: Packet>(packet: &mut P) -> Option<(Ip<Self>, Piece)>;

    /// Moves a first fragment's facts on to its layer-4 header: [`FIRST`], or the verdict of one that has none of ours.
    fn upper<P: Packet>(packet: &mut P, ip: &mut Ip<Self>, piece: &Piece) -> Verdict;

    /// The protocol that stands in the key of a packet's fragments.
    fn kind(protocol: u8) -> u8;

    /// The ID in the header at `at`.
    fn id<P: Packet>(packet: &mut P, at: u16) -> Option<u32>;

    /// Writes another ID; false where the packet turned out to be too short.
    fn write_id<P: Packet>(packet: &mut P, at: u16, old: u32, new: u32) -> bool;

    /// The `count`th ID of a sequence that `secret` says.
    fn new_id(secret: u64, count: u32) -> u32;
}

impl Pieces for u32 {
    #[inline(always)]
    fn piece<P: Packet>(packet: &mut P) -> Option<(Ip<Self>, Piece)> {
        let ip = parse::ipv4(packet)?;
        let id = Self::id(packet, IP as u16)?;
        let piece = Piece { at: IP as u16, later: ip.is_later_fragment(), next: ip.protocol, id };
        Some((ip, piece))
    }

    #[inline(always)]
    fn upper<P: Packet>(_packet: &mut P, _ip: &mut Ip<Self>, _piece: &Piece) -> Verdict {
        FIRST
    }

    #[inline(always)]
    fn kind(protocol: u8) -> u8 {
        protocol
    }

    #[inline(always)]
    fn id<P: Packet>(packet: &mut P, _at: u16) -> Option<u32> {
        Some(u32::from(u16::from_ne_bytes(packet.header_anew::<Ipv4Hdr>(IP)?.id)))
    }

    #[inline(always)]
    fn write_id<P: Packet>(packet: &mut P, _at: u16, old: u32, new: u32) -> bool {
        let Some(ip) = packet.header_anew::<Ipv4Hdr>(IP) else {
            return false;
        };
        ip.id = (new as u16).to_ne_bytes();
        ip.check = checksum::apply(u16::from_ne_bytes(ip.check), add(!(old as u16), new as u16)).to_ne_bytes();
        true
    }

    #[inline(always)]
    fn new_id(secret: u64, count: u32) -> u32 {
        u32::from(fragment::id(secret, count as u16))
    }
}

impl Pieces for Wide {
    #[inline(always)]
    fn piece<P: Packet>(packet: &mut P) -> Option<(Ip<Self>, Piece)> {
        let mut ip = parse::ipv6(packet)?;
        if extensions::skip(packet, &mut ip) != Upper::Fragment {
            return None;
        }
        let at = IP + parse::header_len::<Self>(ip.header_len);
        let header = extensions::fragment(packet, at)?;
        Some((ip, Piece { at: at as u16, later: header.later, next: header.next, id: header.id }))
    }

    #[inline(always)]
    fn upper<P: Packet>(packet: &mut P, ip: &mut Ip<Self>, piece: &Piece) -> Verdict {
        ip.protocol = piece.next;
        ip.header_len += FRAGMENT_LEN;
        match extensions::skip(packet, ip) {
            Upper::Header if ip.protocol == TCP || ip.protocol == UDP => FIRST,
            Upper::Header => Verdict::PASS,
            Upper::Stack | Upper::Fragment => because(Reason::ExtensionHeaders, 0),
            // All headers are to be in the first fragment (RFC 7112).
            Upper::Short => because(Reason::Malformed, 0),
        }
    }

    #[inline(always)]
    fn kind(_protocol: u8) -> u8 {
        FRAGMENT
    }

    #[inline(always)]
    fn id<P: Packet>(packet: &mut P, at: u16) -> Option<u32> {
        Some(extensions::fragment(packet, offset(at))?.id)
    }

    #[inline(always)]
    fn write_id<P: Packet>(packet: &mut P, at: u16, old: u32, new: u32) -> bool {
        let Some(id) = packet.header_anew::<[u16; 2]>(offset(at) + ID) else {
            return false;
        };
        *id = [new as u16, (new >> 16) as u16];
        packet.add_to_sum(add(!words(old), words(new)));
        true
    }

    #[inline(always)]
    fn new_id(secret: u64, count: u32) -> u32 {
        fragment::id_v6(secret, count)
    }
}

/// Place of the identification in the fragment header.
const ID: usize = 4;

/// An offset with a bound that the verifier sees.
#[inline(always)]
fn offset(at: u16) -> usize {
    usize::from(at & 0x7fff)
}

/// The sum of both halves.
#[inline(always)]
fn words(id: u32) -> u16 {
    fold((id & 0xffff) + (id >> 16))
}
