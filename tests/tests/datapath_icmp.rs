//! ICMP errors about packets of flows, on both hooks, in both modes and directions: verdict, whole packet, counters, entries.

use std::net::{Ipv4Addr, SocketAddr};

use anyhow::{Context, Result};
use edge_common::{
    flow::{TCP, UDP},
    maps::{mode, name},
    verdict::Reason,
};
use edge_tests::datapath::{
    frame::{Frame, flag},
    icmp::IcmpError,
    namespace::in_namespace,
    rig::{
        Action, CLIENT, CLIENT_MAC, Entry, HOOKS, Hook, PODS_MAC, Rig, SNAT, Settings, UPLINK_MAC, VIP, ipv4, key, pod,
        pod_mac, snat_of,
    },
};

const MODES: [u8; 2] = [mode::FULL_NAT, mode::DNAT];
/// Routers between the edge and the pods, and between the edge and its clients.
const INSIDE_ROUTER: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 200);
const OUTSIDE_ROUTER: Ipv4Addr = Ipv4Addr::new(172, 16, 1, 200);
const TO_CLIENT: ([u8; 6], [u8; 6]) = (CLIENT_MAC, UPLINK_MAC);
const TO_POD: ([u8; 6], [u8; 6]) = (pod_mac_0(), PODS_MAC);

const fn pod_mac_0() -> [u8; 6] {
    [2, 0, 0, 0, 2, 4]
}

fn client() -> SocketAddr {
    SocketAddr::new(CLIENT.into(), 40_000)
}

fn vip() -> SocketAddr {
    SocketAddr::new(VIP.into(), 8443)
}

fn backend() -> SocketAddr {
    SocketAddr::new(pod(0).into(), 443)
}

/// Every message about a packet: description, type, code, second word.
const MESSAGES: [(&str, u8, u8, [u8; 4]); 6] = [
    ("network unreachable", 3, 0, [0; 4]),
    ("port unreachable", 3, 3, [0; 4]),
    ("fragmentation needed, MTU 1300", 3, 4, [0, 0, 0x05, 0x14]),
    ("time exceeded in transit", 11, 0, [0; 4]),
    ("parameter problem at byte 20", 12, 0, [20, 0, 0, 0]),
    // RFC 4884: 32 words of quote, then an extension.
    ("time exceeded, with a length", 11, 0, [0, 32, 0, 0]),
];

/// A rig with one service, and the client's first packet sent: the source that the backend sees.
fn opened(hook: Hook, mode: u8, protocol: u8) -> Result<(Rig, SocketAddr)> {
    let mut rig = Rig::new(hook, Settings::default())?;
    rig.service(1, 8443, protocol, mode, 1, 443)?;
    rig.run(&packet(protocol, client(), vip()).bytes(), rig.uplink)?;
    let forward = rig.flow(name::HALF_OPEN, &key(client(), vip(), protocol)).context("no flow")?;
    Ok((rig, snat_of(&forward)))
}

fn packet(protocol: u8, src: SocketAddr, dst: SocketAddr) -> Frame {
    let frame = if protocol == TCP { Frame::tcp(src, dst, flag::SYN) } else { Frame::udp(src, dst) };
    Frame { ttl: 61, ..frame.payload(vec![0x5a; 300]) }
}

/// The packet from its IP header on, `l4` bytes of it beyond that header.
fn quoted(frame: &Frame, l4: usize) -> Vec<u8> {
    let start = 14;
    let end = (start + 20 + frame.options.len() + l4).min(frame.bytes().len());
    frame.bytes()[start..end].to_vec()
}

/// Minimal, with TCP's checksum cut off, with it, odd, and whole.
const QUOTES: [usize; 6] = [8, 16, 18, 20, 129, 320];

/// Hooks, modes and protocols.
fn cases() -> impl Iterator<Item = (Hook, u8, u8)> {
    let modes = || MODES.into_iter().flat_map(|mode| [TCP, UDP].map(|protocol| (mode, protocol)));
    HOOKS.into_iter().flat_map(move |hook| modes().map(move |(mode, protocol)| (hook, mode, protocol)))
}

