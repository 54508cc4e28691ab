//! A service of every port of its VIP, on both hooks, in both modes, families and directions: verdict, whole packet, entries.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use edge_common::{
    flow::{TCP, UDP},
    maps::{ServiceEntry, mode, name},
    verdict::Reason,
};
use edge_ctl::reconcile::ports::socket_address;
use edge_tests::datapath::{
    ends::{TO_CLIENT, back, cases, hooks_and_families, inside_router, outside_router, to_pod},
    frame::{Frame, flag},
    icmp::IcmpError,
    namespace::in_namespace,
    rig::{Action, Entry, Family, Hook, Rig, Settings, key, snat_of},
};

/// Ports that the tests ask for: the lowest, well-known ones, the highest, and the one that stands for all in maps.
const ASKED: [u16; 5] = [1, 53, 443, 65_535, 0];
const PROTOCOLS: [u8; 2] = [TCP, UDP];
const EVERY: u16 = 0;

fn rig(hook: Hook, family: Family) -> Result<Rig> {
    Rig::new(hook, Settings { family, ..Settings::default() })
}

fn client(family: Family, port: u16) -> SocketAddr {
    SocketAddr::new(family.client(), port)
}

fn vip(family: Family, port: u16) -> SocketAddr {
    SocketAddr::new(family.vip(), port)
}

/// What begins a flow, of either protocol.
fn first(protocol: u8, src: SocketAddr, dst: SocketAddr) -> Frame {
    if protocol == TCP { Frame::tcp(src, dst, flag::SYN) } else { Frame::udp(src, dst) }
}

/// What answers it.
fn answer(protocol: u8, src: SocketAddr, dst: SocketAddr) -> Frame {
    if protocol == TCP { Frame::tcp(src, dst, flag::SYN | flag::ACK).seq(1000) } else { Frame::udp(src, dst) }
}

fn half_open(rig: &mut Rig, frame: &Frame) -> Result<Entry> {
    rig.flow(name::HALF_OPEN, &key(frame.src, frame.dst, frame.protocol)).context("no flow")
}

/// Which pod the flow of this packet goes to, asked of a program that forgets it.
fn choice(rig: &mut Rig, frame: &Frame) -> Result<SocketAddr> {
    rig.run(&frame.bytes(), rig.uplink)?;
    let flow = half_open(rig, frame)?;
    for key in [flow.key, flow.twin()] {
        rig.remove_flow(name::HALF_OPEN, &key)?;
    }
    Ok(socket_address(flow.new_dst, flow.new_dst_port))
}

fn number_of(family: Family, pod: SocketAddr) -> Result<u8> {
    (0..8).find(|n| family.pod(*n) == pod.ip()).with_context(|| format!("{pod} is no pod"))
}

/// A handshake, or two datagrams and an answer, to each port that is asked for, and what comes out on both sides.
fn exchange(rig: &mut Rig, family: Family, mode: u8, protocol: u8, port_at_backend: impl Fn(u16) -> u16) -> Result<()> {
    for asked in ASKED {
        let (client, vip) = (client(family, 40_000), vip(family, asked));
        let pod = SocketAddr::new(family.pod(0), port_at_backend(asked));
        let what = format!("{family:?} mode {mode} protocol {protocol} port {asked}");
        let syn = first(protocol, client, vip);
        let outcome = rig.run(&syn.bytes(), rig.uplink)?;
        assert_eq!(outcome.action, Action::Redirect, "{what} {:?}", rig.reasons()?);
        let flow = half_open(rig, &syn)?;
        let source = snat_of(&flow);
        let expected = if mode == mode::DNAT { client } else { SocketAddr::new(family.snat(), source.port()) };
        assert_eq!(source, expected, "{what}");
        assert_eq!(outcome.frame, syn.translated(source, pod, Some(to_pod(0))), "{what}");

        let reply = answer(protocol, pod, source);
        let outcome = rig.run(&reply.bytes(), rig.pods)?;
        assert_eq!(outcome.action, Action::Redirect, "{what} {:?}", rig.reasons()?);
        assert_eq!(outcome.frame, reply.translated(vip, client, Some(TO_CLIENT)), "{what}");

        let second = if protocol == TCP { Frame::tcp(client, vip, flag::ACK).ack(1001) } else { syn };
        let outcome = rig.run(&second.bytes(), rig.uplink)?;
        assert_eq!(outcome.frame, second.translated(source, pod, Some(to_pod(0))), "{what}");
        assert!(rig.flow(name::ESTABLISHED, &key(client, vip, protocol)).is_some(), "{what}");
        // From the flow's entry and its copy.
        for _ in 0..2 {
            let outcome = rig.run(&second.bytes(), rig.uplink)?;
            assert_eq!(outcome.frame, second.translated(source, pod, Some(to_pod(0))), "{what}");
        }
    }
    assert_eq!(rig.flows(name::ESTABLISHED)?.len(), 2 * ASKED.len());
    assert_eq!(rig.service_stats(1)?.opened, ASKED.len() as u64);
    assert_eq!(rig.reasons()?, []);
    Ok(())
}

