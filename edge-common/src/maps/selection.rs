//! What selection keeps between two new flows: who is how busy, whose turn it is, and where a client was before.

use super::backend_state;
use crate::address::Wide;

/// Entries of [`super::name::AFFINITY`]: clients that are remembered at once, over all services.
pub const AFFINITY_ENTRIES: u32 = 1 << 16;

/// Key of [`super::name::AFFINITY`]. 24 bytes, alignment 4.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AffinityKey {
    /// The client's address, words in network order; IPv4 as `::ffff:a.b.c.d` (RFC 4291 2.5.5.2).
    pub client: [u32; 4],
    /// Service number.
    pub service: u32,
    /// Zero.
    pub _pad: u32,
}

impl AffinityKey {
    /// The key of a client of a service.
    #[inline(always)]
    pub const fn new(service: u32, client: Wide) -> Self {
        Self { client, service, _pad: 0 }
    }
}

/// Value of [`super::name::AFFINITY`]. 8 bytes, alignment 4.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AffinityEntry {
    /// Backend number.
    pub backend: u32,
    /// When the client last started a flow, seconds of CLOCK_MONOTONIC.
    pub seen: u32,
}

impl AffinityEntry {
    /// True where the client has been away for longer than `timeout` seconds.
    #[inline(always)]
    pub const fn is_over(&self, timeout: u32, now: u32) -> bool {
        // Another CPU may have seen the client a moment later than `now`.
        now.wrapping_sub(self.seen) as i32 > timeout as i32
    }
}

/// Flows that a backend with a limit was given a moment ago and that have not proved themselves: an estimate that decays
/// by itself, since half-open entries are evicted without anybody noticing. 8 bytes, alignment 4.
///
/// CPUs that write it at the same time may lose one of their changes, which is less than what the estimate is off by anyway.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pending {
    /// The tick of the last change, see [`Pending::tick`].
    pub tick: u32,
    /// Flows as of then.
    pub flows: u32,
}

impl Pending {
    /// Ticks of 2^30 ns (1.07 s) from CLOCK_MONOTONIC.
    #[inline(always)]
    pub const fn tick(now_ns: u64) -> u32 {
        (now_ns >> 30) as u32
    }

    /// Flows that still count: half of those of the tick before, none of an older one. A handshake takes less. The clock by
    /// which flows begin is ahead of the coarse one by less than a tick, and may already have noted the next tick.
    #[inline(always)]
    pub const fn at(&self, tick: u32) -> u32 {
        match tick.wrapping_sub(self.tick) {
            0 | u32::MAX => self.flows,
            1 => self.flows / 2,
            _ => 0,
        }
    }

    /// After one more flow has begun.
    #[inline(always)]
    pub const fn begun(self, tick: u32) -> Self {
        Self { tick, flows: self.at(tick).saturating_add(1) }
    }

    /// After one of the flows has been promoted, and is counted as such from now on.
    #[inline(always)]
    pub const fn promoted(self, tick: u32) -> Self {
        Self { tick, flows: self.at(tick).saturating_sub(1) }
    }

    /// How many of them count against `limit`: a quarter of it at most. A burst that arrives at once is held back by them,
    /// while a SYN flood, all of whose flows are pending for ever, can take no more than that quarter from honest clients.
    #[inline(always)]
    pub const fn counted(&self, limit: u32, tick: u32) -> u32 {
        let (flows, most) = (self.at(tick), limit / 4);
        if flows < most { flows } else { most }
    }
}

/// Flows that a backend has: those that its live counter knows (opened less closed, by every CPU) less those that the
/// daemon ended as idle, both modulo 2^32. Each counter has writers of one kind only, so no change is lost, whatever
/// overtakes what; for a moment the difference may be below zero, which is no flow.
#[inline(always)]
pub const fn active(live: u32, expired: u64) -> u32 {
    let flows = live.wrapping_sub(expired as u32) as i32;
    if flows < 0 { 0 } else { flows as u32 }
}

/// A backend's weight for comparing loads, from its state word: weight times share, in hundredths.
#[inline(always)]
pub const fn load_weight(state: u32) -> u64 {
    let weight = (state >> backend_state::WEIGHT_SHIFT) as u64;
    let share = (state >> backend_state::SHARE_SHIFT & backend_state::SHARE_MASK) as u64;
    let share = if share == 0 { 100 } else { share };
    if weight == 0 { share } else { weight * share }
}

/// True where backend `a` is better off than `b`: fewer flows relative to its weight, had it one more. With nothing to do
/// the heavier one is.
#[inline(always)]
pub const fn less_loaded(a: (u32, u32), b: (u32, u32)) -> bool {
    let ((a_flows, a_state), (b_flows, b_state)) = (a, b);
    // At most 2^32 * 2^16 * 100, which fits.
    (a_flows as u64 + 1) * load_weight(b_state) < (b_flows as u64 + 1) * load_weight(a_state)
}

const _: () = {
    assert!(size_of::<AffinityKey>() == 24);
    assert!(size_of::<AffinityEntry>() == 8);
    assert!(size_of::<Pending>() == 8);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pending_flows_decay_within_two_ticks_and_count_up_to_a_quarter() {
        let mut pending = Pending::default();
        for _ in 0..10 {
            pending = pending.begun(7);
        }
        assert_eq!((pending.at(7), pending.at(8), pending.at(9)), (10, 5, 0));
        assert_eq!(pending.promoted(8).at(8), 4);
        assert_eq!((pending.at(6), pending.promoted(6).at(6)), (10, 9), "begun by a clock that is ahead");
        assert_eq!(pending.counted(100, 7), 10);
        assert_eq!(pending.counted(12, 7), 3);
        assert_eq!(
            pending.counted(3, 7),
            0,
            "a backend for few flows is never locked out by what did not prove itself"
        );
    }

    #[test]
    fn an_expiry_that_overtakes_the_opening_counts_as_no_flow() {
        assert_eq!(active(3, 1), 2);
        assert_eq!(active(0, 1), 0);
        assert_eq!(active(5, (1 << 32) + 2), 3);
    }

    #[test]
    fn load_is_relative_to_weight_and_share() {
        let state = |weight: u32, share: u32| weight << 16 | share << 8 | 1;
        assert!(less_loaded((5, state(1, 0)), (6, state(1, 0))));
        assert!(!less_loaded((5, state(1, 0)), (5, state(1, 0))));
        assert!(less_loaded((10, state(3, 0)), (5, state(1, 0))));
        assert!(less_loaded((5, state(1, 100)), (3, state(1, 50))));
        assert!(less_loaded((0, state(2, 0)), (0, state(1, 0))), "idle: the heavier one");
    }

    #[test]
    fn affinity_lasts_for_its_timeout() {
        let entry = AffinityEntry { backend: 1, seen: 100 };
        assert!(!entry.is_over(600, 700));
        assert!(entry.is_over(600, 701));
        assert!(!entry.is_over(600, 99));
    }
}
