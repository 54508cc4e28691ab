//! The eBPF object, built by the build script and carried inside the binary.

/// The ELF object with the programs `edge_xdp` and `edge_tc` and every map of `edge_common::maps::name`, aligned as
/// the ELF parser needs it.
pub const EBPF_OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/edge-ebpf"));
