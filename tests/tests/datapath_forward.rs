//! New and established flows on both hooks, in both modes and directions: verdict, whole packet, counters, entries.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use edge_common::{
    flow::{TCP, UDP},
    maps::{flow_flag, mode, name},
    verdict::Reason,
};
use edge_tests::datapath::{
    frame::{Frame, flag},
    namespace::in_namespace,
    rig::{
        Action, CLIENT, CLIENT_MAC, Entry, HOOKS, Hook, PODS_MAC, Rig, SNAT, Settings, UPLINK_MAC, VIP, key, pod,
        pod_mac, snat_of,
    },
};

const MODES: [u8; 2] = [mode::FULL_NAT, mode::DNAT];

fn client() -> SocketAddr {
    SocketAddr::new(CLIENT.into(), 40_000)
}

fn vip() -> SocketAddr {
    SocketAddr::new(VIP.into(), 8443)
}

fn backend() -> SocketAddr {
    SocketAddr::new(pod(0).into(), 443)
}

/// Both entries of the one flow of a table, the client's first.
fn halves(rig: &mut Rig, table: &str, protocol: u8) -> Result<Option<(Entry, Entry)>> {
    let Some(forward) = rig.flow(table, &key(client(), vip(), protocol)) else {
        assert!(rig.flows(table)?.is_empty(), "no client half, yet an entry in {table}");
        return Ok(None);
    };
    let reply = rig.flow(table, &forward.twin()).context("no other half")?;
    assert_eq!(reply.twin(), forward.key);
    assert_eq!((reply.service, reply.backend), (forward.service, forward.backend));
    assert_eq!(rig.flows(table)?.len(), 2);
    Ok(Some((forward, reply)))
}

