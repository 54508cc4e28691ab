//! Carries out what `edge_common::conntrack` decides: moves between the tables, flags on both halves, touch.

use edge_common::{
    conntrack::{self, Direction, State, Step, next_touch, tcp_flag::RST},
    flow::{FlowKey, UDP},
    maps::{Flow, ServiceEntry, flow_flag},
    verdict::{Reason, Verdict},
};

use crate::{
    cache, events,
    family::Family,
    maps::{self, EEXIST, ENOENT, Table, events::Perhaps, scratch::scratch},
    parse::Parsed,
    protect, select,
    stats::{because, count_closed, count_opened},
};

/// The packet has no flow (any more).
pub const NO_FLOW: Verdict = Verdict::UNDECIDED;
/// The packet is to be sent on its way, by the entry in the table that was noted.
pub const FORWARD: Verdict = Verdict::FORWARD;

/// A packet that may change its flow's state: [`FORWARD`] by the entry in `place`, or why not; [`NO_FLOW`] where it has none,
/// or none any more.
#[inline(always)]
pub fn tracked<A: Family>(parsed: &Parsed<A>, place: &mut Table, past: &mut Past<A>) -> Verdict {
    let key = &parsed.key;
    // By value as well: of a number read back from `place` the verifier knows nothing.
    if let Some(flow) = maps::flow(Table::Established, key) {
        cache::settle(flow);
        *place = Table::Established;
        return track(parsed, flow, Table::Established, place, past);
    }
    if let Some(flow) = maps::flow(Table::HalfOpen, key) {
        *place = Table::HalfOpen;
        return track(parsed, flow, Table::HalfOpen, place, past);
    }
    match maps::flow(Table::Closing, key) {
        Some(flow) => {
            *place = Table::Closing;
            track(parsed, flow, Table::Closing, place, past)
        }
        None => NO_FLOW,
    }
}

/// The flow that the same client tuple had before, whose SNAT port the new one should have.
pub struct Past<A> {
    /// The service of the new flow, once known.
    pub service: u32,
    /// Its backend; 0: there was none.
    pub backend: u32,
    /// Its SNAT address, network order.
    pub address: A,
    /// Its SNAT port, network order.
    pub port: u16,
    /// The backend that is not to have the new flow while there is another, since it has not answered; 0: none.
    pub avoid: u32,
    /// The packet that ended it kept to the packet rate of its source.
    pub counted: bool,
}

impl<A: Family> Past<A> {
    /// A tuple seen for the first time.
    #[inline(always)]
    pub fn none() -> Self {
        Self { service: 0, backend: 0, address: A::default(), port: 0, avoid: 0, counted: false }
    }
}

/// A packet that hit an entry of `table` and may change its flow's state, or that hit one outside the established table.
#[inline(never)]
fn track<A: Family>(
    parsed: &Parsed<A>,
    flow: &mut Flow<A>,
    table: Table,
    place: &mut Table,
    past: &mut Past<A>,
) -> Verdict {
    let Some(service) = maps::service(flow.service) else {
        return because(Reason::NotReady, 0);
    };
    if parsed.lacks_checksum {
        return because(Reason::Malformed, flow.service);
    }
    let now = maps::now();
    let expired = conntrack::expired(flow.last_seen, timeout(service, table), now);
    if expired && table == Table::Closing {
        maps::remove_flow(Table::Closing, &parsed.key);
        return NO_FLOW;
    }
    let counted = flow.flags & flow_flag::PACKET_LIMIT != 0;
    if counted && !protect::packet_admitted(parsed.key.src, flow) {
        return because(Reason::SourcePacketRate, flow.service);
    }
    let direction = Direction::from_number(flow.direction);
    let state = match table {
        Table::Established => State::Established,
        Table::HalfOpen => State::HalfOpen,
        Table::Closing => State::Closing,
    };
    if table == Table::Closing && direction == Direction::Reply && superseded(parsed, flow) {
        return because(Reason::TwinTaken, flow.service);
    }
    match conntrack::step(state, direction, flow.flags, flow.ack_floor, expired, &parsed.segment()) {
        Step::Stay => FORWARD,
        Step::Repeat(times) => {
            flow.ack_floor = times;
            events::repeated(flow);
            FORWARD
        }
        Step::Note(ack, flags) => {
            note(flow, table, ack, flags);
            FORWARD
        }
        Step::Flag(flags) => {
            flow.flags |= flags;
            if let Some(twin) = own_twin(table, flow) {
                twin.flags |= flags;
            }
            if flags & flow_flag::REPLIED != 0 {
                events::answered(flow);
            }
            FORWARD
        }
        Step::Expect(floor) => {
            if let Some(client) = own_twin(table, flow) {
                client.ack_floor = floor;
                client.flags |= flow_flag::SYN_ACK_SEEN;
            }
            events::answered(flow);
            FORWARD
        }
        Step::Promote(flags) => {
            let (number, backend) = (flow.service, flow.backend);
            let verdict = promote(parsed, flow, flags, table);
            if verdict != MOVED {
                return verdict;
            }
            select::promoted(number, service.affinity_timeout, parsed.key.src, backend);
            *place = Table::Established;
            FORWARD
        }
        Step::PromoteOneSided(flags) => {
            if !maps::may_promote_one_sided() {
                unproved(parsed, flow, table, direction, flags);
                return FORWARD;
            }
            let verdict = promote(parsed, flow, flags, table);
            if verdict == MOVED {
                *place = Table::Established;
                return FORWARD;
            }
            verdict
        }
        Step::Restore => {
            let verdict = promote(parsed, flow, 0, table);
            if verdict == MOVED {
                *place = Table::Established;
                return FORWARD;
            }
            verdict
        }
        Step::Close(flags) => {
            if direction == Direction::Reply && parsed.flags & RST != 0 {
                events::reset_by_backend(flow);
            }
            if close(parsed, flow, flags, table) {
                *place = Table::Closing;
            }
            FORWARD
        }
        step @ (Step::Reopen | Step::Elsewhere) => {
            *past = Past {
                service: flow.service,
                backend: flow.backend,
                address: flow.new_src,
                port: flow.new_src_port,
                avoid: if matches!(step, Step::Elsewhere) { flow.backend } else { 0 },
                counted,
            };
            reopen(parsed, flow, table);
            NO_FLOW
        }
    }
}

