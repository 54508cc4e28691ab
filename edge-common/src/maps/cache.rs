//! The flow cache: copies of established entries in a plain array, one part of it for each CPU that receives packets, and the
//! generations that tell a copy from what its flow has become.
//!
//! A CPU's part is written by that CPU only. A slot is good while its generation is its bucket's in [`Generations`]: whoever
//! changes or removes an established entry adds one to the bucket of its key *afterwards*, and whoever fills a slot reads the
//! bucket *before* it looks the entry up.

use super::{BACKENDS, Flow, NEXT_HOPS, SERVICES};
use crate::{
    address::{Address, Wide},
    conntrack::{TICK_SHIFT, ticks},
    flow::FlowKey,
};

/// CPUs that may have a part of the cache; packets on others are served from the flow tables.
pub const CACHE_CPUS: u32 = 1024;
/// Buckets of [`Generations`].
pub const GENERATION_BUCKETS: usize = 1 << 18;
/// Slots in a [`CacheSet`].
pub const WAYS: usize = 8;
/// Default memory of the slots of both families, bytes.
pub const CACHE_BYTES: u64 = 64 << 20;
/// The least that a cache may have, bytes; less is none.
pub const CACHE_BYTES_MIN: u64 = 4096;

/// The one element of `FLOW_GENERATIONS`: one value, since elements of arrays round up to 8 bytes.
pub type Generations = [u32; GENERATION_BUCKETS];

/// One direction of an established flow as its packets need it, and what it has counted since it was last told to the flow's
/// entry. 64 bytes (a cache line) for IPv4, 128 for IPv6.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slot<A: Address> {
    /// The tuple of its packets, byte for byte a [`FlowKey`]; all zero: the slot is empty.
    pub key: A::Words,
    /// Source address after rewriting, network order.
    pub new_src: A,
    /// Destination address after rewriting, network order.
    pub new_dst: A,
    /// Source port after rewriting, network order.
    pub new_src_port: u16,
    /// Destination port after rewriting, network order.
    pub new_dst_port: u16,
    /// As `Flow::address_delta`.
    pub address_delta: u16,
    /// As `Flow::port_delta`.
    pub port_delta: u16,
    /// What the key's bucket in [`Generations`] held before the entry was looked up.
    pub generation: u32,
    /// As `Flow::route_generation`, its lower half: a slot lives for seconds at most.
    pub route_generation: u16,
    /// Service number and, above it, [`slot_flag`] bits.
    pub service: u16,
    /// Backend number.
    pub backend: u16,
    /// Next-hop number.
    pub next_hop: u16,
    /// As `Flow::touch_due`: from then on the packet asks the table.
    pub touch_due: u32,
    /// The lower half of `Flow::created`, which tells this flow from another with the same key.
    pub born: u32,
    /// Last packet, in the ticks of [`crate::conntrack::ticks`].
    pub last_seen: u32,
    /// Packets that the entry does not know of yet.
    pub packets: u32,
    /// Bytes that the entry does not know of yet, from the IP header on.
    pub bytes: u32,
    /// Zero.
    pub _rest: A::SlotPadding,
}

/// A slot for IPv4.
pub type SlotV4 = Slot<u32>;
/// A slot for IPv6.
pub type SlotV6 = Slot<Wide>;

/// Bits of [`Slot::service`].
pub mod slot_flag {
    /// It is the reply's half.
    pub const REPLY: u16 = 1 << 15;
    /// The backend's first payload is still to be noted.
    pub const NO_PAYLOAD_YET: u16 = 1 << 14;
    /// The service number.
    pub const SERVICE: u16 = (1 << 14) - 1;
}

/// From here on a slot tells its entry, so that its 32 bits never overflow: a GSO packet is far smaller than what is left.
pub const BYTES_MAX: u32 = 1 << 31;

impl<A: Address> Slot<A> {
    /// True where this is the slot of the tuple with these words, of whatever generation.
    #[inline(always)]
    pub fn is_of(&self, words: &A::Words) -> bool {
        A::are_same(&self.key, words)
    }

    /// True where it is nobody's.
    #[inline(always)]
    pub fn is_empty(&self) -> bool {
        A::are_none(&self.key)
    }

