//! Map statics and their typed accessors. All map access of the program is in this module.
//!
//! Elements of preallocated maps stay mapped while a program runs (RCU), so a reference to one never dangles; another
//! CPU may write the same element, which can lose a counter's increment but not more, since every field is an integer
//! that is written whole.
#![allow(unsafe_code, reason = "this is one of the two modules that may hold it")]

pub mod capture;
pub mod events;

mod selection;
pub use midflow::*;
pub use selection::*;

use core::intrinsics::{AtomicOrdering, atomic_xadd};

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_NOEXIST},
    helpers::generated::{bpf_jiffies64, bpf_ktime_get_coarse_ns},
    macros::map,
    maps::{Array, HashMap, LruHashMap, PerCpuArray},
};
use edge_common::{
    address::{Address, Wide},
    flow::{FlowKey, FlowKeyV4, FlowKeyV6},
    maps::{
        self as layout, AddressFilter, BackendEntry, BackendStats, Chunk, Control, Flow, FlowV4, FlowV6, Label,
        NeighbourKey, NextHop, PortSet, ServiceEntry, ServiceKey, ServiceStats,
    },
};

mod midflow;
pub mod scratch;
pub mod stages;

mod cache;
mod fragment;
mod icmp;
mod vlan;
pub use cache::*;
pub use fragment::*;
pub use icmp::*;
pub use vlan::*;

#[map]
static ESTABLISHED: HashMap<FlowKeyV4, FlowV4> = HashMap::with_max_entries(layout::ESTABLISHED_ENTRIES, 0);
#[map]
static HALF_OPEN: LruHashMap<FlowKeyV4, FlowV4> = LruHashMap::with_max_entries(layout::HALF_OPEN_ENTRIES, 0);
#[map]
static CLOSING: LruHashMap<FlowKeyV4, FlowV4> = LruHashMap::with_max_entries(layout::CLOSING_ENTRIES, 0);
#[map]
static ESTABLISHED_V6: HashMap<FlowKeyV6, FlowV6> = HashMap::with_max_entries(layout::ESTABLISHED_V6_ENTRIES, 0);
#[map]
static HALF_OPEN_V6: LruHashMap<FlowKeyV6, FlowV6> = LruHashMap::with_max_entries(layout::HALF_OPEN_V6_ENTRIES, 0);
#[map]
static CLOSING_V6: LruHashMap<FlowKeyV6, FlowV6> = LruHashMap::with_max_entries(layout::CLOSING_V6_ENTRIES, 0);
#[map]
static SERVICE_INDEX: HashMap<ServiceKey, u32> = HashMap::with_max_entries(layout::SERVICES, 0);
#[map]
static SERVICES: Array<ServiceEntry> = Array::with_max_entries(layout::SERVICES, 0);
#[map]
static SERVICE_LABELS: Array<Label> = Array::with_max_entries(layout::SERVICES, 0);
#[map]
static BACKENDS: Array<BackendEntry> = Array::with_max_entries(layout::BACKENDS, 0);
#[map]
static BACKEND_STATE: Array<u32> = Array::with_max_entries(layout::BACKENDS, 0);
#[map]
static BACKEND_CURSOR: Array<u32> = Array::with_max_entries(layout::BACKENDS, 0);
#[map]
static BACKEND_INDEX: HashMap<ServiceKey, u32> = HashMap::with_max_entries(layout::BACKENDS, 0);
#[map]
static SELECTION: Array<Chunk> = Array::with_max_entries(layout::SELECTION_CHUNKS, 0);
#[map]
static NEXT_HOPS: Array<NextHop> = Array::with_max_entries(layout::NEXT_HOPS, 0);
#[map]
static NEXT_HOP_INDEX: HashMap<NeighbourKey, u32> = HashMap::with_max_entries(layout::NEXT_HOPS, 0);
#[map]
static NEXT_HOP_CURSOR: Array<u32> = Array::with_max_entries(1, 0);
#[map]
static INTERFACES: HashMap<u32, u32> = HashMap::with_max_entries(layout::INTERFACES, 0);
#[map]
static ADDRESS_FILTER: Array<AddressFilter> = Array::with_max_entries(1, 0);
#[map]
static SNAT_PORTS: Array<PortSet> = Array::with_max_entries(1, 0);
#[map]
static CONTROL: Array<Control> = Array::with_max_entries(1, 0);
#[map]
static SERVICE_STATS: PerCpuArray<ServiceStats> = PerCpuArray::with_max_entries(layout::SERVICES, 0);
#[map]
static BACKEND_STATS: PerCpuArray<BackendStats> = PerCpuArray::with_max_entries(layout::BACKENDS, 0);
#[map]
static REASONS: PerCpuArray<u64> = PerCpuArray::with_max_entries(layout::REASON_SLOTS, 0);
#[map]
static NOTICES: Array<u32> = Array::with_max_entries(1, 0);

