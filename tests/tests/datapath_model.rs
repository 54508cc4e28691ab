//! The loaded program against the reference model, on random and damaged packets: verdict, bytes, checksums, tables,
//! counters. `EDGE_FUZZ_SEED=0x...` repeats the run of a printed seed.

use std::io::Write;

use anyhow::{Context, Result, ensure};
use edge_common::verdict::Reason;
use edge_ctl::datapath::object::EBPF_OBJECT;
use edge_tests::{
    datapath::rig::Hook,
    model::{
        coverage::Point,
        dice::fresh,
        run::{CACHES, fuzz, fuzz_object},
    },
    skip::{count, namespaces_missing, skipped},
};

/// The seed of every run.
const FIXED: u64 = 0xed6e;
/// Reasons that no test run can reach, and why.
const UNREACHABLE: [(Reason, &str); 2] = [
    (Reason::HalfOpenFull, "an LRU table evicts rather than refuse, except where other CPUs hold its free entries"),
    (Reason::IcmpLimited, "whether messages come too fast depends on the run's speed"),
];

/// Branches that no test run can count on, at which hook, and why.
const UNREACHABLE_POINTS: [(Point, Option<Hook>, &str); 4] = [
    (Point::AnswerLimited, None, "as IcmpLimited"),
    (Point::Gso, Some(Hook::Xdp), "segments are TC's"),
    (Point::ViaStack, Some(Hook::Tc), "TC redirects to any interface"),
    (Point::RestoreTwinTaken, None, "a few in a million packets"),
];

fn seed_of_the_day() -> Result<u64> {
    match std::env::var("EDGE_FUZZ_SEED") {
        Ok(text) => u64::from_str_radix(text.trim_start_matches("0x"), 16).context("EDGE_FUZZ_SEED: not hexadecimal"),
        Err(_) => Ok(fresh()?),
    }
}

/// Past libtest's capture.
fn say(text: &str) {
    // A closed stderr leaves nobody to tell.
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

fn compare(name: &str, hook: Hook) -> Result<()> {
    if let Some(why) = namespaces_missing() {
        skipped(name, why);
        return Ok(());
    }
    let fixed = fuzz(hook, FIXED, count(&format!("{hook:?} packets, fixed seed"), 1_000_000, 5_000_000) as u64)?;
    say(&format!("{hook:?}, seed {FIXED:#x}: {fixed}"));
    let missed = fixed.missed_reasons();
    let unreachable = UNREACHABLE.map(|(reason, _)| reason);
    let surprising: Vec<&str> =
        missed.iter().filter(|reason| !unreachable.contains(reason)).map(|reason| reason.name()).collect();
    assert!(surprising.is_empty(), "reasons that no packet met: {surprising:?}");

    let missed = fixed.coverage.missed();
    let surprising: Vec<&Point> = missed
        .iter()
        .filter(|point| !UNREACHABLE_POINTS.iter().any(|(of, at, _)| of == *point && at.is_none_or(|at| at == hook)))
        .collect();
    assert!(surprising.is_empty(), "branches that no packet took: {surprising:?}");

    // What the cache serves is what the tables would have served: the same packets, with a tiny one and with none.
    ensure!(fixed.cached > fixed.packets / 100, "the cache served {} packets only", fixed.cached);
    for cache in CACHES.into_iter().skip(1) {
        let packets = count(&format!("{hook:?} packets, {cache} sets"), 200_000, 5_000_000) as u64;
        let other = fuzz_object(EBPF_OBJECT, hook, FIXED, packets, cache)?;
        say(&format!("{hook:?}, seed {FIXED:#x}, {cache} sets of the flow cache: {other}"));
        ensure!((other.cached == 0) == (cache == 0), "{} packets served by a cache of {cache} sets", other.cached);
    }

    let seed = seed_of_the_day()?;
    say(&format!("{hook:?}, fresh seed {seed:#x}"));
    let packets = count(&format!("{hook:?} packets, fresh seed"), 200_000, 5_000_000) as u64;
    say(&format!("{hook:?}, seed {seed:#x}: {}", fuzz(hook, seed, packets)?));
    Ok(())
}

#[test]
fn at_xdp_the_program_does_what_the_reference_model_says() -> Result<()> {
    compare("at_xdp_the_program_does_what_the_reference_model_says", Hook::Xdp)
}

#[test]
fn at_tc_the_program_does_what_the_reference_model_says() -> Result<()> {
    compare("at_tc_the_program_does_what_the_reference_model_says", Hook::Tc)
}
