//! Maps for packets in the middle of a flow that is not known.

use aya_ebpf::{
    macros::map,
    maps::{Array, PerCpuArray},
};
use edge_common::{icmp, limit, midflow::PROMOTIONS};

#[map]
static ANSWERS_FROM: Array<u64> = Array::with_max_entries(1, 0);
#[map]
static RESET_PACE: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);
#[map]
static PROMOTION_PACE: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);

/// Whether clients may be told by now that their connection is not known.
#[inline(always)]
pub fn may_answer_mid_flow(now: u64) -> bool {
    ANSWERS_FROM.get(0).is_some_and(|from| *from != 0 && *from <= now)
}

/// Whether this CPU may send a RST now; if so, it is noted as sent. At the pace of its ICMP messages.
#[inline(always)]
pub fn may_send_reset(now: u64) -> bool {
    // SAFETY: this CPU's own element; programs of one hook do not preempt each other on a CPU.
    let Some(due) = RESET_PACE.get_ptr_mut(0).map(|due| unsafe { &mut *due }) else {
        return false;
    };
    match icmp::paced(*due, now) {
        Some(next) => {
            *due = next;
            true
        }
        None => false,
    }
}

/// Whether this CPU may promote a flow that was seen from one side only; if so, it is noted.
#[inline(always)]
pub fn may_promote_one_sided() -> bool {
    // SAFETY: as in `may_send_reset`.
    let Some(state) = PROMOTION_PACE.get_ptr_mut(0).map(|state| unsafe { &mut *state }) else {
        return false;
    };
    match limit::take(*state, super::now(), PROMOTIONS, PROMOTIONS) {
        Some(next) => {
            *state = next;
            true
        }
        None => false,
    }
}
