//! The events ring buffer and the signals of backends.

use core::{arch::asm, mem::MaybeUninit};

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

/// A record, or none, for code that goes on in either case. Whether there is one stands beside it, as a number that the compiler
/// cannot trace: it would test the record's address for zero again, and kernels such as 6.1, which do not know that this
/// is never so, see a record that nobody gives back.
pub struct Perhaps<T: 'static> {
    there: u64,
    record: MaybeUninit<Record<T>>,
}

impl<T: 'static> Perhaps<T> {
    /// No record.
    #[inline(always)]
    pub fn none() -> Self {
        Self { there: untraced::<0>(), record: MaybeUninit::uninit() }
    }

    /// This one.
    #[inline(always)]
    pub fn some(record: Record<T>) -> Self {
        Self { there: untraced::<1>(), record: MaybeUninit::new(record) }
    }

    /// Gives it to the reader, or takes it back.
    #[inline(always)]
    pub fn end(self, send: bool) {
        if self.there == 0 {
            return;
        }
        // SAFETY: only `some` makes the number another one.
        let record = unsafe { self.record.assume_init() };
        if send {
            record.send();
        } else {
            record.cancel();
        }
    }
}

/// A number that the kernel's verifier knows and the compiler does not.
#[inline(always)]
fn untraced<const NUMBER: i32>() -> u64 {
    let number: u64;
    // SAFETY: sets a register.
    unsafe {
        asm!("{number} = {value}", number = out(reg) number, value = const NUMBER, options(pure, nomem, nostack))
    };
    number
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
