//! The events ring buffer and the signals of backends.

use aya_ebpf::{
    helpers::generated::bpf_ktime_get_ns,
    macros::map,
    maps::{PerCpuArray, RingBuf, ring_buf::RingBufEntry},
};
use edge_common::maps::{self as layout, BackendSignals};

#[map]
static EVENTS: RingBuf = RingBuf::with_byte_size(layout::events::EVENTS_BYTES, 0);
#[map]
static EVENTS_LOST: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);
#[map]
static BACKEND_SIGNALS: PerCpuArray<BackendSignals> = PerCpuArray::with_max_entries(layout::BACKENDS, 0);

/// A record in the ring buffer that no reader sees yet. To be ended by [`Record::send`] or [`Record::cancel`] in the
/// function that reserved it.
pub struct Record<T: 'static>(RingBufEntry<T>);

/// Room for a record; `None`, counted, where the ring buffer is full.
#[inline(always)]
pub fn record<T: 'static + Default>() -> Option<Record<T>> {
    let Some(mut entry) = EVENTS.reserve::<T>(0) else {
        if let Some(lost) = EVENTS_LOST.get_ptr_mut(0) {
            // SAFETY: this CPU's own element, as in `service_stats`.
            unsafe { *lost += 1 };
        }
        return None;
    };
    entry.write(T::default());
    Some(Record(entry))
}

impl<T: 'static> Record<T> {
    /// What it says.
    #[inline(always)]
    pub fn content(&mut self) -> &mut T {
        // SAFETY: `record` initialised it.
        unsafe { self.0.assume_init_mut() }
    }

    /// Gives it to the reader.
    #[inline(always)]
    pub fn send(self) {
        self.0.submit(0);
    }

    /// Takes it back.
    #[inline(always)]
    pub fn cancel(self) {
        self.0.discard(0);
    }
}

/// This CPU's signals of a backend.
#[inline(always)]
pub fn backend_signals(number: u32) -> Option<&'static mut BackendSignals> {
    // SAFETY: this CPU's own element; programs of one hook do not preempt each other on a CPU.
    BACKEND_SIGNALS.get_ptr_mut(number).map(|signals| unsafe { &mut *signals })
}

/// Nanoseconds of CLOCK_MONOTONIC now, where a tick of the timer is too coarse. Costs more than `now`.
#[inline(always)]
pub fn precise_now() -> u64 {
    // SAFETY: takes nothing and returns an integer.
    unsafe { bpf_ktime_get_ns() }
}
