//! The flow cache: whatever happens to a flow, the very next packet follows, on the CPU where it happened and on another one
//! that has a copy of the flow.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, ensure};
use edge_common::{
    flow::{TCP, UDP},
    maps::{Control, NextHop, WAYS, mode, name},
    verdict::Reason,
};
use edge_tests::datapath::{
    cpu,
    frame::{Frame, flag},
    namespace::{in_namespace, ip},
    rig::{Action, Entry, FAMILIES, Family, HOOKS, Hook, Key, Outcome, Rig, Settings, key, pod_mac, snat_of},
};

const HTTPS: u16 = 8443;
const DNS: u16 = 53;

/// A rig with two services of two pods each, and its two CPUs.
struct Lab {
    rig: Rig,
    hook: Hook,
    family: Family,
    /// The CPU where things happen, and another.
    cpus: [u32; 2],
    backends: Vec<u32>,
}

/// An established connection.
struct Connection {
    port: u16,
    forward: Entry,
}

impl Connection {
    fn pod(&self) -> SocketAddr {
        edge_ctl::reconcile::ports::socket_address(self.forward.new_dst, self.forward.new_dst_port)
    }
}

impl Lab {
    fn client(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.family.client(), port)
    }

    fn key(&self, port: u16, protocol: u8) -> Key {
        let service = if protocol == TCP { HTTPS } else { DNS };
        key(self.client(port), SocketAddr::new(self.family.vip(), service), protocol)
    }

    fn frame(&self, port: u16, flags: u8) -> Frame {
        Frame::tcp(self.client(port), SocketAddr::new(self.family.vip(), HTTPS), flags).ack(1001)
    }

    fn client_sends(&mut self, cpu: u32, port: u16, flags: u8) -> Result<Outcome> {
        let (frame, uplink) = (self.frame(port, flags).bytes(), self.rig.uplink);
        cpu::on(cpu, || self.rig.run(&frame, uplink))
    }

    fn pod_sends(&mut self, cpu: u32, connection: &Connection, flags: u8) -> Result<Outcome> {
        let frame = Frame::tcp(connection.pod(), snat_of(&connection.forward), flags).seq(1000).bytes();
        let pods = self.rig.pods;
        cpu::on(cpu, || self.rig.run(&frame, pods))
    }

    fn datagram(&mut self, cpu: u32, port: u16) -> Result<Outcome> {
        let frame = Frame::udp(self.client(port), SocketAddr::new(self.family.vip(), DNS)).bytes();
        let uplink = self.rig.uplink;
        cpu::on(cpu, || self.rig.run(&frame, uplink))
    }

    /// Packets that slots have served so far.
    fn hits(&self) -> u64 {
        self.rig.cache.cpus().iter().map(|cpu| cpu.hits).sum()
    }

    /// A connection whose two directions have good copies on both CPUs.
    fn connect(&mut self, port: u16) -> Result<Connection> {
        let [here, there] = self.cpus;
        ensure!(self.client_sends(here, port, flag::SYN)?.action == Action::Redirect, "{:?}", self.rig.reasons()?);
        let half_open = self.rig.flow(name::HALF_OPEN, &self.key(port, TCP)).context("not half-open")?;
        let half = Connection { port, forward: half_open };
        self.pod_sends(here, &half, flag::SYN | flag::ACK)?;
        self.client_sends(here, port, flag::ACK)?;
        let forward = self.rig.flow(name::ESTABLISHED, &self.key(port, TCP)).context("not established")?;
        let connection = Connection { port, forward };
        // The first payload of a pod is noted by its entry.
        for cpu in [here, there, here, there] {
            self.client_sends(cpu, port, flag::ACK)?;
            self.pod_sends(cpu, &connection, flag::ACK)?;
        }
        let before = self.hits();
        for cpu in self.cpus {
            ensure!(self.client_sends(cpu, port, flag::ACK)?.action == Action::Redirect, "not sent");
            ensure!(self.pod_sends(cpu, &connection, flag::ACK)?.action == Action::Redirect, "not sent");
        }
        ensure!(self.hits() == before + 4, "{} of 4 packets met a slot", self.hits() - before);
        Ok(connection)
    }

    /// Removes an established entry as the daemon does: out of the table, then its generation. Slots stay what they are.
    fn end(&mut self, key: &Key) -> Result<()> {
        use edge_common::address::unmapped;
        use edge_common::flow::{FlowKey, FlowKeyV4};
        use edge_common::maps::{FlowV4, FlowV6};
        match (unmapped(&key.src), unmapped(&key.dst)) {
            (Some(src), Some(dst)) => {
                let key: FlowKeyV4 = FlowKey::new(src, dst, key.src_port, key.dst_port, key.protocol);
                self.rig.hash::<FlowKeyV4, FlowV4>(name::ESTABLISHED)?.remove(&key)?;
                self.rig.cache.changed(&key);
            }
            _ => {
                self.rig.hash::<Key, FlowV6>(name::ESTABLISHED_V6)?.remove(key)?;
                self.rig.cache.changed(key);
            }
        }
        Ok(())
    }

    fn change_hop(&mut self, connection: &Connection, change: impl Fn(&mut NextHop)) -> Result<()> {
        let forward = self.rig.flow(name::ESTABLISHED, &connection.forward.key).context("established")?;
        let mut hop: NextHop = self.rig.next_hop(forward.next_hop)?;
        change(&mut hop);
        Ok(self.rig.array(name::NEXT_HOPS)?.set(forward.next_hop, hop, 0)?)
    }
}

