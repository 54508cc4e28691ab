//! How full the SNAT ports of a source address towards a backend are, and when that is alarming. Pure.

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Serialize};

/// How alarming a fill is. A level is left only some way below where it was entered, so that a fill that swings around a
/// threshold is one alarm.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SnatLevel {
    /// Below 75 %, or not yet: nothing to do.
    #[default]
    Ok,
    /// From 75 %, until below 70 %: about one new flow of a hundred finds no port.
    Warning,
    /// From 90 %, until below 85 %: about one of five finds none.
    Critical,
}

impl SnatLevel {
    /// Level, where it is entered and below which it is left, percent.
    const THRESHOLDS: [(Self, u64, u64); 2] = [(Self::Critical, 90, 85), (Self::Warning, 75, 70)];

    /// The level that follows this one at a fill of `used` of `allowed` ports. No port at all is as bad as none left.
    #[must_use]
    pub fn next(self, used: u64, allowed: u64) -> Self {
        let at_least = |percent: u64| used.saturating_mul(100) >= allowed.saturating_mul(percent);
        let holds = |(level, enter, leave): &(Self, u64, u64)| at_least(if self >= *level { *leave } else { *enter });
        Self::THRESHOLDS.iter().find(|threshold| holds(threshold)).map_or(Self::Ok, |(level, ..)| *level)
    }

    /// For a metric: 0 ok, 1 warning, 2 critical.
    pub const fn number(self) -> u64 {
        self as u64
    }
}

impl fmt::Display for SnatLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Critical => "critical",
        })
    }
}

/// SNAT ports of one source address towards one backend, as of the last walk over the flow tables.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnatRow {
    /// The source address.
    pub address: String,
    /// Ports in use.
    pub used: u64,
    /// Ports that may be used.
    pub allowed: u64,
    /// `ok`, `warning`, `critical`.
    pub level: SnatLevel,
}

impl SnatRow {
    /// Percent in use, rounded down; 100 where no port may be used.
    pub const fn percent(&self) -> u64 {
        match self.used.saturating_mul(100).checked_div(self.allowed) {
            Some(percent) => percent,
            None => 100,
        }
    }
}

/// The levels in force, by whatever tells the fills apart.
#[derive(Clone, Debug)]
pub struct SnatAlarms<K> {
    levels: BTreeMap<K, SnatLevel>,
}

impl<K> Default for SnatAlarms<K> {
    fn default() -> Self {
        Self { levels: BTreeMap::new() }
    }
}

impl<K: Ord + Copy> SnatAlarms<K> {
    /// Takes the fills (used, allowed) of a walk in; those it did not see are forgotten. Returns what changed: key, level
    /// before and from now on.
    pub fn update(&mut self, fills: impl IntoIterator<Item = (K, u64, u64)>) -> Vec<(K, SnatLevel, SnatLevel)> {
        let before = std::mem::take(&mut self.levels);
        let mut changes = Vec::new();
        for (key, used, allowed) in fills {
            let was = before.get(&key).copied().unwrap_or_default();
            let is = was.next(used, allowed);
            if is != was {
                changes.push((key, was, is));
            }
            self.levels.insert(key, is);
        }
        changes
    }

    /// The level of a fill.
    pub fn level(&self, key: &K) -> SnatLevel {
        self.levels.get(key).copied().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alarms_are_raised_at_75_and_90_percent_and_cleared_five_below() {
        let mut alarms = SnatAlarms::default();
        let mut at = |used| {
            alarms.update([('a', used, 1000)]);
            alarms.level(&'a')
        };
        let fills = [(749, "ok"), (750, "warning"), (700, "warning"), (699, "ok"), (749, "ok"), (900, "critical")];
        let rest = [(850, "critical"), (849, "warning"), (899, "warning"), (1000, "critical"), (0, "ok")];
        for (used, level) in fills.into_iter().chain(rest) {
            assert_eq!(at(used).to_string(), level, "{used}");
        }
    }

    #[test]
    fn each_change_is_told_once_and_a_fill_that_is_gone_is_forgotten() {
        let mut alarms = SnatAlarms::default();
        assert_eq!(alarms.update([(1, 80, 100), (2, 0, 100)]), [(1, SnatLevel::Ok, SnatLevel::Warning)]);
        assert!(alarms.update([(1, 79, 100)]).is_empty());
        assert!(alarms.update([]).is_empty());
        assert_eq!(alarms.level(&1), SnatLevel::Ok);
    }

    #[test]
    fn no_port_at_all_is_critical() {
        assert_eq!(SnatLevel::Ok.next(0, 0), SnatLevel::Critical);
        assert_eq!(SnatRow::default().percent(), 100);
    }
}
