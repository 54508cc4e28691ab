//! The keyed hash of a client's tuple and the walk over a selection table, from their papers.

use super::flow::Key;

/// SipHash-c-d (Aumasson, Bernstein 2012) of any bytes, with c = 1 and d = 3.
pub fn siphash_1_3(key: [u64; 2], message: &[u8]) -> u64 {
    let mut v = [0x736f_6d65_7073_6575, 0x646f_7261_6e64_6f6d, 0x6c79_6765_6e65_7261, 0x7465_6462_7974_6573];
    for (i, word) in v.iter_mut().enumerate() {
        *word ^= key[i % 2];
    }
    let mut padded = message.to_vec();
    while padded.len() % 8 != 7 {
        padded.push(0);
    }
    padded.push(message.len() as u8);
    for block in padded.chunks_exact(8) {
        let word = block.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
        v[3] ^= word;
        sip_round(&mut v);
        v[0] ^= word;
    }
    v[2] ^= 0xff;
    (0..3).for_each(|_| sip_round(&mut v));
    v[0] ^ v[1] ^ v[2] ^ v[3]
}

fn sip_round(v: &mut [u64; 4]) {
    for (a, b, turn, halves) in [(0, 1, 13, Some(0)), (2, 3, 16, None), (0, 3, 21, None), (2, 1, 17, Some(2))] {
        v[a] = v[a].wrapping_add(v[b]);
        v[b] = v[b].rotate_left(turn) ^ v[a];
        if let Some(word) = halves {
            v[word] = v[word].rotate_left(32);
        }
    }
}

/// The tuple as bytes: addresses, ports (all as on the wire), protocol, three zeros.
pub fn tuple(seed: [u64; 2], key: &Key) -> u64 {
    let mut bytes = Vec::with_capacity(40);
    // An IPv4 address is the last word.
    let words = if key.v6 { 0..4 } else { 3..4 };
    for address in [&key.src, &key.dst] {
        address[words.clone()].iter().for_each(|word| bytes.extend(word.to_ne_bytes()));
    }
    bytes.extend(key.src_port.to_ne_bytes());
    bytes.extend(key.dst_port.to_ne_bytes());
    bytes.extend([key.protocol, 0, 0, 0]);
    siphash_1_3(seed, &bytes)
}

/// Table slots that are tried after the tuple's own.
const NEXT_SLOTS: u64 = 16;
/// Pool members that are tried after those.
const POOL_MEMBERS: usize = 256;

/// How a backend was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// In the tuple's own slot.
    Own(u32),
    /// In one of the next slots.
    Next(u32),
    /// Among the members of the pool after that of the own slot.
    Scan(u32),
    /// Nowhere.
    None,
}

/// What a backend is good for now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fit {
    /// It may have no new flows.
    Out,
    /// It may, but has as many as it may have.
    Full,
    /// It may have this one.
    Free,
}

/// The backend of a hash: its slot, the next ones, then the pool. `avoid` (0: none) is passed over in the slots. In the pool,
/// the first that may have new flows at all is tried and no other.
pub fn select(hash: u64, pool: &[u32], table: &[u16], avoid: u32, mut fit: impl FnMut(u32) -> Fit) -> Found {
    if pool.is_empty() || table.is_empty() {
        return Found::None;
    }
    match in_slots(hash, pool, table, avoid, &mut fit) {
        Some((0, backend)) => return Found::Own(backend),
        Some((_, backend)) => return Found::Next(backend),
        None => {}
    }
    let own = slot(hash, table, 0);
    let members = (1..=POOL_MEMBERS).map(|step| pool[(own + step) % pool.len()]);
    let met = members.map(|backend| (backend, fit(backend))).find(|(_, fit)| *fit != Fit::Out);
    met.filter(|(_, fit)| *fit == Fit::Free).map_or(Found::None, |(backend, _)| Found::Scan(backend))
}

/// The first backend but `avoid` in the slots from that of the hash on which may have a flow, and how many slots were passed over.
pub fn in_slots(
    hash: u64,
    pool: &[u32],
    table: &[u16],
    avoid: u32,
    mut fit: impl FnMut(u32) -> Fit,
) -> Option<(u64, u32)> {
    let slots = (0..=NEXT_SLOTS).map(|step| (step, pool[slot(hash, table, step)]));
    slots.filter(|(_, backend)| *backend != avoid).find(|(_, backend)| fit(*backend) == Fit::Free)
}

/// What stands in the slot that is `step` after that of the hash.
fn slot(hash: u64, table: &[u16], step: u64) -> usize {
    let len = table.len() as u64;
    usize::from(table[((hash % len + step) % len) as usize])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::hash::Hasher;

    #[test]
    #[allow(deprecated, reason = "the standard library's SipHash is 2-4; its rounds are what is checked here")]
    fn one_round_of_two_differs_from_two_of_four() {
        let mut hasher = std::hash::SipHasher::new_with_keys(1, 2);
        hasher.write(b"0123456789abcdef");
        assert_ne!(siphash_1_3([1, 2], b"0123456789abcdef"), hasher.finish());
    }

    #[test]
    fn the_hasher_of_the_standard_library_agrees() {
        // `DefaultHasher` is SipHash-1-3 with a zero key.
        let mut hasher = std::collections::hash_map::DefaultHasher::new();
        hasher.write(b"0123456789abcdef");
        assert_eq!(siphash_1_3([0, 0], b"0123456789abcdef"), hasher.finish());
    }

    fn only(free: &[u32]) -> impl FnMut(u32) -> Fit {
        move |backend| if free.contains(&backend) { Fit::Free } else { Fit::Out }
    }

    #[test]
    fn an_excluded_backend_s_share_goes_to_the_next_slots_then_to_the_pool() {
        let (pool, table) = ([7, 8, 9], [0u16, 0, 1]);
        assert_eq!(select(0, &pool, &table, 0, only(&[7, 8, 9])), Found::Own(7));
        assert_eq!(select(0, &pool, &table, 0, only(&[8, 9])), Found::Next(8));
        assert_eq!(select(0, &pool, &table, 0, only(&[9])), Found::Scan(9));
        assert_eq!(select(0, &pool, &table, 0, only(&[])), Found::None);
        assert_eq!(select(0, &pool, &table, 7, only(&[7, 8, 9])), Found::Next(8));
        assert_eq!(select(0, &pool, &table, 7, only(&[7])), Found::Scan(7));
    }

    #[test]
    fn of_the_pool_a_full_backend_is_the_last_that_is_tried() {
        let (pool, table) = ([7, 8, 9], [0u16]);
        let full = |backend| if backend == 9 { Fit::Free } else { Fit::Full };
        assert_eq!(select(0, &pool, &table, 0, full), Found::None);
        let out = |backend| if backend == 8 { Fit::Out } else { full(backend) };
        assert_eq!(select(0, &pool, &table, 0, out), Found::Scan(9));
    }
}
