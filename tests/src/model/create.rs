//! Packets without a flow: whose they are, which backend they get, and which source that backend sees.
//!
//! The source port is the program's choice: the model judges it by the rules and takes it over.

use std::collections::BTreeMap;

use edge_common::{
    address::{Wide, is_none},
    maps::{BackendEntry, SNAT_ADDRESSES, ServiceEntry, ServiceKey, flow_flag, mode, service_flag},
    verdict::Reason,
};

use super::{
    choose::{self, Choice},
    connections::{expired, opens, unknown},
    coverage::Point,
    decide::{Choices, Decision, Input, answer, refuse, send},
    flow::{Flow, Key},
    midflow, protect,
    state::{Route, State, Table, twin_key},
    told::What,
    wire::{Segment, UDP},
};

const HALF_OPEN: u8 = 1;
/// SNAT candidates that are tried.
const PROBES: u32 = 16;
/// From this candidate on, a port of a half-open flow counts as free once its client has been silent for [`STALLED_NS`].
const PRESSED: u32 = 8;
/// 200 ms: a client that has acknowledged nothing for so long gives its port up to others under pressure.
const STALLED_NS: u64 = 200_000_000;
/// A port whose client closed first rests this long, seconds.
const SHORT_REST: u32 = 2;

/// The flow that the client's tuple had before.
#[derive(Clone, Copy, Debug)]
pub struct Past {
    /// Its backend.
    pub backend: u32,
    /// Its SNAT address.
    pub address: Wide,
    /// Its SNAT port, network order.
    pub port: u16,
    /// The backend that did not answer: another one, if there is one; 0: none.
    pub avoid: u32,
    /// The packet that ended it kept to a limit of packets.
    pub counted: bool,
}

/// Decides about a packet that has no flow.
///
/// # Errors
/// Where the program's choice of a source breaks a rule.
pub fn untracked(
    state: &mut State,
    input: &Input,
    segment: &Segment,
    to_us: bool,
    past: Option<Past>,
    choices: &dyn Choices,
) -> Result<Decision, String> {
    let key = segment.key;
    if let Some(service) = numbered(&state.config.frontends, key.dst, key.dst_port, &key) {
        // Whose source is a v4-mapped address nobody can answer, and it is not the IPv4 host of that address either.
        if segment.lacks_checksum || key.v6 && is_mapped(&key.src) {
            state.hit(if segment.lacks_checksum { Point::NoChecksum } else { Point::MappedSource });
            return Ok(refuse(state, Reason::Malformed, service));
        }
        if key.protocol == UDP || opens(segment.flags) {
            return new_flow(state, input, segment, service, past, choices);
        }
        return Ok(midflow::segment(state, input, segment, service));
    }
    if let Some(backend) = numbered(&state.config.dnat_backends, key.src, key.src_port, &key) {
        if state.config.route(key.v6, &key.src, &key.dst) != Route::NotForwarded {
            return Ok(midflow::reply(state, input, segment, backend));
        }
        state.hit(Point::BackendToHost);
        return Ok(Decision::PASS);
    }
    if to_us {
        state.hit(Point::NoFrontend);
        state.because(Reason::NoFrontend, 0);
    } else {
        state.hit(Point::NotABackend);
    }
    Ok(Decision::PASS)
}

/// The number of the frontend or dnat backend that packets of the key's family and protocol find at this address and port: its
/// own, or that of all ports, which stands at port 0. A v4-mapped address in an IPv6 packet is no place: maps hold IPv4 addresses
/// in that form.
pub fn numbered(numbers: &BTreeMap<ServiceKey, u32>, address: Wide, port: u16, key: &Key) -> Option<u32> {
    if key.v6 && is_mapped(&address) {
        return None;
    }
    let at = |port| numbers.get(&ServiceKey { address, port, protocol: key.protocol, _pad: 0 }).copied();
    at(port).or_else(|| at(0))
}

/// The port that a backend gets a packet at which went to the VIP's port `asked`.
pub fn port_of(backend: &BackendEntry, asked: u16) -> u16 {
    if backend.port == 0 { asked } else { backend.port }
}

fn is_mapped(address: &Wide) -> bool {
    address[..3] == [0, 0, 0xffff_u32.to_be()]
}

