//! The kernel side: the eBPF object and what the daemon does with it.

pub mod object;