/// Runs a test at both hooks with both families, each time with a flow for each CPU that the next packet comes to.
fn each(settings: &Settings, test: impl Fn(&mut Lab, u16, u32) -> Result<()> + Sync) -> Result<()> {
    for hook in HOOKS {
        for family in FAMILIES {
            in_namespace(|| {
                let mut rig = Rig::new(hook, Settings { family, ..settings.clone() })?;
                let mut backends = rig.service(1, HTTPS, TCP, mode::FULL_NAT, 2, 443)?;
                backends.extend(rig.service(2, DNS, UDP, mode::FULL_NAT, 2, 53)?);
                let cpus = cpu::allowed()?;
                let here = *cpus.first().context("no CPU")?;
                let there = *cpus.last().context("no CPU")?;
                let mut lab = Lab { rig, hook, family, cpus: [here, there], backends };
                for (port, next) in [(40_000, here), (40_100, there)] {
                    test(&mut lab, port, next)
                        .with_context(|| format!("{hook:?}, {family:?}, next packet on CPU {next}"))?;
                }
                Ok(())
            })?;
        }
    }
    Ok(())
}

#[test]
fn a_closed_flow_is_closed_for_the_next_packet_on_every_cpu() -> Result<()> {
    each(&Settings::default(), |lab, port, next| {
        let here = lab.cpus[0];
        for (number, by) in ["client's RST", "pod's RST", "both FINs"].into_iter().enumerate() {
            let port = port + number as u16;
            let connection = lab.connect(port)?;
            match number {
                0 => drop(lab.client_sends(here, port, flag::RST)?),
                1 => drop(lab.pod_sends(here, &connection, flag::RST)?),
                _ => {
                    lab.client_sends(here, port, flag::FIN | flag::ACK)?;
                    lab.pod_sends(here, &connection, flag::FIN | flag::ACK)?;
                }
            }
            ensure!(lab.rig.flow(name::ESTABLISHED, &connection.forward.key).is_none(), "{by}: still established");
            let closing = lab.rig.flow(name::CLOSING, &connection.forward.key).context("closing")?;
            let resting = lab.rig.flow(name::CLOSING, &connection.forward.twin()).context("closing twin")?;
            let before = lab.hits();
            // The side that a RST claims to be from restores the flow by going on, the other does not.
            if number != 0 {
                lab.client_sends(next, port, flag::ACK)?;
                let after = lab.rig.flow(name::CLOSING, &connection.forward.key).context("closing")?;
                ensure!(after.packets == closing.packets + 1, "{by}: the closing entry was not asked");
            }
            if number != 1 {
                lab.pod_sends(next, &connection, flag::ACK)?;
                let after = lab.rig.flow(name::CLOSING, &connection.forward.twin()).context("closing")?;
                ensure!(after.packets == resting.packets + 1, "{by}: the closing twin was not asked");
            }
            ensure!(lab.hits() == before, "{by}: a slot served a closed flow");
        }
        Ok(())
    })
}