    /// Adds to the entry of this slot's flow what the entry does not know of yet. Does nothing where it is another flow's with
    /// the same key. `now`: ns of CLOCK_MONOTONIC.
    #[inline(always)]
    pub fn tell(&self, flow: &mut Flow<A>, now: u64) {
        if self.packets == 0 || self.born != flow.created as u32 {
            return;
        }
        flow.packets = flow.packets.wrapping_add(self.packets as u64);
        flow.bytes = flow.bytes.wrapping_add(self.bytes as u64);
        let age = match ticks(now).wrapping_sub(self.last_seen) {
            AHEAD.. => 0,
            age => age as u64,
        };
        let seen = (now >> TICK_SHIFT).wrapping_sub(age) << TICK_SHIFT;
        if seen > flow.last_seen && age >> 31 == 0 {
            flow.last_seen = seen;
        }
    }
}

/// Ages from here on are of slots that were seen a little after "now": a slot's clock may be some of the kernel's ticks ahead of
/// the entries' (see [`CacheWindow::clock`]).
const AHEAD: u32 = u32::MAX - 255;

/// The slots that a key may be in. 512 bytes for IPv4, 1,024 for IPv6.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheSet<A: Address> {
    /// A key is looked for in its [`home`] first, and then in the others.
    pub ways: [Slot<A>; WAYS],
}

/// A CPU's part of the cache, by its number, and its counters. 64 bytes: a cache line that one CPU writes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheWindow {
    /// The part of `FLOW_CACHE`: first set in the lower half, number of sets in the upper; 0: none. Written by the
    /// daemon, in one piece.
    pub v4: u64,
    /// The part of `FLOW_CACHE_V6`, as above.
    pub v6: u64,
    /// Packets served from a slot.
    pub hits: u64,
    /// Packets of established flows that had to ask the table.
    pub misses: u64,
    /// Slots given to another flow.
    pub displaced: u64,
    /// Lookups that telling entries of displaced slots took.
    pub told: u64,
    /// Nanoseconds in one of the kernel's ticks (jiffies); written by the daemon before it gives a part.
    pub tick: u64,
    /// What CLOCK_MONOTONIC is ahead of so many ticks, ns; 0: not known yet. Written by this CPU when it fills a slot. The kernel's
    /// count of ticks is read without a call.
    pub clock: u64,
}

/// A [`CacheWindow`]'s field of `sets` sets from `first` on.
#[inline(always)]
pub const fn window(first: u32, sets: u32) -> u64 {
    first as u64 | (sets as u64) << 32
}

/// The hash that places a key: not keyed, since only flows that proved themselves have slots, and flows that share a set cost
/// each other a lookup.
#[inline(always)]
pub fn place<A: Address>(words: &A::Words) -> u64 {
    let word = A::mix(words);
    let word = (word ^ word >> 32).wrapping_mul(0x9fb2_1c65_1e98_df25);
    word ^ word >> 32
}

/// [`place`] of a key.
#[inline(always)]
pub fn place_of<A: Address>(key: &FlowKey<A>) -> u64 {
    place::<A>(&A::words(key))
}

/// The set of a part that a key of this [`place`] belongs to.
#[inline(always)]
pub const fn set_of(window: u64, place: u64) -> u32 {
    let (first, sets) = (window as u32, window >> 32);
    first.wrapping_add(((place as u32 as u64).wrapping_mul(sets) >> 32) as u32)
}

/// The slot of its set where a key of this [`place`] is looked for first. With half of all slots in use four keys of five are
/// there, so that most packets touch one line of the set.
#[inline(always)]
pub const fn home(place: u64) -> usize {
    (place >> 50) as usize & (WAYS - 1)
}

/// The slot of a set where a key with this [`home`] is looked for in step `step` of [`WAYS`].
#[inline(always)]
pub const fn way(home: usize, step: usize) -> usize {
    (home ^ step) & (WAYS - 1)
}

/// The bucket of a key of this [`place`].
#[inline(always)]
pub const fn bucket(place: u64) -> usize {
    (place >> 32) as usize & (GENERATION_BUCKETS - 1)
}

