//! The slots of the stages, and what a stage leaves for the next.
#![allow(unsafe_code, reason = "as in `maps`")]

use aya_ebpf::{
    EbpfContext as _,
    helpers::bpf_tail_call,
    macros::map,
    maps::{PerCpuArray, ProgramArray},
    programs::{TcContext, XdpContext},
};
use edge_common::{address::Wide, maps::stages::SLOTS};

use crate::stages::Handover;

#[map]
static STAGES_XDP: ProgramArray = ProgramArray::with_max_entries(SLOTS, 0);
#[map]
static STAGES_TC: ProgramArray = ProgramArray::with_max_entries(SLOTS, 0);

/// One element for each hook. Not pinned: it belongs to the programs that were loaded together.
#[map]
static HANDOVER: PerCpuArray<Handover<u32>> = PerCpuArray::with_max_entries(2, 0);
/// As [`HANDOVER`], of IPv6 packets.
#[map]
static HANDOVER_V6: PerCpuArray<Handover<Wide>> = PerCpuArray::with_max_entries(2, 0);

/// The XDP programs' element of [`handover`].
pub const XDP: u32 = 0;
/// The TC programs' element of [`handover`].
pub const TC: u32 = 1;

/// This CPU's room for what the stages of one hook leave each other.
///
/// It holds one packet's facts from the entry program's tail call to the end of the last stage. Nothing of the same hook
/// gets in between on this CPU: both hooks run with bottom halves disabled (native XDP in the driver's NAPI poll; generic
/// XDP and TC ingress in the receive path), which excludes migration and every other receive path of this CPU until the
/// last stage has returned, on PREEMPT_RT by a lock; a hard interrupt runs none of our programs; and no helper that a stage
/// calls receives or sends a packet (`bpf_redirect` only notes what is to be done after the program). The hooks have an
/// element each, so that not even that order matters between them. A test run on an old kernel does not disable bottom
/// halves: it is no hook, and sees no traffic where the object is loaded for it alone.
#[inline(always)]
pub fn handover(hook: u32) -> Option<&'static mut Handover<u32>> {
    // SAFETY: this CPU's own element, for the reasons above; it is written by the entry program before any stage reads it.
    HANDOVER.get_ptr_mut(hook).map(|room| unsafe { &mut *room })
}

/// As [`handover`], of IPv6 packets.
#[inline(always)]
pub fn handover_v6(hook: u32) -> Option<&'static mut Handover<Wide>> {
    // SAFETY: as in `handover`.
    HANDOVER_V6.get_ptr_mut(hook).map(|room| unsafe { &mut *room })
}

/// Ends this program and starts the stage; returns only where its slot is empty. Inlined into the program's first frame:
/// a tail call out of a function below it would halve the stack.
#[inline(always)]
pub fn enter_xdp(ctx: &XdpContext, stage: u32) {
    // SAFETY: the context is this run's; the helper takes the map by its definition, which the loader replaces.
    unsafe { bpf_tail_call(ctx.as_ptr(), (&raw const STAGES_XDP).cast_mut().cast(), stage) };
}

/// As [`enter_xdp`], at TC.
#[inline(always)]
pub fn enter_tc(ctx: &TcContext, stage: u32) {
    // SAFETY: as in `enter_xdp`.
    unsafe { bpf_tail_call(ctx.as_ptr(), (&raw const STAGES_TC).cast_mut().cast(), stage) };
}
