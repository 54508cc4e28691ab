//! Configuration: `raw` is what serde reads, `valid` is the only form that travels.

pub mod valid;
