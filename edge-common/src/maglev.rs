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
