//! The keyed tuple hash (SipHash-1-3) that picks a backend: all edges of one group share the seed, so they agree
//! without talking, and a client cannot aim at one backend without knowing it.

use crate::{
    address::Address,
    flow::{FlowKey, FlowKeyV4, FlowKeyV6},
};

/// SipHash-1-3 of `N` little-endian words.
#[inline(always)]
pub const fn siphash13<const N: usize>(seed: [u64; 2], message: [u64; N]) -> u64 {
    let mut state = [
        seed[0] ^ 0x736f_6d65_7073_6575,
        seed[1] ^ 0x646f_7261_6e64_6f6d,
        seed[0] ^ 0x6c79_6765_6e65_7261,
        seed[1] ^ 0x7465_6462_7974_6573,
    ];
    let mut word = 0;
    while word < N {
        state = absorb(state, message[word]);
        word += 1;
    }
    // The last block holds the length in bytes in its top byte and no more message bytes.
    state = absorb(state, (N as u64 * 8) << 56);
    state[2] ^= 0xff;
    state = round(round(round(state)));
    state[0] ^ state[1] ^ state[2] ^ state[3]
}

#[inline(always)]
const fn absorb(mut state: [u64; 4], word: u64) -> [u64; 4] {
    state[3] ^= word;
    state = round(state);
    state[0] ^= word;
    state
}

#[inline(always)]
const fn round([mut a, mut b, mut c, mut d]: [u64; 4]) -> [u64; 4] {
    a = a.wrapping_add(b);
    b = b.rotate_left(13) ^ a;
    a = a.rotate_left(32);
    c = c.wrapping_add(d);
    d = d.rotate_left(16) ^ c;
    a = a.wrapping_add(d);
    d = d.rotate_left(21) ^ a;
    c = c.wrapping_add(b);
    b = b.rotate_left(17) ^ c;
    c = c.rotate_left(32);
    [a, b, c, d]
}

/// The hash of a client's tuple (client address and port, VIP and port, protocol), over the key's bytes.
#[inline(always)]
pub fn tuple<A: Address>(seed: [u64; 2], key: &FlowKey<A>) -> u64 {
    A::tuple_hash(seed, key)
}

/// [`tuple`] over the 16 bytes of an IPv4 key.
#[inline(always)]
pub(crate) const fn tuple_v4(seed: [u64; 2], key: &FlowKeyV4) -> u64 {
    siphash13(seed, [pair(key.src, key.dst), rest(key)])
}

/// [`tuple`] over the 40 bytes of an IPv6 key.
#[inline(always)]
pub(crate) const fn tuple_v6(seed: [u64; 2], key: &FlowKeyV6) -> u64 {
    let (src, dst) = (&key.src, &key.dst);
    let message = [pair(src[0], src[1]), pair(src[2], src[3]), pair(dst[0], dst[1]), pair(dst[2], dst[3]), rest(key)];
    siphash13(seed, message)
}

#[inline(always)]
const fn pair(first: u32, second: u32) -> u64 {
    first.to_le() as u64 | (second.to_le() as u64) << 32
}

#[inline(always)]
const fn rest<A>(key: &FlowKey<A>) -> u64 {
    key.src_port.to_le() as u64 | (key.dst_port.to_le() as u64) << 16 | (key.protocol as u64) << 32
}

/// The `index`th point of a Weyl sequence over `0..span`: consecutive indices land far apart, and each stretch of
/// a few times `span` indices visits every point. A cursor over SNAT ports walks it, so that a block of ports that
/// may not be used costs a share of the probes instead of all of them in a row.
#[inline(always)]
pub const fn spread(index: u32, span: u32) -> u32 {
    ((index.wrapping_mul(0x9e37_79b1) as u64 * span as u64) >> 32) as u32
}

/// A permutation of the 32-bit numbers that leaves no pattern (the finalizer of MurmurHash3): steps of any size in
/// become unrelated numbers out.
#[inline(always)]
pub const fn scatter(word: u32) -> u32 {
    let word = (word ^ word >> 16).wrapping_mul(0x85eb_ca6b);
    let word = (word ^ word >> 13).wrapping_mul(0xc2b2_ae35);
    word ^ word >> 16
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use core::hash::Hasher;
    use proptest::prelude::*;

    #[test]
    fn the_known_answer_of_another_implementation() {
        // The standard library's default hasher is SipHash-1-3 with a zero key.
        let bytes: std::vec::Vec<u8> = (0..16).collect();
        let mut hasher = std::hash::DefaultHasher::new();
        hasher.write(&bytes);
        assert_eq!(siphash13([0, 0], [0x0706_0504_0302_0100, 0x0f0e_0d0c_0b0a_0908]), hasher.finish());
    }

    #[test]
    fn scattered_pairs_find_a_port_beside_the_ephemeral_range() {
        // Ports from 1024 on, without 32768-60999; a pair is half the span apart.
        let allowed = |index: u32| !(32768..61000).contains(&(1024 + spread(index, 64512)));
        for word in 0..100_000 {
            let first = scatter(word);
            assert!(allowed(first) || allowed(first ^ 1 << 31), "{word}");
        }
    }

    #[test]
    fn the_known_answers_of_murmurs_finalizer() {
        assert_eq!([0, 1, 2].map(scatter), [0, 0x514e_28b7, 0x30f4_c306]);
    }

    proptest! {
        #[test]
        fn the_tuple_hash_covers_the_key_bytes_in_order(src in any::<u32>(), dst in any::<u32>(), ports in any::<[u16; 2]>()) {
            let key = FlowKeyV4::new(src, dst, ports[0], ports[1], 6);
            let mut bytes = [0; 16];
            bytes[..4].copy_from_slice(&src.to_ne_bytes());
            bytes[4..8].copy_from_slice(&dst.to_ne_bytes());
            bytes[8..10].copy_from_slice(&ports[0].to_ne_bytes());
            bytes[10..12].copy_from_slice(&ports[1].to_ne_bytes());
            bytes[12] = 6;
            let mut hasher = std::hash::DefaultHasher::new();
            hasher.write(&bytes);
            prop_assert_eq!(tuple([0, 0], &key), hasher.finish());
        }

        #[test]
        fn the_tuple_hash_covers_all_bytes_of_an_ipv6_key(src in any::<[u32; 4]>(), dst in any::<[u32; 4]>(), ports in any::<[u16; 2]>()) {
            let key = FlowKeyV6::new(src, dst, ports[0], ports[1], 17);
            let mut hasher = std::hash::DefaultHasher::new();
            for word in src.iter().chain(&dst) { hasher.write(&word.to_ne_bytes()); }
            for port in ports { hasher.write(&port.to_ne_bytes()); }
            hasher.write(&[17, 0, 0, 0]);
            prop_assert_eq!(tuple([0, 0], &key), hasher.finish());
        }

        #[test]
        fn the_seed_changes_the_hash(a in any::<[u64; 2]>(), b in any::<[u64; 2]>()) {
            prop_assume!(a != b);
            prop_assert_ne!(siphash13(a, [1, 2]), siphash13(b, [1, 2]));
        }

        #[test]
        fn a_small_span_is_visited_whole_within_four_rounds(start in any::<u32>(), span in 1u32..64) {
            let seen: std::collections::HashSet<u32> = (0..span * 4).map(|i| spread(start.wrapping_add(i), span)).collect();
            prop_assert_eq!(seen.len(), span as usize);
        }
    }
}