#[test]
fn what_slots_have_counted_goes_along_when_their_cpu_closes_the_flow() -> Result<()> {
    each(&Settings::default(), |lab, port, _| {
        let connection = lab.connect(port)?;
        let key = connection.forward.key;
        let counted = lab.rig.flow(name::ESTABLISHED, &key).context("established")?;
        for _ in 0..5 {
            lab.client_sends(lab.cpus[0], port, flag::ACK)?;
            lab.pod_sends(lab.cpus[0], &connection, flag::ACK)?;
        }
        let after = lab.rig.flow(name::ESTABLISHED, &key).context("established")?;
        ensure!(after.packets == counted.packets + 5 && after.bytes > counted.bytes, "{after:?}");
        let other = lab.rig.flow(name::ESTABLISHED, &connection.forward.twin()).context("twin")?;
        lab.client_sends(lab.cpus[0], port, flag::RST)?;
        let closing = lab.rig.flow(name::CLOSING, &key).context("closing")?;
        let twin = lab.rig.flow(name::CLOSING, &connection.forward.twin()).context("closing twin")?;
        // The other CPU's share is in its slots, where the daemon finds it when it writes the record.
        ensure!(closing.packets + 4 > after.packets && twin.packets + 4 >= other.packets, "{closing:?} {twin:?}");
        Ok(())
    })
}

#[test]
fn a_flow_that_the_daemon_ended_is_gone_for_the_next_packet_on_every_cpu() -> Result<()> {
    each(&Settings::default(), |lab, port, next| {
        let connection = lab.connect(port)?;
        lab.end(&connection.forward.key)?;
        lab.end(&connection.forward.twin())?;
        let told = |lab: &mut Lab| {
            let reasons = lab.rig.reasons()?;
            anyhow::Ok(reasons.iter().find(|(reason, _)| *reason == "mid-flow-reset").map_or(0, |(_, count)| *count))
        };
        let before = told(lab)?;
        let outcome = lab.client_sends(next, port, flag::ACK)?;
        ensure!(lab.rig.flow(name::ESTABLISHED, &connection.forward.key).is_none(), "there again");
        ensure!(told(lab)? == before + 1, "the client was not told by a RST: {outcome:?}, {:?}", lab.rig.reasons()?);
        ensure!(lab.pod_sends(next, &connection, flag::ACK)?.action == Action::Pass, "a reply of a flow that is gone");
        Ok(())
    })
}

