//! The largest segment size that both ends agree on, lowered in their SYNs (RFC 9293 3.7.1), so that packets fit a path
//! whose ICMP errors do not arrive.

use edge_common::{checksum, flow::TCP};

use crate::{
    family::Family,
    maps,
    packet::{L4Fix, Packet},
    parse::Parsed,
};

/// Bytes of a TCP header without options, and the checksum's place in it.
const HEADER: usize = 20;
const CHECK: usize = 16;
/// Most bytes of options (RFC 9293 3.1).
const OPTIONS: usize = 40;
/// Options looked at. Every stack puts the MSS first or second; nobody needs more than one for each four bytes.
const MOST: u32 = 16;

const END: u8 = 0;
const NOTHING: u8 = 1;
const MSS: u8 = 2;
const MSS_LENGTH: u8 = 4;

const NOT_FOUND: u32 = u32::MAX;
/// The packet is as it came.
pub const NOTHING_LOWERED: u32 = 0;

/// Lowers the MSS of a SYN or SYN-ACK of a service that has one. Leaves alone what has none, a smaller one, or options
/// that contradict themselves: the receiver's stack judges those. What [`restore`] needs, or [`NOTHING_LOWERED`].
#[inline(never)]
pub fn clamp<A: Family, P: Packet>(packet: &mut P, parsed: &Parsed<A>, service: u32) -> u32 {
    let most = maps::service(service).map_or(0, |service| service.mss);
    let options = parsed.l4() + HEADER;
    let length = usize::from(parsed.l4_len).saturating_sub(HEADER);
    if most == 0 || parsed.key.protocol != TCP || length == 0 || length > OPTIONS {
        return NOTHING_LOWERED;
    }
    packet.pull(options + length);
    let at = find(packet, options, length as u32);
    if at == NOT_FOUND {
        return NOTHING_LOWERED;
    }
    let old = replace(packet, parsed, at, most, false);
    if old <= u32::from(most) { NOTHING_LOWERED } else { at << 16 | old }
}

/// Undoes what [`clamp`] did to a packet that is as it came otherwise.
#[inline(never)]
pub fn restore<A: Family, P: Packet>(packet: &mut P, parsed: &Parsed<A>, lowered: u32) {
    replace(packet, parsed, lowered >> 16, lowered as u16, true);
}

/// Writes the MSS at this place among the options, and makes up for it in the checksum; only a lower one, unless `raise`. What
/// it was.
#[inline(always)]
fn replace<A: Family, P: Packet>(packet: &mut P, parsed: &Parsed<A>, at: u32, mss: u16, raise: bool) -> u32 {
    let at = (at & 63) as usize;
    let Some(field) = packet.header::<[u8; 2]>(parsed.l4() + HEADER + at) else {
        return 0;
    };
    let (old, new) = (*field, mss.to_be_bytes());
    if !raise && u16::from_be_bytes(old) <= mss {
        return u32::from(u16::from_be_bytes(old));
    }
    *field = new;
    let delta = checksum::add(!u16::from_ne_bytes(old), u16::from_ne_bytes(new));
    // A field at an odd offset has its bytes in two words of the sum, the other way round.
    let delta = if at & 1 == 0 { delta } else { delta.swap_bytes() };
    packet.fix_l4(L4Fix {
        offset: parsed.l4() + CHECK,
        addresses: 0,
        ports: delta,
        pseudo_header: parsed.pseudo_header(),
        udp: false,
        v6: A::V6,
    });
    u32::from(u16::from_be_bytes(old))
}

/// The place of the MSS among the options.
#[inline(never)]
fn find<P: Packet>(packet: &mut P, options: usize, length: u32) -> u32 {
    let mut at = 0_u32;
    for _ in 0..MOST {
        if at + u32::from(MSS_LENGTH) > length {
            break;
        }
        let Some([kind, size]) = packet.header::<[u8; 2]>(options + (at & 63) as usize).copied() else {
            break;
        };
        at += match kind {
            END => break,
            NOTHING => 1,
            MSS if size == MSS_LENGTH => return at + 2,
            _ if kind == MSS || size < 2 => break,
            _ => u32::from(size),
        };
    }
    NOT_FOUND
}
