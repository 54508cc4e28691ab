//! ICMP messages that the program makes: from which packets, to whom, whole bytes, how many, and about what never.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context, Result};
use edge_common::{
    flow::{TCP, UDP},
    maps::{NextHop, OwnAddresses, mode, name},
    verdict::{Question, Reason},
};
use edge_tests::datapath::{
    ends::{back, backend, cases, client, hooks_and_families, vip},
    frame::{Frame, flag},
    icmp::IcmpError,
    namespace::in_namespace,
    rig::{Action, Family, Rig, Settings, key, snat_of},
};

/// The message that a router with address `from` sends back about `frame`: at most 576 bytes, or 1280 of IPv6, in whole words.
fn message(frame: &Frame, from: IpAddr, question: Question, mtu: u16) -> Vec<u8> {
    let bytes = frame.bytes();
    let most = if from.is_ipv4() { 576 - 28 } else { 1280 - 48 };
    let quote = (bytes.len() - 14).min(most) / 4 * 4;
    let [high, low] = mtu.to_be_bytes();
    let (tos, (kind, code)) = match (from, question) {
        (IpAddr::V4(_), Question::TimeExceeded) => (0xc0, (11, 0)),
        (IpAddr::V4(_), Question::TooBig) => (0xc0, (3, 4)),
        (IpAddr::V6(_), Question::TimeExceeded) => (0, (3, 0)),
        (IpAddr::V6(_), Question::TooBig) => (0, (2, 0)),
    };
    let error = IcmpError {
        dst_mac: frame.src_mac,
        src_mac: frame.dst_mac,
        tos,
        id: 0,
        fragment: 0x4000,
        rest: [0, 0, high, low],
        ..IcmpError::new(from, frame.src.ip(), kind, code, &bytes[14..14 + quote])
    };
    error.bytes()
}

fn settings(family: Family) -> Settings {
    Settings { family, ..Settings::default() }
}

/// Options, or extension headers that hold nothing.
fn with_options(frame: Frame) -> Frame {
    if frame.src.is_ipv4() {
        return Frame { options: vec![1; 40], ..frame };
    }
    // Hop-by-hop options of padding, then a fragment header of a packet in one piece (RFC 6946).
    let extensions = vec![(0, vec![0, 0, 1, 4, 0, 0, 0, 0]), (44, vec![0, 0, 0, 0, 1, 2, 3, 4])];
    Frame { extensions, ..frame }
}

