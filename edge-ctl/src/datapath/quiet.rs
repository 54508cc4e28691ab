//! When clients are told that their connection is not known: not within 30 s of attaching, or of another edge's loss, since
//! the packets of flows that nobody knows here may yet find the edge that does.

use aya::maps::{Array, MapData, MapError};
use edge_common::midflow::QUIET_SECONDS;

/// The map that says so.
pub struct Quiet(Array<MapData, u64>);

impl Quiet {
    /// Over the pinned map.
    pub fn new(map: Array<MapData, u64>) -> Self {
        Self(map)
    }

    /// Nobody is told anything from `now` (ns of CLOCK_MONOTONIC) on for [`QUIET_SECONDS`].
    ///
    /// # Errors
    /// Where the kernel refuses the write.
    pub fn begin(&mut self, now: u64) -> Result<(), MapError> {
        self.0.set(0, until(now), 0)
    }

    /// Whole seconds left of it at `now` (ns of CLOCK_MONOTONIC); 0 once it is over, or where the program never was attached.
    ///
    /// # Errors
    /// Where the kernel refuses the lookup.
    pub fn left(&self, now: u64) -> Result<u64, MapError> {
        Ok(left(self.0.get(&0, 0)?, now))
    }
}

/// The end of a quiet time that begins at `now`; never 0, which would be for ever.
fn until(now: u64) -> u64 {
    now.saturating_add(QUIET_SECONDS * 1_000_000_000).max(1)
}

/// Begun seconds count.
fn left(until: u64, now: u64) -> u64 {
    until.saturating_sub(now).div_ceil(1_000_000_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quiet_time_lasts_thirty_seconds() {
        assert_eq!(until(5), 30_000_000_005);
        assert_eq!(until(u64::MAX), u64::MAX);
    }

    #[test]
    fn what_is_left_of_a_quiet_time_runs_down_to_nothing_and_one_that_begins_anew_lasts_as_long_again() {
        let second = 1_000_000_000;
        let first = until(7);
        assert_eq!([0, 1, 30, 31].map(|after| left(first, 7 + after * second)), [30, 29, 0, 0]);
        assert_eq!(left(first, 7 + second / 2), 30);
        assert_eq!(left(until(7 + 20 * second), 7 + 20 * second), 30, "another edge lost after 20 s");
        assert_eq!(left(0, second), 0, "never attached");
    }
}
