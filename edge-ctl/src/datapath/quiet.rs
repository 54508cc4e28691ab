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
}

/// The end of a quiet time that begins at `now`; never 0, which would be for ever.
fn until(now: u64) -> u64 {
    now.saturating_add(QUIET_SECONDS * 1_000_000_000).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quiet_time_lasts_thirty_seconds() {
        assert_eq!(until(5), 30_000_000_005);
        assert_eq!(until(u64::MAX), u64::MAX);
    }
}
