//! Names, capacities and `repr(C)` layouts of every BPF map. Integers only, explicit zeroed padding; sizes,
//! alignments and the offsets that matter are asserted at compile time, because a pinned map outlives the
//! program that made it.
//!
//! Addresses that one map holds for both families are [`Wide`]: 16 bytes, IPv4 as v4-mapped.
//!
//! Numbers: services, backends and next hops are array indices from 1; 0 means "none" (and counts what
//! belongs to no service).

use crate::{
    address::{Address, Wide},
    checksum,
    conntrack::Direction,
    filter,
    flow::FlowKey,
    verdict,
};

pub use crate::address::mapped;

mod selection;
pub use selection::{AFFINITY_ENTRIES, AffinityEntry, AffinityKey, Pending, active, less_loaded, load_weight};

mod protect;
pub use protect::{
    RANGE_PREFIX, RangeSource, SOURCE_RANGES, SOURCES, SourceId, SourceKey, SourceRange, SourceUse, range_action,
};

pub mod capture;
pub mod events;
pub mod stages;

pub use events::{BackendSignals, DropSample, FlowEnd};

mod any_port;
mod cache;
mod fragment;
mod icmp;
mod vlan;
pub use any_port::ANY_PORT;
pub use cache::*;
pub use fragment::*;
pub use icmp::*;
pub use vlan::*;

/// Map names as in the object file and under the pin folder.
pub mod name {
    /// `HashMap<FlowKeyV4, FlowV4>`, preallocated: flows that proved themselves.
    pub const ESTABLISHED: &str = "ESTABLISHED";
    /// `LruHashMap<FlowKeyV4, FlowV4>`: SYNs and first datagrams.
    pub const HALF_OPEN: &str = "HALF_OPEN";
    /// `LruHashMap<FlowKeyV4, FlowV4>`: flows after FIN or RST, and resting SNAT ports.
    pub const CLOSING: &str = "CLOSING";
    /// As [`ESTABLISHED`], `HashMap<FlowKeyV6, FlowV6>`.
    pub const ESTABLISHED_V6: &str = "ESTABLISHED_V6";
    /// As [`HALF_OPEN`], `LruHashMap<FlowKeyV6, FlowV6>`.
    pub const HALF_OPEN_V6: &str = "HALF_OPEN_V6";
    /// As [`CLOSING`], `LruHashMap<FlowKeyV6, FlowV6>`.
    pub const CLOSING_V6: &str = "CLOSING_V6";
    /// `HashMap<ServiceKey, u32>`: frontend to service number; port [`super::ANY_PORT`] where no other key has the packet's.
    pub const SERVICE_INDEX: &str = "SERVICE_INDEX";
    /// `Array<ServiceEntry>` by service number.
    pub const SERVICES: &str = "SERVICES";
    /// `Array<Label>` by service number: the operator's name for it, for `--kernel`.
    pub const SERVICE_LABELS: &str = "SERVICE_LABELS";
    /// `Array<BackendEntry>` by backend number.
    pub const BACKENDS: &str = "BACKENDS";
    /// `Array<u32>` by backend number: [`super::backend_state`] bits, one in-place write excludes a backend.
    pub const BACKEND_STATE: &str = "BACKEND_STATE";
    /// `Array<u32>` by backend number: SNAT candidate cursor, advanced by the program.
    pub const BACKEND_CURSOR: &str = "BACKEND_CURSOR";
    /// `Array<u32>` by backend number: flows opened less flows closed, modulo 2^32, by the program's atomic additions;
    /// [`super::active`] makes the flows it has of it.
    pub const BACKEND_LIVE: &str = "BACKEND_LIVE";
    /// `Array<Pending>` by backend number, of backends with a limit.
    pub const BACKEND_PENDING: &str = "BACKEND_PENDING";
    /// `Array<u64>` by backend number: established flows that the daemon ended as idle. Written by the daemon only.
    pub const BACKEND_EXPIRED: &str = "BACKEND_EXPIRED";
    /// `Array<u32>` by service number: whose turn it is, advanced by the program.
    pub const SERVICE_CURSOR: &str = "SERVICE_CURSOR";
    /// `PerCpuArray<u32>`, one element: whether the selection under way has met a backend at its limit. In a map, since the
    /// verifier follows every value of a variable through every step of a loop.
    pub const SELECTION_MET_FULL: &str = "SELECTION_MET_FULL";
    /// `LruHashMap<AffinityKey, AffinityEntry>`: where clients of services with affinity are at home.
    pub const AFFINITY: &str = "AFFINITY";
    /// `HashMap<ServiceKey, u32>`: a dnat backend's address, port, protocol to its number; port [`super::ANY_PORT`] where no
    /// other key has the packet's.
    pub const BACKEND_INDEX: &str = "BACKEND_INDEX";
    /// `Array<Chunk>`: selection regions, see [`super::SelectionHeader`].
    pub const SELECTION: &str = "SELECTION";
    /// `Array<NextHop>` by next-hop number.
    pub const NEXT_HOPS: &str = "NEXT_HOPS";
    /// `HashMap<NeighbourKey, u32>`: neighbour to next-hop number.
    pub const NEXT_HOP_INDEX: &str = "NEXT_HOP_INDEX";
    /// `Array<u32>`, one element: last next-hop number given out.
    pub const NEXT_HOP_CURSOR: &str = "NEXT_HOP_CURSOR";
    /// `HashMap<u32, u32>`: ifindex to [`super::interface_flag`] bits.
    pub const INTERFACES: &str = "INTERFACES";
    /// `HashMap<Port, Port>`: a VLAN device to the lower device and the tags under which its frames are on the wire, and
    /// those back to the device; a bond's port to the bond.
    pub const VLANS: &str = "VLANS";
    /// `Array<AddressFilter>`, one element.
    pub const ADDRESS_FILTER: &str = "ADDRESS_FILTER";
    /// `Array<PortSet>`, one element: ports that SNAT may use on the host's addresses.
    pub const SNAT_PORTS: &str = "SNAT_PORTS";
    /// `Array<Control>`, one element, written by the daemon only.
    pub const CONTROL: &str = "CONTROL";
    /// `PerCpuArray<ServiceStats>` by service number.
    pub const SERVICE_STATS: &str = "SERVICE_STATS";
    /// `PerCpuArray<BackendStats>` by backend number.
    pub const BACKEND_STATS: &str = "BACKEND_STATS";
    /// `PerCpuArray<u64>` by `service * REASONS + reason`: packets dropped or passed, by reason.
    pub const REASONS: &str = "REASONS";

