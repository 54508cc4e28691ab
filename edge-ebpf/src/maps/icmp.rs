//! Maps for ICMP messages of our own.

use aya_ebpf::{
    macros::map,
    maps::{HashMap, PerCpuArray},
};
use edge_common::{icmp, maps as layout};

#[map]
static OWN_ADDRESSES: HashMap<u32, layout::OwnAddresses> = HashMap::with_max_entries(layout::INTERFACES, 0);
#[map]
static ICMP_PACE: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);
#[map]
static ASSUMED_FLOW: PerCpuArray<layout::FlowV4> = PerCpuArray::with_max_entries(1, 0);

#[map]
static ASSUMED_FLOW_V6: PerCpuArray<layout::FlowV6> = PerCpuArray::with_max_entries(1, 0);

/// This CPU's place for a flow that is in no table.
#[inline(always)]
pub fn assumed_flow() -> Option<&'static mut layout::FlowV4> {
    // SAFETY: this CPU's own element; programs of one hook do not preempt each other on a CPU.
    ASSUMED_FLOW.get_ptr_mut(0).map(|flow| unsafe { &mut *flow })
}

/// As [`assumed_flow`], of IPv6.
#[inline(always)]
pub fn assumed_flow_v6() -> Option<&'static mut layout::FlowV6> {
    // SAFETY: as in `assumed_flow`.
    ASSUMED_FLOW_V6.get_ptr_mut(0).map(|flow| unsafe { &mut *flow })
}

/// The addresses that messages to an interface are signed with.
#[inline(always)]
pub fn own_addresses(ifindex: u32) -> Option<&'static layout::OwnAddresses> {
    // SAFETY: a preallocated element stays mapped for this program run.
    unsafe { OWN_ADDRESSES.get(ifindex) }
}

/// Whether this CPU may send an ICMP message now; if so, it is noted as sent.
#[inline(always)]
pub fn may_send_icmp() -> bool {
    // SAFETY: this CPU's own element; programs of one hook do not preempt each other on a CPU.
    let Some(due) = ICMP_PACE.get_ptr_mut(0).map(|due| unsafe { &mut *due }) else {
        return false;
    };
    match icmp::paced(*due, super::now()) {
        Some(next) => {
            *due = next;
            true
        }
        None => false,
    }
}
