//! From what should be to what is: [`diff`] decides which writes are needed and in which order, [`actor`] makes them
//! through the [`ports`].

pub mod actor;
pub mod diff;
pub mod ports;
pub mod protect;
