//! What a packet costs, in ratios that hold on every machine: each figure is measured beside the one it is compared with, net of the
//! same wrapper. Absolute figures are `cargo xtask bench`'s.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

use anyhow::{Result, ensure};
use edge_tests::bench::{
    Figure,
    dataplane::{Effort, figure},
};

/// What has been measured, one after the other: each has a CPU to itself, as far as the machine lets it.
static MEASURED: Mutex<BTreeMap<&str, Figure>> = Mutex::new(BTreeMap::new());

const LOOKUP: &str = "xdp/bare-lru-lookup/1-flow";
const SERVED: &str = "xdp/full-nat/v4/established-forward/1-flow";

fn measured<const N: usize>(names: [&'static str; N]) -> Result<[Figure; N]> {
    let mut known = MEASURED.lock().unwrap_or_else(PoisonError::into_inner);
    let mut figures = Vec::new();
    for name in names {
        let figure = match known.get(name) {
            Some(figure) => figure.clone(),
            None => figure(&format!("dataplane/{name}"), Effort::SMALL)?,
        };
        known.insert(name, figure.clone());
        figures.push(figure);
    }
    figures.try_into().map_err(|_| anyhow::anyhow!("as many figures as names"))
}

/// Holds `of` to be at most so many times the `other`, both at their fastest. A nanosecond more or less is the clock's.
fn at_most(times: f64, of: &Figure, other: &Figure) -> Result<()> {
    let (own, bound) = (of.min, times * other.min.max(1.0) + 2.0);
    ensure!(own <= bound, "{}: {own} ns, {}: {} ns; at most {times} times as much", of.name, other.name, other.min);
    Ok(())
}

#[test]
fn a_packet_that_a_slot_serves_asks_no_table_and_costs_a_hot_lookup_twice_at_most() -> Result<()> {
    let [lookup, served] = measured([LOOKUP, SERVED])?;
    ensure!(served.lookups == Some(0.0) && served.hit_rate == Some(1.0), "{served:?}");
    at_most(2.0, &served, &lookup)
}

#[test]
fn an_ipv6_packet_costs_one_and_a_half_times_an_ipv4_packet_at_most() -> Result<()> {
    let [v4, v6] = measured([SERVED, "xdp/full-nat/v6/established-forward/1-flow"])?;
    ensure!(v6.lookups == Some(0.0), "{v6:?}");
    at_most(1.5, &v6, &v4)
}

#[test]
fn traffic_that_is_not_ours_costs_half_of_a_served_packet_at_most_however_many_sources_it_has() -> Result<()> {
    let [served, many] = measured([SERVED, "xdp/non-vip/1m-sources"])?;
    at_most(0.5, &many, &served)
}

#[test]
fn many_flows_find_their_slots_and_cost_less_than_a_lookup_among_them() -> Result<()> {
    let [lookup, flows] = measured(["xdp/bare-lru-lookup/1m-flows", "xdp/full-nat/v4/established-forward/1m-flows"])?;
    let (hits, lookups) = (flows.hit_rate.unwrap_or(0.0), flows.lookups.unwrap_or(1.0));
    ensure!(hits > 0.98 && lookups < 0.04, "two slots for each flow, and {hits} hits, {lookups} lookups per packet");
    at_most(1.0, &flows, &lookup)
}

#[test]
fn a_new_flow_costs_little_more_than_its_lookups_and_inserts() -> Result<()> {
    let [bare, flow] = measured(["xdp/bare-new-flow/1-flow", "xdp/full-nat/v4/new-flow/1-flow"])?;
    at_most(1.6, &flow, &bare)
}

#[test]
fn at_tc_a_packet_costs_less_than_twice_what_it_costs_at_xdp() -> Result<()> {
    let [xdp, tc] = measured([SERVED, "tc/full-nat/v4/established-forward/1-flow"])?;
    at_most(1.8, &tc, &xdp)
}
