//! Plain data that every layer speaks: services, backends, routes, and the rows that users see. No I/O, no clock.

pub mod query;
mod route;
mod selection;
mod service;
pub mod view;

pub use route::{PathAttributes, RouteSet, RouteUpdate};
pub use selection::{Selection, StaticBackend, TableShape, Tier};
pub use service::{
    Announce, BackendSource, Balance, Frontend, Mode, ParseFrontendError, PoolMember, PoolSnapshot, PoolState,
    Protocol, RecordType, Resolver, Service, Snat, within,
};
