//! What packets that try to end, repeat or re-use a connection do to it: forged resets, repeated SYNs, ports used again, and
//! flows of one reply.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use edge_common::{
    flow::{TCP, UDP},
    maps::{ServiceEntry, flow_flag, mode, name, service_flag},
    verdict::Reason,
};
use edge_tests::datapath::{
    frame::{Frame, flag},
    namespace::in_namespace,
    rig::{Action, Entry, FAMILIES, Family, HOOKS, Key, Rig, Settings, key, snat_of},
};

const PORT: u16 = 40_000;

/// One case: the program, and the family of its service.
struct Case {
    rig: Rig,
    family: Family,
    protocol: u8,
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

    fn send(&mut self, port: u16, flags: u8, ack: u32) -> Result<Action> {
        let frame = Frame::tcp(self.client(port), self.vip(), flags).ack(ack).bytes();
        Ok(self.rig.run(&frame, self.rig.uplink)?.action)
    }

    /// A backend's segment to the flow's source.
    fn reply(&mut self, flow: &Entry, flags: u8, seq: u32) -> Result<Action> {
        let frame = Frame::tcp(backend_of(flow), snat_of(flow), flags).seq(seq).bytes();
        Ok(self.rig.run(&frame, self.rig.pods)?.action)
    }

    fn establish(&mut self, port: u16) -> Result<Entry> {
        self.send(port, flag::SYN, 0)?;
        let key = self.forward_key(port);
        let half_open = self.rig.flow(name::HALF_OPEN, &key).context("not half-open")?;
        self.reply(&half_open, flag::SYN | flag::ACK, 1000)?;
        self.send(port, flag::ACK, 1001)?;
        self.rig.flow(name::ESTABLISHED, &key).context("not established")
    }

    fn half_open(&mut self, port: u16) -> Entry {
        let key = self.forward_key(port);
        self.rig.flow(name::HALF_OPEN, &key).expect("half-open")
    }

    /// The tables that have both halves of a flow.
    fn place(&mut self, flow: &Entry) -> Vec<&'static str> {
        let tables = [name::ESTABLISHED, name::HALF_OPEN, name::CLOSING];
        let both = |table: &&str| [flow.key, flow.twin()].iter().all(|key| self.rig.flow(table, key).is_some());
        tables.into_iter().filter(both).collect()
    }

    fn active(&mut self) -> Result<u64> {
        let stats = self.rig.service_stats(1)?;
        Ok(stats.opened - stats.closed)
    }
}

fn backend_of(flow: &Entry) -> SocketAddr {
    edge_ctl::reconcile::ports::socket_address(flow.new_dst, flow.new_dst_port)
}

/// On both hooks, of both families.
fn each(mode: u8, protocol: u8, pods: u8, test: impl Fn(&mut Case) -> Result<()> + Sync) -> Result<()> {
    for hook in HOOKS {
        for family in FAMILIES {
            in_namespace(|| {
                let mut rig = Rig::new(hook, Settings { family, ..Settings::default() })?;
                rig.service(1, 8443, protocol, mode, pods, 443)?;
                test(&mut Case { rig, family, protocol })
            })
            .with_context(|| format!("{hook:?} {family:?}"))?;
        }
    }
    Ok(())
}

#[test]
fn a_forged_reset_of_either_side_is_taken_back_by_that_side_s_next_segment() -> Result<()> {
    each(mode::FULL_NAT, TCP, 1, |case| {
        let flow = case.establish(PORT)?;
        for from_client in [true, false] {
            let send = |case: &mut Case, flags| match from_client {
                true => case.send(PORT, flags, 5000),
                false => case.reply(&flow, flags, 2000),
            };
            assert_eq!(send(case, flag::RST)?, Action::Redirect);
            assert_eq!((case.place(&flow), case.active()?), (vec![name::CLOSING], 0), "its time is short");
            assert_eq!(send(case, flag::ACK)?, Action::Redirect);
            assert_eq!((case.place(&flow), case.active()?), (vec![name::ESTABLISHED], 1), "and long again");
            let now = case.rig.flow(name::ESTABLISHED, &flow.key).expect("established");
            assert_eq!(now.flags & flow_flag::RESET, 0);
            assert_eq!(snat_of(&now), snat_of(&flow));
        }
        Ok(())
    })
}

