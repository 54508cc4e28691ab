//! What follows the entry program's tail call: each function here is a program of its own for each hook (`programs`), with
//! the verifier's budget and 512 bytes of stack to itself. A stage ends in a verdict or in a tail call to the next, from its
//! first frame.

use edge_common::verdict::{Reason, Verdict};

use crate::{
    classify::{self, NEW_FLOW},
    conntrack::{self, FORWARD, NO_FLOW, Past},
    create::{self, CREATED},
    events,
    family::Family,
    forward, log,
    maps::{self, Table},
    packet::Packet,
    parse::Parsed,
    pipeline::Side,
    protect,
    stats::because,
};

/// What one stage leaves for the next.
pub struct Handover<A> {
    /// The packet's headers.
    pub parsed: Parsed<A>,
    /// Which side of the prefilter it met.
    pub side: Side,
    /// The table that its flow is in, for [`send`].
    pub table: Table,
    /// The flow it takes the place of, and its service.
    pub past: Past<A>,
}

/// From the entry program to [`track`].
#[inline(always)]
pub fn begin<A: Family, P: Packet>(packet: &mut P, parsed: Parsed<A>, side: Side) -> Verdict {
    match A::handover(P::HOOK) {
        Some(room) => {
            *room = Handover { parsed, side, table: Table::Established, past: Past::none() };
            enter(packet, A::TRACK)
        }
        None => because(Reason::NotReady, 0),
    }
}

/// A packet that may change its flow's state, or that has no flow.
#[inline(always)]
pub fn track<A: Family, P: Packet>(packet: &mut P) -> Verdict {
    let Some(Handover::<A> { parsed, table, past, .. }) = A::handover(P::HOOK) else {
        return because(Reason::NotReady, 0);
    };
    let verdict = conntrack::tracked(parsed, table, past);
    if verdict == FORWARD {
        return enter(packet, A::SEND);
    }
    if verdict == NO_FLOW {
        return enter(packet, A::CREATE);
    }
    end(parsed, verdict)
}

/// A packet without a flow.
#[inline(always)]
pub fn create<A: Family, P: Packet>(packet: &mut P) -> Verdict {
    let Some(Handover::<A> { parsed, side, table, past }) = A::handover(P::HOOK) else {
        return because(Reason::NotReady, 0);
    };
    let mut verdict = classify::untracked(packet, parsed, *side, past);
    if verdict == NEW_FLOW {
        verdict = protect::admit(parsed, past.service);
    }
    if verdict == NEW_FLOW {
        verdict = create::flow(parsed, past);
        if verdict == CREATED {
            *table = Table::HalfOpen;
            return enter(packet, A::SEND);
        }
    }
    end(parsed, verdict)
}

/// A packet that the stages before decided to forward.
#[inline(always)]
pub fn send<A: Family, P: Packet>(packet: &mut P) -> Verdict {
    let Some(Handover::<A> { parsed, table, past, .. }) = A::handover(P::HOOK) else {
        return because(Reason::NotReady, 0);
    };
    let verdict = match maps::flow(*table, &parsed.key) {
        Some(flow) => forward::any(packet, parsed, flow),
        // Evicted between two lookups: passing it now would show the wrong addresses. The sender repeats it.
        None => because(Reason::HalfOpenFull, past.service),
    };
    end(parsed, verdict)
}

/// The tail call; the verdict is of a slot that is empty.
#[inline(always)]
fn enter<P: Packet>(packet: &mut P, stage: u32) -> Verdict {
    packet.enter(stage);
    let verdict = because(Reason::NotReady, 0);
    log::notices();
    verdict
}

#[inline(always)]
fn end<A: Family>(parsed: &Parsed<A>, verdict: Verdict) -> Verdict {
    log::notices();
    events::sampled(parsed, verdict)
}
