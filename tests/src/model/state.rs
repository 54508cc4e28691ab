//! What the model knows: configuration, routes, tables and counters, and which entries the packet at hand touched.

use std::{collections::BTreeMap, sync::Arc};

use edge_common::{
    address::Wide,
    maps::{
        AffinityEntry, AffinityKey, BackendEntry, Fragment, FragmentKey, NextHop, OwnAddresses, Pending, ServiceEntry,
        ServiceKey, ServiceStats, SourceId, SourceKey, SourceUse,
    },
    verdict::Reason,
};

use super::{
    coverage::{Coverage, Point},
    flow::{Flow, Key},
    protect::Drawn,
};

/// A second in nanoseconds.
pub const SECOND: u64 = 1_000_000_000;

/// A flow table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Table {
    /// Flows that proved themselves.
    Established,
    /// SYNs and first datagrams.
    HalfOpen,
    /// After RST or both FINs.
    Closing,
}

/// All of them.
pub const TABLES: [Table; 3] = [Table::Established, Table::HalfOpen, Table::Closing];

/// What the kernel's route lookup says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// A neighbour with a link-layer address.
    Neighbour {
        /// Egress interface.
        ifindex: u32,
        /// The neighbour's address, of either family.
        address: Wide,
        /// Its MAC.
        dst_mac: [u8; 6],
        /// The interface's MAC.
        src_mac: [u8; 6],
        /// Longest packet from the IP header on.
        mtu: u32,
    },
    /// A neighbour without a link-layer address.
    Unresolved,
    /// A route that refuses.
    Refused,
    /// No route at all, or this host.
    NotForwarded,
}

/// A service's selection: backend numbers, and the table of indices into them.
#[derive(Clone, Debug, Default)]
pub struct Pool {
    /// Backend numbers.
    pub members: Vec<u32>,
    /// Maglev table.
    pub table: Vec<u16>,
    /// What serves while none of these can.
    pub backup: Option<Box<Pool>>,
}

/// A backend's weight, as far as the table does not hold it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Weight {
    /// 0 counts as 1.
    pub weight: u32,
    /// The part of it that a backend has while it starts slowly, percent; 0: all of it.
    pub share: u32,
}

impl Weight {
    /// The part of the weight that it has now.
    pub fn hundredths(self) -> u64 {
        let share = if self.share == 0 { 100 } else { self.share };
        u64::from(self.weight.max(1)) * u64::from(share)
    }
}

/// What a backend has to do, as the maps hold it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Flows opened less flows closed, modulo 2^32.
    pub live: u32,
    /// Flows that the daemon ended.
    pub expired: u64,
    /// Flows that have not proved themselves.
    pub pending: Pending,
}

impl Load {
    /// Flows that it has: fewer than none are none.
    pub fn active(&self) -> u32 {
        let (live, expired) = (i64::from(self.live), (self.expired % (1 << 32)) as i64);
        match (live - expired).rem_euclid(1 << 32) {
            flows if flows < 1 << 31 => flows as u32,
            _ => 0,
        }
    }

    /// Flows that pend in a tick: half of those of the tick before, none of older ones. The clock of what wrote them may have
    /// been ahead.
    pub fn pending_at(&self, tick: u32) -> u32 {
        match tick.wrapping_sub(self.pending.tick).cast_signed() {
            ..=0 => self.pending.flows,
            1 => self.pending.flows / 2,
            _ => 0,
        }
    }
}

/// Configuration, as the daemon writes it, and the world around.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// Services by number.
    pub services: BTreeMap<u32, (ServiceEntry, Pool)>,
    /// Frontends.
    pub frontends: BTreeMap<ServiceKey, u32>,
    /// Backends by number.
    pub backends: BTreeMap<u32, BackendEntry>,
    /// Which of them may have new flows.
    pub eligible: BTreeMap<u32, bool>,
    /// How much of them by the side of others.
    pub weights: BTreeMap<u32, Weight>,
    /// dnat backends by address.
    pub dnat_backends: BTreeMap<ServiceKey, u32>,
    /// Prefilter bits of destinations.
    pub destinations: Vec<bool>,
    /// Prefilter bits of sources.
    pub sources: Vec<bool>,
    /// Ports that SNAT may use.
    pub ports: Vec<bool>,
    /// The tuple hash's key.
    pub seed: [u64; 2],
    /// The route generation.
    pub generation: u32,
    /// Interfaces that XDP may redirect to.
    pub redirectable: Vec<u32>,
    /// Routes: IPv6 or not, network, length of its prefix in the form of 16 bytes, answer.
    pub routes: Vec<(bool, Wide, u8, Route)>,
    /// The addresses that messages are signed with, by interface.
    pub own: BTreeMap<u32, OwnAddresses>,
    /// Entries the established table of each family holds.
    pub established: usize,
    /// Highest next-hop number.
    pub next_hops: u32,
    /// Clients may be told that their connection is not known.
    pub answers: bool,
    /// Source ranges, and whether they let in.
    pub ranges: BTreeMap<SourceKey, bool>,
}