mod protect;
pub use protect::{known_source_use, precise_now, range_action, source_use};

/// One of the flow tables.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Table {
    /// Flows that proved themselves.
    Established,
    /// SYNs and first datagrams.
    HalfOpen,
    /// After FIN or RST.
    Closing,
}

/// `-EEXIST` of an insert that may not replace.
pub const EEXIST: i32 = -17;
/// `-ENOENT`, for a map that lacks an element it always has.
pub const ENOENT: i32 = -2;

/// An address family's flow tables.
pub trait FlowTables: Address {
    /// The entry of `key`, if there is one.
    fn lookup(table: Table, key: &FlowKey<Self>) -> Option<*mut Flow<Self>>;
    /// Adds an entry; an errno where `flags` or the table refuse it.
    fn insert(table: Table, flow: &Flow<Self>, flags: u64) -> Result<(), i32>;
    /// Removes the entry of `key`; an errno where there was none.
    fn delete(table: Table, key: &FlowKey<Self>) -> Result<(), i32>;
    /// This CPU's room for an entry that is being built, see [`scratch`].
    fn room() -> Option<*mut Flow<Self>>;
}

macro_rules! flow_tables {
    ($address:ty, $established:ident, $half_open:ident, $closing:ident, $room:path) => {
        impl FlowTables for $address {
            #[inline(always)]
            fn lookup(table: Table, key: &FlowKey<Self>) -> Option<*mut Flow<Self>> {
                match table {
                    Table::Established => $established.get_ptr_mut(key),
                    Table::HalfOpen => $half_open.get_ptr_mut(key),
                    Table::Closing => $closing.get_ptr_mut(key),
                }
            }

            #[inline(always)]
            fn insert(table: Table, flow: &Flow<Self>, flags: u64) -> Result<(), i32> {
                match table {
                    Table::Established => $established.insert(&flow.key, flow, flags),
                    Table::HalfOpen => $half_open.insert(&flow.key, flow, flags),
                    Table::Closing => $closing.insert(&flow.key, flow, flags),
                }
            }

            #[inline(always)]
            fn delete(table: Table, key: &FlowKey<Self>) -> Result<(), i32> {
                match table {
                    Table::Established => $established.remove(key),
                    Table::HalfOpen => $half_open.remove(key),
                    Table::Closing => $closing.remove(key),
                }
            }

            #[inline(always)]
            fn room() -> Option<*mut Flow<Self>> {
                $room()
            }
        }
    };
}

flow_tables!(u32, ESTABLISHED, HALF_OPEN, CLOSING, scratch::room);
flow_tables!(Wide, ESTABLISHED_V6, HALF_OPEN_V6, CLOSING_V6, scratch::room_v6);

/// The entry of `key`.
#[inline(always)]
pub fn flow<A: FlowTables>(table: Table, key: &FlowKey<A>) -> Option<&'static mut Flow<A>> {
    // SAFETY: a preallocated element stays mapped for this program run; see the module's text on other CPUs.
    A::lookup(table, key).map(|entry| unsafe { &mut *entry })
}

/// Adds an entry under its own key; an errno where the key exists or the table is full.
#[inline(always)]
pub fn add_flow<A: FlowTables>(table: Table, flow: &Flow<A>) -> Result<(), i32> {
    A::insert(table, flow, u64::from(BPF_NOEXIST))
}

/// Adds or replaces a closing entry: the latest close of a tuple is the one that counts.
#[inline(always)]
pub fn put_closing<A: FlowTables>(flow: &Flow<A>) -> bool {
    A::insert(Table::Closing, flow, u64::from(BPF_ANY)).is_ok()
}

/// Removes the entry of `key`; false where there was none. Copies of an established one are stale from here on.
#[inline(always)]
pub fn remove_flow<A: FlowTables>(table: Table, key: &FlowKey<A>) -> bool {
    let removed = A::delete(table, key).is_ok();
    if removed && matches!(table, Table::Established) {
        changed(key);
    }
    removed
}