    /// `Array<u32>`, one element: [`super::notice`] bits that the program raised, and which of them it has logged.
    pub const NOTICES: &str = "NOTICES";

    /// `LpmTrie<SourceKey, SourceRange>`: who may start flows of which service.
    pub const SOURCE_RANGES: &str = "SOURCE_RANGES";
    /// `LruHashMap<SourceId, SourceUse>`: what a source has used up of its service's limits.
    pub const SOURCES: &str = "SOURCES";

    /// `PerCpuArray<BackendSignals>` by backend number.
    pub const BACKEND_SIGNALS: &str = "BACKEND_SIGNALS";
    /// `PerCpuArray<u64>`, one element: records that the full [`EVENTS`] ring buffer refused.
    pub const EVENTS_LOST: &str = "EVENTS_LOST";

    /// `HashMap<u32, OwnAddresses>`: ifindex to the addresses that this edge signs its ICMP messages with there.
    pub const OWN_ADDRESSES: &str = "OWN_ADDRESSES";
    /// `PerCpuArray<u64>`, one element: when the next ICMP message is due at the full rate, ns of CLOCK_MONOTONIC.
    pub const ICMP_PACE: &str = "ICMP_PACE";

    /// `PerCpuArray<FlowV4>`, one element: the flow that an ICMP error is assumed to be about, while it is translated.
    pub const ASSUMED_FLOW: &str = "ASSUMED_FLOW";
    /// As [`ASSUMED_FLOW`], `PerCpuArray<FlowV6>`.
    pub const ASSUMED_FLOW_V6: &str = "ASSUMED_FLOW_V6";

    /// `LruHashMap<FragmentKey, Fragment>`: first fragments, by which the rest follow.
    pub const FRAGMENTS: &str = "FRAGMENTS";
    /// `Array<u32>`: counters of the IDs that fragmented packets get, by a hash of the address pair.
    pub const FRAGMENT_IDS: &str = "FRAGMENT_IDS";

