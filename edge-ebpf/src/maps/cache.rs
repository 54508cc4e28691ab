//! The maps of the flow cache.

use core::intrinsics::{AtomicOrdering, atomic_xadd};

use aya_ebpf::{bindings::BPF_F_MMAPABLE, helpers::generated::bpf_get_smp_processor_id, macros::map, maps::Array};
use edge_common::{
    address::{Address, Wide},
    flow::FlowKey,
    maps::{self as layout, CacheSet, CacheWindow, Generations, Slot},
};

// The daemon sets how many sets there are. Mappable ones begin on a page, so that a slot begins on a cache line.
#[map]
static FLOW_CACHE: Array<CacheSet<u32>> = Array::with_max_entries(1, BPF_F_MMAPABLE);
#[map]
static FLOW_CACHE_V6: Array<CacheSet<Wide>> = Array::with_max_entries(1, BPF_F_MMAPABLE);
#[map]
static CACHE_WINDOWS: Array<CacheWindow> = Array::with_max_entries(layout::CACHE_CPUS, BPF_F_MMAPABLE);
#[map]
static FLOW_GENERATIONS: Array<Generations> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// An address family's cache.
pub trait FlowCache: Address {
    /// A set by number.
    fn cache_set(number: u32) -> Option<&'static mut CacheSet<Self>>;
    /// This family's part of a window.
    fn part(window: &CacheWindow) -> u64;
}

impl FlowCache for u32 {
    #[inline(always)]
    fn cache_set(number: u32) -> Option<&'static mut CacheSet<u32>> {
        // SAFETY: an array element of integers; of this CPU's part, which no other CPU writes (see `cache_window`).
        FLOW_CACHE.get_ptr_mut(number).map(|set| unsafe { &mut *set })
    }

    #[inline(always)]
    fn part(window: &CacheWindow) -> u64 {
        window.v4
    }
}

impl FlowCache for Wide {
    #[inline(always)]
    fn cache_set(number: u32) -> Option<&'static mut CacheSet<Wide>> {
        // SAFETY: as for IPv4.
        FLOW_CACHE_V6.get_ptr_mut(number).map(|set| unsafe { &mut *set })
    }

    #[inline(always)]
    fn part(window: &CacheWindow) -> u64 {
        window.v6
    }
}

/// This CPU's window. What lies in its part is written by this CPU's programs only, one at a time, for the reasons that
/// `stages::handover` gives; the daemon moves a part only after every program that may use it has returned.
#[inline(always)]
pub fn cache_window() -> Option<&'static mut CacheWindow> {
    // SAFETY: takes nothing and returns an integer.
    let cpu = unsafe { bpf_get_smp_processor_id() };
    // SAFETY: an array element; this CPU alone writes its counters.
    CACHE_WINDOWS.get_ptr_mut(cpu as u32).map(|window| unsafe { &mut *window })
}

/// The tuple of a slot as a table's key, without a copy of it on the stack.
#[inline(always)]
pub fn slot_key<A: Address>(slot: &Slot<A>) -> &FlowKey<A> {
    // SAFETY: the words are the bytes of a `FlowKey` (`Address::words`, tested) on the little-endian machine that the program
    // is built for, as large, and more strictly aligned (asserted below).
    unsafe { &*(&raw const slot.key).cast() }
}

/// Has a slot's line fetched while another one's is: where the key is in neither, no time was lost, and where it is here, it has come
/// by the time that the other one was looked at.
#[inline(always)]
pub fn fetch<A: Address>(slot: &Slot<A>) {
    // SAFETY: an aligned integer of a live element; volatile, since the value is not used.
    unsafe { (&raw const slot.key).cast::<u64>().read_volatile() };
}

/// The generation of a key of this `place`.
#[inline(always)]
pub fn generation(place: u64) -> Option<u32> {
    // SAFETY: an aligned u32 inside the element, since the bucket is below their number; volatile, since others add to it.
    bucket(place).map(|bucket| unsafe { bucket.read_volatile() })
}

/// As [`generation`], and nothing that follows is read before it.
#[inline(always)]
pub fn generation_first(place: u64) -> u32 {
    // SAFETY: as in `generation`. An atomic addition that returns is a full barrier in the kernel's model, and there is no
    // other that every kernel since 5.15 has.
    bucket(place).map_or(0, |bucket| unsafe { atomic_xadd::<u32, u32, { AtomicOrdering::AcqRel }>(bucket, 0) })
}

/// Makes every copy of a flow whose key has this `place` stale, on every CPU. To be called after the change.
#[inline(always)]
pub fn next_generation(place: u64) -> u32 {
    bucket(place).map_or(0, super::fetch_add)
}

#[inline(always)]
fn bucket(place: u64) -> Option<*mut u32> {
    let buckets = FLOW_GENERATIONS.get_ptr_mut(0)?.cast::<u32>();
    // SAFETY: the index is below the number of buckets.
    Some(unsafe { buckets.add(layout::bucket(place)) })
}

const _: () = {
    assert!(cfg!(target_endian = "little"));
    assert!(size_of::<<u32 as Address>::Words>() == size_of::<FlowKey<u32>>());
    assert!(size_of::<<Wide as Address>::Words>() == size_of::<FlowKey<Wide>>());
    assert!(align_of::<u64>() >= align_of::<FlowKey<Wide>>());
};