/// Makes every copy of an established entry stale, after a change that matters to its packets.
#[inline(never)]
pub fn changed<A: Address>(key: &FlowKey<A>) -> u32 {
    next_generation(layout::place_of(key))
}

/// True where an entry that was looked up under `key` is still there, read after everything that was copied out of it.
#[inline(always)]
pub fn still_of<A: Address>(flow: &Flow<A>, key: &FlowKey<A>) -> bool {
    // SAFETY: an aligned integer field of a live entry; volatile, since another CPU may give the element to another flow.
    let (ports, protocol, src, dst) = unsafe {
        (
            [(&raw const flow.key.src_port).read_volatile(), (&raw const flow.key.dst_port).read_volatile()],
            (&raw const flow.key.protocol).read_volatile(),
            (&raw const flow.key.src).read_volatile(),
            (&raw const flow.key.dst).read_volatile(),
        )
    };
    ports == [key.src_port, key.dst_port] && protocol == key.protocol && src == key.src && dst == key.dst
}

/// The service number of a frontend.
#[inline(always)]
pub fn frontend(key: &ServiceKey) -> Option<u32> {
    // SAFETY: a preallocated element stays mapped for this program run; the value is copied at once.
    unsafe { SERVICE_INDEX.get(key) }.copied()
}

/// The number of a dnat backend.
#[inline(always)]
pub fn dnat_backend(key: &ServiceKey) -> Option<u32> {
    // SAFETY: as in `frontend`.
    unsafe { BACKEND_INDEX.get(key) }.copied()
}

/// A service by number.
#[inline(always)]
pub fn service(number: u32) -> Option<&'static ServiceEntry> {
    SERVICES.get(number)
}

/// A backend by number.
#[inline(always)]
pub fn backend(number: u32) -> Option<&'static BackendEntry> {
    BACKENDS.get(number)
}

/// A backend's `backend_state` bits; 0 for a number out of range.
#[inline(always)]
pub fn backend_state(number: u32) -> u32 {
    BACKEND_STATE.get(number).copied().unwrap_or(0)
}

/// The next SNAT candidate of a backend.
#[inline(always)]
pub fn next_candidate(backend: u32) -> Option<u32> {
    BACKEND_CURSOR.get_ptr_mut(backend).map(fetch_add)
}

#[inline(always)]
fn fetch_add(counter: *mut u32) -> u32 {
    // `AtomicU32` is not offered for this target, although the machine has the instruction (kernel 5.12). Not
    // `Relaxed`: LLVM 22 then emits the instruction that does not return the old value, and uses the operand for it.
    add(counter, 1)
}

#[inline(always)]
fn add(counter: *mut u32, change: u32) -> u32 {
    // SAFETY: an aligned u32 array element that lives for this program run; everyone changes it atomically.
    unsafe { atomic_xadd::<u32, u32, { AtomicOrdering::AcqRel }>(counter, change) }
}

/// Four consecutive `u32` of a selection chunk, or one, or a `u16`: regions hold host-order integers.
#[inline(always)]
pub fn selection_u32(chunk: u32, index: u32) -> Option<u32> {
    let chunk = SELECTION.get_ptr(chunk)?;
    let index = index & (layout::POOL_PER_CHUNK - 1);
    // SAFETY: the chunk is 8-aligned and holds 64 u32; the index was masked below that.
    Some(unsafe { *chunk.cast::<u32>().add(index as usize) })
}

/// A `u16` of a selection chunk.
#[inline(always)]
pub fn selection_u16(chunk: u32, index: u32) -> Option<u16> {
    let chunk = SELECTION.get_ptr(chunk)?;
    let index = index & (layout::SLOTS_PER_CHUNK - 1);
    // SAFETY: the chunk is 8-aligned and holds 128 u16; the index was masked below that.
    Some(unsafe { *chunk.cast::<u16>().add(index as usize) })
}

/// A next hop by number.
#[inline(always)]
pub fn next_hop(number: u32) -> Option<&'static mut NextHop> {
    // SAFETY: an array element; see the module's text on other CPUs.
    NEXT_HOPS.get_ptr_mut(number).map(|hop| unsafe { &mut *hop })
}

