//! Maps for VLANs.
#![allow(unsafe_code, reason = "as in `maps`")]

use aya_ebpf::{
    macros::map,
    maps::{HashMap, PerCpuArray},
};
use edge_common::maps::{Port, VLANS as ENTRIES};

#[map]
static VLANS: HashMap<Port, Port> = HashMap::with_max_entries(ENTRIES, 0);

/// One element for each hook. Not pinned: it belongs to the programs that were loaded together.
#[map]
static RECEIVED_TAGS: PerCpuArray<Received> = PerCpuArray::with_max_entries(2, 0);

/// The tags that a packet came with, while it is on its way through the programs without them; none of any other packet.
#[repr(C)]
pub struct Received {
    /// The outer tag first, each an Ethernet type and tag control information, host order; 0: none.
    pub tags: [u32; 2],
    /// The interface that the packet is received by in the eyes of the stack: the VLAN device.
    pub ifindex: u32,
}

/// What a port is called on the other side, see `name::VLANS`.
#[inline(always)]
pub fn other_side(port: &Port) -> Option<&'static Port> {
    // SAFETY: a preallocated element stays mapped for this program run.
    unsafe { VLANS.get(port) }
}

/// This CPU's element of a hook, [`super::stages::XDP`] or [`super::stages::TC`]. Whoever leaves tags there takes them out again
/// before the packet leaves the programs.
#[inline(always)]
pub fn received(hook: u32) -> Option<&'static mut Received> {
    // SAFETY: this CPU's own element, for the reasons given at `stages::handover`.
    RECEIVED_TAGS.get_ptr_mut(hook).map(|received| unsafe { &mut *received })
}
