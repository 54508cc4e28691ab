//! Nanoseconds per packet by BPF_PROG_TEST_RUN: a wrapper program writes the headers and picks the flow, then runs the
//! pipeline; the same wrapper without the pipeline, run in turn with it, is the baseline. Entries are written before the runs;
//! their touch lies ahead, since at one touch in 16 s it costs a packet nothing that can be measured. All on one CPU, whose
//! part of the flow cache is all of it.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use aya::{
    TestRun, TestRunOptions,
    maps::{HashMap, Map, MapData},
    programs::{SchedClassifier, Xdp},
};
use edge_common::{
    address::unmapped,
    conntrack::{Direction, State},
    flow::{FlowKey, FlowKeyV4, TCP},
    maps::{FlowV4, NeighbourKey, NextHop, mode, name},
};
use edge_ctl::datapath::{cache::FlowCache, stages};

use super::Figure;
use crate::datapath::{
    cpu,
    frame::{Frame, flag},
    namespace::{in_namespace, ip},
    rig::{
        CLIENT_MAC, CLIENT6, Entry, Family, Hook, PODS_MAC, Rig, Settings, UPLINK_MAC, key, load_program, map_cache,
        pod, pod_mac, skb_context, wire, xdp_context,
    },
};

static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("EDGE_BENCH_OBJECT"));

const RUNS: u32 = 15;
const MILLION: u32 = 1 << 20;
/// As in the wrapper: ports that one address has.
const PORTS: u32 = 1 << 14;
const FIRST_PORT: u16 = 20_000;
const LISTEN: u16 = 8443;
/// Flows opened and closed per second beside a measurement with churn.
const CHURN: u32 = 10_000;
/// Sets of each family's cache: two slots for each of a million flows.
const SETS: u32 = 1 << 20;

/// What is measured.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Subject {
    Forward,
    Reply,
    NewFlow,
    NotOurs,
    Lookup,
    BareNewFlow,
}

/// Which of the flows a packet is of.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mix {
    Uniform,
    Zipf,
    /// Uniform, while others are opened and closed.
    Churn,
}

struct Case {
    name: String,
    hook: Hook,
    mode: u8,
    family: Family,
    subject: Subject,
    flows: u32,
    mix: Mix,
}

impl Case {
    /// Packets in one run: enough for a nanosecond's resolution, few enough that all cases take some minutes.
    fn repeat(&self) -> u32 {
        if self.flows > 1 || self.is_new() { 200_000 } else { 500_000 }
    }

    /// Runs before those that count: the wrapper has picked every flow after as many packets as there are flows, or few more.
    fn warm_ups(&self) -> u32 {
        if self.is_new() { 2 } else { 1 + self.flows * 3 / 2 / self.repeat() }
    }

    fn is_new(&self) -> bool {
        matches!(self.subject, Subject::NewFlow | Subject::BareNewFlow)
    }

    fn first_client(&self) -> IpAddr {
        match self.family {
            Family::V4 => Ipv4Addr::new(100, 64, 0, 0).into(),
            Family::V6 => Ipv6Addr::new(0x2001, 0xdb8, 0x64, 0, 0, 0, 0x64, 0).into(),
        }
    }

    fn first_backend(&self) -> IpAddr {
        match self.family {
            Family::V4 => Ipv4Addr::new(10, 1, 64, 0).into(),
            Family::V6 => Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0x64, 0).into(),
        }
    }

    /// Baseline and subject.
    fn programs(&self) -> [&'static str; 2] {
        match (self.hook, self.family, self.subject) {
            (Hook::Xdp, _, Subject::Lookup) => ["bench_xdp_baseline", "bench_xdp_lookup"],
            (Hook::Xdp, _, Subject::BareNewFlow) => ["bench_xdp_baseline", "bench_xdp_new"],
            (Hook::Xdp, Family::V4, _) => ["bench_xdp_baseline", "bench_xdp_pipeline"],
            (Hook::Xdp, Family::V6, _) => ["bench_xdp_base6", "bench_xdp_pipe6"],
            (Hook::Tc, Family::V4, _) => ["bench_tc_baseline", "bench_tc_pipeline"],
            (Hook::Tc, Family::V6, _) => ["bench_tc_base6", "bench_tc_pipe6"],
        }
    }
}

