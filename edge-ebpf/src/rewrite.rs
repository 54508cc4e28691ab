//! The translated packet: addresses, ports, TTL and checksums.

use edge_common::{flow::TCP, maps::Flow};

use crate::{
    family::Family,
    packet::{L4Fix, Packet},
    parse::Parsed,
};

const TCP_CHECK: usize = 16;
const UDP_CHECK: usize = 6;

/// Rewrites the packet as its flow says; false where it turned out to be too short, which parsing excludes.
#[inline(always)]
pub fn apply<A: Family, P: Packet>(packet: &mut P, parsed: &Parsed<A>, flow: &Flow<A>) -> bool {
    if !A::rewrite_header(packet, flow) {
        return false;
    }
    let l4 = parsed.l4();
    let Some(ports) = packet.header::<[u8; 4]>(l4) else {
        return false;
    };
    let (src, dst) = (flow.new_src_port.to_ne_bytes(), flow.new_dst_port.to_ne_bytes());
    *ports = [src[0], src[1], dst[0], dst[1]];

    let tcp = parsed.key.protocol == TCP;
    let offset = l4 + if tcp { TCP_CHECK } else { UDP_CHECK };
    packet.fix_l4(L4Fix { offset, addresses: flow.address_delta, ports: flow.port_delta, udp: !tcp, v6: A::V6 })
}
