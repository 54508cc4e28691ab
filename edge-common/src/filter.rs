//! The address prefilter: two bitmaps that tell traffic which cannot be ours from traffic that may be, before
//! any hash lookup. One multiplicative hash; false positives only cost the lookups that follow.

/// Bits in each of the two bitmaps.
pub const BITS: usize = 1 << 16;
/// 64-bit words in each of the two bitmaps.
pub const WORDS: usize = BITS / 64;

/// The bit that stands for an IPv4 address (network order as read from the packet), below [`BITS`].
#[inline(always)]
pub const fn bit(address: u32) -> u32 {
    address.wrapping_mul(0x9e37_79b1) >> 16
}