    /// `Array<CacheSet<u32>>`, mappable: copies of IPv4 flows, see [`super::Slot`].
    pub const FLOW_CACHE: &str = "FLOW_CACHE";
    /// As [`FLOW_CACHE`], of IPv6 flows.
    pub const FLOW_CACHE_V6: &str = "FLOW_CACHE_V6";
    /// `Array<CacheWindow>` by CPU number, mappable: whose part of the cache is where.
    pub const CACHE_WINDOWS: &str = "CACHE_WINDOWS";
    /// `Array<Generations>`, one element, mappable: how often flows of a bucket have changed.
    pub const FLOW_GENERATIONS: &str = "FLOW_GENERATIONS";

    /// `Array<u64>`, one element: from when on unknown connections are told so, ns of CLOCK_MONOTONIC; 0: never. Written by
    /// the daemon only.
    pub const ANSWERS_FROM: &str = "ANSWERS_FROM";
    /// `PerCpuArray<u64>`, one element: when the next RST is due at the full rate, ns of CLOCK_MONOTONIC.
    pub const RESET_PACE: &str = "RESET_PACE";
    /// `PerCpuArray<u64>`, one element: the token bucket of flows seen from one side that are promoted, see
    /// [`crate::limit::take`].
    pub const PROMOTION_PACE: &str = "PROMOTION_PACE";

    /// Every map of the pipeline, in the order in which they are listed to users.
    pub const ALL: &[&str] = &[
        ESTABLISHED,
        HALF_OPEN,
        CLOSING,
        ESTABLISHED_V6,
        HALF_OPEN_V6,
        CLOSING_V6,
        SERVICE_INDEX,
        SERVICES,
        SERVICE_LABELS,
        BACKENDS,
        BACKEND_STATE,
        BACKEND_CURSOR,
        BACKEND_LIVE,
        BACKEND_PENDING,
        BACKEND_EXPIRED,
        SERVICE_CURSOR,
        SELECTION_MET_FULL,
        AFFINITY,
        BACKEND_INDEX,
        SELECTION,
        NEXT_HOPS,
        NEXT_HOP_INDEX,
        NEXT_HOP_CURSOR,
        INTERFACES,
        VLANS,
        ADDRESS_FILTER,
        SNAT_PORTS,
        CONTROL,
        SERVICE_STATS,
        BACKEND_STATS,
        REASONS,
        NOTICES,
        SOURCE_RANGES,
        SOURCES,
        BACKEND_SIGNALS,
        EVENTS_LOST,
        OWN_ADDRESSES,
        ICMP_PACE,
        ASSUMED_FLOW,
        ASSUMED_FLOW_V6,
        FRAGMENTS,
        FRAGMENT_IDS,
        FLOW_CACHE,
        FLOW_CACHE_V6,
        CACHE_WINDOWS,
        FLOW_GENERATIONS,
        ANSWERS_FROM,
        RESET_PACE,
        PROMOTION_PACE,
    ];

    /// aya-log's ring buffer, named by aya-log. Pinned like the others, so that a new daemon goes on reading it; not a
    /// table that can be listed.
    pub const LOG: &str = "AYA_LOGS";

    /// Ring buffer of [`super::FlowEnd`] and [`super::DropSample`] records.
    pub const EVENTS: &str = "EVENTS";
    /// Perf buffers of captured packets: a [`super::capture::CaptureHeader`] and bytes of the frame.
    pub const CAPTURE: &str = "CAPTURE";
    /// Pinned, but not tables that can be listed.
    pub const STREAMS: [&str; 3] = [LOG, EVENTS, CAPTURE];

    /// `Array<u64>` by service number: established flows that the daemon ended as idle. Written by the daemon only, which
    /// creates and pins it; `active = opened - closed - expired`.
    pub const SERVICE_EXPIRED: &str = "SERVICE_EXPIRED";

    /// Maps that only the daemon uses; no program declares them.
    pub const DAEMON: [&str; 1] = [SERVICE_EXPIRED];
}

/// Version of the meaning of fields, part of every pin's layout hash. To be raised where a field changes its meaning and
/// no size changes with it.
pub const LAYOUT: u32 = 3;

