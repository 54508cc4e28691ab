//! Plain data that every layer speaks: services, backends, routes, and the rows that users see. No I/O, no clock.

pub mod access;
pub mod bgp_session;
pub mod capture;
mod community;
mod endpoint;
mod health;
mod host;
mod protect;
pub mod query;
mod resolver;
mod route;
pub mod scope;
mod selection;
mod service;
mod snat;
pub mod view;

pub use community::Community;
pub use endpoint::{ANY_PORT, Endpoint, ParseEndpointError};
pub use health::{
    AdminOrder, AdminOrders, AdminState, BackendVerb, Check, Exchange, Health, HealthKey, Http, Passive,
    PassiveCounters, PassiveSignals, Tls, Verdict,
};
pub use host::HostFault;
pub use protect::{Limits, Protection, RangeAction, Rate, SourceRanges};
pub use resolver::{Follow, ResolverPolicy};
pub use route::{NextHopStyle, PathAttributes, RouteSet, RouteUpdate};
pub use selection::{MOST_CONNECTIONS, Selection, StaticBackend, TableShape, Tier};

pub use service::{
    Announce, BackendSource, Balance, Capacity, FlowSelector, Frontend, Lifetimes, Mode, OnDown, ParseFrontendError,
    PoolMember, PoolSnapshot, PoolState, Protocol, RecordType, Resolver, Service, Snat, within,
};
pub use snat::{SnatAlarms, SnatLevel, SnatRow};
