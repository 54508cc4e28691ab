//! Whether a backend may be given new flows, and if not why: one function of everything that has a say. Pure.
//!
//! The chain, in the order in which it is judged; the first condition that does not hold is the reason:
//!
//! | condition | holds while |
//! |---|---|
//! | discovery | the source names it (what it does not name is in no pool) |
//! | family | its address is of the VIP's family: nothing translates between IPv4 and IPv6 |
//! | administrative | nobody took it down or drains it |
//! | route | a BGP route or a connected or static prefix leads there |
//! | source-address | full-nat: the address that packets to it leave from is known |
//! | health | checks and real traffic do not speak against it, or the pool panics |
//!
//! Connection limits are judged by the program for each new flow, since they change with every packet.

use std::{fmt, net::IpAddr};

use ipnet::IpNet;

use crate::model::{Verdict, view::ConditionRow};

/// Everything that has a say about one backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facts {
    /// What names it: `dns`, `static`, `adopted`.
    pub source: &'static str,
    /// What it counts as until its first checks have spoken.
    pub start: Verdict,
    /// Its address is of the VIP's family.
    pub same_family: bool,
    /// What leads there.
    pub route: Route,
    /// What packets to it leave from.
    pub source_address: SourceAddress,
    /// What checks say.
    pub checks: Checks,
    /// What an administrator ordered.
    pub admin: Admin,
}

/// What leads to a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// A prefix learnt by BGP.
    Bgp(IpNet),
    /// A connected or static prefix.
    Kernel,
    /// One that was there before the restart; routes have yet to settle.
    BeforeRestart,
    /// None, or a default route only.
    Missing,
}

/// The SNAT source towards a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceAddress {
    /// dnat, or configured addresses.
    NotNeeded,
    /// The kernel's choice.
    Known(IpAddr),
    /// Not known yet.
    Missing,
}

/// What checks say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checks {
    /// The service has none.
    None,
    /// This.
    Say(Verdict),
    /// This, but too much of the pool is unhealthy for it to be believed.
    Ignored(Verdict),
}

/// What an administrator ordered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admin {
    /// Nothing.
    Up,
    /// No new flows, and tell when the last has ended.
    Drain,
    /// No new flows.
    Down,
}

/// Why a member of a pool gets no new flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exclusion {
    /// Its address is of another family than the VIP.
    OtherFamily,
    /// An administrator took it down.
    Down,
    /// An administrator drains it.
    Draining,
    /// No BGP route and no connected or static prefix covers it.
    NoRoute,
    /// full-nat without a known source address towards it.
    NoSnatAddress,
    /// Checks or real traffic speak against it.
    Unhealthy(Verdict),
}

impl fmt::Display for Exclusion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OtherFamily => f.write_str("other-family"),
            Self::Down => f.write_str("down"),
            Self::Draining => f.write_str("draining"),
            Self::NoRoute => f.write_str("no-route"),
            Self::NoSnatAddress => f.write_str("no-source-address"),
            Self::Unhealthy(verdict) => verdict.fmt(f),
        }
    }
}

/// `None`: it may be given new flows; else the first reason in the order of the chain.
pub fn judge(facts: &Facts) -> Option<Exclusion> {
    match facts {
        Facts { same_family: false, .. } => Some(Exclusion::OtherFamily),
        Facts { admin: Admin::Down, .. } => Some(Exclusion::Down),
        Facts { admin: Admin::Drain, .. } => Some(Exclusion::Draining),
        Facts { route: Route::Missing, .. } => Some(Exclusion::NoRoute),
        Facts { source_address: SourceAddress::Missing, .. } => Some(Exclusion::NoSnatAddress),
        Facts { checks: Checks::Say(verdict), .. } if !verdict.is_healthy() => Some(Exclusion::Unhealthy(*verdict)),
        _ => None,
    }
}

impl Facts {
    /// Nothing speaks against it.
    pub fn favourable(source: &'static str) -> Self {
        Self {
            source,
            start: Verdict::Up,
            same_family: true,
            route: Route::Kernel,
            source_address: SourceAddress::NotNeeded,
            checks: Checks::None,
            admin: Admin::Up,
        }
    }

    /// The same with health ignored.
    pub fn in_panic(mut self) -> Self {
        if let Checks::Say(verdict) = self.checks {
            self.checks = Checks::Ignored(verdict);
        }
        self
    }