/// Measures every figure whose name contains one of the words of `filter`, all of them where it is empty.
///
/// # Errors
/// Where the namespace, the object or a test run is refused; and where the packets measured did not do what the
/// figure's name says.
pub fn run(filter: &str) -> Result<Vec<Figure>> {
    let is_meant = |case: &Case| filter.is_empty() || filter.split_whitespace().any(|word| case.name.contains(word));
    let cpu = *cpu::allowed()?.first().context("no CPU")?;
    cases().into_iter().filter(is_meant).map(|case| in_namespace(|| cpu::on(cpu, || measure(&case, cpu)))).collect()
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (hook, hook_name) in [(Hook::Xdp, "xdp"), (Hook::Tc, "tc")] {
        for (mode, mode_name) in [(mode::FULL_NAT, "full-nat"), (mode::DNAT, "dnat")] {
            for (family, family_name) in [(Family::V4, "v4"), (Family::V6, "v6")] {
                for (subject, subject_name) in [
                    (Subject::Forward, "established-forward"),
                    (Subject::Reply, "established-reply"),
                    (Subject::NewFlow, "new-flow"),
                ] {
                    for (flows, mix, flows_name) in [
                        (1, Mix::Uniform, "1-flow"),
                        (MILLION, Mix::Uniform, "1m-flows"),
                        (MILLION, Mix::Zipf, "1m-flows-zipf"),
                    ] {
                        let name =
                            format!("dataplane/{hook_name}/{mode_name}/{family_name}/{subject_name}/{flows_name}");
                        cases.push(Case { name, hook, mode, family, subject, flows, mix });
                    }
                }
            }
        }
    }
    let xdp = |name: &str, subject, flows, mix| Case {
        name: format!("dataplane/xdp/{name}"),
        hook: Hook::Xdp,
        mode: mode::FULL_NAT,
        family: Family::V4,
        subject,
        flows,
        mix,
    };
    let churn = "full-nat/v4/established-forward/1m-flows-churn";
    cases.extend([
        xdp(churn, Subject::Forward, MILLION, Mix::Churn),
        xdp("non-vip/1-flow", Subject::NotOurs, 1, Mix::Uniform),
        xdp("non-vip/1m-sources", Subject::NotOurs, MILLION, Mix::Uniform),
        // As a new flow beside a million: the wrapper's sources are all different, and the half-open table is full.
        xdp("syn-flood/1m-flows", Subject::NewFlow, MILLION, Mix::Uniform),
        xdp("bare-new-flow/1-flow", Subject::BareNewFlow, 1, Mix::Uniform),
        xdp("bare-new-flow/1m-flows", Subject::BareNewFlow, MILLION, Mix::Uniform),
        xdp("bare-lru-lookup/1-flow", Subject::Lookup, 1, Mix::Uniform),
        xdp("bare-lru-lookup/1m-flows", Subject::Lookup, MILLION, Mix::Uniform),
        xdp("bare-lru-lookup/1m-flows-zipf", Subject::Lookup, MILLION, Mix::Zipf),
    ]);
    cases
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

fn measure(case: &Case, cpu: u32) -> Result<Figure> {
    let settings = Settings {
        established: if case.flows > 1 { 2 * MILLION + 1024 } else { 1024 },
        lru: if case.subject == Subject::Lookup && case.flows > 1 { 2 * MILLION } else { 1 << 18 },
        snat_ports: (1024, 65535),
        family: case.family,
        cache: if case.flows > 1 { SETS } else { 512 },
        ..Settings::default()
    };
    let mut rig = Rig::from_object(OBJECT, case.hook, settings)?;
    rig.cache.split(&[cpu])?;
    rig.service(1, LISTEN, TCP, case.mode, 16, 443)?;
    for n in 0..=MILLION / PORTS {
        if case.mode == mode::DNAT {
            rig.filter_source(offset(case.first_backend(), n))?;
        }
    }
    next_hops(&mut rig)?;
    fill(&mut rig, case)?;
    write_script(&mut rig, case)?;
    stages::fill(&mut rig.ebpf, case.hook == Hook::Xdp, false)?;
    let programs = case.programs();
    for program in programs {
        load_program(&mut rig.ebpf, program)?;
    }
    let beside = (case.mix == Mix::Churn).then(|| Beside::start(&rig)).transpose()?;
    // What a packet finds is warm: the cache has met every flow, the half-open table is at its fullest.
    for _ in 0..case.warm_ups() {
        time(&mut rig, case, programs[1])?;
    }
    let before = counted(&rig);
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..RUNS {
        // In turn, so that whatever else the machine does meets both.
        for (program, times) in programs.into_iter().zip(&mut times) {
            times.push(time(&mut rig, case, program)?);
        }
    }
    let after = counted(&rig);
    drop(beside);
    check(&mut rig, case)?;
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

/// Hits, misses, and lookups for displaced slots, of all CPUs.
fn counted(rig: &Rig) -> [u64; 3] {
    let cpus = rig.cache.cpus();
    let sum = |of: fn(&edge_ctl::datapath::cache::CpuCache) -> u64| cpus.iter().map(of).sum();
    [sum(|cpu| cpu.hits), sum(|cpu| cpu.misses), sum(|cpu| cpu.told)]
}

/// Flows that are opened and closed on another thread, as the daemon would see them: both halves into the established table,
/// both out of it, and both buckets' generations.
struct Beside {
    stop: std::sync::Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Beside {
    fn start(rig: &Rig) -> Result<Self> {
        let cache = map_cache(&rig.ebpf)?;
        let Some(Map::HashMap(established)) = rig.ebpf.map(name::ESTABLISHED) else {
            anyhow::bail!("no established table");
        };
        let fd = std::os::fd::AsFd::as_fd(established.fd()).try_clone_to_owned()?;
        let mut table: HashMap<MapData, FlowKeyV4, FlowV4> = Map::HashMap(MapData::from_fd(fd)?).try_into()?;
        let stop = std::sync::Arc::new(AtomicBool::new(false));
        let stopped = std::sync::Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let start = Instant::now();
            for n in 0.. {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                churn(&mut table, &cache, n);
                let due = Duration::from_secs(1) * n / CHURN;
                // Behind where the machine is busy; then it catches up.
                std::thread::sleep(due.saturating_sub(start.elapsed()));
            }
        });
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic there is seen by the figures' own checks.
            let _ = thread.join();
        }
    }
}