#[test]
fn the_sender_of_an_expiring_packet_is_told_by_the_edge_and_about_what_it_sent() -> Result<()> {
    for (hook, mode, family) in cases() {
        in_namespace(|| {
            let mut rig = Rig::new(hook, settings(family))?;
            rig.service(1, 8443, TCP, mode, 1, 443)?;
            rig.service(2, 8443, UDP, mode, 1, 443)?;
            let (client, vip) = (client(family), vip(family));
            let mut told = 0;
            let mut expires = |rig: &mut Rig, frame: Frame, ingress: u32, from: IpAddr| -> Result<()> {
                for ttl in [0, 1] {
                    let frame = Frame { ttl, ..frame.clone() };
                    let outcome = rig.run(&frame.bytes(), ingress)?;
                    assert_eq!(outcome.action, back(hook), "{hook:?} {frame:?} {:?}", rig.reasons()?);
                    let expected = message(&frame, from, Question::TimeExceeded, 0);
                    assert_eq!(outcome.frame, expected, "{hook:?} {frame:?}");
                    told += 1;
                }
                Ok(())
            };
            let (uplink, pods, own) = (rig.uplink, rig.pods, family.own());
            // New flows first: no flow is made for a packet that goes nowhere.
            for payload in [0, 1, 3, 8, 500, 1183, 1184, 1400] {
                let payload = vec![0xa5; payload];
                expires(&mut rig, Frame::tcp(client, vip, flag::SYN).payload(payload.clone()), uplink, own[0])?;
                expires(&mut rig, Frame::udp(client, vip).payload(payload.clone()), uplink, own[0])?;
                expires(&mut rig, with_options(Frame::udp(client, vip).payload(payload.clone())), uplink, own[0])?;
            }
            assert!(rig.flows(name::HALF_OPEN)?.is_empty());
            // Then packets of a flow, both ways.
            rig.run(&Frame::tcp(client, vip, flag::SYN).bytes(), rig.uplink)?;
            let source = snat_of(&rig.flow(name::HALF_OPEN, &key(client, vip, TCP)).context("no flow")?);
            expires(&mut rig, Frame::tcp(client, vip, flag::ACK), uplink, own[0])?;
            expires(&mut rig, Frame::tcp(backend(family), source, flag::ACK), pods, own[1])?;
            assert_eq!(rig.reasons()?, [("ttl-expired", told)]);
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn the_sender_of_a_packet_too_big_for_the_next_hop_is_told_the_next_hop_s_mtu() -> Result<()> {
    for (hook, mode, family) in cases() {
        in_namespace(|| {
            let mut rig = Rig::new(hook, settings(family))?;
            rig.service(1, 8443, TCP, mode, 1, 443)?;
            let (client, vip, backend, own) = (client(family), vip(family), backend(family), family.own());
            rig.run(&Frame::tcp(client, vip, flag::SYN).bytes(), rig.uplink)?;
            let flow = rig.flow(name::HALF_OPEN, &key(client, vip, TCP)).context("no flow")?;
            let source = snat_of(&flow);
            rig.run(&Frame::tcp(backend, source, flag::SYN | flag::ACK).bytes(), rig.pods)?;
            for number in 1..=rig.next_hops()? {
                let hop = rig.next_hop(number)?;
                rig.array::<NextHop>(name::NEXT_HOPS)?.set(number, NextHop { mtu: 1300, ..hop }, 0)?;
            }
            let most = 1300 - family.header_len() - 20;
            for (src, dst, ingress, from) in [(client, vip, rig.uplink, own[0]), (backend, source, rig.pods, own[1])] {
                let fits = Frame::tcp(src, dst, flag::ACK).payload(vec![7; most]);
                assert_eq!(rig.run(&fits.bytes(), ingress)?.action, Action::Redirect);
                for payload in [most + 1, most + 2, 1440] {
                    let long = Frame::tcp(src, dst, flag::ACK).payload(vec![7; payload]);
                    let outcome = rig.run(&long.bytes(), ingress)?;
                    assert_eq!(outcome.action, back(hook), "{:?}", rig.reasons()?);
                    assert_eq!(outcome.frame, message(&long, from, Question::TooBig, 1300), "{hook:?} {payload}");
                }
                if family == Family::V4 {
                    // A router may cut this one itself, so nobody is told: the stack does it.
                    let divisible = Frame { fragment: 0, ..Frame::tcp(src, dst, flag::ACK).payload(vec![7; most + 1]) };
                    assert_eq!(rig.run(&divisible.bytes(), ingress)?.action, Action::Pass);
                }
            }
            let stack = (family == Family::V4).then_some(("via-stack", 2));
            assert_eq!(rig.reasons()?, stack.into_iter().chain([("too-big", 6)]).collect::<Vec<_>>());
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn nobody_is_told_who_is_no_single_host_or_by_an_edge_without_an_address() -> Result<()> {
    for (hook, family) in hooks_and_families() {
        in_namespace(|| {
            let mut rig = Rig::new(hook, settings(family))?;
            rig.service(1, 8443, UDP, mode::FULL_NAT, 1, 443)?;
            let expiring = Frame { ttl: 1, ..Frame::udp(client(family), vip(family)) };
            let source = |address: IpAddr| Frame { src: SocketAddr::new(address, 9), ..expiring.clone() };
            let nobodies: Vec<IpAddr> = match family {
                Family::V4 => {
                    let others = [[127, 0, 0, 1], [224, 0, 0, 1], [240, 0, 0, 1]].map(Ipv4Addr::from);
                    [Ipv4Addr::BROADCAST, Ipv4Addr::UNSPECIFIED].into_iter().chain(others).map(IpAddr::V4).collect()
                }
                Family::V6 => {
                    let all_nodes = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
                    [Ipv6Addr::UNSPECIFIED, Ipv6Addr::LOCALHOST, all_nodes].into_iter().map(IpAddr::V6).collect()
                }
            };
            let to_many = [[0xff; 6], [1, 0, 0x5e, 0, 0, 1], [0x33, 0x33, 0, 0, 0, 1]];
            let silent: Vec<Frame> = nobodies
                .into_iter()
                .map(source)
                .chain(to_many.map(|dst_mac| Frame { dst_mac, ..expiring.clone() }))
                .collect();
            for frame in &silent {
                assert_eq!(rig.run(&frame.bytes(), rig.uplink)?.action, Action::Drop, "{hook:?} {frame:?}");
            }
            assert_eq!(rig.run(&expiring.bytes(), rig.uplink)?.action, back(hook), "the one they all differ from");
            // An address of the other family is none.
            let uplink = rig.uplink;
            let mut own = rig.hash::<u32, OwnAddresses>(name::OWN_ADDRESSES)?;
            let known = own.get(&uplink, 0)?;
            let others = match family {
                Family::V4 => OwnAddresses { v4: [0; 4], ..known },
                Family::V6 => OwnAddresses { v6: [0; 4], ..known },
            };
            own.insert(uplink, others, 0)?;
            assert_eq!(rig.run(&expiring.bytes(), uplink)?.action, Action::Drop);
            rig.hash::<u32, OwnAddresses>(name::OWN_ADDRESSES)?.remove(&uplink)?;
            assert_eq!(rig.run(&expiring.bytes(), uplink)?.action, Action::Drop);
            assert_eq!(rig.reasons()?, [("ttl-expired", 1), ("icmp-unanswered", silent.len() as u64 + 2)]);
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn a_burst_of_expiring_packets_is_answered_up_to_a_limit_and_the_rest_counted() -> Result<()> {
    for (hook, family) in hooks_and_families() {
        in_namespace(|| {
            let mut rig = Rig::new(hook, settings(family))?;
            rig.service(1, 8443, UDP, mode::FULL_NAT, 1, 443)?;
            let expiring = Frame { ttl: 1, ..Frame::udp(client(family), vip(family)) }.bytes();
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
