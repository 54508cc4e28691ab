//! The daemon and the command line of `edge`, as a library, so that tests, benches and fuzz targets import it.
//!
//! Imports go one way (`cargo xtask check-layers`): `model <- config, sources, desired, bgp, reconcile <- datapath,
//! fib <- daemon`; `api` and `cli` see `model`. See `docs/architecture.md`.

pub mod api;
pub mod bgp;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod datapath;
pub mod desired;
pub mod fib;
pub mod model;
pub mod notify;
pub mod reconcile;
pub mod sources;
pub mod state_file;