fn new_flow(
    state: &mut State,
    input: &Input,
    segment: &Segment,
    number: u32,
    past: Option<Past>,
    choices: &dyn Choices,
) -> Result<Decision, String> {
    let config = state.config.clone();
    let Some((service, _)) = config.services.get(&number) else {
        state.hit(Point::CreateNoService);
        return Ok(refuse(state, Reason::NotReady, number));
    };
    let service = *service;
    let counted = past.is_some_and(|past| past.counted);
    if let Some(reason) = protect::refuses(state, input, &segment.key, number, &service, counted) {
        return Ok(refuse(state, reason, number));
    }
    if segment.ip.ttl <= 1 {
        state.hit(Point::CreateTtl);
        return Ok(answer(state, input, What::Expired, number));
    }
    if past.is_some() && state.flow(Table::HalfOpen, &segment.key).is_some() {
        state.hit(Point::Joined);
        return Ok(send(state, input, segment, Table::HalfOpen));
    }
    state.coverage.hit_if(Point::AllPorts, service.port == 0);
    let avoid = past.map_or(0, |past| past.avoid);
    let chosen = match choose::backend(state, input, number, &segment.key, avoid) {
        Choice::Backend(backend) => backend,
        Choice::Nobody => {
            state.hit(Point::NoBackend);
            return Ok(refuse(state, Reason::NoBackend, number));
        }
        Choice::AllFull => {
            state.hit(Point::BackendsFull);
            return Ok(refuse(state, Reason::BackendsFull, number));
        }
    };
    let Some(backend) = state.config.backends.get(&chosen).copied() else {
        return Err(format!("the world has no backend {chosen}"));
    };
    let plan = Plan { key: segment.key, service, number, chosen, backend, now: input.precise, flags: 0, ack_floor: 0 };
    let (address, port) = match source(state, input, &plan, past, choices)? {
        Source::Refused(reason) => return Ok(refuse(state, reason, number)),
        Source::Found(address, port) => (address, port),
    };
    if avoid != 0 && avoid != chosen {
        state.hit(Point::RetriedElsewhere);
        state.because(Reason::RetriedElsewhere, number);
    }
    if open(state, &plan, address, port) {
        protect::half_opened(state, input, &plan.key, number);
        state.count(plan.number, plan.chosen, |stats| stats.half_opened += 1);
        choose::begun(state, plan.chosen, plan.now);
    }
    Ok(send(state, input, segment, Table::HalfOpen))
}

/// What both entries of a new flow are made of.
pub struct Plan {
    /// The client's tuple.
    pub key: Key,
    /// Its service.
    pub service: ServiceEntry,
    /// Its service's number.
    pub number: u32,
    /// Its backend's number.
    pub chosen: u32,
    /// Its backend.
    pub backend: BackendEntry,
    /// When.
    pub now: u64,
    /// Marks beside those that every flow of the service has.
    pub flags: u16,
    /// What the client must acknowledge, or has acknowledged.
    pub ack_floor: u32,
}

impl Plan {
    /// The key of the replies to this source.
    pub fn reply_key(&self, address: Wide, port: u16) -> Key {
        let protocol = self.key.protocol;
        Key {
            v6: self.key.v6,
            src: self.backend.address,
            dst: address,
            src_port: port_of(&self.backend, self.key.dst_port),
            dst_port: port,
            protocol,
        }
    }
}

enum Source {
    Found(Wide, u16),
    Refused(Reason),
}

fn source(
    state: &mut State,
    input: &Input,
    plan: &Plan,
    past: Option<Past>,
    choices: &dyn Choices,
) -> Result<Source, String> {
    if plan.service.mode == mode::DNAT {
        let (address, port) = (plan.key.src, plan.key.src_port);
        let taken = !claim_own(state, plan, &plan.reply_key(address, port));
        state.hit(if taken { Point::CreateDnatTaken } else { Point::CreateDnat });
        return Ok(if taken { Source::Refused(Reason::TwinTaken) } else { Source::Found(address, port) });
    }
    if plan.service.snat_count == 0 && is_none(&plan.backend.snat_address) {
        state.hit(Point::NoSnatAddress);
        return Ok(Source::Refused(Reason::NoSnatAddress));
    }
    if let Some(past) = past.filter(|past| past.backend == plan.chosen) {
        if claim_own(state, plan, &plan.reply_key(past.address, past.port)) {
            state.hit(Point::CreateOwnPort);
            return Ok(Source::Found(past.address, past.port));
        }
        state.hit(Point::CreateOwnPortTaken);
    }
    candidate(state, input, plan, choices)
}

