//! What follows the entry program's tail call: each function here is a program of its own for each hook (`programs`), with
//! the verifier's budget and 512 bytes of stack to itself. A stage ends in a verdict or in a tail call to the next, from its
//! first frame.

use edge_common::verdict::{Action, Reason, Verdict};

use crate::{
    classify::{self, NEW_FLOW},
    conntrack::{self, FORWARD, NO_FLOW, Past},
    create::{self, CREATED},
    events,
    family::Family,
    forward,
    fragment::{self, FIRST, Piece},
    icmp, log,
    maps::{self, Table},
    midflow, mss,
    packet::Packet,
    parse::{self, Parsed},
    pipeline::{Side, prefilter},
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
    /// Of the first fragment of a packet, which the rest are to follow: offset of the header that makes it one, from the
    /// start of the frame. [`send`] remembers it. Of other packets 0.
    pub fragment: u16,
    /// For [`answer`]: what the sender is told.
    pub question: Verdict,
    /// What [`send`] has done to the MSS, for [`answer`] to undo: a sender is told about the packet that it sent.
    pub lowered: u32,
}

impl<A: Family> Handover<A> {
    /// All but the packet's headers, as the first stage finds it.
    #[inline(always)]
    fn begin(&mut self, side: Side, fragment: u16, question: Verdict) {
        self.side = side;
        self.table = Table::Established;
        self.past = Past::none();
        self.fragment = fragment;
        self.question = question;
        self.lowered = mss::NOTHING_LOWERED;
    }
}

/// From the entry program to [`track`].
#[inline(always)]
pub fn begin<A: Family, P: Packet>(packet: &mut P, parsed: Parsed<A>, side: Side) -> Verdict {
    if !hand_over(packet, parsed, side, Verdict::UNDECIDED) {
        return because(Reason::NotReady, 0);
    }
    enter(packet, A::TRACK)
}

/// From the entry program to [`answer`]; the packet is as it came.
#[inline(always)]
pub fn question<A: Family, P: Packet>(packet: &mut P, parsed: Parsed<A>, side: Side, verdict: Verdict) -> Verdict {
    if !hand_over(packet, parsed, side, verdict) {
        return because(Reason::NotReady, 0);
    }
    enter(packet, A::ANSWER)
}

/// From the entry program to [`relay`], which needs nothing but the packet. Without it ICMP is the stack's.
#[inline(always)]
pub fn icmp<A: Family, P: Packet>(packet: &mut P) -> Verdict {
    packet.enter(A::RELAY);
    Verdict::PASS
}

/// From the entry program to [`frag`], which needs nothing but the packet.
#[inline(always)]
pub fn fragment<A: Family, P: Packet>(packet: &mut P) -> Verdict {
    enter(packet, A::FRAG)
}