#[test]
fn what_was_under_way_when_a_reset_came_still_passes_and_takes_nothing_back() -> Result<()> {
    each(mode::FULL_NAT, TCP, 1, |case| {
        let flow = case.establish(PORT)?;
        case.send(PORT, flag::RST, 0)?;
        assert_eq!(case.reply(&flow, flag::ACK, 2000)?, Action::Redirect);
        assert_eq!((case.place(&flow), case.active()?), (vec![name::CLOSING], 0));
        // Another RST is no sign of life.
        case.send(PORT, flag::RST | flag::ACK, 0)?;
        assert_eq!(case.place(&flow), [name::CLOSING]);
        Ok(())
    })
}

#[test]
fn a_reset_does_not_help_a_handshake_into_the_established_table() -> Result<()> {
    each(mode::FULL_NAT, TCP, 1, |case| {
        case.send(PORT, flag::SYN, 0)?;
        let flow = case.half_open(PORT);
        case.send(PORT, flag::RST, 0)?;
        case.send(PORT, flag::ACK, 77)?;
        assert_eq!(case.place(&flow), [name::CLOSING]);
        assert_eq!(case.rig.service_stats(1)?.opened, 0);
        Ok(())
    })
}

#[test]
fn a_restored_flow_whose_other_half_was_evicted_gets_it_back_unless_another_flow_has_its_key() -> Result<()> {
    each(mode::FULL_NAT, TCP, 1, |case| {
        let flow = case.establish(PORT)?;
        case.send(PORT, flag::RST, 0)?;
        case.rig.remove_flow(name::CLOSING, &flow.twin())?;
        assert_eq!(case.send(PORT, flag::ACK, 5000)?, Action::Redirect);
        assert_eq!(case.place(&flow), [name::ESTABLISHED]);

        case.send(PORT, flag::RST, 0)?;
        let mut stranger = case.rig.flow(name::CLOSING, &flow.twin()).expect("closing");
        case.rig.remove_flow(name::CLOSING, &flow.twin())?;
        stranger.new_dst_port = 1;
        case.rig.put_flow(name::HALF_OPEN, &stranger)?;
        assert_eq!(case.send(PORT, flag::ACK, 5000)?, Action::Drop);
        assert_eq!(case.rig.reason(1, Reason::TwinTaken)?, 1);
        assert!(case.rig.flows(name::ESTABLISHED)?.is_empty());
        Ok(())
    })
}

#[test]
fn a_syn_on_a_live_flow_goes_to_its_backend_and_changes_nothing() -> Result<()> {
    each(mode::FULL_NAT, TCP, 3, |case| {
        let flow = case.establish(PORT)?;
        for _ in 0..5 {
            assert_eq!(case.send(PORT, flag::SYN, 0)?, Action::Redirect);
        }
        let now = case.rig.flow(name::ESTABLISHED, &flow.key).expect("established");
        assert_eq!((now.state, now.flags, now.sequence), (flow.state, flow.flags, flow.sequence));
        assert_eq!(
            (snat_of(&now), backend_of(&now), now.packets),
            (snat_of(&flow), backend_of(&flow), flow.packets + 5)
        );
        assert!(case.rig.flows(name::HALF_OPEN)?.is_empty());
        Ok(())
    })
}

#[test]
fn a_port_used_again_while_its_flow_is_closing_starts_a_new_flow() -> Result<()> {
    each(mode::FULL_NAT, TCP, 1, |case| {
        let flow = case.establish(PORT)?;
        case.reply(&flow, flag::FIN | flag::ACK, 1001)?;
        case.send(PORT, flag::FIN | flag::ACK, 1002)?;
        assert_eq!(case.place(&flow), [name::CLOSING]);
        assert_eq!(case.send(PORT, flag::SYN, 0)?, Action::Redirect);
        let fresh = case.half_open(PORT);
        assert_eq!((fresh.packets, fresh.flags), (1, 0));
        assert!(case.rig.flows(name::CLOSING)?.is_empty());
        assert_eq!(case.rig.service_stats(1)?.half_opened, 2);
        Ok(())
    })
}