/// Makes room for a reply's key that leaves no choice of port: entries of the same client, and such as have timed out,
/// give way. False where another flow has it.
pub fn claim_own(state: &mut State, plan: &Plan, reply: &Key) -> bool {
    let tables =
        [(Table::HalfOpen, plan.service.half_open_timeout), (Table::Established, plan.service.established_timeout)];
    for (table, timeout) in tables {
        let Some(entry) = state.flow(table, reply) else { continue };
        if twin_key(entry) != plan.key && !expired(entry.last_seen, timeout, plan.now) {
            state.touched.push((table, *reply));
            return false;
        }
        state.hit(Point::Yielded);
        state.remove(table, reply);
    }
    let Some(entry) = state.flow(Table::Closing, reply).copied() else { return true };
    let client = twin_key(&entry);
    if client != plan.key && !rested(plan, &entry) {
        state.touched.push((Table::Closing, *reply));
        return false;
    }
    state.remove(Table::Closing, reply);
    state.remove(Table::Closing, &client);
    true
}

/// True where a closed flow's port may go to another client: after the full rest where the backend may still hold it in
/// TIME_WAIT (it closed first), else after packets under way have died.
fn rested(plan: &Plan, closing: &Flow) -> bool {
    let tcp = closing.key.protocol != UDP;
    let full = plan.service.closing_timeout;
    let long = if tcp {
        // Of a reset nobody knows whether it was forged: the flow may come back.
        let marks = flow_flag::BACKEND_CLOSED_FIRST | flow_flag::RESET_BY_CLIENT | flow_flag::RESET_BY_BACKEND;
        closing.flags & marks != 0
    } else {
        closing.flags & flow_flag::ONE_REPLY == 0
    };
    expired(closing.last_seen, if long { full } else { full.min(SHORT_REST) }, plan.now)
}

fn free(state: &State, plan: &Plan, reply: &Key) -> bool {
    unknown(state, reply)
        || state.flow(Table::HalfOpen, reply).is_none()
            && state.flow(Table::Established, reply).is_none()
            && state.flow(Table::Closing, reply).is_some_and(|entry| rested(plan, entry))
}

/// True where the source is a half-open flow's whose client has said nothing for a while, and nobody else's.
fn given_up(state: &State, plan: &Plan, reply: &Key) -> bool {
    let Some(entry) = state.flow(Table::HalfOpen, reply) else { return false };
    let client = state.flow(Table::HalfOpen, &twin_key(entry)).filter(|client| twin_key(client) == *reply);
    client.is_none_or(|client| plan.now.saturating_sub(client.last_seen) >= STALLED_NS)
        && state.flow(Table::Established, reply).is_none()
        && state.flow(Table::Closing, reply).is_none_or(|closing| rested(plan, closing))
}

fn addresses(plan: &Plan) -> Vec<Wide> {
    match (plan.service.snat_count as usize).min(SNAT_ADDRESSES) {
        0 => vec![plan.backend.snat_address],
        count => plan.service.snat_addresses[..count].to_vec(),
    }
}

