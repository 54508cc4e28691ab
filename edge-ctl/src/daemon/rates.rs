//! Rates per second out of counters that only grow. Pure: time is an argument.

use std::{collections::BTreeMap, time::Instant};

/// Counters of one row.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Counters {
    /// Flows opened.
    pub connections: u64,
    /// Bytes from clients.
    pub bytes_in: u64,
    /// Bytes to clients.
    pub bytes_out: u64,
}

/// Their growth, per second.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rate {
    /// New flows.
    pub connections: f64,
    /// Bytes from clients.
    pub bytes_in: f64,
    /// Bytes to clients.
    pub bytes_out: f64,
}

/// The newest rate of every row, by any text that names the row.
#[derive(Debug, Default)]
pub struct Rates {
    last: Option<(Instant, BTreeMap<String, Counters>)>,
    rates: BTreeMap<String, Rate>,
}

impl Rates {
    /// Takes a sample of all rows; rates are those since the sample before.
    pub fn sample(&mut self, now: Instant, rows: BTreeMap<String, Counters>) {
        if let Some((before, old)) = &self.last {
            let seconds = now.saturating_duration_since(*before).as_secs_f64();
            if seconds <= 0.0 {
                return;
            }
            let rate = |new: u64, old: u64| new.saturating_sub(old) as f64 / seconds;
            self.rates = rows
                .iter()
                .map(|(name, new)| {
                    // A row that was not there before started from nothing known: its rate shows with the next sample.
                    let old = old.get(name).unwrap_or(new);
                    let rate = Rate {
                        connections: rate(new.connections, old.connections),
                        bytes_in: rate(new.bytes_in, old.bytes_in),
                        bytes_out: rate(new.bytes_out, old.bytes_out),
                    };
                    (name.clone(), rate)
                })
                .collect();
        }
        self.last = Some((now, rows));
    }

    /// The newest rate of a row; zero where it is not known.
    pub fn get(&self, name: &str) -> Rate {
        self.rates.get(name).copied().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn rows(connections: u64) -> BTreeMap<String, Counters> {
        BTreeMap::from([("web".to_owned(), Counters { connections, bytes_in: connections * 100, bytes_out: 0 })])
    }

    #[test]
    fn a_rate_is_growth_over_the_time_between_samples() {
        let (mut rates, start) = (Rates::default(), Instant::now());
        rates.sample(start, rows(10));
        assert_eq!(rates.get("web"), Rate::default());
        rates.sample(start + Duration::from_secs(2), rows(30));
        assert_eq!(rates.get("web"), Rate { connections: 10.0, bytes_in: 1000.0, bytes_out: 0.0 });
    }

    #[test]
    fn a_counter_that_went_back_and_a_new_row_have_no_rate() {
        let (mut rates, start) = (Rates::default(), Instant::now());
        rates.sample(start, rows(10));
        rates.sample(start + Duration::from_secs(1), rows(5));
        assert_eq!(rates.get("web").connections, 0.0);
        assert_eq!(rates.get("new"), Rate::default());
    }
}