    /// Every condition of the chain, whether it holds, and why, in words.
    pub fn conditions(&self) -> Vec<ConditionRow> {
        let row =
            |condition: &str, holds, reason: String| ConditionRow { condition: condition.to_owned(), holds, reason };
        let discovery = match self.source {
            "adopted" => "it was in the maps at the start; its source has not answered yet".to_owned(),
            source => format!("named by {source}"),
        };
        let family = match self.same_family {
            true => "of the VIP's family",
            false => "the VIP is of the other family, and nothing translates between IPv4 and IPv6",
        };
        let (up, admin) = match self.admin {
            Admin::Up => (true, "no order"),
            Admin::Drain => (false, "drained by an administrator; `edge-ctl backend undrain` takes it back"),
            Admin::Down => (false, "taken down by an administrator; `edge-ctl backend up` takes it back"),
        };
        let route = match self.route {
            Route::Bgp(prefix) => format!("{prefix} by BGP"),
            Route::Kernel => "a connected or static prefix".to_owned(),
            Route::BeforeRestart => "it had one before the restart; BGP has not converged yet".to_owned(),
            Route::Missing => "no BGP route and no connected or static prefix covers it".to_owned(),
        };
        let source_address = match self.source_address {
            SourceAddress::NotNeeded => "none is needed".to_owned(),
            SourceAddress::Known(address) => address.to_string(),
            SourceAddress::Missing => "the kernel has not said which it would use".to_owned(),
        };
        let (healthy, checks) = match self.checks {
            Checks::None => (true, "no checks are configured".to_owned()),
            Checks::Say(Verdict::Ejected) => {
                (false, "ejected: too many connections of clients failed there".to_owned())
            }
            Checks::Say(verdict) => (verdict.is_healthy(), format!("checks say: {verdict}")),
            Checks::Ignored(verdict) => (true, format!("checks say: {verdict}; ignored, since the pool panics")),
        };
        vec![
            row("discovery", true, discovery),
            row("family", self.same_family, family.to_owned()),
            row("administrative", up, admin.to_owned()),
            row("route", self.route != Route::Missing, route),
            row("source-address", self.source_address != SourceAddress::Missing, source_address),
            row("health", healthy, checks),
        ]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn facts() -> impl Strategy<Value = Facts> {
        let same_family = prop::bool::weighted(0.8);
        let route = prop_oneof![Just(Route::Kernel), Just(Route::BeforeRestart), Just(Route::Missing)];
        let source = prop_oneof![Just(SourceAddress::NotNeeded), Just(SourceAddress::Missing)];
        let verdict =
            prop_oneof![Just(Verdict::Up), Just(Verdict::Down), Just(Verdict::Checking), Just(Verdict::Ejected)];
        let checks = (verdict, 0..3).prop_map(|(verdict, kind)| match kind {
            0 => Checks::None,
            1 => Checks::Say(verdict),
            _ => Checks::Ignored(verdict),
        });
        let admin = prop_oneof![Just(Admin::Up), Just(Admin::Drain), Just(Admin::Down)];
        (same_family, route, source, checks, admin).prop_map(|(same_family, route, source_address, checks, admin)| {
            Facts { source: "dns", start: Verdict::Up, same_family, route, source_address, checks, admin }
        })
    }

    proptest! {
        #[test]
        fn a_backend_is_eligible_exactly_where_every_condition_holds_and_the_first_that_does_not_is_the_reason(
            facts in facts(),
        ) {
            let conditions = facts.conditions();
            let broken = conditions.iter().find(|condition| !condition.holds);
            let excluded = judge(&facts);
            prop_assert_eq!(excluded.is_none(), broken.is_none());
            if let (Some(excluded), Some(broken)) = (excluded, broken) {
                let condition = match excluded {
                    Exclusion::OtherFamily => "family",
                    Exclusion::Down | Exclusion::Draining => "administrative",
                    Exclusion::NoRoute => "route",
                    Exclusion::NoSnatAddress => "source-address",
                    Exclusion::Unhealthy(_) => "health",
                };
                prop_assert_eq!(condition, broken.condition.as_str());
            }
        }

        #[test]
        fn a_panic_overrides_health_and_nothing_else(facts in facts()) {
            let (calm, panicked) = (judge(&facts), judge(&facts.in_panic()));
            match calm {
                Some(Exclusion::Unhealthy(_)) => prop_assert_eq!(panicked, None),
                other => prop_assert_eq!(panicked, other),
            }
        }
    }
}
