//! Nanoseconds per packet by BPF_PROG_TEST_RUN: a wrapper program writes the headers and picks the flow, then runs the
//! pipeline; the same wrapper without the pipeline is the baseline. Entries are written before the runs; their touch
//! lies ahead, since at one touch in 16 s it costs a packet nothing that can be measured.

use std::net::{Ipv4Addr, SocketAddrV4};

use anyhow::{Context, Result, ensure};
use aya::{
    TestRun, TestRunOptions,
    programs::{SchedClassifier, Xdp},
};
use edge_common::{
    conntrack::{Direction, State},
    flow::TCP,
    maps::{NeighbourKey, NextHop, mode, name},
};
use edge_ctl::datapath::stages;

use super::Figure;
use crate::datapath::{
    frame::{Frame, flag},
    namespace::in_namespace,
    rig::{
        CLIENT_MAC, Entry, Hook, PODS_MAC, Rig, SNAT, Settings, UPLINK_MAC, VIP, key, load_program, pod, pod_mac,
        skb_context, wire, xdp_context,
    },
};

static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("EDGE_BENCH_OBJECT"));

const RUNS: u32 = 15;
const MILLION: u32 = 1 << 20;
/// As in the wrapper: ports that one address has.
const PORTS: u32 = 1 << 14;
const FIRST_PORT: u16 = 20_000;
const FIRST_CLIENT: Ipv4Addr = Ipv4Addr::new(100, 64, 0, 0);
const FIRST_BACKEND: Ipv4Addr = Ipv4Addr::new(10, 1, 64, 0);
const LISTEN: u16 = 8443;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Subject {
    Forward,
    Reply,
    NewFlow,
    NotOurs,
    Lookup,
}

struct Case {
    name: String,
    hook: Hook,
    mode: u8,
    subject: Subject,
    flows: u32,
}

impl Case {
    /// Packets in one run: enough for a nanosecond's resolution, few enough that all cases take a minute or two.
    fn repeat(&self) -> u32 {
        if self.flows > 1 || self.subject == Subject::NewFlow { 200_000 } else { 500_000 }
    }
}

/// Measures every figure whose name contains `filter`.
///
/// # Errors
/// Where the namespace, the object or a test run is refused; and where the packets measured did not do what the
/// figure's name says.
pub fn run(filter: &str) -> Result<Vec<Figure>> {
    cases().into_iter().filter(|case| case.name.contains(filter)).map(|case| in_namespace(|| measure(&case))).collect()
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (hook, hook_name) in [(Hook::Xdp, "xdp"), (Hook::Tc, "tc")] {
        for (mode, mode_name) in [(mode::FULL_NAT, "full-nat"), (mode::DNAT, "dnat")] {
            for (subject, subject_name) in [
                (Subject::Forward, "established-forward"),
                (Subject::Reply, "established-reply"),
                (Subject::NewFlow, "new-flow"),
            ] {
                for (flows, flows_name) in [(1, "1-flow"), (MILLION, "1m-flows")] {
                    let name = format!("dataplane/{hook_name}/{mode_name}/v4/{subject_name}/{flows_name}");
                    cases.push(Case { name, hook, mode, subject, flows });
                }
            }
        }
    }
    let xdp = |name: &str, subject, flows| Case {
        name: format!("dataplane/xdp/{name}"),
        hook: Hook::Xdp,
        mode: mode::FULL_NAT,
        subject,
        flows,
    };
    cases.push(xdp("non-vip/1-flow", Subject::NotOurs, 1));
    cases.push(xdp("bare-lru-lookup/1-flow", Subject::Lookup, 1));
    cases.push(xdp("bare-lru-lookup/1m-flows", Subject::Lookup, MILLION));
    cases
}

