//! Room for what is being built. An entry on the stack takes a fifth of the 512 bytes that a whole chain of calls may
//! have, an IPv6 one nearly a third, and kernels before 6.7 round each frame up to 32 bytes.

use aya_ebpf::{macros::map, maps::PerCpuArray};
use edge_common::{
    address::Wide,
    maps::{Flow, FlowV4, FlowV6},
};

use super::FlowTables;
use crate::{fib::Lookup, icmp::quote::Quote};

#[map]
static SCRATCH: PerCpuArray<FlowV4> = PerCpuArray::with_max_entries(1, 0);
#[map]
static SCRATCH_V6: PerCpuArray<FlowV6> = PerCpuArray::with_max_entries(1, 0);
#[map]
static ROUTE_LOOKUP: PerCpuArray<Lookup> = PerCpuArray::with_max_entries(1, 0);
#[map]
static QUOTE: PerCpuArray<Quote<u32>> = PerCpuArray::with_max_entries(1, 0);
#[map]
static QUOTE_V6: PerCpuArray<Quote<Wide>> = PerCpuArray::with_max_entries(1, 0);

/// The element of IPv4 entries.
#[inline(always)]
pub(super) fn room() -> Option<*mut FlowV4> {
    SCRATCH.get_ptr_mut(0)
}

/// The element of IPv6 entries.
#[inline(always)]
pub(super) fn room_v6() -> Option<*mut FlowV6> {
    SCRATCH_V6.get_ptr_mut(0)
}

/// This CPU's room, with a copy of `from` in it. There is one, so the entry is to be inserted before the next is built.
#[inline(always)]
pub fn scratch<A: FlowTables>(from: &Flow<A>) -> Option<&'static mut Flow<A>> {
    // SAFETY: this CPU's own element; programs of one hook do not preempt each other on a CPU, and no caller holds an
    // earlier one across a call.
    let room = A::room().map(|room| unsafe { &mut *room })?;
    *room = *from;
    Some(room)
}

/// As [`scratch`], all zero.
#[inline(always)]
pub fn empty<A: FlowTables>() -> Option<&'static mut Flow<A>> {
    // SAFETY: as in `scratch`; every bit pattern is a valid entry, and all of it lies inside the element.
    A::room().map(|room| unsafe {
        let words = room.cast::<u64>();
        for word in 0..size_of::<Flow<A>>() / 8 {
            words.add(word).write_volatile(0);
        }
        &mut *room
    })
}

/// This CPU's room for a route lookup.
#[inline(always)]
pub fn lookup() -> Option<&'static mut Lookup> {
    // SAFETY: as in `scratch`; integers and byte arrays only.
    ROUTE_LOOKUP.get_ptr_mut(0).map(|lookup| unsafe { &mut *lookup })
}

/// This CPU's room for what an ICMP error quotes.
#[inline(always)]
pub fn quote() -> Option<&'static mut Quote<u32>> {
    // SAFETY: as in `scratch`; integers and a `bool` that is 0 or written as one.
    QUOTE.get_ptr_mut(0).map(|quote| unsafe { &mut *quote })
}

/// As [`quote`], of ICMPv6.
#[inline(always)]
pub fn quote_v6() -> Option<&'static mut Quote<Wide>> {
    // SAFETY: as in `quote`.
    QUOTE_V6.get_ptr_mut(0).map(|quote| unsafe { &mut *quote })
}
