//! Flows in their tables: states and transitions (RFC 9293 as far as a translator needs it), promotion, closing, touch.
//!
//! The rule above all: an entry's other half is changed, moved or deleted only where it is that flow's (DESIGN.md: "if its
//! key now belongs to another flow, this flow is dropped, never overwritten").

use edge_common::{
    flow::FlowKeyV4,
    maps::{FlowV4, flow_flag},
    verdict::Reason,
};

use super::{
    coverage::Point,
    create::Past,
    decide::{Decision, Input, refuse, send},
    state::{SECOND, State, TABLES, Table, Twin, twin_key},
    wire::{Segment, UDP},
};

/// Bits of the TCP header's flags (RFC 9293).
pub mod bits {
    /// No more data.
    pub const FIN: u8 = 1;
    /// Synchronise.
    pub const SYN: u8 = 2;
    /// Reset.
    pub const RST: u8 = 4;
    /// Acknowledgement counts.
    pub const ACK: u8 = 16;
}
use bits::{ACK, FIN, RST, SYN};

const REPLY: u8 = 1;
const ESTABLISHED: u8 = 2;
const CLOSING: u8 = 3;
/// A touch comes at most this late, seconds.
const LATEST_TOUCH: u64 = 16;

/// A packet after the flow tables were asked.
pub enum Tracked {
    /// Its flow decided.
    Decided(Decision),
    /// It has none, or none any more.
    NoFlow(Option<Past>),
}

/// True where more than `timeout` seconds have passed since `since`.
pub fn expired(since: u64, timeout: u32, now: u64) -> bool {
    now.saturating_sub(since) > u64::from(timeout) * SECOND
}

/// True for a SYN that may start a flow.
pub fn opens(flags: u8) -> bool {
    flags & SYN != 0 && flags & (ACK | RST | FIN) == 0
}

/// Asks the tables for the packet's flow.
pub fn track(state: &mut State, input: &Input, segment: &Segment) -> Tracked {
    let key = &segment.key;
    if segment.ip.fragment {
        // Not by the shortest way, since it is to be remembered; a touch changes what it changes all the same.
        touch(state, key, input.now);
    } else if segment.flags & (SYN | FIN | RST) == 0 && state.flow(Table::Established, key).is_some() {
        state.hit(Point::EstablishedHit);
        match touch(state, key, input.now) {
            Touch::Fine => return Tracked::Decided(send(state, input, segment, Table::Established)),
            Touch::Taken(service) => return Tracked::Decided(refuse(state, Reason::TwinTaken, service)),
            Touch::TooLate => {}
        }
    }
    let tables = [Table::Established, Table::HalfOpen, Table::Closing];
    match tables.into_iter().find_map(|table| Some((table, *state.flow(table, key)?))) {
        Some((table, flow)) => in_table(state, input, segment, table, flow),
        None => Tracked::NoFlow(None),
    }
}

enum Touch {
    Fine,
    Taken(u32),
    TooLate,
}

/// Once a touch is due: refreshes the twin, and lets the route be looked up again.
fn touch(state: &mut State, key: &FlowKeyV4, now: u64) -> Touch {
    let Some(flow) = state.flow(Table::Established, key).copied() else { return Touch::Fine };
    if ((now >> 20) as u32).wrapping_sub(flow.touch_due) > u32::MAX / 2 {
        return Touch::Fine;
    }
    let service = state.config.services.get(&flow.service);
    let timeout = service.map_or(LATEST_TOUCH as u32, |(service, _)| service.established_timeout);
    let late = timeout != 0 && expired(flow.last_seen, timeout, now);
    if late && key.protocol == UDP && flow.direction != REPLY {
        state.hit(Point::TouchTooLate);
        return Touch::TooLate;
    }
    let due = next_touch(state, timeout, now);
    if let Some(flow) = state.change(Table::Established, key) {
        (flow.touch_due, flow.next_hop) = (due, 0);
    }
    match state.twin(Table::Established, &flow) {
        Twin::Ours(twin) => {
            state.hit(Point::TouchedTwin);
            if let Some(twin) = state.change(Table::Established, &twin.key) {
                twin.last_seen = now;
            }
            Touch::Fine
        }
        Twin::Strangers => {
            state.hit(Point::TouchTwinTaken);
            Touch::Taken(flow.service)
        }
        Twin::Missing => {
            let twin = FlowV4 { last_seen: now, touch_due: due, ..turned(&flow) };
            let inserted = insert_established(state, twin);
            let fits = inserted != Insert::Full;
            // A flow is open as long as its client's half is there.
            if inserted == Insert::Done && twin.direction != REPLY {
                state.count(twin.service, twin.backend, |stats| stats.opened += 1);
            }
            state.hit(if fits { Point::RebuiltTwin } else { Point::TwinNotRebuilt });
            Touch::Fine
        }
    }
}

