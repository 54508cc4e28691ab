//! New flows: backend, SNAT port, and the two half-open entries.

use edge_common::{
    address::is_none,
    conntrack::{Direction, State, expired, rest_seconds},
    flow::{FlowKey, UDP},
    hash::{scatter, spread},
    maps::{BackendEntry, Flow, SNAT_ADDRESSES, ServiceEntry, flow_flag, mode, service_flag},
    verdict::{Question, Reason, Verdict},
};

use crate::{
    conntrack::Past,
    family::Family,
    maps::{self, EEXIST, ENOENT, Table, scratch},
    parse::Parsed,
    protect, select,
    stats::{because, count_half_opened},
};

/// SNAT candidates tried for one flow. With a share `p` of the usable ports taken at random all fail with probability
/// `p^n` for `n` usable candidates. Where every port may be used, `n` is 16: 50 % full 0.0015 %, 75 % full 1 %, 90 % full
/// 19 %. Beside the kernel's default ephemeral range it is 9: 0.2 %, 8 %, 39 %.
const PROBES: u32 = 16;
/// From this probe on a half-open flow that has stalled gives its port up. A flood of forged SYNs takes every port within
/// a second, and each would rest for as long as a half-open flow lives; an honest client answers within a round trip.
const PRESSED: u32 = 8;
/// How long a client may take to answer before it counts as stalled, ns.
const STALLED: u64 = 200_000_000;
/// Candidates that come from the backend's cursor before the rest are scattered.
const FROM_CURSOR: u32 = 4;

/// Both entries of the packet's flow are there: the stage `send` sends it.
pub const CREATED: Verdict = Verdict::UNDECIDED;

/// Starts a flow for the client's packet: [`CREATED`], or why not.
#[inline(never)]
pub fn flow<A: Family>(parsed: &Parsed<A>, past: &Past<A>) -> Verdict {
    let service_number = past.service;
    if parsed.ttl <= 1 {
        return Verdict::answer(Question::TimeExceeded, service_number, 0);
    }
    // A flow that ended just now may have stood before a half-open one of the same tuple: that one goes on.
    if past.backend != 0 && maps::flow(Table::HalfOpen, &parsed.key).is_some() {
        return CREATED;
    }
    let Some(service) = maps::service(service_number) else {
        return because(Reason::NotReady, service_number);
    };
    let backend_number = select::backend(service_number, service, &parsed.key, past.avoid);
    if backend_number == select::NONE || backend_number == select::FULL {
        let reason = if backend_number == select::NONE { Reason::NoBackend } else { Reason::BackendsFull };
        return because(reason, service_number);
    }
    let Some(backend) = maps::backend(backend_number) else {
        return because(Reason::NotReady, service_number);
    };
    let mut plan = Plan {
        key: parsed.key,
        new_src: parsed.key.src,
        new_dst: A::narrow(&backend.address),
        new_src_port: parsed.key.src_port,
        new_dst_port: backend.port_for(parsed.key.dst_port),
        service: service_number,
        backend: backend_number,
        flags: flags(service, parsed.key.protocol),
        ack_floor: 0,
        // Connect times are measured from here.
        now: maps::events::precise_now(),
    };
    let failed = open(&mut plan, service, backend, past);
    if failed != OPENED && failed != JOINED {
        return match failed {
            NO_SNAT_ADDRESS => because(Reason::NoSnatAddress, service_number),
            TAKEN => because(Reason::TwinTaken, service_number),
            EXHAUSTED => because(Reason::SnatExhausted, service_number),
            _ => because(Reason::HalfOpenFull, service_number),
        };
    }
    if past.avoid != 0 && past.avoid != backend_number {
        because(Reason::RetriedElsewhere, service_number);
    }
    if failed == OPENED {
        count_half_opened(service_number, backend_number);
        protect::half_opened(parsed.key.src, service_number);
        select::begun(backend_number, backend.limit, plan.now);
    }
    CREATED
}

/// What a new flow's entries are marked with.
#[inline(always)]
pub fn flags(service: &ServiceEntry, protocol: u8) -> u16 {
    let mut flags = if service.source_packet_rate == 0 { 0 } else { flow_flag::PACKET_LIMIT };
    if protocol == UDP {
        if service.flags & service_flag::ONE_REPLY != 0 {
            flags |= flow_flag::ONE_REPLY;
        }
    } else if service.mode == mode::DNAT {
        flags |= flow_flag::CROSSING;
    }
    flags
}

