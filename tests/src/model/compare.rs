//! What the program did, held against what had to happen.

use edge_common::{
    address::Wide,
    conntrack::TICK_SHIFT,
    maps::{
        AffinityEntry, AffinityKey, Fragment, NextHop, ServiceStats, SourceId, SourceKey, SourceRange, SourceUse,
        flow_flag, name,
    },
    verdict::{REASONS, Reason},
};

use std::collections::BTreeMap;

use anyhow::Result;

use super::{
    checksum::{self, Check},
    decide::{Decision, Rewrite},
    flow::{Flow, Key},
    icmp::{self, Translated},
    kernel::Kernel,
    midflow,
    moves::map_name,
    state::{Counters, State, TABLES, Table},
    wire,
    world::{BACKENDS, SERVICES},
};
use crate::datapath::rig::Action;

/// The verdict and the bytes.
///
/// # Errors
/// What differs.
pub fn packet(decision: &Decision, input: &[u8], action: Action, got: &[u8]) -> Result<(), String> {
    if action != decision.action {
        return Err(format!("verdict {action:?}, expected {decision:?}"));
    }
    if let Some(error) = decision.error.as_ref().filter(|_| action != Action::Drop) {
        return translated(error, input, got);
    }
    match &decision.rewrite {
        _ if action == Action::Drop => Ok(()),
        None if decision.told.is_some() => decision.told.map_or(Ok(()), |told| told.judge(input, got)),
        None if decision.reset => midflow::judge_reset(input, got),
        None if got == input => Ok(()),
        None => Err(format!("passed, but changed\n  expected {}\n  got      {}", hex(input), hex(got))),
        Some(rewrite) => rewritten(rewrite, input, got),
    }
}

fn rewritten(rewrite: &Rewrite, input: &[u8], got: &[u8]) -> Result<(), String> {
    let mut expected = input.to_vec();
    let (l4, v6) = (rewrite.segment.l4, rewrite.segment.v6);
    forwarded(&mut expected, v6, rewrite.macs, rewrite.addresses);
    if v6 && rewrite.segment.fragment_at != 0 {
        let at = rewrite.segment.fragment_at + 4;
        expected[at..at + 4].copy_from_slice(&rewrite.id.to_be_bytes());
    } else if !v6 {
        expected[18..20].copy_from_slice(&(rewrite.id as u16).to_be_bytes());
    }
    if got.len() != expected.len() {
        return Err(format!("{} bytes became {}", expected.len(), got.len()));
    }
    let header_len = usize::from(input[wire::ETHERNET] & 15) * 4;
    // A header that contradicts the frame has no checksum to be right.
    if !v6 {
        let found = wire::word(got, IP_CHECK).unwrap_or(0);
        let check = checksum::of_ipv4(input, &expected, header_len).unwrap_or(Check::Exactly(found));
        settle("IP checksum", IP_CHECK, false, got, &mut expected, |_| check)?;
    }
    if let Some((at, mss)) = rewrite.mss {
        expected[at..at + 2].copy_from_slice(&mss.to_be_bytes());
    }
    if !rewrite.segment.later_fragment {
        expected[l4..l4 + 2].copy_from_slice(&rewrite.ports.0.to_ne_bytes());
        expected[l4 + 2..l4 + 4].copy_from_slice(&rewrite.ports.1.to_ne_bytes());
        let segment = wire::whole_segment(input).ok_or("no segment was rewritten")?;
        let udp = rewrite.segment.udp;
        settle("checksum", l4 + checksum::offset(udp), udp, got, &mut expected, |new| {
            checksum::of_segment(input, new, &segment)
        })?;
    }
    same(&expected, got)
}

/// The IPv4 header checksum's place in a frame.
const IP_CHECK: usize = wire::ETHERNET + 10;

/// What a router does, and the addresses.
fn forwarded(frame: &mut [u8], v6: bool, macs: Option<([u8; 6], [u8; 6])>, addresses: (Wide, Wide)) {
    if let Some((dst, src)) = macs {
        frame[..6].copy_from_slice(&dst);
        frame[6..12].copy_from_slice(&src);
    }
    frame[wire::ETHERNET + wire::ttl_at(v6)] -= 1;
    wire::readdress(frame, wire::ETHERNET, v6, addresses);
}