#[test]
fn a_tcp_flow_opens_and_is_translated_both_ways() -> Result<()> {
    for (hook, mode) in HOOKS.into_iter().flat_map(|hook| MODES.map(|mode| (hook, mode))) {
        in_namespace(|| {
            let mut rig = Rig::new(hook, Settings::default())?;
            let backends = rig.service(1, 8443, TCP, mode, 1, 443)?;

            let syn = Frame::tcp(client(), vip(), flag::SYN);
            let outcome = rig.run(&syn.bytes(), rig.uplink)?;
            assert_eq!(outcome.action, Action::Redirect, "{hook:?} mode {mode} {:?}", rig.reasons()?);
            let (forward, reply) = halves(&mut rig, name::HALF_OPEN, TCP)?.expect("half-open");
            let source = snat_of(&forward);
            let expected = if mode == mode::DNAT { client() } else { SocketAddr::new(SNAT.into(), source.port()) };
            assert_eq!(source, expected);
            assert_eq!(outcome.frame, syn.translated(source, backend(), Some((pod_mac(0), PODS_MAC))));
            assert_eq!((forward.packets, reply.packets), (1, 0));

            let syn_ack = Frame::tcp(backend(), source, flag::SYN | flag::ACK).seq(1000);
            let outcome = rig.run(&syn_ack.bytes(), rig.pods)?;
            assert_eq!(outcome.action, Action::Redirect);
            assert_eq!(outcome.frame, syn_ack.translated(vip(), client(), Some((CLIENT_MAC, UPLINK_MAC))));
            let (forward, _) = halves(&mut rig, name::HALF_OPEN, TCP)?.expect("still half-open");
            // Replies of a dnat service may come by another edge.
            let crossing = if mode == mode::DNAT { flow_flag::CROSSING } else { 0 };
            assert_eq!((forward.ack_floor, forward.flags), (1001, flow_flag::SYN_ACK_SEEN | crossing));

            let ack = Frame::tcp(client(), vip(), flag::ACK).ack(1001);
            let outcome = rig.run(&ack.bytes(), rig.uplink)?;
            assert_eq!(outcome.action, Action::Redirect);
            assert_eq!(outcome.frame, ack.translated(source, backend(), Some((pod_mac(0), PODS_MAC))));
            assert!(halves(&mut rig, name::HALF_OPEN, TCP)?.is_none());
            let (forward, reply) = halves(&mut rig, name::ESTABLISHED, TCP)?.expect("established");
            assert_eq!((forward.packets, forward.bytes), (2, (syn.ip_len() + ack.ip_len()) as u64));
            assert_eq!((reply.packets, reply.bytes), (1, syn_ack.ip_len() as u64));

            let data = Frame::tcp(backend(), source, flag::ACK).payload(vec![0xa5; 1400]);
            let outcome = rig.run(&data.bytes(), rig.pods)?;
            assert_eq!(outcome.frame, data.translated(vip(), client(), Some((CLIENT_MAC, UPLINK_MAC))));
            for stats in [rig.service_stats(1)?, rig.backend_stats(backends[0])?] {
                assert_eq!((stats.half_opened, stats.opened, stats.closed), (1, 1, 0));
                assert_eq!((stats.packets_in, stats.bytes_in), (2, (syn.ip_len() + ack.ip_len()) as u64));
                assert_eq!((stats.packets_out, stats.bytes_out), (2, (syn_ack.ip_len() + data.ip_len()) as u64));
            }
            assert_eq!(rig.reasons()?, []);
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn a_udp_flow_is_promoted_by_the_client_s_second_datagram_after_a_reply() -> Result<()> {
    for (hook, mode) in HOOKS.into_iter().flat_map(|hook| MODES.map(|mode| (hook, mode))) {
        in_namespace(|| {
            let mut rig = Rig::new(hook, Settings::default())?;
            rig.service(1, 8443, UDP, mode, 1, 443)?;
            let query = Frame::udp(client(), vip());
            for _ in 0..2 {
                let outcome = rig.run(&query.bytes(), rig.uplink)?;
                let (forward, _) = halves(&mut rig, name::HALF_OPEN, UDP)?.expect("half-open without a reply");
                let expected = query.translated(snat_of(&forward), backend(), Some((pod_mac(0), PODS_MAC)));
                assert_eq!((outcome.action, outcome.frame), (Action::Redirect, expected));
            }
            let (forward, _) = halves(&mut rig, name::HALF_OPEN, UDP)?.expect("half-open");
            let answer = Frame { no_checksum: true, ..Frame::udp(backend(), snat_of(&forward)) };
            let outcome = rig.run(&answer.bytes(), rig.pods)?;
            assert_eq!(outcome.frame, answer.translated(vip(), client(), Some((CLIENT_MAC, UPLINK_MAC))));
            assert!(halves(&mut rig, name::HALF_OPEN, UDP)?.is_some(), "a reply alone does not promote");
            rig.run(&query.bytes(), rig.uplink)?;
            assert!(halves(&mut rig, name::HALF_OPEN, UDP)?.is_none());
            let (forward, reply) = halves(&mut rig, name::ESTABLISHED, UDP)?.expect("established");
            assert_eq!((forward.packets, reply.packets), (3, 1));
            assert_eq!(rig.service_stats(1)?.opened, 1);
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn a_computed_udp_checksum_of_zero_is_sent_as_all_ones() -> Result<()> {
    for hook in HOOKS {
        in_namespace(|| {
            let mut rig = Rig::new(hook, Settings { snat_ports: (20_000, 20_000), ..Settings::default() })?;
            rig.service(1, 8443, UDP, mode::FULL_NAT, 1, 443)?;
            let source = SocketAddr::new(SNAT.into(), 20_000);
            // The payload word that makes the translated packet's sum zero.
            let probe = Frame::udp(source, backend()).payload(vec![0, 0]);
            let bytes = probe.bytes();
            let check = u16::from_be_bytes([bytes[40], bytes[41]]);
            let query = Frame::udp(client(), vip()).payload(check.to_be_bytes().to_vec());
            let outcome = rig.run(&query.bytes(), rig.uplink)?;
            assert_eq!(outcome.frame[40..42], [0xff, 0xff]);
            assert_eq!(outcome.frame, query.translated(source, backend(), Some((pod_mac(0), PODS_MAC))));
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn only_an_acknowledgement_of_the_latest_syn_ack_promotes() -> Result<()> {
    for hook in HOOKS {
        in_namespace(|| {
            let mut rig = Rig::new(hook, Settings::default())?;
            rig.service(1, 8443, TCP, mode::FULL_NAT, 1, 443)?;
            rig.run(&Frame::tcp(client(), vip(), flag::SYN).bytes(), rig.uplink)?;
            let (forward, _) = halves(&mut rig, name::HALF_OPEN, TCP)?.expect("half-open");
            let source = snat_of(&forward);

            let ack = |ack: u32| Frame::tcp(client(), vip(), flag::ACK).ack(ack).bytes();
            rig.run(&ack(1001), rig.uplink)?;
            assert!(halves(&mut rig, name::ESTABLISHED, TCP)?.is_none(), "no SYN-ACK seen yet");
            let syn_ack = |seq: u32| Frame::tcp(backend(), source, flag::SYN | flag::ACK).seq(seq).bytes();
            rig.run(&syn_ack(u32::MAX - 10), rig.pods)?;
            // The backend forgot and starts again: what counts is its latest sequence number.
            rig.run(&syn_ack(u32::MAX), rig.pods)?;
            for wrong in [u32::MAX - 9, u32::MAX, 1 << 20, 0x8000_0000] {
                rig.run(&ack(wrong), rig.uplink)?;
                assert!(halves(&mut rig, name::ESTABLISHED, TCP)?.is_none(), "acknowledging {wrong} promoted");
            }
            // SYN retransmitted after the SYN-ACK, and a SYN with ACK: neither acknowledges.
            rig.run(&Frame::tcp(client(), vip(), flag::SYN).ack(1).bytes(), rig.uplink)?;
            rig.run(&Frame::tcp(client(), vip(), flag::SYN | flag::ACK).ack(1).bytes(), rig.uplink)?;
            assert!(halves(&mut rig, name::ESTABLISHED, TCP)?.is_none());
            // The first ACK was lost; a later one, for data the server sent early, does as well.
            rig.run(&ack((1 << 20) - 1), rig.uplink)?;
            assert!(halves(&mut rig, name::ESTABLISHED, TCP)?.is_some());
            assert_eq!(rig.service_stats(1)?.half_opened, 1);
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn ip_options_are_carried_along() -> Result<()> {
    for hook in HOOKS {
        in_namespace(|| {
            let mut rig = Rig::new(hook, Settings::default())?;
            rig.service(1, 8443, TCP, mode::DNAT, 1, 443)?;
            for words in [1, 5, 10] {
                let frame = Frame { options: vec![1; words * 4], ..Frame::tcp(client(), vip(), flag::SYN) };
                let outcome = rig.run(&frame.bytes(), rig.uplink)?;
                assert_eq!(outcome.frame, frame.translated(client(), backend(), Some((pod_mac(0), PODS_MAC))));
            }
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn the_ttl_ends_here_at_one() -> Result<()> {
    for hook in HOOKS {
        in_namespace(|| {
            let mut rig = Rig::new(hook, Settings::default())?;
            rig.service(1, 8443, TCP, mode::FULL_NAT, 1, 443)?;
            for ttl in [0, 1] {
                let frame = Frame { ttl, ..Frame::tcp(client(), vip(), flag::SYN) };
                // What goes back is datapath_icmp_own.rs's subject.
                assert_ne!(rig.run(&frame.bytes(), rig.uplink)?.action, Action::Pass);
            }
            assert_eq!(rig.reasons()?, [("ttl-expired", 2)]);
            assert!(rig.flows(name::HALF_OPEN)?.is_empty(), "no flow for a packet that goes nowhere");
            let frame = Frame { ttl: 2, ..Frame::tcp(client(), vip(), flag::SYN) };
            assert_eq!(rig.run(&frame.bytes(), rig.uplink)?.action, Action::Redirect);
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn a_packet_longer_than_the_route_s_mtu_is_refused_or_left_to_the_stack_to_fragment() -> Result<()> {
    for hook in HOOKS {
        in_namespace(|| {
            let mut rig = Rig::new(hook, Settings::default())?;
            rig.service(1, 8443, UDP, mode::FULL_NAT, 1, 443)?;
            let long = Frame::udp(client(), vip()).payload(vec![7; 1473]);
            let whole = Frame { fragment: 0x4000, ..long.clone() };
            assert_ne!(rig.run(&whole.bytes(), rig.uplink)?.action, Action::Pass);
            assert_eq!(rig.reason(1, Reason::TooBig)?, 1);
            let outcome = rig.run(&long.bytes(), rig.uplink)?;
            assert_eq!(outcome.action, Action::Pass);
            let (forward, _) = halves(&mut rig, name::HALF_OPEN, UDP)?.expect("half-open");
            assert_eq!(outcome.frame, long.translated(snat_of(&forward), backend(), None));
            let fits = Frame::udp(client(), vip()).payload(vec![7; 1472]);
            assert_eq!(rig.run(&fits.bytes(), rig.uplink)?.action, Action::Redirect);
            if hook == Hook::Tc {
                // The segments count, not the packet.
                let outcome = rig.run_gso(&long.bytes(), rig.uplink, 1400)?;
                assert_eq!(outcome.action, Action::Redirect);
            }
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn a_reply_leaves_by_the_interface_it_came_in_by_where_the_route_says_so() -> Result<()> {
    in_namespace(|| {
        let mut rig = Rig::new(Hook::Xdp, Settings::default())?;
        rig.service(1, 8443, TCP, mode::DNAT, 1, 443)?;
        let neighbour = SocketAddr::new(pod(1).into(), 40_000);
        let syn = Frame::tcp(neighbour, vip(), flag::SYN);
        let outcome = rig.run(&syn.bytes(), rig.pods)?;
        assert_eq!(outcome.action, Action::Transmit);
        assert_eq!(outcome.frame, syn.translated(neighbour, backend(), Some((pod_mac(0), PODS_MAC))));
        Ok(())
    })
}
