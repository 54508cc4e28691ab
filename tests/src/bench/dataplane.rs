//! Nanoseconds per packet by BPF_PROG_TEST_RUN: a wrapper program writes the headers and picks the flow, then runs the
//! pipeline; the same wrapper without the pipeline, run in turn with it, is the baseline. Entries are written before the runs;
//! their touch lies ahead, since at one touch in 16 s it costs a packet nothing that can be measured. All on one CPU, whose
//! part of the flow cache is all of it, but for the figures of several receive queues.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::atomic::{AtomicBool, Ordering},
};

use anyhow::{Context, Result, ensure};
use aya::{
    TestRun, TestRunOptions,
    programs::{SchedClassifier, Xdp},
};
use edge_common::{
    address::unmapped,
    conntrack::{Direction, State},
    flow::TCP,
    maps::{NeighbourKey, NextHop, WAYS, mode, name},
};
use edge_ctl::datapath::stages;

use super::Figure;
use crate::datapath::{
    cpu,
    frame::{Frame, flag},
    namespace::{in_namespace, ip},
    rig::{
        CLIENT_MAC, CLIENT6, Entry, Family, Hook, PODS_MAC, Rig, Settings, UPLINK_MAC, key, load_program, pod, pod_mac,
        skb_context, wire, xdp_context,
    },
};
use beside::Beside;
use cases::{Case, Pick, Subject, cases};

mod beside;
mod cases;

static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("EDGE_BENCH_OBJECT"));

const MILLION: u32 = 1 << 20;
/// As in the wrapper: ports that one address has.
const PORTS: u32 = 1 << 14;
const FIRST_PORT: u16 = 20_000;
const LISTEN: u16 = 8443;
/// Packets at a time on queues beside the one that is measured.
const BESIDE: u32 = 5_000;

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Runs of the program and of its baseline, in turn.
    pub runs: u32,
    /// Packets in a run; of a few flows twice as many.
    pub packets: u32,
    /// Flows that stand for a million; a power of two.
    pub many: u32,
}

impl Effort {
    /// For figures that are written down.
    pub const WHOLE: Self = Self { runs: 15, packets: 100_000, many: MILLION };
    /// For ratios that tests hold.
    pub const SMALL: Self = Self { runs: 15, packets: 30_000, many: 1 << 16 };
}

/// Measures every figure whose name contains one of the words of `filter`, all of them where it is empty.
///
/// # Errors
/// Where the namespace, the object or a test run is refused; and where the packets measured did not do what the
/// figure's name says.
pub fn run(filter: &str) -> Result<Vec<Figure>> {
    let is_meant = |case: &Case| filter.is_empty() || filter.split_whitespace().any(|word| case.name.contains(word));
    cases(Effort::WHOLE).into_iter().filter(is_meant).map(|case| measured(&case, Effort::WHOLE)).collect()
}

/// Measures the figure of this name.
///
/// # Errors
/// As [`run`], and where there is no such figure.
pub fn figure(name: &str, effort: Effort) -> Result<Figure> {
    let case = cases(effort).into_iter().find(|case| case.name == name);
    measured(&case.with_context(|| format!("no figure {name}"))?, effort)
}

fn measured(case: &Case, effort: Effort) -> Result<Figure> {
    let cpus = cpu::allowed()?;
    let cpus = cpus.get(..case.queues).with_context(|| format!("{} needs {} CPUs", case.name, case.queues))?;
    let cpu = *cpus.first().context("no CPU")?;
    in_namespace(|| cpu::on(cpu, || measure(case, cpus, effort.runs)))
}

