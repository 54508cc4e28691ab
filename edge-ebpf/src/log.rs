//! What the program tells in words, through aya-log: only what an operator should know about the program itself, each once
//! in the life of the maps. A full ring buffer, as with no daemon to read it, loses the message and delays nothing.

use aya_log_ebpf::{error, warn};
use edge_common::maps::{NEXT_HOPS, notice};

use crate::maps;

/// Logs what was raised and not logged yet. Called after a packet off the hot path has been decided, since a record is put
/// together on the stack and the stages leave little of it.
#[inline(always)]
pub fn notices() {
    let Some(notices) = maps::notices() else {
        return;
    };
    let unlogged = notice::unlogged(*notices);
    if unlogged == 0 {
        return;
    }
    *notices |= unlogged << notice::LOGGED_SHIFT;
    if unlogged & notice::NEXT_HOPS_EXHAUSTED != 0 {
        next_hops_exhausted();
    }
    if unlogged & notice::NOT_READY != 0 {
        not_ready();
    }
}

#[inline(never)]
fn next_hops_exhausted() {
    warn!(
        &(),
        target: "edge-ebpf",
        "all {} next-hop numbers are in use: packets to further neighbours take a route lookup each",
        NEXT_HOPS - 1
    );
}

#[inline(never)]
fn not_ready() {
    error!(
        &(),
        target: "edge-ebpf",
        "a packet was dropped because a map lacks an element it should have: the reason not-ready counts them"
    );
}
