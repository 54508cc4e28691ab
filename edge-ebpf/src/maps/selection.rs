//! The maps of selection.

use aya_ebpf::{
    bindings::BPF_ANY,
    macros::map,
    maps::{Array, LruHashMap, PerCpuArray},
};
use edge_common::maps::{self as layout, AffinityEntry, AffinityKey, Pending};

#[map]
static BACKEND_LIVE: Array<u32> = Array::with_max_entries(layout::BACKENDS, 0);
#[map]
static BACKEND_PENDING: Array<Pending> = Array::with_max_entries(layout::BACKENDS, 0);
#[map]
static BACKEND_EXPIRED: Array<u64> = Array::with_max_entries(layout::BACKENDS, 0);
#[map]
static SERVICE_CURSOR: Array<u32> = Array::with_max_entries(layout::SERVICES, 0);
#[map]
static AFFINITY: LruHashMap<AffinityKey, AffinityEntry> = LruHashMap::with_max_entries(layout::AFFINITY_ENTRIES, 0);

#[map]
static SELECTION_MET_FULL: PerCpuArray<u32> = PerCpuArray::with_max_entries(1, 0);

/// Notes whether the selection under way has met a backend at its limit.
#[inline(always)]
pub fn set_met_full(met: u32) {
    if let Some(element) = SELECTION_MET_FULL.get_ptr_mut(0) {
        // SAFETY: this CPU's own element; programs of one hook do not preempt each other on a CPU.
        unsafe { *element = met };
    }
}

/// What [`set_met_full`] noted last.
#[inline(always)]
pub fn met_full() -> bool {
    SELECTION_MET_FULL.get(0).is_some_and(|met| *met != 0)
}

/// Changes the number of flows that a backend has, modulo 2^32.
#[inline(always)]
pub fn backend_live(number: u32, change: u32) {
    if let Some(live) = BACKEND_LIVE.get_ptr_mut(number) {
        super::add(live, change);
    }
}

/// Flows that a backend has.
#[inline(always)]
pub fn backend_active(number: u32) -> u32 {
    match (BACKEND_LIVE.get(number), BACKEND_EXPIRED.get(number)) {
        (Some(live), Some(expired)) => layout::active(*live, *expired),
        _ => 0,
    }
}

/// A backend's flows that have not proved themselves yet.
#[inline(always)]
pub fn backend_pending(number: u32) -> Option<&'static mut Pending> {
    // SAFETY: an array element; see the parent module's text on other CPUs.
    BACKEND_PENDING.get_ptr_mut(number).map(|pending| unsafe { &mut *pending })
}

/// Whose turn it is in a service.
#[inline(always)]
pub fn next_turn(service: u32) -> u32 {
    SERVICE_CURSOR.get_ptr_mut(service).map_or(0, super::fetch_add)
}

/// Where a client was before.
#[inline(always)]
pub fn affinity(key: &AffinityKey) -> Option<&'static mut AffinityEntry> {
    // SAFETY: a preallocated element stays mapped for this program run; see the parent module's text on other CPUs.
    AFFINITY.get_ptr_mut(key).map(|entry| unsafe { &mut *entry })
}

/// Remembers where a client is; where the map refuses, the next flow is selected anew.
#[inline(always)]
pub fn remember(key: &AffinityKey, entry: &AffinityEntry) {
    let _ = AFFINITY.insert(key, entry, u64::from(BPF_ANY));
}
