//! Limits of what one source may do: rates, and half-open flows. Pure.

use crate::maps::mapped;

const SECOND: u64 = 1_000_000_000;

/// The source that limits count for: an IPv4 address as it is, of an IPv6 address the first 64 bits, since a host has
/// that many addresses to choose from (RFC 6177, RFC 8981).
#[inline(always)]
pub const fn source(address: [u32; 4]) -> [u32; 4] {
    let [a, b, c, _] = address;
    let [x, y, z, _] = mapped(0);
    if a == x && b == y && c == z { address } else { [a, b, 0, 0] }
}

/// A token bucket in one word, the generic cell rate algorithm (ITU-T I.371): `state` is the moment, ns, since which the
/// bucket has been filling, empty then; a new source's is 0. The next state where there is a token left at `now` (ns of any clock that only goes
/// forward), `None` where there is none.
///
/// One word can be read and written whole: CPUs that do so at the same time may both take the same token, and no more.
#[inline(always)]
pub const fn take(state: u64, now: u64, rate: u32, burst: u32) -> Option<u64> {
    if rate == 0 {
        return Some(state);
    }
    let interval = SECOND / rate as u64;
    let depth = interval * burst as u64;
    // Time before now - depth is a bucket that has been full for a while, and holds no more for that.
    let full = now.saturating_sub(depth);
    let next = if state > full { state } else { full } + interval;
    // A state far ahead can only come from a rate that was lower: it counts as an empty bucket of this one.
    let next = if next > now + depth + interval { now + interval } else { next };
    if next > now { None } else { Some(next) }
}

/// Half-open flows of a source, approximately: those opened in this window and in the one before, less those that were
/// promoted or closed. A window is as long as a half-open flow lives.
///
/// Evicted and expired entries tell nobody, so they are counted until their window has passed: a flow counts at least
/// as long as it lives unrepeated, and at most twice that. CPUs that count at the same time may lose a count.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HalfOpen {
    /// Number of the window that `now` counts.
    pub window: u32,
    /// Flows opened in it that are half-open yet.
    pub now: u32,
    /// The same of the window before.
    pub before: u32,
}

impl HalfOpen {
    /// The number of the window at `at` ns, where half-open flows live for `timeout` seconds.
    #[inline(always)]
    pub const fn window(at: u64, timeout: u32) -> u32 {
        let timeout = if timeout == 0 { 1 } else { timeout };
        (at / SECOND / timeout as u64) as u32
    }

    /// Half-open flows at `window`.
    #[inline(always)]
    pub const fn count(&mut self, window: u32) -> u32 {
        match window.wrapping_sub(self.window) {
            0 => {}
            1 => (self.before, self.now) = (self.now, 0),
            _ => (self.before, self.now) = (0, 0),
        }
        self.window = window;
        self.now.saturating_add(self.before)
    }

    /// A flow was opened.
    #[inline(always)]
    pub const fn opened(&mut self, window: u32) {
        self.count(window);
        self.now = self.now.saturating_add(1);
    }

    /// A flow that was opened in `opened` is half-open no longer.
    #[inline(always)]
    pub const fn ended(&mut self, opened: u32, window: u32) {
        self.count(window);
        match window.wrapping_sub(opened) {
            0 => self.now = self.now.saturating_sub(1),
            1 => self.before = self.before.saturating_sub(1),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    /// How many of `tries` at `now` succeed.
    fn taken(state: &mut u64, now: u64, rate: u32, burst: u32, tries: u32) -> u32 {
        let mut taken = 0;
        for _ in 0..tries {
            if let Some(next) = take(*state, now, rate, burst) {
                *state = next;
                taken += 1;
            }
        }
        taken
    }

    #[test]
    fn a_new_source_may_do_its_burst_and_then_its_rate() {
        let mut state = 0;
        let start = 5 * SECOND;
        assert_eq!(taken(&mut state, start, 100, 20, 50), 20);
        assert_eq!(taken(&mut state, start + 9 * MS, 100, 20, 50), 0, "a token takes 10 ms");
        assert_eq!(taken(&mut state, start + 10 * MS, 100, 20, 50), 1);
        assert_eq!(taken(&mut state, start + 60 * MS, 100, 20, 50), 5);
        assert_eq!(taken(&mut state, start + 60 * SECOND, 100, 20, 50), 20, "no more than the burst is saved up");
    }

    #[test]
    fn over_a_long_time_the_rate_holds_whatever_the_attempts() {
        let mut state = 0;
        let total: u32 = (0..10_000).map(|ms| taken(&mut state, SECOND + ms * MS, 250, 10, 7)).sum();
        assert!((2_500..=2_511).contains(&total), "{total}");
    }

    #[test]
    fn a_bucket_of_a_lower_rate_does_not_lock_its_source_out_of_a_higher_one() {
        let mut state = 0;
        assert_eq!(taken(&mut state, 1000 * SECOND, 1, 500, 1000), 500);
        let mut clock = state;
        clock += 100 * SECOND;
        assert_eq!(taken(&mut clock, 1000 * SECOND, 1000, 1, 3), 0);
        assert_eq!(taken(&mut state, 1000 * SECOND + 2 * MS, 1000, 1, 3), 1);
    }

    #[test]
    fn no_rate_is_no_limit() {
        assert_eq!(taken(&mut 0, 0, 0, 0, 100), 100);
    }

    #[test]
    fn half_open_flows_count_for_one_to_two_windows_or_until_they_end() {
        let mut flows = HalfOpen::default();
        let window = |seconds: u64| HalfOpen::window(seconds * SECOND, 60);
        for _ in 0..5 {
            flows.opened(window(119));
        }
        assert_eq!(flows.count(window(120)), 5, "the window has just passed, the flows have not");
        flows.ended(window(119), window(125));
        flows.opened(window(130));
        assert_eq!(flows.count(window(130)), 5);
        flows.ended(window(130), window(131));
        assert_eq!(flows.count(window(179)), 4);
        assert_eq!(flows.count(window(180)), 0, "nobody said that those four ended");
    }

    #[test]
    fn an_end_that_is_told_twice_or_too_late_takes_nothing_from_others() {
        let mut flows = HalfOpen::default();
        flows.opened(7);
        flows.ended(6, 7);
        flows.ended(3, 7);
        assert_eq!(flows.count(7), 1);
        flows.ended(7, 7);
        flows.ended(7, 7);
        assert_eq!(flows.count(7), 0);
        flows.opened(7);
        assert_eq!(flows.count(100), 0);
    }

    #[test]
    fn an_ipv6_source_is_its_first_64_bits_and_an_ipv4_source_all_of_its_address() {
        assert_eq!(source([1, 2, 3, 4]), [1, 2, 0, 0]);
        assert_eq!(source(mapped(9)), mapped(9));
        assert_ne!(source(mapped(9)), source(mapped(8)));
    }
}
