//! The two kinds of address that packets carry, and the one form in which maps hold both.
//!
//! Every word is in network order, as loaded from the packet. Maps that serve both families hold [`Wide`] addresses,
//! IPv4 ones as v4-mapped (RFC 4291, section 2.5.5.2), which never stand in a packet that is ours.

use core::fmt::Debug;

use crate::{checksum, filter, flow::FlowKey, hash};

/// An address of either family as maps hold it: four words in network order, IPv4 as `::ffff:a.b.c.d`.
pub type Wide = [u32; 4];

/// The word that tells a v4-mapped address.
const MAPPED: u32 = 0xffff_u32.to_be();

/// An address as it stands in packets of one family: `u32` for IPv4, `[u32; 4]` for IPv6, network order.
pub trait Address: Copy + Eq + Default + Debug + 'static {
    /// True for IPv6.
    const V6: bool;

    /// As maps hold it.
    fn wide(self) -> Wide;

    /// From the form that maps hold; the caller knows that it is of this family.
    fn narrow(wide: &Wide) -> Self;

    /// New minus old as a ones'-complement sum, unfolded: at most sixteen 16-bit words.
    fn difference(old: Self, new: Self) -> u32;

    /// Its 16-bit words as a ones'-complement sum, unfolded: at most eight.
    fn sum(self) -> u32;

    /// The prefilter's bit for it, see [`filter`].
    fn filter_bit(self) -> u32;

    /// A word in which every part of the address that tells hosts apart has a share; no hash.
    fn mixed(self) -> u32;

    /// The keyed hash of a tuple, over the key's bytes, see [`hash`].
    fn tuple_hash(seed: [u64; 2], key: &FlowKey<Self>) -> u64;

    /// A tuple as words: the bytes of its [`FlowKey`], which comparing and hashing take less time with.
    type Words: Copy + Eq + Default + Debug + 'static;

    /// The words of a tuple.
    fn words(key: &FlowKey<Self>) -> Self::Words;

    /// True where two tuples are the same, without a branch for each word.
    fn are_same(one: &Self::Words, other: &Self::Words) -> bool;

    /// True for words that are of no tuple.
    fn are_none(words: &Self::Words) -> bool;

    /// All words in one; see [`crate::maps::place`].
    fn mix(words: &Self::Words) -> u64;

    /// What fills a [`crate::maps::Slot`] up to whole cache lines.
    type SlotPadding: Copy + Eq + Default + Debug + 'static;
}

/// Odd numbers without a pattern (of xxHash and wyhash), one for each word.
const SPREAD: [u64; 5] =
    [0x9e37_79b1_85eb_ca87, 0xd6e8_feb8_6659_fd93, 0xc2b2_ae3d_27d4_eb4f, 0x1656_67b1_9e37_79f9, 0xa076_1d64_78bd_642f];

impl Address for u32 {
    const V6: bool = false;

    #[inline(always)]
    fn wide(self) -> Wide {
        mapped(self)
    }

    #[inline(always)]
    fn narrow(wide: &Wide) -> Self {
        wide[3]
    }

    #[inline(always)]
    fn difference(old: Self, new: Self) -> u32 {
        checksum::difference(old, new)
    }

    #[inline(always)]
    fn sum(self) -> u32 {
        (self & 0xffff) + (self >> 16)
    }

    #[inline(always)]
    fn filter_bit(self) -> u32 {
        filter::bit(self)
    }

    #[inline(always)]
    fn mixed(self) -> u32 {
        self
    }

    #[inline(always)]
    fn tuple_hash(seed: [u64; 2], key: &FlowKey<Self>) -> u64 {
        hash::tuple_v4(seed, key)
    }

    type Words = [u64; 2];

    #[inline(always)]
    fn words(key: &FlowKey<Self>) -> [u64; 2] {
        [pair(key.src, key.dst), rest(key)]
    }

    #[inline(always)]
    fn are_same(one: &[u64; 2], other: &[u64; 2]) -> bool {
        (one[0] ^ other[0]) | (one[1] ^ other[1]) == 0
    }

    #[inline(always)]
    fn are_none(words: &[u64; 2]) -> bool {
        words[1] == 0
    }

    #[inline(always)]
    fn mix(words: &[u64; 2]) -> u64 {
        words[0].wrapping_mul(SPREAD[0]) ^ words[1].wrapping_mul(SPREAD[1])
    }

    type SlotPadding = [u32; 0];
}

/// Ports and protocol, as the last bytes of a [`FlowKey`] on the little-endian machines that programs are built for.
#[inline(always)]
const fn rest<A>(key: &FlowKey<A>) -> u64 {
    key.src_port as u64 | (key.dst_port as u64) << 16 | (key.protocol as u64) << 32
}

