//! What health checks say of members that DNS leaves out. Pure.

use std::collections::{BTreeMap, BTreeSet};

use super::Question;
use crate::{
    config::valid::Config,
    model::{BackendSource, Verdict},
    sources::health::Verdicts,
};

/// What checks say of one name's members.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Evidence {
    /// Some service that uses the name checks its backends: an empty answer then needs its agreement.
    pub checked: bool,
    /// Members that every service that checks them found down, as the question names them
    /// ([`Question::as_member`]).
    pub dead: BTreeSet<std::net::SocketAddr>,
}

/// What checks say, by question.
pub fn gather(config: &Config, verdicts: &Verdicts) -> BTreeMap<Question, Evidence> {
    let mut evidence: BTreeMap<Question, Evidence> = BTreeMap::new();
    let mut alive: BTreeMap<Question, BTreeSet<std::net::SocketAddr>> = BTreeMap::new();
    let asks = |source: &BackendSource| Question::of(source);
    for service in config.services.values() {
        let Some(question) = asks(&service.backends) else { continue };
        evidence.entry(question).or_default().checked |= service.health.is_some();
    }
    for ((service, backend), verdict) in verdicts {
        let Some(question) = config.services.get(service).and_then(|service| asks(&service.backends)) else { continue };
        let member = question.as_member(*backend);
        let dead = matches!(verdict, Verdict::Down | Verdict::Ejected);
        if dead {
            evidence.entry(question).or_default().dead.insert(member);
        } else {
            alive.entry(question).or_default().insert(member);
        }
    }
    for (question, alive) in alive {
        evidence.entry(question).or_default().dead.retain(|member| !alive.contains(member));
    }
    evidence
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    const CONFIG: &str = r#"
        [edge]
        interfaces = ["ens33"]
        pod_networks = ["10.1.0.0/16"]
        [resolver.kube-dns]
        servers = ["10.1.0.41"]
        [service.web]
        listen = ["172.16.1.88:443/tcp"]
        backends = { dns = "web.cluster.local", port = 443, resolver = "kube-dns" }
        health = { tcp = {} }
        [service.plain]
        listen = ["172.16.1.88:80/tcp"]
        backends = { dns = "web.cluster.local", port = 80, resolver = "kube-dns" }
        health = { tcp = {} }
        [service.other]
        listen = ["172.16.1.88:81/tcp"]
        backends = { dns = "other.cluster.local", port = 80, resolver = "kube-dns" }
    "#;

    #[test]
    fn a_member_is_dead_only_where_every_service_that_checks_it_says_so() {
        let config = crate::config::parse(CONFIG, Path::new("edge.toml")).unwrap();
        let verdict = |service: &str, backend: &str, verdict| ((service.to_owned(), backend.parse().unwrap()), verdict);
        let verdicts: Verdicts = [
            verdict("web", "10.1.0.4:443", Verdict::Down),
            verdict("plain", "10.1.0.4:80", Verdict::Up),
            verdict("web", "10.1.0.5:443", Verdict::Down),
            verdict("plain", "10.1.0.5:80", Verdict::Ejected),
            verdict("web", "10.1.0.6:443", Verdict::Checking),
        ]
        .into();
        let evidence = gather(&config, &verdicts);
        let of = |service: &str| &evidence[&Question::of(&config.services[service].backends).unwrap()];
        assert_eq!(of("web"), of("plain"), "one question");
        assert!(of("web").checked);
        assert_eq!(of("web").dead, ["10.1.0.5:0".parse().unwrap()].into());
        assert_eq!(of("other"), &Evidence::default());
    }
}
