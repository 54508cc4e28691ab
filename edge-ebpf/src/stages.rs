//! What follows the entry program's tail call: each function here is a program of its own for each hook (`programs`), with
//! the verifier's budget and 512 bytes of stack to itself. A stage ends in a verdict or in a tail call to the next, from its
//! first frame.

use edge_common::{
    icmp::ICMP,
    maps::stages::{ANSWER, FRAG, RELAY, TRACK},
    verdict::{Question, Reason, Verdict},
};

use crate::{
    classify::{self, NEW_FLOW},
    conntrack::{self, FORWARD, NO_FLOW, Past},
    create::{self, CREATED},
    events,
    family::Family,
    forward, fragment, icmp, log,
    maps::{self, Table},
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
    /// It is the first fragment of a packet, which the rest are to follow: [`send`] remembers it.
    pub fragment: bool,
    /// For [`answer`]: what the sender is told.
    pub question: Verdict,
}

/// From the entry program to [`track`].
#[inline(always)]
pub fn begin<A: Family, P: Packet>(packet: &mut P, parsed: Parsed<A>, side: Side) -> Verdict {
    if !hand_over(packet, parsed, side, false, Verdict::UNDECIDED) {
        return because(Reason::NotReady, 0);
    }
    enter(packet, A::TRACK)
}

/// From the entry program to [`answer`]; the packet is as it came.
#[inline(always)]
pub fn question<A: Family, P: Packet>(packet: &mut P, parsed: Parsed<A>, side: Side, verdict: Verdict) -> Verdict {
    if A::V6 {
        return events::sampled(&parsed, unanswered(verdict));
    }
    if !hand_over(packet, parsed, side, false, verdict) {
        return because(Reason::NotReady, 0);
    }
    enter(packet, ANSWER)
}

/// From the entry program to [`relay`], which needs nothing but the packet. Without it ICMP is the stack's.
#[inline(always)]
pub fn icmp<P: Packet>(packet: &mut P) -> Verdict {
    packet.enter(RELAY);
    Verdict::PASS
}

/// From the entry program to [`frag`], which needs nothing but the packet.
#[inline(always)]
pub fn fragment<P: Packet>(packet: &mut P) -> Verdict {
    enter(packet, FRAG)
}

#[inline(always)]
fn hand_over<A: Family, P: Packet>(
    packet: &mut P,
    parsed: Parsed<A>,
    side: Side,
    fragment: bool,
    question: Verdict,
) -> bool {
    match A::handover(P::HOOK) {
        Some(room) => {
            *room = Handover { parsed, side, table: Table::Established, past: Past::none(), fragment, question };
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
        verdict = protect::admit(parsed, past.service);
    }
    if verdict == NEW_FLOW {
        verdict = create::flow(parsed, past);
        if verdict == CREATED {
            *table = Table::HalfOpen;
            return enter(packet, A::SEND);
        }
    }
    if verdict.question().is_some() {
        return tell::<A, P>(packet, parsed, question, verdict);
    }
    end(parsed, verdict)
}

/// A packet that the stages before decided to forward.
#[inline(always)]
pub fn send<A: Family, P: Packet>(packet: &mut P) -> Verdict {
    let Some(Handover::<A> { parsed, table, past, fragment, question, .. }) = A::handover(P::HOOK) else {
        return because(Reason::NotReady, 0);
    };
    let verdict = match maps::flow(*table, &parsed.key) {
        Some(flow) => {
            let verdict = forward::any(packet, parsed, flow);
            if verdict.question().is_some() {
                return tell::<A, P>(packet, parsed, question, verdict);
            }
            if *fragment {
                A::remember_fragment(packet, parsed, flow);
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
pub fn relay<P: Packet>(packet: &mut P) -> Verdict {
    let Some(ip) = parse::ipv4(packet) else {
        return Verdict::PASS;
    };
    if ip.protocol != ICMP || ip.is_fragment() {
        return Verdict::PASS;
    }
    let mut quote = icmp::quote::Quote::NOTHING;
    let verdict = icmp::error(packet, &ip, &mut quote);
    end(&quote.outer, verdict)
}

/// A packet whose sender is to be told what became of it.
#[inline(always)]
pub fn answer<P: Packet>(packet: &mut P) -> Verdict {
    let Some(Handover { parsed, question, .. }) = u32::handover(P::HOOK) else {
        return because(Reason::NotReady, 0);
    };
    let verdict = icmp::answer::send(packet, *question);
    end(parsed, verdict)
}

/// A fragment of a packet of ours.
#[inline(always)]
pub fn frag<P: Packet>(packet: &mut P) -> Verdict {
    let Some(ip) = parse::ipv4(packet) else {
        return because(Reason::Malformed, 0);
    };
    let Some(side) = prefilter(ip.src, ip.dst) else {
        return Verdict::PASS;
    };
    if ip.is_later_fragment() {
        let Some(Handover { parsed, .. }) = u32::handover(P::HOOK) else {
            return because(Reason::NotReady, 0);
        };
        let verdict = fragment::follow(packet, &ip, parsed);
        return end(parsed, verdict);
    }
    let Some(parsed) = parse::transport(packet, &ip) else {
        return because(Reason::Malformed, 0);
    };
    fragment::touch(&parsed);
    if !hand_over(packet, parsed, side, true, Verdict::UNDECIDED) {
        return because(Reason::NotReady, 0);
    }
    enter(packet, TRACK)
}

/// Has the sender told what became of its packet; nobody is told about IPv6 packets yet.
#[inline(always)]
fn tell<A: Family, P: Packet>(packet: &mut P, parsed: &Parsed<A>, room: &mut Verdict, question: Verdict) -> Verdict {
    if A::V6 {
        return end(parsed, unanswered(question));
    }
    *room = question;
    enter(packet, ANSWER)
}

#[inline(always)]
fn unanswered(question: Verdict) -> Verdict {
    match question.question() {
        Some((Question::TooBig, service, _)) => because(Reason::TooBig, service),
        Some((_, service, _)) => because(Reason::TtlExpired, service),
        None => question,
    }
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
