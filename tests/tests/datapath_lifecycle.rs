//! How flows end and what they leave behind: FIN, RST, expiry, re-use, exhaustion, full tables.

use std::{net::SocketAddr, sync::Mutex};

use anyhow::{Context, Result};
use aya_log::EbpfLogger;
use edge_common::{
    conntrack::State,
    flow::{TCP, UDP},
    maps::{SERVICES, ServiceEntry, ServiceKey, flow_flag, mode, name, notice},
    verdict::Reason,
};
use edge_tests::datapath::{
    frame::{Frame, flag},
    namespace::in_namespace,
    rig::{Action, CLIENT, CLIENT_MAC, Entry, HOOKS, Key, Rig, Settings, UPLINK_MAC, VIP, key, pod, snat_of},
};

fn vip() -> SocketAddr {
    SocketAddr::new(VIP.into(), 8443)
}

fn client(port: u16) -> SocketAddr {
    SocketAddr::new(CLIENT.into(), port)
}

fn backend() -> SocketAddr {
    SocketAddr::new(pod(0).into(), 443)
}

fn forward_key(port: u16) -> Key {
    key(client(port), vip(), TCP)
}

fn send(rig: &mut Rig, port: u16, flags: u8, ack: u32) -> Result<Action> {
    Ok(rig.run(&Frame::tcp(client(port), vip(), flags).ack(ack).bytes(), rig.uplink)?.action)
}

fn reply(rig: &mut Rig, to: SocketAddr, flags: u8, seq: u32) -> Result<Action> {
    Ok(rig.run(&Frame::tcp(backend(), to, flags).seq(seq).bytes(), rig.pods)?.action)
}

/// Opens a connection from this client port; its established forward entry.
fn establish(rig: &mut Rig, port: u16) -> Result<Entry> {
    assert_eq!(send(rig, port, flag::SYN, 0)?, Action::Redirect, "{:?}", rig.reasons()?);
    let half_open = rig.flow(name::HALF_OPEN, &forward_key(port)).context("not half-open")?;
    reply(rig, snat_of(&half_open), flag::SYN | flag::ACK, 1000)?;
    send(rig, port, flag::ACK, 1001)?;
    rig.flow(name::ESTABLISHED, &forward_key(port)).context("not established")
}

/// Makes both halves look as if their last packet were `seconds` ago.
fn age(rig: &mut Rig, table: &str, forward: &Entry, seconds: u64) -> Result<()> {
    for key in [forward.key, forward.twin()] {
        rig.change_flow(table, &key, |flow| flow.last_seen = flow.last_seen.saturating_sub(seconds * 1_000_000_000))?;
    }
    Ok(())
}

/// Log lines, kept.
#[derive(Default)]
struct Lines(Mutex<Vec<String>>);

impl log::Log for Lines {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        if let Ok(mut lines) = self.0.lock() {
            lines.push(format!("{} {}: {}", record.level(), record.target(), record.args()));
        }
    }

    fn flush(&self) {}
}

fn each_hook(test: impl Fn(&mut Rig) -> Result<()> + Sync) -> Result<()> {
    each_hook_with(&Settings::default(), test)
}

fn each_hook_with(settings: &Settings, test: impl Fn(&mut Rig) -> Result<()> + Sync) -> Result<()> {
    for hook in HOOKS {
        in_namespace(|| {
            let mut rig = Rig::new(hook, settings.clone())?;
            rig.service(1, 8443, TCP, mode::FULL_NAT, 1, 443)?;
            test(&mut rig)
        })?;
    }
    Ok(())
}