/// The latest tick of the next touch; notes the span it may be chosen from: the last quarter before that.
fn next_touch(state: &mut State, timeout: u32, now: u64) -> u32 {
    let interval = ((u64::from(timeout) * SECOND / 8).min(LATEST_TOUCH * SECOND) >> 20) as u32;
    let latest = ((now >> 20) as u32).wrapping_add(interval);
    state.touch_due = Some((latest.wrapping_sub(interval / 4 + 1), latest.wrapping_add(1)));
    latest
}

/// The other direction's entry, made from this one.
fn turned(flow: &FlowV4) -> FlowV4 {
    FlowV4 {
        key: twin_key(flow),
        new_src: flow.key.dst,
        new_dst: flow.key.src,
        new_src_port: flow.key.dst_port,
        new_dst_port: flow.key.src_port,
        next_hop: 0,
        route_generation: 0,
        direction: REPLY - flow.direction,
        packets: 0,
        bytes: 0,
        ..*flow
    }
}

#[derive(PartialEq, Eq)]
enum Insert {
    Done,
    Exists,
    Full,
}

fn insert_established(state: &mut State, flow: FlowV4) -> Insert {
    if state.flow(Table::Established, &flow.key).is_some() {
        return Insert::Exists;
    }
    if state.table(Table::Established).len() >= state.config.established {
        state.touched.push((Table::Established, flow.key));
        return Insert::Full;
    }
    state.put(Table::Established, flow);
    Insert::Done
}

fn in_table(state: &mut State, input: &Input, segment: &Segment, table: Table, flow: FlowV4) -> Tracked {
    let Some(service) = state.config.services.get(&flow.service).map(|(service, _)| *service) else {
        state.hit(Point::TrackNoService);
        return Tracked::Decided(refuse(state, Reason::NotReady, 0));
    };
    let timeout = match table {
        Table::Established => service.established_timeout,
        Table::HalfOpen => service.half_open_timeout,
        Table::Closing => service.closing_timeout,
    };
    let late = expired(flow.last_seen, timeout, input.now);
    if late && table == Table::Closing {
        state.hit(Point::ClosingExpired);
        state.remove(table, &flow.key);
        return Tracked::NoFlow(None);
    }
    if table == Table::Closing && flow.direction == REPLY && superseded(state, &flow) {
        state.hit(Point::Superseded);
        return Tracked::Decided(refuse(state, Reason::TwinTaken, flow.service));
    }
    let change = transition(segment, table, &flow, late);
    if table == Table::HalfOpen && flow.direction != REPLY && segment.flags & (SYN | ACK | RST) == ACK {
        let expected = flow.flags & flow_flag::SYN_ACK_SEEN != 0;
        let refused = expected && !matches!(change, Change::Promote(_) | Change::Close(_));
        state.coverage.hit_if(Point::AckOutOfWindow, refused);
    }
    let decision = match change {
        Change::Stay => {
            state.hit(Point::Stay);
            send(state, input, segment, table)
        }
        Change::Flag(flags) => {
            flag(state, table, &flow, flags);
            send(state, input, segment, table)
        }
        Change::Expect(floor) => {
            expect(state, table, &flow, floor);
            send(state, input, segment, table)
        }
        Change::Promote(flags) => promote(state, input, segment, flow, flags, service.established_timeout),
        Change::Close(flags) => {
            state.hit(if segment.flags & RST != 0 { Point::CloseReset } else { Point::CloseFin });
            close(state, input.now, table, flow, flags);
            send(state, input, segment, Table::Closing)
        }
        Change::Reopen => {
            state.hit(Point::Reopen);
            return Tracked::NoFlow(Some(reopen(state, input.now, table, &flow)));
        }
    };
    Tracked::Decided(decision)
}

