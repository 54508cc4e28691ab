//! From what should be to what is: [`diff`] decides which writes are needed and in which order ([`narrow`]: where few services
//! have changed), [`actor`] makes them through the [`ports`].

pub mod actor;
pub mod diff;
mod memo;
pub mod narrow;
pub mod pages;
pub mod ports;
pub mod protect;
