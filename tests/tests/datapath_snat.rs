//! SNAT ports as they fill up: how many new flows find one, against the bound in docs/architecture.md, and what the sweep
//! says about the fill.

use std::net::{Ipv4Addr, SocketAddr};

use anyhow::{Context, Result, ensure};
use edge_common::{
    flow::TCP,
    maps::{PortSet, mode, name},
    verdict::Reason,
};
use edge_tests::{
    datapath::{
        frame::{Frame, flag},
        namespace::in_namespace,
        rig::{Action, CLIENT, Entry, HOOKS, Rig, SNAT, Settings, VIP, key, pod, snat_of},
    },
    model::dice::Dice,
};

/// New flows tried at each fill.
const TRIES: u32 = 1500;
/// Which ports are taken at each fill.
const SEED: u64 = 0x5e1f_ca57;
/// Standard deviations that a count may be off: once in three million counts by chance.
const SIGMAS: f64 = 5.0;
/// Fill in percent and the share of new flows that find no port, where every port of the range may be used, and where the
/// kernel's default ephemeral range is left out: the table in docs/architecture.md.
const BOUND: [(u16, f64, f64); 5] =
    [(10, 1e-16, 3e-8), (50, 1.5e-5, 0.003), (75, 0.010, 0.080), (90, 0.185, 0.391), (100, 1.0, 1.0)];

fn vip() -> SocketAddr {
    SocketAddr::new(VIP.into(), 8443)
}

fn client(port: u16) -> SocketAddr {
    SocketAddr::new(CLIENT.into(), port)
}

/// Shuffled by Fisher and Yates.
fn shuffled(mut ports: Vec<u16>, dice: &mut Dice) -> Vec<u16> {
    for last in (1..ports.len()).rev() {
        ports.swap(last, dice.roll(last as u64 + 1) as usize);
    }
    ports
}

/// The reply's half of somebody else's established flow from this SNAT port.
fn taken(port: u16) -> Entry {
    let key = key(SocketAddr::new(pod(0).into(), 443), SocketAddr::new(SNAT.into(), port), TCP);
    let elsewhere = SocketAddr::new(Ipv4Addr::new(192, 0, 2, 1).into(), port);
    let client = self::key(elsewhere, vip(), TCP);
    Entry {
        key,
        new_src: client.dst,
        new_dst: client.src,
        new_src_port: client.dst_port,
        new_dst_port: client.src_port,
        service: 1,
        backend: 1,
        direction: 1,
        last_seen: u64::MAX / 2,
        ..Entry::default()
    }
}

/// Tries new flows, each taken back at once, so that the fill stays; how many found no port.
fn failures(rig: &mut Rig) -> Result<u32> {
    let mut failed = 0;
    for number in 0..TRIES {
        let client = client(10_000 + number as u16);
        match rig.run(&Frame::tcp(client, vip(), flag::SYN).bytes(), rig.uplink)?.action {
            Action::Drop => failed += 1,
            Action::Redirect => {
                let flow = rig.flow(name::HALF_OPEN, &key(client, vip(), TCP)).context("not half-open")?;
                rig.remove_flow(name::HALF_OPEN, &flow.key)?;
                rig.remove_flow(name::HALF_OPEN, &flow.twin())?;
                let port = snat_of(&flow).port();
                let twin = rig.flow(name::ESTABLISHED, &taken(port).key);
                ensure!(twin.is_none(), "port {port} was another flow's");
            }
            other => anyhow::bail!("{other:?}: {:?}", rig.reasons()?),
        }
    }
    Ok(failed)
}

/// Fills the allowed ports step by step and compares each count with what the bound says.
fn follows(range: (u16, u16), permitted: impl Fn(u16) -> bool + Sync, bound: [(u16, f64); 5]) -> Result<()> {
    for hook in HOOKS {
        in_namespace(|| {
            let settings = Settings { established: 1 << 17, snat_ports: range, ..Settings::default() };
            let mut rig = Rig::new(hook, settings)?;
            rig.service(1, 8443, TCP, mode::FULL_NAT, 1, 443)?;
            let mut set = PortSet([0; 1024]);
            let allowed: Vec<u16> = (range.0..=range.1).filter(|port| permitted(*port)).collect();
            for port in &allowed {
                set.0[usize::from(port >> 6)] |= 1 << (port & 63);
            }
            rig.array(name::SNAT_PORTS)?.set(0, set, 0)?;
            let ports = shuffled(allowed, &mut Dice(SEED));
            let (mut filled, mut dropped) = (0, 0);
            for (percent, share) in bound {
                let until = ports.len() * usize::from(percent) / 100;
                for port in &ports[filled..until] {
                    let flow = taken(*port);
                    rig.put_flow(name::ESTABLISHED, &flow)?;
                }
                filled = until;
                let failed = failures(&mut rig)?;
                dropped += u64::from(failed);
                let expected = f64::from(TRIES) * share;
                // A count that is expected to be nearly 0 is not normal: two by chance are allowed.
                let off = (SIGMAS * (expected * (1.0 - share)).sqrt()).max(if share < 1.0 { 2.0 } else { 0.0 });
                println!(
                    "{hook:?} {percent} %: {failed} of {TRIES} failed, {expected:.2} expected, {off:.1} allowed off"
                );
                ensure!(
                    (f64::from(failed) - expected).abs() <= off,
                    "{hook:?}, {percent} % full: {failed} of {TRIES} found no port, {expected:.1} should"
                );
                ensure!(rig.reason(1, Reason::SnatExhausted)? == dropped, "each of them is counted");
            }
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn new_flows_find_a_port_as_often_as_documented_where_every_port_may_be_used() -> Result<()> {
    follows((20_000, 28_191), |_| true, BOUND.map(|(percent, every, _)| (percent, every)))
}

#[test]
fn new_flows_find_a_port_as_often_as_documented_beside_the_ephemeral_range() -> Result<()> {
    let ephemeral = 32_768..=60_999;
    follows((1024, u16::MAX), |port| !ephemeral.contains(&port), BOUND.map(|(percent, _, beside)| (percent, beside)))
}
