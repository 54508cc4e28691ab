//! BGP beside BIRD, FRR and GoBGP in the same run: a full table from one player into the speaker and into the kernel,
//! single withdrawals, many peers. Each speaker runs in a process of its own in one namespace, the player in another.

mod kernel;
mod latency;
mod player;
mod speaker;

use std::{
    net::Ipv4Addr,
    sync::{Arc, atomic::Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

pub use self::speaker::speak;
use self::{
    kernel::Watch,
    player::{HOLD, Nodes, Session},
    speaker::{Kind, Running},
};
use super::{Figure, Namespace};
use crate::{
    lab::{exec::ip_batch, netns},
    skip::full,
};

const SPEAKER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
const PLAYER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
const SPEAKER_ASN: u16 = 64512;
const PLAYER_ASN: u16 = 64513;
/// How long a table may take to arrive.
const PATIENCE: Duration = Duration::from_secs(300);
/// The kernel clears a namespace away in the background.
const SETTLING: Duration = Duration::from_secs(3);
const NODES: u16 = 500;
/// Prefixes that stand beside the one whose withdrawal is timed.
const BESIDE: u32 = 1000;

/// A namespace for the speaker and one for the player, back to back.
struct Wire {
    speaker: Namespace,
    player: Namespace,
}

impl Wire {
    fn new() -> Result<Self> {
        let wire = Self { speaker: Namespace::make("bgp")?, player: Namespace::make("play")? };
        let lines =
            ["link set lo up".to_owned(), format!("link add ens33 type veth peer name eth0 netns {}", wire.player.0)];
        let more = [format!("addr add {SPEAKER}/16 dev ens33"), "link set ens33 up".to_owned()];
        ip_batch(Some(&wire.speaker.0), &[lines, more].concat())?;
        let mut lines = vec!["link set lo up".to_owned(), format!("addr add {PLAYER}/16 dev eth0")];
        lines.extend((0..NODES).map(|number| format!("addr add {}/16 dev eth0", node(number))));
        lines.push("link set eth0 up".to_owned());
        ip_batch(Some(&wire.player.0), &lines)?;
        netns::within(&wire.speaker.0, || {
            let settings = [("ip_forward", "1"), ("conf/all/rp_filter", "2"), ("conf/ens33/rp_filter", "2")];
            let settings =
                settings.into_iter().chain([("conf/all/accept_local", "1"), ("conf/ens33/accept_local", "1")]);
            settings.into_iter().try_for_each(|(key, value)| {
                std::fs::write(format!("/proc/sys/net/ipv4/{key}"), value).with_context(|| format!("set {key}"))
            })
        })?;
        Ok(wire)
    }

    fn play(&self, hold: u16) -> Result<Session> {
        netns::within(&self.player.0, || Session::open(hold, Duration::from_secs(30)))
    }
}

fn node(number: u16) -> Ipv4Addr {
    let [third, fourth] = [number / 250 + 1, number % 250 + 1].map(|octet| u8::try_from(octet).unwrap_or(u8::MAX));
    Ipv4Addr::new(10, 0, third, fourth)
}

/// Measures with a table of `routes` prefixes, at most 2^22; some three minutes with a million.
///
/// # Errors
/// Where the namespaces cannot be made, or a speaker does not take the table.
pub fn run(routes: u32) -> Result<Vec<Figure>> {
    ensure!(netns::effective_user_is_root(), "namespaces need root: run it with sudo");
    ensure!((10..1 << 22).contains(&routes), "--routes is from 10 to {}", (1 << 22) - 1);
    let label = if routes == 1_000_000 { "1m".to_owned() } else { routes.to_string() };
    let table = player::table(routes);
    let mut bench = Bench { figures: Vec::new(), silence: Vec::new() };
    for kind in Kind::ALL {
        if let Some(why) = kind.missing() {
            println!("SKIPPED bgp/*/{}: {why}", kind.name());
            continue;
        }
        // A table of a million routes goes with its namespace.
        let wire = Wire::new()?;
        bench.try_part(kind.name(), |bench| bench.intake(&wire, kind, routes, &label, &table));
        if let Some(why) = kind.cannot_fill_kernel() {
            println!("SKIPPED bgp/{{fib-{label},withdraw-to-kernel-*}}/{}: {why}", kind.name());
            continue;
        }
        bench.try_part(kind.name(), |bench| bench.fib(&wire, kind, routes, &label, &table));
        drop(wire);
        thread::sleep(SETTLING);
        let wire = Wire::new()?;
        bench.try_part(kind.name(), |bench| bench.withdrawals(&wire, kind));
    }
    let wire = Wire::new()?;
    bench.try_part("edge", |bench| bench.wire(&wire));
    bench.try_part("edge", |bench| bench.peers(&wire));
    // The nodes before hold their addresses until their sessions have ended, and the namespaces have the same names.
    drop(wire);
    thread::sleep(SETTLING);
    let wire = Wire::new()?;
    bench.try_part("edge", |bench| bench.loaded(&wire));
    let silence = std::mem::take(&mut bench.silence);
    bench.figures.push(Figure::net("bgp/longest-silence/edge".to_owned(), "ns", silence, 0.0));
    Ok(bench.figures)
}

struct Bench {
    figures: Vec<Figure>,
    /// Longest time without a message of ours on each session with a hold time of 3 s, nanoseconds.
    silence: Vec<f64>,
}

impl Bench {
    /// One part that fails is told and leaves the others their turn.
    fn try_part(&mut self, name: &str, part: impl FnOnce(&mut Self) -> Result<()>) {
        if let Err(error) = part(self) {
            println!("FAILED {name}: {error:#}");
        }
    }

    fn add(&mut self, name: &str, who: Kind, unit: &'static str, runs: Vec<f64>) {
        let figure = Figure::net(format!("bgp/{name}/{}", who.name()), unit, runs, 0.0);
        println!("  {} {:.0} {unit}", figure.name, figure.median);
        self.figures.push(figure);
    }

    /// Percentiles of single measurements, each as a figure of its own.
    fn percentiles(&mut self, name: &str, who: Kind, nanoseconds: Vec<f64>) {
        let all = Figure::net(String::new(), "ns", nanoseconds, 0.0);
        self.add(&format!("{name}-p50"), who, "ns", vec![all.median]);
        self.add(&format!("{name}-p99"), who, "ns", vec![all.p99]);
    }

    /// A session with us has the shortest hold time there is; what came of that is remembered.
    fn held(&mut self, session: &Session) -> Result<()> {
        ensure!(!session.seen.ended.load(Ordering::Relaxed), "the session with a hold time of {HOLD} s was lost");
        self.silence.push(session.seen.silence.load(Ordering::Relaxed) as f64 * 1e3);
        Ok(())
    }

    fn intake(&mut self, wire: &Wire, kind: Kind, routes: u32, label: &str, table: &[u8]) -> Result<()> {
        let (mut times, mut memory) = (Vec::new(), Vec::new());
        let quick = matches!(kind, Kind::Edge | Kind::Bird);
        for _ in 0..if quick { 3 } else { 1 } {
            let running = match kind {
                Kind::Edge => speaker::edge_alone(&wire.speaker.0, &speaker::bgp_section(&hold(), ""))?,
                _ => speaker::other(kind, &wire.speaker.0, false)?,
            };
            let session = wire.play(if kind == Kind::Edge { HOLD } else { 0 })?;
            let start = Instant::now();
            session.send(table)?;
            let pause = if quick { 5 } else { 100 };
            until(start, pause, || running.received() == Some(u64::from(routes)))?;
            times.push(start.elapsed().as_nanos() as f64);
            memory.push(running.resident()?);
            if kind == Kind::Edge {
                self.held(&session)?;
            }
        }
        self.add(&format!("intake-{label}"), kind, "ns", times);
        self.add(&format!("rss-{label}"), kind, "bytes", memory);
        Ok(())
    }

    fn fib(&mut self, wire: &Wire, kind: Kind, routes: u32, label: &str, table: &[u8]) -> Result<()> {
        let running = with_fib(wire, kind, "")?;
        let session = wire.play(if kind == Kind::Edge { HOLD } else { 0 })?;
        netns::within(&wire.speaker.0, || {
            let before = kernel::count()?;
            let start = Instant::now();
            session.send(table)?;
            until(start, 50, || kernel::count().is_ok_and(|now| now >= before + u64::from(routes)))?;
            self.add(&format!("fib-{label}"), kind, "ns", vec![start.elapsed().as_nanos() as f64]);
            Ok(())
        })?;
        if kind == Kind::Edge {
            self.held(&session)?;
        }
        drop(running);
        Ok(())
    }

    fn withdrawals(&mut self, wire: &Wire, kind: Kind) -> Result<()> {
        let running = with_fib(wire, kind, "")?;
        let session = wire.play(if kind == Kind::Edge { HOLD } else { 0 })?;
        netns::within(&wire.speaker.0, || {
            let wanted = kernel::count()? + u64::from(BESIDE);
            session.send(&player::table(BESIDE))?;
            until(Instant::now(), 20, || kernel::count().is_ok_and(|now| now >= wanted))
        })?;
        let samples = match kind {
            _ if full() => 2000,
            Kind::Edge | Kind::Bird => 500,
            _ => 100,
        };
        let all = latency::to_kernel(&session, watch(wire)?, samples)?;
        self.percentiles("withdraw-to-kernel", kind, all);
        if kind == Kind::Edge {
            let all = latency::to_map(&session, &running, samples)?;
            self.percentiles("withdraw-to-map", kind, all);
            self.held(&session)?;
        }
        Ok(())
    }

    fn wire(&mut self, wire: &Wire) -> Result<()> {
        let running = with_fib(wire, Kind::Edge, "")?;
        let session = wire.play(HOLD)?;
        let all = latency::to_wire(&session, &running, if full() { 1000 } else { 200 })?;
        self.percentiles("health-to-wire", Kind::Edge, all);
        self.held(&session)
    }

    fn peers(&mut self, wire: &Wire) -> Result<()> {
        let nodes = Arc::new(Nodes::default());
        netns::within(&wire.player.0, || nodes.serve())?;
        let start = Instant::now();
        let running = speaker::edge_alone(&wire.speaker.0, &speaker::bgp_section("", &many()))?;
        let wanted = u64::from(NODES);
        until(start, 2, || nodes.established.load(Ordering::Relaxed) == wanted && running.sessions() == wanted)?;
        self.add("500-peers-established", Kind::Edge, "ns", vec![start.elapsed().as_nanos() as f64]);
        until(start, 10, || running.received() == Some(wanted * 4))?;
        self.add("500-peers-rss", Kind::Edge, "bytes", vec![running.resident()?]);
        Ok(())
    }

    fn loaded(&mut self, wire: &Wire) -> Result<()> {
        let nodes = Arc::new(Nodes::default());
        netns::within(&wire.player.0, || nodes.serve())?;
        let _running = with_fib(wire, Kind::Edge, &many())?;
        let start = Instant::now();
        let session = wire.play(HOLD)?;
        until(start, 20, || nodes.established.load(Ordering::Relaxed) == u64::from(NODES))?;
        nodes.busy.store(true, Ordering::Relaxed);
        // Each node has begun.
        let wanted = nodes.updates.load(Ordering::Relaxed) + 2 * u64::from(NODES);
        until(start, 20, || nodes.updates.load(Ordering::Relaxed) >= wanted)?;
        let (before, begun) = (nodes.updates.load(Ordering::Relaxed), Instant::now());
        let all = latency::to_kernel(&session, watch(wire)?, if full() { 2000 } else { 500 })?;
        let rate = (nodes.updates.load(Ordering::Relaxed) - before) as f64 / begun.elapsed().as_secs_f64();
        self.percentiles("500-peers-withdraw-to-kernel", Kind::Edge, all);
        self.add("500-peers-updates", Kind::Edge, "1/s", vec![rate]);
        ensure!(nodes.ended.load(Ordering::Relaxed) == 0, "sessions were lost");
        self.held(&session)
    }
}

/// A speaker that fills the kernel's table.
fn with_fib(wire: &Wire, kind: Kind, peers: &str) -> Result<Running> {
    match kind {
        Kind::Edge => {
            let bgp = speaker::bgp_section(&hold(), peers);
            speaker::edge_daemon(&wire.speaker.0, &bgp, &latency::service())
        }
        _ => speaker::other(kind, &wire.speaker.0, true),
    }
}

fn hold() -> String {
    format!("timers = {{ hold = \"{HOLD}s\" }}")
}

/// Peers at every node's address, which we dial.
fn many() -> String {
    let peer = |number| {
        let address = node(number);
        format!(
            "[[bgp.peer]]\naddress = \"{address}\"\nremote_asn = {PLAYER_ASN}\nimport = [\"30.0.0.0/8 le 32\"]\n\
             graceful_restart = false\n"
        )
    };
    (0..NODES).map(peer).collect()
}

fn watch(wire: &Wire) -> Result<Watch> {
    netns::within(&wire.speaker.0, Watch::new)
}

fn until(start: Instant, pause: u64, is_so: impl Fn() -> bool) -> Result<()> {
    while !is_so() {
        ensure!(start.elapsed() < PATIENCE, "not within {PATIENCE:?}");
        thread::sleep(Duration::from_millis(pause));
    }
    Ok(())
}
