//! Totals of the maps as rates, for views that show what happens in a second.

use std::{collections::BTreeMap, ops::Range};

use edge_common::maps::ServiceStats;

/// Connections, bytes in and bytes out per second.
pub type Rate = (f64, f64, f64);

/// Turns totals into rates between two samples, by service number and by backend number.
#[derive(Clone, Debug, Default)]
pub struct Rates {
    services: BTreeMap<u32, (Sample, Rate)>,
    backends: BTreeMap<u32, (Sample, Rate)>,
}

#[derive(Clone, Copy, Debug)]
struct Sample {
    at: f64,
    connections: u64,
    bytes_in: u64,
    bytes_out: u64,
}

impl Rates {
    /// Takes new totals over: of all services, and of the backends with numbers in this range. What changed since the last
    /// time makes the rates. `now` is in seconds of any steady clock. The first sample of a number has rate 0.
    pub fn sample(
        &mut self,
        now: f64,
        services: &BTreeMap<u32, ServiceStats>,
        (range, backends): (Range<u32>, &BTreeMap<u32, ServiceStats>),
    ) {
        self.services.retain(|number, _| services.contains_key(number));
        self.backends.retain(|number, _| !range.contains(number) || backends.contains_key(number));
        for (known, totals) in [(&mut self.services, services), (&mut self.backends, backends)] {
            for (number, stats) in totals {
                let sampled = next(known.get(number), now, stats);
                known.insert(*number, sampled);
            }
        }
    }

    /// The rates of a service.
    pub fn service(&self, number: u32) -> Rate {
        self.services.get(&number).map_or_else(Rate::default, |(_, rate)| *rate)
    }

    /// The rates of a backend.
    pub fn backend(&self, number: u32) -> Rate {
        self.backends.get(&number).map_or_else(Rate::default, |(_, rate)| *rate)
    }
}

fn next(before: Option<&(Sample, Rate)>, now: f64, stats: &ServiceStats) -> (Sample, Rate) {
    let ServiceStats { opened: connections, bytes_in, bytes_out, .. } = *stats;
    let sample = Sample { at: now, connections, bytes_in, bytes_out };
    (sample, rates(before.map(|(sample, _)| sample), &sample))
}

fn rates(before: Option<&Sample>, now: &Sample) -> Rate {
    let Some(before) = before.filter(|before| now.at > before.at) else { return (0.0, 0.0, 0.0) };
    let seconds = now.at - before.at;
    // A counter that went back was started anew with its number.
    let rate = |now: u64, before: u64| now.checked_sub(before).map_or(0.0, |change| change as f64 / seconds);
    (
        rate(now.connections, before.connections),
        rate(now.bytes_in, before.bytes_in),
        rate(now.bytes_out, before.bytes_out),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_what_changed_between_two_samples_and_never_negative() {
        let totals = |opened, bytes_in| BTreeMap::from([(1, ServiceStats { opened, bytes_in, ..Default::default() })]);
        let none = &BTreeMap::new();
        let mut rates = Rates::default();
        rates.sample(5.0, &totals(10, 1000), (0..10, none));
        assert_eq!(rates.service(1), (0.0, 0.0, 0.0));
        rates.sample(7.0, &totals(30, 2000), (0..10, none));
        assert_eq!(rates.service(1), (10.0, 500.0, 0.0));
        rates.sample(8.0, &totals(1, 3000), (0..10, none));
        assert_eq!(rates.service(1), (0.0, 1000.0, 0.0));
        assert_eq!(rates.backend(1), (0.0, 0.0, 0.0), "services and backends have numbers of their own");
    }
    #[test]
    fn a_backend_that_is_not_looked_at_keeps_its_rate_until_its_next_turn() {
        let totals = |number, opened| BTreeMap::from([(number, ServiceStats { opened, ..Default::default() })]);
        let none = &BTreeMap::new();
        let mut rates = Rates::default();
        rates.sample(0.0, none, (0..10, &totals(3, 10)));
        rates.sample(1.0, none, (10..20, &totals(13, 5)));
        rates.sample(2.0, none, (0..10, &totals(3, 30)));
        rates.sample(3.0, none, (10..20, &totals(13, 5)));
        assert_eq!(
            (rates.backend(3).0, rates.backend(13).0),
            (10.0, 0.0),
            "20 connections in the 2 s between its turns"
        );
        rates.sample(4.0, none, (0..10, none));
        assert_eq!(rates.backend(3).0, 0.0, "its number is free");
    }
}
