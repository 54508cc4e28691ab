//! Packets in the middle of a flow that is not known: another edge's, or one that was lost with its table.
//!
//! In dnat mode every edge of a group chooses the same backend for a tuple (`select::agreed`), so that a client's segment
//! follows that choice, and a backend's reply is taken for the service's where the choice is that backend. In full-nat mode
//! only the edge that chose the SNAT port knew, so that the client is told to begin anew.

mod reset;

use edge_common::{
    conntrack::{
        floor_of,
        tcp_flag::{ACK, RST, SYN},
    },
    flow::{FlowKey, UDP},
    maps::{ANY_PORT, Flow, ServiceEntry, balance, flow_flag, mode, service_flag},
    verdict::{Reason, Verdict},
};

use crate::{
    classify::{NEW_FLOW, is_of},
    conntrack::Past,
    create::{self, JOINED, OPENED, Plan, TAKEN},
    family::Family,
    maps::{self, Table},
    packet::Packet,
    parse::Parsed,
    protect, select,
    stats::because,
};

/// Both entries of the packet's flow are there: the stage `send` sends it.
pub const ADOPTED: Verdict = Verdict::UNDECIDED;

/// Where a packet belongs is noted in [`Past`]: its flow may be made.
const FOUND: Verdict = Verdict::FORWARD;

/// [`ADOPTED`], or what becomes of the packet: `past` names the service of a client's segment, or the backend of a reply.
#[inline(always)]
pub fn decide<A: Family, P: Packet>(packet: &mut P, parsed: &Parsed<A>, past: &mut Past<A>) -> Verdict {
    let from_backend = past.service == 0;
    if !from_backend {
        let Some(service) = maps::service(past.service) else {
            return because(Reason::NotReady, past.service);
        };
        if service.mode != mode::DNAT || service.balance != balance::MAGLEV || parsed.flags & SYN != 0 {
            return refuse(packet, parsed, service, past.service);
        }
    }
    // One after the other, so that their frames are not on the stack together.
    let found = if from_backend { reply(parsed, past) } else { segment(parsed, past) };
    if found != FOUND {
        return found;
    }
    adopt(parsed, past.service, past.backend, from_backend)
}

/// A client's segment of a dnat service.
#[inline(never)]
fn segment<A: Family>(parsed: &Parsed<A>, past: &mut Past<A>) -> Verdict {
    let number = past.service;
    let admitted = protect::admit(parsed, number, false);
    if admitted != NEW_FLOW {
        return admitted;
    }
    past.backend = match maps::service(number) {
        Some(service) => select::agreed(service, &parsed.key, select::NONE),
        None => select::NONE,
    };
    if past.backend == select::NONE { because(Reason::NoBackend, number) } else { FOUND }
}

/// A dnat backend's packet to somewhere else than this host.
#[inline(never)]
fn reply<A: Family>(parsed: &Parsed<A>, past: &mut Past<A>) -> Verdict {
    let number = maps::backend(past.backend).map_or(0, |backend| backend.service);
    let Some(service) = maps::service(number) else {
        return because(Reason::ReplyWithoutFlow, number);
    };
    let client = client_of(&parsed.key, service);
    if service.mode != mode::DNAT || parsed.lacks_checksum || !is_choice(service, &client, past.backend) {
        return because(Reason::ReplyWithoutFlow, number);
    }
    if service.port == ANY_PORT && !is_of(&client, number) {
        return because(Reason::ReplyWithoutFlow, number);
    }
    if is_with_another(&client, &parsed.key) {
        return because(Reason::TwinTaken, number);
    }
    past.service = number;
    FOUND
}

/// True where the client's tuple has a flow, and it leads elsewhere than to the sender of this reply.
#[inline(never)]
fn is_with_another<A: Family>(client: &FlowKey<A>, reply: &FlowKey<A>) -> bool {
    let other = |flow: &mut Flow<A>| flow.twin() != *reply;
    maps::flow(Table::Established, client).is_some_and(other) || maps::flow(Table::HalfOpen, client).is_some_and(other)
}

/// The client's tuple of a backend's reply.
#[inline(always)]
fn client_of<A: Family>(key: &FlowKey<A>, service: &ServiceEntry) -> FlowKey<A> {
    FlowKey::new(key.dst, A::narrow(&service.address), key.dst_port, service.port_of(key.src_port), key.protocol)
}

/// True where every edge would give the client this backend, or would once the first had not answered.
#[inline(never)]
fn is_choice<A: Family>(service: &ServiceEntry, client: &FlowKey<A>, backend: u32) -> bool {
    let mut avoid = select::NONE;
    for _ in 0..2 {
        let chosen = select::agreed(service, client, avoid);
        if chosen == backend {
            return true;
        }
        avoid = chosen;
    }
    false
}

/// What the packet says about its flow's acknowledgements: [`flow_flag`] bits and `Flow::ack_floor`.
#[inline(always)]
fn known<A: Family>(parsed: &Parsed<A>, from_backend: bool) -> (u16, u32) {
    let flags = parsed.flags;
    match (parsed.key.protocol == UDP, from_backend) {
        (true, true) => (flow_flag::REPLIED, 0),
        (true, false) => (0, 0),
        (false, false) if flags & ACK == 0 => (0, 0),
        (false, false) => (flow_flag::CLIENT_ACKED, parsed.ack),
        (false, true) if flags & RST != 0 => (0, 0),
        (false, true) if flags & (SYN | ACK) == SYN | ACK => (flow_flag::SYN_ACK_SEEN, parsed.seq.wrapping_add(1)),
        (false, true) => (flow_flag::SYN_ACK_SEEN, floor_of(&parsed.segment())),
    }
}

/// Makes both entries of the packet's flow.
#[inline(never)]
fn adopt<A: Family>(parsed: &Parsed<A>, number: u32, chosen: u32, from_backend: bool) -> Verdict {
    let (Some(service), Some(backend)) = (maps::service(number), maps::backend(chosen)) else {
        return because(Reason::NotReady, number);
    };
    let key = if from_backend { client_of(&parsed.key, service) } else { parsed.key };
    let (known, ack_floor) = known(parsed, from_backend);
    let plan = Plan {
        key,
        new_src: key.src,
        new_dst: A::narrow(&backend.address),
        new_src_port: key.src_port,
        new_dst_port: backend.port_for(key.dst_port),
        service: number,
        backend: chosen,
        flags: create::flags(service, key.protocol) | flow_flag::ADOPTED | known,
        ack_floor,
        now: maps::events::precise_now(),
    };
    match create::open_own(&plan, service) {
        OPENED => {
            because(Reason::MidFlowAdopted, number);
            protect::half_opened(plan.key.src, number);
            ADOPTED
        }
        JOINED => ADOPTED,
        TAKEN => because(Reason::TwinTaken, number),
        _ => because(Reason::HalfOpenFull, number),
    }
}

/// A segment whose connection nobody here can find. The kernel answers for a dedicated VIP, which nothing else uses.
#[inline(always)]
fn refuse<A: Family, P: Packet>(packet: &mut P, parsed: &Parsed<A>, service: &ServiceEntry, number: u32) -> Verdict {
    let now = maps::now();
    if parsed.flags & RST != 0 || !maps::may_answer_mid_flow(now) {
        return because(Reason::MidFlowSilent, number);
    }
    if !protect::lets_in(parsed, service, number) {
        return because(Reason::SourceDenied, number);
    }
    if service.flags & service_flag::DEDICATED != 0 {
        return because(Reason::NoFlow, number);
    }
    reset::send(packet, parsed, number, now)
}
