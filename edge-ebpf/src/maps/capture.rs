//! The capture's perf buffers. bpf_perf_event_output copies packet bytes itself, from XDP and TC contexts alike and out of
//! fragments too, on every kernel the program runs on; a ring buffer would take bpf_xdp_load_bytes (5.18) and a copy.

use aya_ebpf::{EbpfContext, macros::map, maps::PerfEventByteArray};
use edge_common::maps::capture::CaptureHeader;

#[map]
static CAPTURE: PerfEventByteArray = PerfEventByteArray::new(0);

/// Gives the header and the packet's first `header.captured` bytes to whoever reads; to nobody where nobody does.
#[inline(always)]
pub fn put<C: EbpfContext>(context: &C, header: &CaptureHeader) {
    // SAFETY: 32 bytes of integers without padding, all of them written.
    let bytes: &[u8; 32] = unsafe { &*core::ptr::from_ref(header).cast() };
    CAPTURE.output(context, bytes, header.captured);
}