/// Destination and source MAC of a next hop, as they stand one after the other in a frame.
#[inline(always)]
pub fn link_addresses(hop: &NextHop) -> [u32; 3] {
    const DST: usize = core::mem::offset_of!(NextHop, dst_mac);
    const { assert!(DST.is_multiple_of(4) && core::mem::offset_of!(NextHop, src_mac) == DST + 6) };
    // SAFETY: twelve bytes inside the element, integers, aligned as asserted.
    unsafe { (&raw const *hop).byte_add(DST).cast::<[u32; 3]>().read() }
}

/// The number of a neighbour's next hop.
#[inline(always)]
pub fn next_hop_number(key: &NeighbourKey) -> Option<u32> {
    // SAFETY: as in `frontend`.
    unsafe { NEXT_HOP_INDEX.get(key) }.copied()
}

/// Makes `number` the neighbour's next hop unless it has one.
#[inline(always)]
pub fn add_next_hop(key: &NeighbourKey, number: u32) -> Result<(), i32> {
    NEXT_HOP_INDEX.insert(key, number, u64::from(BPF_NOEXIST))
}

/// A next-hop number nobody has; `None` once all have been given out.
#[inline(always)]
pub fn allocate_next_hop() -> Option<u32> {
    let cursor = NEXT_HOP_CURSOR.get_ptr_mut(0)?;
    // Not raised past the end, so that it cannot wrap; two CPUs may overshoot by one each, which the array refuses.
    // SAFETY: an aligned u32 array element that lives for this program run.
    if unsafe { *cursor } >= layout::NEXT_HOPS - 1 {
        return None;
    }
    Some(fetch_add(cursor) + 1)
}

/// An interface's `interface_flag` bits; 0 for one that the daemon did not name.
#[inline(always)]
pub fn interface_flags(ifindex: u32) -> u32 {
    // SAFETY: as in `frontend`.
    unsafe { INTERFACES.get(ifindex) }.copied().unwrap_or(0)
}

/// The prefilter.
#[inline(always)]
pub fn address_filter() -> Option<&'static AddressFilter> {
    ADDRESS_FILTER.get(0)
}

/// Whether SNAT may use this port (host order) on the host's addresses.
#[inline(always)]
pub fn snat_port_allowed(port: u16) -> bool {
    let Some(ports) = SNAT_PORTS.get(0) else {
        return false;
    };
    ports.0[usize::from(port >> 6)] >> (port & 63) & 1 != 0
}

/// What the daemon says.
#[inline(always)]
pub fn control() -> Option<&'static Control> {
    CONTROL.get(0)
}

/// This CPU's counters of a service.
#[inline(always)]
pub fn service_stats(number: u32) -> Option<&'static mut ServiceStats> {
    // SAFETY: this CPU's own element; programs of one hook do not preempt each other on a CPU.
    SERVICE_STATS.get_ptr_mut(number).map(|stats| unsafe { &mut *stats })
}

/// This CPU's counters of a backend.
#[inline(always)]
pub fn backend_stats(number: u32) -> Option<&'static mut BackendStats> {
    // SAFETY: as in `service_stats`.
    BACKEND_STATS.get_ptr_mut(number).map(|stats| unsafe { &mut *stats })
}

/// This CPU's counter of a reason slot.
#[inline(always)]
pub fn reason_counter(slot: u32) -> Option<&'static mut u64> {
    // SAFETY: as in `service_stats`.
    REASONS.get_ptr_mut(slot).map(|count| unsafe { &mut *count })
}

/// The `notice` bits. CPUs that write them at the same time may log a notice twice.
#[inline(always)]
pub fn notices() -> Option<&'static mut u32> {
    // SAFETY: an array element; see the module's text on other CPUs.
    NOTICES.get_ptr_mut(0).map(|notices| unsafe { &mut *notices })
}

/// Notes something for `log`, which runs where there is stack for it.
#[inline(always)]
pub fn raise(notice: u32) {
    if let Some(notices) = notices()
        && *notices & notice == 0
    {
        *notices |= notice;
    }
}

/// Nanoseconds of CLOCK_MONOTONIC, as of the last timer tick.
#[inline(always)]
pub fn now() -> u64 {
    // SAFETY: takes nothing and returns an integer (kernel 5.11).
    unsafe { bpf_ktime_get_coarse_ns() }
}

/// The kernel's count of ticks, which the verifier makes a load of: no call, where each costs some nanoseconds, and many where
/// returns are guarded against speculation.
#[inline(always)]
pub fn jiffies() -> u64 {
    // SAFETY: takes nothing and returns an integer (kernel 5.6).
    unsafe { bpf_jiffies64() }
}
