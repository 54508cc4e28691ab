//! Selection regions as chunks of the selection map, and back.

use edge_common::maps::{CHUNK_BYTES, Chunk, POOL_PER_CHUNK, SLOTS_PER_CHUNK, SelectionHeader};

use crate::reconcile::ports::{Region, region_chunks};

/// The chunks of a region at `first_chunk`: header, pool, table, each part in chunks of its own, then those of its backup.
pub fn encode(first_chunk: u32, region: &Region) -> Vec<(u32, Chunk)> {
    let mut chunks = encode_tier(first_chunk, region);
    if let Some(backup) = &region.backup {
        chunks.extend(encode(backup_chunk(first_chunk, region), backup));
    }
    chunks
}

fn backup_chunk(first_chunk: u32, region: &Region) -> u32 {
    first_chunk.saturating_add(region_chunks(region.pool.len(), region.table.len()))
}

fn encode_tier(first_chunk: u32, region: &Region) -> Vec<(u32, Chunk)> {
    let pool: Vec<Vec<u8>> = region
        .pool
        .chunks(POOL_PER_CHUNK as usize)
        .map(|part| part.iter().flat_map(|n| n.to_ne_bytes()).collect())
        .collect();
    let table: Vec<Vec<u8>> = region
        .table
        .chunks(SLOTS_PER_CHUNK as usize)
        .map(|part| part.iter().flat_map(|n| n.to_ne_bytes()).collect())
        .collect();
    let pool_chunk = first_chunk.saturating_add(1);
    let table_chunk = pool_chunk.saturating_add(length(pool.len()));
    let backup = if region.backup.is_some() { backup_chunk(first_chunk, region) } else { 0 };
    let header = [length(region.pool.len()), length(region.table.len()), pool_chunk, table_chunk, backup];
    let header: Vec<u8> = header.iter().flat_map(|number| number.to_ne_bytes()).collect();
    let parts = std::iter::once(header).chain(pool).chain(table);
    (first_chunk..).zip(parts.map(|bytes| chunk(&bytes))).collect()
}

/// The region at `first_chunk`; `None` where the chunks there are not one.
pub fn decode(first_chunk: u32, mut read: impl FnMut(u32) -> Option<Chunk>) -> Option<Region> {
    let (region, backup) = decode_tier(first_chunk, &mut read)?;
    if backup == 0 {
        return Some(region);
    }
    // A backup has none itself.
    let (backup, _) = decode_tier(backup, &mut read)?;
    Some(Region { backup: Some(Box::new(backup)), ..region })
}

fn decode_tier(first_chunk: u32, read: &mut impl FnMut(u32) -> Option<Chunk>) -> Option<(Region, u32)> {
    let header = header(&read(first_chunk)?);
    let mut pool = Vec::new();
    for number in 0..header.pool_len.div_ceil(POOL_PER_CHUNK) {
        let chunk = read(header.pool_chunk.checked_add(number)?)?;
        pool.extend(chunk.0.as_chunks::<4>().0.iter().map(|bytes| u32::from_ne_bytes(*bytes)));
    }
    let mut table = Vec::new();
    for number in 0..header.table_len.div_ceil(SLOTS_PER_CHUNK) {
        let chunk = read(header.table_chunk.checked_add(number)?)?;
        table.extend(chunk.0.as_chunks::<2>().0.iter().map(|bytes| u16::from_ne_bytes(*bytes)));
    }
    pool.truncate(header.pool_len as usize);
    table.truncate(header.table_len as usize);
    Some((Region { pool, table: table.into(), backup: None }, header.backup))
}

fn header(chunk: &Chunk) -> SelectionHeader {
    let mut words = chunk.0.as_chunks::<4>().0.iter().map(|bytes| u32::from_ne_bytes(*bytes));
    let mut word = || words.next().unwrap_or_default();
    SelectionHeader { pool_len: word(), table_len: word(), pool_chunk: word(), table_chunk: word(), backup: word() }
}

fn chunk(bytes: &[u8]) -> Chunk {
    let mut chunk = Chunk([0; CHUNK_BYTES]);
    for (to, from) in chunk.0.iter_mut().zip(bytes) {
        *to = *from;
    }
    chunk
}

/// A length as maps hold it; what does not fit is refused long before, by the pool's own limit of 65,535.
fn length(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn a_region_reads_back_from_its_chunks() {
        for (pool, table) in [(1, 1021), (64, 1021), (65, 16381), (300, 65537)] {
            let backup = Region { pool: vec![7001, 7002], table: vec![1, 0, 1].into(), backup: None };
            let region = Region {
                pool: (1..=pool).collect(),
                table: (0..table).map(|slot| (slot % pool) as u16).collect(),
                backup: (pool != 64).then(|| Box::new(backup)),
            };
            let chunks: BTreeMap<u32, Chunk> = encode(7, &region).into_iter().collect();
            assert_eq!(chunks.len() as u32, region.chunks(), "pool of {pool}");
            assert_eq!(chunks.keys().next(), Some(&7));
            assert_eq!(decode(7, |number| chunks.get(&number).copied()), Some(region));
        }
    }

    #[test]
    fn a_header_that_points_outside_the_map_is_no_region() {
        let mut bytes = [0; CHUNK_BYTES];
        bytes[0] = 1;
        bytes[8..12].copy_from_slice(&u32::MAX.to_ne_bytes());
        assert_eq!(decode(1, |number| (number == 1).then_some(Chunk(bytes))), None);
    }
}