/// The forward entry of flow `n`, established: the wrapper's arithmetic for its client, a backend and SNAT port of
/// its own.
fn forward(n: u32, case: &Case) -> Entry {
    // The wrapper varies the source address only. A dnat reply goes to the client's, so that one is kept the same
    // there, and the VIP varies for the client's half.
    let (client, vip) = match (case.mode, case.subject) {
        (mode::DNAT, Subject::Reply) => (case.first_client(), offset(case.family.vip(), n / PORTS)),
        _ => (offset(case.first_client(), n / PORTS), case.family.vip()),
    };
    let client = SocketAddr::new(client, FIRST_PORT + (n % PORTS) as u16);
    let backend = SocketAddr::new(offset(case.first_backend(), n / PORTS), 443);
    let source = match case.mode {
        mode::DNAT => client,
        _ => SocketAddr::new(case.family.snat(), FIRST_PORT + (n % PORTS) as u16),
    };
    let mut flow = Entry {
        key: key(client, SocketAddr::new(vip, LISTEN), TCP),
        new_src: wire(source.ip()),
        new_dst: wire(backend.ip()),
        new_src_port: source.port().to_be(),
        new_dst_port: backend.port().to_be(),
        next_hop: 1,
        route_generation: 1,
        service: 1,
        backend: 1,
        sequence: 2,
        state: State::Established as u8,
        direction: Direction::Forward as u8,
        // Of the reply: noted already.
        first_byte_after: 1,
        ..Entry::default()
    };
    (flow.address_delta, flow.port_delta) = deltas(&flow);
    flow
}

/// Both checksum differences; of IPv4 over its own addresses.
fn deltas(flow: &Entry) -> (u16, u16) {
    use edge_common::checksum::{address_delta, port_delta};
    let addresses = [flow.key.src, flow.key.dst, flow.new_src, flow.new_dst];
    let address = match addresses.map(|address| unmapped(&address)) {
        [Some(src), Some(dst), Some(new_src), Some(new_dst)] => address_delta(src, dst, new_src, new_dst),
        _ => address_delta(addresses[0], addresses[1], addresses[2], addresses[3]),
    };
    let ports = port_delta(flow.key.src_port, flow.key.dst_port, flow.new_src_port, flow.new_dst_port);
    (address, ports)
}

fn offset(address: IpAddr, by: u32) -> IpAddr {
    match address {
        IpAddr::V4(address) => Ipv4Addr::from(u32::from(address) + by).into(),
        IpAddr::V6(address) => Ipv6Addr::from(u128::from(address) + u128::from(by)).into(),
    }
}

fn measure(case: &Case, cpus: &[u32], runs: u32) -> Result<Figure> {
    let entries = 2 * (case.flows + case.idle) + 1024;
    let settings = Settings {
        established: if case.subject == Subject::Lookup { 1024 } else { entries },
        lru: if case.subject == Subject::Lookup { (2 * case.flows).max(1 << 18) } else { 1 << 18 },
        snat_ports: (1024, 65535),
        family: case.family,
        // Two slots for each flow on every CPU.
        cache: (2 * case.flows / WAYS as u32).max(64) * cpus.len() as u32,
        ..Settings::default()
    };
    let mut rig = Rig::from_object(OBJECT, case.hook, settings)?;
    rig.cache.split(cpus)?;
    rig.service(1, LISTEN, TCP, case.mode, 16, 443)?;
    for n in 0..=MILLION / PORTS {
        if case.mode == mode::DNAT {
            rig.filter_source(offset(case.first_backend(), n))?;
        }
    }
    next_hops(&mut rig)?;
    fill(&mut rig, case)?;
    // An established IPv4 packet leaves from the entry program; loading stages takes seconds.
    if case.subject == Subject::NewFlow || case.family == Family::V6 {
        stages::fill(&mut rig.ebpf, case.hook == Hook::Xdp, false)?;
    }
    let programs = case.programs();
    for program in programs {
        load_program(&mut rig.ebpf, program)?;
    }
    warm_up(&mut rig, case, cpus)?;
    let beside = (case.storm != 0).then(|| Beside::start(&rig, case.storm)).transpose()?;
    let before = counted(&rig);
    let mut times = [Vec::new(), Vec::new()];
    let others = cpus.get(1..).unwrap_or_default();
    for _ in 0..runs {
        // In turn, so that whatever else the machine does meets both.
        for (program, times) in programs.into_iter().zip(&mut times) {
            times.push(beside_others(&rig, case, program, others)?);
        }
    }
    let after = counted(&rig);
    drop(beside);
    check(&mut rig, case, runs)?;
    let [baseline, subject] = times;
    let baseline = baseline.into_iter().fold(f64::INFINITY, f64::min);
    let mut figure = Figure::net(case.name.clone(), "ns", subject, baseline);
    if matches!(case.subject, Subject::Forward | Subject::Reply) {
        let [hits, misses, told] = [0, 1, 2].map(|at| (after[at] - before[at]) as f64);
        figure.hit_rate = Some(hits / (hits + misses));
        figure.lookups = Some((misses + told) / (hits + misses));
    }
    Ok(figure)
}

