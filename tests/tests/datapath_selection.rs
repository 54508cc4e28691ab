//! Which backend a new flow gets: the methods, affinity, the backup tier, limits, and the live counters under them.

use std::{collections::BTreeMap, net::SocketAddr};

use anyhow::{Context, Result};
use edge_common::{
    flow::TCP,
    maps::{AffinityEntry, AffinityKey, BackendEntry, Chunk, Pending, ServiceEntry, active, balance, mode, name},
    schedule,
    verdict::Reason,
};
use edge_ctl::{
    datapath::selection,
    reconcile::ports::{Region, socket_address},
};
use edge_tests::{
    datapath::{
        frame::{Frame, flag},
        namespace::in_namespace,
        rig::{Action, CLIENT, Entry, HOOKS, Key, Rig, Settings, VIP, key, snat_of, wire},
    },
    model::kernel,
};

/// Where the tests put their regions: the rig's own are below.
const CHUNK: u32 = 128;

fn vip() -> SocketAddr {
    SocketAddr::new(VIP.into(), 8443)
}

fn client(port: u16) -> SocketAddr {
    SocketAddr::new(CLIENT.into(), port)
}

fn forward_key(port: u16) -> Key {
    key(client(port), vip(), TCP)
}

fn send(rig: &mut Rig, port: u16, flags: u8, ack: u32) -> Result<Action> {
    Ok(rig.run(&Frame::tcp(client(port), vip(), flags).ack(ack).bytes(), rig.uplink)?.action)
}

fn reply(rig: &mut Rig, flow: &Entry, flags: u8, seq: u32) -> Result<Action> {
    let from = socket_address(flow.new_dst, flow.new_dst_port);
    Ok(rig.run(&Frame::tcp(from, snat_of(flow), flags).seq(seq).bytes(), rig.pods)?.action)
}

/// A SYN from this port; the number of the backend it went to.
fn begin(rig: &mut Rig, port: u16) -> Result<u32> {
    assert_eq!(send(rig, port, flag::SYN, 0)?, Action::Redirect, "{:?}", rig.reasons()?);
    Ok(rig.flow(name::HALF_OPEN, &forward_key(port)).context("not half-open")?.backend)
}

/// A whole handshake from this port.
fn establish(rig: &mut Rig, port: u16) -> Result<Entry> {
    begin(rig, port)?;
    let half_open = rig.flow(name::HALF_OPEN, &forward_key(port)).context("not half-open")?;
    reply(rig, &half_open, flag::SYN | flag::ACK, 1000)?;
    send(rig, port, flag::ACK, 1001)?;
    rig.flow(name::ESTABLISHED, &forward_key(port)).context("not established")
}

fn reset(rig: &mut Rig, port: u16) -> Result<Action> {
    send(rig, port, flag::RST, 1001)
}

/// Changes service 1.
fn service(rig: &mut Rig, change: impl FnOnce(&mut ServiceEntry)) -> Result<()> {
    let mut entry: ServiceEntry = rig.array(name::SERVICES)?.get(&1, 0)?;
    change(&mut entry);
    Ok(rig.array(name::SERVICES)?.set(1, entry, 0)?)
}

fn limit(rig: &mut Rig, backends: &[u32], limit: u32) -> Result<()> {
    for number in backends {
        let mut entry: BackendEntry = rig.array(name::BACKENDS)?.get(number, 0)?;
        entry.limit = limit;
        rig.array(name::BACKENDS)?.set(*number, entry, 0)?;
    }
    Ok(())
}

/// Gives service 1 this region, as the daemon would write it.
fn publish(rig: &mut Rig, region: &Region) -> Result<()> {
    for (number, chunk) in selection::encode(CHUNK, region) {
        rig.array::<Chunk>(name::SELECTION)?.set(number, chunk, 0)?;
    }
    service(rig, |entry| entry.selection = CHUNK)
}

fn turns(pool: &[u32], weights: &[u32]) -> Region {
    Region { pool: pool.to_vec(), table: schedule::turns(weights).into(), backup: None }
}

/// Runs `test` at both hooks, on service 1 with `pods` backends.
fn each_hook(pods: u8, test: impl Fn(&mut Rig, &[u32]) -> Result<()> + Sync) -> Result<()> {
    for hook in HOOKS {
        in_namespace(|| {
            let mut rig = Rig::new(hook, Settings::default())?;
            let backends = rig.service(1, 8443, TCP, mode::FULL_NAT, pods, 443)?;
            test(&mut rig, &backends)
        })?;
    }
    Ok(())
}

