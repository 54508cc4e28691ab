//! Fragments: how long the first one is remembered, and the IDs that packets get where several senders become one.

use crate::hash::scatter;

/// How long later fragments are taken for those of a first one: what receivers wait for them (RFC 1122, 3.3.2: about 60 s;
/// Linux 30).
pub const LIFETIME: u64 = 30 * 1_000_000_000;

/// The `count`th ID: a permutation of 16 bits keyed by `secret` (four Feistel rounds), so that an ID comes back only after
/// 65,536 others and does not tell the next one.
#[inline(always)]
pub const fn id(secret: u64, count: u16) -> u16 {
    let (mut left, mut right) = (count >> 8, count & 0xff);
    let mut round = 0;
    while round < 4 {
        let key = (secret >> (round * 16)) as u32 & 0xffff;
        let mixed = left ^ (scatter(key << 8 | (round as u32) << 24 | right as u32) as u16 & 0xff);
        left = right;
        right = mixed;
        round += 1;
    }
    left << 8 | right
}

/// As [`id`], of 32 bits: IPv6's (RFC 7739 asks for IDs that nobody can tell beforehand).
#[inline(always)]
pub const fn id_v6(secret: u64, count: u32) -> u32 {
    let (mut left, mut right) = (count >> 16, count & 0xffff);
    let mut round = 0;
    while round < 4 {
        let key = (secret >> (round * 16)) as u32 & 0xffff;
        let mixed = left ^ (scatter((key << 16 | right) ^ (round as u32) << 24) & 0xffff);
        left = right;
        right = mixed;
        round += 1;
    }
    left << 16 | right
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;

    #[test]
    fn no_id_comes_back_before_all_others_were_given() {
        for secret in [0, 0x0123_4567_89ab_cdef] {
            let ids: std::collections::HashSet<u16> = (0..=u16::MAX).map(|count| id(secret, count)).collect();
            assert_eq!(ids.len(), 1 << 16);
        }
    }

    #[test]
    fn ids_of_ipv6_do_not_come_back_nor_count_up() {
        for secret in [0, 0x0123_4567_89ab_cdef] {
            let ids: std::collections::HashSet<u32> = (0..1 << 18).map(|count| id_v6(secret, count)).collect();
            assert_eq!(ids.len(), 1 << 18);
            assert!((0..100).all(|count| id_v6(secret, count).wrapping_add(1) != id_v6(secret, count + 1)));
        }
        assert!((0..100).all(|count| id_v6(1, count) != id_v6(2, count)));
    }

    #[test]
    fn the_secret_changes_the_order() {
        assert!((0..100).filter(|&count| id(1, count) == id(2, count)).count() < 10);
        assert!((0..100).filter(|&count| id(1, count).wrapping_add(1) == id(1, count + 1)).count() < 10);
    }
}
