//! What becomes of connections that the edge does not know (any longer), for the scenarios.

use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use aya::maps::{Array, MapData};
use edge_common::maps::name;
use edge_ctl::datapath::{
    object::EBPF_OBJECT,
    pins::{self, Pins},
};
use serde_json::Value;

use crate::lab::Lab;

/// Ends the quiet time that began with attaching, as if that were long ago.
///
/// # Errors
/// Where the map is not there.
pub fn end_quiet_time(lab: &Lab) -> Result<()> {
    let pins = Pins::new(&lab.pins(), EBPF_OBJECT)?;
    let mut map: Array<MapData, u64> = pins::open(&pins, name::ANSWERS_FROM).map_err(|error| anyhow!("{error}"))?;
    Ok(map.set(0, 1, 0)?)
}

/// Packets that a service counts for each of these reasons.
///
/// # Errors
/// Where the daemon does not answer.
pub fn counted<const N: usize>(lab: &Lab, service: &str, reasons: [&str; N]) -> Result<[u64; N]> {
    let rows = lab.edge_ctl(&["xdp", "stats"])?;
    Ok(reasons.map(|reason| {
        let of = |row: &&Value| row["service"] == service && row["reason"] == reason;
        rows.as_array().into_iter().flatten().filter(of).filter_map(|row| row["packets"].as_u64()).sum()
    }))
}

/// The exchange of a connection that is not known ended with a RST.
///
/// # Errors
/// Where it did not.
pub fn is_reset(result: Result<Duration>) -> Result<()> {
    let error = format!("{:#}", result.err().context("a connection without a flow was answered")?);
    ensure!(error.contains("reset by peer"), "it was not reset: {error}");
    Ok(())
}