#[test]
fn a_flow_of_a_backend_that_went_down_is_selected_anew_by_the_next_datagram_on_every_cpu() -> Result<()> {
    each(&Settings::default(), |lab, port, next| {
        let here = lab.cpus[0];
        lab.datagram(here, port)?;
        let key = lab.key(port, UDP);
        let half_open = lab.rig.flow(name::HALF_OPEN, &key).context("half-open")?;
        let source = snat_of(&half_open);
        let pod = edge_ctl::reconcile::ports::socket_address(half_open.new_dst, half_open.new_dst_port);
        let (answer, pods) = (Frame::udp(pod, source).bytes(), lab.rig.pods);
        cpu::on(here, || lab.rig.run(&answer, pods))?;
        for cpu in [lab.cpus[0], lab.cpus[1], lab.cpus[0], lab.cpus[1]] {
            lab.datagram(cpu, port)?;
        }
        let before = lab.hits();
        lab.datagram(next, port)?;
        ensure!(lab.hits() == before + 1, "no slot");
        let flow = lab.rig.flow(name::ESTABLISHED, &key).context("established")?;
        lab.rig.set_eligible(flow.backend, false)?;
        lab.end(&flow.key)?;
        lab.end(&flow.twin())?;
        lab.datagram(next, port)?;
        let fresh = lab.rig.flow(name::HALF_OPEN, &key).context("a new flow")?;
        ensure!(fresh.backend != flow.backend && lab.backends.contains(&fresh.backend), "{fresh:?}");
        lab.rig.set_eligible(flow.backend, true)
    })
}

#[test]
fn a_neighbours_new_mac_is_in_the_next_packet_on_every_cpu() -> Result<()> {
    each(&Settings::default(), |lab, port, next| {
        let connection = lab.connect(port)?;
        let mac = [2, 0xaa, 0xbb, 0xcc, 0xdd, port as u8];
        lab.change_hop(&connection, |hop| hop.dst_mac = mac)?;
        let before = lab.hits();
        let outcome = lab.client_sends(next, port, flag::ACK)?;
        ensure!(outcome.frame[..6] == mac, "{:x?}", &outcome.frame[..6]);
        ensure!(lab.hits() == before + 1, "the slot is still good");
        Ok(())
    })
}

#[test]
fn a_smaller_mtu_holds_for_the_next_packet_on_every_cpu() -> Result<()> {
    each(&Settings::default(), |lab, port, next| {
        let connection = lab.connect(port)?;
        let forward = lab.rig.flow(name::ESTABLISHED, &connection.forward.key).context("established")?;
        let hop = lab.rig.next_hop(forward.next_hop)?;
        lab.change_hop(&connection, |hop| hop.mtu = 45)?;
        let (before, hits) = (lab.rig.reason(1, Reason::TooBig)?, lab.hits());
        lab.client_sends(next, port, flag::ACK)?;
        ensure!(lab.rig.reason(1, Reason::TooBig)? == before + 1, "{:?}", lab.rig.reasons()?);
        lab.change_hop(&connection, |changed| changed.mtu = hop.mtu)?;
        lab.client_sends(next, port, flag::ACK)?;
        ensure!(lab.hits() > hits, "the slot is good again");
        Ok(())
    })
}

#[test]
fn a_moved_route_and_one_that_is_gone_hold_for_the_next_packet_on_every_cpu() -> Result<()> {
    each(&Settings::default(), |lab, port, next| {
        let connection = lab.connect(port)?;
        let (pod, bits) = match connection.pod().ip() {
            IpAddr::V4(pod) => (pod.to_string(), 32),
            IpAddr::V6(pod) => (pod.to_string(), 128),
        };
        let gateway = lab.family.pod(9);
        ip(&format!("route add {pod}/{bits} via {gateway} dev pods"))?;
        lab.rig.move_routes()?;
        let outcome = lab.client_sends(next, port, flag::ACK)?;
        ensure!(outcome.frame[..6] == pod_mac(9), "{:x?} is not the new gateway's", &outcome.frame[..6]);
        // And again by the slot, on both.
        for cpu in [lab.cpus[0], lab.cpus[1], next] {
            let outcome = lab.client_sends(cpu, port, flag::ACK)?;
            ensure!(outcome.frame[..6] == pod_mac(9), "{:x?} on CPU {cpu}", &outcome.frame[..6]);
        }
        ip(&format!("route replace unreachable {pod}/{bits}"))?;
        // IPv6 adds beside the other one.
        let _ = ip(&format!("route del {pod}/{bits} via {gateway} dev pods"));
        lab.rig.move_routes()?;
        let before = lab.rig.reason(1, Reason::NoRoute)?;
        ensure!(lab.client_sends(next, port, flag::ACK)?.action == Action::Drop, "{:?}", lab.rig.reasons()?);
        ensure!(lab.rig.reason(1, Reason::NoRoute)? == before + 1);
        ip(&format!("route del unreachable {pod}/{bits}"))?;
        lab.rig.move_routes()?;
        ensure!(lab.client_sends(next, port, flag::ACK)?.action == Action::Redirect);
        Ok(())
    })
}