fn churn(table: &mut HashMap<MapData, FlowKeyV4, FlowV4>, cache: &FlowCache, n: u32) {
    let key: FlowKeyV4 = FlowKey::new(n.wrapping_mul(0x9e37_79b1), 0x0a0a_0a0a, n as u16, 443_u16.to_be(), TCP);
    for key in [key, key.reversed()] {
        let _ = table.insert(key, FlowV4 { key, ..FlowV4::default() }, 0);
    }
    for key in [key, key.reversed()] {
        let _ = table.remove(&key);
        cache.changed(&key);
    }
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

/// Words of the wrapper's script: ten of frame, six numbers.
const SCRIPT: usize = 16;

fn write_script(rig: &mut Rig, case: &Case) -> Result<()> {
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
        (_, IpAddr::V4(client), _) => u32::from(client),
        (_, IpAddr::V6(client), _) => u128::from(client) as u32,
    };
    script[11] = if case.is_new() { 0 } else { u64::from(case.flows) };
    script[12] = u64::from(first);
    script[13] = u64::from(FIRST_PORT);
    script[14] = u64::from(case.subject == Subject::Reply);
    script[15] = u64::from(case.mix == Mix::Zipf);
    Ok(rig.array::<[u64; SCRIPT]>("SCRIPT")?.set(0, script, 0)?)
}

/// Nanoseconds per run, as the kernel counts them.
fn time(rig: &mut Rig, case: &Case, name: &str) -> Result<f64> {
    // The frame's headers and the ten bytes that follow them.
    let frame = vec![0u8; if case.family == Family::V4 { 64 } else { 84 }];
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
    let expected = u64::from(RUNS + case.warm_ups()) * u64::from(case.repeat());
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
