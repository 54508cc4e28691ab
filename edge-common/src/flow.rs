//! The flow key: five wire values, kept in network byte order from the packet to the map and back.

/// IP protocol number of TCP.
pub const TCP: u8 = 6;
/// IP protocol number of UDP.
pub const UDP: u8 = 17;

/// One direction of a TCP or UDP flow, as seen in the packet: every field in network byte order.
///
/// Without implicit padding; `_pad` must be zero, since maps compare keys as bytes. 16 bytes for IPv4, 40 for IPv6,
/// alignment 4.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FlowKey<A> {
    /// Source address, network order.
    pub src: A,
    /// Destination address, network order.
    pub dst: A,
    /// Source port, network order.
    pub src_port: u16,
    /// Destination port, network order.
    pub dst_port: u16,
    /// IP protocol number: [`TCP`] or [`UDP`].
    pub protocol: u8,
    /// Zero.
    pub _pad: [u8; 3],
}

/// The key of an IPv4 flow.
pub type FlowKeyV4 = FlowKey<u32>;
/// The key of an IPv6 flow.
pub type FlowKeyV6 = FlowKey<[u32; 4]>;

impl<A: Copy> FlowKey<A> {
    /// A key from wire values (network byte order).
    #[inline(always)]
    pub const fn new(src: A, dst: A, src_port: u16, dst_port: u16, protocol: u8) -> Self {
        Self { src, dst, src_port, dst_port, protocol, _pad: [0; 3] }
    }

    /// The key of packets going the other way between the same two endpoints.
    #[inline(always)]
    pub const fn reversed(&self) -> Self {
        Self::new(self.dst, self.src, self.dst_port, self.src_port, self.protocol)
    }
}

const _: () = {
    assert!(size_of::<FlowKeyV4>() == 16);
    assert!(align_of::<FlowKeyV4>() == 4);
    assert!(size_of::<FlowKeyV6>() == 40);
    assert!(align_of::<FlowKeyV6>() == 4);
};
