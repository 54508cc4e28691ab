//! What one source may do with a service: source ranges, of which the longest that holds it decides; new flows and packets
//! by token buckets; and half-open flows by a quota. A packet takes one token of a bucket at most, and one that is refused
//! takes none.

use edge_common::{
    address::Wide,
    maps::{RANGE_PREFIX, RangeSource, ServiceEntry, SourceId, SourceKey, SourceUse, flow_flag, service_flag},
    verdict::Reason,
};

use super::{
    coverage::Point,
    decide::Input,
    flow::{Flow, Key},
    state::{SECOND, State, first_bits},
};

/// What the packet at hand may have left of a bucket: the program reads the clock by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drawn {
    /// Of whose.
    pub source: SourceId,
    /// Packets rather than new flows.
    pub packets: bool,
    /// Least and most of the bucket's word.
    pub word: (u64, u64),
}

/// A bucket: tokens a second, and the most that it saves.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    rate: u32,
    burst: u32,
}

impl Bucket {
    /// The word of a bucket is the moment since which it has been filling, having been empty: its word once one token has
    /// been taken at `now`, or `None` where there is none. As exact as integers are.
    fn taken(self, word: u64, now: u64) -> Option<u64> {
        let (now, word) = (i128::from(now), i128::from(word));
        let (rate, token) = (i128::from(self.rate), i128::from(SECOND));
        // In billionths of a token.
        let saved = ((now - word) * rate).min(i128::from(self.burst) * token);
        (saved >= token).then(|| (now - (saved - token) / rate) as u64)
    }

    /// By how much a word may be off that counts in whole nanoseconds a token.
    fn slack(self) -> u64 {
        if SECOND.is_multiple_of(u64::from(self.rate)) { 0 } else { u64::from(self.burst) + 1 }
    }

    fn flows(service: &ServiceEntry) -> Option<Self> {
        (service.source_flow_rate != 0)
            .then_some(Self { rate: service.source_flow_rate, burst: service.source_flow_burst })
    }

    fn packets(service: &ServiceEntry) -> Option<Self> {
        (service.source_packet_rate != 0)
            .then_some(Self { rate: service.source_packet_rate, burst: service.source_packet_burst })
    }
}

/// Why a client may not begin a flow of a service that there is; `counted`: the packet has had a flow, whose limit it kept.
pub fn refuses(
    state: &mut State,
    input: &Input,
    client: &Key,
    number: u32,
    service: &ServiceEntry,
    counted: bool,
) -> Option<Reason> {
    if !lets_in(state, client, number, service) {
        return Some(Reason::SourceDenied);
    }
    let (flows, packets) = (Bucket::flows(service), Bucket::packets(service).filter(|_| !counted));
    if flows.is_none() && service.source_packet_rate == 0 && service.source_half_open == 0 {
        return None;
    }
    let source = SourceId { address: source(client), service: number };
    let spent = *state.sources.entry(source).or_default();
    state.touched_sources.push(source);
    if service.source_half_open != 0 && half_open(state, input, source, service) >= service.source_half_open {
        state.hit(Point::QuotaReached);
        return Some(Reason::SourceHalfOpen);
    }
    if flows.is_some_and(|bucket| bucket.taken(spent.flows, input.precise).is_none()) {
        state.hit(Point::FlowsTooFast);
        return Some(Reason::SourceFlowRate);
    }
    if packets.is_some_and(|bucket| bucket.taken(spent.packets, input.precise).is_none()) {
        state.hit(Point::PacketsTooFast);
        return Some(Reason::SourcePacketRate);
    }
    for (bucket, of_packets) in [(flows, false), (packets, true)] {
        if let Some(bucket) = bucket {
            draw(state, input, source, bucket, of_packets);
        }
    }
    state.hit(Point::WithinLimits);
    None
}

/// True where the packet's flow, if its service limits the packets of a source, keeps to that.
pub fn keeps_pace(state: &mut State, input: &Input, flow: &Flow) -> bool {
    if flow.flags & flow_flag::PACKET_LIMIT == 0 || flow.direction != 0 {
        return true;
    }
    let Some((service, _)) = state.config.services.get(&flow.service) else { return true };
    let Some(bucket) = Bucket::packets(service) else {
        state.hit(Point::LimitIsGone);
        return true;
    };
    let source = SourceId { address: source(&flow.key), service: flow.service };
    let spent = *state.sources.entry(source).or_default();
    state.touched_sources.push(source);
    if bucket.taken(spent.packets, input.precise).is_none() {
        state.hit(Point::FlowTooFast);
        return false;
    }
    state.hit(Point::FlowKeepsPace);
    draw(state, input, source, bucket, true);
    true
}

/// The moments at which the buckets of all sources have their next token: between that of one and that of another, which may be
/// less than a microsecond, a packet meets one of the two alone.
pub fn next_tokens(state: &State) -> Vec<u64> {
    let of = |(source, spent): (&SourceId, &SourceUse)| {
        let (service, _) = state.config.services.get(&source.service)?;
        let next = |word: u64, bucket: Option<Bucket>| bucket.map(|bucket| word + SECOND.div_ceil(bucket.rate.into()));
        Some([next(spent.flows, Bucket::flows(service)), next(spent.packets, Bucket::packets(service))])
    };
    state.sources.iter().filter_map(of).flatten().flatten().collect()
}

/// Takes a token that is there.
fn draw(state: &mut State, input: &Input, source: SourceId, bucket: Bucket, packets: bool) {
    let Some(spent) = state.sources.get_mut(&source) else { return };
    let word = if packets { &mut spent.packets } else { &mut spent.flows };
    let at = |now| bucket.taken(*word, now);
    let now = at(input.precise).unwrap_or(*word);
    // The token may have come only after the program began.
    let low = at(input.ran.0).unwrap_or(*word + SECOND / u64::from(bucket.rate));
    let high = at(input.ran.1).unwrap_or(now);
    let slack = bucket.slack();
    *word = now;
    state.drawn.push(Drawn { source, packets, word: (low.saturating_sub(slack), high + slack) });
}

