//! Packets in the middle of a flow that this edge does not know: adopted where every edge would choose the same backend, and
//! answered with a RST where only the edge that is gone knew.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use edge_common::{
    flow::{TCP, UDP},
    maps::{BackendEntry, ServiceEntry, mode, name, service_flag},
    verdict::Reason,
};
use edge_ctl::reconcile::ports::socket_address;
use edge_tests::datapath::{
    frame::{Frame, flag},
    namespace::in_namespace,
    rig::{
        Action, Entry, FAMILIES, Family, HOOKS, Hook, Key, Outcome, PODS_MAC, Rig, Settings, UPLINK_MAC, key, pod_mac,
    },
};

const PORT: u16 = 40_000;

struct Case {
    rig: Rig,
    hook: Hook,
    family: Family,
    protocol: u8,
    backends: Vec<u32>,
}

impl Case {
    fn vip(&self) -> SocketAddr {
        SocketAddr::new(self.family.vip(), 8443)
    }

    fn client(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.family.client(), port)
    }

    fn forward_key(&self, port: u16) -> Key {
        key(self.client(port), self.vip(), self.protocol)
    }

    fn segment(&self, port: u16, flags: u8) -> Frame {
        Frame::tcp(self.client(port), self.vip(), flags)
    }

    fn send(&mut self, frame: &Frame) -> Result<Outcome> {
        self.rig.run(&frame.bytes(), self.rig.uplink)
    }

    fn from_pod(&mut self, frame: &Frame) -> Result<Outcome> {
        self.rig.run(&frame.bytes(), self.rig.pods)
    }

    /// The backend that a SYN of this client's would go to, asked of a program that forgets the answer.
    fn choice(&mut self, port: u16) -> Result<SocketAddr> {
        let frame = match self.protocol {
            UDP => Frame::udp(self.client(port), self.vip()),
            _ => self.segment(port, flag::SYN),
        };
        self.send(&frame)?;
        let flow = self.flow(name::HALF_OPEN, port).context("no flow")?;
        for key in [flow.key, flow.twin()] {
            self.rig.remove_flow(name::HALF_OPEN, &key)?;
        }
        Ok(socket_address(flow.new_dst, flow.new_dst_port))
    }

    fn flow(&mut self, table: &str, port: u16) -> Option<Entry> {
        let key = self.forward_key(port);
        self.rig.flow(table, &key)
    }

    /// The backends that this client's SYN would not go to, neither at first nor when the first is silent.
    fn nobody_s_choice(&mut self, port: u16) -> Result<SocketAddr> {
        let first = self.choice(port)?;
        let number = |case: &mut Self, address: SocketAddr| -> Result<u32> {
            for number in case.backends.clone() {
                let entry: BackendEntry = case.rig.array(name::BACKENDS)?.get(&number, 0)?;
                if socket_address(entry.address, entry.port) == address {
                    return Ok(number);
                }
            }
            anyhow::bail!("{address} is no backend")
        };
        let first_number = number(self, first)?;
        self.rig.set_eligible(first_number, false)?;
        let second = self.choice(port)?;
        self.rig.set_eligible(first_number, true)?;
        let all = self.backends.len() as u8;
        let family = self.family;
        (0..all)
            .map(|n| SocketAddr::new(family.pod(n), 443))
            .find(|pod| *pod != first && *pod != second)
            .context("three backends at least")
    }
}

fn each(mode: u8, protocol: u8, test: impl Fn(&mut Case) -> Result<()> + Sync) -> Result<()> {
    for hook in HOOKS {
        for family in FAMILIES {
            in_namespace(|| {
                let mut rig = Rig::new(hook, Settings { family, ..Settings::default() })?;
                let backends = rig.service(1, 8443, protocol, mode, 4, 443)?;
                test(&mut Case { rig, hook, family, protocol, backends })
            })
            .with_context(|| format!("{hook:?} {family:?}"))?;
        }
    }
    Ok(())
}

/// The MACs of a packet to the pod of this address.
fn macs_to(pod: SocketAddr, family: Family) -> Option<([u8; 6], [u8; 6])> {
    let n = (0..4).find(|n| family.pod(*n) == pod.ip())?;
    Some((pod_mac(n), PODS_MAC))
}

#[test]
fn in_dnat_mode_a_segment_follows_the_choice_that_every_edge_makes_and_its_second_agreeing_one_promotes() -> Result<()>
{
    each(mode::DNAT, TCP, |case| {
        let backend = case.choice(PORT)?;
        let data = case.segment(PORT, flag::ACK).ack(7000);
        let outcome = case.send(&data)?;
        assert_eq!(outcome.action, Action::Redirect);
        assert_eq!(outcome.frame, data.translated(data.src, backend, macs_to(backend, case.family)));
        assert_eq!(case.rig.reason(1, Reason::MidFlowAdopted)?, 1);
        assert!(case.flow(name::HALF_OPEN, PORT).is_some(), "one segment proves nothing");
        // One that acknowledges something else entirely is a guess.
        case.send(&case.segment(PORT, flag::ACK).ack(7000 + (1 << 21)))?;
        assert!(case.flow(name::HALF_OPEN, PORT).is_some());
        case.send(&case.segment(PORT, flag::ACK).ack(7100 + (1 << 21)))?;
        assert!(case.flow(name::ESTABLISHED, PORT).is_some());
        assert_eq!(case.rig.service_stats(1)?.opened, 1);
        assert_eq!(case.rig.reason(1, Reason::MidFlowAdopted)?, 1);
        Ok(())
    })
}