#[test]
fn a_client_reaches_the_backend_at_the_port_that_it_asked_the_vip_for() -> Result<()> {
    for ((hook, mode, family), protocol) in cases().flat_map(|case| PROTOCOLS.map(|protocol| (case, protocol))) {
        in_namespace(|| {
            let mut rig = rig(hook, family)?;
            rig.service(1, EVERY, protocol, mode, 1, EVERY)?;
            exchange(&mut rig, family, mode, protocol, |asked| asked)
        })
        .with_context(|| format!("{hook:?}"))?;
    }
    Ok(())
}

#[test]
fn a_backend_with_a_port_of_its_own_gets_them_all_there() -> Result<()> {
    for ((hook, family), protocol) in hooks_and_families().flat_map(|case| PROTOCOLS.map(|protocol| (case, protocol))) {
        in_namespace(|| {
            let mut rig = rig(hook, family)?;
            rig.service(1, EVERY, protocol, mode::FULL_NAT, 1, 8080)?;
            exchange(&mut rig, family, mode::FULL_NAT, protocol, |_| 8080)
        })
        .with_context(|| format!("{hook:?}"))?;
    }
    Ok(())
}

#[test]
fn a_frontend_of_one_port_wins_and_other_protocols_and_frontends_without_every_port_stay_as_they_are() -> Result<()> {
    for (hook, mode, family) in cases() {
        in_namespace(|| {
            let mut rig = rig(hook, family)?;
            rig.service(1, EVERY, TCP, mode, 1, EVERY)?;
            rig.service(2, 443, TCP, mode, 1, 8443)?;
            for (port, (asked, service, at)) in (40_000..).zip([(443, 2, 8443), (444, 1, 444), (8443, 1, 8443)]) {
                let syn = Frame::tcp(client(family, port), vip(family, asked), flag::SYN);
                rig.run(&syn.bytes(), rig.uplink)?;
                let flow = half_open(&mut rig, &syn)?;
                let found = (flow.service, u16::from_be(flow.new_dst_port));
                assert_eq!(found, (service, at), "{hook:?} port {asked}");
            }
            let datagram = Frame::udp(client(family, 40_000), vip(family, 444));
            let outcome = rig.run(&datagram.bytes(), rig.uplink)?;
            assert_eq!((outcome.action, outcome.frame), (Action::Pass, datagram.bytes()), "nobody serves UDP");
            assert_eq!(rig.reason(0, Reason::NoFrontend)?, 1);
            // Where nobody takes every port, port 0 is nobody's.
            rig.service(3, 53, UDP, mode, 1, 5353)?;
            let datagram = Frame::udp(client(family, 40_000), vip(family, 0));
            let outcome = rig.run(&datagram.bytes(), rig.uplink)?;
            assert_eq!((outcome.action, outcome.frame), (Action::Pass, datagram.bytes()));
            let datagram = Frame::udp(SocketAddr::new(family.pod(0), 0), client(family, 40_000));
            let outcome = rig.run(&datagram.bytes(), rig.pods)?;
            assert_eq!((outcome.action, outcome.frame), (Action::Pass, datagram.bytes()), "nor is a pod's");
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn a_dnat_reply_on_an_edge_that_saw_no_request_leaves_in_the_vip_s_name_from_the_port_it_came_from() -> Result<()> {
    for ((hook, family), protocol) in hooks_and_families().flat_map(|case| PROTOCOLS.map(|protocol| (case, protocol))) {
        in_namespace(|| {
            let mut rig = rig(hook, family)?;
            rig.service(1, EVERY, protocol, mode::DNAT, 4, EVERY)?;
            for asked in ASKED {
                let (client, vip) = (client(family, 40_000), vip(family, asked));
                let pod = choice(&mut rig, &first(protocol, client, vip))?;
                assert_eq!(pod.port(), asked);
                let reply = answer(protocol, pod, client);
                let outcome = rig.run(&reply.bytes(), rig.pods)?;
                let what = format!("{hook:?} {family:?} protocol {protocol} port {asked} {:?}", rig.reasons()?);
                assert_eq!(outcome.action, Action::Redirect, "{what}");
                assert_eq!(outcome.frame, reply.translated(vip, client, Some(TO_CLIENT)), "{what}");
                let flow = rig.flow(name::HALF_OPEN, &key(client, vip, protocol)).context("not adopted")?;
                assert_eq!(socket_address(flow.new_dst, flow.new_dst_port), pod, "{what}");
            }
            assert_eq!(rig.reasons()?, [("mid-flow-adopted", ASKED.len() as u64)]);
            Ok(())
        })?;
    }
    Ok(())
}

/// A pod's own connection out of the cluster is no exception: nothing tells it from replies of a connection to its port.
#[test]
fn what_a_dnat_backend_sends_leaves_in_the_vip_s_name_or_not_at_all() -> Result<()> {
    for ((hook, family), protocol) in hooks_and_families().flat_map(|case| PROTOCOLS.map(|protocol| (case, protocol))) {
        in_namespace(|| {
            let mut rig = rig(hook, family)?;
            rig.service(1, EVERY, protocol, mode::DNAT, 8, EVERY)?;
            let host = client(family, 53);
            let mut left = 0;
            for n in 0..8 {
                let own = first(protocol, SocketAddr::new(family.pod(n), 45_678), host);
                let outcome = rig.run(&own.bytes(), rig.pods)?;
                if outcome.action == Action::Redirect {
                    let vip = vip(family, 45_678);
                    assert_eq!(
                        outcome.frame,
                        own.translated(vip, host, Some(TO_CLIENT)),
                        "{hook:?} {family:?} pod {n}"
                    );
                    left += 1;
                } else {
                    assert_eq!(outcome.action, Action::Drop, "{hook:?} {family:?} pod {n} {:?}", rig.reasons()?);
                }
            }
            // The first choice of the tuple, and the second one unless the first has its flow by then.
            assert!(left == 1 || left == 2, "{left} of 8 pods");
            assert_eq!(rig.reason(1, Reason::MidFlowAdopted)?, left);
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn a_dnat_reply_that_no_client_of_the_vip_can_have_asked_for_never_leaves() -> Result<()> {
    for (hook, family) in hooks_and_families() {
        in_namespace(|| {
            let mut rig = rig(hook, family)?;
            rig.service(1, EVERY, TCP, mode::DNAT, 1, EVERY)?;
            let client = client(family, 40_000);
            let reply = |port| Frame::tcp(SocketAddr::new(family.pod(0), port), client, flag::ACK);
            assert_eq!(rig.run(&reply(443).bytes(), rig.pods)?.action, Action::Redirect);
            // From now on port 444 is another frontend's: what pod 0 sends from there answers nobody of the first service.
            rig.service(2, 444, TCP, mode::FULL_NAT, 2, 8443)?;
            assert_eq!(rig.run(&reply(444).bytes(), rig.pods)?.action, Action::Drop);
            assert_eq!(rig.reason(1, Reason::ReplyWithoutFlow)?, 1);
            assert_eq!(rig.flows(name::HALF_OPEN)?.len(), 2, "the flow of port 443 alone");
            // An error about what would have been such a client's packet shows no pod either.
            let about = Frame::tcp(client, SocketAddr::new(family.pod(0), 444), flag::ACK);
            let error = unreachable(family, inside_router(family), client, &about);
            assert_eq!(rig.run(&error.bytes(), rig.pods)?.action, Action::Drop);
            assert_eq!(rig.reason(1, Reason::ReplyWithoutFlow)?, 2);
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn a_segment_in_mid_flow_follows_the_choice_in_dnat_mode_and_is_reset_in_full_nat_mode() -> Result<()> {
    for (hook, mode, family) in cases() {
        in_namespace(|| {
            let mut rig = rig(hook, family)?;
            rig.service(1, EVERY, TCP, mode, 4, EVERY)?;
            let (client, vip) = (client(family, 40_000), vip(family, 8080));
            let pod = choice(&mut rig, &first(TCP, client, vip))?;
            let segment = Frame::tcp(client, vip, flag::ACK).ack(7000);
            let outcome = rig.run(&segment.bytes(), rig.uplink)?;
            if mode == mode::DNAT {
                let macs = to_pod(number_of(family, pod)?);
                assert_eq!((outcome.action, pod.port()), (Action::Redirect, 8080));
                assert_eq!(outcome.frame, segment.translated(client, pod, Some(macs)));
                assert_eq!(rig.reasons()?, [("mid-flow-adopted", 1)]);
            } else {
                assert_eq!(outcome.action, back(hook));
                assert_eq!(rig.reasons()?, [("mid-flow-reset", 1)]);
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// A port that is not reachable, said by `from` to `to` about a packet.
fn unreachable(family: Family, from: std::net::IpAddr, to: SocketAddr, about: &Frame) -> IcmpError {
    let (kind, code) = if family == Family::V4 { (3, 3) } else { (1, 4) };
    IcmpError::new(from, to.ip(), kind, code, &about.bytes()[14..])
}

#[test]
fn an_error_about_a_dnat_flow_that_is_not_known_goes_where_maglev_says() -> Result<()> {
    for (hook, family) in hooks_and_families() {
        in_namespace(|| {
            let mut rig = rig(hook, family)?;
            rig.service(1, EVERY, TCP, mode::DNAT, 3, EVERY)?;
            let (mut translated, mut dropped) = (0, 0);
            for asked in [1, 443, 50_000, 65_535] {
                let (client, vip) = (client(family, 40_000), vip(family, asked));
                let chosen = choice(&mut rig, &first(TCP, client, vip))?;
                let what = format!("{hook:?} {family:?} port {asked}");
                // About what the VIP sent to the client.
                let about = Frame::tcp(vip, client, flag::ACK);
                let error = unreachable(family, outside_router(family), vip, &about);
                let outcome = rig.run(&error.bytes(), rig.uplink)?;
                let quote =
                    unreachable(family, outside_router(family), vip, &Frame { src: chosen, dst: client, ..about });
                let expected = IcmpError { dst: chosen.ip(), quote: quote.quote, ..error };
                let expected = expected.forwarded(to_pod(number_of(family, chosen)?));
                assert_eq!((outcome.action, outcome.frame), (Action::Redirect, expected.bytes()), "{what}");
                translated += 1;
                // About what a pod was to get.
                for n in 0..3 {
                    let pod = SocketAddr::new(family.pod(n), asked);
                    let about = Frame::tcp(client, pod, flag::ACK);
                    let error = unreachable(family, inside_router(family), client, &about);
                    let outcome = rig.run(&error.bytes(), rig.pods)?;
                    if pod == chosen {
                        let quote = unreachable(family, inside_router(family), client, &Frame { dst: vip, ..about });
                        let expected = IcmpError { quote: quote.quote, ..error }.forwarded(TO_CLIENT);
                        assert_eq!((outcome.action, outcome.frame), (Action::Redirect, expected.bytes()), "{what}");
                        translated += 1;
                    } else {
                        assert_eq!(outcome.action, Action::Drop, "{what}");
                        dropped += 1;
                    }
                }
            }
            assert_eq!(rig.reasons()?, [("reply-without-flow", dropped), ("icmp-translated", translated)]);
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn with_affinity_a_client_s_flows_to_all_ports_choose_one_backend_on_every_edge() -> Result<()> {
    for (hook, family) in hooks_and_families() {
        in_namespace(|| {
            let mut rig = rig(hook, family)?;
            rig.service(1, EVERY, TCP, mode::DNAT, 4, EVERY)?;
            let chosen = |rig: &mut Rig| -> Result<std::collections::BTreeSet<_>> {
                let ports = (1..=64_u16).map(|asked| Frame::tcp(client(family, 40_000), vip(family, asked), flag::SYN));
                ports.map(|syn| Ok(choice(rig, &syn)?.ip())).collect()
            };
            assert_eq!(chosen(&mut rig)?.len(), 4, "each port is a tuple of its own");
            let mut entry: ServiceEntry = rig.array(name::SERVICES)?.get(&1, 0)?;
            entry.affinity_timeout = 600;
            rig.array(name::SERVICES)?.set(1, entry, 0)?;
            let home = chosen(&mut rig)?;
            assert_eq!(home.len(), 1);
            // What other edges see of the client's flows they judge alike.
            for asked in [1, 443, 65_535] {
                let segment = Frame::tcp(client(family, 41_000), vip(family, asked), flag::ACK).ack(7000);
                rig.run(&segment.bytes(), rig.uplink)?;
                let flow = half_open(&mut rig, &segment)?;
                assert!(home.contains(&socket_address(flow.new_dst, 0).ip()), "port {asked}");
            }
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn a_fragmented_datagram_follows_its_first_fragment() -> Result<()> {
    for (hook, mode) in
        edge_tests::datapath::rig::HOOKS.into_iter().flat_map(|hook| [(hook, mode::FULL_NAT), (hook, mode::DNAT)])
    {
        in_namespace(|| {
            let family = Family::V4;
            let mut rig = rig(hook, family)?;
            rig.service(1, EVERY, UDP, mode, 1, EVERY)?;
            let datagram = Frame::udp(client(family, 40_000), vip(family, 5000)).payload(vec![7; 16]);
            let whole = datagram.bytes();
            // Ports and checksum, and a part without them.
            for (offset, part) in [(0, &whole[34..50]), (2, &whole[50..])] {
                let more = if offset == 0 { 0x2000_u16 } else { 0 };
                let mut headers = whole[..34].to_vec();
                headers[16..18].copy_from_slice(&(20 + part.len() as u16).to_be_bytes());
                headers[20..22].copy_from_slice(&(more | offset).to_be_bytes());
                headers[24..26].fill(0);
                let check = edge_tests::datapath::frame::checksum(&[&headers[14..34]]);
                headers[24..26].copy_from_slice(&check.to_be_bytes());
                let outcome = rig.run(&[headers, part.to_vec()].concat(), rig.uplink)?;
                assert_eq!(outcome.action, Action::Redirect, "{hook:?} mode {mode} {offset} {:?}", rig.reasons()?);
                if offset == 0 {
                    assert_eq!(outcome.frame[36..38], 5000_u16.to_be_bytes(), "the port that was asked for");
                }
            }
            // Without its first fragment a packet has no port, and none stands for every port.
            let mut stray = whole.clone();
            stray[18..20].copy_from_slice(&99_u16.to_be_bytes());
            stray[20..22].copy_from_slice(&2_u16.to_be_bytes());
            stray[24..26].fill(0);
            let check = edge_tests::datapath::frame::checksum(&[&stray[14..34]]);
            stray[24..26].copy_from_slice(&check.to_be_bytes());
            rig.run(&stray, rig.uplink)?;
            assert_eq!(rig.reason(0, Reason::Fragment)?, 1);
            assert_eq!(rig.flows(name::HALF_OPEN)?.len(), 2);
            Ok(())
        })?;
    }
    Ok(())
}