fn same(expected: &[u8], got: &[u8]) -> Result<(), String> {
    if got != expected {
        return Err(format!("bytes differ\n  expected {}\n  got      {}", hex(expected), hex(got)));
    }
    Ok(())
}

/// An ICMP error outside and inside. Its quote is cut off, so that the checksums inside are judged by what they change by.
fn translated(error: &Translated, input: &[u8], got: &[u8]) -> Result<(), String> {
    let quote = &error.quote;
    let v6 = quote.key.v6;
    let mut expected = input.to_vec();
    forwarded(&mut expected, v6, error.macs, error.outside);
    wire::readdress(&mut expected, quote.ip, v6, error.inside);
    expected[quote.l4..quote.l4 + 2].copy_from_slice(&error.ports.0.to_ne_bytes());
    expected[quote.l4 + 2..quote.l4 + 4].copy_from_slice(&error.ports.1.to_ne_bytes());
    if got.len() != expected.len() {
        return Err(format!("{} bytes became {}", expected.len(), got.len()));
    }
    // Inside out, since each covers the ones before.
    if !v6 {
        let (inner, at) = (quote.ip..quote.l4, quote.ip + 10);
        settle("quoted IP checksum", at, false, got, &mut expected, |new| checksum::recomputed(input, new, inner, at))?;
    }
    if let Some(at) = quote.check() {
        let place = wire::addresses_at(v6);
        let addresses = quote.ip + place.start..quote.ip + place.end;
        settle("quoted checksum", at, quote.udp, got, &mut expected, |new| {
            checksum::moved(input, new, at, quote.udp, [addresses, quote.l4..quote.l4 + 4])
        })?;
    }
    let ip = wire::Ip { protocol: icmp::number(v6), ..wire::ip(input).ok_or("no error was translated")? };
    settle("ICMP checksum", quote.icmp + 2, false, got, &mut expected, |new| {
        checksum::of_icmp(input, new, quote.icmp..quote.end, &ip)
    })?;
    if !v6 {
        let outer = wire::ETHERNET..quote.icmp;
        settle("IP checksum", IP_CHECK, false, got, &mut expected, |new| {
            checksum::recomputed(input, new, outer, IP_CHECK)
        })?;
    }
    same(&expected, got)
}

/// Judges the checksum at `at` by what it must be, and takes it over.
fn settle(
    what: &str,
    at: usize,
    udp: bool,
    got: &[u8],
    expected: &mut [u8],
    check: impl FnOnce(&[u8]) -> Check,
) -> Result<(), String> {
    let (found, check) = (wire::word(got, at).unwrap_or(0), check(expected));
    if !check.admits(found, udp) {
        return Err(format!("{what} {found:#06x}, expected {check:x?}\n  got      {}", hex(got)));
    }
    expected[at..at + 2].copy_from_slice(&found.to_be_bytes());
    Ok(())
}

/// When a packet was seen, ns: by the model's coarse and its precise clock, and at the latest.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// What flows are aged by.
    pub coarse: u64,
    /// What new flows are made by.
    pub precise: u64,
    /// Precise, after the program had run.
    pub after: u64,
}

/// The entries and next hops that the packet touched. What the program was free in is taken over.
///
/// # Errors
/// What differs.
pub fn touched(state: &mut State, kernel: &Kernel, times: Times) -> Result<(), String> {
    let mut keys = std::mem::take(&mut state.touched);
    keys.sort_unstable();
    keys.dedup();
    let range = state.touch_due.take();
    for (table, key) in keys {
        entry(state, table, &key, kernel.flow(map_name(table), &key), times, range)?;
    }
    for key in std::mem::take(&mut state.touched_fragments) {
        let map = kernel.map(name::FRAGMENTS).map_err(|error| error.to_string())?;
        let (got, expected) = (map.get::<_, Fragment>(&key), state.fragments.get_mut(&key));
        if let (Some(got), Some(expected)) = (got, expected)
            && (times.coarse..=times.after).contains(&got.seen)
        {
            expected.seen = got.seen;
        }
        let expected = state.fragments.get(&key).copied();
        if got != expected {
            return Err(format!("first fragment {key:?}: expected {expected:?}\n  got {got:?}"));
        }
    }
    sources(state, kernel)?;
    for backend in std::mem::take(&mut state.touched_loads) {
        load(state, kernel, backend)?;
    }
    for service in std::mem::take(&mut state.touched_turns) {
        turn(state, kernel, service)?;
    }
    for key in std::mem::take(&mut state.touched_homes) {
        let map = kernel.map(name::AFFINITY).map_err(|error| error.to_string())?;
        let (got, expected) = (map.get::<_, AffinityEntry>(&key), state.homes.get(&key).copied());
        if got != expected {
            return Err(format!("home of {key:?}: expected {expected:?}\n  got {got:?}"));
        }
    }
    if let Some((service, reason)) = state.refused.take() {
        refusal(state, kernel, service, reason)?;
    }
    for number in std::mem::take(&mut state.touched_hops) {
        let map = kernel.map(name::NEXT_HOPS).map_err(|error| error.to_string())?;
        let got: Option<NextHop> = map.get(&number);
        let expected = state.next_hops.get(&number).copied();
        if got != expected {
            return Err(format!("next hop {number}: expected {expected:?}\n  got {got:?}"));
        }
    }
    Ok(())
}