/// Default entries of [`name::ESTABLISHED`]: two per flow.
pub const ESTABLISHED_ENTRIES: u32 = 1 << 19;
/// Default entries of [`name::HALF_OPEN`].
pub const HALF_OPEN_ENTRIES: u32 = 1 << 18;
/// Default entries of [`name::CLOSING`].
pub const CLOSING_ENTRIES: u32 = 1 << 18;
/// Default entries of [`name::ESTABLISHED_V6`].
pub const ESTABLISHED_V6_ENTRIES: u32 = 1 << 17;
/// Default entries of [`name::HALF_OPEN_V6`].
pub const HALF_OPEN_V6_ENTRIES: u32 = 1 << 16;
/// Default entries of [`name::CLOSING_V6`].
pub const CLOSING_V6_ENTRIES: u32 = 1 << 16;
/// Frontends, number 0 included.
pub const SERVICES: u32 = 1024;
/// Backends, number 0 included.
pub const BACKENDS: u32 = 8192;
/// Next hops, number 0 included.
pub const NEXT_HOPS: u32 = 4096;
/// Interfaces known to the program.
pub const INTERFACES: u32 = 64;
/// Chunks of [`name::SELECTION`]; chunk 0 is never part of a region.
pub const SELECTION_CHUNKS: u32 = 1 << 16;
/// Source addresses a service may have for SNAT.
pub const SNAT_ADDRESSES: usize = 4;

/// Key of [`name::SERVICE_INDEX`] and [`name::BACKEND_INDEX`]: address and port in network order. 20 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceKey {
    /// Address, network order.
    pub address: Wide,
    /// Port, network order; [`ANY_PORT`]: all that have no key of their own.
    pub port: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// Zero.
    pub _pad: u8,
}

/// A direction of a flow, and all that a packet of it needs. 104 bytes for IPv4, 152 for IPv6, alignment 8.
///
/// Changed in place, never re-inserted; `key` and `sequence` tell a reader whether a copy is of one flow.
/// The key of the other direction's entry (the twin) is the reversed rewritten tuple: [`Flow::twin`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flow<A> {
    /// This entry's own key.
    pub key: FlowKey<A>,
    /// Source address after rewriting, network order.
    pub new_src: A,
    /// Destination address after rewriting, network order.
    pub new_dst: A,
    /// Source port after rewriting, network order.
    pub new_src_port: u16,
    /// Destination port after rewriting, network order.
    pub new_dst_port: u16,
    /// Ones'-complement difference of both addresses (new minus old), as 16-bit words in network order; the
    /// pseudo-header's part of the L4 checksum and all of the IPv4 header's (IPv6 has none).
    pub address_delta: u16,
    /// Ones'-complement difference of both ports, as above; not part of a CHECKSUM_PARTIAL.
    pub port_delta: u16,
    /// What another version might have added here.
    #[cfg(feature = "layout-test")]
    pub inserted: [u32; 2],
    /// Next-hop number; 0: look the route up for every packet until it resolves.
    pub next_hop: u32,
    /// [`Control::route_generation`] at which `next_hop` was looked up.
    pub route_generation: u32,
    /// Service number.
    pub service: u32,
    /// Backend number.
    pub backend: u32,
    /// Grows with every change of identity of this entry (promotion, re-use).
    pub sequence: u32,
    /// A [`crate::conntrack::State`] number.
    pub state: u8,
    /// A [`crate::conntrack::Direction`] number.
    pub direction: u8,
    /// [`flow_flag`] bits.
    pub flags: u16,
    /// Half-open TCP: the backend's latest initial sequence number + 1, host order (what the client must
    /// acknowledge at least); valid once `SYN_ACK_SEEN` is set. Before: see `CLIENT_ACKED`, else how often the client has
    /// repeated its SYN.
    pub ack_floor: u32,
    /// Established: when the program next refreshes the twin and looks the route up again, in the ticks of
    /// [`crate::conntrack::ticks`].
    pub touch_due: u32,
    /// Reply entry: microseconds from `created` to the backend's first SYN-ACK or datagram; 0: none yet.
    pub answered_after: u32,
    /// Reply entry: microseconds from `created` to the backend's first byte of payload; 0: none yet.
    pub first_byte_after: u32,
    /// Creation time, ns of CLOCK_MONOTONIC.
    pub created: u64,
    /// Last packet of this direction, or touch of the twin, ns of CLOCK_MONOTONIC (coarse).
    pub last_seen: u64,
    /// Packets of this direction.
    pub packets: u64,
    /// Bytes of this direction, from the IP header on.
    pub bytes: u64,
}

