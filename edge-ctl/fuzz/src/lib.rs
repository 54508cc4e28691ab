//! What the fuzz targets call.

pub mod differential;
pub mod targets;