#[test]
fn a_round_robin_goes_by_turns_and_by_weight() -> Result<()> {
    each_hook(3, |rig, backends| {
        publish(rig, &turns(backends, &[2, 1, 1]))?;
        service(rig, |entry| entry.balance = balance::ROUND_ROBIN)?;
        let mut counts = BTreeMap::new();
        for port in 40_000..40_040 {
            *counts.entry(begin(rig, port)?).or_insert(0) += 1;
        }
        assert_eq!(counts.into_values().collect::<Vec<_>>(), [20, 10, 10]);
        Ok(())
    })
}

#[test]
fn the_less_loaded_of_two_gets_the_flow_relative_to_its_weight() -> Result<()> {
    each_hook(2, |rig, backends| {
        service(rig, |entry| entry.balance = balance::LEAST_CONNECTIONS)?;
        rig.array::<u32>(name::BACKEND_LIVE)?.set(backends[0], 10, 0)?;
        for port in 40_000..40_020 {
            assert_eq!(begin(rig, port)?, backends[1], "10 flows against none");
        }
        // Ten times the weight carries ten times the flows: 10/100 against 1/1.
        rig.array::<u32>(name::BACKEND_STATE)?.set(backends[0], 100 << 16 | 1, 0)?;
        rig.array::<u32>(name::BACKEND_LIVE)?.set(backends[1], 1, 0)?;
        for port in 41_000..41_020 {
            assert_eq!(begin(rig, port)?, backends[0]);
        }
        Ok(())
    })
}

#[test]
fn a_full_backend_is_passed_over_and_all_full_is_a_reason_of_its_own() -> Result<()> {
    each_hook(2, |rig, backends| {
        limit(rig, backends, 2)?;
        for port in 40_000..40_004 {
            establish(rig, port)?;
        }
        assert_eq!(send(rig, 40_010, flag::SYN, 0)?, Action::Drop);
        assert_eq!(rig.reason(1, Reason::BackendsFull)?, 1);
        let ended = rig.flow(name::ESTABLISHED, &forward_key(40_001)).context("established")?.backend;
        reset(rig, 40_001)?;
        assert_eq!(begin(rig, 40_011)?, ended, "the one with room");
        rig.set_eligible(backends[0], false)?;
        rig.set_eligible(backends[1], false)?;
        assert_eq!(send(rig, 40_012, flag::SYN, 0)?, Action::Drop);
        assert_eq!(rig.reason(1, Reason::NoBackend)?, 1, "excluded is not full");
        Ok(())
    })
}

#[test]
fn a_flood_of_syns_takes_no_more_than_a_quarter_of_a_limit() -> Result<()> {
    each_hook(1, |rig, backends| {
        limit(rig, backends, 20)?;
        for port in 30_000..30_200 {
            begin(rig, port)?;
        }
        for port in 40_000..40_015 {
            establish(rig, port)?;
        }
        assert_eq!(send(rig, 41_000, flag::SYN, 0)?, Action::Drop, "15 flows and 5 for what pends");
        assert_eq!(rig.reason(1, Reason::BackendsFull)?, 1);
        Ok(())
    })
}

#[test]
fn flows_that_began_by_a_clock_that_is_ahead_count_towards_a_limit() -> Result<()> {
    each_hook(1, |rig, backends| {
        limit(rig, backends, 4)?;
        rig.array::<u32>(name::BACKEND_LIVE)?.set(backends[0], 3, 0)?;
        let tick = Pending::tick(kernel::now()) + 1;
        rig.array::<Pending>(name::BACKEND_PENDING)?.set(backends[0], Pending { tick, flows: 1 }, 0)?;
        assert_eq!(send(rig, 40_000, flag::SYN, 0)?, Action::Drop, "3 flows and 1 that pends");
        assert_eq!(rig.reason(1, Reason::BackendsFull)?, 1);
        Ok(())
    })
}

#[test]
fn a_client_stays_with_its_backend_until_its_time_is_over_or_the_backend_is_excluded() -> Result<()> {
    each_hook(4, |rig, backends| {
        publish(rig, &turns(backends, &[1, 1, 1, 1]))?;
        service(rig, |entry| {
            entry.balance = balance::ROUND_ROBIN;
            entry.affinity_timeout = 600;
        })?;
        let home = establish(rig, 40_000)?.backend;
        for port in 40_001..40_010 {
            assert_eq!(begin(rig, port)?, home);
        }
        let key = AffinityKey::new(1, wire(CLIENT));
        let entry: AffinityEntry = rig.hash(name::AFFINITY)?.get(&key, 0)?;
        assert_eq!(entry.backend, home);
        let old = AffinityEntry { seen: entry.seen.wrapping_sub(601), ..entry };
        rig.hash(name::AFFINITY)?.insert(key, old, 0)?;
        assert_ne!(begin(rig, 40_020)?, home, "the second turn: the client has been away for too long");
        rig.hash(name::AFFINITY)?.insert(key, entry, 0)?;
        assert_eq!(begin(rig, 40_021)?, home);
        rig.set_eligible(home, false)?;
        let other = establish(rig, 40_022)?.backend;
        assert_ne!(other, home);
        rig.set_eligible(home, true)?;
        for port in 40_030..40_036 {
            assert_eq!(begin(rig, port)?, other, "its home is there now");
        }
        Ok(())
    })
}

