//! The dataplane under test: the real object, loaded into a network namespace of its own, fed by BPF_PROG_TEST_RUN.

pub mod cpu;
pub mod ends;
pub mod frame;
pub mod icmp;
pub mod live;
pub mod namespace;
pub mod pool;
pub mod rig;
pub mod tap;
pub mod vlan_devices;

/// The product's program, but for a field more in the middle of each flow.
pub const OTHER_LAYOUT: &[u8] = aya::include_bytes_aligned!(env!("EDGE_LAYOUT_OBJECT"));