#[test]
fn flows_seen_from_the_client_s_side_are_promoted_under_a_quota() -> Result<()> {
    each(mode::DNAT, TCP, |case| {
        // As if this CPU, whichever it is, had promoted as many as it may for a minute.
        let map = case.rig.ebpf.map_mut(name::PROMOTION_PACE).context("no PROMOTION_PACE")?;
        let mut pace: aya::maps::PerCpuArray<_, u64> = map.try_into()?;
        let full =
            aya::maps::PerCpuValues::try_from(vec![clock()? + 200_000_000; aya::util::nr_cpus().map_err(|e| e.1)?])?;
        pace.set(0, full, 0)?;
        for _ in 0..2 {
            assert_eq!(case.send(&case.segment(PORT, flag::ACK).ack(7000))?.action, Action::Redirect);
        }
        assert!(case.flow(name::HALF_OPEN, PORT).is_some(), "it is forwarded as a half-open one");
        Ok(())
    })
}

/// CLOCK_MONOTONIC, ns.
fn clock() -> Result<u64> {
    let uptime = std::fs::read_to_string("/proc/uptime")?;
    let seconds: f64 = uptime.split_whitespace().next().context("empty /proc/uptime")?.parse()?;
    Ok((seconds * 1e9) as u64)
}

#[test]
fn a_reply_that_comes_to_an_edge_that_saw_no_request_leaves_in_the_vip_s_name() -> Result<()> {
    each(mode::DNAT, TCP, |case| {
        let backend = case.choice(PORT)?;
        let answer = Frame::tcp(backend, case.client(PORT), flag::SYN | flag::ACK).seq(1000);
        let outcome = case.from_pod(&answer)?;
        assert_eq!(outcome.action, Action::Redirect);
        let vip = case.vip();
        assert_eq!(
            outcome.frame,
            answer.translated(vip, answer.dst, Some((edge_tests::datapath::rig::CLIENT_MAC, UPLINK_MAC)))
        );
        assert_eq!(case.rig.reason(1, Reason::MidFlowAdopted)?, 1);
        // Should the client's packets come here, too, its acknowledgement promotes as in any handshake.
        case.send(&case.segment(PORT, flag::ACK).ack(1001))?;
        assert!(case.flow(name::ESTABLISHED, PORT).is_some());
        Ok(())
    })
}

#[test]
fn an_adopted_reply_s_flow_is_promoted_by_the_backend_s_next_acknowledgement() -> Result<()> {
    each(mode::DNAT, TCP, |case| {
        let backend = case.choice(PORT)?;
        let data = Frame::tcp(backend, case.client(PORT), flag::ACK).seq(5000);
        assert_eq!(case.from_pod(&data)?.action, Action::Redirect);
        assert!(case.flow(name::HALF_OPEN, PORT).is_some());
        assert_eq!(case.from_pod(&data)?.action, Action::Redirect);
        assert!(case.flow(name::ESTABLISHED, PORT).is_some());
        assert_eq!(case.rig.service_stats(1)?.opened, 1, "counted though the client's half was never hit");
        Ok(())
    })
}

#[test]
fn a_reply_of_a_backend_that_nobody_chose_never_leaves() -> Result<()> {
    each(mode::DNAT, TCP, |case| {
        let stranger = case.nobody_s_choice(PORT)?;
        let data = Frame::tcp(stranger, case.client(PORT), flag::ACK);
        assert_eq!(case.from_pod(&data)?.action, Action::Drop);
        assert_eq!(case.rig.reason(1, Reason::ReplyWithoutFlow)?, 1);
        assert!(case.rig.flows(name::HALF_OPEN)?.is_empty());
        Ok(())
    })
}

#[test]
fn a_reply_whose_client_has_a_flow_with_another_backend_is_dropped() -> Result<()> {
    each(mode::DNAT, TCP, |case| {
        let backend = case.choice(PORT)?;
        case.send(&case.segment(PORT, flag::ACK).ack(7000))?;
        let flow = case.flow(name::HALF_OPEN, PORT).context("adopted")?;
        case.rig.remove_flow(name::HALF_OPEN, &flow.twin())?;
        case.rig.change_flow(name::HALF_OPEN, &flow.key, |flow| flow.new_dst_port = 444_u16.to_be())?;
        assert_eq!(case.from_pod(&Frame::tcp(backend, case.client(PORT), flag::ACK))?.action, Action::Drop);
        assert_eq!(case.rig.reason(1, Reason::TwinTaken)?, 1);
        Ok(())
    })
}

