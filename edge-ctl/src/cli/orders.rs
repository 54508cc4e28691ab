//! Orders for backends: what is asked of the daemon, and waiting until a drain has ended.

use std::time::Duration;

use clap::{Args, Subcommand};

use crate::model::{BackendVerb as Verb, Endpoint, MOST_CONNECTIONS, query::Query};

/// Between two looks at a backend that drains.
pub(super) const LOOK: Duration = Duration::from_millis(500);

/// One backend of one service.
#[derive(Clone, Debug, Args)]
pub(super) struct One {
    /// The service's name
    pub service: String,
    /// The backend's ADDRESS:PORT, as in `backend list`
    pub backend: Endpoint,
}

#[derive(Debug, Subcommand)]
pub(super) enum Order {
    /// Give it no new flows; running ones go on. Kept across restarts
    Down(One),
    /// Give it new flows again, as far as route and checks allow
    Up(One),
    /// Give it no new flows, and tell when the last one has ended
    Drain {
        #[command(flatten)]
        one: One,
        /// Return when no flow is left
        #[arg(long)]
        wait: bool,
    },
    /// Take a drain back
    Undrain(One),
    /// Another weight than its source's
    Weight {
        #[command(flatten)]
        one: One,
        /// From 1 to 65535, or `default`
        #[arg(value_parser = weight)]
        weight: Weight,
    },
    /// Another limit of connections at once than the service's `max_connections`
    Limit {
        #[command(flatten)]
        one: One,
        /// From 1 to 10000000, or `default`
        #[arg(value_parser = limit)]
        limit: Limit,
    },
}

/// `None`: the service's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Limit(Option<u32>);

fn limit(text: &str) -> Result<Limit, String> {
    match (text, text.parse()) {
        ("default", _) => Ok(Limit(None)),
        (_, Ok(limit @ 1..=MOST_CONNECTIONS)) => Ok(Limit(Some(limit))),
        _ => Err(format!("expected 1 to {MOST_CONNECTIONS}, or `default`; `down` takes a backend out")),
    }
}

/// `None`: the source's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Weight(Option<u16>);

fn weight(text: &str) -> Result<Weight, String> {
    match (text, text.parse()) {
        ("default", _) => Ok(Weight(None)),
        (_, Ok(0)) | (_, Err(_)) => Err("expected 1 to 65535, or `default`; `down` takes a backend out".into()),
        (_, Ok(weight)) => Ok(Weight(Some(weight))),
    }
}

impl Order {
    /// The question for the daemon.
    pub fn query(&self) -> Query {
        let (one, verb) = match self {
            Self::Down(one) => (one, Verb::Down),
            Self::Up(one) => (one, Verb::Up),
            Self::Drain { one, .. } => (one, Verb::Drain),
            Self::Undrain(one) => (one, Verb::Undrain),
            Self::Weight { one, weight } => (one, Verb::Weight(weight.0)),
            Self::Limit { one, limit } => (one, Verb::Limit(limit.0)),
        };
        Query::Order { service: one.service.clone(), backend: one.backend.0, verb }
    }

    /// The backend whose drain is to be awaited.
    pub fn awaited(&self) -> Option<&One> {
        match self {
            Self::Drain { one, wait: true } => Some(one),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_a_number_from_1_or_the_services_own() {
        assert_eq!(limit("10000000"), Ok(Limit(Some(10_000_000))));
        assert_eq!(limit("default"), Ok(Limit(None)));
        for text in ["0", "-1", "10000001", "", "none"] {
            assert!(limit(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_weight_is_a_number_from_1_or_the_sources_own() {
        assert_eq!(weight("7"), Ok(Weight(Some(7))));
        assert_eq!(weight("default"), Ok(Weight(None)));
        for text in ["0", "-1", "65536", "", "heavy"] {
            assert!(weight(text).is_err(), "{text}");
        }
    }
}
