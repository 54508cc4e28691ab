//! The lab of network namespaces, its servers, and what the tests and benchmarks share.

pub mod bench;
pub mod datapath;