/// True where the client's tuple has a flow by another source by now.
fn superseded(state: &State, closing: &FlowV4) -> bool {
    let client = twin_key(closing);
    [Table::Established, Table::HalfOpen]
        .into_iter()
        .any(|table| state.flow(table, &client).is_some_and(|flow| twin_key(flow) != closing.key))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    Stay,
    Flag(u16),
    Expect(u32),
    Promote(u16),
    Close(u16),
    Reopen,
}

fn transition(segment: &Segment, table: Table, flow: &FlowV4, late: bool) -> Change {
    let from_client = flow.direction != REPLY;
    if segment.key.protocol == UDP {
        return match table {
            _ if from_client && late => Change::Reopen,
            Table::HalfOpen if !from_client => Change::Flag(flow_flag::REPLIED),
            Table::HalfOpen if flow.flags & flow_flag::REPLIED != 0 => Change::Promote(0),
            _ => Change::Stay,
        };
    }
    let flags = segment.flags;
    if from_client && opens(flags) {
        return if late || table == Table::Closing { Change::Reopen } else { Change::Stay };
    }
    if table == Table::Closing {
        return Change::Stay;
    }
    let fin = match (flags & FIN != 0, from_client) {
        (false, _) => 0,
        (true, true) => flow_flag::CLIENT_FIN,
        (true, false) if flow.flags & flow_flag::CLIENT_FIN != 0 => flow_flag::BACKEND_FIN,
        (true, false) => flow_flag::BACKEND_FIN | flow_flag::BACKEND_CLOSED_FIRST,
    };
    let after = flow.flags | fin;
    if flags & RST != 0 {
        return Change::Close(0);
    }
    if after & flow_flag::CLIENT_FIN != 0 && after & flow_flag::BACKEND_FIN != 0 {
        return Change::Close(fin);
    }
    if table == Table::HalfOpen && !from_client && flags & SYN != 0 && flags & ACK != 0 {
        return Change::Expect(segment.seq.wrapping_add(1));
    }
    let acknowledges = from_client && flags & ACK != 0 && flags & SYN == 0;
    if table == Table::HalfOpen && acknowledges && flow.flags & flow_flag::SYN_ACK_SEEN != 0 {
        // [isn + 1, isn + 2^20], modulo 2^32: the floor is isn + 1.
        if segment.ack.wrapping_sub(flow.ack_floor) < 1 << 20 {
            return Change::Promote(fin);
        }
    }
    if after != flow.flags { Change::Flag(fin) } else { Change::Stay }
}

fn flag(state: &mut State, table: Table, flow: &FlowV4, flags: u16) {
    let twin = state.twin(table, flow);
    if let Twin::Ours(twin) = twin {
        state.hit(Point::Flag);
        if let Some(twin) = state.change(table, &twin.key) {
            twin.flags |= flags;
        }
    } else {
        state.hit(Point::FlagWithoutTwin);
        state.touched.push((table, twin_key(flow)));
    }
    if let Some(flow) = state.change(table, &flow.key) {
        flow.flags |= flags;
    }
}

fn expect(state: &mut State, table: Table, reply: &FlowV4, floor: u32) {
    let Twin::Ours(client) = state.twin(table, reply) else {
        state.hit(Point::ExpectWithoutTwin);
        state.touched.push((table, twin_key(reply)));
        return;
    };
    state.hit(Point::Expect);
    if let Some(client) = state.change(table, &client.key) {
        client.ack_floor = floor;
        client.flags |= flow_flag::SYN_ACK_SEEN;
    }
}