#[inline(always)]
fn hand_over<A: Family, P: Packet>(packet: &mut P, parsed: Parsed<A>, side: Side, question: Verdict) -> bool {
    match A::handover(P::HOOK) {
        Some(room) => {
            room.parsed = parsed;
            room.begin(side, 0, question);
            parse::sequence(packet, &mut room.parsed);
            true
        }
        None => false,
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
    let Some(Handover::<A> { parsed, side, table, past, question, .. }) = A::handover(P::HOOK) else {
        return because(Reason::NotReady, 0);
    };
    let mut verdict = classify::untracked(packet, parsed, *side, past);
    if verdict == NEW_FLOW {
        verdict = protect::admit(parsed, past.service, past.counted);
    }
    if verdict == NEW_FLOW {
        verdict = create::flow(parsed, past);
        if verdict == CREATED {
            *table = Table::HalfOpen;
            return enter(packet, A::SEND);
        }
    }
    if verdict.question().is_some() {
        return tell::<A, P>(packet, question, verdict);
    }
    if verdict == Verdict::MID_FLOW {
        return enter(packet, A::MID_FLOW);
    }
    end(parsed, verdict)
}

/// A packet in the middle of a flow that is not known.
#[inline(always)]
pub fn mid_flow<A: Family, P: Packet>(packet: &mut P) -> Verdict {
    let Some(Handover::<A> { parsed, table, past, .. }) = A::handover(P::HOOK) else {
        return because(Reason::NotReady, 0);
    };
    let verdict = midflow::decide(packet, parsed, past);
    if verdict == midflow::ADOPTED {
        *table = Table::HalfOpen;
        return enter(packet, A::SEND);
    }
    end(parsed, verdict)
}

/// A packet that the stages before decided to forward.
#[inline(always)]
pub fn send<A: Family, P: Packet>(packet: &mut P) -> Verdict {
    let Some(Handover::<A> { parsed, table, past, fragment: piece, question, lowered, .. }) = A::handover(P::HOOK)
    else {
        return because(Reason::NotReady, 0);
    };
    let verdict = match maps::flow(*table, &parsed.key) {
        Some(flow) => {
            let verdict = forward::any(packet, parsed, flow, lowered);
            if verdict.question().is_some() {
                return tell::<A, P>(packet, question, verdict);
            }
            if *piece != 0 && verdict.action() != Action::Drop {
                fragment::remember(packet, &parsed.key, flow, *piece);
            }
            verdict
        }
        // Evicted between two lookups: passing it now would show the wrong addresses. The sender repeats it.
        None => because(Reason::HalfOpenFull, past.service),
    };
    end(parsed, verdict)
}

/// An ICMP packet, to whomever.
#[inline(always)]
pub fn relay<A: Family, P: Packet>(packet: &mut P) -> Verdict {
    let Some(quote) = A::quote() else {
        return because(Reason::NotReady, 0);
    };
    if !icmp::quote::read(packet, quote) {
        return Verdict::PASS;
    }
    let verdict = icmp::error(packet, quote);
    end(&quote.outer, verdict)
}

/// A packet whose sender is to be told what became of it.
#[inline(always)]
pub fn answer<A: Family, P: Packet>(packet: &mut P) -> Verdict {
    let Some(Handover::<A> { parsed, question, lowered, .. }) = A::handover(P::HOOK) else {
        return because(Reason::NotReady, 0);
    };
    if *lowered != mss::NOTHING_LOWERED {
        mss::restore(packet, parsed, *lowered);
    }
    let verdict = icmp::answer::send(packet, parsed, *question);
    end(parsed, verdict)
}

/// A fragment of a packet of ours.
#[inline(always)]
pub fn frag<A: Family, P: Packet>(packet: &mut P) -> Verdict {
    let Some(room) = A::handover(P::HOOK) else {
        return because(Reason::NotReady, 0);
    };
    let found = fragment::read(packet, &mut room.parsed);
    if found == 0 {
        return because(Reason::Malformed, 0);
    }
    let piece = Piece::unpack(found);
    let Some(side) = prefilter(room.parsed.key.src, room.parsed.key.dst) else {
        return Verdict::PASS;
    };
    let verdict = if piece.later {
        fragment::follow(packet, &piece, &mut room.parsed)
    } else {
        fragment::first(packet, &mut room.parsed)
    };
    if verdict.question().is_some() {
        room.lowered = mss::NOTHING_LOWERED;
        return tell::<A, P>(packet, &mut room.question, verdict);
    }
    if piece.later || verdict != FIRST {
        return end(&room.parsed, verdict);
    }
    fragment::touch(&room.parsed);
    room.begin(side, piece.at, Verdict::UNDECIDED);
    enter(packet, A::TRACK)
}

/// Has the sender told what became of its packet, which is as it came.
#[inline(always)]
fn tell<A: Family, P: Packet>(packet: &mut P, room: &mut Verdict, question: Verdict) -> Verdict {
    *room = question;
    enter(packet, A::ANSWER)
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
