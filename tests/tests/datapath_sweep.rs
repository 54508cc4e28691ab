//! The sweep over pinned maps, as the daemon runs it: exact counts of active connections, and the ports it finds in use.

use std::{collections::BTreeMap, net::SocketAddr, path::Path, time::Duration};

use anyhow::{Context, Result, ensure};
use edge_common::{
    flow::TCP,
    maps::{mode, name},
};
use edge_ctl::{
    config::valid::{self, Edge, Tables},
    datapath::{
        loader::Datapath,
        object::EBPF_OBJECT,
        sweep::{Pass, Sweeper},
    },
};
use edge_tests::{
    datapath::{
        cpu,
        frame::{Frame, flag},
        namespace::{Folder, in_namespace},
        rig::{Action, CLIENT, Entry, HOOKS, Hook, Key, Rig, Settings, VIP, key, load, pod, snat_of, wire},
    },
    lab::exec::wait_for,
    model::dice::Dice,
};

const SEED: u64 = 0x0dd5_0ace;
const SECOND: u64 = 1_000_000_000;
const PATIENCE: Duration = Duration::from_secs(20);

fn client(port: u16) -> SocketAddr {
    SocketAddr::new(CLIENT.into(), port)
}

fn vip() -> SocketAddr {
    SocketAddr::new(VIP.into(), 8443)
}

fn forward_key(port: u16) -> Key {
    key(client(port), vip(), TCP)
}

fn edge(folder: &Path) -> Edge {
    Edge {
        interfaces: vec!["uplink".to_owned(), "pods".to_owned()],
        hook: valid::Hook::Tc,
        pod_networks: Vec::new(),
        pin_path: folder.join("bpf/edge"),
        socket: folder.join("edge.sock"),
        state_dir: folder.join("state"),
        seed_file: None,
        tables: Tables { established: 4096, half_open: 4096, closing: 4096, ..Tables::default() },
    }
}

/// Runs `test` at both hooks, over maps that a daemon has made.
fn each_hook(settings: &Settings, test: impl Fn(&mut Rig, &Edge, Datapath) -> Result<()> + Sync) -> Result<()> {
    for hook in HOOKS {
        in_namespace(|| {
            let folder = Folder::new()?;
            let edge = edge(&folder.0);
            let datapath = Datapath::open(&edge, EBPF_OBJECT)?;
            let mut rig = pinned(&datapath, hook, settings.clone())?;
            test(&mut rig, &edge, datapath)
        })?;
    }
    Ok(())
}

fn pinned(datapath: &Datapath, hook: Hook, settings: Settings) -> Result<Rig> {
    let mut rig = Rig::over_pins(datapath.pins(), hook, settings)?;
    load(&mut rig.ebpf, hook)?;
    Ok(rig)
}

fn send(rig: &mut Rig, port: u16, flags: u8, ack: u32) -> Result<Action> {
    Ok(rig.run(&Frame::tcp(client(port), vip(), flags).ack(ack).bytes(), rig.uplink)?.action)
}

fn reply(rig: &mut Rig, flow: &Entry, flags: u8, seq: u32) -> Result<Action> {
    let from = edge_ctl::reconcile::ports::socket_address(flow.new_dst, flow.new_dst_port);
    Ok(rig.run(&Frame::tcp(from, snat_of(flow), flags).seq(seq).bytes(), rig.pods)?.action)
}

fn establish(rig: &mut Rig, port: u16) -> Result<Entry> {
    ensure!(send(rig, port, flag::SYN, 0)? == Action::Redirect, "{:?}", rig.reasons()?);
    let half_open = rig.flow(name::HALF_OPEN, &forward_key(port)).context("not half-open")?;
    reply(rig, &half_open, flag::SYN | flag::ACK, 1000)?;
    send(rig, port, flag::ACK, 1001)?;
    rig.flow(name::ESTABLISHED, &forward_key(port)).context("not established")
}

/// Makes both halves look as if their last packet were `seconds` ago.
fn age(rig: &mut Rig, table: &str, flow: &Entry, seconds: u64) -> Result<()> {
    for key in [flow.key, flow.twin()] {
        rig.change_flow(table, &key, |flow| flow.last_seen = flow.last_seen.saturating_sub(seconds * SECOND))?;
    }
    Ok(())
}

/// One whole walk.
fn sweep(sweeper: &mut Sweeper) -> Result<(u64, Pass)> {
    let mut expired = 0;
    loop {
        let report = sweeper.step(64)?;
        expired += report.expired;
        if report.finished {
            return Ok((expired, sweeper.last_pass().context("a walk has ended")?.clone()));
        }
    }
}

/// Flows in the established table, by backend.
fn census(rig: &mut Rig) -> Result<BTreeMap<u32, u64>> {
    let mut seen = BTreeMap::new();
    for flow in rig.flows(name::ESTABLISHED)?.iter().filter(|flow| flow.direction == 0) {
        *seen.entry(flow.backend).or_insert(0) += 1;
    }
    Ok(seen)
}

/// What views and reconciler are told; backends without flows left out.
fn counted(datapath: &Datapath) -> Result<BTreeMap<u32, u64>> {
    let mut counts = datapath.view()?.tables().flow_counts()?.backends;
    counts.retain(|_, flows| *flows != 0);
    Ok(counts)
}

