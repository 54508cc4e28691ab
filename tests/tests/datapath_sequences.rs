//! Thousands of packets in random order from a few clients and pods, with time passing: whatever the order, the
//! tables stay consistent, packets stay valid, and a reply reaches the client that the source port was given to.

use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
};

use anyhow::{Context, Result, ensure};
use edge_common::{
    flow::{TCP, UDP},
    maps::{mode, name},
};
use edge_tests::datapath::{
    frame::{Frame, endpoints_if_valid, flag},
    namespace::in_namespace,
    rig::{Action, CLIENT, Entry, HOOKS, Key, Rig, Settings, VIP, pod},
};

const PACKETS: u32 = 4000;
const CLIENTS: u64 = 6;
const TABLES: [&str; 3] = [name::ESTABLISHED, name::HALF_OPEN, name::CLOSING];

/// A generator good enough to mix packets, and the same in every run of a seed (splitmix64).
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % sides
    }
}

/// What the outside has seen: which client a (source, backend) pair was last used for.
#[derive(Default)]
struct Seen {
    owners: HashMap<(SocketAddr, SocketAddr), SocketAddr>,
}

fn vip() -> SocketAddr {
    SocketAddr::new(VIP.into(), 8443)
}

fn from_client(rig: &mut Rig, dice: &mut Dice, protocol: u8, seen: &mut Seen) -> Result<()> {
    let client = SocketAddr::new(CLIENT.into(), 40_000 + dice.roll(CLIENTS) as u16);
    let flags = [flag::SYN, flag::ACK, flag::ACK, flag::FIN | flag::ACK, flag::RST][dice.roll(5) as usize];
    let frame = match protocol {
        TCP => Frame::tcp(client, vip(), flags).ack([1001, 1001, 1001, 7][dice.roll(4) as usize]),
        _ => Frame::udp(client, vip()),
    };
    let frame = frame.payload(vec![0x5a; dice.roll(40) as usize]);
    let outcome = rig.run(&frame.bytes(), rig.uplink)?;
    if outcome.action == Action::Redirect {
        let (source, backend) = endpoints_if_valid(&outcome.frame).context("a client's packet left invalid")?;
        if (source, backend) == (vip(), client) && protocol == TCP {
            // TC redirects an answer by the interface the packet came by: a RST to a segment without a flow.
            return Ok(());
        }
        ensure!((0..2).any(|n| backend == SocketAddr::new(pod(n).into(), 443)), "sent to {backend}");
        seen.owners.insert((source, backend), client);
    } else if outcome.action == Action::Pass {
        ensure!(outcome.frame == frame.bytes(), "passed, but changed");
    }
    Ok(())
}

fn from_backend(rig: &mut Rig, dice: &mut Dice, protocol: u8, seen: &Seen) -> Result<()> {
    // In a fixed order, so that a seed means the same packets in every run.
    let mut pairs: Vec<_> = seen.owners.iter().map(|(pair, client)| (*pair, *client)).collect();
    pairs.sort_unstable();
    if pairs.is_empty() {
        return Ok(());
    }
    let ((source, backend), client) = pairs[dice.roll(pairs.len() as u64) as usize];
    let flags = [flag::SYN | flag::ACK, flag::ACK, flag::FIN | flag::ACK, flag::RST][dice.roll(4) as usize];
    let frame = match protocol {
        TCP => Frame::tcp(backend, source, flags).seq(1000),
        _ => Frame::udp(backend, source),
    };
    let outcome = rig.run(&frame.bytes(), rig.pods)?;
    if outcome.action == Action::Redirect {
        let (src, dst) = endpoints_if_valid(&outcome.frame).context("a reply left invalid")?;
        ensure!((src, dst) == (vip(), client), "{backend} -> {source} became {src} -> {dst}, not for {client}");
    } else if outcome.action == Action::Pass {
        ensure!(outcome.frame == frame.bytes(), "passed, but changed");
    }
    Ok(())
}

/// Every entry looks as if its last packet were that much longer ago.
fn pass_time(rig: &mut Rig, seconds: u64) -> Result<()> {
    for table in TABLES {
        for flow in rig.flows(table)? {
            rig.change_flow(table, &flow.key, |flow| {
                flow.last_seen = flow.last_seen.saturating_sub(seconds * 1_000_000_000);
            })?;
        }
    }
    Ok(())
}

/// A live entry's other half lives in the same table and points back; a reply's key lives in one table only.
fn check(rig: &mut Rig) -> Result<()> {
    let mut replies = HashSet::new();
    for table in TABLES {
        let flows: HashMap<Key, Entry> = rig.flows(table)?.into_iter().map(|flow| (flow.key, flow)).collect();
        for flow in flows.values() {
            if flow.direction == 1 {
                ensure!(replies.insert(flow.key), "{:?} lives in two tables, {table} is one", flow.key);
            }
            // A closing flow's client half may have gone where its client opened a new one.
            let Some(twin) = flows.get(&flow.twin()) else {
                ensure!(table == name::CLOSING, "{:?} is alone in {table}", flow.key);
                continue;
            };
            ensure!(table == name::CLOSING || twin.twin() == flow.key, "{:?} has a stranger's half", flow.key);
        }
    }
    Ok(())
}

#[test]
fn no_sequence_of_packets_breaks_the_tables_or_crosses_two_flows() -> Result<()> {
    for (seed, (hook, mode)) in
        (1..).zip(HOOKS.into_iter().flat_map(|hook| [mode::FULL_NAT, mode::DNAT].map(|mode| (hook, mode))))
    {
        for protocol in [TCP, UDP] {
            in_namespace(|| {
                // Fewer ports than clients: they run out, and come round again.
                let settings = Settings { snat_ports: (20_000, 20_001), ..Settings::default() };
                let mut rig = Rig::new(hook, settings)?;
                let backends = rig.service(1, 8443, protocol, mode, 2, 443)?;
                let mut dice = Dice(seed);
                let mut seen = Seen::default();
                for n in 0..PACKETS {
                    match dice.roll(100) {
                        0..55 => from_client(&mut rig, &mut dice, protocol, &mut seen)?,
                        55..95 => from_backend(&mut rig, &mut dice, protocol, &seen)?,
                        95..98 => pass_time(&mut rig, [1, 3, 31, 61, 301][dice.roll(5) as usize])?,
                        _ => rig.set_eligible(backends[dice.roll(2) as usize], dice.roll(3) != 0)?,
                    }
                    check(&mut rig).with_context(|| format!("{hook:?} mode {mode} {protocol} after packet {n}"))?;
                }
                let stats = rig.service_stats(1)?;
                // Established UDP flows end by the daemon's sweep only, so there each port is opened once.
                let least = if protocol == TCP { 10 } else { 3 };
                assert!(stats.opened >= least && stats.packets_out > 100, "the dice never got far: {stats:?}");
                // A flow that goes on after a RST is opened once more, but only after it was closed.
                assert!(stats.closed <= stats.opened && stats.opened <= stats.half_opened + stats.closed, "{stats:?}");
                let open = rig.flows(name::ESTABLISHED)?.len() as u64 / 2;
                assert_eq!(stats.opened - stats.closed, open, "opened less closed is what is open");
                Ok(())
            })?;
        }
    }
    Ok(())
}
