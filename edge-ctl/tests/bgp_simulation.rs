//! Two speakers of the pure parts (state machine, RIB, graceful restart, announcements) over a network that delays,
//! splits, stalls and resets, with crashes, restarts and clocks that run late. Everything follows from a seed:
//! `EDGE_SIM_SEED=0x... cargo test --test bgp_simulation` plays one schedule again, with its story.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test stops at the first broken assumption"
)]

#[path = "simulation/network.rs"]
mod network;
#[path = "simulation/node.rs"]
mod node;
#[path = "simulation/world.rs"]
mod world;

use std::{
    hash::{BuildHasher, Hasher, RandomState},
    io::Write,
    panic::{AssertUnwindSafe, catch_unwind},
};

use world::{Faults, World};

/// How many schedules: `EDGE_SIM_SCHEDULES` of each kind, which `cargo xtask test` sets for an optimised build.
fn schedules() -> u64 {
    std::env::var("EDGE_SIM_SCHEDULES").map_or(1_000, |count| count.parse().unwrap())
}

/// Plays schedules from fresh seeds, or the one that the environment names.
fn play(what: &str, schedule: fn(u64)) {
    if let Ok(seed) = std::env::var("EDGE_SIM_SEED") {
        let seed = u64::from_str_radix(seed.trim_start_matches("0x"), 16).unwrap();
        return schedule(seed);
    }
    let first = RandomState::new().build_hasher().finish();
    let count = schedules();
    let _ = writeln!(std::io::stderr().lock(), "{what}: {count} schedules from seed {first:#x}");
    let threads = std::thread::available_parallelism().map_or(1, |threads| threads.get() as u64);
    std::thread::scope(|scope| {
        for thread in 0..threads {
            scope.spawn(move || {
                for number in (thread..count).step_by(threads as usize) {
                    let seed = first.wrapping_add(number);
                    let result = catch_unwind(AssertUnwindSafe(|| schedule(seed)));
                    if let Err(panic) = result {
                        eprintln!("{what}: play it again with EDGE_SIM_SEED={seed:#x}");
                        std::panic::resume_unwind(panic);
                    }
                }
            });
        }
    });
}

/// Whatever happens, every invariant holds at every step, and once nothing more happens, both sides have what the other
/// announces, over one connection, with nothing stale.
#[test]
fn sessions_and_routes_survive_any_schedule_of_faults() {
    play("any faults", |seed| {
        let mut world = World::new(seed, Faults::Any);
        world.run_chaos();
        world.settle();
        world.assert_converged();
    });
}

/// A crash and a restart inside the timer over a network that only delays: the peer never loses a route of ours.
#[test]
fn a_crash_and_restart_with_unchanged_peers_withdraws_nothing() {
    play("crash and restart", |seed| {
        let mut world = World::new(seed, Faults::CrashOfOne);
        world.settle();
        world.assert_converged();
        world.crash_and_restart_without_withdrawals();
        world.settle();
        world.assert_converged();
    });
}

/// The same seed is the same story, to the last step.
#[test]
fn a_schedule_can_be_played_again() {
    let story = |seed| {
        let mut world = World::new(seed, Faults::Any);
        world.run_chaos();
        world.settle();
        world.story()
    };
    for seed in [1, 0xfeed_5eed, u64::MAX] {
        assert_eq!(story(seed), story(seed));
    }
    assert_ne!(story(1), story(2));
}