/// What a backend has to do.
fn load(state: &State, kernel: &Kernel, backend: u32) -> Result<(), String> {
    let expected = state.loads.get(&backend).copied().unwrap_or_default();
    let got = kernel.load(backend).map_err(|error| error.to_string())?;
    if got != expected {
        return Err(format!("backend {backend}: expected {expected:?}\n  got {got:?}"));
    }
    Ok(())
}

/// Whose turn it is in a service.
fn turn(state: &State, kernel: &Kernel, service: u32) -> Result<(), String> {
    let map = kernel.map(name::SERVICE_CURSOR).map_err(|error| error.to_string())?;
    let (got, expected) = (map.get::<_, u32>(&service), state.turns.get(&service).copied());
    if got != expected {
        return Err(format!("turn of service {service}: expected {expected:?}, got {got:?}"));
    }
    Ok(())
}

/// Where every client is at home.
fn homes(state: &State, kernel: &Kernel) -> Result<(), String> {
    let map = kernel.map(name::AFFINITY).map_err(|error| error.to_string())?;
    let homes = map.keys::<AffinityKey>().into_iter().filter_map(|key| Some((key, map.get::<_, AffinityEntry>(&key)?)));
    let homes: BTreeMap<AffinityKey, AffinityEntry> = homes.collect();
    if homes != state.homes {
        return Err(format!("homes: expected {:?}\n  got {homes:?}", state.homes));
    }
    Ok(())
}

/// Which of the limits refused the packet leaves no other trace.
fn refusal(state: &State, kernel: &Kernel, service: u32, reason: Reason) -> Result<(), String> {
    let map = kernel.map(name::REASONS).map_err(|error| error.to_string())?;
    let got = map.sums(service * REASONS + reason as u32, 1).first().copied().unwrap_or(0);
    let of = |counters: &Counters| counters.reasons.get(&(service, reason as u32)).copied().unwrap_or(0);
    let expected = of(&state.base) + of(&state.counters);
    if got != expected {
        return Err(format!("service {service} counted {} {got} times, expected {expected}", reason.name()));
    }
    Ok(())
}

/// What the packet's source has used up; the program's words of its buckets are taken over.
fn sources(state: &mut State, kernel: &Kernel) -> Result<(), String> {
    let drawn = std::mem::take(&mut state.drawn);
    for source in std::mem::take(&mut state.touched_sources) {
        let map = kernel.map(name::SOURCES).map_err(|error| error.to_string())?;
        let got: Option<SourceUse> = map.get(&source);
        let Some(expected) = state.sources.get_mut(&source) else { continue };
        for drawn in drawn.iter().filter(|drawn| drawn.source == source) {
            let found = got.map_or(0, |got| if drawn.packets { got.packets } else { got.flows });
            if (drawn.word.0..=drawn.word.1).contains(&found) {
                *if drawn.packets { &mut expected.packets } else { &mut expected.flows } = found;
            }
        }
        if got != Some(*expected) {
            return Err(format!("source {source:?}: expected {expected:?}, drawn {drawn:?}\n  got {got:?}"));
        }
    }
    Ok(())
}