/// A direction of an IPv4 flow.
pub type FlowV4 = Flow<u32>;
/// A direction of an IPv6 flow.
pub type FlowV6 = Flow<[u32; 4]>;

impl<A: Address> Flow<A> {
    /// The key of the other direction's entry.
    #[inline(always)]
    pub const fn twin(&self) -> FlowKey<A> {
        FlowKey::new(self.new_dst, self.new_src, self.new_dst_port, self.new_src_port, self.key.protocol)
    }

    /// Makes this entry the other direction's: reversed tuple, complemented deltas, no next hop, no packets.
    #[inline(always)]
    pub const fn turn(&mut self) {
        let twin = self.twin();
        self.new_src = self.key.dst;
        self.new_dst = self.key.src;
        self.new_src_port = self.key.dst_port;
        self.new_dst_port = self.key.src_port;
        self.key = twin;
        self.address_delta = !self.address_delta;
        self.port_delta = !self.port_delta;
        self.next_hop = 0;
        self.route_generation = 0;
        self.direction = Direction::from_number(self.direction).opposite() as u8;
        self.packets = 0;
        self.bytes = 0;
    }

    /// Writes both checksum deltas from the tuple and its rewritten form.
    #[inline(always)]
    pub fn set_deltas(&mut self) {
        self.address_delta = checksum::address_delta(self.key.src, self.key.dst, self.new_src, self.new_dst);
        self.port_delta =
            checksum::port_delta(self.key.src_port, self.key.dst_port, self.new_src_port, self.new_dst_port);
    }
}

/// Bits of [`Flow::flags`].
pub mod flow_flag {
    /// The backend's SYN-ACK was seen; `ack_floor` is valid.
    pub const SYN_ACK_SEEN: u16 = 1 << 0;
    /// The client has sent FIN.
    pub const CLIENT_FIN: u16 = 1 << 1;
    /// The backend has sent FIN.
    pub const BACKEND_FIN: u16 = 1 << 2;
    /// UDP: the backend has answered.
    pub const REPLIED: u16 = 1 << 3;
    /// The backend closed first, so its TIME_WAIT may still hold the port.
    pub const BACKEND_CLOSED_FIRST: u16 = 1 << 4;
    /// The client has repeated its SYN with nothing from the backend, and that has been counted.
    pub const UNANSWERED: u16 = 1 << 5;
    /// Closing: while it was established, a RST came that said to be the client's.
    pub const RESET_BY_CLIENT: u16 = 1 << 6;
    /// Closing: while it was established, a RST came that said to be the backend's.
    pub const RESET_BY_BACKEND: u16 = 1 << 7;
    /// Either of the two.
    pub const RESET: u16 = RESET_BY_CLIENT | RESET_BY_BACKEND;
    /// The service limits the packets of each source: the client's are counted.
    pub const PACKET_LIMIT: u16 = 1 << 8;
    /// UDP: the flow ends with the backend's first answer.
    pub const ONE_REPLY: u16 = 1 << 9;
    /// TCP of a dnat service: the replies may come by another edge.
    pub const CROSSING: u16 = 1 << 10;
    /// Begun by a packet in mid-flow.
    pub const ADOPTED: u16 = 1 << 11;
    /// Half-open TCP, the client's half: `ack_floor` is what it acknowledged last, with no SYN-ACK seen.
    pub const CLIENT_ACKED: u16 = 1 << 12;
}