/// What a packet finds is warm: on every CPU the cache has met each flow, the half-open table is at its fullest.
fn warm_up(rig: &mut Rig, case: &Case, cpus: &[u32]) -> Result<()> {
    write_scripts(rig, case, if case.is_new() { case.pick } else { Pick::InTurn })?;
    let subject = case.programs()[1];
    for cpu in cpus {
        cpu::on(*cpu, || time(rig, case, subject, case.warm_up()))?;
    }
    // New flows go on from where they are.
    if case.is_new() { Ok(()) } else { write_scripts(rig, case, case.pick) }
}

/// Nanoseconds per packet on this CPU, while each of `others` runs the same.
fn beside_others(rig: &Rig, case: &Case, program: &str, others: &[u32]) -> Result<f64> {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let busy = |cpu: u32| {
            let stop = &stop;
            scope.spawn(move || {
                cpu::on(cpu, || {
                    while !stop.load(Ordering::Relaxed) {
                        time(rig, case, program, BESIDE)?;
                    }
                    Ok(())
                })
            })
        };
        let threads: Vec<_> = others.iter().copied().map(busy).collect();
        let measured = time(rig, case, program, case.repeat);
        stop.store(true, Ordering::Relaxed);
        for thread in threads {
            thread.join().map_err(|_| anyhow::anyhow!("a queue's thread panicked"))??;
        }
        measured
    })
}

/// Hits, misses, and lookups for displaced slots, of all CPUs.
fn counted(rig: &Rig) -> [u64; 3] {
    let cpus = rig.cache.cpus();
    let sum = |of: fn(&edge_ctl::datapath::cache::CpuCache) -> u64| cpus.iter().map(of).sum();
    [sum(|cpu| cpu.hits), sum(|cpu| cpu.misses), sum(|cpu| cpu.told)]
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
    ip("route add default via 172.16.1.10")?;
    ip(&format!("-6 route add default via {CLIENT6}"))
}