/// Both entries were made.
pub const OPENED: u32 = 0;
const NO_SNAT_ADDRESS: u32 = 1;
/// The reply's key is another flow's.
pub const TAKEN: u32 = 2;
const EXHAUSTED: u32 = 3;
const FULL: u32 = 4;
/// The flow was there already.
pub const JOINED: u32 = 5;

/// What both entries are made of; they are built in the scratch element, one after the other.
pub struct Plan<A> {
    /// The client's packets as they come.
    pub key: FlowKey<A>,
    /// Their source as the backend sees it.
    pub new_src: A,
    /// The backend's address.
    pub new_dst: A,
    /// The source port as the backend sees it, network order.
    pub new_src_port: u16,
    /// The backend's port, network order.
    pub new_dst_port: u16,
    /// Service number.
    pub service: u32,
    /// Backend number.
    pub backend: u32,
    /// [`flow_flag`] bits of both halves.
    pub flags: u16,
    /// What is known of the acknowledgements, as in [`Flow::ack_floor`].
    pub ack_floor: u32,
    /// When it begins, ns of CLOCK_MONOTONIC.
    pub now: u64,
}

impl<A: Family> Plan<A> {
    #[inline(always)]
    fn reply_key(&self) -> FlowKey<A> {
        FlowKey::new(self.new_dst, self.new_src, self.new_dst_port, self.new_src_port, self.key.protocol)
    }
}

/// Adds the forward entry; 0 or an errno.
#[inline(never)]
fn add_forward<A: Family>(plan: &Plan<A>) -> i32 {
    let Some(flow) = scratch::empty() else {
        return ENOENT;
    };
    flow.key = plan.key;
    flow.new_src = plan.new_src;
    flow.new_dst = plan.new_dst;
    flow.new_src_port = plan.new_src_port;
    flow.new_dst_port = plan.new_dst_port;
    flow.set_deltas();
    flow.direction = Direction::Forward as u8;
    flow.ack_floor = plan.ack_floor;
    add(plan, flow)
}

/// Adds the reply's entry; 0 or an errno. It is written as what it is: turning a written forward entry around takes
/// copies of its parts, 64 bytes of stack more.
#[inline(never)]
fn add_reply<A: Family>(plan: &Plan<A>) -> i32 {
    let Some(flow) = scratch::empty() else {
        return ENOENT;
    };
    flow.key.src = plan.new_dst;
    flow.key.dst = plan.new_src;
    flow.key.src_port = plan.new_dst_port;
    flow.key.dst_port = plan.new_src_port;
    flow.key.protocol = plan.key.protocol;
    flow.new_src = plan.key.dst;
    flow.new_dst = plan.key.src;
    flow.new_src_port = plan.key.dst_port;
    flow.new_dst_port = plan.key.src_port;
    flow.set_deltas();
    flow.direction = Direction::Reply as u8;
    add(plan, flow)
}

/// Adds a half-open entry with what both directions have in common; 0 or an errno.
#[inline(always)]
fn add<A: Family>(plan: &Plan<A>, flow: &mut Flow<A>) -> i32 {
    flow.flags = plan.flags;
    flow.service = plan.service;
    flow.backend = plan.backend;
    flow.sequence = 1;
    flow.state = State::HalfOpen as u8;
    flow.created = plan.now;
    flow.last_seen = plan.now;
    maps::add_flow(Table::HalfOpen, flow).err().unwrap_or(0)
}

/// Makes both entries, the reply's first.
#[inline(never)]
fn open<A: Family>(plan: &mut Plan<A>, service: &ServiceEntry, backend: &BackendEntry, past: &Past<A>) -> u32 {
    let claimed = choose_source(plan, service, backend, past);
    if claimed != OPENED {
        return claimed;
    }
    begin(plan)
}

/// As [`open`], of a plan that has its source: the client's own.
#[inline(always)]
pub fn open_own<A: Family>(plan: &Plan<A>, service: &ServiceEntry) -> u32 {
    let claimed = claim_own(plan, service);
    if claimed != OPENED {
        return claimed;
    }
    begin(plan)
}

