//! What is not ours passes byte for byte; what is ours but broken, or has nowhere to go, is dropped with its reason.

use std::{
    collections::HashMap,
    net::{Ipv4Addr, SocketAddr},
};

use anyhow::Result;
use edge_common::{
    flow::{TCP, UDP},
    maps::{ServiceEntry, interface_flag, mode, name, service_flag},
    verdict::Reason,
};
use edge_tests::datapath::{
    frame::{Frame, flag},
    namespace::in_namespace,
    rig::{Action, CLIENT, CLIENT_MAC, HOOKS, Hook, Rig, SNAT, Settings, UPLINK_MAC, VIP, key, pod, snat_of},
};

fn client(port: u16) -> SocketAddr {
    SocketAddr::new(CLIENT.into(), port)
}

fn vip() -> SocketAddr {
    SocketAddr::new(VIP.into(), 8443)
}

fn each_hook(mode: u8, pods: u8, test: impl Fn(&mut Rig, &[u32]) -> Result<()> + Sync) -> Result<()> {
    for hook in HOOKS {
        in_namespace(|| {
            let mut rig = Rig::new(hook, Settings::default())?;
            let backends = rig.service(1, 8443, TCP, mode, pods, 443)?;
            test(&mut rig, &backends)
        })?;
    }
    Ok(())
}

fn passes_untouched(rig: &mut Rig, what: &str, frame: &[u8]) -> Result<()> {
    for ingress in [rig.uplink, rig.pods] {
        let outcome = rig.run(frame, ingress)?;
        assert_eq!(outcome.action, Action::Pass, "{what}: {:?}", rig.reasons()?);
        assert_eq!(outcome.frame, frame, "{what}");
    }
    assert!(rig.flows(name::HALF_OPEN)?.is_empty(), "{what} made a flow");
    Ok(())
}

#[test]
fn what_is_not_ours_passes_byte_for_byte() -> Result<()> {
    each_hook(mode::DNAT, 1, |rig, _| {
        let elsewhere = SocketAddr::new(Ipv4Addr::new(192, 0, 2, 7).into(), 8443);
        let other = Frame::tcp(client(40_000), elsewhere, flag::SYN);
        let arp: Vec<u8> =
            [&[0xff; 6][..], &[2, 0, 0, 0, 1, 10], &[8, 6], &[0, 1, 8, 0, 6, 4, 0, 1], &[0; 20]].concat();
        let icmp = Frame { protocol: 1, ..Frame::udp(client(0), SocketAddr::new(VIP.into(), 0)) };
        let mut ipv6 = Frame::tcp(client(40_000), vip(), flag::SYN).bytes();
        ipv6[12..14].copy_from_slice(&[0x86, 0xdd]);
        let mut tagged = Frame::tcp(client(40_000), vip(), flag::SYN).bytes();
        tagged.splice(12..12, [0x81, 0x00, 0x00, 0x05]);
        let mut version_5 = Frame::tcp(client(40_000), vip(), flag::SYN).bytes();
        version_5[14] = 0x55;
        for (what, frame) in [
            ("another destination", other.bytes()),
            ("a fragment to another destination", Frame { fragment: 0x2001, ..other.clone() }.bytes()),
            ("options to another destination", Frame { options: vec![7; 8], ..other.clone() }.bytes()),
            ("TTL 1 to another destination", Frame { ttl: 1, ..other.clone() }.bytes()),
            ("cut short to another destination", other.bytes()[..40].to_vec()),
            ("UDP to another destination", Frame::udp(client(1), elsewhere).bytes()),
            ("ARP", arp),
            ("ICMP to the VIP", icmp.bytes()),
            ("IPv6", ipv6),
            ("a VLAN tag", tagged),
            ("IP version 5", version_5),
            ("GRE to the VIP", Frame { protocol: 47, ..Frame::udp(client(0), vip()) }.bytes()),
        ] {
            passes_untouched(rig, what, &frame)?;
        }
        assert_eq!(rig.reasons()?, []);
        Ok(())
    })
}

#[test]
fn other_ports_of_the_vip_go_to_the_host_and_on_a_dedicated_one_mid_flow_packets_without_a_flow() -> Result<()> {
    each_hook(mode::FULL_NAT, 1, |rig, _| {
        let ssh = SocketAddr::new(VIP.into(), 22);
        passes_untouched(rig, "another port", &Frame::tcp(client(40_000), ssh, flag::SYN).bytes())?;
        passes_untouched(rig, "another protocol", &Frame::udp(client(40_000), vip()).bytes())?;
        assert_eq!(rig.reason(0, Reason::NoFrontend)?, 4);
        let mut service: ServiceEntry = rig.array(name::SERVICES)?.get(&1, 0)?;
        service.flags |= service_flag::DEDICATED;
        rig.array(name::SERVICES)?.set(1, service, 0)?;
        for flags in [flag::ACK, flag::FIN | flag::ACK, flag::SYN | flag::ACK, flag::SYN | flag::FIN, 0] {
            passes_untouched(rig, "no flow", &Frame::tcp(client(40_000), vip(), flags).bytes())?;
        }
        assert_eq!(rig.reason(1, Reason::NoFlow)?, 10);
        Ok(())
    })
}

