//! Which CPUs have a part of the flow cache: those that receive packets of established flows. Pure; looked at once in a while
//! with the counters of all CPUs.
//!
//! A CPU that turns up has a part at once. One that was given a part and receives nothing for long gives it to the others: fewer
//! receiving CPUs have bigger parts.

use std::collections::{BTreeMap, BTreeSet};

use super::cache::CpuCache;

/// Looks without packets after which a CPU loses its part.
const IDLE_LOOKS: u32 = 60;
/// Fewest packets between two looks that say anything.
const TELLING: u64 = 10_000;
/// A CPU with less than this share of all packets, one in so many, does not count as receiving.
const SHARE: u64 = 1000;

/// What earlier looks saw.
#[derive(Debug, Default)]
pub struct Receivers {
    packets: BTreeMap<u32, u64>,
    idle: BTreeMap<u32, u32>,
}

impl Receivers {
    /// The CPUs that should have a part from now on, where those are others than have one.
    pub fn look(&mut self, now: &[CpuCache]) -> Option<Vec<u32>> {
        let known = !self.packets.is_empty();
        let since: BTreeMap<u32, u64> = now
            .iter()
            .map(|cpu| {
                let packets = cpu.hits.wrapping_add(cpu.misses);
                (cpu.cpu, packets.wrapping_sub(self.packets.insert(cpu.cpu, packets).unwrap_or(0)))
            })
            .collect();
        let total: u64 = since.values().sum();
        let split: BTreeSet<u32> = now.iter().filter(|cpu| cpu.bytes != 0).map(|cpu| cpu.cpu).collect();
        // Without a cache there is nothing to split, and the first look tells nothing of a rate.
        if split.is_empty() || !known || total < TELLING {
            return None;
        }
        let receiving: BTreeSet<u32> = since
            .into_iter()
            .filter(|(_, packets)| packets.saturating_mul(SHARE) >= total)
            .map(|(cpu, _)| cpu)
            .collect();
        for cpu in &split {
            let idle = self.idle.entry(*cpu).or_default();
            *idle = if receiving.contains(cpu) { 0 } else { idle.saturating_add(1) };
        }
        let stays = |cpu: &&u32| self.idle.get(cpu).is_none_or(|idle| *idle < IDLE_LOOKS);
        let wanted: BTreeSet<u32> = split.iter().filter(stays).chain(&receiving).copied().collect();
        (wanted != split).then(|| wanted.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Counters after so many packets on each CPU, of which those in `split` have a part.
    fn cpus(packets: &[u64], split: &[u32]) -> Vec<CpuCache> {
        let row = |(cpu, packets): (u32, &u64)| CpuCache {
            cpu,
            bytes: u64::from(split.contains(&cpu)) * 4096,
            hits: *packets / 2,
            misses: *packets - *packets / 2,
            ..CpuCache::default()
        };
        (0..).zip(packets).map(row).collect()
    }

    #[test]
    fn a_cpu_that_starts_to_receive_has_a_part_at_the_next_look() {
        let mut receivers = Receivers::default();
        assert_eq!(receivers.look(&cpus(&[0, 0, 0], &[0, 1])), None);
        assert_eq!(receivers.look(&cpus(&[100_000, 100_000, 0], &[0, 1])), None);
        assert_eq!(receivers.look(&cpus(&[200_000, 200_000, 90_000], &[0, 1])), Some(vec![0, 1, 2]));
    }

    #[test]
    fn a_cpu_that_receives_nothing_for_long_gives_its_part_to_the_others() {
        let mut receivers = Receivers::default();
        receivers.look(&cpus(&[0, 0], &[0, 1]));
        for look in 1..u64::from(IDLE_LOOKS) {
            assert_eq!(receivers.look(&cpus(&[look * 100_000, 3], &[0, 1])), None, "{look}");
        }
        let look = u64::from(IDLE_LOOKS);
        assert_eq!(receivers.look(&cpus(&[look * 100_000, 3], &[0, 1])), Some(vec![0]));
        assert_eq!(receivers.look(&cpus(&[(look + 1) * 100_000, 3], &[0])), None);
    }

    #[test]
    fn few_packets_and_a_cache_that_is_off_change_nothing() {
        let mut receivers = Receivers::default();
        receivers.look(&cpus(&[0, 0], &[0]));
        assert_eq!(receivers.look(&cpus(&[0, 9_000], &[0])), None);
        assert_eq!(receivers.look(&cpus(&[0, 900_000], &[])), None);
    }
}