/// Adds the forward entry, the reply's being there.
#[inline(always)]
fn begin<A: Family>(plan: &Plan<A>) -> u32 {
    match add_forward(plan) {
        0 => OPENED,
        errno => {
            // Another CPU opened this flow just now: its entry serves this packet too, and the reply's key is this packet's
            // to take back only where the other chose another one.
            let reply = plan.reply_key();
            if !belongs_to(Table::HalfOpen, &plan.key, &reply) {
                maps::remove_flow(Table::HalfOpen, &reply);
            }
            if errno == EEXIST { JOINED } else { FULL }
        }
    }
}

/// Finds the source that the backend is to see, and claims the reply's key with it: the client's own in dnat mode;
/// the past flow's, then one candidate after another in full-nat mode.
#[inline(always)]
fn choose_source<A: Family>(plan: &mut Plan<A>, service: &ServiceEntry, backend: &BackendEntry, past: &Past<A>) -> u32 {
    let dnat = service.mode == mode::DNAT;
    if !dnat && service.snat_count == 0 && is_none(&backend.snat_address) {
        return NO_SNAT_ADDRESS;
    }
    // One call of `claim` in one loop: the verifier walks it once, and its stack stays small.
    for probe in 0..=PROBES {
        let own = probe == 0;
        if own {
            if !dnat {
                if past.backend != plan.backend {
                    continue;
                }
                plan.new_src = past.address;
                plan.new_src_port = past.port;
            }
        } else if !next_source(plan, service, backend, probe - 1) {
            continue;
        }
        match claim(plan, service, own, probe >= PRESSED) {
            OPENED => return OPENED,
            FULL => return FULL,
            _ if dnat => return TAKEN,
            _ => {}
        }
    }
    EXHAUSTED
}

/// The next candidate; false where its port may not be used. The first are the cursor's. Where those are taken, so may
/// be the many after them: services that share a backend walk the same sequence, and so does a backend that comes back
/// under another number while its old flows rest. The rest are scattered, in pairs half the span apart, so that a
/// forbidden block of less than half the span never stops both.
#[inline(never)]
fn next_source<A: Family>(plan: &mut Plan<A>, service: &ServiceEntry, backend: &BackendEntry, retry: u32) -> bool {
    let Some(cursor) = maps::next_candidate(plan.backend) else {
        return false;
    };
    let second = retry & 1;
    let candidate = if retry < FROM_CURSOR {
        cursor
    } else {
        scatter(cursor.wrapping_sub(second) ^ plan.now as u32) ^ second << 31
    };
    let addresses = service.snat_count.min(SNAT_ADDRESSES as u32);
    let (address, index) = if addresses == 0 {
        (A::narrow(&backend.snat_address), candidate)
    } else {
        let which = candidate % addresses;
        (snat_address(service, which), candidate / addresses)
    };
    let span = (u32::from(service.snat_port_max) + 1).saturating_sub(u32::from(service.snat_port_min));
    let port = service.snat_port_min.wrapping_add(spread(index, span) as u16);
    plan.new_src = address;
    plan.new_src_port = port.to_be();
    span != 0 && maps::snat_port_allowed(port)
}

/// One of the service's SNAT addresses, by constant offsets: the compiler sees that `which` is in bounds and leaves the
/// check out, the verifier does not see it.
#[inline(always)]
fn snat_address<A: Family>(service: &ServiceEntry, which: u32) -> A {
    let [first, second, third, fourth] = &service.snat_addresses;
    A::narrow(match which {
        0 => first,
        1 => second,
        2 => third,
        _ => fourth,
    })
}

/// Puts the reply's entry into the half-open table, then makes sure that no other table knows its key, and takes it
/// out again where one does. `own`: a closing entry of the same client tuple is no conflict. `pressed`: nor is a stalled
/// half-open flow.
#[inline(never)]
fn claim<A: Family>(plan: &Plan<A>, service: &ServiceEntry, own: bool, pressed: bool) -> u32 {
    claim_as(plan, service, own, pressed)
}

/// As [`claim`], of the client's own source; a function of its own, since the verifier removes calls that it proves never to
/// happen.
#[inline(never)]
fn claim_own<A: Family>(plan: &Plan<A>, service: &ServiceEntry) -> u32 {
    claim_as(plan, service, true, false)
}

