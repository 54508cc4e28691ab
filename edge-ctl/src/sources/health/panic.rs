//! When checks are not believed any more. Pure.
//!
//! When most of a pool fails at once, the checks (or what they have in common with each other and not with traffic) are
//! as likely to be wrong as the backends, and the few that are left would break under everybody's load. Below the
//! threshold health is therefore ignored, and every backend that is otherwise eligible gets flows. No hysteresis: the
//! verdicts have their own (`fall`, `rise`).

/// True where fewer than `threshold` percent of `total` are healthy. A threshold of 0 never panics; an empty pool has
/// nobody to make eligible.
pub fn panics(healthy: usize, total: usize, threshold: u8) -> bool {
    total > 0 && healthy.saturating_mul(100) < total.saturating_mul(usize::from(threshold))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn panic_begins_strictly_below_the_threshold() {
        assert!(!panics(5, 10, 50));
        assert!(panics(4, 10, 50));
        assert!(!panics(0, 10, 0), "0 turns it off");
        assert!(panics(9, 10, 100));
        assert!(!panics(10, 10, 100));
        assert!(!panics(0, 0, 50), "nobody is there");
    }

    proptest! {
        #[test]
        fn one_more_healthy_backend_never_begins_a_panic(total in 1usize..500, healthy in 0usize..500, threshold in 0u8..=100) {
            let healthy = healthy.min(total - 1);
            prop_assert!(!panics(healthy + 1, total, threshold) || panics(healthy, total, threshold));
            prop_assert!(!panics(total, total, threshold));
        }
    }
}
