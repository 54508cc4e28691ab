//! Source ranges, rates, quotas and the MSS clamp, on both hooks.

use std::net::{Ipv4Addr, SocketAddr};

use anyhow::{Context, Result};
use aya::maps::lpm_trie::{Key, LpmTrie};
use edge_common::{
    flow::{TCP, UDP},
    maps::{
        RANGE_PREFIX, RangeSource, ServiceEntry, SourceRange, SourceUse, flow_flag, mode, name, range_action,
        service_flag,
    },
    verdict::Reason,
};
use edge_tests::datapath::{
    frame::{Frame, flag},
    namespace::in_namespace,
    rig::{Action, CLIENT, Family, HOOKS, Rig, Settings, VIP, key, pod, snat_of, wire},
};

const ALLOW: u32 = range_action::ALLOW;
const DENY: u32 = range_action::DENY;

fn vip() -> SocketAddr {
    SocketAddr::new(VIP.into(), 8443)
}

fn backend() -> SocketAddr {
    SocketAddr::new(pod(0).into(), 443)
}

#[expect(clippy::expect_used, reason = "an address written in a test")]
fn client(address: &str, port: u16) -> SocketAddr {
    SocketAddr::new(address.parse().expect("an address"), port)
}

fn change(rig: &mut Rig, service: u32, change: impl FnOnce(&mut ServiceEntry)) -> Result<()> {
    let mut entry: ServiceEntry = rig.array(name::SERVICES)?.get(&service, 0)?;
    change(&mut entry);
    Ok(rig.array(name::SERVICES)?.set(service, entry, 0)?)
}

fn range(rig: &mut Rig, service: u32, prefix: &str, action: u32) -> Result<()> {
    let (address, length) = prefix.split_once('/').context("no length")?;
    let address: Ipv4Addr = address.parse()?;
    let map = rig.ebpf.map_mut(name::SOURCE_RANGES).context("no ranges")?;
    let mut map: LpmTrie<_, RangeSource, SourceRange> = LpmTrie::try_from(map)?;
    let key = range_key(service, address, length.parse()?);
    Ok(map.insert(&key, SourceRange { action, ..SourceRange::default() }, 0)?)
}

fn range_key(service: u32, address: Ipv4Addr, length: u32) -> Key<RangeSource> {
    Key::new(RANGE_PREFIX + 96 + length, RangeSource { service, address: wire(address) })
}

fn hits(rig: &mut Rig, service: u32, address: Ipv4Addr, length: u32) -> Result<u64> {
    let map = rig.ebpf.map_mut(name::SOURCE_RANGES).context("no ranges")?;
    let map: LpmTrie<_, RangeSource, SourceRange> = LpmTrie::try_from(map)?;
    // A lookup of a shorter key finds a range that is as long or shorter.
    Ok(map.get(&range_key(service, address, length), 0)?.hits)
}

fn syn(rig: &mut Rig, from: SocketAddr) -> Result<bool> {
    let outcome = rig.run(&Frame::tcp(from, vip(), flag::SYN).bytes(), rig.uplink)?;
    Ok(outcome.action != Action::Drop)
}