#[test]
fn the_second_fin_moves_a_flow_to_closing_and_the_last_acknowledgement_still_goes_through() -> Result<()> {
    each_hook(|rig| {
        let flow = establish(rig, 40_000)?;
        let source = snat_of(&flow);
        send(rig, 40_000, flag::FIN | flag::ACK, 1001)?;
        let forward = rig.flow(name::ESTABLISHED, &flow.key).expect("one FIN is not the end");
        let twin = rig.flow(name::ESTABLISHED, &flow.twin()).expect("its other half");
        assert_eq!((forward.flags & flow_flag::CLIENT_FIN, twin.flags & flow_flag::CLIENT_FIN), (2, 2));
        assert_eq!(reply(rig, source, flag::FIN | flag::ACK, 1001)?, Action::Redirect);
        assert!(rig.flows(name::ESTABLISHED)?.is_empty());
        let closing = rig.flow(name::CLOSING, &flow.key).expect("closing");
        let twin = rig.flow(name::CLOSING, &flow.twin()).expect("its other half");
        assert_eq!((closing.state, twin.state), (State::Closing as u8, State::Closing as u8));
        assert_eq!(closing.flags & flow_flag::BACKEND_CLOSED_FIRST, 0);
        assert_eq!((closing.packets, twin.packets), (3, 2), "counters go along");
        assert_eq!(send(rig, 40_000, flag::ACK, 1002)?, Action::Redirect);
        assert_eq!(rig.service_stats(1)?.closed, 1);
        Ok(())
    })
}

#[test]
fn a_backend_that_closes_first_is_remembered_on_both_halves() -> Result<()> {
    each_hook(|rig| {
        let flow = establish(rig, 40_000)?;
        reply(rig, snat_of(&flow), flag::FIN | flag::ACK, 1001)?;
        send(rig, 40_000, flag::FIN | flag::ACK, 1002)?;
        for key in [flow.key, flow.twin()] {
            let flags = rig.flow(name::CLOSING, &key).expect("closing").flags;
            assert_ne!(flags & flow_flag::BACKEND_CLOSED_FIRST, 0);
        }
        Ok(())
    })
}

#[test]
fn a_reset_from_either_side_moves_a_flow_to_closing() -> Result<()> {
    each_hook(|rig| {
        let flow = establish(rig, 40_000)?;
        assert_eq!(send(rig, 40_000, flag::RST, 0)?, Action::Redirect);
        assert!(rig.flow(name::CLOSING, &flow.key).is_some() && rig.flow(name::CLOSING, &flow.twin()).is_some());
        let flow = establish(rig, 40_001)?;
        assert_eq!(reply(rig, snat_of(&flow), flag::RST | flag::ACK, 1001)?, Action::Redirect);
        assert!(rig.flow(name::CLOSING, &flow.key).is_some() && rig.flow(name::CLOSING, &flow.twin()).is_some());
        assert!(rig.flows(name::ESTABLISHED)?.is_empty());
        // A refused connection was never established.
        send(rig, 40_002, flag::SYN, 0)?;
        let refused = rig.flow(name::HALF_OPEN, &forward_key(40_002)).expect("half-open");
        reply(rig, snat_of(&refused), flag::RST | flag::ACK, 0)?;
        assert!(rig.flow(name::CLOSING, &refused.key).is_some());
        assert!(rig.flows(name::HALF_OPEN)?.is_empty());
        assert_eq!((rig.service_stats(1)?.opened, rig.service_stats(1)?.closed), (2, 2));
        Ok(())
    })
}

#[test]
fn the_same_client_tuple_gets_its_snat_port_back_from_a_closing_flow() -> Result<()> {
    each_hook(|rig| {
        let flow = establish(rig, 40_000)?;
        reply(rig, snat_of(&flow), flag::FIN | flag::ACK, 1001)?;
        send(rig, 40_000, flag::FIN | flag::ACK, 1002)?;
        let again = establish(rig, 40_000)?;
        assert_eq!(snat_of(&again), snat_of(&flow));
        assert!(rig.flows(name::CLOSING)?.is_empty());
        assert_eq!((again.packets, rig.service_stats(1)?.half_opened), (2, 2));
        Ok(())
    })
}

