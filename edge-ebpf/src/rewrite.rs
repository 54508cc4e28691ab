//! The translated packet: addresses, ports, TTL and checksums.

use edge_common::{
    flow::TCP,
    maps::{Flow, Slot},
};

use crate::{
    family::Family,
    packet::{L4Fix, Packet, set_word},
    parse::Parsed,
};

const TCP_CHECK: usize = 16;
const UDP_CHECK: usize = 6;

/// What a packet becomes, as the entry of its flow or a copy of that says; network order.
pub trait Translation<A> {
    /// Source and destination address.
    fn addresses(&self) -> (&A, &A);
    /// Source and destination port.
    fn ports(&self) -> (u16, u16);
    /// As `Flow::address_delta` and `Flow::port_delta`.
    fn deltas(&self) -> (u16, u16);
}

macro_rules! translation {
    ($of:ident) => {
        impl<A: Family> Translation<A> for $of<A> {
            #[inline(always)]
            fn addresses(&self) -> (&A, &A) {
                (&self.new_src, &self.new_dst)
            }

            #[inline(always)]
            fn ports(&self) -> (u16, u16) {
                (self.new_src_port, self.new_dst_port)
            }

            #[inline(always)]
            fn deltas(&self) -> (u16, u16) {
                (self.address_delta, self.port_delta)
            }
        }
    };
}

translation!(Flow);
translation!(Slot);

/// Rewrites the packet as its flow says; false where it turned out to be too short, which parsing excludes.
#[inline(always)]
pub fn apply<A: Family, P: Packet>(packet: &mut P, parsed: &Parsed<A>, flow: &impl Translation<A>) -> bool {
    if !A::rewrite_header(packet, flow) {
        return false;
    }
    let l4 = parsed.l4();
    let Some(ports) = packet.header::<[u16; 2]>(l4) else {
        return false;
    };
    let (src, dst) = flow.ports();
    set_word::<0, _>(ports, u32::from(src) | u32::from(dst) << 16);

    let tcp = parsed.key.protocol == TCP;
    let offset = l4 + if tcp { TCP_CHECK } else { UDP_CHECK };
    let (addresses, ports) = flow.deltas();
    packet.fix_l4(L4Fix { offset, addresses, ports, pseudo_header: parsed.pseudo_header(), udp: !tcp, v6: A::V6 })
}