fn fill(rig: &mut Rig, case: &Case) -> Result<()> {
    let now = edge_ctl::datapath::sys::monotonic_ns();
    // An hour ahead, in ticks.
    let touch_due = edge_common::conntrack::ticks(now + 3_600_000_000_000);
    let table = if case.subject == Subject::Lookup { name::HALF_OPEN } else { name::ESTABLISHED };
    if case.subject == Subject::NotOurs || case.is_new() && case.flows == 1 {
        return Ok(());
    }
    for n in 0..case.flows + case.idle {
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

fn frame(case: &Case) -> Vec<u8> {
    let vip = SocketAddr::new(case.family.vip(), LISTEN);
    let client = SocketAddr::new(case.first_client(), FIRST_PORT);
    let frame = match case.subject {
        Subject::Forward | Subject::Lookup => Frame::tcp(client, vip, flag::ACK),
        Subject::NewFlow | Subject::BareNewFlow => Frame::tcp(client, vip, flag::SYN),
        Subject::NotOurs => Frame::tcp(client, SocketAddr::new(Ipv4Addr::new(192, 0, 2, 1).into(), 443), flag::ACK),
        Subject::Reply => {
            let to = if case.mode == mode::DNAT { client } else { SocketAddr::new(case.family.snat(), FIRST_PORT) };
            Frame::tcp(SocketAddr::new(case.first_backend(), 443), to, flag::ACK)
        }
    };
    frame.payload(vec![0; 10]).bytes()
}

/// Words of the wrapper's script: ten of frame, seven numbers, seven of nothing.
const SCRIPT: usize = 24;

/// Writes every CPU's script.
fn write_scripts(rig: &mut Rig, case: &Case, pick: Pick) -> Result<()> {
    let mut frame = frame(case);
    frame.resize(80, 0);
    let mut script = [0u64; SCRIPT];
    for (word, bytes) in script.iter_mut().zip(frame.chunks(8)) {
        *word = u64::from_ne_bytes(bytes.try_into().context("frame shorter than its headers")?);
    }
    let first = match (case.subject, case.first_client(), case.first_backend()) {
        (Subject::Reply, _, IpAddr::V4(backend)) => u32::from(backend),
        (Subject::Reply, _, IpAddr::V6(backend)) => u128::from(backend) as u32,
        (Subject::NewFlow | Subject::BareNewFlow, IpAddr::V4(_), _) => u32::from(Ipv4Addr::new(101, 0, 0, 0)),
        // Beyond the clients of established flows: a SYN of theirs would begin nothing.
        (Subject::NewFlow | Subject::BareNewFlow, IpAddr::V6(client), _) => {
            (u128::from(client) as u32).wrapping_add(1 << 16)
        }
        (_, IpAddr::V4(client), _) => u32::from(client),
        (_, IpAddr::V6(client), _) => u128::from(client) as u32,
    };
    script[11] = if case.is_new() { 0 } else { u64::from(case.flows) };
    script[12] = u64::from(first);
    script[13] = u64::from(FIRST_PORT);
    script[14] = u64::from(case.subject == Subject::Reply);
    script[15] = pick as u64;
    script[16] = u64::from(u32::from(pod(0)).to_be());
    let mut scripts = rig.array::<[u64; SCRIPT]>("SCRIPT")?;
    for cpu in cpu::allowed()? {
        // Each begins elsewhere.
        script[10] = u64::from(cpu) << 40;
        scripts.set(cpu, script, 0)?;
    }
    Ok(())
}

/// Nanoseconds per run, as the kernel counts them.
fn time(rig: &Rig, case: &Case, name: &str, repeat: u32) -> Result<f64> {
    // The frame's headers and the ten bytes that follow them.
    let frame = vec![0u8; if case.family == Family::V4 { 64 } else { 84 }];
    let ingress = rig.uplink;
    let program = rig.ebpf.program(name).with_context(|| format!("no program {name}"))?;
    let context = match case.hook {
        Hook::Xdp => xdp_context(frame.len() as u32, ingress),
        Hook::Tc => skb_context(ingress, 0, 0),
    };
    let options = TestRunOptions { data_in: Some(&frame), ctx_in: Some(&context), repeat, ..TestRunOptions::default() };
    let result = match case.hook {
        Hook::Xdp => <&Xdp>::try_from(program)?.test_run(options)?,
        Hook::Tc => <&SchedClassifier>::try_from(program)?.test_run(options)?,
    };
    Ok(result.duration.as_nanos() as f64)
}

/// The packets did what the figure's name says.
fn check(rig: &mut Rig, case: &Case, runs: u32) -> Result<()> {
    let stats = rig.service_stats(1)?;
    let expected = u64::from(runs) * u64::from(case.repeat) + u64::from(case.warm_up());
    let counted = match case.subject {
        Subject::Forward => stats.packets_in,
        Subject::Reply => stats.packets_out,
        Subject::NewFlow => stats.half_opened,
        Subject::NotOurs | Subject::Lookup | Subject::BareNewFlow => return Ok(()),
    };
    // A new flow may, rarely, meet a full LRU bucket; an established packet may not meet anything.
    let enough = if case.is_new() { expected / 100 * 99 } else { expected };
    ensure!(counted >= enough, "{}: {counted} of {expected} packets, {:?}", case.name, rig.reasons()?);
    Ok(())
}
