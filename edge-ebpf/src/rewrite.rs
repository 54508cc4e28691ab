//! The translated packet: addresses, ports, TTL and checksums.

use edge_common::{checksum, flow::TCP, maps::FlowV4};
use network_types::ip::Ipv4Hdr;

use crate::{
    packet::{L4Fix, Packet},
    parse::{IP, Parsed},
};

const TCP_CHECK: usize = 16;
const UDP_CHECK: usize = 6;

/// Rewrites the packet as its flow says; false where it turned out to be too short, which parsing excludes.
#[inline(always)]
pub fn apply<P: Packet>(packet: &mut P, parsed: &Parsed, flow: &FlowV4) -> bool {
    let Some(ip) = packet.header::<Ipv4Hdr>(IP) else {
        return false;
    };
    ip.ttl -= 1;
    ip.src_addr = flow.new_src.to_ne_bytes();
    ip.dst_addr = flow.new_dst.to_ne_bytes();
    let delta = checksum::add(flow.address_delta, checksum::TTL_DECREMENT);
    ip.check = checksum::apply(u16::from_ne_bytes(ip.check), delta).to_ne_bytes();

    let l4 = parsed.l4();
    let Some(ports) = packet.header::<[u8; 4]>(l4) else {
        return false;
    };
    let (src, dst) = (flow.new_src_port.to_ne_bytes(), flow.new_dst_port.to_ne_bytes());
    *ports = [src[0], src[1], dst[0], dst[1]];

    let tcp = parsed.key.protocol == TCP;
    let offset = l4 + if tcp { TCP_CHECK } else { UDP_CHECK };
    packet.fix_l4(L4Fix { offset, addresses: flow.address_delta, ports: flow.port_delta, udp: !tcp })
}