fn entry(
    state: &mut State,
    table: Table,
    key: &Key,
    got: Option<Flow>,
    times: Times,
    range: Option<(u32, u32)>,
) -> Result<(), String> {
    let expected = state.flow(table, key).copied();
    let (Some(mut wanted), Some(found)) = (expected, got) else {
        return match (expected, got) {
            (None, None) => Ok(()),
            _ => Err(format!("{table:?} {key:?}:\n  expected {expected:?}\n  got      {got:?}")),
        };
    };
    let stamped = |wanted: u64, found: u64| {
        (wanted == times.coarse || wanted == times.precise) && (times.coarse..=times.after).contains(&found)
    };
    // A slot of the cache knows its last packet in ticks, by a clock that is set to four of the kernel's ticks.
    let off = 4 * edge_ctl::datapath::sys::tick_ns();
    let (from, to) = (times.coarse.saturating_sub(off) >> TICK_SHIFT, times.after.saturating_add(off) >> TICK_SHIFT);
    let in_tick = (from..=to).contains(&(found.last_seen >> TICK_SHIFT));
    let by_slot = table == Table::Established && in_tick && stamped(wanted.last_seen, times.after);
    // What a slot told is a tick's beginning. Its clock may be ahead of the entries', by which it is told once more when it gives
    // its place to another flow's.
    let told = table == Table::Established && wanted.last_seen.trailing_zeros() >= TICK_SHIFT;
    let told_again = told && wanted.last_seen.abs_diff(found.last_seen) <= off;
    if by_slot || told_again || stamped(wanted.last_seen, found.last_seen) {
        wanted.last_seen = found.last_seen;
    }
    if stamped(wanted.created, found.created) {
        wanted.created = found.created;
    }
    if range.is_some_and(|(low, high)| found.touch_due.wrapping_sub(low) <= high.wrapping_sub(low)) {
        wanted.touch_due = found.touch_due;
    }
    // How long a backend took is no rule of the dataplane's.
    (wanted.answered_after, wanted.first_byte_after) = (found.answered_after, found.first_byte_after);
    wanted.flags |= found.flags & flow_flag::UNANSWERED;
    deltas(&found)?;
    (wanted.address_delta, wanted.port_delta) = (found.address_delta, found.port_delta);
    if wanted != found {
        return Err(format!("{table:?} entry:\n  expected {wanted:?}\n  got      {found:?}"));
    }
    state.table_mut(table).insert(*key, found);
    Ok(())
}

/// The two differences of checksums in an entry, against sums of the whole fields.
fn deltas(flow: &Flow) -> Result<(), String> {
    let sums = |words: [&[u8]; 2]| u32::from(checksum::sum(&words));
    // What makes an IPv4 address one of 16 bytes adds nothing modulo 0xffff.
    let bytes = |wide: Wide| wide.map(u32::to_ne_bytes).concat();
    let addresses = |a: Wide, b: Wide| sums([&bytes(a), &bytes(b)]);
    let ports = |a: u16, b: u16| sums([&a.to_ne_bytes(), &b.to_ne_bytes()]);
    let key = &flow.key;
    for (what, old, new, delta) in [
        ("address", addresses(key.src, key.dst), addresses(flow.new_src, flow.new_dst), flow.address_delta),
        ("port", ports(key.src_port, key.dst_port), ports(flow.new_src_port, flow.new_dst_port), flow.port_delta),
    ] {
        if (old + u32::from(u16::from_be(delta))) % 0xffff != new % 0xffff {
            return Err(format!("{what} delta {delta:#06x} leads from {old:#x} not to {new:#x}: {flow:?}"));
        }
    }
    Ok(())
}

/// Every entry of every table: what the program changed although nothing had to.
///
/// # Errors
/// What differs.
pub fn tables(state: &mut State, kernel: &Kernel) -> Result<(), String> {
    for table in TABLES {
        let mut keys = kernel.keys(map_name(table)).map_err(|error| error.to_string())?;
        keys.extend(state.table(table).keys());
        keys.sort_unstable();
        keys.dedup();
        for key in keys {
            entry(
                state,
                table,
                &key,
                kernel.flow(map_name(table), &key),
                Times { coarse: 1, precise: 1, after: 0 },
                None,
            )?;
        }
    }
    state.loads.keys().try_for_each(|backend| load(state, kernel, *backend))?;
    state.turns.keys().try_for_each(|service| turn(state, kernel, *service))?;
    homes(state, kernel)?;
    protection(state, kernel)?;
    let cursor: Option<u32> = kernel.map(name::NEXT_HOP_CURSOR).map_err(|error| error.to_string())?.get(&0u32);
    if cursor != Some(state.next_hop_cursor) {
        return Err(format!("next-hop cursor {cursor:?}, expected {}", state.next_hop_cursor));
    }
    Ok(())
}