/// Remembers what the client acknowledged, where no SYN-ACK was seen.
#[inline(never)]
fn note<A: Family>(flow: &mut Flow<A>, table: Table, ack: u32, flags: u16) {
    flow.ack_floor = ack;
    flow.flags |= flags | flow_flag::CLIENT_ACKED;
    if flags != 0
        && let Some(twin) = own_twin(table, flow)
    {
        twin.flags |= flags;
    }
}

/// A flow that would be promoted as seen from one side, had the quota room: the other side may still prove it.
#[inline(never)]
fn unproved<A: Family>(parsed: &Parsed<A>, flow: &mut Flow<A>, table: Table, direction: Direction, flags: u16) {
    if direction == Direction::Forward {
        return note(flow, table, parsed.ack, flags);
    }
    flow.flags |= flags;
    if let Some(client) = own_twin(table, flow) {
        client.ack_floor = conntrack::floor_of(&parsed.segment());
        client.flags |= flags | flow_flag::SYN_ACK_SEEN;
    }
}

/// A flow's other half. An LRU table may have evicted it, and its key may belong to another flow since, which is not to be
/// touched.
#[inline(always)]
fn own_twin<A: Family>(table: Table, flow: &Flow<A>) -> Option<&'static mut Flow<A>> {
    maps::flow(table, &flow.twin()).filter(|twin| twin.twin() == flow.key)
}

/// True where the client's tuple has a new flow, to which a late packet of the old backend does not belong.
#[inline(never)]
fn superseded<A: Family>(parsed: &Parsed<A>, closing: &Flow<A>) -> bool {
    let client = closing.twin();
    let other = |flow: &mut Flow<A>| flow.twin() != parsed.key;
    maps::flow(Table::Established, &client).is_some_and(other)
        || maps::flow(Table::HalfOpen, &client).is_some_and(other)
}

/// The entry is in another table now.
const MOVED: Verdict = Verdict::UNDECIDED;

#[inline(always)]
fn timeout(service: &ServiceEntry, table: Table) -> u32 {
    match table {
        Table::Established => service.established_timeout,
        Table::HalfOpen => service.half_open_timeout,
        Table::Closing => service.closing_timeout,
    }
}

