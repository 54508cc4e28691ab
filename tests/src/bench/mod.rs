//! The benchmarks: dataplane figures and end-to-end figures, printed as one table or written as JSON.

pub mod bgp;
pub mod dataplane;
pub mod e2e;
pub mod health;
pub mod pools;

use std::{fs, os::unix::net::UnixDatagram, path::Path, process::Command, time::Duration};

use anyhow::{Context, Result};
use serde::Serialize;

use crate::lab::exec;

/// From `sysconf(_SC_CLK_TCK)`, which is 100 on every Linux that we run on.
const TICKS: f64 = 100.0;

/// Which benchmarks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// The program, packet by packet.
    Dataplane,
    /// Through the lab.
    EndToEnd,
    /// Health checks at scale.
    Health,
    /// Many services with many backends.
    Pools,
    /// A table of so many prefixes by BGP.
    Bgp(u32),
}

/// Longest that a daemon may take to become ready.
const READY_WITHIN: Duration = Duration::from_secs(60);

/// A socket for what a daemon tells its service manager.
fn service_manager(path: &Path) -> Result<UnixDatagram> {
    let manager =
        UnixDatagram::bind(path).with_context(|| format!("listen as the service manager at {}", path.display()))?;
    manager.set_read_timeout(Some(READY_WITHIN))?;
    Ok(manager)
}

/// Waits until the daemon says that it is ready: its program is attached and the maps hold what they should.
fn await_ready(manager: &UnixDatagram, log: &Path) -> Result<()> {
    let mut message = [0; 256];
    loop {
        let length = manager.recv(&mut message).with_context(|| {
            format!("the daemon did not become ready: {}", fs::read_to_string(log).unwrap_or_default())
        })?;
        if String::from_utf8_lossy(&message[..length]).lines().any(|line| line == "READY=1") {
            return Ok(());
        }
    }
}

/// One measured figure.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Figure {
    /// Its name, `e2e/edge/requests`.
    pub name: String,
    /// `ns/packet`, `1/s`.
    pub unit: &'static str,
    /// Smallest of the runs.
    pub min: f64,
    /// Median of the runs.
    pub median: f64,
    /// 99th percentile of the runs.
    pub p99: f64,
    /// What was subtracted, in the same unit; 0 where nothing was.
    pub baseline: f64,
    /// Number of runs.
    pub runs: u32,
    /// Median relative to plain routing, where that makes sense.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ratio: Option<f64>,
    /// Share of established packets that the flow cache served.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hit_rate: Option<f64>,
    /// Lookups in the established table per packet, as the program counts them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lookups: Option<f64>,
}

impl Figure {
    /// A figure from the runs of the thing measured, less the baseline. Without runs its numbers are NaN.
    pub fn net(name: String, unit: &'static str, mut runs: Vec<f64>, baseline: f64) -> Self {
        runs.sort_by(f64::total_cmp);
        let at = |share: f64| {
            let last = runs.len().saturating_sub(1);
            runs.get((last as f64 * share).round() as usize).map_or(f64::NAN, |value| value - baseline)
        };
        let (min, median, p99) = (at(0.0), at(0.5), at(0.99));
        Self {
            name,
            unit,
            min,
            median,
            p99,
            baseline,
            runs: runs.len() as u32,
            ratio: None,
            hit_rate: None,
            lookups: None,
        }
    }
}

/// Runs the benchmarks (of the dataplane those whose name contains `only`), prints the table, and writes the figures to `json` where asked.
///
/// # Errors
/// Where a benchmark cannot run or the file cannot be written.
pub fn run_and_print(what: What, only: &str, json: Option<&Path>) -> Result<()> {
    let figures = match what {
        What::EndToEnd => e2e::run()?,
        What::Health => health::run()?,
        What::Pools => pools::run()?,
        What::Bgp(routes) => bgp::run(routes)?,
        What::Dataplane => dataplane::run(only)?,
    };
    print(&figures);
    if let Some(path) = json {
        let text = serde_json::to_string_pretty(&figures)?;
        fs::write(path, text + "\n").with_context(|| format!("write {}", path.display()))?;
        println!("written to {}", path.display());
    }
    Ok(())
}

/// A namespace that is removed when dropped.
struct Namespace(String);

impl Namespace {
    fn make(what: &str) -> Result<Self> {
        let namespace = Self(format!("eb{:x}-{what}", std::process::id()));
        exec::run(Command::new("ip").args(["netns", "add", &namespace.0]))?;
        Ok(namespace)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if let Err(error) = exec::run(Command::new("ip").args(["netns", "del", &self.0])) {
            eprintln!("{error:#}");
        }
    }
}

/// User and system time in the text of a `stat` file, clock ticks.
fn ticks_of(stat: &str) -> Option<u64> {
    // proc(5): utime and stime are fields 14 and 15; the state, after the name, is field 3.
    let (_, tail) = stat.rsplit_once(')')?;
    Some(tail.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum())
}

fn print(figures: &[Figure]) {
    println!(
        "{:<62} {:>8} {:>8} {:>8} {:>8} {:>4} {:>5} {:>6} {:>7}  UNIT",
        "NAME", "MIN", "MEDIAN", "P99", "BASELINE", "RUNS", "RATIO", "HITS", "LOOKUPS"
    );
    for figure in figures {
        let or_none =
            |value: Option<f64>, digits: usize| value.map_or("-".to_owned(), |value| format!("{value:.digits$}"));
        let (ratio, hits, lookups) =
            (or_none(figure.ratio, 2), or_none(figure.hit_rate, 3), or_none(figure.lookups, 3));
        let [min, median, p99, baseline] = [figure.min, figure.median, figure.p99, figure.baseline].map(number);
        println!(
            "{:<62} {min:>8} {median:>8} {p99:>8} {baseline:>8} {:>4} {ratio:>5} {hits:>6} {lookups:>7}  {}",
            figure.name, figure.runs, figure.unit
        );
    }
}

/// CPU seconds per request are millionths.
fn number(value: f64) -> String {
    if value != 0.0 && value.abs() < 0.01 { format!("{value:.2e}") } else { format!("{value:.1}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_figures_are_printed_with_their_digits() {
        assert_eq!([0.0, 21.04, 5.25e-6].map(number), ["0.0", "21.0", "5.25e-6"]);
    }

    #[test]
    fn a_figure_holds_the_order_statistics_of_its_runs_less_the_baseline() {
        let figure = Figure::net("x".to_owned(), "ns", vec![5.0, 1.0, 3.0], 0.5);
        assert_eq!((figure.min, figure.median, figure.p99, figure.runs), (0.5, 2.5, 4.5, 3));
    }

    #[test]
    fn a_figure_without_runs_is_no_number_and_no_panic() {
        assert!(Figure::net("x".to_owned(), "ns", Vec::new(), 0.0).median.is_nan());
    }
}