/// Every source, and how often every range decided.
fn protection(state: &State, kernel: &Kernel) -> Result<(), String> {
    let map = kernel.map(name::SOURCES).map_err(|error| error.to_string())?;
    let sources = map.keys::<SourceId>().into_iter().filter_map(|id| Some((id, map.get::<_, SourceUse>(&id)?)));
    let sources: BTreeMap<SourceId, SourceUse> = sources.collect();
    if sources != state.sources {
        return Err(format!("sources: expected {:?}\n  got {sources:?}", state.sources));
    }
    let map = kernel.map(name::SOURCE_RANGES).map_err(|error| error.to_string())?;
    for range in map.keys::<SourceKey>() {
        let got = map.get::<_, SourceRange>(&range).map_or(0, |range| range.hits);
        let expected = state.range_hits.get(&range).copied().unwrap_or(0);
        if got != expected {
            return Err(format!("{range:?} decided {got} times, expected {expected}"));
        }
    }
    Ok(())
}

/// What the kernel counted so far.
///
/// # Errors
/// Where a map is missing.
pub fn counted(kernel: &Kernel) -> Result<Counters> {
    let mut counters = Counters::default();
    let reasons = kernel.map(name::REASONS)?;
    let stats = |sums: Vec<u64>| match sums[..] {
        [packets_in, bytes_in, packets_out, bytes_out, half_opened, opened, closed] => {
            ServiceStats { packets_in, bytes_in, packets_out, bytes_out, half_opened, opened, closed }
        }
        _ => ServiceStats::default(),
    };
    let words = size_of::<ServiceStats>() / 8;
    for service in 0..SERVICES {
        for reason in Reason::ALL {
            let count = reasons.sums(service * REASONS + *reason as u32, 1);
            counters.reasons.insert((service, *reason as u32), count.first().copied().unwrap_or(0));
        }
        counters.services.insert(service, stats(kernel.map(name::SERVICE_STATS)?.sums(service, words)));
    }
    for backend in 0..BACKENDS {
        counters.backends.insert(backend, stats(kernel.map(name::BACKEND_STATS)?.sums(backend, words)));
    }
    Ok(counters)
}

/// The counters since the world began.
///
/// # Errors
/// What differs.
pub fn counters(state: &State, kernel: &Kernel) -> Result<(), String> {
    let before = &state.base;
    let now = counted(kernel).map_err(|error| error.to_string())?;
    for (key, count) in &now.reasons {
        let got = count - before.reasons.get(key).copied().unwrap_or(0);
        let expected = state.counters.reasons.get(key).copied().unwrap_or(0);
        if got != expected {
            let name = Reason::ALL.iter().find(|reason| **reason as u32 == key.1).map_or("?", |reason| reason.name());
            return Err(format!("service {} counted {name} {got} times, expected {expected}", key.0));
        }
    }
    for (what, now, before, expected) in [
        ("service", &now.services, &before.services, &state.counters.services),
        ("backend", &now.backends, &before.backends, &state.counters.backends),
    ] {
        for (number, now) in now {
            let before = before.get(number).copied().unwrap_or_default();
            let got = ServiceStats {
                packets_in: now.packets_in - before.packets_in,
                bytes_in: now.bytes_in - before.bytes_in,
                packets_out: now.packets_out - before.packets_out,
                bytes_out: now.bytes_out - before.bytes_out,
                half_opened: now.half_opened - before.half_opened,
                opened: now.opened - before.opened,
                closed: now.closed - before.closed,
            };
            let expected = expected.get(number).copied().unwrap_or_default();
            if got != expected {
                return Err(format!("{what} {number} counted\n  {got:?}, expected\n  {expected:?}"));
            }
        }
    }
    Ok(())
}

/// What both know of a packet's tuple, for people.
pub fn entries(state: &State, kernel: &Kernel, frame: &[u8]) -> String {
    let Some(segment) = wire::whole_segment(frame) else {
        return String::new();
    };
    let mut lines = String::new();
    for table in TABLES {
        let expected = state.flow(table, &segment.key);
        let got = kernel.flow(map_name(table), &segment.key);
        if expected.is_some() || got.is_some() {
            lines.push_str(&format!("  {table:?} expected {expected:?}\n  {table:?} got      {got:?}\n"));
        }
    }
    lines
}

/// Bytes as digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
