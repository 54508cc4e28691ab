//! What a packet costs, in ratios that hold on every machine: each figure is measured beside the one it is compared with, net of the
//! same wrapper. Absolute figures are `cargo xtask bench`'s.

use std::sync::Mutex;

use anyhow::{Result, ensure};
use edge_tests::bench::{
    Figure,
    dataplane::{Effort, figure},
};

/// One test at a time: each has one CPU to itself, as far as the machine lets it.
static ALONE: Mutex<()> = Mutex::new(());

fn measured<const N: usize>(names: [&str; N]) -> Result<[Figure; N]> {
    let _alone = ALONE.lock();
    let mut figures = Vec::new();
    for name in names {
        figures.push(figure(&format!("dataplane/{name}"), Effort::SMALL)?);
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
fn a_packet_that_a_slot_serves_asks_no_table_and_costs_as_much_as_a_hot_lookup_at_most_twice() -> Result<()> {
    let [lookup, forward, reply, tc] = measured([
        "xdp/bare-lru-lookup/1-flow",
        "xdp/full-nat/v4/established-forward/1-flow",
        "xdp/full-nat/v4/established-reply/1-flow",
        "tc/full-nat/v4/established-forward/1-flow",
    ])?;
    for figure in [&forward, &reply, &tc] {
        ensure!(figure.lookups == Some(0.0) && figure.hit_rate == Some(1.0), "{figure:?}");
    }
    at_most(2.0, &forward, &lookup)?;
    at_most(2.0, &reply, &lookup)?;
    at_most(4.0, &tc, &lookup)
}

#[test]
fn an_ipv6_packet_costs_one_and_a_half_times_an_ipv4_packet_at_most() -> Result<()> {
    let [v4, v6] =
        measured(["xdp/full-nat/v4/established-forward/1-flow", "xdp/full-nat/v6/established-forward/1-flow"])?;
    ensure!(v6.lookups == Some(0.0), "{v6:?}");
    at_most(1.5, &v6, &v4)
}

#[test]
fn traffic_that_is_not_ours_costs_half_of_a_served_packet_at_most_however_many_sources_it_has() -> Result<()> {
    let [served, one, many] =
        measured(["xdp/full-nat/v4/established-forward/1-flow", "xdp/non-vip/1-flow", "xdp/non-vip/1m-sources"])?;
    at_most(0.5, &one, &served)?;
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
fn a_storm_of_flows_that_close_costs_others_only_misses_that_are_counted() -> Result<()> {
    let [quiet, storm] = measured([
        "xdp/full-nat/v4/established-forward/1k-flows",
        "xdp/full-nat/v4/established-forward/1k-flows-storm",
    ])?;
    ensure!(quiet.hit_rate == Some(1.0), "{quiet:?}");
    // 1,024 flows have 1,024 of 262,144 generations, and a flow that closes moves two.
    let misses = 1.0 - storm.hit_rate.unwrap_or(0.0);
    ensure!(misses < 0.05, "{misses} of the packets missed: {storm:?}");
    at_most(2.0, &storm, &quiet)
}
