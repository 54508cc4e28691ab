//! Fragmented packets of flows, on both hooks, in both modes and directions: verdict, whole packet, counters, entries.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context, Result};
use edge_common::{
    flow::{TCP, UDP},
    maps::{Fragment, FragmentKey, NextHop, mode, name},
    verdict::Reason,
};
use edge_tests::datapath::{
    ends::{TO_CLIENT, back, backend, cases, client, hooks_and_families, to_pod, vip},
    frame::{Frame, checksum, flag},
    namespace::in_namespace,
    rig::{Action, Family, HOOKS, Rig, Settings, key, snat_of},
};

/// Number of IPv6's fragment header.
const FRAGMENT: u8 = 44;

/// A datagram of 4,000 bytes.
fn datagram(src: SocketAddr, dst: SocketAddr) -> Frame {
    Frame::udp(src, dst).payload((0..4000).map(|i| (i % 241) as u8).collect())
}

/// Cuts a packet into three fragments under an ID, as RFC 791 says, or RFC 8200, section 4.5, behind its extension headers.
fn cut(frame: &Frame, id: u32) -> Vec<Vec<u8>> {
    if frame.src.is_ipv4() { cut_ipv4(&frame.bytes(), id as u16) } else { cut_ipv6(frame, id) }
}

fn cut_ipv4(frame: &[u8], id: u16) -> Vec<Vec<u8>> {
    let (headers, body) = frame.split_at(34);
    let pieces: Vec<&[u8]> = body.chunks(1480).collect();
    let last = pieces.len() - 1;
    let one = |(n, piece): (usize, &&[u8])| {
        let mut headers = headers.to_vec();
        let more = if n == last { 0 } else { 0x2000 };
        headers[16..18].copy_from_slice(&(20 + piece.len() as u16).to_be_bytes());
        headers[18..20].copy_from_slice(&id.to_be_bytes());
        headers[20..22].copy_from_slice(&((n * 185) as u16 | more).to_be_bytes());
        headers[24..26].fill(0);
        let check = checksum(&[&headers[14..34]]);
        headers[24..26].copy_from_slice(&check.to_be_bytes());
        [headers, piece.to_vec()].concat()
    };
    pieces.iter().enumerate().map(one).collect()
}

/// What is number 60, destination options, goes into the fragments; other extension headers stay in front.
fn cut_ipv6(frame: &Frame, id: u32) -> Vec<Vec<u8>> {
    let options = |(number, _): &&(u8, Vec<u8>)| *number == 60;
    let inside: usize = frame.extensions.iter().filter(options).map(|(_, bytes)| bytes.len()).sum();
    let front = frame.header_len() - inside;
    let whole = frame.bytes();
    let (headers, body) = whole.split_at(14 + front);
    // Where the number of what is fragmented stands.
    let next_at = if front == 40 { 14 + 6 } else { 14 + 40 };
    let next = headers[next_at];
    let pieces: Vec<&[u8]> = body.chunks(1440).collect();
    let last = pieces.len() - 1;
    let one = |(n, piece): (usize, &&[u8])| {
        let mut headers = headers.to_vec();
        headers[next_at] = FRAGMENT;
        headers[18..20].copy_from_slice(&((front - 40 + 8 + piece.len()) as u16).to_be_bytes());
        let place = (n * 1440) as u16 | u16::from(n != last);
        // Only the first fragment's number of what follows counts.
        headers.extend([if n == 0 { next } else { 59 }, 0]);
        headers.extend(place.to_be_bytes());
        headers.extend(id.to_be_bytes());
        [headers, piece.to_vec()].concat()
    };
    pieces.iter().enumerate().map(one).collect()
}

/// The ID of a fragment without options, or with the extension headers of [`with_extensions`].
fn id_of(frame: &[u8]) -> u32 {
    match frame[12..14] {
        [0x08, 0x00] => u32::from(u16::from_be_bytes([frame[18], frame[19]])),
        _ => {
            let at = if frame[20] == FRAGMENT { 54 } else { 62 };
            u32::from_be_bytes([frame[at + 4], frame[at + 5], frame[at + 6], frame[at + 7]])
        }
    }
}

/// With hop-by-hop options in front of the fragment header and destination options behind it, of padding.
fn with_extensions(frame: Frame) -> Frame {
    let padding = vec![0, 0, 1, 4, 0, 0, 0, 0];
    Frame { extensions: vec![(0, padding.clone()), (60, padding)], ..frame }
}

fn settings(family: Family) -> Settings {
    Settings { family, ..Settings::default() }
}

