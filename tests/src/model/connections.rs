//! Flows in their tables: states and transitions (RFC 9293 as far as a translator needs it), promotion, closing, touch.
//!
//! The rule above all: an entry's other half is changed, moved or deleted only where it is that flow's (DESIGN.md: "if its
//! key now belongs to another flow, this flow is dropped, never overwritten").

use edge_common::{maps::flow_flag, verdict::Reason};

use super::{
    choose,
    coverage::Point,
    create::Past,
    decide::{Decision, Input, refuse, send},
    flow::{Flow, Key},
    protect,
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
#[allow(clippy::large_enum_variant, reason = "lives on the stack for a moment")]
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
    } else if segment.flags & (SYN | FIN | RST) == 0
        && !segment.lacks_checksum
        && state.flow(Table::Established, key).is_some()
    {
        state.hit(Point::EstablishedHit);
        match touch(state, key, input.now) {
            Touch::Fine => {
                let flow = state.flow(Table::Established, key).copied();
                if let Some(flow) = flow.filter(|flow| !protect::keeps_pace(state, input, flow)) {
                    return Tracked::Decided(refuse(state, Reason::SourcePacketRate, flow.service));
                }
                return Tracked::Decided(send(state, input, segment, Table::Established));
            }
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
fn touch(state: &mut State, key: &Key, now: u64) -> Touch {
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
    let limited = service.is_some_and(|(service, _)| service.source_packet_rate != 0);
    let due = next_touch(state, timeout, now);
    if let Some(flow) = state.change(Table::Established, key) {
        (flow.touch_due, flow.next_hop) = (due, 0);
        if limited {
            // A limit is for the flows that it finds, too.
            flow.flags |= flow_flag::PACKET_LIMIT;
        }
    }
    let flow = state.flow(Table::Established, key).copied().unwrap_or(flow);
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
            let twin = Flow { last_seen: now, touch_due: due, ..turned(&flow) };
            let inserted = insert_established(state, twin);
            let fits = inserted != Insert::Full;
            // A flow is open as long as its client's half is there.
            if inserted == Insert::Done && twin.direction != REPLY {
                choose::opened(state, twin.service, twin.backend);
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
fn turned(flow: &Flow) -> Flow {
    Flow {
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

fn insert_established(state: &mut State, flow: Flow) -> Insert {
    if state.flow(Table::Established, &flow.key).is_some() {
        return Insert::Exists;
    }
    if state.is_full(Table::Established, flow.key.v6) {
        state.touched.push((Table::Established, flow.key));
        return Insert::Full;
    }
    state.put(Table::Established, flow);
    Insert::Done
}

fn in_table(state: &mut State, input: &Input, segment: &Segment, table: Table, flow: Flow) -> Tracked {
    let Some(service) = state.config.services.get(&flow.service).map(|(service, _)| *service) else {
        state.hit(Point::TrackNoService);
        return Tracked::Decided(refuse(state, Reason::NotReady, 0));
    };
    if segment.lacks_checksum {
        state.hit(Point::FlowNoChecksum);
        return Tracked::Decided(refuse(state, Reason::Malformed, flow.service));
    }
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
    if !protect::keeps_pace(state, input, &flow) {
        return Tracked::Decided(refuse(state, Reason::SourcePacketRate, flow.service));
    }
    let counted = flow.flags & flow_flag::PACKET_LIMIT != 0 && service.source_packet_rate != 0;
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
        Change::Promote(flags) => {
            let promoted = promote(state, input, segment, table, flow, flags);
            if promoted.is_ok() {
                choose::proved(state, input, &service, &flow);
            }
            established(state, input, segment, flow.service, promoted)
        }
        Change::OneSided(flags) => {
            state.hit(if flow.direction == REPLY { Point::PromoteAdopted } else { Point::PromoteOneSided });
            let promoted = promote(state, input, segment, table, flow, flags);
            established(state, input, segment, flow.service, promoted)
        }
        Change::Restore => {
            state.hit(Point::Restore);
            let promoted = promote(state, input, segment, table, flow, 0);
            established(state, input, segment, flow.service, promoted)
        }
        Change::Repeat(times) => {
            state.hit(Point::RepeatedSyn);
            if let Some(flow) = state.change(table, &flow.key) {
                flow.ack_floor = times;
            }
            send(state, input, segment, table)
        }
        Change::Note(flags) => {
            state.hit(Point::NotedAck);
            flag(state, table, &flow, flags);
            if let Some(flow) = state.change(table, &flow.key) {
                flow.flags |= flow_flag::CLIENT_ACKED;
                flow.ack_floor = segment.ack;
            }
            send(state, input, segment, table)
        }
        Change::Close(flags) => {
            state.hit(if segment.flags & RST != 0 { Point::CloseReset } else { Point::CloseFin });
            close(state, input, table, flow, flags);
            send(state, input, segment, Table::Closing)
        }
        Change::Reopen => {
            state.hit(Point::Reopen);
            let past = reopen(state, input, table, &flow);
            return Tracked::NoFlow(Some(Past { counted, ..past }));
        }
        Change::Elsewhere => {
            state.hit(Point::Elsewhere);
            let past = reopen(state, input, table, &flow);
            return Tracked::NoFlow(Some(Past { avoid: past.backend, counted, ..past }));
        }
    };
    Tracked::Decided(decision)
}

/// True where the client's tuple has a flow by another source by now.
fn superseded(state: &State, closing: &Flow) -> bool {
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
    /// The client's SYN came again, so many times; nobody has answered.
    Repeat(u32),
    /// Once too often: to another backend.
    Elsewhere,
    /// Remember what the client acknowledges.
    Note(u16),
    /// Promoted on the word of one side.
    OneSided(u16),
    /// The reset was forged.
    Restore,
}

/// SYNs repeated in vain after which a client gets another backend.
const RETRIES: u32 = 2;
/// The same where the answer may have gone by another edge.
const RETRIES_CROSSING: u32 = 4;

/// A client's SYN on a flow that lives.
fn again(table: Table, flow: &Flow) -> Change {
    if table != Table::HalfOpen || flow.flags & (flow_flag::SYN_ACK_SEEN | flow_flag::CLIENT_ACKED) != 0 {
        return Change::Stay;
    }
    let most = if flow.flags & flow_flag::CROSSING != 0 { RETRIES_CROSSING } else { RETRIES };
    if flow.ack_floor + 1 < most { Change::Repeat(flow.ack_floor + 1) } else { Change::Elsewhere }
}

/// A client's acknowledgement while its flow is half-open: of the SYN-ACK, or where that may have gone by another edge, of the
/// same thing as the one before.
fn client_acknowledges(segment: &Segment, flow: &Flow, fin: u16) -> Option<Change> {
    // [floor, floor + 2^20), modulo 2^32.
    let in_window = segment.ack.wrapping_sub(flow.ack_floor) < 1 << 20;
    if flow.flags & flow_flag::SYN_ACK_SEEN != 0 {
        return in_window.then_some(Change::Promote(fin));
    }
    if flow.flags & flow_flag::CROSSING == 0 {
        return None;
    }
    let second = flow.flags & flow_flag::CLIENT_ACKED != 0 && in_window;
    Some(if second { Change::OneSided(fin) } else { Change::Note(fin) })
}

fn transition(segment: &Segment, table: Table, flow: &Flow, late: bool) -> Change {
    let from_client = flow.direction != REPLY;
    if segment.key.protocol == UDP {
        return match table {
            _ if from_client && late => Change::Reopen,
            Table::Closing if from_client => Change::Reopen,
            Table::HalfOpen if !from_client && flow.flags & flow_flag::ONE_REPLY != 0 => {
                Change::Close(flow_flag::REPLIED)
            }
            Table::HalfOpen if !from_client => Change::Flag(flow_flag::REPLIED),
            Table::HalfOpen if flow.flags & flow_flag::REPLIED != 0 => Change::Promote(0),
            _ => Change::Stay,
        };
    }
    let flags = segment.flags;
    if from_client && opens(flags) {
        return if late || table == Table::Closing { Change::Reopen } else { again(table, flow) };
    }
    let reset_by = if from_client { flow_flag::RESET_BY_CLIENT } else { flow_flag::RESET_BY_BACKEND };
    if table == Table::Closing {
        // Whoever resets a connection says nothing else of it (RFC 9293, 3.10.7.1).
        let goes_on = flags & (SYN | RST) == 0 && flow.flags & reset_by != 0;
        return if goes_on { Change::Restore } else { Change::Stay };
    }
    let fin = match (flags & FIN != 0, from_client) {
        (false, _) => 0,
        (true, true) => flow_flag::CLIENT_FIN,
        (true, false) if flow.flags & flow_flag::CLIENT_FIN != 0 => flow_flag::BACKEND_FIN,
        (true, false) => flow_flag::BACKEND_FIN | flow_flag::BACKEND_CLOSED_FIRST,
    };
    let after = flow.flags | fin;
    if flags & RST != 0 {
        return Change::Close(if table == Table::Established { reset_by } else { 0 });
    }
    if after & flow_flag::CLIENT_FIN != 0 && after & flow_flag::BACKEND_FIN != 0 {
        return Change::Close(fin);
    }
    if table == Table::HalfOpen && !from_client && flags & SYN != 0 && flags & ACK != 0 {
        return Change::Expect(segment.seq.wrapping_add(1));
    }
    if table == Table::HalfOpen && flags & (SYN | ACK) == ACK {
        if !from_client && flow.flags & flow_flag::ADOPTED != 0 {
            return Change::OneSided(fin);
        }
        if from_client && let Some(change) = client_acknowledges(segment, flow, fin) {
            return change;
        }
    }
    if after != flow.flags { Change::Flag(fin) } else { Change::Stay }
}

fn flag(state: &mut State, table: Table, flow: &Flow, flags: u16) {
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

fn expect(state: &mut State, table: Table, reply: &Flow, floor: u32) {
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

/// Sends the packet of a flow that was promoted.
fn established(
    state: &mut State,
    input: &Input,
    segment: &Segment,
    service: u32,
    promoted: Result<(), Reason>,
) -> Decision {
    match promoted {
        Ok(()) => send(state, input, segment, Table::Established),
        Err(reason) => refuse(state, reason, service),
    }
}

fn promote(
    state: &mut State,
    input: &Input,
    segment: &Segment,
    from: Table,
    mut flow: Flow,
    flags: u16,
) -> Result<(), Reason> {
    flow.flags |= flags;
    let service = flow.service;
    let timeout = state.config.services.get(&service).map_or(0, |(service, _)| service.established_timeout);
    if let Some(entry) = state.change(from, &flow.key) {
        entry.flags = flow.flags;
    }
    if from == Table::Closing && state.flow(Table::HalfOpen, &twin_key(&flow)).is_some() {
        state.hit(Point::RestoreTwinTaken);
        state.touched.push((Table::HalfOpen, twin_key(&flow)));
        return Err(Reason::TwinTaken);
    }
    let due = next_touch(state, timeout, input.now);
    let promoted = |half: Flow| Flow {
        state: ESTABLISHED,
        sequence: half.sequence + 1,
        touch_due: due,
        flags: half.flags & !(flow_flag::RESET_BY_CLIENT | flow_flag::RESET_BY_BACKEND),
        ..half
    };
    let twin = match state.twin(from, &flow) {
        Twin::Ours(twin) => Flow { flags: twin.flags | flags, ..twin },
        Twin::Missing => {
            state.hit(Point::PromoteRebuiltTwin);
            turned(&flow)
        }
        Twin::Strangers => {
            state.hit(Point::PromoteTwinTaken);
            state.touched.push((from, twin_key(&flow)));
            return Err(Reason::TwinTaken);
        }
    };
    let twin_added = insert_established(state, promoted(twin));
    if twin_added == Insert::Full {
        state.hit(Point::PromoteFull);
        return Err(Reason::EstablishedFull);
    }
    if twin_added == Insert::Exists
        && state.flow(Table::Established, &twin.key).is_some_and(|e| twin_key(e) != flow.key)
    {
        state.hit(Point::PromoteTwinTaken);
        return Err(Reason::TwinTaken);
    }
    let own_added = insert_established(state, promoted(flow));
    if own_added == Insert::Full {
        state.hit(Point::PromoteHalfFits);
        state.remove(Table::Established, &twin.key);
        return Err(Reason::EstablishedFull);
    }
    // A flow is open as long as its client's half is there.
    let client_added = if flow.direction == REPLY { twin_added } else { own_added };
    if client_added == Insert::Done {
        choose::opened(state, service, flow.backend);
        if from == Table::HalfOpen {
            protect::half_open_ended(state, input, &flow);
        }
    }
    state.hit(if segment.key.protocol == UDP { Point::PromoteUdp } else { Point::PromoteTcp });
    state.remove(from, &flow.key);
    state.remove(from, &twin.key);
    Ok(())
}

fn close(state: &mut State, input: &Input, table: Table, flow: Flow, flags: u16) {
    let closing = |half: Flow| Flow {
        state: CLOSING,
        sequence: half.sequence + 1,
        last_seen: input.now,
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
    if table == Table::HalfOpen {
        protect::half_open_ended(state, input, &flow);
    }
    if table == Table::Established && had_client {
        choose::closed(state, flow.service, flow.backend);
    }
}

/// True where the client's half of a flow is in the table.
fn has_client(state: &State, table: Table, flow: &Flow) -> bool {
    flow.direction != REPLY || matches!(state.twin(table, flow), Twin::Ours(_))
}

/// The client's tuple starts anew: its flow goes, and the reply's entry rests in the closing table.
fn reopen(state: &mut State, input: &Input, table: Table, flow: &Flow) -> Past {
    if table == Table::HalfOpen {
        protect::half_open_ended(state, input, flow);
    }
    if table == Table::Established && has_client(state, table, flow) {
        choose::closed(state, flow.service, flow.backend);
    }
    if table != Table::Closing {
        if let Twin::Strangers = state.twin(table, flow) {
            state.hit(Point::ReopenTwinTaken);
            state.touched.push((table, twin_key(flow)));
        } else {
            let rest = turned(flow);
            state.put(
                Table::Closing,
                Flow { state: CLOSING, sequence: rest.sequence + 1, last_seen: input.now, ..rest },
            );
            state.remove(table, &rest.key);
        }
    }
    state.remove(table, &flow.key);
    Past { backend: flow.backend, address: flow.new_src, port: flow.new_src_port, avoid: 0, counted: false }
}

/// True where no table has an entry of this key.
pub fn unknown(state: &State, key: &Key) -> bool {
    TABLES.into_iter().all(|table| state.flow(table, key).is_none())
}