/// A frontend: one listen address of one service. 140 bytes, alignment 4.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ServiceEntry {
    /// VIP, network order.
    pub address: Wide,
    /// Listen port, network order; [`ANY_PORT`]: all that no other frontend has.
    pub port: u16,
    /// IP protocol number; 0: this number is free.
    pub protocol: u8,
    /// [`mode::FULL_NAT`] or [`mode::DNAT`].
    pub mode: u8,
    /// First chunk of the selection region in force; 0: no pool yet. One aligned u32, so replacing the pool
    /// and its table is one write that cannot be seen half done.
    pub selection: u32,
    /// How many of `snat_addresses` are set; 0: the backend's own `snat_address` serves.
    pub snat_count: u32,
    /// SNAT source addresses, network order, of the VIP's family.
    pub snat_addresses: [Wide; SNAT_ADDRESSES],
    /// Lowest SNAT port, host order.
    pub snat_port_min: u16,
    /// Highest SNAT port, inclusive, host order.
    pub snat_port_max: u16,
    /// Idle timeout of an established flow, seconds.
    pub established_timeout: u32,
    /// Idle timeout of a half-open flow, seconds.
    pub half_open_timeout: u32,
    /// How long a closed flow and its SNAT port rest, seconds.
    pub closing_timeout: u32,
    /// How long a client stays with its backend, seconds; 0: no affinity.
    pub affinity_timeout: u32,
    /// New flows a second that one source may start; 0: no limit.
    pub source_flow_rate: u32,
    /// New flows that one source may start at once.
    pub source_flow_burst: u32,
    /// Packets a second that one source may send; 0: no limit.
    pub source_packet_rate: u32,
    /// Packets that one source may send at once.
    pub source_packet_burst: u32,
    /// Half-open flows that one source may have; 0: no limit.
    pub source_half_open: u32,
    /// [`service_flag`] bits.
    pub flags: u16,
    /// Largest segment size let through in SYNs, bytes; 0: as it is.
    pub mss: u16,
    /// One of [`balance`].
    pub balance: u8,
    /// Zero.
    pub _pad: [u8; 3],
}

/// Bits of [`ServiceEntry::flags`].
pub mod service_flag {
    /// Source ranges apply: some are listed.
    pub const SOURCE_RANGES: u16 = 1 << 0;
    /// A source that no range names is refused.
    pub const SOURCES_REFUSED_BY_DEFAULT: u16 = 1 << 1;
    /// UDP: a flow ends with the backend's first answer.
    pub const ONE_REPLY: u16 = 1 << 2;
    /// Ended flows are reported through the events ring buffer.
    pub const RECORD_ENDS: u16 = 1 << 3;
    /// The VIP is held by the host for nobody else: the kernel answers what has no frontend or flow.
    pub const DEDICATED: u16 = 1 << 4;
}

/// Values of [`ServiceEntry::balance`].
pub mod balance {
    /// Weighted Maglev.
    pub const MAGLEV: u8 = 0;
    /// One after the other.
    pub const ROUND_ROBIN: u8 = 1;
    /// The less loaded of two random ones.
    pub const LEAST_CONNECTIONS: u8 = 2;
}

/// Values of [`ServiceEntry::mode`].
pub mod mode {
    /// Source and destination are rewritten; the backend sees the edge.
    pub const FULL_NAT: u8 = 0;
    /// Only the destination is rewritten; the backend sees the client.
    pub const DNAT: u8 = 1;
}

/// A backend of one service, of its VIP's family. 44 bytes, alignment 4.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BackendEntry {
    /// Address, network order.
    pub address: Wide,
    /// Port, network order; [`ANY_PORT`]: the one that the client asked for.
    pub port: u16,
    /// IP protocol number; 0: this number is free.
    pub protocol: u8,
    /// Zero.
    pub _pad: u8,
    /// The service number it belongs to.
    pub service: u32,
    /// The host's address that the kernel would use towards this backend, network order; all zero: not known yet.
    pub snat_address: Wide,
    /// Connections it may have at once; 0: no limit.
    pub limit: u32,
}

/// Bits of a [`name::BACKEND_STATE`] value.
pub mod backend_state {
    /// May be given new flows.
    pub const ELIGIBLE: u32 = 1 << 0;
    /// Used while no other can be. For whoever adopts the maps; the program does not look at it.
    pub const BACKUP: u32 = 1 << 1;
    /// Where the share of its weight begins that a backend has while it starts slowly, percent; 0: all of it.
    pub const SHARE_SHIFT: u32 = 8;
    /// The share's bits, after shifting.
    pub const SHARE_MASK: u32 = 0x7f;
    /// Where the weight begins; 0 counts as 1.
    pub const WEIGHT_SHIFT: u32 = 16;
}

/// Bytes of a [`Chunk`].
pub const CHUNK_BYTES: usize = 256;
/// Backend numbers (u32) in a pool chunk.
pub const POOL_PER_CHUNK: u32 = (CHUNK_BYTES / 4) as u32;
/// Table slots (u16 pool indices) in a table chunk.
pub const SLOTS_PER_CHUNK: u32 = (CHUNK_BYTES / 2) as u32;