#[test]
fn later_fragments_to_our_addresses_without_a_first_one_pass_untouched_and_are_counted() -> Result<()> {
    each_hook(mode::FULL_NAT, 1, |rig, _| {
        for fragment in [0x2001, 0x0001, 0x1fff] {
            passes_untouched(
                rig,
                "a fragment",
                &Frame { fragment, ..Frame::tcp(client(1), vip(), flag::SYN) }.bytes(),
            )?;
        }
        assert_eq!(rig.reason(0, Reason::Fragment)?, 6);
        Ok(())
    })
}

#[test]
fn a_packet_to_a_frontend_truncated_at_any_length_is_passed_untouched_or_dropped_as_malformed() -> Result<()> {
    for protocol in [TCP, UDP] {
        for hook in HOOKS {
            in_namespace(|| {
                let mut rig = Rig::new(hook, Settings::default())?;
                rig.service(1, 8443, protocol, mode::FULL_NAT, 1, 443)?;
                let frame = match protocol {
                    TCP => Frame::tcp(client(40_000), vip(), flag::SYN),
                    _ => Frame::udp(client(40_000), vip()),
                };
                let whole = Frame { options: vec![1; 8], ..frame }.bytes();
                // What a test run takes at least: an Ethernet header, and for an skb that says IPv4 (since 6.17) that too.
                let least = if hook == Hook::Xdp { 14 } else { 34 };
                for len in least..whole.len() {
                    let cut = &whole[..len];
                    let outcome = rig.run(cut, rig.uplink)?;
                    // Below an IP header nobody knows whose packet it is.
                    let expected = if len < 34 { Action::Pass } else { Action::Drop };
                    assert_eq!(outcome.action, expected, "{hook:?}, {len} bytes of {}", whole.len());
                    assert_eq!(outcome.frame, cut);
                }
                assert_eq!(rig.reason(0, Reason::Malformed)?, (whole.len() - 34) as u64);
                assert!(rig.flows(name::HALF_OPEN)?.is_empty());
                assert_eq!(rig.run(&whole, rig.uplink)?.action, Action::Redirect);
                Ok(())
            })?;
        }
    }
    Ok(())
}

#[test]
fn lengths_that_contradict_each_other_are_malformed() -> Result<()> {
    each_hook(mode::FULL_NAT, 1, |rig, _| {
        let good = Frame::tcp(client(40_000), vip(), flag::SYN).bytes();
        for (what, at, value) in [
            ("IP header of 16 bytes", 14, 0x44),
            ("IP header beyond the packet", 14, 0x4f),
            ("total length beyond the frame", 17, 0xff),
            ("total length within the header", 17, 19),
            ("total length within the TCP header", 17, 39),
            ("data offset below 5", 46, 0x40),
            ("data offset beyond the packet", 46, 0xf0),
        ] {
            let mut bad = good.clone();
            bad[at] = value;
            assert_eq!(rig.run(&bad, rig.uplink)?.action, Action::Drop, "{what}");
        }
        assert_eq!(rig.reason(0, Reason::Malformed)?, 7);
        // Padding behind the packet is normal, and stays.
        let padded = [good.clone(), vec![0; 11]].concat();
        assert_eq!(rig.run(&padded, rig.uplink)?.frame[good.len()..], [0; 11]);
        Ok(())
    })
}

#[test]
fn one_write_excludes_a_backend_and_another_takes_it_back() -> Result<()> {
    each_hook(mode::FULL_NAT, 3, |rig, backends| {
        let spread = |rig: &mut Rig, base: u16| -> Result<HashMap<u32, u32>> {
            let mut counts = HashMap::new();
            for port in base..base + 300 {
                rig.run(&Frame::tcp(client(port), vip(), flag::SYN).bytes(), rig.uplink)?;
                let flow = rig.flow(name::HALF_OPEN, &key(client(port), vip(), TCP)).expect("half-open");
                *counts.entry(flow.backend).or_default() += 1;
            }
            Ok(counts)
        };
        let all = spread(rig, 10_000)?;
        assert!(backends.iter().all(|backend| (60..140).contains(&all[backend])), "{all:?}");
        rig.set_eligible(backends[1], false)?;
        let without = spread(rig, 11_000)?;
        assert_eq!(without.get(&backends[1]), None);
        assert!([0, 2].iter().all(|n| (90..210).contains(&without[&backends[*n]])), "{without:?}");
        rig.set_eligible(backends[1], true)?;
        assert_eq!(spread(rig, 12_000)?.len(), 3);
        for backend in backends {
            rig.set_eligible(*backend, false)?;
        }
        assert_eq!(rig.run(&Frame::tcp(client(1), vip(), flag::SYN).bytes(), rig.uplink)?.action, Action::Drop);
        assert_eq!(rig.reason(1, Reason::NoBackend)?, 1);
        Ok(())
    })
}