#[test]
fn a_lost_twin_is_missed_by_the_next_packet_and_rebuilt_by_the_next_touch_on_every_cpu() -> Result<()> {
    each(&Settings::default(), |lab, port, next| {
        let connection = lab.connect(port)?;
        lab.end(&connection.forward.twin())?;
        ensure!(
            lab.pod_sends(next, &connection, flag::ACK)?.action == Action::Pass,
            "served by a slot of a lost entry"
        );
        let touch_now = |flow: &mut Entry| flow.touch_due = flow.touch_due.wrapping_sub(20_000);
        lab.rig.change_flow(name::ESTABLISHED, &connection.forward.key, touch_now)?;
        ensure!(lab.client_sends(next, port, flag::ACK)?.action == Action::Redirect);
        ensure!(lab.pod_sends(next, &connection, flag::ACK)?.action == Action::Redirect, "not rebuilt");
        Ok(())
    })
}

#[test]
fn a_capture_sees_packets_of_flows_that_have_slots() -> Result<()> {
    each(&Settings::default(), |lab, port, next| {
        lab.connect(port)?;
        let mut control: Control = lab.rig.array(name::CONTROL)?.get(&0, 0)?;
        let (before, quiet) = (lab.hits(), control);
        control.capture_until = 1;
        lab.rig.array(name::CONTROL)?.set(0, control, 0)?;
        ensure!(lab.client_sends(next, port, flag::ACK)?.action == Action::Redirect);
        ensure!(lab.rig.cache.cpus().iter().map(|cpu| cpu.misses).sum::<u64>() > 0 && lab.hits() <= before + 1);
        Ok(lab.rig.array(name::CONTROL)?.set(0, quiet, 0)?)
    })
}

#[test]
fn flows_that_displace_each_other_keep_their_own_translation_and_lose_no_count() -> Result<()> {
    // One set for each CPU, of fewer slots than there are flows.
    each(&Settings { cache: 2, ..Settings::default() }, |lab, port, next| {
        let mut connections = Vec::new();
        for number in 0..WAYS as u16 + 2 {
            let port = port + number;
            lab.client_sends(lab.cpus[0], port, flag::SYN)?;
            let forward = lab.rig.flow(name::HALF_OPEN, &lab.key(port, TCP)).context("half-open")?;
            let half = Connection { port, forward };
            lab.pod_sends(lab.cpus[0], &half, flag::SYN | flag::ACK)?;
            lab.client_sends(lab.cpus[0], port, flag::ACK)?;
            let forward = lab.rig.flow(name::ESTABLISHED, &lab.key(port, TCP)).context("established")?;
            connections.push(Connection { port, forward });
        }
        let displaced = |lab: &Lab| lab.rig.cache.cpus().iter().map(|cpu| cpu.displaced).sum::<u64>();
        let before = displaced(lab);
        for round in 0..20 {
            for connection in &connections {
                // Twice each, so that the second meets a slot that has something to tell when it is displaced.
                for cpu in [next, next, lab.cpus[round % 2]] {
                    let outcome = lab.client_sends(cpu, connection.port, flag::ACK)?;
                    let source = snat_of(&connection.forward);
                    let sent = Frame::tcp(source, connection.pod(), flag::ACK).ack(1001);
                    let expected = Frame { dst_mac: [0; 6], src_mac: [0; 6], ttl: 63, ..sent }.bytes();
                    ensure!(outcome.action == Action::Redirect && outcome.frame[12..] == expected[12..], "{outcome:?}");
                }
            }
        }
        ensure!(displaced(lab) > before + 20, "{} displaced", displaced(lab) - before);
        for connection in &connections {
            let flow = lab.rig.flow(name::ESTABLISHED, &connection.forward.key).context("established")?;
            ensure!(flow.packets == connection.forward.packets + 60, "{} of 60 on {:?}", flow.packets, lab.hook);
        }
        Ok(())
    })
}

