//! How long one change takes through the whole daemon, or through somebody else's speaker: a withdrawal to the kernel's
//! table and to the backend's map, an administrator's word about a backend to the UPDATE that follows from it.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::Ordering,
        mpsc::{Receiver, channel},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use aya::maps::{Array, MapData};
use edge_common::maps::{backend_state, name};
use edge_ctl::{
    datapath::{
        object::EBPF_OBJECT,
        pins::{self, Pins},
        tables::Tables,
    },
    model::BackendVerb,
};

use super::{
    super::pools::Connection,
    PLAYER,
    kernel::Watch,
    player::{Session, announce, withdraw},
    speaker::Running,
};

/// The prefix that comes and goes, and what stands beside it.
pub(super) const PREFIX: (Ipv4Addr, u8) = (Ipv4Addr::new(10, 1, 0, 0), 24);
/// The backend behind it.
const BACKEND: &str = "10.1.0.1:80";
const PATIENCE: Duration = Duration::from_secs(10);

/// A service with a backend behind [`PREFIX`], whose VIP is announced.
pub(super) fn service() -> String {
    format!(
        "[service.web]\nlisten = [\"192.0.2.1:80/tcp\"]\nbackends = {{ static = [\"{BACKEND}\"] }}\nannounce = true\n\
         snat = {{ addresses = [\"10.0.0.1\"] }}\n"
    )
}

/// Withdrawals until the kernel tells that the route is gone, nanoseconds.
pub(super) fn to_kernel(session: &Session, watch: Watch, samples: usize) -> Result<Vec<f64>> {
    let (orders, inbox): (_, Receiver<(bool, Instant)>) = channel();
    let (results, outcome) = channel();
    thread::spawn(move || {
        for (there, begun) in inbox {
            if results.send(watch.until(PREFIX, there, begun, PATIENCE)).is_err() {
                return;
            }
        }
    });
    let mut all = Vec::new();
    for number in 0..=samples {
        for there in [true, false] {
            let message = if there { announce(&[PREFIX], PLAYER, 0) } else { withdraw(&[PREFIX]) };
            let begun = Instant::now();
            orders.send((there, begun)).context("the watch has ended")?;
            session.send(&message)?;
            let took = outcome.recv().context("the watch has ended")??;
            // The first of all is a warm-up.
            if !there && number > 0 {
                all.push(took);
            }
        }
    }
    Ok(all)
}

/// Withdrawals until the map says that the backend gets no new flows, nanoseconds.
pub(super) fn to_map(session: &Session, daemon: &Running, samples: usize) -> Result<Vec<f64>> {
    let tables = Pins::new(daemon.pins()?, EBPF_OBJECT)?;
    let backend: SocketAddr = BACKEND.parse()?;
    let states: Array<MapData, u32> = pins::open(&tables, name::BACKEND_STATE)?;
    let begun = Instant::now();
    session.send(&announce(&[PREFIX], PLAYER, 0))?;
    let number = loop {
        let state = Tables::open(&tables)?.state()?;
        let found = state.backends.iter().find(|(_, slot)| slot.address() == backend && slot.eligible());
        if let Some((number, _)) = found {
            break *number;
        }
        ensure!(begun.elapsed() < PATIENCE, "the backend is not in use");
        thread::sleep(Duration::from_millis(20));
    };
    let until = |eligible: bool, begun: Instant| -> Result<f64> {
        while (states.get(&number, 0)? & backend_state::ELIGIBLE != 0) != eligible {
            ensure!(begun.elapsed() < PATIENCE, "the backend's state did not change");
            // Whoever wakes up on this CPU, the daemon above all, goes first: else it would wait for the end of our slice.
            thread::yield_now();
        }
        Ok(begun.elapsed().as_nanos() as f64)
    };
    let mut all = Vec::new();
    for _ in 0..samples {
        let begun = Instant::now();
        session.send(&withdraw(&[PREFIX]))?;
        all.push(until(false, begun)?);
        session.send(&announce(&[PREFIX], PLAYER, 0))?;
        until(true, Instant::now())?;
        // What follows from the route's return (tables, addresses) is over before the next one goes.
        thread::sleep(Duration::from_millis(5));
    }
    Ok(all)
}

/// From the order that takes the only backend out until the player has the UPDATE that withdraws its VIP, nanoseconds.
pub(super) fn to_wire(session: &Session, daemon: &Running, samples: usize) -> Result<Vec<f64>> {
    session.send(&announce(&[PREFIX], PLAYER, 0))?;
    let seen = Arc::clone(&session.seen);
    let updates = || seen.updates.load(Ordering::Acquire);
    let backend: SocketAddr = BACKEND.parse()?;
    let begun = Instant::now();
    // The VIP, once everything is in place.
    while updates() == 0 {
        ensure!(begun.elapsed() < PATIENCE, "the VIP is not announced");
        thread::sleep(Duration::from_millis(20));
    }
    let mut connection = Connection::open(&daemon.folder().join("edge.sock"))?;
    let mut all = Vec::new();
    for _ in 0..samples {
        for verb in [BackendVerb::Down, BackendVerb::Up] {
            let (before, begun) = (updates(), Instant::now());
            connection.send("web", backend, verb)?;
            while updates() == before {
                ensure!(begun.elapsed() < PATIENCE, "no UPDATE followed from the order");
                thread::yield_now();
            }
            if verb == BackendVerb::Down {
                all.push(begun.elapsed().as_nanos() as f64);
            }
            connection.answered()?;
        }
    }
    Ok(all)
}