#[test]
fn a_datagram_of_a_dnat_backend_without_a_flow_is_mapped_back_too() -> Result<()> {
    each(mode::DNAT, UDP, |case| {
        let backend = case.choice(PORT)?;
        let answer = Frame::udp(backend, case.client(PORT));
        let outcome = case.from_pod(&answer)?;
        let vip = case.vip();
        assert_eq!(
            outcome.frame,
            answer.translated(vip, answer.dst, Some((edge_tests::datapath::rig::CLIENT_MAC, UPLINK_MAC)))
        );
        Ok(())
    })
}

#[test]
fn in_full_nat_mode_a_segment_is_answered_with_the_reset_that_its_sender_takes() -> Result<()> {
    each(mode::FULL_NAT, TCP, |case| {
        for (flags, seq, ack) in
            [(flag::ACK, 11, 22), (flag::FIN | flag::ACK, 11, 22), (0, 11, 22), (flag::SYN | flag::FIN, 11, 22)]
        {
            let segment = case.segment(PORT, flags).seq(seq).ack(ack).payload(vec![7; 100]);
            let outcome = case.send(&segment)?;
            let sent = if case.hook == Hook::Xdp { Action::Transmit } else { Action::Redirect };
            assert_eq!(outcome.action, sent, "{:?}", case.rig.reasons()?);
            let took = 100 + u32::from(flags & flag::SYN != 0) + u32::from(flags & flag::FIN != 0);
            let (flags, seq, ack) =
                if flags & flag::ACK != 0 { (flag::RST, ack, 0) } else { (flag::RST | flag::ACK, 0, seq + took) };
            let mut expected =
                Frame::tcp(segment.dst, segment.src, flags).seq(seq).ack(ack).payload(Vec::new()).bytes();
            (expected[..6]).copy_from_slice(&segment.src_mac);
            (expected[6..12]).copy_from_slice(&segment.dst_mac);
            // Window 0, and of the IP header no ID, and no class or label.
            assert_eq!(comparable(&outcome.frame), comparable(&expected));
            assert!(
                edge_tests::datapath::frame::endpoints_if_valid(&outcome.frame).is_some(),
                "{:02x?}",
                outcome.frame
            );
        }
        assert_eq!(case.rig.reason(1, Reason::MidFlowReset)?, 4);
        assert!(case.rig.flows(name::HALF_OPEN)?.is_empty());
        Ok(())
    })
}

/// MACs, addresses, ports, numbers, flags: what a RST is judged by.
fn comparable(frame: &[u8]) -> Vec<u8> {
    let ip = if frame[12..14] == [0x08, 0x00] { 26..34 } else { 22..54 };
    let l4 = ip.end;
    [&frame[..14], &frame[ip], &frame[l4..l4 + 14]].concat()
}

#[test]
fn a_reset_is_never_answered_and_nor_is_anything_before_the_quiet_time_is_over() -> Result<()> {
    each(mode::FULL_NAT, TCP, |case| {
        for flags in [flag::RST, flag::RST | flag::ACK] {
            assert_eq!(case.send(&case.segment(PORT, flags))?.action, Action::Drop);
        }
        assert_eq!(case.rig.reason(1, Reason::MidFlowSilent)?, 2);
        for from in [0, clock()? + 30_000_000_000] {
            case.rig.array(name::ANSWERS_FROM)?.set(0, from, 0)?;
            assert_eq!(case.send(&case.segment(PORT, flag::ACK))?.action, Action::Drop);
        }
        assert_eq!(case.rig.reason(1, Reason::MidFlowSilent)?, 4);
        case.rig.array(name::ANSWERS_FROM)?.set(0, clock()? - 1_000_000_000, 0)?;
        case.send(&case.segment(PORT, flag::ACK))?;
        assert_eq!(case.rig.reason(1, Reason::MidFlowReset)?, 1);
        Ok(())
    })
}

#[test]
fn resets_are_sent_at_a_bounded_rate() -> Result<()> {
    each(mode::FULL_NAT, TCP, |case| {
        for port in 0..2000 {
            case.send(&case.segment(PORT + port, flag::ACK))?;
        }
        let (sent, held) = (case.rig.reason(1, Reason::MidFlowReset)?, case.rig.reason(1, Reason::MidFlowLimited)?);
        assert_eq!(sent + held, 2000);
        assert!(sent >= 64 && held > 0, "{sent} sent, {held} held back");
        Ok(())
    })
}

#[test]
fn on_a_dedicated_vip_the_kernel_answers() -> Result<()> {
    each(mode::FULL_NAT, TCP, |case| {
        let mut service: ServiceEntry = case.rig.array(name::SERVICES)?.get(&1, 0)?;
        service.flags |= service_flag::DEDICATED;
        case.rig.array(name::SERVICES)?.set(1, service, 0)?;
        let segment = case.segment(PORT, flag::ACK);
        let outcome = case.send(&segment)?;
        assert_eq!((outcome.action, outcome.frame), (Action::Pass, segment.bytes()));
        assert_eq!(case.rig.reason(1, Reason::NoFlow)?, 1);
        Ok(())
    })
}
