//! A tuple and an entry of either family in one form: addresses as maps hold them, 16 bytes, and of which family they are
//! beside them. A v4-mapped address in an IPv6 packet is no IPv4 address.

use edge_common::{
    address::{Address, Wide},
    flow::FlowKey,
    maps,
};

/// One direction of a flow as seen in its packets; ports in network order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    /// Of IPv6 packets.
    pub v6: bool,
    /// Source.
    pub src: Wide,
    /// Destination.
    pub dst: Wide,
    /// Source port.
    pub src_port: u16,
    /// Destination port.
    pub dst_port: u16,
    /// Layer-4 protocol.
    pub protocol: u8,
}

impl Key {
    /// As the maps of its family have it.
    pub fn to_map<A: Address>(self) -> FlowKey<A> {
        let Self { src, dst, src_port, dst_port, protocol, .. } = self;
        FlowKey { src: A::narrow(&src), dst: A::narrow(&dst), src_port, dst_port, protocol, _pad: [0; 3] }
    }

    /// From that.
    pub fn of_map<A: Address>(key: &FlowKey<A>) -> Self {
        let FlowKey { src, dst, src_port, dst_port, protocol, _pad } = *key;
        Self { v6: A::V6, src: src.wide(), dst: dst.wide(), src_port, dst_port, protocol }
    }

    /// The key of packets going the other way between the same two ends.
    pub fn reversed(self) -> Self {
        let Self { v6, src, dst, src_port, dst_port, protocol } = self;
        Self { v6, src: dst, dst: src, src_port: dst_port, dst_port: src_port, protocol }
    }
}

macro_rules! flow {
    ($($(#[$doc:meta])* $field:ident: $kind:ty,)*) => {
        /// An entry; the fields are those of [`maps::Flow`].
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct Flow {
            /// Its own key.
            pub key: Key,
            /// Source after rewriting.
            pub new_src: Wide,
            /// Destination after rewriting.
            pub new_dst: Wide,
            $($(#[$doc])* pub $field: $kind,)*
        }

        impl Flow {
            /// As the maps of its family have it.
            pub fn to_map<A: Address>(&self) -> maps::Flow<A> {
                let (new_src, new_dst) = (A::narrow(&self.new_src), A::narrow(&self.new_dst));
                maps::Flow { key: self.key.to_map(), new_src, new_dst, $($field: self.$field,)* }
            }

            /// From that.
            pub fn of_map<A: Address>(flow: &maps::Flow<A>) -> Self {
                let (new_src, new_dst) = (flow.new_src.wide(), flow.new_dst.wide());
                Self { key: Key::of_map(&flow.key), new_src, new_dst, $($field: flow.$field,)* }
            }
        }
    };
}

flow! {
    /// Source port after rewriting.
    new_src_port: u16,
    /// Destination port after rewriting.
    new_dst_port: u16,
    /// What both addresses change a checksum by.
    address_delta: u16,
    /// What both ports change a checksum by.
    port_delta: u16,
    /// Next-hop number.
    next_hop: u32,
    /// Of which generation of routes that is.
    route_generation: u32,
    /// Service number.
    service: u32,
    /// Backend number.
    backend: u32,
    /// Grows with every change of identity.
    sequence: u32,
    /// Half-open, established, closing.
    state: u8,
    /// 1: reply.
    direction: u8,
    /// Bits of `flow_flag`.
    flags: u16,
    /// What the client must acknowledge, has acknowledged, or how often it has repeated its SYN.
    ack_floor: u32,
    /// When it is touched.
    touch_due: u32,
    /// Time to the backend's answer.
    answered_after: u32,
    /// Time to its first byte.
    first_byte_after: u32,
    /// When it began.
    created: u64,
    /// Its last packet.
    last_seen: u64,
    /// Packets.
    packets: u64,
    /// Bytes.
    bytes: u64,
}
