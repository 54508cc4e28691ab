//! An ICMP error about a flow's packet: rewritten outside and inside, and sent to the end that sent that packet.

use edge_common::{
    checksum::{self, add},
    conntrack::Direction,
    flow::UDP,
    maps::FlowV4,
    verdict::{Reason, Verdict},
};
use network_types::ip::Ipv4Hdr;

use super::{quote::Quote, unmatched};
use crate::{onward, packet::Packet, parse::IP, stats::because};

const ICMP_CHECK: usize = 2;
const TCP_CHECK: usize = 16;
const UDP_CHECK: usize = 6;

/// Translates the error as packets of `flow` are, which is keyed by the reverse of the quoted packet. Neither keeps the
/// flow alive nor changes its state.
#[inline(never)]
pub fn along<P: Packet>(packet: &mut P, quote: &Quote, flow: &mut FlowV4) -> Verdict {
    // A router answers the sender of what it quotes; anything else is not about this flow.
    if quote.outer.key.dst != flow.key.dst {
        return unmatched();
    }
    if quote.outer.ttl <= 1 {
        return because(Reason::IcmpUndeliverable, flow.service);
    }
    if !outside(packet, quote, flow) || !inside(packet, quote, flow) {
        return because(Reason::Malformed, flow.service);
    }
    because(Reason::IcmpTranslated, flow.service);
    onward::send(packet, &quote.outer, flow)
}

/// Who the error comes from, as its receiver may know: the flow's other end under the name that the receiver has for it.
/// A router in between keeps its name towards clients, whose traceroute shows it; towards a full-nat backend it is the
/// edge, which is all that such a backend is to see, and whose address its network expects from here.
#[inline(always)]
fn source(quote: &Quote, flow: &FlowV4) -> u32 {
    let to_backend = flow.direction == Direction::Forward as u8;
    let merged = to_backend && flow.new_src != flow.key.src;
    if merged || quote.outer.key.src == flow.key.src { flow.new_src } else { quote.outer.key.src }
}

#[inline(always)]
fn outside<P: Packet>(packet: &mut P, quote: &Quote, flow: &FlowV4) -> bool {
    let outer = &quote.outer.key;
    let (src, dst) = (source(quote, flow), flow.new_dst);
    let Some(ip) = packet.header_anew::<Ipv4Hdr>(IP) else {
        return false;
    };
    ip.ttl -= 1;
    ip.src_addr = src.to_ne_bytes();
    ip.dst_addr = dst.to_ne_bytes();
    let delta = add(checksum::address_delta(outer.src, outer.dst, src, dst), checksum::TTL_DECREMENT);
    ip.check = checksum::apply(u16::from_ne_bytes(ip.check), delta).to_ne_bytes();
    true
}

/// Changes the quoted layer-4 checksum; false where there is none, as UDP may send.
#[inline(never)]
fn fix_quoted<P: Packet>(packet: &mut P, quote: &Quote, delta: u16) -> bool {
    let udp = quote.key.protocol == UDP;
    let Some(field) = packet.header_anew::<[u8; 2]>(usize::from(quote.l4) + if udp { UDP_CHECK } else { TCP_CHECK })
    else {
        return false;
    };
    let check = u16::from_ne_bytes(*field);
    if udp && check == 0 {
        return false;
    }
    let check = if udp { checksum::apply_udp(check, delta) } else { checksum::apply(check, delta) };
    *field = check.to_ne_bytes();
    true
}

/// The quoted packet as its sender sent it. All of it is under the ICMP checksum, which changes by what the quote changes
/// by: the quoted header's checksum makes up for the addresses, the quoted layer-4 checksum for addresses and ports. The
/// whole message thus sums up to what it did, so that a sum the NIC took (`CHECKSUM_COMPLETE`) stays right at TC, too.
#[inline(always)]
fn inside<P: Packet>(packet: &mut P, quote: &Quote, flow: &FlowV4) -> bool {
    let Some(ip) = packet.header_anew::<Ipv4Hdr>(usize::from(quote.ip)) else {
        return false;
    };
    ip.src_addr = flow.new_dst.to_ne_bytes();
    ip.dst_addr = flow.new_src.to_ne_bytes();
    ip.check = checksum::apply(u16::from_ne_bytes(ip.check), flow.address_delta).to_ne_bytes();

    let l4 = usize::from(quote.l4);
    let Some(ports) = packet.header_anew::<[u16; 2]>(l4) else {
        return false;
    };
    *ports = [flow.new_dst_port, flow.new_src_port];

    let checked = quote.has_check && fix_quoted(packet, quote, add(flow.address_delta, flow.port_delta));
    let delta = if checked { !flow.address_delta } else { flow.port_delta };
    let Some(field) = packet.header_anew::<[u8; 2]>(usize::from(quote.icmp) + ICMP_CHECK) else {
        return false;
    };
    *field = checksum::apply(u16::from_ne_bytes(*field), delta).to_ne_bytes();
    true
}