/// One element of [`name::SELECTION`], read as [`SelectionHeader`], as 64 `u32` or as 128 `u16`, host order.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk(pub [u8; CHUNK_BYTES]);

/// Head of a selection region: `[header][pool: pool_len u32 backend numbers][table: table_len u16 pool indices]`,
/// each part starting on a chunk of its own, and behind it the region of the backup tier where there is one. The table is
/// Maglev's, or the turns of a round robin. A region never changes once a service refers to it; a new pool is a new
/// region, and the service's `selection` moves to it in one write.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SelectionHeader {
    /// Backends in the pool, at most 65,535.
    pub pool_len: u32,
    /// Slots in the table; of Maglev's a prime.
    pub table_len: u32,
    /// Number of the first pool chunk.
    pub pool_chunk: u32,
    /// Number of the first table chunk.
    pub table_chunk: u32,
    /// First chunk of the region that serves while this one has no eligible backend; 0: none.
    pub backup: u32,
}

/// Where packets leave. 52 bytes, alignment 4. A neighbour's new MAC is one write here.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NextHop {
    /// Egress interface; of a VLAN device its lower one.
    pub ifindex: u32,
    /// The neighbour's address, network order: the gateway, or the destination itself on a connected network.
    /// Of either family, whatever the packets' is (RFC 8950: an IPv4 route may have an IPv6 gateway).
    pub neighbour: Wide,
    /// Destination MAC.
    pub dst_mac: [u8; 6],
    /// Source MAC.
    pub src_mac: [u8; 6],
    /// Longest packet from the IP header on, bytes.
    pub mtu: u32,
    /// Tags to push, see [`Port::tags`].
    pub tags: [u32; 2],
    /// [`next_hop_flag`] bits.
    pub flags: u16,
    /// Zero.
    pub _pad: u16,
    /// Grows when this number is given to another neighbour.
    pub generation: u32,
}

/// Bits of [`NextHop::flags`].
pub mod next_hop_flag {
    /// `ifindex` cannot take redirected packets from this hook: give them, rewritten, to the stack.
    pub const VIA_STACK: u16 = 1 << 0;
}

/// Bits of a [`name::INTERFACES`] value.
pub mod interface_flag {
    /// The program is attached here.
    pub const ATTACHED: u32 = 1 << 0;
    /// A probe showed that XDP may redirect to this interface.
    pub const XDP_REDIRECT: u32 = 1 << 1;
}

/// Bits of the [`name::NOTICES`] element. Each is logged once in the life of the maps, so that no packet rate can make it a
/// flood; the counters say how often it happens.
pub mod notice {
    /// Next-hop numbers have run out: more neighbours than [`super::NEXT_HOPS`]. Packets of the others are sent by a
    /// route lookup each.
    pub const NEXT_HOPS_EXHAUSTED: u32 = 1 << 0;
    /// A map lacked an element that the daemon should have written: the maps disagree.
    pub const NOT_READY: u32 = 1 << 1;
    /// A notice that has been logged has its bit, this much higher, set too.
    pub const LOGGED_SHIFT: u32 = 16;

    /// The notices raised and not logged yet.
    #[inline(always)]
    pub const fn unlogged(notices: u32) -> u32 {
        notices & !(notices >> LOGGED_SHIFT) & ((1 << LOGGED_SHIFT) - 1)
    }
}

/// Key of [`name::NEXT_HOP_INDEX`]. 20 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NeighbourKey {
    /// Egress interface.
    pub ifindex: u32,
    /// Neighbour address, network order.
    pub address: Wide,
}

/// The prefilter of [`crate::filter`]: which addresses make a packet worth a lookup. 16 KiB.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddressFilter {
    /// VIPs and SNAT addresses, matched against destinations.
    pub destinations: [u64; filter::WORDS],
    /// dnat backends, matched against sources.
    pub sources: [u64; filter::WORDS],
}

/// A set of ports: bit `port % 64` of word `port / 64`, host order. 8 KiB.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortSet(pub [u64; 1024]);