/// The forward entry of flow `n`, established: the wrapper's arithmetic for its client, a backend and SNAT port of
/// its own.
fn forward(n: u32, case: &Case) -> Entry {
    // The wrapper varies the source address only. A dnat reply goes to the client's, so that one is kept the same
    // there, and the VIP varies for the client's half.
    let (client, vip) = match (case.mode, case.subject) {
        (mode::DNAT, Subject::Reply) => (FIRST_CLIENT, offset(VIP, n / PORTS)),
        _ => (offset(FIRST_CLIENT, n / PORTS), VIP),
    };
    let client = SocketAddrV4::new(client, FIRST_PORT + (n % PORTS) as u16);
    let backend = SocketAddrV4::new(offset(FIRST_BACKEND, n / PORTS), 443);
    let source = match case.mode {
        mode::DNAT => client,
        _ => SocketAddrV4::new(SNAT, FIRST_PORT + (n % PORTS) as u16),
    };
    let mut flow = Entry {
        key: key(client, SocketAddrV4::new(vip, LISTEN), TCP),
        new_src: wire(*source.ip()),
        new_dst: wire(*backend.ip()),
        new_src_port: source.port().to_be(),
        new_dst_port: backend.port().to_be(),
        next_hop: 1,
        route_generation: 1,
        service: 1,
        backend: 1,
        sequence: 2,
        state: State::Established as u8,
        direction: Direction::Forward as u8,
        ..Entry::default()
    };
    flow.set_deltas();
    flow
}

fn offset(address: Ipv4Addr, by: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(address) + by)
}

fn measure(case: &Case) -> Result<Figure> {
    let settings = Settings {
        established: if case.flows > 1 { 2 * MILLION + 1024 } else { 1024 },
        lru: if case.subject == Subject::Lookup && case.flows > 1 { 2 * MILLION } else { 1 << 18 },
        snat_ports: (1024, 65535),
        cache: std::env::var("EDGE_BENCH_SETS").ok().and_then(|sets| sets.parse().ok()).unwrap_or(if case.flows > 1 { 1 << 20 } else { 512 }),
        ..Settings::default()
    };
    let mut rig = Rig::from_object(OBJECT, case.hook, settings)?;
    rig.service(1, LISTEN, TCP, case.mode, 16, 443)?;
    for n in 0..=MILLION / PORTS {
        if case.mode == mode::DNAT {
            rig.filter_source(offset(FIRST_BACKEND, n))?;
        }
    }
    next_hops(&mut rig)?;
    fill(&mut rig, case)?;
    write_script(&mut rig, case)?;
    let (subject, baseline) = match (case.hook, case.subject) {
        (Hook::Xdp, Subject::Lookup) => ("bench_xdp_lookup", "bench_xdp_baseline"),
        (Hook::Xdp, _) => ("bench_xdp_pipeline", "bench_xdp_baseline"),
        (Hook::Tc, _) => ("bench_tc_pipeline", "bench_tc_baseline"),
    };
    stages::fill(&mut rig.ebpf, case.hook == Hook::Xdp)?;
    let mut times = [Vec::new(), Vec::new()];
    for (program, times) in [baseline, subject].into_iter().zip(&mut times) {
        load_program(&mut rig.ebpf, program)?;
        for _ in 0..RUNS {
            times.push(time(&mut rig, case, program)?);
        }
    }
    check(&mut rig, case)?;
    let [baseline, subject] = times;
    let baseline = baseline.into_iter().fold(f64::INFINITY, f64::min);
    Ok(Figure::net(case.name.clone(), "ns", subject, baseline))
}

/// Next hop 1 towards the backends, 2 towards the clients.
fn next_hops(rig: &mut Rig) -> Result<()> {
    let hops = [
        (1, rig.pods, pod(0), pod_mac(0), PODS_MAC),
        (2, rig.uplink, Ipv4Addr::new(172, 16, 1, 10), CLIENT_MAC, UPLINK_MAC),
    ];
    for (number, ifindex, neighbour, dst_mac, src_mac) in hops {
        let hop = NextHop { ifindex, neighbour: wire(neighbour), dst_mac, src_mac, mtu: 1500, ..NextHop::default() };
        rig.array(name::NEXT_HOPS)?.set(number, hop, 0)?;
        let key = NeighbourKey { ifindex, address: hop.neighbour };
        rig.hash(name::NEXT_HOP_INDEX)?.insert(key, number, 0)?;
        rig.array(name::NEXT_HOP_CURSOR)?.set(0, number, 0)?;
    }
    // Clients of new flows are anywhere; their replies are not measured.
    crate::datapath::namespace::ip("route add default via 172.16.1.10")
}

