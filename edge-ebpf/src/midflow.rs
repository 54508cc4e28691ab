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
    maps::{ServiceEntry, balance, flow_flag, mode, service_flag},
    verdict::{Reason, Verdict},
};

use crate::{
    classify::NEW_FLOW,
    conntrack::Past,
    create::{self, JOINED, OPENED, Plan, TAKEN},
    family::Family,
    maps,
    packet::Packet,
    parse::Parsed,
    protect, select,
    stats::because,
};

/// Both entries of the packet's flow are there: the stage `send` sends it.
pub const ADOPTED: Verdict = Verdict::UNDECIDED;

/// [`ADOPTED`], or what becomes of the packet: `past` names the service of a client's segment, or the backend of a reply.
#[inline(always)]
pub fn decide<A: Family, P: Packet>(packet: &mut P, parsed: &Parsed<A>, past: &Past<A>) -> Verdict {
    if past.backend != 0 && past.service == 0 {
        return reply(parsed, past.backend);
    }
    let Some(service) = maps::service(past.service) else {
        return because(Reason::NotReady, past.service);
    };
    if service.mode == mode::DNAT && service.balance == balance::MAGLEV && parsed.flags & SYN == 0 {
        return segment(parsed, service, past.service);
    }
    refuse(packet, parsed, service, past.service)
}

/// A client's segment of a dnat service.
#[inline(never)]
fn segment<A: Family>(parsed: &Parsed<A>, service: &ServiceEntry, number: u32) -> Verdict {
    let admitted = protect::admit(parsed, number);
    if admitted != NEW_FLOW {
        return admitted;
    }
    let chosen = select::agreed(service, &parsed.key, select::NONE);
    if chosen == select::NONE {
        return because(Reason::NoBackend, number);
    }
    let acked = if parsed.flags & ACK == 0 { 0 } else { flow_flag::CLIENT_ACKED };
    adopt(&parsed.key, number, chosen, parsed.ack, acked)
}

/// A dnat backend's packet to somewhere else than this host.
#[inline(never)]
fn reply<A: Family>(parsed: &Parsed<A>, backend: u32) -> Verdict {
    let number = maps::backend(backend).map_or(0, |backend| backend.service);
    let Some(service) = maps::service(number) else {
        return because(Reason::ReplyWithoutFlow, number);
    };
    let key = &parsed.key;
    let client = FlowKey::new(key.dst, A::narrow(&service.address), key.dst_port, service.port, key.protocol);
    if service.mode != mode::DNAT || parsed.lacks_checksum || !is_choice(service, &client, backend) {
        return because(Reason::ReplyWithoutFlow, number);
    }
    let segment = parsed.segment();
    if parsed.flags & (SYN | ACK) == SYN | ACK {
        return adopt(&client, number, backend, segment.seq.wrapping_add(1), flow_flag::SYN_ACK_SEEN);
    }
    let known = if key.protocol == UDP {
        flow_flag::REPLIED
    } else if parsed.flags & RST == 0 {
        flow_flag::SYN_ACK_SEEN
    } else {
        0
    };
    adopt(&client, number, backend, floor_of(&segment), known)
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

/// Makes both entries of the client's flow.
#[inline(never)]
fn adopt<A: Family>(client: &FlowKey<A>, number: u32, chosen: u32, ack_floor: u32, known: u16) -> Verdict {
    let (Some(service), Some(backend)) = (maps::service(number), maps::backend(chosen)) else {
        return because(Reason::NotReady, number);
    };
    let mut plan = Plan {
        key: *client,
        new_src: client.src,
        new_dst: A::narrow(&backend.address),
        new_src_port: client.src_port,
        new_dst_port: backend.port,
        service: number,
        backend: chosen,
        flags: create::flags(service, client.protocol) | flow_flag::ADOPTED | known,
        ack_floor,
        now: maps::events::precise_now(),
    };
    match create::open(&mut plan, service, backend, &Past::none()) {
        OPENED => {
            because(Reason::MidFlowAdopted, number);
            protect::half_opened(client.src, number);
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
