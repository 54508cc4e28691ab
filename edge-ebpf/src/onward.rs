//! Packets that follow a flow without being packets of its own tuple: ICMP errors about it, and later fragments. They come
//! here to take the flow's next hop.

use edge_common::{
    maps::{Flow, next_hop_flag},
    verdict::{Question, Reason, Verdict},
};
use network_types::eth::EthHdr;

use crate::{
    family::Family,
    fib::{self, resolution},
    maps,
    packet::Packet,
    parse::Parsed,
    stats::because,
};

/// Sends the packet to the flow's next hop, or gives it to the stack where only that can. Changes the link-layer addresses
/// only. Whether the sender is told where it does not fit is the caller's to decide.
#[inline(never)]
pub fn send<A: Family, P: Packet>(packet: &mut P, parsed: &Parsed<A>, flow: &mut Flow<A>) -> Verdict {
    let service = flow.service;
    let Some(control) = maps::control() else {
        return because(Reason::NotReady, service);
    };
    if flow.next_hop == 0 || flow.route_generation != control.route_generation {
        let resolved = fib::resolve(packet, parsed, flow, control.route_generation);
        match resolved as u32 {
            resolution::RESOLVED => {}
            resolution::NO_NEIGHBOUR => return because(Reason::NeighbourUnresolved, service),
            resolution::STACK => return because(Reason::ViaStack, service),
            resolution::TOO_LONG => return too_long(parsed, service, (resolved >> 32) as u32),
            resolution::DIRECT => {
                let ifindex = (resolved >> 32) as u32;
                return if ifindex == packet.ingress() { Verdict::TRANSMIT } else { Verdict::redirect(ifindex) };
            }
            _ => return because(Reason::NoRoute, service),
        }
    }
    let Some(hop) = maps::next_hop(flow.next_hop) else {
        return because(Reason::NotReady, service);
    };
    if fib::length(packet, parsed) > hop.mtu as usize {
        return too_long(parsed, service, hop.mtu);
    }
    let same = hop.ifindex == packet.ingress();
    if !P::REDIRECTS_ANYWHERE && !same && hop.flags & next_hop_flag::VIA_STACK != 0 {
        return because(Reason::ViaStack, service);
    }
    let Some(eth) = packet.header_anew::<EthHdr>(0) else {
        return because(Reason::Malformed, service);
    };
    eth.dst_addr = hop.dst_mac;
    eth.src_addr = hop.src_mac;
    if hop.tags[0] != 0 {
        return Verdict::tagged(flow.next_hop, same);
    }
    if same { Verdict::TRANSMIT } else { Verdict::redirect(hop.ifindex) }
}

#[inline(always)]
fn too_long<A: Family>(parsed: &Parsed<A>, service: u32, mtu: u32) -> Verdict {
    if parsed.must_not_fragment {
        Verdict::answer(Question::TooBig, service, mtu)
    } else {
        because(Reason::ViaStack, service)
    }
}