/// Half-open or closing to established: both halves in, then both out.
#[inline(never)]
fn promote<A: Family>(parsed: &Parsed<A>, flow: &mut Flow<A>, flags: u16, from: Table) -> Verdict {
    let (service, backend, of_client) = (flow.service, flow.backend, flow_of_client(flow));
    let established_timeout = maps::service(service).map_or(conntrack::TOUCH_SECONDS, |it| it.established_timeout);
    let twin_key = flow.twin();
    flow.flags |= flags;
    // A closing flow's other half may have been evicted, and its key be another flow's in the table of those that begin.
    if from == Table::Closing && maps::flow(Table::HalfOpen, &twin_key).is_some() {
        return because(Reason::TwinTaken, service);
    }
    let touch_due = next_touch(maps::now(), established_timeout, jitter(&flow.key));
    let added = match maps::flow(from, &twin_key) {
        Some(twin) if twin.twin() == parsed.key => add_established(twin, flags, touch_due),
        Some(_) => return because(Reason::TwinTaken, service),
        None => add_missing_twin(flow, touch_due),
    };
    if added != 0 && added != EEXIST {
        return because(Reason::EstablishedFull, service);
    }
    if added == EEXIST && !belongs_to(Table::Established, &twin_key, &parsed.key) {
        return because(Reason::TwinTaken, service);
    }
    let own = add_established(flow, 0, touch_due);
    // EEXIST: another CPU promoted it just now.
    if own != 0 && own != EEXIST {
        maps::remove_flow(Table::Established, &twin_key);
        return because(Reason::EstablishedFull, service);
    }
    // The client's half stands for the flow: however many CPUs promote it at once, it is added, and counted, once.
    if (if of_client { own } else { added }) == 0 {
        count_opened(service, backend);
        if from == Table::HalfOpen {
            protect::half_open_ended(flow);
        }
    }
    maps::remove_flow(from, &parsed.key);
    maps::remove_flow(from, &twin_key);
    MOVED
}

/// A copy of a half-open entry into the established table; 0 or an errno.
#[inline(never)]
fn add_established<A: Family>(half_open: &Flow<A>, flags: u16, touch_due: u32) -> i32 {
    let Some(flow) = scratch(half_open) else {
        return ENOENT;
    };
    flow.state = State::Established as u8;
    flow.sequence = flow.sequence.wrapping_add(1);
    flow.flags = (flow.flags | flags) & !flow_flag::RESET;
    flow.touch_due = touch_due;
    insert(Table::Established, flow)
}

/// As [`add_established`], for a twin that the half-open table has evicted.
#[inline(never)]
fn add_missing_twin<A: Family>(flow: &Flow<A>, touch_due: u32) -> i32 {
    let Some(twin) = scratch(flow) else {
        return ENOENT;
    };
    turn(twin);
    twin.state = State::Established as u8;
    twin.sequence = twin.sequence.wrapping_add(1);
    twin.flags &= !flow_flag::RESET;
    twin.touch_due = touch_due;
    insert(Table::Established, twin)
}

/// Makes a copy of an entry the other direction's.
#[inline(always)]
pub fn turn<A: Family>(flow: &mut Flow<A>) {
    flow.turn();
}

#[inline(always)]
fn insert<A: Family>(table: Table, flow: &Flow<A>) -> i32 {
    match maps::add_flow(table, flow) {
        Ok(()) => 0,
        Err(errno) => errno,
    }
}

#[inline(always)]
fn belongs_to<A: Family>(table: Table, key: &FlowKey<A>, twin: &FlowKey<A>) -> bool {
    maps::flow(table, key).is_some_and(|entry| entry.twin() == *twin)
}

#[inline(always)]
fn jitter<A: Family>(key: &FlowKey<A>) -> u32 {
    (key.src.mixed() ^ u32::from(key.src_port) ^ u32::from(key.dst_port)).wrapping_mul(0x9e37_79b1) >> 24
}

/// To the closing table: both halves in, then both out. False where the closing table refused: the flow then stays,
/// and expires where it is.
#[inline(never)]
fn close<A: Family>(parsed: &Parsed<A>, flow: &mut Flow<A>, flags: u16, table: Table) -> bool {
    let (service, backend) = (flow.service, flow.backend);
    let twin_key = flow.twin();
    flow.flags |= flags;
    let mut alone = false;
    let refused = match maps::flow(table, &twin_key) {
        Some(twin) if twin.twin() == parsed.key => {
            if table == Table::Established {
                cache::settle(twin);
            }
            twin.flags |= flags;
            put_closing(twin)
        }
        // Another flow's by now: only this half closes.
        Some(_) => {
            alone = true;
            0
        }
        None => put_closing_twin(flow),
    };
    if refused != 0 || put_closing(flow) != 0 {
        return false;
    }
    let record = events::begin(flow, table, Some(parsed));
    // The client's half stands for the flow: however many CPUs close it at once, it is removed, and counted, once.
    let of_client = flow_of_client(flow);
    let twin = !alone && maps::remove_flow(table, &twin_key);
    let own = maps::remove_flow(table, &parsed.key);
    let ended = if of_client { own } else { twin };
    // Sent where this CPU took the client's half out, so that a flow that two CPUs end has one record.
    record.end(ended);
    if table == Table::HalfOpen {
        protect::half_open_ended(flow);
    }
    if table == Table::Established && ended {
        count_closed(service, backend);
    }
    true
}

