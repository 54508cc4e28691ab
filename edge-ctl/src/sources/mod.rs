//! Where backends come from. Each source turns what it hears into [`PoolSnapshot`](crate::model::PoolSnapshot)s.

pub mod dns;
pub mod fixed;
pub mod health;
