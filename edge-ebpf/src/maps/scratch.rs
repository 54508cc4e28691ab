//! Room for the entry being built. An entry on the stack takes a fifth of the 512 bytes that a whole chain of calls may
//! have, and kernels before 6.7 round each frame up to 32 bytes.

use aya_ebpf::{macros::map, maps::PerCpuArray};
use edge_common::maps::FlowV4;

#[map]
static SCRATCH: PerCpuArray<FlowV4> = PerCpuArray::with_max_entries(1, 0);

/// This CPU's room, with a copy of `from` in it. There is one, so the entry is to be inserted before the next is built.
#[inline(always)]
pub fn scratch(from: &FlowV4) -> Option<&'static mut FlowV4> {
    // SAFETY: this CPU's own element; programs of one hook do not preempt each other on a CPU, and no caller holds an
    // earlier one across a call.
    let room = SCRATCH.get_ptr_mut(0).map(|room| unsafe { &mut *room })?;
    *room = *from;
    Some(room)
}

/// As [`scratch`], all zero.
#[inline(always)]
pub fn empty() -> Option<&'static mut FlowV4> {
    // SAFETY: as in `scratch`; every bit pattern is a valid entry, and all of it lies inside the element.
    SCRATCH.get_ptr_mut(0).map(|room| unsafe {
        let words = room.cast::<u64>();
        for word in 0..size_of::<FlowV4>() / 8 {
            words.add(word).write_volatile(0);
        }
        &mut *room
    })
}
