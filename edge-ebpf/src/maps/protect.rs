//! Accessors of the maps about sources. An element of the LPM trie is freed after RCU, and so stays for this run.

use core::sync::atomic::AtomicU64;

use aya_ebpf::{
    bindings::BPF_NOEXIST,
    helpers::generated::bpf_ktime_get_ns,
    macros::map,
    maps::{LpmTrie, LruHashMap, lpm_trie::Key},
};
use edge_common::maps::{self as layout, RANGE_PREFIX, RangeSource, SourceId, SourceUse};

/// `SourceRange`, whose counter the program raises in place.
#[repr(C)]
pub struct Range {
    action: u32,
    _pad: u32,
    hits: AtomicU64,
}

const _: () = assert!(size_of::<Range>() == size_of::<layout::SourceRange>());

#[map]
static SOURCE_RANGES: LpmTrie<RangeSource, Range> = LpmTrie::with_max_entries(layout::SOURCE_RANGES, 0);
#[map]
static SOURCES: LruHashMap<SourceId, SourceUse> = LruHashMap::with_max_entries(layout::SOURCES, 0);

/// The `range_action` of the longest range that holds a source, which counts a hit; `None` where none does.
#[inline(always)]
pub fn range_action(source: RangeSource) -> Option<u32> {
    let range = SOURCE_RANGES.get(Key::new(RANGE_PREFIX + 128, source))?;
    let hits = range.hits.as_ptr();
    // SAFETY: the element stays mapped for this run, and the type says that it may change behind a shared reference.
    // Plain accesses, since LLVM has none but read-modify-write atomics for this target: two CPUs may lose a hit.
    unsafe { *hits = (*hits).wrapping_add(1) };
    Some(range.action)
}

/// What a source has used up; a new source has nothing. `None` where the map refuses it.
#[inline(always)]
pub fn source_use(id: &SourceId) -> Option<&'static mut SourceUse> {
    if SOURCES.get_ptr(id).is_none() {
        // Another CPU may have added it just now.
        let _ = SOURCES.insert(id, SourceUse::default(), u64::from(BPF_NOEXIST));
    }
    known_source_use(id)
}

/// As [`source_use`], without adding a source.
#[inline(always)]
pub fn known_source_use(id: &SourceId) -> Option<&'static mut SourceUse> {
    // SAFETY: a preallocated element stays mapped for this program run; see the parent module's text on other CPUs.
    SOURCES.get_ptr_mut(id).map(|used| unsafe { &mut *used })
}

/// Nanoseconds of CLOCK_MONOTONIC: rates need it finer than the timer tick of `now`.
#[inline(always)]
pub fn precise_now() -> u64 {
    // SAFETY: takes nothing and returns an integer.
    unsafe { bpf_ktime_get_ns() }
}
