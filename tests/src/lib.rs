//! The lab of network namespaces, its servers, and what the tests and benchmarks share.

<<<<<<< HEAD
pub mod datapath;
=======
pub mod bench;
pub mod lab;
pub mod skip;
>>>>>>> lab
