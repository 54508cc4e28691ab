//! Weighted round robin as a table: the host writes whose turn it is, the program walks it with one shared cursor.

extern crate alloc;
use alloc::vec::Vec;

/// Most turns in a schedule. Weights whose sum is larger are scaled down.
pub const MOST_TURNS: u32 = 16_381;

/// Pool indices in the order of their turns. Each has as many as its weight says, spread evenly (the smooth weighted round
/// robin of nginx), so that a heavy one never gets all of its turns in a row. Empty where nobody has weight, or where the
/// pool has more than [`MOST_TURNS`] entries.
pub fn turns(weights: &[u32]) -> Vec<u16> {
    let total: u64 = weights.iter().map(|weight| u64::from(*weight)).sum();
    if total == 0 || weights.len() > MOST_TURNS as usize {
        return Vec::new();
    }
    let divisor = weights.iter().fold(0, |divisor, weight| gcd(divisor, *weight)).max(1);
    // Room for one turn that rounding up may give each.
    let room = u64::from(MOST_TURNS) - weights.len() as u64;
    let reduced = total / u64::from(divisor);
    let scale = |weight: u32| {
        let turns = u64::from(weight / divisor);
        if reduced <= u64::from(MOST_TURNS) { turns } else { (turns * room).div_ceil(reduced) }
    };
    let weights: Vec<i64> = weights.iter().map(|weight| scale(*weight) as i64).collect();
    let total: i64 = weights.iter().sum();
    let mut credits: Vec<i64> = weights.iter().map(|_| 0).collect();
    let mut turns = Vec::new();
    for _ in 0..total {
        for (credit, weight) in credits.iter_mut().zip(&weights) {
            *credit += weight;
        }
        // The first of those with the most credit.
        let most = credits.iter().max().copied().unwrap_or(0);
        let next = (0_u16..).zip(&credits).find(|(_, credit)| **credit == most).map_or(0, |(index, _)| index);
        if let Some(credit) = credits.get_mut(usize::from(next)) {
            *credit -= total;
        }
        turns.push(next);
    }
    turns
}

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::vec;

    #[test]
    fn equal_weights_take_turns_one_after_the_other() {
        assert_eq!(turns(&[1, 1, 1]), [0, 1, 2]);
        assert_eq!(turns(&[7, 7]), [0, 1]);
    }

    #[test]
    fn a_heavy_backend_s_turns_are_spread() {
        assert_eq!(turns(&[5, 1, 1]), [0, 0, 1, 0, 2, 0, 0]);
    }

    #[test]
    fn a_weightless_backend_has_no_turn() {
        assert_eq!(turns(&[0, 2, 2]), [1, 2]);
        assert!(turns(&[0, 0]).is_empty());
        assert!(turns(&[]).is_empty());
    }

    #[test]
    fn large_weights_are_scaled_so_that_everybody_keeps_a_turn() {
        let turns = turns(&[65_535, 1, 30_000]);
        assert!(turns.len() <= MOST_TURNS as usize);
        let mut counts = vec![0_u32; 3];
        for turn in &turns {
            counts[usize::from(*turn)] += 1;
        }
        assert_eq!(counts[1], 1);
        let ratio = f64::from(counts[0]) / f64::from(counts[2]);
        assert!((ratio - 65_535.0 / 30_000.0).abs() < 0.01, "{counts:?}");
    }
}
