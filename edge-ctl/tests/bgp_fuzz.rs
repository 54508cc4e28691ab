//! A short run of the fuzz targets: the committed corpus as it is, then seeded mutations of it. Long runs are
//! `cargo fuzz`'s (edge-ctl/fuzz). `EDGE_FUZZ_SEED=0x... cargo test --test bgp_fuzz` repeats a run.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first broken assumption")]

#[path = "../fuzz/src/targets.rs"]
mod targets;

use std::{
    fs,
    hash::{BuildHasher, Hasher, RandomState},
    io::Write as _,
    panic::catch_unwind,
    path::Path,
};

use targets::{TARGETS, Target};

/// Mutations of each target's corpus.
fn mutations() -> usize {
    if std::env::var_os("EDGE_TEST_FULL").is_some_and(|value| value == "1") { 1_000_000 } else { 20_000 }
}

/// SplitMix64: small, and the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }
}

fn corpus(target: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let mut files: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(!files.is_empty(), "no corpus in {}", folder.display());
    files.iter().map(|file| fs::read(file).unwrap()).collect()
}

fn check((name, target): Target, input: &[u8], seed: u64) {
    if catch_unwind(|| target(input)).is_err() {
        let hex: String = input.iter().map(|octet| format!("{octet:02x}")).collect();
        panic!("{name}: broken by {hex} (EDGE_FUZZ_SEED={seed:#x})");
    }
}

/// One to four changes of the kinds that parsers stumble over: bits, lengths, cuts, doubles, and pieces of other inputs.
fn mutate(inputs: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    let mut input = inputs[random.below(inputs.len())].clone();
    for _ in 0..=random.below(4) {
        let (at, octet) = (random.below(input.len()), random.next() as u8);
        match random.below(8) {
            0 if !input.is_empty() => input[at] ^= 1 << random.below(8),
            1 if !input.is_empty() => input[at] = octet,
            2 if !input.is_empty() => input[at] = [0, 1, 0x7f, 0x80, 0xff][random.below(5)],
            3 if !input.is_empty() => input[at] = input[at].wrapping_add([1, 0xff][random.below(2)]),
            4 => input.insert(at, octet),
            5 if !input.is_empty() => drop(input.drain(at..(at + 1 + random.below(8)).min(input.len()))),
            6 => input.truncate(at),
            _ => {
                let other = &inputs[random.below(inputs.len())];
                let from = random.below(other.len());
                let piece = &other[from..(from + 1 + random.below(24)).min(other.len())];
                input.splice(at..at, piece.iter().copied());
            }
        }
    }
    input
}

#[test]
fn no_input_of_the_corpus_and_no_mutation_of_one_breaks_what_must_hold_of_any_bytes() {
    let seed = match std::env::var("EDGE_FUZZ_SEED") {
        Ok(text) => u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap(),
        Err(_) => RandomState::new().build_hasher().finish(),
    };
    let count = mutations();
    let _ = writeln!(std::io::stderr().lock(), "{count} mutations a target from seed {seed:#x} (1000000 with --full)");
    std::thread::scope(|scope| {
        for (number, target) in TARGETS.into_iter().enumerate() {
            scope.spawn(move || {
                let inputs = corpus(target.0);
                inputs.iter().for_each(|input| check(target, input, seed));
                let mut random = Random(seed.wrapping_add(number as u64));
                for _ in 0..count {
                    check(target, &mutate(&inputs, &mut random), seed);
                }
            });
        }
    });
}
