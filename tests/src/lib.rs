//! The lab of network namespaces, its servers, and what the tests and benchmarks share.

pub mod bench;
pub mod datapath;
pub mod kernel_facts;
pub mod lab;
pub mod load;
pub mod model;
pub mod scenario;
pub mod skip;
pub mod unknown_flows;
