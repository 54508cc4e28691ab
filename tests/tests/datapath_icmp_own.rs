//! ICMP messages that the program makes: from which packets, to whom, whole bytes, how many, and about what never.

use std::net::{Ipv4Addr, SocketAddr};

use anyhow::{Context, Result};
use edge_common::{
    flow::{TCP, UDP},
    maps::{NextHop, OwnAddresses, mode, name},
    verdict::Reason,
};
use edge_tests::datapath::{
    frame::{Frame, flag},
    icmp::IcmpError,
    namespace::in_namespace,
    rig::{Action, CLIENT, HOOKS, Hook, OWN, Rig, Settings, VIP, ipv4, key, pod, snat_of},
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

/// The message that a router with address `from` sends back about `frame`: at most 576 bytes, in whole words.
fn message(frame: &Frame, from: Ipv4Addr, kind: u8, code: u8, mtu: u16) -> Vec<u8> {
    let bytes = frame.bytes();
    let quote = (bytes.len() - 14).min(548) / 4 * 4;
    let [high, low] = mtu.to_be_bytes();
    let error = IcmpError {
        dst_mac: frame.src_mac,
        src_mac: frame.dst_mac,
        id: 0,
        fragment: 0x4000,
        rest: [0, 0, high, low],
        ..IcmpError::new(from, ipv4(frame.src), kind, code, &bytes[14..14 + quote])
    };
    error.bytes()
}

/// How a hook sends a packet back out of the interface it came in by.
fn back(hook: Hook) -> Action {
    if hook == Hook::Xdp { Action::Transmit } else { Action::Redirect }
}

#[test]
fn the_sender_of_an_expiring_packet_is_told_by_the_edge_and_about_what_it_sent() -> Result<()> {
    for (hook, mode) in HOOKS.into_iter().flat_map(|hook| MODES.map(|mode| (hook, mode))) {
        in_namespace(|| {
            let mut rig = Rig::new(hook, Settings::default())?;
            rig.service(1, 8443, TCP, mode, 1, 443)?;
            rig.service(2, 8443, UDP, mode, 1, 443)?;
            let mut told = 0;
            let mut expires = |rig: &mut Rig, frame: Frame, ingress: u32, from: Ipv4Addr| -> Result<()> {
                for ttl in [0, 1] {
                    let frame = Frame { ttl, ..frame.clone() };
                    let outcome = rig.run(&frame.bytes(), ingress)?;
                    assert_eq!(outcome.action, back(hook), "{hook:?} {frame:?} {:?}", rig.reasons()?);
                    assert_eq!(outcome.frame, message(&frame, from, 11, 0, 0), "{hook:?} {frame:?}");
                    told += 1;
                }
                Ok(())
            };
            let (uplink, pods) = (rig.uplink, rig.pods);
            // New flows first: no flow is made for a packet that goes nowhere.
            for payload in [0, 1, 3, 8, 500, 1400] {
                let payload = vec![0xa5; payload];
                expires(&mut rig, Frame::tcp(client(), vip(), flag::SYN).payload(payload.clone()), uplink, OWN[0])?;
                expires(&mut rig, Frame::udp(client(), vip()).payload(payload.clone()), uplink, OWN[0])?;
                let options = Frame { options: vec![1; 40], ..Frame::udp(client(), vip()).payload(payload.clone()) };
                expires(&mut rig, options, uplink, OWN[0])?;
            }
            assert!(rig.flows(name::HALF_OPEN)?.is_empty());
            // Then packets of a flow, both ways.
            rig.run(&Frame::tcp(client(), vip(), flag::SYN).bytes(), rig.uplink)?;
            let source = snat_of(&rig.flow(name::HALF_OPEN, &key(client(), vip(), TCP)).context("no flow")?);
            expires(&mut rig, Frame::tcp(client(), vip(), flag::ACK), uplink, OWN[0])?;
            expires(&mut rig, Frame::tcp(backend(), source, flag::ACK), pods, OWN[1])?;
            assert_eq!(rig.reasons()?, [("ttl-expired", told)]);
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn the_sender_of_a_packet_too_big_for_the_next_hop_is_told_the_next_hop_s_mtu() -> Result<()> {
    for (hook, mode) in HOOKS.into_iter().flat_map(|hook| MODES.map(|mode| (hook, mode))) {
        in_namespace(|| {
            let mut rig = Rig::new(hook, Settings::default())?;
            rig.service(1, 8443, TCP, mode, 1, 443)?;
            rig.run(&Frame::tcp(client(), vip(), flag::SYN).bytes(), rig.uplink)?;
            let flow = rig.flow(name::HALF_OPEN, &key(client(), vip(), TCP)).context("no flow")?;
            let source = snat_of(&flow);
            rig.run(&Frame::tcp(backend(), source, flag::SYN | flag::ACK).bytes(), rig.pods)?;
            for number in 1..=rig.next_hops()? {
                let hop = rig.next_hop(number)?;
                rig.array::<NextHop>(name::NEXT_HOPS)?.set(number, NextHop { mtu: 1300, ..hop }, 0)?;
            }
            for (src, dst, ingress, from) in
                [(client(), vip(), rig.uplink, OWN[0]), (backend(), source, rig.pods, OWN[1])]
            {
                let fits = Frame::tcp(src, dst, flag::ACK).payload(vec![7; 1260]);
                assert_eq!(rig.run(&fits.bytes(), ingress)?.action, Action::Redirect);
                for payload in [1261, 1262, 1460] {
                    let long = Frame::tcp(src, dst, flag::ACK).payload(vec![7; payload]);
                    let outcome = rig.run(&long.bytes(), ingress)?;
                    assert_eq!(outcome.action, back(hook), "{:?}", rig.reasons()?);
                    assert_eq!(outcome.frame, message(&long, from, 3, 4, 1300), "{hook:?} {payload}");
                }
                // A router may cut this one itself, so nobody is told: the stack does it.
                let divisible = Frame { fragment: 0, ..Frame::tcp(src, dst, flag::ACK).payload(vec![7; 1261]) };
                assert_eq!(rig.run(&divisible.bytes(), ingress)?.action, Action::Pass);
            }
            assert_eq!(rig.reasons()?, [("via-stack", 2), ("too-big", 6)]);
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn nobody_is_told_who_is_no_single_host_or_by_an_edge_without_an_address() -> Result<()> {
    for hook in HOOKS {
        in_namespace(|| {
            let mut rig = Rig::new(hook, Settings::default())?;
            rig.service(1, 8443, UDP, mode::FULL_NAT, 1, 443)?;
            let expiring = Frame { ttl: 1, ..Frame::udp(client(), vip()) };
            let source = |address: Ipv4Addr| Frame { src: SocketAddr::new(address.into(), 9), ..expiring.clone() };
            let silent = [
                source(Ipv4Addr::BROADCAST),
                source(Ipv4Addr::UNSPECIFIED),
                source(Ipv4Addr::LOCALHOST),
                source(Ipv4Addr::new(224, 0, 0, 1)),
                source(Ipv4Addr::new(240, 0, 0, 1)),
                Frame { dst_mac: [0xff; 6], ..expiring.clone() },
                Frame { dst_mac: [1, 0, 0x5e, 0, 0, 1], ..expiring.clone() },
            ];
            for frame in &silent {
                assert_eq!(rig.run(&frame.bytes(), rig.uplink)?.action, Action::Drop, "{hook:?} {frame:?}");
            }
            assert_eq!(rig.run(&expiring.bytes(), rig.uplink)?.action, back(hook), "the one they all differ from");
            let uplink = rig.uplink;
            rig.hash::<u32, OwnAddresses>(name::OWN_ADDRESSES)?.remove(&uplink)?;
            assert_eq!(rig.run(&expiring.bytes(), uplink)?.action, Action::Drop);
            assert_eq!(rig.reasons()?, [("ttl-expired", 1), ("icmp-unanswered", silent.len() as u64 + 1)]);
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn a_burst_of_expiring_packets_is_answered_up_to_a_limit_and_the_rest_counted() -> Result<()> {
    for hook in HOOKS {
        in_namespace(|| {
            let mut rig = Rig::new(hook, Settings::default())?;
            rig.service(1, 8443, UDP, mode::FULL_NAT, 1, 443)?;
            let expiring = Frame { ttl: 1, ..Frame::udp(client(), vip()) }.bytes();
            let (mut answered, mut dropped) = (0, 0);
            // 1000 a second and 64 at once for each CPU: this many take less than a second by far.
            for _ in 0..4000 {
                match rig.run(&expiring, rig.uplink)?.action {
                    Action::Drop => dropped += 1,
                    action => {
                        assert_eq!(action, back(hook));
                        answered += 1;
                    }
                }
            }
            assert!(answered >= 64 && dropped > 0, "{hook:?}: {answered} answered, {dropped} not");
            assert_eq!(rig.reason(1, Reason::TtlExpired)?, answered);
            assert_eq!(rig.reason(1, Reason::IcmpLimited)?, dropped);
            Ok(())
        })?;
    }
    Ok(())
}