/// The program to run, a full-nat TCP service of one pod, and what the test does with it.
fn on_each_hook(settings: &Settings, test: impl Fn(&mut Rig) -> Result<()> + Sync) -> Result<()> {
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
fn the_longest_source_range_decides_and_a_source_in_none_is_refused_where_ranges_are_allowed() -> Result<()> {
    on_each_hook(&Settings::default(), |rig| {
        for (prefix, action) in [("172.16.0.0/16", ALLOW), ("172.16.1.0/24", DENY), ("172.16.1.10/32", ALLOW)] {
            range(rig, 1, prefix, action)?;
        }
        let refuse = service_flag::SOURCE_RANGES | service_flag::SOURCES_REFUSED_BY_DEFAULT;
        change(rig, 1, |service| service.flags = refuse)?;
        for (address, passes) in
            [("172.16.1.10", true), ("172.16.1.11", false), ("172.16.2.1", true), ("192.0.2.1", false)]
        {
            assert_eq!(syn(rig, client(address, 40_000))?, passes, "{address}");
        }
        assert_eq!(rig.reason(1, Reason::SourceDenied)?, 2);
        assert_eq!(rig.flows(name::HALF_OPEN)?.len(), 4, "two flows, and nothing of those refused");
        assert_eq!(hits(rig, 1, Ipv4Addr::new(172, 16, 1, 10), 32)?, 1);
        assert_eq!(hits(rig, 1, Ipv4Addr::new(172, 16, 0, 0), 16)?, 1);

        change(rig, 1, |service| service.flags = service_flag::SOURCE_RANGES)?;
        assert!(syn(rig, client("192.0.2.1", 40_000))?, "only what is denied is refused");
        assert!(!syn(rig, client("172.16.1.11", 40_000))?);
        change(rig, 1, |service| service.flags = 0)?;
        assert!(syn(rig, client("172.16.1.11", 40_000))?, "ranges that are not in force");
        Ok(())
    })
}

#[test]
fn a_range_is_one_service_s_own_and_a_flow_that_exists_outlives_its_denial() -> Result<()> {
    on_each_hook(&Settings::default(), |rig| {
        rig.service(2, 8444, TCP, mode::FULL_NAT, 1, 443)?;
        let source = client("172.16.1.10", 40_000);
        assert!(syn(rig, source)?);
        for service in [1, 2] {
            change(rig, service, |service| service.flags = service_flag::SOURCE_RANGES)?;
        }
        range(rig, 1, "172.16.1.10/32", DENY)?;
        assert!(syn(rig, source)?, "the SYN of a flow that exists");
        assert!(!syn(rig, client("172.16.1.10", 40_001))?);
        let other = SocketAddr::new(VIP.into(), 8444);
        let outcome = rig.run(&Frame::tcp(source, other, flag::SYN).bytes(), rig.uplink)?;
        assert_eq!(outcome.action, Action::Redirect);
        assert_eq!((rig.reason(1, Reason::SourceDenied)?, rig.reason(2, Reason::SourceDenied)?), (1, 0));
        Ok(())
    })
}

#[test]
fn a_v4_mapped_source_of_an_ipv6_packet_is_not_the_ipv4_host_that_a_range_lets_in() -> Result<()> {
    on_each_hook(&Settings::default(), |rig| {
        rig.set_family(Family::V6);
        rig.service(2, 8443, TCP, mode::FULL_NAT, 1, 443)?;
        let refuse = service_flag::SOURCE_RANGES | service_flag::SOURCES_REFUSED_BY_DEFAULT;
        change(rig, 2, |service| service.flags = refuse)?;
        // A service that listens on both families has each range for both.
        range(rig, 2, "172.16.1.0/24", ALLOW)?;
        let vip = SocketAddr::new(Family::V6.vip(), 8443);
        let mapped = SocketAddr::new(CLIENT.to_ipv6_mapped().into(), 40_000);
        for flags in [flag::SYN, flag::ACK] {
            let outcome = rig.run(&Frame::tcp(mapped, vip, flags).bytes(), rig.uplink)?;
            assert_eq!(outcome.action, Action::Drop);
        }
        assert_eq!(rig.reason(2, Reason::Malformed)?, 2);
        assert_eq!(hits(rig, 2, Ipv4Addr::new(172, 16, 1, 0), 24)?, 0);
        assert!(rig.flows(name::HALF_OPEN)?.is_empty());
        Ok(())
    })
}

#[test]
fn a_source_starts_flows_at_its_rate_after_its_burst_and_others_are_not_held_up() -> Result<()> {
    on_each_hook(&Settings::default(), |rig| {
        change(rig, 1, |service| (service.source_flow_rate, service.source_flow_burst) = (1, 5))?;
        let started = (0..20).filter(|n| syn(rig, client("172.16.1.10", 40_000 + n)).expect("run")).count();
        assert!((5..=6).contains(&started), "{started}: the burst, and one if the second has passed");
        assert_eq!(rig.reason(1, Reason::SourceFlowRate)?, 20 - started as u64);
        assert!(syn(rig, client("172.16.1.11", 40_000))?);

        // 2 ms a token: a bucket that was emptied has one again by the time that it is asked.
        change(rig, 1, |service| (service.source_flow_rate, service.source_flow_burst) = (500, 1))?;
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
        let mut port = 41_000;
        while !syn(rig, client("172.16.1.10", port))? {
            assert!(std::time::Instant::now() < deadline, "the bucket does not fill");
            port += 1;
        }
        Ok(())
    })
}

#[test]
fn packets_of_a_flow_count_against_its_source_and_replies_do_not() -> Result<()> {
    for hook in HOOKS {
        in_namespace(|| {
            let mut rig = Rig::new(hook, Settings::default())?;
            rig.service(1, 8443, UDP, mode::FULL_NAT, 1, 443)?;
            change(&mut rig, 1, |service| (service.source_packet_rate, service.source_packet_burst) = (1, 10))?;
            let source = client("172.16.1.10", 40_000);
            let datagram = Frame::udp(source, vip()).bytes();
            rig.run(&datagram, rig.uplink)?;
            let forward = rig.flow(name::HALF_OPEN, &key(source, vip(), UDP)).context("half-open")?;
            assert_ne!(forward.flags & flow_flag::PACKET_LIMIT, 0);
            let reply = Frame::udp(backend(), snat_of(&forward)).bytes();
            for _ in 0..30 {
                assert_ne!(rig.run(&reply, rig.pods)?.action, Action::Drop, "a reply");
            }
            let mut passed = 1;
            for _ in 0..30 {
                passed += u32::from(rig.run(&datagram, rig.uplink)?.action != Action::Drop);
            }
            assert!(rig.flow(name::ESTABLISHED, &key(source, vip(), UDP)).is_some());
            assert!((10..=11).contains(&passed), "{passed}");
            assert_eq!(rig.reason(1, Reason::SourcePacketRate)?, u64::from(31 - passed));
            let other = Frame::udp(client("172.16.1.11", 40_000), vip()).bytes();
            assert_ne!(rig.run(&other, rig.uplink)?.action, Action::Drop);
            Ok(())
        })?;
    }
    Ok(())
}

/// What the one source that there is has used up.
fn used(rig: &mut Rig) -> Result<SourceUse> {
    let map: aya::maps::HashMap<_, edge_common::maps::SourceId, SourceUse> = rig.hash(name::SOURCES)?;
    Ok(map.iter().next().context("no source")??.1)
}

#[test]
fn a_packet_takes_one_token_where_it_ends_a_flow_and_begins_another_and_none_where_it_is_refused() -> Result<()> {
    const SECOND: u64 = 1_000_000_000;
    on_each_hook(&Settings::default(), |rig| {
        change(rig, 1, |service| (service.source_packet_rate, service.source_packet_burst) = (1, 1000))?;
        let source = client("172.16.1.10", 40_000);
        assert!(syn(rig, source)?);
        let before = used(rig)?.packets;
        rig.change_flow(name::HALF_OPEN, &key(source, vip(), TCP), |flow| flow.last_seen = 0)?;
        assert!(syn(rig, source)?, "a SYN long after the first");
        let taken = used(rig)?.packets - before;
        // Less than a second later, even where the bucket was full both times.
        assert!((SECOND..2 * SECOND).contains(&taken), "{taken} ns at one token a second");

        change(rig, 1, |service| {
            (service.source_flow_rate, service.source_flow_burst) = (1, 1000);
            service.source_packet_burst = 1;
        })?;
        let mut refused = 0;
        for port in 41_000..41_010 {
            let before = used(rig)?.flows;
            if !syn(rig, client("172.16.1.10", port))? {
                refused += 1;
                assert_eq!(used(rig)?.flows, before, "a flow that was refused took a token");
            }
        }
        assert_eq!(rig.reason(1, Reason::SourcePacketRate)?, refused);
        assert!(refused >= 8, "{refused} of ten");
        Ok(())
    })
}

#[test]
fn a_source_has_no_more_half_open_flows_than_its_quota_until_one_is_promoted_or_closed() -> Result<()> {
    // A window that does not pass while the test runs.
    let settings = Settings { timeouts: (300, 100_000_000, 60), ..Settings::default() };
    on_each_hook(&settings, |rig| {
        change(rig, 1, |service| service.source_half_open = 3)?;
        let source = |n: u16| client("172.16.1.10", 40_000 + n);
        for n in 0..5 {
            assert_eq!(syn(rig, source(n))?, n < 3, "flow {n}");
        }
        assert_eq!(rig.reason(1, Reason::SourceHalfOpen)?, 2);
        assert!(syn(rig, source(0))?, "a SYN again is no new flow");
        assert!(syn(rig, client("172.16.1.11", 40_000))?);

        let forward = rig.flow(name::HALF_OPEN, &key(source(0), vip(), TCP)).context("half-open")?;
        let syn_ack = Frame::tcp(backend(), snat_of(&forward), flag::SYN | flag::ACK).seq(500);
        rig.run(&syn_ack.bytes(), rig.pods)?;
        rig.run(&Frame::tcp(source(0), vip(), flag::ACK).ack(501).bytes(), rig.uplink)?;
        assert!(rig.flow(name::ESTABLISHED, &key(source(0), vip(), TCP)).is_some());
        assert!(syn(rig, source(5))?, "one was promoted");
        assert!(!syn(rig, source(6))?);

        let forward = rig.flow(name::HALF_OPEN, &key(source(1), vip(), TCP)).context("half-open")?;
        rig.run(&Frame::tcp(backend(), snat_of(&forward), flag::RST).bytes(), rig.pods)?;
        assert!(syn(rig, source(7))?, "the backend has refused one");
        assert!(!syn(rig, source(8))?);
        let uses: Vec<SourceUse> = {
            let map: aya::maps::HashMap<_, edge_common::maps::SourceId, SourceUse> = rig.hash(name::SOURCES)?;
            map.iter().map(|entry| entry.map(|entry| entry.1)).collect::<Result<_, _>>()?
        };
        let mut counts: Vec<u32> = uses.iter().map(|used| used.half_open.now).collect();
        counts.sort_unstable();
        assert_eq!(counts, [1, 3]);
        Ok(())
    })
}

/// The TCP segment of a frame without IP options, its checksum over the pseudo-header checked from scratch (RFC 9293).
fn segment(frame: &[u8]) -> &[u8] {
    let total = usize::from(u16::from_be_bytes([frame[16], frame[17]]));
    let segment = &frame[34..14 + total];
    assert_eq!(sum(&frame[26..34], segment), 0xffff, "the checksum does not fit");
    segment
}

fn sum(addresses: &[u8], segment: &[u8]) -> u16 {
    let length = (segment.len() as u16).to_be_bytes();
    let pseudo = [0, 6, length[0], length[1]];
    let mut sum = 0_u32;
    for part in [addresses, &pseudo, segment] {
        for pair in part.chunks(2) {
            sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
        }
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// A segment with TCP options (a multiple of 4 bytes) before its payload.
fn with_options(frame: &Frame, options: &[u8]) -> Vec<u8> {
    let mut bytes = frame.clone().payload([options, b"data"].concat()).bytes();
    bytes[46] = ((20 + options.len() as u8) / 4) << 4;
    bytes[50..52].fill(0);
    let check = !sum(&bytes[26..34], &bytes[34..]);
    bytes[50..52].copy_from_slice(&check.to_be_bytes());
    bytes
}

#[test]
fn the_mss_of_a_syn_and_of_its_answer_is_lowered_wherever_it_stands_and_never_raised() -> Result<()> {
    // What the options are, and what they become where the service's MSS is 1400 (0x0578).
    let cases: &[(&str, &[u8], &[u8])] = &[
        ("first", &[2, 4, 0x05, 0xb4, 4, 2, 1, 1], &[2, 4, 0x05, 0x78, 4, 2, 1, 1]),
        ("at an odd offset", &[1, 2, 4, 0x23, 0x28, 1, 1, 0], &[1, 2, 4, 0x05, 0x78, 1, 1, 0]),
        ("last of forty bytes", &LAST_BEFORE, &LAST_AFTER),
        ("as large as allowed", &[2, 4, 0x05, 0x78], &[2, 4, 0x05, 0x78]),
        ("smaller", &[2, 4, 0x02, 0x18], &[2, 4, 0x02, 0x18]),
        ("absent", &[4, 2, 1, 1], &[4, 2, 1, 1]),
        ("after the end of the list", &[0, 0, 0, 0, 2, 4, 0x05, 0xb4], &[0, 0, 0, 0, 2, 4, 0x05, 0xb4]),
        ("of the wrong length", &[2, 3, 0x05, 0xb4], &[2, 3, 0x05, 0xb4]),
        ("after an option of length 0", &[8, 0, 1, 1, 2, 4, 0x05, 0xb4], &[8, 0, 1, 1, 2, 4, 0x05, 0xb4]),
        ("after one longer than the header", &[8, 40, 1, 1, 2, 4, 0x05, 0xb4], &[8, 40, 1, 1, 2, 4, 0x05, 0xb4]),
        ("cut off by the end of the header", &[1, 1, 2, 4], &[1, 1, 2, 4]),
    ];
    on_each_hook(&Settings::default(), |rig| {
        change(rig, 1, |service| service.mss = 1400)?;
        for (port, (name, before, after)) in (40_000..).zip(cases) {
            let source = client("172.16.1.10", port);
            let outcome = rig.run(&with_options(&Frame::tcp(source, vip(), flag::SYN), before), rig.uplink)?;
            assert_eq!(outcome.action, Action::Redirect, "{name}");
            let expected = [*after, b"data"].concat();
            assert_eq!(segment(&outcome.frame)[20..], expected, "SYN, MSS {name}");

            let forward = rig.flow(name::HALF_OPEN, &key(source, vip(), TCP)).context("half-open")?;
            let syn_ack = Frame::tcp(backend(), snat_of(&forward), flag::SYN | flag::ACK);
            let outcome = rig.run(&with_options(&syn_ack, before), rig.pods)?;
            assert_eq!(segment(&outcome.frame)[20..], expected, "SYN-ACK, MSS {name}");
            let segment_of_data = with_options(&Frame::tcp(source, vip(), flag::ACK), before);
            let outcome = rig.run(&segment_of_data, rig.uplink)?;
            assert_eq!(segment(&outcome.frame)[20..], [*before, b"data"].concat(), "no SYN, MSS {name}");
        }
        change(rig, 1, |service| service.mss = 0)?;
        let options = [2, 4, 0x05, 0xb4];
        let frame = with_options(&Frame::tcp(client("172.16.1.10", 50_000), vip(), flag::SYN), &options);
        assert_eq!(segment(&rig.run(&frame, rig.uplink)?.frame)[20..24], options);
        Ok(())
    })
}

#[test]
fn a_sender_is_told_about_the_syn_that_it_sent_and_not_about_one_with_a_lower_mss() -> Result<()> {
    on_each_hook(&Settings::default(), |rig| {
        change(rig, 1, |service| service.mss = 1400)?;
        let source = client("172.16.1.10", 40_000);
        let first = Frame { tcp_options: vec![2, 4, 0x05, 0xb4], ..Frame::tcp(source, vip(), flag::SYN) };
        let lowered = rig.run(&first.bytes(), rig.uplink)?;
        assert_eq!(segment(&lowered.frame)[20..24], [2, 4, 0x05, 0x78]);
        // Again, over one router too many.
        let late = Frame { ttl: 1, ..first };
        let told = rig.run(&late.bytes(), rig.uplink)?;
        assert_eq!(rig.reason(1, Reason::TtlExpired)?, 1);
        let quote = &told.frame[14 + 20 + 8..];
        assert_eq!(quote, &late.bytes()[14..14 + quote.len()]);
        assert!(quote.len() >= 20 + 24);
        Ok(())
    })
}

/// Timestamps, SACK, and four-byte options of an experiment (RFC 6994), then the MSS.
const LAST_BEFORE: [u8; 40] = last(0xb4);
const LAST_AFTER: [u8; 40] = last(0x78);

const fn last(low: u8) -> [u8; 40] {
    let mut options = [0; 40];
    let mut at = 0;
    while at < 36 {
        (options[at], options[at + 1], options[at + 2], options[at + 3]) = (254, 4, 0xf9, 0x89);
        at += 4;
    }
    (options[36], options[37], options[38], options[39]) = (2, 4, 0x05, low);
    options
}

#[test]
fn where_all_ports_are_taken_a_stalled_half_open_flow_gives_its_own_up_and_no_other_does() -> Result<()> {
    let settings = Settings { snat_ports: (20_000, 20_003), ..Settings::default() };
    on_each_hook(&settings, |rig| {
        let source = |n: u16| client("172.16.1.10", 40_000 + n);
        let of = |n: u16| key(source(n), vip(), TCP);
        let mut opened = Vec::new();
        // Candidates are drawn, so that a few SYNs may miss the last free port.
        for n in 0..200 {
            if opened.len() < 4 && syn(rig, source(n))? {
                // As if it had just been heard, however long this test takes.
                rig.change_flow(name::HALF_OPEN, &of(n), |flow| flow.last_seen = u64::MAX / 2)?;
                opened.push(n);
            }
        }
        assert_eq!(opened.len(), 4, "all ports are taken");
        assert!(
            (200..250).all(|n| !syn(rig, source(n)).expect("run")),
            "a flow that is answered in time lost its port"
        );
        rig.change_flow(name::HALF_OPEN, &of(opened[2]), |flow| flow.last_seen = 0)?;
        let newcomer = (250..300).find(|n| syn(rig, source(*n)).expect("run")).context("nobody gave a port up")?;
        assert!(rig.flow(name::HALF_OPEN, &of(opened[2])).is_none(), "the stalled flow is still there");
        for n in [opened[0], opened[1], opened[3], newcomer] {
            assert!(rig.flow(name::HALF_OPEN, &of(n)).is_some(), "flow {n}");
        }
        assert_eq!(rig.flows(name::HALF_OPEN)?.len(), 8);
        Ok(())
    })
}
