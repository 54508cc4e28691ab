//! Maps of the protection against sources: ranges that may or may not use a service, and what each source has used up.

/// Source ranges over all services, by frontend: a service with two listen addresses takes each of its ranges twice.
pub const SOURCE_RANGES: u32 = 1 << 15;
/// Sources remembered at a time for rates and quotas. Beyond that the least recently seen one starts anew, with full
/// buckets.
pub const SOURCES: u32 = 1 << 17;

/// Bits of [`SourceKey::prefix_len`] before the address begins.
pub const RANGE_PREFIX: u32 = 32;

/// Key of `SOURCE_RANGES` as the kernel's LPM trie wants it: bits that count, then the data. 24 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SourceKey {
    /// [`RANGE_PREFIX`] for the service number, and the prefix length of the 16-byte address.
    pub prefix_len: u32,
    /// What is compared.
    pub source: RangeSource,
}

/// A service's source, as compared bit by bit. 20 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RangeSource {
    /// Service number; whole or not at all, so its byte order does not matter.
    pub service: u32,
    /// Address, network order, IPv4 as [`crate::address::mapped`].
    pub address: [u32; 4],
}

/// A source range. 16 bytes, alignment 8.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SourceRange {
    /// One of [`range_action`].
    pub action: u32,
    /// Zero.
    pub _pad: u32,
    /// New flows that this range decided about, counted by the program.
    pub hits: u64,
}

/// Values of [`SourceRange::action`].
pub mod range_action {
    /// New flows may start.
    pub const ALLOW: u32 = 1;
    /// New flows are dropped.
    pub const DENY: u32 = 2;
}

/// Key of `SOURCES`. 20 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SourceId {
    /// The source as [`crate::limit::source`] gives it.
    pub address: [u32; 4],
    /// Service number.
    pub service: u32,
}

/// What a source has used up. 32 bytes, alignment 8. All zero: nothing.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SourceUse {
    /// New flows: [`crate::limit::take`]'s state.
    pub flows: u64,
    /// Packets: the same.
    pub packets: u64,
    /// Half-open flows.
    pub half_open: crate::limit::HalfOpen,
    /// Zero.
    pub _pad: u32,
}

const _: () = {
    assert!(size_of::<SourceKey>() == 24 && align_of::<SourceKey>() == 4);
    assert!(core::mem::offset_of!(SourceKey, source) == 4);
    assert!(size_of::<RangeSource>() == 20);
    assert!(size_of::<SourceRange>() == 16 && core::mem::offset_of!(SourceRange, hits) == 8);
    assert!(size_of::<SourceId>() == 20);
    assert!(size_of::<SourceUse>() == 32 && align_of::<SourceUse>() == 8);
};
