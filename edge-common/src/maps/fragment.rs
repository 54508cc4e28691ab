//! Layouts for fragments.

/// Key of [`super::name::FRAGMENTS`]: what all fragments of a packet have in common. 40 bytes, alignment 4.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FragmentKey {
    /// Source, network-order words, IPv4 mapped.
    pub src: [u32; 4],
    /// Destination, as above.
    pub dst: [u32; 4],
    /// IP ID as in the packet: 16 bits of IPv4, 32 of IPv6's fragment header.
    pub id: u32,
    /// IP protocol number; of IPv6 always 44, the fragment header's, since the rest of a packet need not repeat what follows
    /// that header in the first fragment (RFC 8200, section 4.5).
    pub protocol: u32,
}

/// What the first fragment said. 24 bytes, alignment 8.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fragment {
    /// When it was seen, ns of CLOCK_MONOTONIC.
    pub seen: u64,
    /// Source port, network order.
    pub src_port: u16,
    /// Destination port, network order.
    pub dst_port: u16,
    /// IP ID after rewriting, as in the packet.
    pub id: u32,
    /// Layer-4 protocol number.
    pub protocol: u8,
    /// Zero.
    pub _pad: [u8; 7],
}

/// Default entries of [`super::name::FRAGMENTS`].
pub const FRAGMENT_ENTRIES: u32 = 1 << 14;
/// Counters of [`super::name::FRAGMENT_IDS`].
pub const FRAGMENT_COUNTERS: u32 = 1 << 10;

const _: () = assert!(size_of::<FragmentKey>() == 40 && size_of::<Fragment>() == 24);