#[test]
fn the_second_repeated_syn_that_nobody_answers_goes_to_another_backend() -> Result<()> {
    each(mode::FULL_NAT, TCP, 3, |case| {
        case.send(PORT, flag::SYN, 0)?;
        let first = case.half_open(PORT);
        case.send(PORT, flag::SYN, 0)?;
        assert_eq!(backend_of(&case.half_open(PORT)), backend_of(&first), "the first may have been lost");
        assert_eq!(case.rig.reason(1, Reason::RetriedElsewhere)?, 0);
        assert_eq!(case.send(PORT, flag::SYN, 0)?, Action::Redirect);
        let second = case.half_open(PORT);
        assert_ne!(backend_of(&second), backend_of(&first));
        assert_eq!(case.rig.reason(1, Reason::RetriedElsewhere)?, 1);
        // The first one's answer, late, is not for the client, which may have the second's by now.
        assert_eq!(case.reply(&first, flag::SYN | flag::ACK, 7)?, Action::Drop);
        case.reply(&second, flag::SYN | flag::ACK, 1000)?;
        case.send(PORT, flag::ACK, 1001)?;
        assert_eq!(case.place(&second), [name::ESTABLISHED]);
        Ok(())
    })
}

#[test]
fn a_repeated_syn_stays_with_a_backend_that_has_answered_or_that_is_the_only_one() -> Result<()> {
    each(mode::FULL_NAT, TCP, 2, |case| {
        case.send(PORT, flag::SYN, 0)?;
        let flow = case.half_open(PORT);
        case.reply(&flow, flag::SYN | flag::ACK, 1000)?;
        for _ in 0..5 {
            case.send(PORT, flag::SYN, 0)?;
        }
        let now = case.half_open(PORT);
        assert_eq!((backend_of(&now), now.packets, now.ack_floor), (backend_of(&flow), 6, 1001));

        let other = 3 - flow.backend;
        case.rig.set_eligible(other, false)?;
        case.send(PORT + 1, flag::SYN, 0)?;
        let alone = case.half_open(PORT + 1);
        assert_eq!(alone.backend, flow.backend);
        for _ in 0..4 {
            assert_eq!(case.send(PORT + 1, flag::SYN, 0)?, Action::Redirect);
        }
        let now = case.half_open(PORT + 1);
        assert_eq!(
            (now.backend, snat_of(&now)),
            (alone.backend, snat_of(&alone)),
            "it is asked again, from the same port"
        );
        assert_eq!(case.rig.reason(1, Reason::RetriedElsewhere)?, 0);
        Ok(())
    })
}

#[test]
fn a_dnat_client_is_given_more_time_since_its_answer_may_go_by_another_edge() -> Result<()> {
    each(mode::DNAT, TCP, 3, |case| {
        case.send(PORT, flag::SYN, 0)?;
        let first = case.half_open(PORT);
        for _ in 0..3 {
            case.send(PORT, flag::SYN, 0)?;
            assert_eq!(backend_of(&case.half_open(PORT)), backend_of(&first));
        }
        case.send(PORT, flag::SYN, 0)?;
        assert_ne!(backend_of(&case.half_open(PORT)), backend_of(&first));
        Ok(())
    })
}

fn one_reply(rig: &mut Rig) -> Result<()> {
    let mut service: ServiceEntry = rig.array(name::SERVICES)?.get(&1, 0)?;
    service.flags |= service_flag::ONE_REPLY;
    Ok(rig.array(name::SERVICES)?.set(1, service, 0)?)
}

#[test]
fn a_one_reply_flow_ends_with_its_reply_and_the_client_s_next_datagram_begins_another() -> Result<()> {
    each(mode::FULL_NAT, UDP, 1, |case| {
        one_reply(&mut case.rig)?;
        let (client, vip) = (case.client(PORT), case.vip());
        let ask = |case: &mut Case| -> Result<Action> {
            Ok(case.rig.run(&Frame::udp(client, vip).bytes(), case.rig.uplink)?.action)
        };
        assert_eq!((ask(case)?, ask(case)?), (Action::Redirect, Action::Redirect), "a question repeated");
        let flow = case.half_open(PORT);
        assert_eq!(flow.packets, 2);
        let answer = Frame::udp(backend_of(&flow), snat_of(&flow)).bytes();
        assert_eq!(case.rig.run(&answer, case.rig.pods)?.action, Action::Redirect);
        assert_eq!(case.place(&flow), [name::CLOSING]);
        assert_eq!(case.rig.run(&answer, case.rig.pods)?.action, Action::Redirect, "a second one is still let through");
        assert_eq!(ask(case)?, Action::Redirect);
        assert_eq!(case.half_open(PORT).packets, 1);
        assert_eq!(case.rig.service_stats(1)?.opened, 0);
        Ok(())
    })
}