impl Config {
    /// The prefilter's bit for an address: part of the layout of `AddressFilter`.
    pub fn bit(v6: bool, address: &Wide) -> usize {
        let factors =
            if v6 { [0x85eb_ca6b, 0xc2b2_ae35, 0x27d4_eb2f, 0x9e37_79b1] } else { [0, 0, 0, 0x9e37_79b1_u32] };
        let products = address.iter().zip(factors).map(|(word, factor)| word.wrapping_mul(factor));
        (products.fold(0_u32, u32::wrapping_add) >> 16) as usize
    }

    /// Where a packet with these addresses goes: the longest prefix's answer. Of IPv6 no router passes on what is from or to a
    /// link-local address (RFC 4291, 2.5.6) or a loopback one, nor does this one route multicasts.
    pub fn route(&self, v6: bool, src: &Wide, dst: &Wide) -> Route {
        if v6 && [src, dst].into_iter().any(stays_on_link) {
            return Route::NotForwarded;
        }
        let covers = |network: &Wide, len: u8| first_bits(dst, len.into()) == first_bits(network, len.into());
        let matching = self.routes.iter().filter(|(of_v6, network, len, _)| *of_v6 == v6 && covers(network, *len));
        matching.max_by_key(|(_, _, len, _)| *len).map_or(Route::NotForwarded, |(_, _, _, route)| *route)
    }
}

/// True for an IPv6 address that is link-local.
pub fn is_link_local(address: &Wide) -> bool {
    u32::from_be(address[0]) >> 22 == 0xfe80 >> 6
}

fn stays_on_link(address: &Wide) -> bool {
    let loopback = [0, 0, 0, 1_u32.to_be()];
    is_link_local(address) || u32::from_be(address[0]) >> 24 == 0xff || *address == loopback
}

/// The first `len` bits of an address, the others 0.
pub fn first_bits(address: &Wide, len: u32) -> Wide {
    let bytes: [u8; 16] = std::array::from_fn(|byte| address[byte / 4].to_ne_bytes()[byte % 4]);
    let kept = u128::from_be_bytes(bytes) & u128::MAX.checked_shl(128 - len).unwrap_or(0);
    let kept = kept.to_be_bytes();
    std::array::from_fn(|word| u32::from_ne_bytes(std::array::from_fn(|byte| kept[word * 4 + byte])))
}

/// What the program counted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// By service and reason number.
    pub reasons: BTreeMap<(u32, u32), u64>,
    /// By service.
    pub services: BTreeMap<u32, ServiceStats>,
    /// By backend.
    pub backends: BTreeMap<u32, ServiceStats>,
}

