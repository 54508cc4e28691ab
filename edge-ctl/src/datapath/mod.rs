//! The kernel side: [`loader`] loads or adopts maps, programs and links; [`maps`] is the reconciler's port to the maps,
//! [`fake`] its stand-in for tests; [`sweep`] ends idle flows, and [`snat`] counts ports on its way; [`kernel_view`] reads the pins, with the daemon or without.

pub mod acl_view;
pub mod answer;
pub mod attach;
pub mod btf;
pub mod cache;
pub mod cache_split;
pub mod capture;
pub mod events;
pub mod fake;
pub mod flow_ends;
pub mod host;
pub mod interfaces;
pub mod kernel_view;
mod listeners;
pub mod loader;
pub mod maps;
pub mod migrate;
pub mod next_hops;
pub mod object;
pub mod own_addresses;
pub mod pins;
pub mod program_log;
pub mod quiet;
pub mod selection;
pub mod snat;
pub mod stages;
pub mod sweep;
pub mod sys;
pub mod tables;
pub mod vlans;

#[cfg(test)]
mod diff_on_fake;
