//! Layouts for VLANs (IEEE 802.1Q and 802.1ad).

/// VLAN devices and ports of bonds that the program knows at most; a VLAN device takes two entries.
pub const VLANS: u32 = 1024;

/// Ethernet type of an 802.1Q tag.
pub const CUSTOMER_TAG: u16 = 0x8100;
/// Ethernet type of an 802.1ad tag.
pub const SERVICE_TAG: u16 = 0x88a8;

/// Where packets come and go: an interface, or a VLAN of it. 12 bytes, alignment 4.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Port {
    /// Interface index.
    pub ifindex: u32,
    /// The tags of its frames, the outer one first, each as [`tag`] makes it; 0: none.
    pub tags: [u32; 2],
}

impl Port {
    /// An interface, whose frames show no tag there.
    pub const fn untagged(ifindex: u32) -> Self {
        Self { ifindex, tags: [0; 2] }
    }
}

/// A tag: Ethernet type and VLAN number, host order.
pub const fn tag(ethernet_type: u16, vlan: u16) -> u32 {
    (ethernet_type as u32) << 16 | (vlan & 0xfff) as u32
}

/// The tag that a frame carries without its priority and drop eligibility.
#[inline(always)]
pub const fn without_priority(tag: u32) -> u32 {
    tag & 0xffff_0fff
}

/// True for the tag of a frame that has a priority only: it belongs to no VLAN (IEEE 802.1Q, 6.9).
#[inline(always)]
pub const fn is_priority_only(tag: u32) -> bool {
    tag & 0xfff == 0
}

/// True where this Ethernet type, host order, says that a tag follows.
#[inline(always)]
pub const fn is_tag(ethernet_type: u16) -> bool {
    ethernet_type == CUSTOMER_TAG || ethernet_type == SERVICE_TAG
}

const _: () = assert!(size_of::<Port>() == 12 && align_of::<Port>() == 4);