#[test]
fn the_backup_tier_serves_only_while_no_primary_backend_can() -> Result<()> {
    each_hook(3, |rig, backends| {
        let backup = Region { pool: vec![backends[2]], table: vec![0; 7].into(), backup: None };
        let region =
            Region { pool: backends[..2].to_vec(), table: vec![0, 1, 0, 1, 0].into(), backup: Some(Box::new(backup)) };
        publish(rig, &region)?;
        for port in 40_000..40_020 {
            assert_ne!(begin(rig, port)?, backends[2]);
        }
        rig.set_eligible(backends[0], false)?;
        assert_eq!(begin(rig, 40_100)?, backends[1]);
        rig.set_eligible(backends[1], false)?;
        assert_eq!(begin(rig, 40_101)?, backends[2]);
        rig.set_eligible(backends[1], true)?;
        assert_eq!(begin(rig, 40_102)?, backends[1]);
        limit(rig, &backends[1..2], 1)?;
        establish(rig, 40_103)?;
        assert_eq!(begin(rig, 40_104)?, backends[2], "full is as good as excluded");
        Ok(())
    })
}

/// Client halves in the established table, by backend.
fn census(rig: &mut Rig) -> Result<BTreeMap<u32, u32>> {
    let mut seen = BTreeMap::new();
    for flow in rig.flows(name::ESTABLISHED)?.iter().filter(|flow| flow.direction == 0) {
        *seen.entry(flow.backend).or_insert(0) += 1;
    }
    Ok(seen)
}

#[test]
fn live_counters_equal_the_flows_in_the_table_after_any_sequence() -> Result<()> {
    each_hook(3, |rig, backends| {
        let mut dice = 0x2545_f491_4f6c_dd1d_u64;
        let mut roll = |sides: u64| {
            dice ^= dice << 13;
            dice ^= dice >> 7;
            dice ^= dice << 17;
            dice % sides
        };
        for _ in 0..600 {
            let port = 40_000 + roll(24) as u16;
            let flow = rig.flow(name::ESTABLISHED, &forward_key(port));
            match (flow, roll(5)) {
                (None, _) => drop(establish(rig, port)),
                (Some(_), 0) => drop(reset(rig, port)?),
                (Some(flow), 1) => drop(reply(rig, &flow, flag::RST, 1001)?),
                (Some(flow), 2) => {
                    send(rig, port, flag::FIN | flag::ACK, 1001)?;
                    reply(rig, &flow, flag::FIN | flag::ACK, 1001)?;
                }
                // A client that comes back after the timeout: its SYN ends the old flow and begins a new one.
                (Some(flow), 3) => {
                    for key in [flow.key, flow.twin()] {
                        rig.change_flow(name::ESTABLISHED, &key, |flow| {
                            flow.last_seen = flow.last_seen.saturating_sub(400 * 1_000_000_000);
                        })?;
                    }
                    send(rig, port, flag::SYN, 0)?;
                }
                // What the sweep does: both halves out, one flow counted by the daemon.
                (Some(flow), _) => {
                    rig.remove_flow(name::ESTABLISHED, &flow.key)?;
                    rig.remove_flow(name::ESTABLISHED, &flow.twin())?;
                    let expired: u64 = rig.array(name::BACKEND_EXPIRED)?.get(&flow.backend, 0)?;
                    rig.array(name::BACKEND_EXPIRED)?.set(flow.backend, expired + 1, 0)?;
                }
            }
            let seen = census(rig)?;
            for number in backends {
                let live: u32 = rig.array(name::BACKEND_LIVE)?.get(number, 0)?;
                let expired: u64 = rig.array(name::BACKEND_EXPIRED)?.get(number, 0)?;
                let expected = seen.get(number).copied().unwrap_or(0);
                assert_eq!(active(live, expired), expected, "backend {number}");
                let stats = rig.backend_stats(*number)?;
                assert_eq!(stats.opened - stats.closed - expired, u64::from(expected), "the counters of the views");
            }
        }
        assert!(backends.iter().all(|number| rig.backend_stats(*number).is_ok_and(|stats| stats.opened > 50)));
        Ok(())
    })
}