#[test]
fn an_error_about_a_client_s_packet_reaches_the_client_as_if_about_the_vip() -> Result<()> {
    for (hook, mode, protocol) in cases() {
        in_namespace(|| {
            let (mut rig, source) = opened(hook, mode, protocol)?;
            let flows = rig.flows(name::HALF_OPEN)?;
            let mut told = 0;
            // From the backend itself, whose address no client may see, and from a router, which traceroute is to show.
            for (from, shown) in [(pod(0), VIP), (INSIDE_ROUTER, INSIDE_ROUTER)] {
                for (quote, (message, kind, code, rest)) in
                    QUOTES.into_iter().flat_map(|quote| MESSAGES.map(|m| (quote, m)))
                {
                    let about = packet(protocol, source, backend());
                    let error =
                        IcmpError { rest, ..IcmpError::new(from, ipv4(source), kind, code, &quoted(&about, quote)) };
                    let outcome = rig.run(&error.bytes(), rig.pods)?;
                    let what = format!(
                        "{hook:?} mode {mode} protocol {protocol} quote {quote}: {message} {:?}",
                        rig.reasons()?
                    );
                    let about = Frame { src: client(), dst: vip(), ..about };
                    let expected = IcmpError { src: shown, dst: CLIENT, quote: quoted(&about, quote), ..error }
                        .forwarded(TO_CLIENT);
                    assert_eq!(outcome.action, Action::Redirect, "{what}");
                    assert_eq!(outcome.frame, expected.bytes(), "{what}");
                    told += 1;
                }
            }
            assert_eq!(rig.reasons()?, [("icmp-translated", told)]);
            unchanged(&flows, &rig.flows(name::HALF_OPEN)?);
            Ok(())
        })?;
    }
    Ok(())
}

/// No error keeps a flow alive, counts as its packet, or changes its state.
fn unchanged(before: &[Entry], after: &[Entry]) {
    assert_eq!(before.len(), after.len());
    for flow in after {
        let Some(then) = before.iter().find(|then| then.key == flow.key) else {
            unreachable!("an error made a flow: {flow:?}");
        };
        assert_eq!(
            (flow.last_seen, flow.packets, flow.state, flow.flags),
            (then.last_seen, then.packets, then.state, then.flags)
        );
    }
}

