//! Keeps announcements from following every change of a pool: a VIP comes after its pool has been good for a while
//! (`after`), and goes when fewer than `keep_backends` are left, which may be less than it took to come. Pure: time comes in.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Instant,
};

use crate::{
    config::valid::Config,
    desired::{self, AdoptedBackend, Announced, DesiredState},
    model::Frontend,
};

/// Which frontends count as announced, and which have been good since when.
#[derive(Debug, Default)]
pub struct Damping {
    up: BTreeSet<Frontend>,
    good_since: BTreeMap<Frontend, Instant>,
    seen: BTreeSet<Frontend>,
}

impl Damping {
    /// Decides for each frontend of `state`, and says when to look again. A frontend whose pool the maps (`adopted`) hold
    /// when it is first seen was announced before a restart, and does not wait again.
    pub fn apply(
        &mut self,
        now: Instant,
        config: &Config,
        adopted: &BTreeMap<Frontend, Vec<AdoptedBackend>>,
        state: &mut DesiredState,
    ) -> Option<Instant> {
        let known = |frontend: &Frontend| state.frontends.contains_key(frontend);
        self.up.retain(known);
        self.good_since.retain(|frontend, _| known(frontend));
        self.seen.retain(known);
        let mut next: Option<Instant> = None;
        let announced = config.services.values().filter_map(|service| Some((service, service.announce.as_ref()?)));
        for (frontend, announce) in announced.flat_map(|(service, how)| service.listen.iter().map(move |on| (on, how)))
        {
            let Some(desired) = state.frontends.get_mut(frontend) else { continue };
            let is_first = self.seen.insert(*frontend);
            match desired.announced {
                Announced::Yes => {
                    let since = *self.good_since.entry(*frontend).or_insert(now);
                    let before = is_first && adopted.get(frontend).is_some_and(|pool| pool.iter().any(|b| b.eligible));
                    let due = since + announce.after;
                    if before || self.up.contains(frontend) || due <= now {
                        self.up.insert(*frontend);
                    } else {
                        Arc::make_mut(desired).announced = Announced::Settling;
                        next = Some(next.map_or(due, |next| next.min(due)));
                    }
                }
                Announced::TooFew { eligible, .. }
                    if eligible >= announce.keep_backends && self.up.contains(frontend) =>
                {
                    Arc::make_mut(desired).announced = Announced::Yes;
                }
                _ => {
                    self.up.remove(frontend);
                    self.good_since.remove(frontend);
                }
            }
        }
        state.announcements = desired::announcements(config, &state.frontends);
        next
    }
}

#[cfg(test)]
mod tests {
    use std::{path::Path, time::Duration};

    use super::*;
    use crate::{
        config,
        daemon::world::World,
        model::{PoolMember, PoolSnapshot, PoolState, RouteSet},
    };

    const CONFIG: &str = r#"
        [edge]
        interfaces = ["ens33"]
        pod_networks = ["10.1.0.0/16"]
        [bgp]
        asn = 64512
        router_id = "172.16.1.88"
        [service.web]
        listen = ["172.16.1.88:443/tcp"]
        mode = "dnat"
        backends = { static = ["10.1.0.1:443", "10.1.0.2:443", "10.1.0.3:443", "10.1.0.4:443"] }
        announce = { min_backends = 3, keep_backends = 2, after = "5s", aggregate = 24, capacity = "med", med = 100 }
    "#;

    /// The state in which the first `eligible` of four backends have a route.
    fn state(config: &Config, eligible: u8) -> DesiredState {
        let mut world = World::new(BTreeMap::new(), RouteSet::default());
        world.datapath_ready = true;
        let member = |host: u8| PoolMember::new(format!("10.1.0.{host}:443").parse().unwrap(), 1);
        let source = config.services["web"].backends.clone();
        let members = (1..=4).map(member).collect();
        world.hear_pool(config, PoolSnapshot { source, members, state: PoolState::Fresh });
        world.kernel_routes = (1..=eligible).map(|host| (format!("10.1.0.{host}/32").parse().unwrap(), None)).collect();
        world.converged();
        world.settle();
        world.desired(config)
    }

    fn announced(state: &DesiredState) -> Vec<(String, Option<u32>)> {
        state.announcements.iter().map(|(prefix, attributes)| (prefix.to_string(), attributes.med)).collect()
    }

    #[test]
    fn a_vip_comes_after_a_while_and_goes_below_the_lower_mark() {
        let config = config::parse(CONFIG, Path::new("edge.toml")).unwrap();
        let mut damping = Damping::default();
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut look = |seconds, eligible| {
            let mut state = state(&config, eligible);
            let next = damping.apply(at(seconds), &config, &BTreeMap::new(), &mut state);
            (announced(&state), next)
        };
        assert_eq!(look(0, 4), (vec![], Some(at(5))));
        assert_eq!(look(3, 2), (vec![], None), "too few in between: it begins again");
        assert_eq!(look(4, 3), (vec![], Some(at(9))));
        let aggregate = || "172.16.1.0/24".to_owned();
        assert_eq!(look(9, 4), (vec![(aggregate(), Some(100))], None));
        assert_eq!(look(10, 2), (vec![(aggregate(), Some(150))], None), "half of the pool is lost, and told");
        assert_eq!(look(11, 1), (vec![], None), "below the lower mark");
        assert_eq!(look(12, 2), (vec![], None), "the lower mark does not bring it back");
    }

    #[test]
    fn after_a_restart_a_vip_that_was_served_does_not_wait() {
        let config = config::parse(CONFIG, Path::new("edge.toml")).unwrap();
        let mut state = state(&config, 4);
        let backend = AdoptedBackend {
            address: "10.1.0.1:443".parse().unwrap(),
            weight: 1,
            share: 100,
            tier: crate::model::Tier::Primary,
            eligible: true,
            snat_address: None,
        };
        let adopted = BTreeMap::from([(config.services["web"].listen[0], vec![backend])]);
        assert_eq!(Damping::default().apply(Instant::now(), &config, &adopted, &mut state), None);
        assert_eq!(state.announcements.len(), 1);
    }
}
