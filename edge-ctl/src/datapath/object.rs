//! The eBPF object that the build script made, inside this binary.

/// The ELF object, aligned as its parser wants it.
pub static EBPF_OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/edge-ebpf"));