const _: () = {
    assert!(size_of::<SlotV4>() == 64 && size_of::<SlotV6>() == 128);
    assert!(SERVICES <= slot_flag::SERVICE as u32 + 1 && BACKENDS <= 1 << 16 && NEXT_HOPS <= 1 << 16);
    assert!(core::mem::offset_of!(SlotV4, generation) == 32 && core::mem::offset_of!(SlotV4, bytes) == 60);
    assert!(size_of::<CacheSet<u32>>() == 64 * WAYS && size_of::<CacheSet<Wide>>() == 128 * WAYS);
    assert!(size_of::<CacheWindow>() == 64 && WAYS.is_power_of_two() && GENERATION_BUCKETS == 1 << 18);
};

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use proptest::prelude::*;
    use std::{vec, vec::Vec};

    /// The most that one of `bins` gets of `keys`, and how many bins stay empty.
    fn spread(keys: impl Iterator<Item = u64>, bins: usize) -> (u32, usize) {
        let mut counts = vec![0u32; bins];
        for key in keys {
            counts[key as usize % bins] += 1;
        }
        (counts.iter().copied().max().unwrap_or(0), counts.iter().filter(|count| **count == 0).count())
    }

    fn neighbours() -> Vec<FlowKey<u32>> {
        let address = |n: u32| (0x6440_0000_u32 + n).to_be();
        (0..1 << 16u32)
            .map(|n| {
                FlowKey::new(
                    address(n >> 10),
                    0x0a01_0203_u32,
                    (20_000 + (n & 1023) as u16).to_be(),
                    443_u16.to_be(),
                    6,
                )
            })
            .collect()
    }

    #[test]
    fn neighbouring_addresses_and_ports_spread_over_sets_and_buckets() {
        // 65,536 keys in as many bins: a random function leaves 36.8 % empty and puts 8 or 9 into the fullest.
        let keys = neighbours();
        let places = || keys.iter().map(place_of);
        let bits = 1 << 16;
        for (most, empty) in [
            spread(places().map(|place| u64::from(set_of(window(0, bits), place))), bits as usize),
            spread(places().map(|place| bucket(place) as u64 & 0xffff), bits as usize),
            spread(places().map(|place| bucket(place) as u64 >> 2), bits as usize),
        ] {
            assert!(most < 12 && (22_000..26_500).contains(&empty), "{most} at most, {empty} empty");
        }
    }

    #[test]
    fn replies_from_many_backends_to_one_address_spread_too() {
        let keys = (0..1 << 16u32).map(|n| {
            FlowKey::new(
                (0x0a01_4000_u32 + (n >> 14)).to_be(),
                0x0a01_0203_u32,
                443_u16.to_be(),
                (n as u16 & 0x3fff).to_be(),
                6,
            )
        });
        let (most, empty) = spread(keys.map(|key| u64::from(set_of(window(0, 1 << 16), place_of(&key)))), 1 << 16);
        assert!(most < 12 && (22_000..26_500).contains(&empty), "{most} at most, {empty} empty");
    }

    #[test]
    fn the_words_of_a_key_are_its_bytes() {
        let key = FlowKey::new(u32::from_ne_bytes([1, 2, 3, 4]), u32::from_ne_bytes([5, 6, 7, 8]), 0x0a09, 0x0c0b, 6);
        let bytes: Vec<u8> = <u32 as Address>::words(&key).iter().flat_map(|word| word.to_le_bytes()).collect();
        assert_eq!(bytes, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 6, 0, 0, 0]);
        let key = FlowKey::new([1_u32, 2, 3, 4].map(u32::from_le), [5_u32, 6, 7, 8].map(u32::from_le), 9, 10, 17);
        let bytes: Vec<u8> = <Wide as Address>::words(&key).iter().flat_map(|word| word.to_le_bytes()).collect();
        let words: Vec<u32> = bytes.chunks(4).map(|four| u32::from_le_bytes(four.try_into().unwrap())).collect();
        assert_eq!(words, [1, 2, 3, 4, 5, 6, 7, 8, 10 << 16 | 9, 17]);
    }

    proptest! {
        #[test]
        fn a_key_stays_in_its_part(place in any::<u64>(), first in 0u32..1 << 20, sets in 1u32..1 << 20) {
            let set = set_of(window(first, sets), place);
            prop_assert!((first..first + sets).contains(&set));
            prop_assert!(bucket(place) < GENERATION_BUCKETS);
        }

        #[test]
        fn every_bit_of_an_ipv6_key_moves_it(src in any::<[u32; 4]>(), dst in any::<[u32; 4]>(), word in 0usize..4, bit in 0u32..32) {
            let key = FlowKey::new(src, dst, 1, 2, 6);
            let mut other = key;
            other.src[word] ^= 1 << bit;
            prop_assert_ne!(place_of(&key), place_of(&other));
            let mut other = key;
            other.dst[word] ^= 1 << bit;
            prop_assert_ne!(place_of(&key), place_of(&other));
        }
    }
}
