//! Backends written into the configuration.

use std::collections::BTreeSet;

use ipnet::IpNet;

use crate::model::{BackendSource, PoolMember, PoolSnapshot, PoolState, within};

/// The snapshot of a static source, addresses outside `pod_networks` left out (validation has refused them already);
/// `None` for any other kind of source.
pub fn snapshot(source: &BackendSource, pod_networks: &[IpNet]) -> Option<PoolSnapshot> {
    let BackendSource::Static(backends) = source else { return None };
    let members: BTreeSet<PoolMember> = backends
        .iter()
        .filter(|backend| within(pod_networks, backend.address.ip()))
        .map(|backend| PoolMember { address: backend.address, weight: backend.weight, tier: backend.tier })
        .collect();
    Some(PoolSnapshot { source: source.clone(), members, state: PoolState::Fresh })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::StaticBackend;

    #[test]
    fn static_backends_are_fresh_sorted_and_inside_the_pod_networks() {
        let addresses = ["10.1.1.4:443", "10.1.0.4:443", "10.1.0.4:443", "192.0.2.1:443"];
        let backends = addresses.iter().map(|text| StaticBackend::new(text.parse().unwrap()));
        let source = BackendSource::Static(backends.collect());
        let snapshot = snapshot(&source, &["10.1.0.0/16".parse().unwrap()]).unwrap();
        let found: Vec<String> = snapshot.members.iter().map(|member| member.address.to_string()).collect();
        assert_eq!(found, ["10.1.0.4:443", "10.1.1.4:443"]);
        assert_eq!(snapshot.state, PoolState::Fresh);
    }
}
