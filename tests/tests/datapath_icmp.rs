//! ICMP errors about packets of flows, on both hooks, in both modes and directions: verdict, whole packet, counters, entries.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result};
use edge_common::{
    flow::{TCP, UDP},
    maps::{mode, name},
    verdict::Reason,
};
use edge_ctl::reconcile::ports::socket_address;
use edge_tests::datapath::{
    ends::{TO_CLIENT, backend, cases, client, hooks_and_families, inside_router, outside_router, to_pod, vip},
    frame::{Frame, flag},
    icmp::IcmpError,
    namespace::in_namespace,
    rig::{Action, Entry, Family, HOOKS, Hook, Rig, Settings, key, snat_of},
};

/// Description, type, code, second word.
type About = (&'static str, u8, u8, [u8; 4]);

/// Every message about a packet.
fn messages(family: Family) -> [About; 6] {
    match family {
        Family::V4 => [
            ("network unreachable", 3, 0, [0; 4]),
            ("port unreachable", 3, 3, [0; 4]),
            ("fragmentation needed, MTU 1300", 3, 4, [0, 0, 0x05, 0x14]),
            ("time exceeded in transit", 11, 0, [0; 4]),
            ("parameter problem at byte 20", 12, 0, [20, 0, 0, 0]),
            // RFC 4884: 32 words of quote, then an extension.
            ("time exceeded, with a length", 11, 0, [0, 32, 0, 0]),
        ],
        Family::V6 => [
            ("no route", 1, 0, [0; 4]),
            ("port unreachable", 1, 4, [0; 4]),
            ("packet too big, MTU 1300", 2, 0, [0, 0, 0x05, 0x14]),
            ("hop limit exceeded", 3, 0, [0; 4]),
            ("unknown header at byte 40", 4, 1, [0, 0, 0, 40]),
            // RFC 4884: 16 words of 8 bytes.
            ("hop limit exceeded, with a length", 3, 0, [16, 0, 0, 0]),
        ],
    }
}

/// A message that says that a packet was too big.
fn too_big(family: Family, from: IpAddr, to: IpAddr, quote: &[u8]) -> IcmpError {
    let (_, kind, code, rest) = messages(family)[2];
    IcmpError { rest, ..IcmpError::new(from, to, kind, code, quote) }
}

/// A rig with a service of each protocol, and the client's first packets sent.
fn opened(hook: Hook, mode: u8, family: Family) -> Result<Rig> {
    let mut rig = Rig::new(hook, Settings { family, ..Settings::default() })?;
    for (number, protocol) in [(1, TCP), (2, UDP)] {
        rig.service(number, 8443, protocol, mode, 1, 443)?;
        rig.run(&packet(protocol, client(family), vip(family)).bytes(), rig.uplink)?;
    }
    Ok(rig)
}

/// The source that the backend sees.
fn source(rig: &mut Rig, family: Family, protocol: u8) -> Result<SocketAddr> {
    let key = key(client(family), vip(family), protocol);
    let forward = [name::HALF_OPEN, name::ESTABLISHED].iter().find_map(|table| rig.flow(table, &key));
    Ok(snat_of(&forward.context("no flow")?))
}

fn packet(protocol: u8, src: SocketAddr, dst: SocketAddr) -> Frame {
    let frame = if protocol == TCP { Frame::tcp(src, dst, flag::SYN) } else { Frame::udp(src, dst) };
    Frame { ttl: 61, ..frame.payload(vec![0x5a; 300]) }
}

/// The packet from its IP header on, `l4` bytes of it beyond that header.
fn quoted(frame: &Frame, l4: usize) -> Vec<u8> {
    let start = 14;
    let end = (start + frame.header_len() + l4).min(frame.bytes().len());
    frame.bytes()[start..end].to_vec()
}

/// Minimal, with TCP's checksum cut off, with it, odd, and whole.
const QUOTES: [usize; 6] = [8, 16, 18, 20, 129, 320];

#[test]
fn an_error_about_a_client_s_packet_reaches_the_client_as_if_about_the_vip() -> Result<()> {
    for (hook, mode, family) in cases() {
        in_namespace(|| {
            let mut rig = opened(hook, mode, family)?;
            let flows = rig.flows(name::HALF_OPEN)?;
            let (client, vip, inside) = (client(family), vip(family), inside_router(family));
            let mut told = 0;
            for (protocol, quote) in [TCP, UDP].into_iter().flat_map(|protocol| QUOTES.map(|quote| (protocol, quote))) {
                let source = source(&mut rig, family, protocol)?;
                // From the backend itself, whose address no client may see, and from a router, which traceroute is to show.
                for (from, shown) in [(family.pod(0), vip.ip()), (inside, inside)] {
                    for (message, kind, code, rest) in messages(family) {
                        let about = packet(protocol, source, backend(family));
                        let error =
                            IcmpError { rest, ..IcmpError::new(from, source.ip(), kind, code, &quoted(&about, quote)) };
                        let outcome = rig.run(&error.bytes(), rig.pods)?;
                        let what = format!(
                            "{hook:?} {family:?} mode {mode} protocol {protocol} quote {quote}: {message} {:?}",
                            rig.reasons()?
                        );
                        let about = Frame { src: client, dst: vip, ..about };
                        let expected =
                            IcmpError { src: shown, dst: client.ip(), quote: quoted(&about, quote), ..error }
                                .forwarded(TO_CLIENT);
                        assert_eq!(outcome.action, Action::Redirect, "{what}");
                        assert_eq!(outcome.frame, expected.bytes(), "{what}");
                        told += 1;
                    }
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
    for (hook, mode, family) in cases() {
        in_namespace(|| {
            let mut rig = opened(hook, mode, family)?;
            let flows = rig.flows(name::HALF_OPEN)?;
            let (client, vip, outside) = (client(family), vip(family), outside_router(family));
            for (protocol, quote) in [TCP, UDP].into_iter().flat_map(|protocol| QUOTES.map(|quote| (protocol, quote))) {
                let source = source(&mut rig, family, protocol)?;
                // What a full-nat backend sees is the edge, always.
                let router = if mode == mode::FULL_NAT { family.snat() } else { outside };
                for (from, shown) in [(client.ip(), source.ip()), (outside, router)] {
                    for (message, kind, code, rest) in messages(family) {
                        let about = packet(protocol, vip, client);
                        let error =
                            IcmpError { rest, ..IcmpError::new(from, vip.ip(), kind, code, &quoted(&about, quote)) };
                        let outcome = rig.run(&error.bytes(), rig.uplink)?;
                        let what = format!(
                            "{hook:?} {family:?} mode {mode} protocol {protocol} quote {quote}: {message} {:?}",
                            rig.reasons()?
                        );
                        let about = Frame { src: backend(family), dst: source, ..about };
                        let quote = quoted(&about, quote);
                        let expected =
                            IcmpError { src: shown, dst: family.pod(0), quote, ..error }.forwarded(to_pod(0));
                        assert_eq!(outcome.action, Action::Redirect, "{what}");
                        assert_eq!(outcome.frame, expected.bytes(), "{what}");
                    }
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
    for (hook, family) in hooks_and_families() {
        in_namespace(|| {
            let mut rig = opened(hook, mode::FULL_NAT, family)?;
            let source = source(&mut rig, family, UDP)?;
            let words = |n: usize| if family == Family::V4 { vec![1; n * 4] } else { Vec::new() };
            // Destination options, each padding only (RFC 8200, section 4.2).
            let padding = |n: usize| {
                let header = |n: usize| (60, [vec![0, n as u8, 1, (n * 8 + 4) as u8], vec![0; n * 8 + 4]].concat());
                if family == Family::V6 && n != 0 { vec![header(0), header(n)] } else { Vec::new() }
            };
            for (inner, outer) in [(0, 10), (10, 0), (10, 10), (1, 3)] {
                let about = Frame {
                    options: words(inner),
                    extensions: padding(inner),
                    no_checksum: inner == 10,
                    ..packet(UDP, source, backend(family))
                };
                let (_, kind, code, _) = messages(family)[0];
                let error = IcmpError {
                    options: words(outer),
                    extensions: padding(outer),
                    ..IcmpError::new(inside_router(family), family.snat(), kind, code, &quoted(&about, 8))
                };
                let outcome = rig.run(&error.bytes(), rig.pods)?;
                let about = Frame { src: client(family), dst: vip(family), ..about };
                let expected =
                    IcmpError { dst: family.client(), quote: quoted(&about, 8), ..error }.forwarded(TO_CLIENT);
                assert_eq!(
                    outcome.frame,
                    expected.bytes(),
                    "{hook:?} {family:?} {inner} words inside, {outer} outside"
                );
            }
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn an_error_about_a_first_fragment_of_ipv6_is_translated_and_about_a_later_one_passed() -> Result<()> {
    let family = Family::V6;
    for hook in HOOKS {
        in_namespace(|| {
            let mut rig = opened(hook, mode::FULL_NAT, family)?;
            let source = source(&mut rig, family, UDP)?;
            for (offset, translated) in [(0x0001_u16, true), (0x0009, false), (0x0000, true)] {
                let [high, low] = offset.to_be_bytes();
                let extensions = vec![(44, vec![0, 0, high, low, 1, 2, 3, 4])];
                let about = Frame { extensions, ..packet(UDP, source, backend(family)) };
                let error = too_big(family, inside_router(family), family.snat(), &quoted(&about, 100));
                let outcome = rig.run(&error.bytes(), rig.pods)?;
                let about = Frame { src: client(family), dst: vip(family), ..about };
                let expected = IcmpError { dst: family.client(), quote: quoted(&about, 100), ..error.clone() }
                    .forwarded(TO_CLIENT);
                let expected = if translated { (Action::Redirect, expected) } else { (Action::Pass, error) };
                assert_eq!((outcome.action, outcome.frame), (expected.0, expected.1.bytes()), "{hook:?} {offset}");
            }
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn an_error_follows_its_flow_through_every_table() -> Result<()> {
    for (hook, family) in hooks_and_families() {
        in_namespace(|| {
            let mut rig = opened(hook, mode::FULL_NAT, family)?;
            let source = source(&mut rig, family, TCP)?;
            let (client, vip, backend) = (client(family), vip(family), backend(family));
            let tells = |rig: &mut Rig, table: &str| -> Result<()> {
                assert!(rig.flow(table, &key(client, vip, TCP)).is_some(), "not in {table}");
                let error = too_big(family, backend.ip(), family.snat(), &quoted(&packet(TCP, source, backend), 20));
                let outcome = rig.run(&error.bytes(), rig.pods)?;
                let about = packet(TCP, client, vip);
                let expected = IcmpError { src: vip.ip(), dst: client.ip(), quote: quoted(&about, 20), ..error }
                    .forwarded(TO_CLIENT);
                assert_eq!((outcome.action, outcome.frame), (Action::Redirect, expected.bytes()), "{family:?} {table}");
                Ok(())
            };
            tells(&mut rig, name::HALF_OPEN)?;
            rig.run(&Frame::tcp(backend, source, flag::SYN | flag::ACK).seq(1000).bytes(), rig.pods)?;
            rig.run(&Frame::tcp(client, vip, flag::ACK).ack(1001).bytes(), rig.uplink)?;
            tells(&mut rig, name::ESTABLISHED)?;
            rig.run(&Frame::tcp(client, vip, flag::RST).bytes(), rig.uplink)?;
            tells(&mut rig, name::CLOSING)
        })?;
    }
    Ok(())
}

#[test]
fn a_quote_cut_anywhere_is_translated_from_its_eighth_byte_on_and_else_passed_untouched() -> Result<()> {
    for (hook, family) in hooks_and_families() {
        in_namespace(|| {
            let mut rig = opened(hook, mode::FULL_NAT, family)?;
            let about = packet(TCP, source(&mut rig, family, TCP)?, backend(family));
            let whole = about.bytes()[14..].to_vec();
            let translated = Frame { src: client(family), dst: vip(family), ..about }.bytes()[14..].to_vec();
            let header = family.header_len();
            for len in 0..=header + 40 {
                let error = too_big(family, inside_router(family), family.snat(), &whole[..len]);
                let outcome = rig.run(&error.bytes(), rig.pods)?;
                let what = format!("{hook:?} {family:?} {len}");
                if len < header + 8 {
                    assert_eq!((outcome.action, outcome.frame), (Action::Pass, error.bytes()), "{what}");
                } else {
                    let mut quote = translated[..len].to_vec();
                    if len == header + 17 {
                        // Half of TCP's checksum: nobody can check by it, and nothing says what it becomes.
                        quote[header + 16] = whole[header + 16];
                    }
                    let expected = IcmpError { dst: family.client(), quote, ..error }.forwarded(TO_CLIENT);
                    assert_eq!((outcome.action, outcome.frame), (Action::Redirect, expected.bytes()), "{what}");
                }
            }
            // The frame itself cut at every byte: what its IP header promises is not there.
            let error = too_big(family, inside_router(family), family.snat(), &whole[..header + 8]).bytes();
            for len in 14 + header..error.len() {
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
    for (hook, family) in hooks_and_families() {
        in_namespace(|| {
            let mut rig = opened(hook, mode::FULL_NAT, family)?;
            let source = source(&mut rig, family, TCP)?;
            let about = packet(TCP, source, backend(family));
            let good = too_big(family, inside_router(family), family.snat(), &quoted(&about, 20));
            let quoting = |frame: &Frame| IcmpError { quote: quoted(frame, 20), ..good.clone() };
            let mangled = |at: usize, value: u8| {
                let mut quote = good.quote.clone();
                quote[at] = value;
                IcmpError { quote, ..good.clone() }
            };
            let kind = |kind: u8| IcmpError { kind, ..good.clone() };
            let other_port = SocketAddr::new(source.ip(), source.port() ^ 1);
            let mut untouched = vec![
                ("another port", quoting(&Frame { src: other_port, ..about.clone() })),
                ("another protocol's port", quoting(&packet(UDP, other_port, backend(family)))),
                ("the other version inside", mangled(0, if family == Family::V4 { 0x65 } else { 0x45 })),
                ("GRE inside", mangled(if family == Family::V4 { 9 } else { 6 }, 47)),
                ("to somebody else of us", IcmpError { dst: family.vip(), ..good.clone() }),
            ];
            untouched.extend(match family {
                Family::V4 => vec![
                    ("ping", kind(8)),
                    ("ping's answer", kind(0)),
                    ("redirect", kind(5)),
                    ("a later fragment", quoting(&Frame { fragment: 0x2001, ..about.clone() })),
                    ("a header of 4 words inside", mangled(0, 0x44)),
                    ("a header longer than the quote", mangled(0, 0x4f)),
                    ("itself a fragment", IcmpError { fragment: 0x2000, ..good.clone() }),
                ],
                Family::V6 => vec![
                    ("ping", kind(128)),
                    ("ping's answer", kind(129)),
                    ("a report of listeners", kind(143)),
                    ("router solicitation", kind(133)),
                    ("router advertisement", kind(134)),
                    ("neighbour solicitation", kind(135)),
                    ("neighbour advertisement", kind(136)),
                    ("redirect", kind(137)),
                    ("no type", kind(0)),
                    ("an error of the future", kind(5)),
                    ("an experiment", kind(127)),
                    ("an extension header longer than the quote", mangled(6, 60)),
                    ("routing not done with", {
                        let extensions = vec![(43, vec![0, 0, 0, 1, 0, 0, 0, 0])];
                        quoting(&Frame { extensions, ..about.clone() })
                    }),
                ],
            });
            for (what, error) in untouched {
                let outcome = rig.run(&error.bytes(), rig.pods)?;
                assert_eq!(
                    (outcome.action, outcome.frame),
                    (Action::Pass, error.bytes()),
                    "{hook:?} {family:?} {what}"
                );
            }
            // In IPv4 a fragment of the error is not looked at at all.
            assert_eq!(rig.reasons()?, [("icmp-unmatched", 3)], "{hook:?} {family:?}");
            let outcome = rig.run(&good.bytes(), rig.pods)?;
            assert_eq!(outcome.action, Action::Redirect, "the one they all differ from");
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn nobody_is_told_about_an_error_that_expires_here() -> Result<()> {
    for (hook, family) in hooks_and_families() {
        in_namespace(|| {
            let mut rig = opened(hook, mode::FULL_NAT, family)?;
            let about = packet(TCP, source(&mut rig, family, TCP)?, backend(family));
            let error = too_big(family, inside_router(family), family.snat(), &quoted(&about, 8));
            let error = IcmpError { ttl: 1, ..error };
            assert_eq!(rig.run(&error.bytes(), rig.pods)?.action, Action::Drop);
            assert_eq!(rig.reason(1, Reason::IcmpUndeliverable)?, 1);
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn an_error_from_an_address_of_its_link_alone_reaches_the_client_as_the_vip_s() -> Result<()> {
    let family = Family::V6;
    for hook in HOOKS {
        in_namespace(|| {
            let mut rig = opened(hook, mode::FULL_NAT, family)?;
            let about = packet(TCP, source(&mut rig, family, TCP)?, backend(family));
            let error = too_big(family, "fe80::1".parse()?, family.snat(), &quoted(&about, 20));
            let outcome = rig.run(&error.bytes(), rig.pods)?;
            let about = Frame { src: client(family), dst: vip(family), ..about };
            let quote = quoted(&about, 20);
            let expected = IcmpError { src: family.vip(), dst: family.client(), quote, ..error }.forwarded(TO_CLIENT);
            assert_eq!((outcome.action, outcome.frame), (Action::Redirect, expected.bytes()), "{hook:?}");
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn in_dnat_mode_an_edge_without_the_flow_translates_what_maglev_says_it_is() -> Result<()> {
    for (hook, family) in hooks_and_families() {
        in_namespace(|| {
            let mut rig = Rig::new(hook, Settings { family, ..Settings::default() })?;
            rig.service(1, 8443, TCP, mode::DNAT, 3, 443)?;
            rig.service(2, 8443, UDP, mode::FULL_NAT, 3, 443)?;
            let (vip, outside) = (vip(family), outside_router(family));
            for port in 40_000..40_020 {
                let client = SocketAddr::new(family.client(), port);
                // Which backend it is, the flow's own edge says; the other one then has to find the same.
                rig.run(&Frame::tcp(client, vip, flag::SYN).bytes(), rig.uplink)?;
                let forward = rig.flow(name::HALF_OPEN, &key(client, vip, TCP)).context("no flow")?;
                let chosen = SocketAddr::new(socket_address(forward.new_dst, 0).ip(), 443);
                for key in [forward.key, forward.twin()] {
                    rig.remove_flow(name::HALF_OPEN, &key)?;
                }
                let what = format!("{hook:?} {family:?} {port}");

                let about = packet(TCP, vip, client);
                let error = too_big(family, outside, vip.ip(), &quoted(&about, 8));
                let outcome = rig.run(&error.bytes(), rig.uplink)?;
                let about = Frame { src: chosen, dst: client, ..about };
                let n = (0..3).find(|n| family.pod(*n) == chosen.ip()).context("no such pod")?;
                let expected = IcmpError { dst: chosen.ip(), quote: quoted(&about, 8), ..error }.forwarded(to_pod(n));
                assert_eq!((outcome.action, outcome.frame), (Action::Redirect, expected.bytes()), "{what}");

                for n in 0..3 {
                    let about = packet(TCP, client, SocketAddr::new(family.pod(n), 443));
                    // From a router: neither address outside is one of ours.
                    let error = too_big(family, inside_router(family), client.ip(), &quoted(&about, 20));
                    let outcome = rig.run(&error.bytes(), rig.pods)?;
                    if family.pod(n) == chosen.ip() {
                        let about = Frame { dst: vip, ..about };
                        let expected = IcmpError { quote: quoted(&about, 20), ..error }.forwarded(TO_CLIENT);
                        assert_eq!((outcome.action, outcome.frame), (Action::Redirect, expected.bytes()), "{what}");
                    } else {
                        assert_eq!(outcome.action, Action::Drop, "{what} shows {}", family.pod(n));
                    }
                }
            }
            assert!(rig.flows(name::HALF_OPEN)?.is_empty(), "an error made a flow");
            assert_eq!(rig.reasons()?, [("reply-without-flow", 40), ("icmp-translated", 40)]);
            // In full-nat mode nobody else knows the port.
            let error = too_big(family, outside, vip.ip(), &quoted(&packet(UDP, vip, client(family)), 8));
            let outcome = rig.run(&error.bytes(), rig.uplink)?;
            assert_eq!((outcome.action, outcome.frame), (Action::Pass, error.bytes()));
            Ok(())
        })?;
    }
    Ok(())
}