#[inline(always)]
const fn pair(low: u32, high: u32) -> u64 {
    low as u64 | (high as u64) << 32
}

impl Address for Wide {
    const V6: bool = true;

    #[inline(always)]
    fn wide(self) -> Wide {
        self
    }

    #[inline(always)]
    fn narrow(wide: &Wide) -> Self {
        *wide
    }

    #[inline(always)]
    fn difference(old: Self, new: Self) -> u32 {
        checksum::difference(old[0], new[0])
            + checksum::difference(old[1], new[1])
            + checksum::difference(old[2], new[2])
            + checksum::difference(old[3], new[3])
    }

    #[inline(always)]
    fn sum(self) -> u32 {
        self[0].sum() + self[1].sum() + self[2].sum() + self[3].sum()
    }

    #[inline(always)]
    fn filter_bit(self) -> u32 {
        filter::bit_v6(self)
    }

    #[inline(always)]
    fn mixed(self) -> u32 {
        self[0] ^ self[1] ^ self[2] ^ self[3]
    }

    #[inline(always)]
    fn tuple_hash(seed: [u64; 2], key: &FlowKey<Self>) -> u64 {
        hash::tuple_v6(seed, key)
    }

    type Words = [u64; 5];

    #[inline(always)]
    fn words(key: &FlowKey<Self>) -> [u64; 5] {
        let (src, dst) = (&key.src, &key.dst);
        [pair(src[0], src[1]), pair(src[2], src[3]), pair(dst[0], dst[1]), pair(dst[2], dst[3]), rest(key)]
    }

    #[inline(always)]
    fn are_same(one: &[u64; 5], other: &[u64; 5]) -> bool {
        let differ = |word: usize| one[word] ^ other[word];
        differ(0) | differ(1) | differ(2) | differ(3) | differ(4) == 0
    }

    #[inline(always)]
    fn are_none(words: &[u64; 5]) -> bool {
        words[4] == 0
    }

    #[inline(always)]
    fn mix(words: &[u64; 5]) -> u64 {
        words[0].wrapping_mul(SPREAD[0])
            ^ words[1].wrapping_mul(SPREAD[2])
            ^ words[2].wrapping_mul(SPREAD[3])
            ^ words[3].wrapping_mul(SPREAD[4])
            ^ words[4].wrapping_mul(SPREAD[1])
    }

    type SlotPadding = [u32; 4];
}

/// An IPv4 address (network order) as maps hold it.
#[inline(always)]
pub const fn mapped(address: u32) -> Wide {
    [0, 0, MAPPED, address]
}

/// The IPv4 address (network order) that maps hold as `wide`, if it is one.
#[inline(always)]
pub const fn unmapped(wide: &Wide) -> Option<u32> {
    match *wide {
        [0, 0, MAPPED, address] => Some(address),
        _ => None,
    }
}

/// True where maps hold no address: all zero, and no v4-mapped zero either.
#[inline(always)]
pub const fn is_none(wide: &Wide) -> bool {
    wide[0] | wide[1] | wide[2] | wide[3] == 0
}

/// The prefilter's bit for an address as maps hold it: of the family that it is of.
#[inline(always)]
pub const fn filter_bit(wide: &Wide) -> u32 {
    match unmapped(wide) {
        Some(address) => filter::bit(address),
        None => filter::bit_v6(*wide),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::net::{Ipv4Addr, Ipv6Addr};
    use proptest::prelude::*;

    fn words(address: Ipv6Addr) -> Wide {
        let octets = address.octets();
        core::array::from_fn(|word| u32::from_ne_bytes(core::array::from_fn(|byte| octets[word * 4 + byte])))
    }

    #[test]
    fn maps_hold_ipv4_as_the_standard_library_maps_it() {
        let address = Ipv4Addr::new(192, 0, 2, 7);
        let word = u32::from_ne_bytes(address.octets());
        assert_eq!(mapped(word), words(address.to_ipv6_mapped()));
        assert_eq!(unmapped(&mapped(word)), Some(word));
        assert_eq!(unmapped(&words(Ipv6Addr::LOCALHOST)), None);
        assert!(is_none(&[0; 4]) && !is_none(&mapped(0)));
    }

    proptest! {
        #[test]
        fn both_forms_of_an_address_set_the_same_filter_bit(v4 in any::<u32>(), v6 in any::<[u32; 4]>()) {
            prop_assume!(unmapped(&v6).is_none());
            prop_assert_eq!(filter_bit(&v4.wide()), v4.filter_bit());
            prop_assert_eq!(filter_bit(&v6.wide()), v6.filter_bit());
            prop_assert_eq!(<u32 as Address>::narrow(&v4.wide()), v4);
            prop_assert_eq!(<Wide as Address>::narrow(&v6.wide()), v6);
        }
    }
}
