//! Health checks at scale: 5,000 backends at 1 s, connected to for real in a namespace of their own. How late checks start,
//! what they cost in CPU, how many sockets they hold at once.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use edge_ctl::{
    model::{Check, Exchange, Health, Verdict},
    sources::health::{self, Target, Targets},
};
use socket2::{Domain, Socket, Type};

use super::{Figure, Namespace, TICKS};
use crate::{
    lab::{exec::ip_batch, netns},
    skip::full,
};

const BACKENDS: u32 = 5000;
const INTERVAL: Duration = Duration::from_secs(1);
const PORT: u16 = 8080;

/// Measures; about half a minute.
///
/// # Errors
/// Where the namespace cannot be made, or backends are not all found healthy.
pub fn run() -> Result<Vec<Figure>> {
    ensure!(netns::effective_user_is_root(), "namespaces need root: run it with sudo");
    netns::raise_file_limit();
    let namespace = Namespace::make("health")?;
    ip_batch(Some(&namespace.0), &["link set lo up".to_owned()])?;
    netns::within(&namespace.0, measure)
}

fn measure() -> Result<Vec<Figure>> {
    // Every address of 127/8 leads here. Accepting on a thread of this process puts its cost into ours; it is measured
    // apart, by thread, and left out.
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).context("make a socket")?;
    socket.bind(&SocketAddr::from((Ipv4Addr::UNSPECIFIED, PORT)).into()).context("bind")?;
    // Its standard 128 would overflow between two turns of the acceptor, and a dropped SYN is a second late.
    socket.listen(4096).context("listen")?;
    let listener = TcpListener::from(socket);
    let acceptor = std::thread::Builder::new().name("acceptor".to_owned());
    acceptor.spawn(move || listener.incoming().for_each(drop)).context("start the acceptor")?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("checks")
        .enable_all()
        // Threads inherit the namespace from the one that makes them.
        .build()?;
    let rounds = if full() { 20 } else { 8 };
    let (mut late, mut cpu, mut sockets) = (Vec::new(), Vec::new(), Vec::new());
    runtime.block_on(async {
        let handle = health::spawn();
        handle.retarget(targets(), None);
        // The first checks of all of them, and a second for the runtime to settle.
        tokio::time::sleep(INTERVAL * 3).await;
        for _ in 0..rounds {
            let (before, used, start) = (handle.load(), cpu_seconds()?, Instant::now());
            tokio::time::sleep(INTERVAL * 2).await;
            let (after, spent) = (handle.load(), cpu_seconds()? - used);
            let mut window = after;
            for (now, then) in window.lateness.iter_mut().zip(before.lateness) {
                *now -= then;
            }
            let made: u64 = window.lateness.iter().sum();
            let wanted = f64::from(BACKENDS) * start.elapsed().as_secs_f64() / INTERVAL.as_secs_f64();
            ensure!(made as f64 > wanted * 0.8, "{made} checks instead of {wanted:.0}: the bench does not keep up");
            late.push(window.lateness(0.99).as_nanos() as f64);
            cpu.push(spent / start.elapsed().as_secs_f64());
            sockets.push(after.most_running as f64);
        }
        let rows = handle.rows();
        let healthy = rows.iter().filter(|row| row.state == "up" && row.fails == 0).count();
        let error = rows.iter().find_map(|row| row.error.clone()).unwrap_or_default();
        ensure!(healthy == rows.len(), "{healthy} of {} backends passed every check: {error}", rows.len());
        Ok(())
    })?;
    let name = |what: &str| format!("health/5000-backends/{what}");
    Ok(vec![
        Figure::net(name("lateness-p99"), "ns", late, 0.0),
        Figure::net(name("cpu"), "cpu", cpu, 0.0),
        Figure::net(name("sockets"), "count", sockets, 0.0),
    ])
}

fn targets() -> Targets {
    let health = Arc::new(Health {
        check: Check::Tcp(Exchange::default()),
        interval: INTERVAL,
        fast_interval: INTERVAL,
        jitter: 10,
        timeout: INTERVAL,
        fall: 3,
        rise: 2,
        port: None,
        mandatory: false,
        panic: 0,
        passive: None,
    });
    let target = Target { health, source: None, start: Verdict::Up, reachable: true };
    let address = |number: u32| SocketAddr::from((Ipv4Addr::from(0x7f01_0000 + number), PORT));
    (1..=BACKENDS).map(|number| (("bench".to_owned(), address(number)), target.clone())).collect()
}

/// CPU time of the threads that make checks, user and system.
fn cpu_seconds() -> Result<f64> {
    let mut ticks = 0;
    for task in fs::read_dir("/proc/self/task").context("list the threads")?.flatten() {
        let Ok(text) = fs::read_to_string(task.path().join("stat")) else { continue };
        if text.split(')').next().is_some_and(|head| head.ends_with("(checks")) {
            ticks += super::ticks_of(&text).unwrap_or_default();
        }
    }
    Ok(ticks as f64 / TICKS)
}