#[test]
fn the_rest_follow_the_first_in_any_order_and_the_whole_is_what_an_unfragmented_packet_would_be() -> Result<()> {
    for (hook, mode, family) in cases() {
        in_namespace(|| {
            let mut rig = Rig::new(hook, settings(family))?;
            rig.service(1, 8443, UDP, mode, 1, 443)?;
            let (client, vip, backend) = (client(family), vip(family), backend(family));
            let mut bytes = 0;
            for (id, order) in [(7, [0, 1, 2]), (8, [0, 2, 1]), (9, [0, 1, 2])] {
                let with = |frame: Frame| if family == Family::V6 && id == 8 { with_extensions(frame) } else { frame };
                let question = with(datagram(client, vip));
                let sent = cut(&question, id);
                let mut got = Vec::new();
                for n in order {
                    let outcome = rig.run(&sent[n], rig.uplink)?;
                    assert_eq!(outcome.action, Action::Redirect, "{hook:?} mode {mode} {n} {:?}", rig.reasons()?);
                    got.push((n, outcome.frame));
                    bytes += sent[n].len() as u64 - 14;
                }
                let forward = rig.flow(name::HALF_OPEN, &key(client, vip, UDP));
                let forward = forward.or(rig.flow(name::ESTABLISHED, &key(client, vip, UDP))).context("no flow")?;
                let source = snat_of(&forward);
                let new_id = id_of(&got[0].1);
                assert_eq!(new_id == id, mode == mode::DNAT, "{hook:?} mode {mode}: the ID is the client's own");
                let expected = cut(&translated(&question, source, backend, to_pod(0)), new_id);
                for (n, frame) in got {
                    assert_eq!(frame, expected[n], "{hook:?} {family:?} mode {mode} fragment {n}");
                }
                // Back: always a new ID, since several backends answer as one VIP.
                let answer = with(datagram(backend, source));
                let sent = cut(&answer, id);
                let got: Vec<Vec<u8>> =
                    order.iter().map(|&n| Ok(rig.run(&sent[n], rig.pods)?.frame)).collect::<Result<_>>()?;
                assert_ne!(id_of(&got[0]), id);
                let expected = cut(&translated(&answer, vip, client, TO_CLIENT), id_of(&got[0]));
                for (n, frame) in order.into_iter().zip(got) {
                    assert_eq!(frame, expected[n], "{hook:?} {family:?} mode {mode} fragment {n} back");
                }
            }
            assert_eq!(rig.reasons()?, []);
            let stats = rig.service_stats(1)?;
            assert_eq!((stats.packets_in, stats.packets_out, stats.opened), (9, 9, 1));
            assert_eq!((stats.bytes_in, stats.bytes_out), (bytes, bytes));
            Ok(())
        })?;
    }
    Ok(())
}

/// As a router sends the translated packet on.
fn translated(frame: &Frame, src: SocketAddr, dst: SocketAddr, (dst_mac, src_mac): ([u8; 6], [u8; 6])) -> Frame {
    Frame { src, dst, dst_mac, src_mac, ttl: frame.ttl - 1, ..frame.clone() }
}

