//! Benchmarks: what `cargo xtask bench` prints.

pub mod dataplane;

use serde::Serialize;

/// One measured figure.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Figure {
    /// What was measured, as in `dataplane/xdp/full-nat/v4/established-forward/1-flow`.
    pub name: String,
    /// The unit of the numbers.
    pub unit: &'static str,
    /// Best of the runs, net of the baseline.
    pub min: f64,
    /// Median of the runs, net of the baseline.
    pub median: f64,
    /// 99th percentile of the runs, net of the baseline.
    pub p99: f64,
    /// The baseline itself: the minimum of its runs, in the same unit.
    pub baseline: f64,
    /// How many runs.
    pub runs: u32,
}

impl Figure {
    /// A figure from the runs of the thing measured, less the baseline.
    pub fn net(name: String, unit: &'static str, mut runs: Vec<f64>, baseline: f64) -> Self {
        runs.sort_by(f64::total_cmp);
        let at = |share: f64| {
            let last = runs.len().saturating_sub(1);
            runs.get((last as f64 * share).round() as usize).map_or(f64::NAN, |value| value - baseline)
        };
        Self { name, unit, min: at(0.0), median: at(0.5), p99: at(0.99), baseline, runs: runs.len() as u32 }
    }
}