#[test]
fn a_port_rests_sixty_seconds_after_the_backend_closed_and_two_after_the_client() -> Result<()> {
    let settings = Settings { snat_ports: (20_000, 20_000), ..Settings::default() };
    for (backend_first, rest) in [(true, 60), (false, 2)] {
        each_hook_with(&settings, |rig| {
            let flow = establish(rig, 40_000)?;
            if backend_first {
                reply(rig, snat_of(&flow), flag::FIN | flag::ACK, 1001)?;
                send(rig, 40_000, flag::FIN | flag::ACK, 1002)?;
            } else {
                send(rig, 40_000, flag::FIN | flag::ACK, 1001)?;
                reply(rig, snat_of(&flow), flag::FIN | flag::ACK, 1001)?;
            }
            assert_eq!(send(rig, 40_001, flag::SYN, 0)?, Action::Drop);
            age(rig, name::CLOSING, &flow, rest - 1)?;
            assert_eq!(send(rig, 40_001, flag::SYN, 0)?, Action::Drop);
            assert_eq!(rig.reason(1, Reason::SnatExhausted)?, 2);
            age(rig, name::CLOSING, &flow, 2)?;
            assert_eq!(send(rig, 40_001, flag::SYN, 0)?, Action::Redirect);
            assert!(rig.flows(name::CLOSING)?.is_empty(), "both halves make room");
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn snat_ports_run_out_one_by_one_and_never_collide() -> Result<()> {
    let settings = Settings { snat_ports: (20_000, 20_003), ..Settings::default() };
    each_hook_with(&settings, |rig| {
        let mut ports = Vec::new();
        for n in 0..4 {
            ports.push(snat_of(&establish(rig, 40_000 + n)?).port());
        }
        ports.sort_unstable();
        assert_eq!(ports, [20_000, 20_001, 20_002, 20_003]);
        assert_eq!(send(rig, 40_004, flag::SYN, 0)?, Action::Drop);
        assert_eq!(rig.reason(1, Reason::SnatExhausted)?, 1);
        assert!(rig.flows(name::HALF_OPEN)?.is_empty(), "a refused candidate leaves nothing behind");
        assert_eq!(rig.flows(name::ESTABLISHED)?.len(), 8);
        assert_eq!(rig.service_stats(1)?.half_opened, 4);
        Ok(())
    })
}

#[test]
fn ports_that_the_host_keeps_are_never_used() -> Result<()> {
    let settings = Settings { snat_ports: (20_000, 20_003), ..Settings::default() };
    each_hook_with(&settings, |rig| {
        let mut allowed = edge_common::maps::PortSet([0; 1024]);
        allowed.0[20_002 / 64] |= 1 << (20_002 % 64);
        rig.array(name::SNAT_PORTS)?.set(0, allowed, 0)?;
        assert_eq!(snat_of(&establish(rig, 40_000)?).port(), 20_002);
        assert_eq!(send(rig, 40_001, flag::SYN, 0)?, Action::Drop);
        Ok(())
    })
}

#[test]
fn a_full_established_table_refuses_the_promotion_and_keeps_the_flow_half_open() -> Result<()> {
    let settings = Settings { established: 5, ..Settings::default() };
    each_hook_with(&settings, |rig| {
        establish(rig, 40_000)?;
        establish(rig, 40_001)?;
        send(rig, 40_002, flag::SYN, 0)?;
        let flow = rig.flow(name::HALF_OPEN, &forward_key(40_002)).expect("half-open");
        reply(rig, snat_of(&flow), flag::SYN | flag::ACK, 1000)?;
        assert_eq!(send(rig, 40_002, flag::ACK, 1001)?, Action::Drop);
        assert_eq!(rig.reason(1, Reason::EstablishedFull)?, 1);
        assert_eq!(rig.flows(name::ESTABLISHED)?.len(), 4, "the half that did fit is taken out again");
        assert_eq!(rig.flows(name::HALF_OPEN)?.len(), 2);
        // Room again: the client's next packet promotes.
        send(rig, 40_000, flag::RST, 0)?;
        assert_eq!(send(rig, 40_002, flag::ACK, 1001)?, Action::Redirect);
        assert!(rig.flow(name::ESTABLISHED, &forward_key(40_002)).is_some());
        assert_eq!(rig.service_stats(1)?.opened, 3);
        Ok(())
    })
}

#[test]
fn an_expired_closing_flow_is_a_miss() -> Result<()> {
    each_hook(|rig| {
        let flow = establish(rig, 40_000)?;
        send(rig, 40_000, flag::RST, 0)?;
        age(rig, name::CLOSING, &flow, 61)?;
        let ack = Frame::tcp(client(40_000), vip(), flag::ACK).bytes();
        rig.run(&ack, rig.uplink)?;
        assert_eq!(rig.reason(1, Reason::MidFlowReset)?, 1);
        assert!(rig.flow(name::CLOSING, &flow.key).is_none());
        Ok(())
    })
}

#[test]
fn a_syn_on_an_expired_flow_starts_a_new_one_and_on_a_live_one_it_does_not() -> Result<()> {
    each_hook(|rig| {
        let flow = establish(rig, 40_000)?;
        assert_eq!(send(rig, 40_000, flag::SYN, 0)?, Action::Redirect);
        assert_eq!(rig.flow(name::ESTABLISHED, &flow.key).expect("still there").packets, 3);
        age(rig, name::ESTABLISHED, &flow, 301)?;
        assert_eq!(send(rig, 40_000, flag::SYN, 0)?, Action::Redirect);
        assert!(rig.flows(name::ESTABLISHED)?.is_empty());
        let fresh = rig.flow(name::HALF_OPEN, &flow.key).expect("a new flow");
        assert_eq!((fresh.packets, snat_of(&fresh)), (1, snat_of(&flow)));
        assert_eq!(rig.service_stats(1)?.closed, 1);
        Ok(())
    })
}

#[test]
fn a_touch_refreshes_the_twin_and_rebuilds_a_missing_one() -> Result<()> {
    each_hook(|rig| {
        let flow = establish(rig, 40_000)?;
        age(rig, name::ESTABLISHED, &flow, 100)?;
        let old = rig.flow(name::ESTABLISHED, &flow.twin()).expect("twin").last_seen;
        send(rig, 40_000, flag::ACK, 1001)?;
        assert_eq!(rig.flow(name::ESTABLISHED, &flow.twin()).expect("twin").last_seen, old, "not due yet");
        rig.change_flow(name::ESTABLISHED, &flow.key, |flow| flow.touch_due = flow.touch_due.wrapping_sub(20_000))?;
        send(rig, 40_000, flag::ACK, 1001)?;
        assert!(rig.flow(name::ESTABLISHED, &flow.twin()).expect("twin").last_seen > old);
        let touched = rig.flow(name::ESTABLISHED, &flow.key).expect("own").touch_due;
        assert!((flow.touch_due..flow.touch_due + 4_000).contains(&touched), "{touched} after {}", flow.touch_due);

        rig.remove_flow(name::ESTABLISHED, &flow.twin())?;
        rig.change_flow(name::ESTABLISHED, &flow.key, |flow| flow.touch_due = flow.touch_due.wrapping_sub(20_000))?;
        assert_eq!(send(rig, 40_000, flag::ACK, 1001)?, Action::Redirect);
        let twin = rig.flow(name::ESTABLISHED, &flow.twin()).expect("rebuilt");
        assert_eq!((twin.twin(), twin.direction, twin.packets), (flow.key, 1, 0));
        assert_eq!(reply(rig, snat_of(&flow), flag::ACK, 1001)?, Action::Redirect);
        Ok(())
    })
}

#[test]
fn a_flow_whose_other_half_belongs_to_another_flow_is_dropped_not_overwritten() -> Result<()> {
    each_hook(|rig| {
        let flow = establish(rig, 40_000)?;
        rig.change_flow(name::ESTABLISHED, &flow.twin(), |twin| twin.new_dst_port = 40_001_u16.to_be())?;
        rig.change_flow(name::ESTABLISHED, &flow.key, |flow| flow.touch_due = flow.touch_due.wrapping_sub(20_000))?;
        let stranger = rig.flow(name::ESTABLISHED, &flow.twin());
        assert_eq!(send(rig, 40_000, flag::ACK, 1001)?, Action::Drop);
        assert_eq!(rig.reason(1, Reason::TwinTaken)?, 1);
        assert_eq!(rig.flow(name::ESTABLISHED, &flow.twin()), stranger);
        Ok(())
    })
}

#[test]
fn a_moved_route_generation_makes_a_flow_look_its_route_up_again() -> Result<()> {
    each_hook(|rig| {
        let flow = establish(rig, 40_000)?;
        assert_eq!(rig.next_hops()?, 2);
        edge_tests::datapath::namespace::ip("neigh replace 10.1.0.4 lladdr 02:00:00:00:07:07 dev pods nud permanent")?;
        let data = Frame::tcp(client(40_000), vip(), flag::ACK).ack(1001).bytes();
        assert_eq!(rig.run(&data, rig.uplink)?.frame[..6], [2, 0, 0, 0, 2, 4], "nothing told it yet");
        rig.move_routes()?;
        assert_eq!(rig.run(&data, rig.uplink)?.frame[..6], [2, 0, 0, 0, 7, 7]);
        assert_eq!(rig.next_hops()?, 2, "the same neighbour keeps its number");
        assert_eq!(rig.next_hop(flow.next_hop)?.dst_mac, [2, 0, 0, 0, 7, 7]);
        Ok(())
    })
}

#[test]
fn without_a_route_the_packet_is_dropped() -> Result<()> {
    each_hook(|rig| {
        establish(rig, 40_000)?;
        edge_tests::datapath::namespace::ip("route add blackhole 10.1.0.4/32")?;
        rig.move_routes()?;
        assert_eq!(send(rig, 40_000, flag::ACK, 1001)?, Action::Drop);
        edge_tests::datapath::namespace::ip("route replace unreachable 10.1.0.4/32")?;
        assert_eq!(send(rig, 40_000, flag::ACK, 1001)?, Action::Drop);
        assert_eq!(rig.reason(1, Reason::NoRoute)?, 2);
        Ok(())
    })
}

#[test]
fn the_first_packet_towards_an_unresolved_neighbour_goes_to_the_stack_rewritten() -> Result<()> {
    for (hook, mode) in HOOKS.into_iter().flat_map(|hook| [mode::FULL_NAT, mode::DNAT].map(|mode| (hook, mode))) {
        in_namespace(|| {
            let mut rig = Rig::new(hook, Settings::default())?;
            rig.service(1, 8443, UDP, mode, 1, 443)?;
            edge_tests::datapath::namespace::ip("neigh del 10.1.0.4 dev pods")?;
            edge_tests::datapath::namespace::ip("neigh del 172.16.1.10 dev uplink")?;
            let query = Frame::udp(client(40_000), vip());
            let outcome = rig.run(&query.bytes(), rig.uplink)?;
            let flow = rig.flow(name::HALF_OPEN, &key(client(40_000), vip(), UDP)).expect("half-open");
            assert_eq!(outcome.action, Action::Pass);
            assert_eq!(outcome.frame, query.translated(snat_of(&flow), backend(), None));
            assert_eq!(flow.next_hop, 0);
            let answer = Frame::udp(backend(), snat_of(&flow));
            let outcome = rig.run(&answer.bytes(), rig.pods)?;
            assert_eq!(outcome.action, Action::Pass);
            assert_eq!(outcome.frame, answer.translated(vip(), client(40_000), None));
            assert_eq!(rig.reason(1, Reason::NeighbourUnresolved)?, 2);
            // Resolved by the time of the second packet, without anybody telling the program.
            edge_tests::datapath::namespace::ip(
                "neigh replace 10.1.0.4 lladdr 02:00:00:00:02:04 dev pods nud reachable",
            )?;
            assert_eq!(rig.run(&query.bytes(), rig.uplink)?.action, Action::Redirect);
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn a_late_packet_of_the_old_backend_does_not_reach_the_client_s_new_flow() -> Result<()> {
    for hook in HOOKS {
        in_namespace(|| {
            let mut rig = Rig::new(hook, Settings::default())?;
            let backends = rig.service(1, 8443, TCP, mode::FULL_NAT, 2, 443)?;
            rig.set_eligible(backends[1], false)?;
            let old = establish(&mut rig, 40_000)?;
            send(&mut rig, 40_000, flag::RST, 0)?;
            rig.set_eligible(backends[0], false)?;
            rig.set_eligible(backends[1], true)?;
            assert_eq!(send(&mut rig, 40_000, flag::SYN, 0)?, Action::Redirect);
            let new = rig.flow(name::HALF_OPEN, &old.key).expect("a new flow");
            assert_eq!(new.backend, backends[1]);
            assert!(rig.flow(name::CLOSING, &old.twin()).is_some(), "the old port rests");
            assert_eq!(reply(&mut rig, snat_of(&old), flag::ACK, 1001)?, Action::Drop);
            assert_eq!(rig.reason(1, Reason::TwinTaken)?, 1);
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn a_dnat_client_whose_half_was_evicted_is_served_again() -> Result<()> {
    for hook in HOOKS {
        in_namespace(|| {
            let mut rig = Rig::new(hook, Settings::default())?;
            rig.service(1, 8443, TCP, mode::DNAT, 1, 443)?;
            assert_eq!(send(&mut rig, 40_000, flag::SYN, 0)?, Action::Redirect);
            rig.remove_flow(name::HALF_OPEN, &forward_key(40_000))?;
            assert_eq!(send(&mut rig, 40_000, flag::SYN, 0)?, Action::Redirect, "{:?}", rig.reasons()?);
            assert_eq!(rig.flows(name::HALF_OPEN)?.len(), 2);
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn two_frontends_with_one_dnat_backend_do_not_take_each_other_s_flows() -> Result<()> {
    for hook in HOOKS {
        in_namespace(|| {
            let mut rig = Rig::new(hook, Settings::default())?;
            rig.service(1, 8443, TCP, mode::DNAT, 1, 443)?;
            rig.service(2, 9443, TCP, mode::DNAT, 1, 443)?;
            send(&mut rig, 40_000, flag::SYN, 0)?;
            let other = Frame::tcp(client(40_000), SocketAddr::new(VIP.into(), 9443), flag::SYN);
            assert_eq!(rig.run(&other.bytes(), rig.uplink)?.action, Action::Drop);
            assert_eq!(rig.reason(2, Reason::TwinTaken)?, 1);
            assert_eq!(rig.flows(name::HALF_OPEN)?.len(), 2);
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn without_a_next_hop_number_left_every_packet_finds_its_own_route() -> Result<()> {
    each_hook(|rig| {
        rig.array(name::NEXT_HOP_CURSOR)?.set(0, edge_common::maps::NEXT_HOPS - 2, 0)?;
        let flow = establish(rig, 40_000)?;
        assert_eq!(flow.next_hop, edge_common::maps::NEXT_HOPS - 1, "the last one");
        let data = Frame::tcp(backend(), snat_of(&flow), flag::ACK);
        let outcome = rig.run(&data.bytes(), rig.pods)?;
        assert_eq!(outcome.action, Action::Redirect);
        assert_eq!(outcome.frame, data.translated(vip(), client(40_000), Some((CLIENT_MAC, UPLINK_MAC))));
        assert_eq!(rig.flow(name::ESTABLISHED, &flow.twin()).expect("reply half").next_hop, 0);
        let long = Frame::tcp(backend(), snat_of(&flow), flag::ACK).payload(vec![0; 1461]);
        assert_ne!(rig.run(&long.bytes(), rig.pods)?.action, Action::Pass, "the sender is told");
        assert_eq!(rig.reason(1, Reason::TooBig)?, 1);
        Ok(())
    })
}

#[test]
fn what_the_program_has_to_say_is_said_once() -> Result<()> {
    each_hook(|rig| {
        let lines: &'static Lines = Box::leak(Box::default());
        let mut logger = EbpfLogger::init_with_logger(&mut rig.ebpf, lines)?;
        // A frontend of a service beyond the array.
        let address = forward_key(40_000).dst;
        let frontend = ServiceKey { address, port: 9443_u16.to_be(), protocol: TCP, _pad: 0 };
        rig.hash(name::SERVICE_INDEX)?.insert(frontend, SERVICES, 0)?;
        rig.array(name::NEXT_HOP_CURSOR)?.set(0, edge_common::maps::NEXT_HOPS - 1, 0)?;
        for port in 40_000..40_005 {
            assert_eq!(send(rig, port, flag::SYN, 0)?, Action::Redirect);
            let unready = Frame::tcp(client(port), SocketAddr::new(VIP.into(), 9443), flag::SYN);
            assert_eq!(rig.run(&unready.bytes(), rig.uplink)?.action, Action::Drop);
        }
        logger.flush();
        let said = lines.0.lock().expect("lines").clone();
        let expected = [
            "WARN edge-ebpf: all 4095 next-hop numbers are in use: packets to further neighbours take a route lookup each",
            "ERROR edge-ebpf: a packet was dropped because a map lacks an element it should have: the reason not-ready \
             counts them",
        ];
        assert_eq!(said, expected);
        let both = notice::NEXT_HOPS_EXHAUSTED | notice::NOT_READY;
        assert_eq!(rig.array::<u32>(name::NOTICES)?.get(&0, 0)?, both | both << notice::LOGGED_SHIFT);
        Ok(())
    })
}

#[test]
fn a_datagram_after_the_idle_timeout_starts_a_new_flow() -> Result<()> {
    for hook in HOOKS {
        in_namespace(|| {
            let mut rig = Rig::new(hook, Settings::default())?;
            rig.service(1, 8443, UDP, mode::FULL_NAT, 1, 443)?;
            let (uplink, pods) = (rig.uplink, rig.pods);
            let client_key = key(client(40_000), vip(), UDP);
            let query = Frame::udp(client(40_000), vip()).bytes();
            rig.run(&query, uplink)?;
            let flow = rig.flow(name::HALF_OPEN, &client_key).context("not half-open")?;
            rig.run(&Frame::udp(backend(), snat_of(&flow)).bytes(), pods)?;
            rig.run(&query, uplink)?;
            let flow = rig.flow(name::ESTABLISHED, &client_key).context("not established")?;
            let timeout = u64::from(rig.array::<ServiceEntry>(name::SERVICES)?.get(&1, 0)?.established_timeout);
            let touch_now = |flow: &mut Entry| flow.touch_due = edge_common::conntrack::ticks(flow.last_seen);

            age(&mut rig, name::ESTABLISHED, &flow, timeout - 2)?;
            rig.change_flow(name::ESTABLISHED, &flow.key, touch_now)?;
            assert_eq!(rig.run(&query, uplink)?.action, Action::Redirect);
            assert!(rig.flow(name::HALF_OPEN, &client_key).is_none(), "idle, but not for too long");

            age(&mut rig, name::ESTABLISHED, &flow, timeout + 2)?;
            rig.change_flow(name::ESTABLISHED, &flow.key, touch_now)?;
            assert_eq!(rig.run(&query, uplink)?.action, Action::Redirect);
            assert_eq!(rig.flows(name::ESTABLISHED)?.len(), 0);
            let again = rig.flow(name::HALF_OPEN, &client_key).context("not half-open again")?;
            assert_eq!((again.packets, snat_of(&again)), (1, snat_of(&flow)));
            let stats = rig.service_stats(1)?;
            assert_eq!((stats.opened, stats.closed, stats.half_opened), (1, 1, 2));
            Ok(())
        })?;
    }
    Ok(())
}
