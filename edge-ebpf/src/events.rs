//! What is told of flows: records of their ends, and their backend's signals. All of it off the hot path.

use edge_common::{
    conntrack::{Direction, tcp_flag::RST},
    maps::{
        DropSample, Flow, FlowEnd,
        events::{End, event, micros_since, shows_silence},
        flow_flag, service_flag,
    },
    verdict::Verdict,
};

use crate::{
    family::Family,
    maps::{
        self, Table,
        events::{Perhaps, backend_signals, precise_now, record},
    },
    parse::Parsed,
};

/// The record of a flow that a packet ends, begun before its entries are taken out, since others may have their memory
/// afterwards. None where nobody wants one. `flow` is the half that the packet hit.
#[inline(always)]
pub fn begin<A: Family>(flow: &Flow<A>, table: Table, parsed: Option<&Parsed<A>>) -> Perhaps<FlowEnd> {
    let wanted = maps::service(flow.service).is_some_and(|service| service.flags & service_flag::RECORD_ENDS != 0);
    if !wanted {
        return Perhaps::none();
    }
    let Some(mut record) = record::<FlowEnd>() else {
        return Perhaps::none();
    };
    describe(record.content(), flow, table);
    let content = record.content();
    match parsed {
        Some(parsed) => {
            let direction = Direction::from_number(flow.direction);
            content.ended = maps::now();
            content.count_last(direction, u64::from(parsed.total_len), content.ended);
            content.end = End::of(direction, parsed.flags & RST != 0, content.answered_after != 0) as u8;
        }
        None => {
            content.ended = if content.last_reply > flow.last_seen { content.last_reply } else { flow.last_seen };
            content.end = End::Idle as u8;
        }
    }
    Perhaps::some(record)
}

/// Both halves into a record: the client's tells the addresses, turned from the backend's where it is gone.
#[inline(always)]
fn describe<A: Family>(content: &mut FlowEnd, flow: &Flow<A>, table: Table) {
    let twin = maps::flow(table, &flow.twin());
    content.count(flow);
    if flow.direction == Direction::Forward as u8 {
        content.describe(flow);
    } else {
        content.describe_reversed(flow);
    }
    if let Some(twin) = twin {
        content.count(twin);
    }
}

/// The backend's first answer to a flow; `flow` is its half.
#[inline(never)]
pub fn answered<A: Family>(flow: &mut Flow<A>) {
    if flow.answered_after != 0 {
        return;
    }
    let micros = micros_since(flow.created, precise_now());
    flow.answered_after = micros;
    if let Some(signals) = backend_signals(flow.backend) {
        signals.answered += 1;
        signals.answered_us += u64::from(micros);
    }
}

/// The backend's first payload of a flow; `flow` is its half.
#[inline(never)]
pub fn first_byte<A: Family>(flow: &mut Flow<A>) {
    let micros = micros_since(flow.created, precise_now());
    flow.first_byte_after = micros;
    if let Some(signals) = backend_signals(flow.backend) {
        signals.first_bytes += 1;
        signals.first_byte_us += u64::from(micros);
    }
}

/// A client's SYN that hit a half-open flow: repeated, since no answer came.
#[inline(never)]
pub fn repeated<A: Family>(flow: &mut Flow<A>) {
    if !shows_silence(flow) {
        return;
    }
    flow.flags |= flow_flag::UNANSWERED;
    if let Some(signals) = backend_signals(flow.backend) {
        signals.unanswered += 1;
        signals.last_failure = maps::now();
    }
}

/// A backend's RST; `flow` is its half, in `table`.
#[inline(never)]
pub fn reset_by_backend<A: Family>(flow: &Flow<A>) {
    let Some(signals) = backend_signals(flow.backend) else {
        return;
    };
    if flow.answered_after == 0 {
        signals.refused += 1;
    } else if flow.first_byte_after == 0 {
        signals.reset_early += 1;
    } else {
        return;
    }
    signals.last_failure = maps::now();
}

/// Reports a dropped packet where its reason's counter says that it is one of the sample; gives the verdict back.
#[inline(always)]
pub fn sampled<A: Family>(parsed: &Parsed<A>, verdict: Verdict) -> Verdict {
    if let Some((reason, service)) = verdict.reported() {
        report(parsed, reason, service);
    }
    verdict
}

#[inline(never)]
fn report<A: Family>(parsed: &Parsed<A>, reason: u8, service: u32) {
    let Some(mut sample) = record::<DropSample>() else {
        return;
    };
    let content = sample.content();
    content.kind = event::DROP;
    content.reason = reason;
    content.protocol = parsed.key.protocol;
    content.flags = parsed.flags;
    content.service = service;
    content.source = parsed.key.src.wide();
    content.destination = parsed.key.dst.wide();
    content.source_port = parsed.key.src_port;
    content.destination_port = parsed.key.dst_port;
    content.length = parsed.total_len;
    content.time = maps::now();
    sample.send();
}
