//! Fragmented packets of flows, on both hooks, in both modes and directions: verdict, whole packet, counters, entries.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use edge_common::{
    flow::UDP,
    maps::{Fragment, FragmentKey, mode, name},
    verdict::Reason,
};
use edge_tests::datapath::{
    frame::{Frame, checksum},
    namespace::in_namespace,
    rig::{Action, CLIENT, CLIENT_MAC, HOOKS, PODS_MAC, Rig, Settings, UPLINK_MAC, VIP, key, pod, pod_mac, snat_of},
};

const MODES: [u8; 2] = [mode::FULL_NAT, mode::DNAT];
const TO_CLIENT: ([u8; 6], [u8; 6]) = (CLIENT_MAC, UPLINK_MAC);

fn client() -> SocketAddr {
    SocketAddr::new(CLIENT.into(), 40_000)
}

fn vip() -> SocketAddr {
    SocketAddr::new(VIP.into(), 8443)
}

fn backend() -> SocketAddr {
    SocketAddr::new(pod(0).into(), 443)
}

/// A datagram of 4,000 bytes.
fn datagram(src: SocketAddr, dst: SocketAddr) -> Frame {
    Frame::udp(src, dst).payload((0..4000).map(|i| (i % 241) as u8).collect())
}

/// Cuts a packet into fragments of at most 1,480 bytes each, under an ID, as RFC 791 says.
fn cut(frame: &[u8], id: u16) -> Vec<Vec<u8>> {
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

fn id_of(frame: &[u8]) -> u16 {
    u16::from_be_bytes([frame[18], frame[19]])
}

#[test]
fn the_rest_follow_the_first_in_any_order_and_the_whole_is_what_an_unfragmented_packet_would_be() -> Result<()> {
    for (hook, mode) in HOOKS.into_iter().flat_map(|hook| MODES.map(|mode| (hook, mode))) {
        in_namespace(|| {
            let mut rig = Rig::new(hook, Settings::default())?;
            rig.service(1, 8443, UDP, mode, 1, 443)?;
            for (id, order) in [(7, [0, 1, 2]), (8, [0, 2, 1]), (9, [0, 1, 2])] {
                let question = datagram(client(), vip());
                let sent = cut(&question.bytes(), id);
                let mut got = Vec::new();
                for n in order {
                    let outcome = rig.run(&sent[n], rig.uplink)?;
                    assert_eq!(outcome.action, Action::Redirect, "{hook:?} mode {mode} {n} {:?}", rig.reasons()?);
                    got.push((n, outcome.frame));
                }
                let forward = rig.flow(name::HALF_OPEN, &key(client(), vip(), UDP));
                let forward = forward.or(rig.flow(name::ESTABLISHED, &key(client(), vip(), UDP))).context("no flow")?;
                let source = snat_of(&forward);
                let new_id = id_of(&got[0].1);
                assert_eq!(new_id == id, mode == mode::DNAT, "{hook:?} mode {mode}: the ID is the client's own");
                let expected = cut(&question.translated(source, backend(), Some((pod_mac(0), PODS_MAC))), new_id);
                for (n, frame) in got {
                    assert_eq!(frame, expected[n], "{hook:?} mode {mode} fragment {n}");
                }
                // Back: always a new ID, since several backends answer as one VIP.
                let answer = datagram(backend(), source);
                let sent = cut(&answer.bytes(), id);
                let got: Vec<Vec<u8>> =
                    order.iter().map(|&n| Ok(rig.run(&sent[n], rig.pods)?.frame)).collect::<Result<_>>()?;
                let expected = cut(&answer.translated(vip(), client(), Some(TO_CLIENT)), id_of(&got[0]));
                for (n, frame) in order.into_iter().zip(got) {
                    assert_eq!(frame, expected[n], "{hook:?} mode {mode} fragment {n} back");
                }
            }
            assert_eq!(rig.reasons()?, []);
            let stats = rig.service_stats(1)?;
            assert_eq!((stats.packets_in, stats.packets_out, stats.opened), (9, 9, 1));
            assert_eq!(stats.bytes_in, 3 * (3 * 20 + 8 + 4000));
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn two_clients_that_chose_one_id_have_two_at_the_backend() -> Result<()> {
    for hook in HOOKS {
        in_namespace(|| {
            let mut rig = Rig::new(hook, Settings::default())?;
            rig.service(1, 8443, UDP, mode::FULL_NAT, 1, 443)?;
            let mut ids = Vec::new();
            for last in 1..=100 {
                let other = SocketAddr::new([172, 16, 1, last].into(), 40_000);
                let sent = cut(&datagram(other, vip()).bytes(), 77);
                let got = [0, 1, 2].map(|n| rig.run(&sent[n], rig.uplink).map(|outcome| id_of(&outcome.frame)));
                let [first, second, third] = got;
                let first = first?;
                assert_eq!((first, first), (second?, third?), "{hook:?}: one packet, several IDs");
                ids.push(first);
            }
            ids.sort_unstable();
            ids.dedup();
            assert_eq!(ids.len(), 100, "{hook:?}");
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn a_later_fragment_without_a_first_one_passes_untouched() -> Result<()> {
    for hook in HOOKS {
        in_namespace(|| {
            let mut rig = Rig::new(hook, Settings::default())?;
            rig.service(1, 8443, UDP, mode::FULL_NAT, 1, 443)?;
            let sent = cut(&datagram(client(), vip()).bytes(), 7);
            let untouched = |rig: &mut Rig, frame: &[u8]| -> Result<()> {
                let outcome = rig.run(frame, rig.uplink)?;
                assert_eq!((outcome.action, outcome.frame), (Action::Pass, frame.to_vec()), "{hook:?}");
                Ok(())
            };
            untouched(&mut rig, &sent[1])?;
            // Another port of ours: the host's own business, first fragment and all.
            let other = cut(&datagram(client(), SocketAddr::new(VIP.into(), 9)).bytes(), 8);
            other.iter().try_for_each(|frame| untouched(&mut rig, frame))?;
            assert_eq!(rig.run(&sent[0], rig.uplink)?.action, Action::Redirect);
            // Another packet of the same sender, and one whose first fragment came too long ago.
            let another = cut(&datagram(client(), vip()).bytes(), 9);
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
fn nobody_is_told_about_a_later_fragment_that_expires() -> Result<()> {
    for hook in HOOKS {
        in_namespace(|| {
            let mut rig = Rig::new(hook, Settings::default())?;
            rig.service(1, 8443, UDP, mode::FULL_NAT, 1, 443)?;
            rig.run(&cut(&datagram(client(), vip()).bytes(), 7)[0], rig.uplink)?;
            let expiring = Frame { ttl: 1, ..datagram(client(), vip()) };
            assert_eq!(rig.run(&cut(&expiring.bytes(), 7)[1], rig.uplink)?.action, Action::Drop);
            assert_eq!(rig.reasons()?, [("icmp-unanswered", 1)]);
            Ok(())
        })?;
    }
    Ok(())
}