#[test]
fn active_counts_are_exact_after_any_sequence_and_a_restart_adopts_them() -> Result<()> {
    each_hook(&Settings::default(), |rig, edge, mut datapath| {
        rig.service(1, 8443, TCP, mode::FULL_NAT, 3, 443)?;
        let mut sweeper = datapath.sweeper()?;
        let mut dice = Dice(SEED);
        let (mut idle, mut swept, mut restarts) = (0, 0, 0);
        for step in 0..500 {
            let port = 40_000 + dice.roll(32) as u16;
            let flow = rig.flow(name::ESTABLISHED, &forward_key(port));
            match (flow, dice.roll(5)) {
                (None, _) => drop(establish(rig, port)),
                (Some(_), 0) => drop(send(rig, port, flag::RST, 1001)?),
                (Some(flow), 1) => drop(reply(rig, &flow, flag::RST, 1001)?),
                (Some(flow), 2) => {
                    send(rig, port, flag::FIN | flag::ACK, 1001)?;
                    reply(rig, &flow, flag::FIN | flag::ACK, 1001)?;
                }
                (Some(flow), 3) => {
                    age(rig, name::ESTABLISHED, &flow, 400)?;
                    idle += 1;
                }
                // Traffic on a flow that may be idle: the client's SYN would end it, data revives nothing that is over.
                (Some(_), _) => drop(send(rig, port, flag::ACK, 1001)?),
            }
            if dice.chance(20) {
                swept += sweep(&mut sweeper)?.0;
            }
            if dice.chance(2) {
                drop((sweeper, datapath));
                datapath = Datapath::open(edge, EBPF_OBJECT)?;
                sweeper = datapath.sweeper()?;
                restarts += 1;
            }
            ensure!(counted(&datapath)? == census(rig)?, "after step {step}: {:?}", counted(&datapath)?);
        }
        ensure!(swept > 10 && swept <= idle && restarts > 2, "{swept} swept of {idle} idle, {restarts} restarts");
        Ok(())
    })
}

#[test]
fn the_sweep_tells_which_ports_are_in_use_and_what_the_tables_hold() -> Result<()> {
    let settings = Settings { snat_ports: (20_000, 20_009), ..Settings::default() };
    each_hook(&settings, |rig, _, datapath| {
        rig.service(1, 8443, TCP, mode::FULL_NAT, 1, 443)?;
        let mut sweeper = datapath.sweeper()?;
        let mut used = || -> Result<(u32, u32)> {
            let pass = sweep(&mut sweeper)?.1;
            ensure!(pass.snat.len() == 1, "{:?}", pass.snat);
            Ok((pass.snat[0].used, pass.snat[0].allowed))
        };
        ensure!(used()? == (0, 10));
        let flows: Vec<Entry> = (40_000..40_006).map(|port| establish(rig, port)).collect::<Result<_>>()?;
        ensure!(flows.iter().all(|flow| flow.new_dst == wire(pod(0))));
        ensure!(used()? == (6, 10));
        // Closed by the backend first: its TIME_WAIT holds the port.
        reply(rig, &flows[0], flag::FIN | flag::ACK, 1001)?;
        send(rig, 40_000, flag::FIN | flag::ACK, 1002)?;
        ensure!(rig.flow(name::CLOSING, &flows[0].key).is_some() && used()? == (6, 10));
        age(rig, name::CLOSING, &flows[0], 61)?;
        ensure!(used()? == (5, 10));
        send(rig, 40_010, flag::SYN, 0)?;
        let begun = rig.flow(name::HALF_OPEN, &forward_key(40_010)).context("half-open")?;
        age(rig, name::HALF_OPEN, &begun, 1)?;
        ensure!(used()? == (5, 10), "a stalled handshake gives its port up");
        let pass = sweep(&mut sweeper)?.1;
        let entries: Vec<_> = pass.entries.into_iter().collect();
        let expected = [
            (name::CLOSING, 2),
            (name::CLOSING_V6, 0),
            (name::ESTABLISHED, 10),
            (name::ESTABLISHED_V6, 0),
            (name::HALF_OPEN, 2),
            (name::HALF_OPEN_V6, 0),
        ];
        ensure!(entries == expected, "{entries:?}");
        Ok(())
    })
}

#[test]
fn a_flow_that_the_sweep_has_ended_is_gone_for_the_next_packet_on_every_cpu_although_its_slots_are_warm() -> Result<()>
{
    let settings = Settings { timeouts: (1, 30, 60), ..Settings::default() };
    each_hook(&settings, |rig, _, datapath| {
        rig.service(1, 8443, TCP, mode::FULL_NAT, 1, 443)?;
        let mut sweeper = datapath.sweeper()?;
        let cpus = cpu::allowed()?;
        let hits = |rig: &Rig| rig.cache.cpus().iter().map(|cpu| cpu.hits).sum::<u64>();
        for (port, next) in (40_000..).zip(&cpus) {
            let flow = establish(rig, port)?;
            for cpu in cpus.iter().cycle().take(3 * cpus.len()) {
                cpu::on(*cpu, || send(rig, port, flag::ACK, 1001))?;
                cpu::on(*cpu, || reply(rig, &flow, flag::ACK, 1001))?;
            }
            let before = hits(rig);
            cpu::on(*next, || send(rig, port, flag::ACK, 1001))?;
            cpu::on(*next, || reply(rig, &flow, flag::ACK, 1001))?;
            ensure!(hits(rig) == before + 2, "its slots are not warm: {:?}", rig.cache.cpus());
            wait_for("the sweep to end the idle flow", PATIENCE, || Ok(sweep(&mut sweeper)?.0 > 0))?;
            let before = hits(rig);
            cpu::on(*next, || send(rig, port, flag::ACK, 1001))?;
            let answered = cpu::on(*next, || reply(rig, &flow, flag::ACK, 1001))?;
            ensure!(answered == Action::Pass, "a reply of a flow that is gone: {answered:?}");
            ensure!(hits(rig) == before, "a slot served a flow that the sweep had ended");
            ensure!(rig.flow(name::ESTABLISHED, &forward_key(port)).is_none(), "there again");
        }
        Ok(())
    })
}