/// True where the source ranges of the service let the client in.
pub fn lets_in(state: &mut State, client: &Key, number: u32, service: &ServiceEntry) -> bool {
    if service.flags & service_flag::SOURCE_RANGES == 0 {
        return true;
    }
    let longest = (0..=128).rev().map(|len| range(number, &client.src, len)).find_map(|key| {
        let allowed = state.config.ranges.get(&key)?;
        Some((key, *allowed))
    });
    match longest {
        Some((key, allowed)) => {
            *state.range_hits.entry(key).or_default() += 1;
            state.hit(if allowed { Point::RangeAllows } else { Point::RangeDenies });
            allowed
        }
        None => {
            let refused = service.flags & service_flag::SOURCES_REFUSED_BY_DEFAULT != 0;
            state.hit(if refused { Point::NoRangeDenies } else { Point::NoRangeAllows });
            !refused
        }
    }
}

/// The range of a service that holds the first `len` bits of an address, as maps hold that.
pub fn range(service: u32, address: &Wide, len: u32) -> SourceKey {
    SourceKey { prefix_len: RANGE_PREFIX + len, source: RangeSource { service, address: first_bits(address, len) } }
}

/// Whose limits a client's packets count for: an IPv4 address stands for itself, an IPv6 one for its /64, in which a host may
/// take any (RFC 8981).
fn source(client: &Key) -> Wide {
    if client.v6 { first_bits(&client.src, 64) } else { client.src }
}

/// Number of the window of time at `at`, where half-open flows live for `timeout` seconds.
fn window(at: u64, timeout: u32) -> u32 {
    (at / (u64::from(timeout.max(1)) * SECOND)) as u32
}

/// Half-open flows of a source, in this window and the one before; those before that have ended, told or not.
fn half_open(state: &mut State, input: &Input, source: SourceId, service: &ServiceEntry) -> u32 {
    let window = window(input.window, service.half_open_timeout);
    let Some(SourceUse { half_open, .. }) = state.sources.get_mut(&source) else { return 0 };
    let (now, before) = match window.wrapping_sub(half_open.window) {
        0 => (half_open.now, half_open.before),
        1 => (0, half_open.now),
        _ => (0, 0),
    };
    (half_open.window, half_open.now, half_open.before) = (window, now, before);
    now.saturating_add(before)
}

/// A client's flow is half-open now.
pub fn half_opened(state: &mut State, input: &Input, client: &Key, number: u32) {
    let Some((service, _)) = state.config.services.get(&number).cloned() else { return };
    if service.source_half_open == 0 {
        return;
    }
    let source = SourceId { address: source(client), service: number };
    state.sources.entry(source).or_default();
    state.touched_sources.push(source);
    half_open(state, input, source, &service);
    if let Some(spent) = state.sources.get_mut(&source) {
        spent.half_open.now = spent.half_open.now.saturating_add(1);
    }
}

/// A flow is half-open no longer, as one of its entries in that table says.
pub fn half_open_ended(state: &mut State, input: &Input, flow: &Flow) {
    let Some((service, _)) = state.config.services.get(&flow.service).cloned() else { return };
    let client = if flow.direction == 0 { flow.key.src } else { flow.new_dst };
    let source = SourceId { address: source(&Key { src: client, ..flow.key }), service: flow.service };
    if service.source_half_open == 0 || !state.sources.contains_key(&source) {
        return;
    }
    state.touched_sources.push(source);
    half_open(state, input, source, &service);
    let began = window(flow.created, service.half_open_timeout);
    let Some(spent) = state.sources.get_mut(&source) else { return };
    let half_open = &mut spent.half_open;
    let count = match half_open.window.wrapping_sub(began) {
        0 => &mut half_open.now,
        1 => &mut half_open.before,
        _ => {
            state.hit(Point::EndedTooLate);
            return;
        }
    };
    *count = count.saturating_sub(1);
    state.hit(Point::QuotaGivenBack);
}

/// As if what a source did were `by` ns longer ago.
pub fn age(spent: &mut SourceUse, service: &ServiceEntry, by: u64) {
    spent.flows = spent.flows.saturating_sub(by);
    spent.packets = spent.packets.saturating_sub(by);
    spent.half_open.window = spent.half_open.window.wrapping_sub(window(by, service.half_open_timeout));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_holds_its_burst_and_fills_at_its_rate() {
        let bucket = Bucket { rate: 4, burst: 2 };
        let now = 100 * SECOND;
        let first = bucket.taken(0, now).unwrap_or(0);
        let second = bucket.taken(first, now).unwrap_or(0);
        assert_eq!((first, second), (now - SECOND / 4, now));
        assert_eq!(bucket.taken(second, now + SECOND / 4 - 1), None);
        assert_eq!(bucket.taken(second, now + SECOND / 4), Some(now + SECOND / 4));
    }

    #[test]
    fn the_first_bits_of_an_address_are_those_of_its_first_bytes() {
        let octets = |text: &str| text.parse::<std::net::Ipv6Addr>().map(|it| it.octets()).unwrap_or_default();
        let words =
            |text: &str| std::array::from_fn(|n| u32::from_ne_bytes(std::array::from_fn(|b| octets(text)[n * 4 + b])));
        assert_eq!(range(7, &words("2001:db8:ffff::1"), 33).source.address, words("2001:db8:8000::"));
        assert_eq!(range(7, &words("2001:db8::1"), 0).source.address, [0; 4]);
    }
}
