//! What the eBPF program and the daemon must agree on to the byte: map layouts, the flow key, and the pure
//! rules (connection tracking, Maglev, hashing, checksums, verdicts) that either side may apply.
//!
//! `no_std` and without dependencies, so that the same code compiles for `bpfel-unknown-none` and for tests.
#![no_std]

pub mod address;
pub mod checksum;
pub mod conntrack;
pub mod filter;
pub mod flow;
pub mod fragment;
pub mod hash;
pub mod icmp;
pub mod limit;
pub mod maglev;
pub mod maps;
pub mod midflow;
#[cfg(any(feature = "user", test))]
pub mod schedule;
pub mod verdict;