/// Judges the source that the program found among a backend's candidates.
fn candidate(state: &mut State, input: &Input, plan: &Plan, choices: &dyn Choices) -> Result<Source, String> {
    let now = choices.cursor(plan.chosen);
    let before = state.cursors.insert(plan.chosen, now).unwrap_or(0);
    let probes = now.wrapping_sub(before);
    let addresses = addresses(plan);
    let Some((address, port)) = choices.source(&plan.key) else {
        if probes != PROBES {
            return Err(format!("gave up after {probes} of {PROBES} candidates"));
        }
        judge_refusal(state, plan, &addresses);
        state.hit(Point::SnatExhausted);
        return Ok(Source::Refused(Reason::SnatExhausted));
    };
    if probes == 0 || probes > PROBES {
        return Err(format!("took {probes} candidates for a new source, 1 to {PROBES} are allowed"));
    }
    if !addresses.contains(&address) {
        return Err(format!("source address {address:x?} is none of the service's"));
    }
    let host = u16::from_be(port);
    let span = plan.service.snat_port_min..=plan.service.snat_port_max;
    if !span.contains(&host) || !state.config.ports[usize::from(host)] {
        return Err(format!("source port {host} is not permitted"));
    }
    let reply = plan.reply_key(address, port);
    let pressed = probes >= PRESSED;
    if !(free(state, plan, &reply) || pressed && given_up(state, plan, &reply)) {
        let held = [Table::HalfOpen, Table::Established, Table::Closing].map(|table| state.flow(table, &reply));
        return Err(format!("source port {host} is in use after {probes} candidates: {held:?}"));
    }
    if let Some(stalled) = state.flow(Table::HalfOpen, &reply).copied() {
        state.hit(Point::CreateStalledPort);
        protect::half_open_ended(state, input, &stalled);
        let client = twin_key(&stalled);
        if state.flow(Table::HalfOpen, &client).is_some_and(|entry| twin_key(entry) == reply) {
            state.remove(Table::HalfOpen, &client);
        }
        state.remove(Table::HalfOpen, &reply);
    }
    if let Some(closing) = state.flow(Table::Closing, &reply).copied() {
        state.hit(Point::CreateRestedPort);
        state.remove(Table::Closing, &reply);
        state.remove(Table::Closing, &twin_key(&closing));
    }
    state.hit(Point::CreateFullNat);
    Ok(Source::Found(address, port))
}

/// A refusal while some ports are free is allowed as often as chance explains it, which only many of them show.
fn judge_refusal(state: &mut State, plan: &Plan, addresses: &[Wide]) {
    let free_ones = free_share(state, plan, addresses);
    if free_ones > 0.0 {
        state.refusals += 1;
    }
}

/// The share of a service's sources that one more flow to this backend could have.
fn free_share(state: &State, plan: &Plan, addresses: &[Wide]) -> f64 {
    let (mut free_ones, mut all) = (0u32, 0u32);
    for port in plan.service.snat_port_min..=plan.service.snat_port_max {
        for address in addresses {
            all += 1;
            let reply = plan.reply_key(*address, port.to_be());
            free_ones += u32::from(state.config.ports[usize::from(port)] && free(state, plan, &reply));
        }
    }
    if all == 0 { 0.0 } else { f64::from(free_ones) / f64::from(all) }
}

/// Both entries of the new flow; false where it was there already.
pub fn open(state: &mut State, plan: &Plan, address: Wide, port: u16) -> bool {
    let one_reply = plan.service.flags & service_flag::ONE_REPLY != 0 && plan.key.protocol == UDP;
    let crossing = plan.service.mode == mode::DNAT && plan.key.protocol != UDP;
    let forward = Flow {
        key: plan.key,
        new_src: address,
        new_dst: plan.backend.address,
        new_src_port: port,
        new_dst_port: port_of(&plan.backend, plan.key.dst_port),
        service: plan.number,
        backend: plan.chosen,
        sequence: 1,
        state: HALF_OPEN,
        created: plan.now,
        last_seen: plan.now,
        flags: plan.flags
            | if crossing { flow_flag::CROSSING } else { 0 }
            | if plan.service.source_packet_rate != 0 { flow_flag::PACKET_LIMIT } else { 0 }
            | if one_reply { flow_flag::ONE_REPLY } else { 0 },
        ack_floor: plan.ack_floor,
        ..Flow::default()
    };
    let reply = Flow {
        key: twin_key(&forward),
        new_src: plan.key.dst,
        new_dst: plan.key.src,
        new_src_port: plan.key.dst_port,
        new_dst_port: plan.key.src_port,
        direction: 1,
        ack_floor: 0,
        ..forward
    };
    if let Some(known) = state.flow(Table::HalfOpen, &plan.key).copied() {
        // The tuple has a flow: that goes on, and the new source is given back.
        state.hit(Point::Joined);
        if twin_key(&known) != reply.key {
            state.remove(Table::HalfOpen, &reply.key);
        } else {
            state.put(Table::HalfOpen, reply);
        }
        return false;
    }
    state.put(Table::HalfOpen, reply);
    state.put(Table::HalfOpen, forward);
    true
}