fn fill(rig: &mut Rig, case: &Case) -> Result<()> {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    clock(&mut now)?;
    let now = now.tv_sec as u64 * 1_000_000_000;
    // An hour ahead, in ticks.
    let touch_due = edge_common::conntrack::ticks(now + 3_600_000_000_000);
    let table = if case.subject == Subject::Lookup { name::HALF_OPEN } else { name::ESTABLISHED };
    if matches!(case.subject, Subject::NotOurs) || (case.subject == Subject::NewFlow && case.flows == 1) {
        return Ok(());
    }
    for n in 0..case.flows {
        let mut flow = forward(n, case);
        flow.touch_due = touch_due;
        flow.created = now;
        flow.last_seen = now;
        rig.put_flow(table, &flow)?;
        if case.subject != Subject::Lookup {
            flow.turn();
            flow.next_hop = 2;
            flow.route_generation = 1;
            rig.put_flow(table, &flow)?;
        }
    }
    Ok(())
}

#[allow(unsafe_code, reason = "clock_gettime(2)")]
fn clock(now: &mut libc::timespec) -> Result<()> {
    // SAFETY: writes the one timespec it is given.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, now) };
    ensure!(result == 0, "clock_gettime: {}", std::io::Error::last_os_error());
    Ok(())
}

fn frame(case: &Case) -> Vec<u8> {
    let vip = SocketAddrV4::new(VIP, LISTEN);
    let client = SocketAddrV4::new(FIRST_CLIENT, FIRST_PORT);
    let frame = match case.subject {
        Subject::Forward | Subject::Lookup => Frame::tcp(client, vip, flag::ACK),
        Subject::NewFlow => Frame::tcp(client, vip, flag::SYN),
        Subject::NotOurs => Frame::tcp(client, SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, 1), 443), flag::ACK),
        Subject::Reply => {
            let to = if case.mode == mode::DNAT { client } else { SocketAddrV4::new(SNAT, FIRST_PORT) };
            Frame::tcp(SocketAddrV4::new(FIRST_BACKEND, 443), to, flag::ACK)
        }
    };
    frame.payload(vec![0; 10]).bytes()
}

/// The wrapper's script, as seven words of frame and five numbers.
fn write_script(rig: &mut Rig, case: &Case) -> Result<()> {
    let frame = frame(case);
    let mut script = [0u64; 12];
    for (word, bytes) in script.iter_mut().zip(frame[..56].chunks(8)) {
        *word = u64::from_ne_bytes(bytes.try_into().context("frame shorter than its headers")?);
    }
    let first = match case.subject {
        Subject::Reply => FIRST_BACKEND,
        Subject::NewFlow => Ipv4Addr::new(101, 0, 0, 0),
        _ => FIRST_CLIENT,
    };
    script[8] = if case.subject == Subject::NewFlow { 0 } else { u64::from(case.flows) };
    script[9] = u64::from(u32::from(first));
    script[10] = u64::from(FIRST_PORT);
    script[11] = u64::from(case.subject == Subject::Reply);
    Ok(rig.array::<[u64; 12]>("SCRIPT")?.set(0, script, 0)?)
}

/// Nanoseconds per run, as the kernel counts them.
fn time(rig: &mut Rig, case: &Case, name: &str) -> Result<f64> {
    let frame = vec![0u8; 64];
    let ingress = rig.uplink;
    let program = rig.ebpf.program(name).with_context(|| format!("no program {name}"))?;
    let context = match case.hook {
        Hook::Xdp => xdp_context(frame.len() as u32, ingress),
        Hook::Tc => skb_context(ingress, 0, 0),
    };
    let options = TestRunOptions {
        data_in: Some(&frame),
        ctx_in: Some(&context),
        repeat: case.repeat(),
        ..TestRunOptions::default()
    };
    let result = match case.hook {
        Hook::Xdp => <&Xdp>::try_from(program)?.test_run(options)?,
        Hook::Tc => <&SchedClassifier>::try_from(program)?.test_run(options)?,
    };
    Ok(result.duration.as_nanos() as f64)
}

/// The packets did what the figure's name says.
fn check(rig: &mut Rig, case: &Case) -> Result<()> {
    let stats = rig.service_stats(1)?;
    let expected = u64::from(RUNS) * u64::from(case.repeat());
    let counted = match case.subject {
        Subject::Forward => stats.packets_in,
        Subject::Reply => stats.packets_out,
        Subject::NewFlow => stats.half_opened,
        Subject::NotOurs | Subject::Lookup => return Ok(()),
    };
    // A new flow may, rarely, meet a full LRU bucket; an established packet may not meet anything.
    let enough = if case.subject == Subject::NewFlow { expected / 100 * 99 } else { expected };
    ensure!(counted >= enough, "{}: {counted} of {expected} packets, {:?}", case.name, rig.reasons()?);
    Ok(())
}
