//! The flow key: five wire values, kept in network byte order from the packet to the map and back.

/// IP protocol number of TCP.
pub const TCP: u8 = 6;
/// IP protocol number of UDP.
pub const UDP: u8 = 17;

/// One direction of an IPv4 TCP or UDP flow, as seen in the packet: every field in network byte order.
///
/// 16 bytes, alignment 4, no implicit padding; `_pad` must be zero, since maps compare keys as bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FlowKeyV4 {
    /// Source address, network order.
    pub src: u32,
    /// Destination address, network order.
    pub dst: u32,
    /// Source port, network order.
    pub src_port: u16,
    /// Destination port, network order.
    pub dst_port: u16,
    /// IP protocol number: [`TCP`] or [`UDP`].
    pub protocol: u8,
    /// Zero.
    pub _pad: [u8; 3],
}

impl FlowKeyV4 {
    /// A key from wire values (network byte order).
    #[inline(always)]
    pub const fn new(src: u32, dst: u32, src_port: u16, dst_port: u16, protocol: u8) -> Self {
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
};
