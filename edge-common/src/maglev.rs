//! Weighted Maglev hashing (Eisenbud et al., NSDI 2016): the host fills a table, the program looks a slot up.

/// Table sizes, all prime; see [`table_len`].
pub const SIZES: [u32; 5] = [1021, 4093, 16381, 32749, 65537];

/// The table size for a pool: at least a hundred slots a backend, so that shares differ by a percent or so, and at
/// most the largest size.
pub const fn table_len(pool: usize) -> u32 {
    let mut i = 0;
    while i + 1 < SIZES.len() && (SIZES[i] as usize) < pool.saturating_mul(100) {
        i += 1;
    }
    SIZES[i]
}

/// The slot of a hash. `table_len` must not be 0.
#[inline(always)]
pub const fn slot(hash: u64, table_len: u32) -> u32 {
    (hash % table_len as u64) as u32
}

#[cfg(any(feature = "user", test))]
pub use fill::{Candidate, fill};

#[cfg(any(feature = "user", test))]
mod fill {
    extern crate alloc;
    use crate::hash::siphash13;
    use alloc::{vec, vec::Vec};

    /// A backend as Maglev sees it.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Candidate {
        /// What all edges of a group call this backend: address and port, never an edge's own number for it.
        pub identity: u64,
        /// Relative share of new flows; 0 gives it none.
        pub weight: u32,
    }

    struct Preference {
        index: u16,
        next: u64,
        skip: u64,
        weight: u64,
        credit: u64,
    }

    const EMPTY: u16 = u16::MAX;

    /// A table of `table_len` pool indices (positions in `pool`), the same on every edge that has the seed whatever
    /// the order of the pool. Empty where no candidate has weight, where the pool has more than 65,535 entries, or
    /// where `table_len` is below 2.
    pub fn fill(seed: [u64; 2], pool: &[Candidate], table_len: u32) -> Vec<u16> {
        let Some(heaviest) = pool.iter().map(|c| c.weight).max().filter(|weight| *weight > 0) else {
            return Vec::new();
        };
        if pool.len() > usize::from(EMPTY) || table_len < 2 {
            return Vec::new();
        }
        let len = u64::from(table_len);
        let mut order: Vec<(u64, u16, u32)> = (0u16..).zip(pool).map(|(i, c)| (c.identity, i, c.weight)).collect();
        order.sort_unstable();
        let mut preferences: Vec<Preference> = order
            .into_iter()
            .filter(|(_, _, weight)| *weight > 0)
            .map(|(identity, index, weight)| Preference {
                index,
                next: siphash13(seed, [identity, 1]) % len,
                skip: siphash13(seed, [identity, 2]) % (len - 1) + 1,
                weight: u64::from(weight),
                credit: 0,
            })
            .collect();
        let mut table = vec![EMPTY; table_len as usize];
        let mut left = table_len;
        loop {
            for preference in &mut preferences {
                // The heaviest takes a slot every round, the others when their credit has added up to one.
                preference.credit += preference.weight;
                if preference.credit < u64::from(heaviest) {
                    continue;
                }
                preference.credit -= u64::from(heaviest);
                // The table size is prime, so the walk meets every slot; one is free while `left` is not 0.
                while table.get(preference.next as usize).is_some_and(|slot| *slot != EMPTY) {
                    preference.next = (preference.next + preference.skip) % len;
                }
                if let Some(slot) = table.get_mut(preference.next as usize) {
                    *slot = preference.index;
                }
                left -= 1;
                if left == 0 {
                    return table;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use proptest::prelude::*;
    use std::{vec, vec::Vec};

    fn pool(n: u64) -> Vec<Candidate> {
        (0..n).map(|i| Candidate { identity: 0x0a01_0004_0000 + (i << 16) + 443, weight: 1 }).collect()
    }

    fn shares(table: &[u16], pool: usize) -> Vec<f64> {
        let mut counts = vec![0u32; pool];
        for index in table {
            counts[usize::from(*index)] += 1;
        }
        counts.iter().map(|count| f64::from(*count) / table.len() as f64).collect()
    }

    /// Pool sizes with the share of the other backends' slots that moves when one backend goes, in a table of 65537: the
    /// largest of 20 seeds that was measured with the published algorithm.
    const MOVED: [(u64, f64); 4] = [(3, 0.0011), (10, 0.0032), (100, 0.0064), (500, 0.0097)];

    /// For each of 20 seeds, the share of the slots that neither pool gives to backend `one` and that move between a pool
    /// of `n` and the same without it.
    fn disruption(n: u64, len: u32) -> Vec<f64> {
        (0..20u64)
            .map(|seed| {
                let one = seed % n;
                let whole = pool(n);
                let less: Vec<Candidate> =
                    whole.iter().copied().enumerate().filter(|(i, _)| *i as u64 != one).map(|(_, c)| c).collect();
                let (with, without) = (fill([seed, 1], &whole, len), fill([seed, 1], &less, len));
                let mut kept = 0;
                let mut moved = 0;
                for (with, without) in with.iter().zip(&without) {
                    if u64::from(*with) != one {
                        kept += 1;
                        moved += u32::from(whole[usize::from(*with)] != less[usize::from(*without)]);
                    }
                }
                f64::from(moved) / f64::from(kept)
            })
            .collect()
    }

    #[test]
    fn removing_a_backend_moves_few_slots_of_the_others() {
        for (n, most) in MOVED {
            let moved = disruption(n, 65537);
            judge(n, &moved, most);
        }
    }

    #[test]
    fn adding_a_backend_takes_its_share_and_moves_as_few_slots_of_the_others() {
        for (n, most) in MOVED {
            let one = |seed| {
                let (old, new) = (fill([seed, 1], &pool(n), 65537), fill([seed, 1], &pool(n + 1), 65537));
                let pairs = || old.iter().zip(&new).map(|(old, new)| (u64::from(*old), u64::from(*new)));
                let taken = pairs().filter(|(_, new)| *new == n).count() as f64;
                let share = taken * (n + 1) as f64 / 65537.0;
                assert!((share - 1.0).abs() < 0.05, "{n} backends, seed {seed}: the new one has {share} of its share");
                pairs().filter(|(old, new)| *new != n && old != new).count() as f64 / (65537.0 - taken)
            };
            judge(n, &(0..20).map(one).collect::<Vec<_>>(), most);
        }
    }

    /// The mean of 20 seeds lies below the largest of other 20 that was published; the largest of these ones has a tail (two
    /// backends whose walks run into each other), and stays within twice that.
    fn judge(n: u64, moved: &[f64], most: f64) {
        let mean = moved.iter().sum::<f64>() / moved.len() as f64;
        let largest = moved.iter().copied().fold(0.0, f64::max);
        std::println!("{n} backends: {:.3} % on average, {:.3} % at most", mean * 100.0, largest * 100.0);
        assert!(mean < most, "{n} backends: {mean} on average");
        assert!(largest < 2.0 * most, "{n} backends: {moved:?}");
    }

    #[test]
    fn equal_backends_get_equal_shares() {
        for n in [1u64, 3, 10, 100] {
            let len = table_len(n as usize);
            for share in shares(&fill([1, 2], &pool(n), len), n as usize) {
                assert!((share * n as f64 - 1.0).abs() < 0.03, "{n} backends in {len} slots: {share}");
            }
        }
    }

    #[test]
    fn every_size_is_prime_and_follows_the_pool() {
        for size in SIZES {
            assert!((2..size).take_while(|d| d * d <= size).all(|d| size % d != 0), "{size}");
        }
        assert_eq!(
            [1, 10, 11, 40, 163, 327, 328, 60_000].map(table_len),
            [1021, 1021, 4093, 4093, 16381, 32749, 65537, 65537]
        );
    }

    #[test]
    fn a_pool_without_weight_has_no_table() {
        assert!(fill([0, 0], &[], 1021).is_empty());
        assert!(fill([0, 0], &[Candidate { identity: 1, weight: 0 }], 1021).is_empty());
        assert!(fill([0, 0], &pool(3), 1).is_empty());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn shares_follow_the_weights(weights in proptest::collection::vec(0u32..=10, 1..12), seed in any::<[u64; 2]>()) {
            prop_assume!(weights.iter().any(|weight| *weight > 0));
            let candidates: Vec<Candidate> =
                weights.iter().zip(7u64..).map(|(weight, identity)| Candidate { identity, weight: *weight }).collect();
            let total: u32 = weights.iter().sum();
            for (share, weight) in shares(&fill(seed, &candidates, 4093), weights.len()).iter().zip(&weights) {
                let expected = f64::from(*weight) / f64::from(total);
                prop_assert!((share - expected).abs() < 0.01, "weight {} of {}: {}", weight, total, share);
            }
        }

        #[test]
        fn the_order_of_the_pool_does_not_matter(n in 1u64..20, turn in 0usize..20, seed in any::<[u64; 2]>()) {
            let one = pool(n);
            let mut other = one.clone();
            other.rotate_left(turn % one.len());
            other.reverse();
            let named = |pool: &[Candidate]| -> Vec<u64> {
                fill(seed, pool, 1021).iter().map(|index| pool[usize::from(*index)].identity).collect()
            };
            prop_assert_eq!(named(&one), named(&other));
        }

        #[test]
        fn every_hash_has_a_slot(hash in any::<u64>()) {
            for size in SIZES {
                prop_assert!(slot(hash, size) < size);
            }
        }
    }
}