fn promote(
    state: &mut State,
    input: &Input,
    segment: &Segment,
    mut flow: FlowV4,
    flags: u16,
    timeout: u32,
) -> Decision {
    flow.flags |= flags;
    let service = flow.service;
    if let Some(entry) = state.change(Table::HalfOpen, &flow.key) {
        entry.flags = flow.flags;
    }
    let due = next_touch(state, timeout, input.now);
    let promoted = |half: FlowV4| FlowV4 { state: ESTABLISHED, sequence: half.sequence + 1, touch_due: due, ..half };
    let twin = match state.twin(Table::HalfOpen, &flow) {
        Twin::Ours(twin) => FlowV4 { flags: twin.flags | flags, ..twin },
        Twin::Missing => {
            state.hit(Point::PromoteRebuiltTwin);
            turned(&flow)
        }
        Twin::Strangers => {
            state.hit(Point::PromoteTwinTaken);
            state.touched.push((Table::HalfOpen, twin_key(&flow)));
            return refuse(state, Reason::TwinTaken, service);
        }
    };
    let twin_added = insert_established(state, promoted(twin));
    if twin_added == Insert::Full {
        state.hit(Point::PromoteFull);
        return refuse(state, Reason::EstablishedFull, service);
    }
    if twin_added == Insert::Exists
        && state.flow(Table::Established, &twin.key).is_some_and(|e| twin_key(e) != flow.key)
    {
        state.hit(Point::PromoteTwinTaken);
        return refuse(state, Reason::TwinTaken, service);
    }
    match insert_established(state, promoted(flow)) {
        Insert::Full => {
            state.hit(Point::PromoteHalfFits);
            state.remove(Table::Established, &twin.key);
            return refuse(state, Reason::EstablishedFull, service);
        }
        Insert::Done => state.count(service, flow.backend, |stats| stats.opened += 1),
        Insert::Exists => {}
    }
    state.hit(if segment.key.protocol == UDP { Point::PromoteUdp } else { Point::PromoteTcp });
    state.remove(Table::HalfOpen, &flow.key);
    state.remove(Table::HalfOpen, &twin.key);
    send(state, input, segment, Table::Established)
}

fn close(state: &mut State, now: u64, table: Table, flow: FlowV4, flags: u16) {
    let closing = |half: FlowV4| FlowV4 {
        state: CLOSING,
        sequence: half.sequence + 1,
        last_seen: now,
        flags: half.flags | flags,
        ..half
    };
    let had_client = has_client(state, table, &flow);
    match state.twin(table, &flow) {
        Twin::Ours(twin) => {
            state.put(Table::Closing, closing(twin));
            state.remove(table, &twin.key);
        }
        Twin::Missing => {
            state.hit(Point::CloseRebuiltTwin);
            state.put(Table::Closing, turned(&closing(flow)));
        }
        Twin::Strangers => {
            state.hit(Point::CloseTwinTaken);
            state.touched.push((table, twin_key(&flow)));
        }
    }
    state.put(Table::Closing, closing(flow));
    state.remove(table, &flow.key);
    if table == Table::Established && had_client {
        state.count(flow.service, flow.backend, |stats| stats.closed += 1);
    }
}

/// True where the client's half of a flow is in the table.
fn has_client(state: &State, table: Table, flow: &FlowV4) -> bool {
    flow.direction != REPLY || matches!(state.twin(table, flow), Twin::Ours(_))
}

/// The client's tuple starts anew: its flow goes, and the reply's entry rests in the closing table.
fn reopen(state: &mut State, now: u64, table: Table, flow: &FlowV4) -> Past {
    if table == Table::Established && has_client(state, table, flow) {
        state.count(flow.service, flow.backend, |stats| stats.closed += 1);
    }
    if table != Table::Closing {
        if let Twin::Strangers = state.twin(table, flow) {
            state.hit(Point::ReopenTwinTaken);
            state.touched.push((table, twin_key(flow)));
        } else {
            let rest = turned(flow);
            state.put(Table::Closing, FlowV4 { state: CLOSING, sequence: rest.sequence + 1, last_seen: now, ..rest });
            state.remove(table, &rest.key);
        }
    }
    state.remove(table, &flow.key);
    Past { backend: flow.backend, address: flow.new_src, port: flow.new_src_port }
}

/// True where no table has an entry of this key.
pub fn unknown(state: &State, key: &FlowKeyV4) -> bool {
    TABLES.into_iter().all(|table| state.flow(table, key).is_none())
}