#[test]
fn an_error_about_a_reply_reaches_the_backend_that_sent_it() -> Result<()> {
    for (hook, mode, protocol) in cases() {
        in_namespace(|| {
            let (mut rig, source) = opened(hook, mode, protocol)?;
            let flows = rig.flows(name::HALF_OPEN)?;
            // What a full-nat backend sees is the edge, always.
            let router = if mode == mode::FULL_NAT { SNAT } else { OUTSIDE_ROUTER };
            for (from, shown) in [(CLIENT, ipv4(source)), (OUTSIDE_ROUTER, router)] {
                for (quote, (message, kind, code, rest)) in
                    QUOTES.into_iter().flat_map(|quote| MESSAGES.map(|m| (quote, m)))
                {
                    let about = packet(protocol, vip(), client());
                    let error = IcmpError { rest, ..IcmpError::new(from, VIP, kind, code, &quoted(&about, quote)) };
                    let outcome = rig.run(&error.bytes(), rig.uplink)?;
                    let what = format!(
                        "{hook:?} mode {mode} protocol {protocol} quote {quote}: {message} {:?}",
                        rig.reasons()?
                    );
                    let about = Frame { src: backend(), dst: source, ..about };
                    let expected =
                        IcmpError { src: shown, dst: pod(0), quote: quoted(&about, quote), ..error }.forwarded(TO_POD);
                    assert_eq!(outcome.action, Action::Redirect, "{what}");
                    assert_eq!(outcome.frame, expected.bytes(), "{what}");
                }
            }
            unchanged(&flows, &rig.flows(name::HALF_OPEN)?);
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn options_inside_and_outside_and_missing_checksums_are_honoured() -> Result<()> {
    for hook in HOOKS {
        in_namespace(|| {
            let (mut rig, source) = opened(hook, mode::FULL_NAT, UDP)?;
            for (inner, outer) in [(0, 10), (10, 0), (10, 10), (1, 3)] {
                let about =
                    Frame { options: vec![1; inner * 4], no_checksum: inner == 10, ..packet(UDP, source, backend()) };
                let error = IcmpError {
                    options: vec![1; outer * 4],
                    ..IcmpError::new(INSIDE_ROUTER, SNAT, 3, 1, &quoted(&about, 8))
                };
                let outcome = rig.run(&error.bytes(), rig.pods)?;
                let about = Frame { src: client(), dst: vip(), ..about };
                let expected = IcmpError { dst: CLIENT, quote: quoted(&about, 8), ..error }.forwarded(TO_CLIENT);
                assert_eq!(outcome.frame, expected.bytes(), "{hook:?} {inner} words inside, {outer} outside");
            }
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn an_error_follows_its_flow_through_every_table() -> Result<()> {
    for hook in HOOKS {
        in_namespace(|| {
            let (mut rig, source) = opened(hook, mode::FULL_NAT, TCP)?;
            let tells = |rig: &mut Rig, table: &str| -> Result<()> {
                assert!(rig.flow(table, &key(client(), vip(), TCP)).is_some(), "not in {table}");
                let error = IcmpError::new(pod(0), SNAT, 3, 3, &quoted(&packet(TCP, source, backend()), 20));
                let outcome = rig.run(&error.bytes(), rig.pods)?;
                let about = packet(TCP, client(), vip());
                let expected =
                    IcmpError { src: VIP, dst: CLIENT, quote: quoted(&about, 20), ..error }.forwarded(TO_CLIENT);
                assert_eq!((outcome.action, outcome.frame), (Action::Redirect, expected.bytes()), "{table}");
                Ok(())
            };
            tells(&mut rig, name::HALF_OPEN)?;
            rig.run(&Frame::tcp(backend(), source, flag::SYN | flag::ACK).seq(1000).bytes(), rig.pods)?;
            rig.run(&Frame::tcp(client(), vip(), flag::ACK).ack(1001).bytes(), rig.uplink)?;
            tells(&mut rig, name::ESTABLISHED)?;
            rig.run(&Frame::tcp(client(), vip(), flag::RST).bytes(), rig.uplink)?;
            tells(&mut rig, name::CLOSING)
        })?;
    }
    Ok(())
}

#[test]
fn a_quote_cut_anywhere_is_translated_from_its_eighth_byte_on_and_else_passed_untouched() -> Result<()> {
    for hook in HOOKS {
        in_namespace(|| {
            let (mut rig, source) = opened(hook, mode::FULL_NAT, TCP)?;
            let about = packet(TCP, source, backend());
            let whole = about.bytes()[14..].to_vec();
            let translated = Frame { src: client(), dst: vip(), ..about }.bytes()[14..].to_vec();
            for len in 0..=60 {
                let error = IcmpError::new(INSIDE_ROUTER, SNAT, 11, 0, &whole[..len]);
                let outcome = rig.run(&error.bytes(), rig.pods)?;
                if len < 28 {
                    assert_eq!((outcome.action, outcome.frame), (Action::Pass, error.bytes()), "{hook:?} {len}");
                } else {
                    let mut quote = translated[..len].to_vec();
                    if len == 37 {
                        // Half of TCP's checksum: nobody can check by it, and nothing says what it becomes.
                        quote[36] = whole[36];
                    }
                    let expected = IcmpError { dst: CLIENT, quote, ..error }.forwarded(TO_CLIENT);
                    assert_eq!((outcome.action, outcome.frame), (Action::Redirect, expected.bytes()), "{hook:?} {len}");
                }
            }
            // The frame itself cut at every byte: what its IP header promises is not there.
            let error = IcmpError::new(INSIDE_ROUTER, SNAT, 11, 0, &whole[..28]).bytes();
            for len in 34..error.len() {
                let outcome = rig.run(&error[..len], rig.pods)?;
                assert_eq!((outcome.action, outcome.frame), (Action::Pass, error[..len].to_vec()), "{hook:?} {len}");
            }
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn what_is_no_error_about_a_flow_passes_untouched() -> Result<()> {
    for hook in HOOKS {
        in_namespace(|| {
            let (mut rig, source) = opened(hook, mode::FULL_NAT, TCP)?;
            let about = packet(TCP, source, backend());
            let good = IcmpError::new(INSIDE_ROUTER, SNAT, 3, 4, &quoted(&about, 20));
            let quoting = |frame: &Frame| IcmpError { quote: quoted(frame, 20), ..good.clone() };
            let mangled = |at: usize, value: u8| {
                let mut quote = good.quote.clone();
                quote[at] = value;
                IcmpError { quote, ..good.clone() }
            };
            let other_port = SocketAddr::new(SNAT.into(), source.port() ^ 1);
            let untouched = [
                ("ping", IcmpError { kind: 8, ..good.clone() }),
                ("ping's answer", IcmpError { kind: 0, ..good.clone() }),
                ("redirect", IcmpError { kind: 5, ..good.clone() }),
                ("another port", quoting(&Frame { src: other_port, ..about.clone() })),
                ("another protocol", quoting(&packet(UDP, source, backend()))),
                ("a later fragment", quoting(&Frame { fragment: 0x2001, ..about.clone() })),
                ("version 6 inside", mangled(0, 0x65)),
                ("a header of 4 words inside", mangled(0, 0x44)),
                ("a header longer than the quote", mangled(0, 0x4f)),
                ("GRE inside", mangled(9, 47)),
                ("to somebody else of us", IcmpError { dst: VIP, ..good.clone() }),
                ("itself a fragment", IcmpError { fragment: 0x2000, ..good.clone() }),
            ];
            for (what, error) in untouched {
                let outcome = rig.run(&error.bytes(), rig.pods)?;
                assert_eq!((outcome.action, outcome.frame), (Action::Pass, error.bytes()), "{hook:?} {what}");
            }
            assert_eq!(rig.reasons()?, [("icmp-unmatched", 3)]);
            let outcome = rig.run(&good.bytes(), rig.pods)?;
            assert_eq!(outcome.action, Action::Redirect, "the one they all differ from");
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn nobody_is_told_about_an_error_that_expires_here() -> Result<()> {
    for hook in HOOKS {
        in_namespace(|| {
            let (mut rig, source) = opened(hook, mode::FULL_NAT, TCP)?;
            let about = packet(TCP, source, backend());
            let error = IcmpError { ttl: 1, ..IcmpError::new(INSIDE_ROUTER, SNAT, 3, 4, &quoted(&about, 8)) };
            assert_eq!(rig.run(&error.bytes(), rig.pods)?.action, Action::Drop);
            assert_eq!(rig.reason(1, Reason::IcmpUndeliverable)?, 1);
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn in_dnat_mode_an_edge_without_the_flow_translates_what_maglev_says_it_is() -> Result<()> {
    for hook in HOOKS {
        in_namespace(|| {
            let mut rig = Rig::new(hook, Settings::default())?;
            rig.service(1, 8443, TCP, mode::DNAT, 3, 443)?;
            rig.service(2, 8443, UDP, mode::FULL_NAT, 3, 443)?;
            for port in 40_000..40_020 {
                let client = SocketAddr::new(CLIENT.into(), port);
                // Which backend it is, the flow's own edge says; the other one then has to find the same.
                rig.run(&Frame::tcp(client, vip(), flag::SYN).bytes(), rig.uplink)?;
                let forward = rig.flow(name::HALF_OPEN, &key(client, vip(), TCP)).context("no flow")?;
                let chosen = ipv4(edge_ctl::reconcile::ports::socket_address(forward.new_dst, 0));
                for key in [forward.key, forward.twin()] {
                    rig.remove_flow(name::HALF_OPEN, &key)?;
                }
                let backend = SocketAddr::new(chosen.into(), 443);

                let about = packet(TCP, vip(), client);
                let error = IcmpError::new(OUTSIDE_ROUTER, VIP, 3, 4, &quoted(&about, 8));
                let outcome = rig.run(&error.bytes(), rig.uplink)?;
                let about = Frame { src: backend, dst: client, ..about };
                let macs = (pod_mac(chosen.octets()[3] - 4), PODS_MAC);
                let expected = IcmpError { dst: chosen, quote: quoted(&about, 8), ..error }.forwarded(macs);
                assert_eq!((outcome.action, outcome.frame), (Action::Redirect, expected.bytes()), "{hook:?} {port}");

                for n in 0..3 {
                    let about = packet(TCP, client, SocketAddr::new(pod(n).into(), 443));
                    // From a router: neither address outside is one of ours.
                    let error = IcmpError::new(INSIDE_ROUTER, CLIENT, 3, 4, &quoted(&about, 20));
                    let outcome = rig.run(&error.bytes(), rig.pods)?;
                    if pod(n) == chosen {
                        let about = Frame { dst: vip(), ..about };
                        let expected = IcmpError { quote: quoted(&about, 20), ..error }.forwarded(TO_CLIENT);
                        assert_eq!(
                            (outcome.action, outcome.frame),
                            (Action::Redirect, expected.bytes()),
                            "{hook:?} {port}"
                        );
                    } else {
                        assert_eq!(outcome.action, Action::Drop, "{hook:?} {port} shows {}", pod(n));
                    }
                }
            }
            assert!(rig.flows(name::HALF_OPEN)?.is_empty(), "an error made a flow");
            assert_eq!(rig.reasons()?, [("reply-without-flow", 40), ("icmp-translated", 40)]);
            // In full-nat mode nobody else knows the port.
            let error = IcmpError::new(OUTSIDE_ROUTER, VIP, 3, 4, &quoted(&packet(UDP, vip(), client()), 8));
            let outcome = rig.run(&error.bytes(), rig.uplink)?;
            assert_eq!((outcome.action, outcome.frame), (Action::Pass, error.bytes()));
            Ok(())
        })?;
    }
    Ok(())
}
