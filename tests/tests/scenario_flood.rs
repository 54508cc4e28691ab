//! Floods from forged sources: established flows go on, and honest clients get in.
//!
//! The flood has a core of its own, and a receive queue of its own at the edge; everything else shares the other core. What
//! the flood sends is received, by the program too, on the core that sends it, so that the rate is what sending, forwarding
//! and answering cost together, and the machine itself loses nothing of the honest clients' packets.

use std::{
    net::SocketAddr,
    process::{Child, Command},
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use edge_tests::{
    lab::{
        Lab, Speaker,
        client::{Echo, exchange_all},
        edge::vip,
        exec::{self, run, wait_for},
        pods::TCP_ECHO,
        topology::{ROUTER, ingress},
    },
    needs_namespaces, skip,
};

const FLOOD: Duration = Duration::from_secs(6);
/// How long a flood may go on to see connections enough on a machine that it keeps busy.
const LONGEST: Duration = Duration::from_secs(60);
/// Clients that open one connection after another through the edge; one more opens them by plain routing.
const CLIENTS: usize = 4;
/// Connections that are tried before 1 % of them means anything.
const ENOUGH: usize = 500;
/// Packets after which a flood is there: nothing else sends any meanwhile.
const ARRIVED: u64 = 1_000;
/// Fewer packets than this for each honest connection are no flood.
const LEAST: usize = 20;

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
    lab.queue_for_each_core()?;
    // Answers to forged sources have a way out of the edge, as they have on any edge, and end behind it.
    exec::ip_batch(Some(&lab.namespace("edge")), &[format!("route add default via {ROUTER}")])?;
    exec::ip_batch(Some(&lab.namespace("router")), &["route add blackhole default".to_owned()])?;
    let mut daemon = lab.start_ready_edge("1s")?;
    let flows = skip::count("established flows under flood", 200, 10_000);
    let mut established = lab.open_many("client", vip(vip::ECHO), flows)?;
    // The machine itself loses packets under the flood, and TCP waits twice as long after each; a flow is lost where it does
    // not go on after that.
    established.iter().try_for_each(|flow| flow.wait_for_lines(LONGEST))?;
    for (name, arguments) in FLOODS {
        let mut command = lab.command("router", "taskset")?;
        command.args(["-c", "1"]).arg(&hping).args(["--flood", "--quiet", "--rand-source"]).args(arguments);
        command.arg(vip(vip::ECHO).ip().to_string());
        let idle = packets(&lab)?;
        let program = format!("hping3-{name}");
        let mut flood = Running(lab.spawn("router", &program, &mut command)?);
        wait_for(&format!("the {name} flood to arrive"), LONGEST, || Ok(packets(&lab)? > idle + ARRIVED))?;
        let before = packets(&lab)?;
        let start = Instant::now();
        let met = during(&lab, &mut established).with_context(|| format!("{name} flood"))?;
        let sent = packets(&lab)? - before;
        let rate = sent as f64 / start.elapsed().as_secs_f64();
        if let Some(ended) = flood.0.try_wait()? {
            let said = std::fs::read_to_string(lab.log("router", &program)).unwrap_or_default();
            bail!("hping3 ended during the {name} flood: {ended}\n{said}");
        }
        drop(flood);
        let Met { tried, opened, routed_tried, routed_opened, .. } = met;
        println!(
            "{name} flood: {rate:.0} packets/s; {} exchanges on {flows} flows, the longest {:?}; {opened} of {tried} \
             connections in, {routed_opened} of {routed_tried} by plain routing",
            met.exchanges, met.longest
        );
        let reasons = lab.edge_ctl_text(&["xdp", "stats"])?;
        ensure!(!reasons.contains("no-route"), "{name}: dropped for want of a route, before it met a table\n{reasons}");
        ensure!(sent >= (LEAST * tried) as u64, "{name}: {sent} packets beside {tried} connections are no flood");
        // One in a hundred, and what the machine itself loses under the flood, as the plain route shows. Both are counts of rare
        // events: more than three standard deviations of their difference is no chance.
        let (routed, scale) = ((routed_tried - routed_opened) as f64, tried as f64 / routed_tried.max(1) as f64);
        let expected = 0.01 * tried as f64 + routed * scale;
        let deviation = (expected + routed * scale * scale).sqrt();
        let allowed = (expected + 3.0 * deviation).floor() as usize;
        ensure!(tried - opened <= allowed, "{name}: {opened} of {tried} in, {allowed} may be missing\n{reasons}");
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
    routed_tried: usize,
    routed_opened: usize,
}

/// Connections that were tried to one server, and those of them that came about.
#[derive(Default)]
struct Tries {
    tried: AtomicUsize,
    opened: AtomicUsize,
}

impl Tries {
    /// Opens one connection after another until `over`. One that [`Lab::open`] does not have within 5 s has sent its SYN
    /// three times, at 0, 1 and 3 s (RFC 6298), and counts as refused.
    fn go_on(&self, lab: &Lab, server: SocketAddr, over: &AtomicBool) {
        while !over.load(Ordering::Relaxed) {
            self.tried.fetch_add(1, Ordering::Relaxed);
            match lab.open("client", server) {
                Ok(_) => _ = self.opened.fetch_add(1, Ordering::Relaxed),
                Err(error) => println!("refused: {error:#}"),
            }
        }
    }

    fn seen(&self) -> usize {
        self.tried.load(Ordering::Relaxed)
    }
}

/// Exchanges on all flows and opens connections, for as long as a flood takes and connections enough have been tried.
fn during(lab: &Lab, established: &mut [Echo]) -> Result<Met> {
    let (edge, routed, over) = (Tries::default(), Tries::default(), AtomicBool::new(false));
    let start = Instant::now();
    let mut met = Met::default();
    thread::scope(|scope| {
        for _ in 0..CLIENTS {
            scope.spawn(|| edge.go_on(lab, vip(vip::ECHO), &over));
        }
        scope.spawn(|| routed.go_on(lab, (ingress(1).address, TCP_ECHO).into(), &over));
        let mut watch = || {
            while start.elapsed() < FLOOD || edge.seen() < ENOUGH && start.elapsed() < LONGEST {
                met.longest = met.longest.max(exchange_all(established)?);
                met.exchanges += established.len();
            }
            anyhow::Ok(())
        };
        let watched = watch();
        over.store(true, Ordering::Relaxed);
        watched
    })?;
    (met.tried, met.opened) = (edge.tried.into_inner(), edge.opened.into_inner());
    (met.routed_tried, met.routed_opened) = (routed.tried.into_inner(), routed.opened.into_inner());
    Ok(met)
}

/// What the program has dealt with so far: packets of flows, and packets that it dropped or passed for a reason.
fn packets(lab: &Lab) -> Result<u64> {
    let sum = |rows: serde_json::Value, key: &str| {
        rows.as_array().into_iter().flatten().filter_map(|row| row[key].as_u64()).sum::<u64>()
    };
    Ok(sum(lab.edge_ctl(&["service", "list"])?, "packets_in") + sum(lab.edge_ctl(&["xdp", "stats"])?, "packets"))
}
