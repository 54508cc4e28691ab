//! Maps for fragments.

use aya_ebpf::{
    bindings::BPF_ANY,
    macros::map,
    maps::{Array, LruHashMap},
};
use edge_common::maps::{self as layout, Fragment, FragmentKey};

#[map]
static FRAGMENTS: LruHashMap<FragmentKey, Fragment> = LruHashMap::with_max_entries(layout::FRAGMENT_ENTRIES, 0);
#[map]
static FRAGMENT_IDS: Array<u32> = Array::with_max_entries(layout::FRAGMENT_COUNTERS, 0);

/// What the first fragment of a packet left.
#[inline(always)]
pub fn fragment(key: &FragmentKey) -> Option<Fragment> {
    // SAFETY: a preallocated element stays mapped for this program run; the value is copied at once.
    unsafe { FRAGMENTS.get(key) }.copied()
}

/// Remembers a first fragment; false where the map refuses.
#[inline(always)]
pub fn remember_fragment(key: &FragmentKey, fragment: &Fragment) -> bool {
    FRAGMENTS.insert(key, fragment, u64::from(BPF_ANY)).is_ok()
}

/// The next number of a counter.
#[inline(always)]
pub fn next_fragment_id(counter: u32) -> Option<u32> {
    FRAGMENT_IDS.get_ptr_mut(counter & (layout::FRAGMENT_COUNTERS - 1)).map(super::fetch_add)
}