#[inline(always)]
fn flow_of_client<A: Family>(flow: &Flow<A>) -> bool {
    flow.direction == Direction::Forward as u8
}

/// Copies an entry into the closing table; 0, or 1 where that refuses.
#[inline(never)]
fn put_closing<A: Family>(flow: &Flow<A>) -> u32 {
    let Some(closing) = scratch(flow) else {
        return 1;
    };
    closing.state = State::Closing as u8;
    closing.sequence = closing.sequence.wrapping_add(1);
    closing.last_seen = maps::now();
    u32::from(!maps::put_closing(closing))
}

/// As [`put_closing`], the other direction's entry.
#[inline(never)]
fn put_closing_twin<A: Family>(flow: &Flow<A>) -> u32 {
    let Some(closing) = scratch(flow) else {
        return 1;
    };
    turn(closing);
    closing.state = State::Closing as u8;
    closing.sequence = closing.sequence.wrapping_add(1);
    closing.last_seen = maps::now();
    u32::from(!maps::put_closing(closing))
}

/// Takes a flow of the past out, so that its client's SYN can start a new one. Its SNAT port rests for everybody
/// else; the same client may have it again, since a TIME_WAIT takes a larger timestamp or sequence number of the
/// same tuple.
#[inline(never)]
fn reopen<A: Family>(parsed: &Parsed<A>, flow: &Flow<A>, table: Table) {
    let (service, backend, of_client) = (flow.service, flow.backend, flow_of_client(flow));
    let record = if table == Table::Established { events::begin(flow, table, None) } else { Perhaps::none() };
    if table == Table::HalfOpen {
        protect::half_open_ended(flow);
    }
    let mut twin = false;
    if table != Table::Closing {
        let twin_key = flow.twin();
        // Where that is another flow's by now, there is no port to rest.
        if maps::flow(table, &twin_key).is_none_or(|twin| twin.twin() == parsed.key) {
            put_closing_twin(flow);
            twin = maps::remove_flow(table, &twin_key);
        }
    }
    let own = maps::remove_flow(table, &parsed.key);
    let ended = if of_client { own } else { twin };
    record.end(ended);
    if table == Table::Established && ended {
        count_closed(service, backend);
    }
}

/// What [`touch`] did; a number, so that a BPF function can return it.
pub mod touched {
    /// Both halves are fresh.
    pub const DONE: u32 = 0;
    /// The twin's key belongs to another flow by now.
    pub const TWIN_TAKEN: u32 = 1;
    /// The flow had been idle for too long.
    pub const TOO_LATE: u32 = 2;
}

/// Refreshes the twin, so that a flow which only one side uses does not expire, and has the route looked up again.
/// Changes nothing where a client's datagram comes after the idle timeout: that starts a new flow. A packet that is not
/// late needs no such check, since a touch is due long before a timeout has passed.
#[inline(never)]
pub fn touch<A: Family>(parsed: &Parsed<A>, flow: &mut Flow<A>, now: u64) -> u32 {
    let seconds = maps::service(flow.service).map_or(conntrack::TOUCH_SECONDS, |service| service.established_timeout);
    let from_client = flow.direction == Direction::Forward as u8;
    if parsed.key.protocol == UDP && from_client && seconds != 0 && conntrack::expired(flow.last_seen, seconds, now) {
        return touched::TOO_LATE;
    }
    flow.touch_due = next_touch(now, seconds, jitter(&flow.key));
    let limited = maps::service(flow.service).is_some_and(|service| service.source_packet_rate != 0);
    if limited && flow.flags & flow_flag::PACKET_LIMIT == 0 {
        // A limit that came with a reload counts for the flows that it found.
        flow.flags |= flow_flag::PACKET_LIMIT;
        maps::changed(&flow.key);
    }
    flow.next_hop = 0;
    let twin_key = flow.twin();
    match maps::flow(Table::Established, &twin_key) {
        Some(twin) if twin.twin() == parsed.key => {
            twin.last_seen = now;
            touched::DONE
        }
        None if rebuild_twin(flow, now) => touched::DONE,
        _ => touched::TWIN_TAKEN,
    }
}

#[inline(never)]
fn rebuild_twin<A: Family>(flow: &Flow<A>, now: u64) -> bool {
    let Some(twin) = scratch(flow) else {
        return false;
    };
    turn(twin);
    twin.last_seen = now;
    let added = insert(Table::Established, twin);
    if added == 0 && flow_of_client(twin) {
        count_opened(twin.service, twin.backend);
    }
    // A full table is no reason to drop this packet: the next touch tries again.
    added != EEXIST
}
