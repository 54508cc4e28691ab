//! The packet pipeline, generic over the two hooks it runs at. `pipeline` is the place to start reading; all pointer
//! handling is in `packet`, all map access in `maps`, and no other module holds `unsafe`.
#![no_std]
#![feature(asm_experimental_arch, core_intrinsics)]
#![allow(internal_features, reason = "32-bit atomic add, which core::sync::atomic does not offer for this target")]

pub mod cache;
pub mod capture;
pub mod classify;
pub mod conntrack;
pub mod create;
pub mod events;
pub mod extensions;
pub mod family;
pub mod fib;
pub mod forward;
pub mod fragment;
pub mod icmp;
pub mod log;
pub mod maps;
pub mod midflow;
pub mod mss;
pub mod onward;
pub mod packet;
pub mod parse;
pub mod pipeline;
pub mod protect;
pub mod rewrite;
pub mod select;
pub mod stages;
pub mod stats;
pub mod vlan;