#[test]
fn with_a_full_table_a_flow_that_did_not_fit_has_no_slot_and_the_others_keep_theirs() -> Result<()> {
    each(&Settings { established: 2, ..Settings::default() }, |lab, port, next| {
        let connection = lab.connect(port)?;
        let refused = port + 1;
        lab.client_sends(next, refused, flag::SYN)?;
        let forward = lab.rig.flow(name::HALF_OPEN, &lab.key(refused, TCP)).context("half-open")?;
        let half = Connection { port: refused, forward };
        lab.pod_sends(next, &half, flag::SYN | flag::ACK)?;
        let before = (lab.rig.reason(1, Reason::EstablishedFull)?, lab.hits());
        for _ in 0..3 {
            lab.client_sends(next, refused, flag::ACK)?;
        }
        ensure!(lab.rig.reason(1, Reason::EstablishedFull)? == before.0 + 3 && lab.hits() == before.1);
        ensure!(lab.client_sends(next, port, flag::ACK)?.action == Action::Redirect);
        ensure!(lab.hits() == before.1 + 1, "the flow that was there");
        lab.client_sends(next, port, flag::RST)?;
        let _ = connection;
        Ok(())
    })
}

#[test]
fn a_flow_that_moves_between_cpus_is_counted_once_for_each_packet() -> Result<()> {
    each(&Settings::default(), |lab, port, next| {
        let connection = lab.connect(port)?;
        let before = lab.rig.flow(name::ESTABLISHED, &connection.forward.key).context("established")?;
        let stats = lab.rig.service_stats(1)?;
        for round in 0..30 {
            let cpu = if round % 3 == 0 { lab.cpus[round % 2] } else { next };
            lab.client_sends(cpu, port, flag::ACK)?;
        }
        let after = lab.rig.flow(name::ESTABLISHED, &connection.forward.key).context("established")?;
        ensure!(after.packets == before.packets + 30, "{} to {}", before.packets, after.packets);
        ensure!(lab.rig.service_stats(1)?.packets_in == stats.packets_in + 30);
        ensure!(after.last_seen >= before.last_seen);
        Ok(())
    })
}

#[test]
fn fewer_cpus_that_receive_packets_have_larger_parts_of_the_same_memory() -> Result<()> {
    each(&Settings { cache: 64, ..Settings::default() }, |lab, port, _| {
        let cpus = cpu::allowed()?;
        let bytes = |lab: &Lab| {
            lab.rig.cache.cpus().iter().map(|cpu| cpu.bytes).filter(|bytes| *bytes != 0).collect::<Vec<_>>()
        };
        lab.rig.cache.split(&cpus)?;
        let shared = bytes(lab);
        ensure!(shared.len() == cpus.len() && shared.iter().all(|bytes| *bytes == shared[0]), "{shared:?}");
        lab.rig.cache.split(&cpus[..1])?;
        let alone = bytes(lab);
        ensure!(alone.len() == 1 && alone[0] >= shared.iter().sum(), "{alone:?} instead of {shared:?}");
        // It goes on serving, there and, from the table, elsewhere.
        for cpu in &cpus {
            lab.client_sends(*cpu, port, flag::SYN)?;
        }
        lab.rig.cache.split(&cpus)?;
        lab.connect(port + 1).map(drop)
    })
}