/// Everything.
#[derive(Clone, Debug, Default)]
pub struct State {
    /// What the daemon wrote; shared by copies until [`State::configure`].
    pub config: Arc<Config>,
    tables: [BTreeMap<Key, Flow>; 3],
    /// First fragments.
    pub fragments: BTreeMap<FragmentKey, Fragment>,
    /// Those that the packet at hand left.
    pub touched_fragments: Vec<FragmentKey>,
    /// Next hops by number.
    pub next_hops: BTreeMap<u32, NextHop>,
    /// Next-hop numbers by interface and neighbour.
    pub next_hop_index: BTreeMap<(u32, Wide), u32>,
    /// Last next-hop number given out.
    pub next_hop_cursor: u32,
    /// SNAT cursors, as last seen.
    pub cursors: BTreeMap<u32, u32>,
    /// What backends have to do.
    pub loads: BTreeMap<u32, Load>,
    /// Those for which the packet at hand changed that.
    pub touched_loads: Vec<u32>,
    /// Whose turn it is in a service.
    pub turns: BTreeMap<u32, u32>,
    /// Services in which the packet at hand took one.
    pub touched_turns: Vec<u32>,
    /// Where clients are at home.
    pub homes: BTreeMap<AffinityKey, AffinityEntry>,
    /// Of whom the packet at hand asked.
    pub touched_homes: Vec<AffinityKey>,
    /// Counters.
    pub counters: Counters,
    /// What sources have used up.
    pub sources: BTreeMap<SourceId, SourceUse>,
    /// How often a range decided.
    pub range_hits: BTreeMap<SourceKey, u64>,
    /// Decision points met.
    pub coverage: Coverage,
    /// Entries that the packet at hand read for a decision or changed.
    pub touched: Vec<(Table, Key)>,
    /// Next hops that it changed.
    pub touched_hops: Vec<u32>,
    /// Sources whose limits it was held against.
    pub touched_sources: Vec<SourceId>,
    /// What it took of their buckets.
    pub drawn: Vec<Drawn>,
    /// The service and the reason for which it was refused, where it might have been another by another clock.
    pub refused: Option<(u32, Reason)>,
    /// What the kernel had counted before the world began.
    pub base: Arc<Counters>,
    /// The ticks between which it may have put `touch_due`.
    pub touch_due: Option<(u32, u32)>,
    /// Times a SNAT port was refused although some were free: chance explains a few.
    pub refusals: u64,
}

/// The key of the other direction's entry: the rewritten tuple, reversed.
pub fn twin_key(flow: &Flow) -> Key {
    Key {
        v6: flow.key.v6,
        src: flow.new_dst,
        dst: flow.new_src,
        src_port: flow.new_dst_port,
        dst_port: flow.new_src_port,
        protocol: flow.key.protocol,
    }
}

impl State {
    /// The configuration, to be changed.
    pub fn configure(&mut self) -> &mut Config {
        Arc::make_mut(&mut self.config)
    }

    /// An entry.
    pub fn flow(&self, table: Table, key: &Key) -> Option<&Flow> {
        self.tables[table as usize].get(key)
    }

    /// An entry to be changed.
    pub fn change(&mut self, table: Table, key: &Key) -> Option<&mut Flow> {
        self.touched.push((table, *key));
        self.tables[table as usize].get_mut(key)
    }

    /// The entry of the other direction, if it is that and not another flow's.
    pub fn twin(&self, table: Table, flow: &Flow) -> Twin {
        match self.flow(table, &twin_key(flow)) {
            None => Twin::Missing,
            Some(twin) if twin_key(twin) == flow.key => Twin::Ours(*twin),
            Some(_) => Twin::Strangers,
        }
    }

    /// Adds or replaces an entry.
    pub fn put(&mut self, table: Table, flow: Flow) {
        self.touched.push((table, flow.key));
        self.tables[table as usize].insert(flow.key, flow);
    }

    /// Takes an entry out.
    pub fn remove(&mut self, table: Table, key: &Key) -> bool {
        self.touched.push((table, *key));
        self.tables[table as usize].remove(key).is_some()
    }

    /// All entries of a table.
    pub fn table(&self, table: Table) -> &BTreeMap<Key, Flow> {
        &self.tables[table as usize]
    }

    /// True where the table has no room for another entry of a family.
    pub fn is_full(&self, table: Table, v6: bool) -> bool {
        self.tables[table as usize].keys().filter(|key| key.v6 == v6).count() >= self.config.established
    }

    /// All entries of a table, for a step that is no packet.
    pub fn table_mut(&mut self, table: Table) -> &mut BTreeMap<Key, Flow> {
        &mut self.tables[table as usize]
    }

    /// Counts a reason.
    pub fn because(&mut self, reason: Reason, service: u32) {
        *self.counters.reasons.entry((service, reason as u32)).or_default() += 1;
    }

    /// Changes the counters of a service and of a backend.
    pub fn count(&mut self, service: u32, backend: u32, change: impl Fn(&mut ServiceStats)) {
        change(self.counters.services.entry(service).or_default());
        change(self.counters.backends.entry(backend).or_default());
    }

    /// Counts a visit of a decision point.
    pub fn hit(&mut self, point: Point) {
        self.coverage.hit(point);
    }
}

/// What stands where a flow's other half should be.
#[derive(Clone, Copy, Debug)]
#[allow(clippy::large_enum_variant, reason = "lives on the stack for a moment")]
pub enum Twin {
    /// Nothing.
    Missing,
    /// The other half.
    Ours(Flow),
    /// Half of another flow.
    Strangers,
}
