//! The dataplane under test: the real object, loaded into a network namespace of its own, fed by BPF_PROG_TEST_RUN.

pub mod frame;
pub mod icmp;
pub mod live;
pub mod namespace;
pub mod rig;