#[inline(always)]
fn claim_as<A: Family>(plan: &Plan<A>, service: &ServiceEntry, own: bool, pressed: bool) -> u32 {
    let reply = plan.reply_key();
    match add_reply(plan) {
        0 => {}
        EEXIST => {
            // Where the tuple leaves no choice of port, an entry that timed out is no conflict, nor is one whose
            // client half has been evicted.
            let own = own && yields(plan, Table::HalfOpen, &reply, service.half_open_timeout);
            if !(own || pressed && end_stalled(plan, &reply, service.closing_timeout)) {
                return TAKEN;
            }
            maps::remove_flow(Table::HalfOpen, &reply);
            if add_reply(plan) != 0 {
                return TAKEN;
            }
        }
        _ => return FULL,
    }
    if maps::flow(Table::Established, &reply).is_some() {
        if !own || !yields(plan, Table::Established, &reply, service.established_timeout) {
            maps::remove_flow(Table::HalfOpen, &reply);
            return TAKEN;
        }
        maps::remove_flow(Table::Established, &reply);
    }
    if !clear_closing(plan, &reply, service.closing_timeout, own) {
        maps::remove_flow(Table::HalfOpen, &reply);
        return TAKEN;
    }
    OPENED
}

/// Ends the half-open flow whose reply has this key, up to the key itself, where its client has been silent for too long
/// or is unknown by now; else answers false, as it does where the key would not be free without that flow.
#[inline(never)]
fn end_stalled<A: Family>(plan: &Plan<A>, reply: &FlowKey<A>, closing_timeout: u32) -> bool {
    let resting = |flow: &Flow<A>| !rested(plan, flow, closing_timeout);
    if maps::flow(Table::Established, reply).is_some()
        || maps::flow(Table::Closing, reply).is_some_and(|flow| resting(flow))
    {
        return false;
    }
    let Some(flow) = maps::flow(Table::HalfOpen, reply) else {
        return true;
    };
    let client_key = flow.twin();
    // A client's half that leads elsewhere is another flow's: this reply's has been evicted.
    if let Some(client) = maps::flow(Table::HalfOpen, &client_key)
        && leads_back(client, reply)
    {
        if plan.now.saturating_sub(client.last_seen) < STALLED {
            return false;
        }
        maps::remove_flow(Table::HalfOpen, &client_key);
    }
    protect::half_open_ended(flow);
    true
}

/// Takes a closing flow out whose SNAT port has rested, or whose client has come back; false where it stays.
#[inline(never)]
fn clear_closing<A: Family>(plan: &Plan<A>, reply: &FlowKey<A>, closing_timeout: u32, own: bool) -> bool {
    let Some(flow) = maps::flow(Table::Closing, reply) else {
        return true;
    };
    if !(rested(plan, flow, closing_timeout) || own && leads_back(flow, &plan.key)) {
        return false;
    }
    let client = flow.twin();
    maps::remove_flow(Table::Closing, reply);
    maps::remove_flow(Table::Closing, &client);
    true
}

/// True where a closing flow's SNAT port has rested.
#[inline(always)]
fn rested<A: Family>(plan: &Plan<A>, closing: &Flow<A>, closing_timeout: u32) -> bool {
    expired(closing.last_seen, rest_seconds(closing.key.protocol, closing.flags, closing_timeout), plan.now)
}

#[inline(always)]
fn yields<A: Family>(plan: &Plan<A>, table: Table, reply: &FlowKey<A>, timeout: u32) -> bool {
    maps::flow(table, reply)
        .is_some_and(|flow| leads_back(flow, &plan.key) || expired(flow.last_seen, timeout, plan.now))
}

#[inline(never)]
fn belongs_to<A: Family>(table: Table, key: &FlowKey<A>, twin: &FlowKey<A>) -> bool {
    maps::flow(table, key).is_some_and(|flow| leads_back(flow, twin))
}

/// True where `key` is the flow's twin's, field by field: comparing whole keys calls `memcmp`, which takes a frame.
#[inline(always)]
fn leads_back<A: Family>(flow: &Flow<A>, key: &FlowKey<A>) -> bool {
    flow.new_src == key.dst
        && flow.new_dst == key.src
        && flow.new_src_port == key.dst_port
        && flow.new_dst_port == key.src_port
        && flow.key.protocol == key.protocol
}
