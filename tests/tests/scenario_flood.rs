//! Floods from forged sources: established flows go on, and honest clients get in.
//!
//! The flood has a core of its own, everything else shares the other. A veth has no queue in hardware: what the flood
//! sends is received, by the program too, on the core that sends it, so that the rate is what sending and dropping cost
//! together.

use std::{
    process::{Child, Command},
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use edge_tests::{
    lab::{
        Lab, Speaker,
        client::{Echo, exchange_all},
        edge::vip,
        exec::{self, run},
    },
    needs_namespaces, skip,
};

const FLOOD: Duration = Duration::from_secs(6);
/// Clients that open one connection after another.
const CLIENTS: usize = 4;
/// Fewer packets a second than this are no flood.
const LEAST: f64 = 5_000.0;

/// What hping3 is told besides the target.
const FLOODS: [(&str, &[&str]); 4] = [
    ("SYN", &["--syn", "--destport", "9000"]),
    ("ACK", &["--ack", "--destport", "9000"]),
    ("UDP", &["--udp", "--destport", "5353"]),
    ("fragments", &["--udp", "--destport", "5353", "--morefrag", "--fragoff", "0", "--data", "64"]),
];

/// A program that is ended with the value.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // One that has ended by itself is found by the rate.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn under_a_flood_no_established_flow_is_lost_and_honest_clients_get_in() -> Result<()> {
    const NAME: &str = "under_a_flood_no_established_flow_is_lost_and_honest_clients_get_in";
    needs_namespaces!("under_a_flood_no_established_flow_is_lost_and_honest_clients_get_in");
    let cores = thread::available_parallelism()?.get();
    if cores < 2 {
        skip::skipped(NAME, "the flood needs a core of its own, and there is one in all");
        return Ok(());
    }
    let hping = exec::program("hping3", "hping3")?;
    // Threads and children inherit it.
    let own = std::fs::read_link("/proc/thread-self")?;
    let own = own.file_name().and_then(|name| name.to_str()).context("no thread id")?.to_owned();
    run(Command::new("taskset").args(["-c", "-p", "0", &own]))?;

    let lab = Lab::up(Speaker::Bird, 3)?;
    let mut daemon = lab.start_ready_edge("1s")?;
    let flows = skip::count("established flows under flood", 200, 10_000);
    let mut established = lab.open_many("client", vip(vip::ECHO), flows)?;
    for (name, arguments) in FLOODS {
        let mut command = lab.command("router", "taskset")?;
        command.args(["-c", "1"]).arg(&hping).args(["--flood", "--quiet", "--rand-source"]).args(arguments);
        command.arg(vip(vip::ECHO).ip().to_string());
        let before = packets(&lab)?;
        let start = Instant::now();
        let flood = Running(lab.spawn("router", &format!("hping3-{name}"), &mut command)?);
        let met = during(&lab, &mut established).with_context(|| format!("{name} flood"))?;
        let rate = (packets(&lab)? - before) as f64 / start.elapsed().as_secs_f64();
        drop(flood);
        println!(
            "{name} flood: {rate:.0} packets/s; {} exchanges on {flows} flows, the longest {:?}; {} of {} connections in",
            met.exchanges, met.longest, met.opened, met.tried
        );
        let reasons = lab.edge_ctl_text(&["xdp", "stats"])?;
        ensure!(rate >= LEAST, "{name}: {rate:.0} packets/s is no flood");
        ensure!(met.tried >= 100, "{name}: only {} connections were tried", met.tried);
        ensure!(met.opened * 100 >= met.tried * 99, "{name}: {} of {} in\n{reasons}", met.opened, met.tried);
        exchange_all(&mut established).with_context(|| format!("after the {name} flood"))?;
    }
    daemon.stop()
}

#[derive(Debug, Default)]
struct Met {
    exchanges: usize,
    longest: Duration,
    tried: usize,
    opened: usize,
}

/// Exchanges on all flows and opens connections, for as long as a flood takes. A connection that [`Lab::open`] does not
/// have within 5 s has sent its SYN three times, at 0, 1 and 3 s (RFC 6298), and counts as refused.
fn during(lab: &Lab, established: &mut [Echo]) -> Result<Met> {
    let (tried, opened, over) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicBool::new(false));
    let start = Instant::now();
    let mut met = Met::default();
    thread::scope(|scope| {
        for _ in 0..CLIENTS {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    tried.fetch_add(1, Ordering::Relaxed);
                    match lab.open("client", vip(vip::ECHO)) {
                        Ok(_) => opened.fetch_add(1, Ordering::Relaxed),
                        Err(error) => {
                            println!("refused: {error:#}");
                            0
                        }
                    };
                }
            });
        }
        let mut watch = || {
            while start.elapsed() < FLOOD {
                met.longest = met.longest.max(exchange_all(established)?);
                met.exchanges += established.len();
            }
            anyhow::Ok(())
        };
        let watched = watch();
        over.store(true, Ordering::Relaxed);
        watched
    })?;
    (met.tried, met.opened) = (tried.into_inner(), opened.into_inner());
    Ok(met)
}

/// What the program has dealt with so far: packets of flows, and packets that it dropped or passed for a reason.
fn packets(lab: &Lab) -> Result<u64> {
    let sum = |rows: serde_json::Value, key: &str| {
        rows.as_array().into_iter().flatten().filter_map(|row| row[key].as_u64()).sum::<u64>()
    };
    Ok(sum(lab.edge_ctl(&["service", "list"])?, "packets_in") + sum(lab.edge_ctl(&["xdp", "stats"])?, "packets"))
}
