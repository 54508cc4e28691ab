//! Which backend gets a new flow: the Maglev slot of the keyed tuple hash, and a deterministic walk from there where
//! that backend is excluded.

use edge_common::{
    flow::FlowKey,
    hash, maglev,
    maps::{POOL_PER_CHUNK, SLOTS_PER_CHUNK, SelectionHeader, backend_state},
};

use crate::{family::Family, maps};

/// Table slots tried after the first: spreads an excluded backend's share over the others.
const NEXT_SLOTS: u32 = 16;
/// Pool entries tried after those: finds the one that is left where nearly all are excluded.
const POOL_SCAN: u32 = 256;

/// An eligible backend of the region at chunk `region`, or `None`.
#[inline(never)]
pub fn backend<A: Family>(region: u32, key: &FlowKey<A>) -> Option<core::num::NonZeroU32> {
    let control = maps::control()?;
    let header = header(region)?;
    if header.pool_len == 0 || header.table_len == 0 {
        return None;
    }
    let start = maglev::slot(hash::tuple(control.seed, key), header.table_len);
    let mut index = 0;
    // Remainders rather than a wrap to 0: the verifier then sees one path per step.
    for step in 0..=NEXT_SLOTS {
        let slot = (start + step) % header.table_len;
        index = u32::from(maps::selection_u16(header.table_chunk + slot / SLOTS_PER_CHUNK, slot % SLOTS_PER_CHUNK)?);
        let found = eligible(&header, index);
        if found.is_some() {
            return found;
        }
    }
    for step in 1..=POOL_SCAN {
        let found = eligible(&header, (index + step) % header.pool_len);
        if found.is_some() {
            return found;
        }
    }
    None
}

#[inline(always)]
fn header(region: u32) -> Option<SelectionHeader> {
    if region == 0 {
        return None;
    }
    Some(SelectionHeader {
        pool_len: maps::selection_u32(region, 0)?,
        table_len: maps::selection_u32(region, 1)?,
        pool_chunk: maps::selection_u32(region, 2)?,
        table_chunk: maps::selection_u32(region, 3)?,
    })
}

#[inline(always)]
fn eligible(header: &SelectionHeader, index: u32) -> Option<core::num::NonZeroU32> {
    let number = maps::selection_u32(header.pool_chunk + index / POOL_PER_CHUNK, index % POOL_PER_CHUNK)?;
    if maps::backend_state(number) & backend_state::ELIGIBLE == 0 {
        return None;
    }
    core::num::NonZeroU32::new(number)
}