/// What the daemon tells the program as a whole. 32 bytes, alignment 8.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Control {
    /// The secret that all edges of one group share; keys the tuple hash.
    pub seed: [u64; 2],
    /// Moves when a link, a used neighbour, or a route that covers a backend changed: entries then look their
    /// route up again.
    pub route_generation: u32,
    /// Until when forwarded packets are captured, in the ticks of [`crate::conntrack::ticks`]; 0: not at all.
    pub capture_until: u32,
    /// Service number whose packets are captured.
    pub capture_service: u16,
    /// Bytes of each that are copied at most.
    pub capture_length: u16,
    /// Backend number whose packets are captured; 0: all of the service's.
    pub capture_backend: u32,
}

/// An operator's name, UTF-8, zero-padded, cut at 64 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Label(pub [u8; 64]);

/// Per-CPU counters of a service; "in" is from clients, "out" to clients; bytes from the IP header on.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ServiceStats {
    /// Packets from clients.
    pub packets_in: u64,
    /// Bytes from clients.
    pub bytes_in: u64,
    /// Packets to clients.
    pub packets_out: u64,
    /// Bytes to clients.
    pub bytes_out: u64,
    /// Flows that entered half-open.
    pub half_opened: u64,
    /// Flows promoted to established.
    pub opened: u64,
    /// Established flows that ended (closed, reset or expired).
    pub closed: u64,
}

/// Per-CPU counters of a backend, as [`ServiceStats`].
pub type BackendStats = ServiceStats;

/// Elements of [`name::REASONS`].
pub const REASON_SLOTS: u32 = SERVICES * verdict::REASONS;

/// Bytes that the `layout-test` feature adds in the middle of a flow.
const INSERTED: usize = if cfg!(feature = "layout-test") { 8 } else { 0 };

const _: () = {
    assert!(size_of::<ServiceKey>() == 20);
    assert!(size_of::<FlowV4>() == 104 + INSERTED && align_of::<FlowV4>() == 8);
    assert!(core::mem::offset_of!(FlowV4, new_src) == 16);
    assert!(core::mem::offset_of!(FlowV4, address_delta) == 28);
    assert!(core::mem::offset_of!(FlowV4, next_hop) == 32 + INSERTED);
    assert!(core::mem::offset_of!(FlowV4, state) == 52 + INSERTED);
    assert!(core::mem::offset_of!(FlowV4, created) == 72 + INSERTED);
    assert!(size_of::<FlowV6>() == 152 + INSERTED && align_of::<FlowV6>() == 8);
    assert!(core::mem::offset_of!(FlowV6, new_src) == 40);
    assert!(core::mem::offset_of!(FlowV6, address_delta) == 76);
    assert!(core::mem::offset_of!(FlowV6, created) == 120 + INSERTED);
    assert!(size_of::<ServiceEntry>() == 140 && align_of::<ServiceEntry>() == 4);
    assert!(core::mem::offset_of!(ServiceEntry, selection) == 20);
    assert!(size_of::<BackendEntry>() == 44);
    assert!(size_of::<Chunk>() == CHUNK_BYTES);
    assert!(size_of::<SelectionHeader>() == 20);
    assert!(size_of::<NextHop>() == 52);
    assert!(size_of::<NeighbourKey>() == 20);
    assert!(size_of::<Control>() == 32);
    assert!(size_of::<ServiceStats>() == 56);
};

#[cfg(feature = "user")]
mod pod {
    #![allow(unsafe_code, reason = "aya::Pod is an unsafe marker; this is the one place that asserts it")]
    use super::*;
    use crate::flow::{FlowKeyV4, FlowKeyV6};
    macro_rules! pod {
        ($($t:ty),* $(,)?) => {$(
            // SAFETY: repr(C), integers only, explicit padding (asserted above), Copy and 'static.
            unsafe impl aya::Pod for $t {}
        )*};
    }
    pod!(
        FlowKeyV4,
        FlowV4,
        FlowKeyV6,
        FlowV6,
        ServiceKey,
        ServiceEntry,
        BackendEntry,
        Chunk,
        NextHop,
        NeighbourKey,
        Port,
        AddressFilter,
        PortSet,
        Control,
        Label,
        ServiceStats,
        SourceKey,
        RangeSource,
        SourceRange,
        SourceId,
        SourceUse,
        AffinityKey,
        AffinityEntry,
        Pending,
        OwnAddresses,
        FragmentKey,
        Fragment,
        SlotV4,
        SlotV6,
        CacheSet<u32>,
        CacheSet<Wide>,
        CacheWindow,
    );
}