#[test]
fn two_clients_that_chose_one_id_have_two_at_the_backend() -> Result<()> {
    for (hook, family) in hooks_and_families() {
        in_namespace(|| {
            let mut rig = Rig::new(hook, settings(family))?;
            rig.service(1, 8443, UDP, mode::FULL_NAT, 1, 443)?;
            let mut ids = Vec::new();
            for last in 1..=100 {
                let other = family
                    .of(Ipv4Addr::new(172, 16, 1, last), Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 9, u16::from(last)));
                let sent = cut(&datagram(SocketAddr::new(other, 40_000), vip(family)), 77);
                let got = [0, 1, 2].map(|n| rig.run(&sent[n], rig.uplink).map(|outcome| id_of(&outcome.frame)));
                let [first, second, third] = got;
                let first = first?;
                assert_eq!((first, first), (second?, third?), "{hook:?}: one packet, several IDs");
                ids.push(first);
            }
            ids.sort_unstable();
            ids.dedup();
            assert_eq!(ids.len(), 100, "{hook:?} {family:?}");
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn a_later_fragment_without_a_first_one_passes_untouched() -> Result<()> {
    for (hook, family) in hooks_and_families() {
        in_namespace(|| {
            let mut rig = Rig::new(hook, settings(family))?;
            rig.service(1, 8443, UDP, mode::FULL_NAT, 1, 443)?;
            let (client, vip) = (client(family), vip(family));
            let sent = cut(&datagram(client, vip), 7);
            let untouched = |rig: &mut Rig, frame: &[u8]| -> Result<()> {
                let outcome = rig.run(frame, rig.uplink)?;
                assert_eq!((outcome.action, outcome.frame), (Action::Pass, frame.to_vec()), "{hook:?}");
                Ok(())
            };
            untouched(&mut rig, &sent[1])?;
            // Another port of ours: the host's own business, first fragment and all.
            let other = cut(&datagram(client, SocketAddr::new(vip.ip(), 9)), 8);
            other.iter().try_for_each(|frame| untouched(&mut rig, frame))?;
            assert_eq!(rig.run(&sent[0], rig.uplink)?.action, Action::Redirect);
            // Another packet of the same sender, and one whose first fragment came too long ago.
            let another = cut(&datagram(client, vip), 9);
            untouched(&mut rig, &another[1])?;
            let mut fragments = rig.hash::<FragmentKey, Fragment>(name::FRAGMENTS)?;
            let entries: Vec<_> = fragments.iter().collect::<Result<_, _>>()?;
            assert_eq!(entries.len(), 1, "{hook:?}: {entries:?}");
            let (key, fragment) = entries[0];
            fragments.insert(key, Fragment { seen: fragment.seen - 31_000_000_000, ..fragment }, 0)?;
            untouched(&mut rig, &sent[1])?;
            assert_eq!(rig.reason(0, Reason::Fragment)?, 5);
            fragments = rig.hash(name::FRAGMENTS)?;
            fragments.insert(key, fragment, 0)?;
            assert_eq!(rig.run(&sent[1], rig.uplink)?.action, Action::Redirect);
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn nobody_is_told_about_a_later_fragment_of_ipv4_that_expires() -> Result<()> {
    for hook in HOOKS {
        in_namespace(|| {
            let mut rig = Rig::new(hook, Settings::default())?;
            rig.service(1, 8443, UDP, mode::FULL_NAT, 1, 443)?;
            let sent = datagram(client(Family::V4), vip(Family::V4));
            rig.run(&cut(&sent, 7)[0], rig.uplink)?;
            let expiring = Frame { ttl: 1, ..sent };
            assert_eq!(rig.run(&cut(&expiring, 7)[1], rig.uplink)?.action, Action::Drop);
            assert_eq!(rig.reasons()?, [("icmp-unanswered", 1)]);
            Ok(())
        })?;
    }
    Ok(())
}

/// RFC 4443, 2.4 (e) excepts no later fragments, and nobody but the sender can cut an IPv6 packet.
#[test]
fn the_sender_of_a_later_fragment_of_ipv6_is_told_that_it_expired_or_is_too_big() -> Result<()> {
    for hook in HOOKS {
        in_namespace(|| {
            let family = Family::V6;
            let mut rig = Rig::new(hook, settings(family))?;
            rig.service(1, 8443, UDP, mode::FULL_NAT, 1, 443)?;
            let sent = datagram(client(family), vip(family));
            rig.run(&cut(&sent, 7)[0], rig.uplink)?;
            let expiring = cut(&Frame { ttl: 1, ..sent.clone() }, 7);
            let told = |outcome: &[u8], kind: u8, about: &[u8]| {
                assert_eq!((outcome[20], outcome[54]), (58, kind), "{hook:?} {outcome:02x?}");
                assert_eq!(outcome[62..], about[14..14 + 1232], "{hook:?}: the quote is what was sent");
            };
            for n in [1, 0] {
                let outcome = rig.run(&expiring[n], rig.uplink)?;
                assert_eq!(outcome.action, back(hook), "{hook:?} fragment {n}");
                told(&outcome.frame, 3, &expiring[n]);
            }
            let hop = rig.next_hop(1)?;
            rig.array::<NextHop>(name::NEXT_HOPS)?.set(1, NextHop { mtu: 1300, ..hop }, 0)?;
            for n in [1, 0] {
                let outcome = rig.run(&cut(&sent, 7)[n], rig.uplink)?;
                assert_eq!(outcome.action, back(hook), "{hook:?} fragment {n}");
                told(&outcome.frame, 2, &cut(&sent, 7)[n]);
            }
            assert_eq!(rig.reasons()?, [("ttl-expired", 2), ("too-big", 2)]);
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn a_later_fragment_that_ends_before_its_length_says_is_dropped_and_nobody_is_told() -> Result<()> {
    for (hook, family) in hooks_and_families() {
        in_namespace(|| {
            let mut rig = Rig::new(hook, settings(family))?;
            rig.service(1, 8443, UDP, mode::FULL_NAT, 1, 443)?;
            let pieces = cut(&datagram(client(family), vip(family)), 7);
            rig.run(&pieces[0], rig.uplink)?;
            let whole = rig.run(&pieces[1], rig.uplink)?;
            assert_eq!(whole.action, Action::Redirect, "{hook:?} {family:?}");
            // Longer than the next hop takes, by what it says of itself.
            let mut lying = pieces[1].clone();
            let at = if family == Family::V4 { 16 } else { 18 };
            lying[at..at + 2].copy_from_slice(&9000_u16.to_be_bytes());
            for frame in [lying, pieces[1][..pieces[1].len() - 1].to_vec()] {
                assert_eq!(rig.run(&frame, rig.uplink)?.action, Action::Drop, "{hook:?} {family:?}");
            }
            assert_eq!(rig.reasons()?, [("malformed", 2)], "{hook:?} {family:?}");
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn a_packet_in_one_fragment_is_forwarded_as_a_whole_and_leaves_nothing() -> Result<()> {
    for hook in HOOKS {
        in_namespace(|| {
            let family = Family::V6;
            let mut rig = Rig::new(hook, settings(family))?;
            rig.service(1, 8443, TCP, mode::FULL_NAT, 1, 443)?;
            // RFC 6946: offset 0, nothing follows; reserved bits set, which a receiver ignores.
            let atomic = Frame {
                extensions: vec![(FRAGMENT, vec![0, 0xff, 0, 6, 1, 2, 3, 4])],
                ..Frame::tcp(client(family), vip(family), flag::SYN)
            };
            let outcome = rig.run(&atomic.bytes(), rig.uplink)?;
            let flow = rig.flow(name::HALF_OPEN, &key(client(family), vip(family), TCP)).context("no flow")?;
            let expected = atomic.translated(snat_of(&flow), backend(family), Some(to_pod(0)));
            assert_eq!((outcome.action, outcome.frame), (Action::Redirect, expected), "{hook:?}");
            assert_eq!(rig.hash::<FragmentKey, Fragment>(name::FRAGMENTS)?.iter().count(), 0);
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn first_fragments_of_ipv6_that_are_not_ours_or_lack_headers_go_nowhere_they_should_not() -> Result<()> {
    for hook in HOOKS {
        in_namespace(|| {
            let family = Family::V6;
            let mut rig = Rig::new(hook, settings(family))?;
            rig.service(1, 8443, UDP, mode::FULL_NAT, 1, 443)?;
            let first = cut(&datagram(client(family), vip(family)), 7).swap_remove(0);
            // A long ping, as first fragment: the kernel's.
            let mut ping = first.clone();
            ping[54] = 58;
            let outcome = rig.run(&ping, rig.uplink)?;
            assert_eq!((outcome.action, &outcome.frame), (Action::Pass, &ping), "{hook:?}");
            // The fragment header and 7 bytes of UDP: RFC 7112 forbids to send it.
            let mut cut_short = first[..14 + 40 + 8 + 7].to_vec();
            cut_short[18..20].copy_from_slice(&15_u16.to_be_bytes());
            assert_eq!(rig.run(&cut_short, rig.uplink)?.action, Action::Drop, "{hook:?}");
            // Cut off inside the fragment header.
            let outcome = rig.run(&first[..14 + 40 + 5], rig.uplink)?;
            assert_eq!(outcome.action, Action::Drop, "{hook:?}");
            assert_eq!(rig.reasons()?, [("malformed", 2)]);
            assert!(rig.flows(name::HALF_OPEN)?.is_empty());
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn a_flood_of_fragments_takes_no_established_flow_s_place() -> Result<()> {
    for (hook, family) in hooks_and_families() {
        in_namespace(|| {
            let mut rig = Rig::new(hook, settings(family))?;
            rig.service(1, 8443, UDP, mode::FULL_NAT, 1, 443)?;
            let (client, vip) = (client(family), vip(family));
            let request = Frame::udp(client, vip);
            rig.run(&request.bytes(), rig.uplink)?;
            let source = snat_of(&rig.flow(name::HALF_OPEN, &key(client, vip, UDP)).context("no flow")?);
            rig.run(&Frame::udp(backend(family), source).bytes(), rig.pods)?;
            rig.run(&request.bytes(), rig.uplink)?;
            let established = key(client, vip, UDP);
            assert!(rig.flow(name::ESTABLISHED, &established).is_some(), "{hook:?} {family:?}");
            // More packets than the table of fragments has entries, each with a first fragment and one more of another packet.
            for id in 0..20_000_u32 {
                let other = SocketAddr::new(client.ip(), 41_000 + (id % 5000) as u16);
                let sent = cut(&datagram(other, vip).payload(vec![0; 2000]), id);
                rig.run(&sent[0], rig.uplink)?;
                rig.run(&cut(&datagram(other, vip).payload(vec![0; 2000]), id + 1)[1], rig.uplink)?;
            }
            assert!(rig.flow(name::ESTABLISHED, &established).is_some(), "{hook:?} {family:?}");
            assert_eq!(rig.run(&request.bytes(), rig.uplink)?.action, Action::Redirect);
            assert_eq!(rig.flows(name::ESTABLISHED)?.len(), 2);
            Ok(())
        })?;
    }
    Ok(())
}