#[test]
fn the_last_eligible_backend_of_many_is_found() -> Result<()> {
    each_hook(mode::FULL_NAT, 16, |rig, backends| {
        for backend in &backends[1..] {
            rig.set_eligible(*backend, false)?;
        }
        for port in 1000..1050 {
            let syn = Frame::tcp(client(port), vip(), flag::SYN).bytes();
            assert_eq!(rig.run(&syn, rig.uplink)?.action, Action::Redirect, "{:?}", rig.reasons()?);
        }
        assert_eq!(rig.backend_stats(backends[0])?.half_opened, 50);
        Ok(())
    })
}

#[test]
fn a_service_without_a_pool_drops_new_flows() -> Result<()> {
    each_hook(mode::FULL_NAT, 0, |rig, _| {
        assert_eq!(rig.run(&Frame::tcp(client(1), vip(), flag::SYN).bytes(), rig.uplink)?.action, Action::Drop);
        assert_eq!(rig.reason(1, Reason::NoBackend)?, 1);
        Ok(())
    })
}

#[test]
fn a_dnat_backend_s_packet_without_a_flow_never_leaves_raw() -> Result<()> {
    each_hook(mode::DNAT, 1, |rig, backends| {
        let from_backend = SocketAddr::new(pod(0).into(), 443);
        let reply = |port| Frame::tcp(from_backend, client(port), flag::ACK);
        // Where every edge would choose this backend it is a reply to another edge's client, and leaves as the VIP's.
        let outcome = rig.run(&reply(39_999).bytes(), rig.pods)?;
        let translated = reply(39_999).translated(vip(), client(39_999), Some((CLIENT_MAC, UPLINK_MAC)));
        assert_eq!((outcome.action, outcome.frame), (Action::Redirect, translated));
        rig.set_eligible(backends[0], false)?;
        assert_eq!(rig.run(&reply(40_000).bytes(), rig.pods)?.action, Action::Drop);
        assert_eq!(rig.reason(1, Reason::ReplyWithoutFlow)?, 1);
        // To the host itself, or from a port that is no backend: none of our business.
        let to_host = Frame::tcp(from_backend, SocketAddr::new(SNAT.into(), 5000), flag::ACK).bytes();
        assert_eq!(rig.run(&to_host, rig.pods)?.action, Action::Pass);
        let other_port = Frame::tcp(SocketAddr::new(pod(0).into(), 9000), client(40_000), flag::ACK).bytes();
        let outcome = rig.run(&other_port, rig.pods)?;
        assert_eq!((outcome.action, outcome.frame), (Action::Pass, other_port));
        Ok(())
    })
}

#[test]
fn an_interface_that_takes_no_redirect_gets_packets_by_way_of_the_stack_on_xdp_only() -> Result<()> {
    each_hook_named(|rig, hook| {
        let pods = rig.pods;
        rig.hash::<u32, u32>(name::INTERFACES)?.insert(pods, interface_flag::ATTACHED, 0)?;
        let syn = Frame::tcp(client(40_000), vip(), flag::SYN);
        let outcome = rig.run(&syn.bytes(), rig.uplink)?;
        if hook == Hook::Tc {
            assert_eq!(outcome.action, Action::Redirect);
            return Ok(());
        }
        assert_eq!(outcome.action, Action::Pass);
        let flow = rig.flow(name::HALF_OPEN, &key(client(40_000), vip(), TCP)).expect("half-open");
        assert_eq!(outcome.frame, syn.translated(snat_of(&flow), SocketAddr::new(pod(0).into(), 443), None));
        assert_eq!(rig.reason(1, Reason::ViaStack)?, 1);
        Ok(())
    })
}

fn each_hook_named(test: impl Fn(&mut Rig, Hook) -> Result<()> + Sync) -> Result<()> {
    for hook in HOOKS {
        in_namespace(|| {
            let mut rig = Rig::new(hook, Settings::default())?;
            rig.service(1, 8443, TCP, mode::FULL_NAT, 1, 443)?;
            test(&mut rig, hook)
        })?;
    }
    Ok(())
}
