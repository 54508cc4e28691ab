//! Backends written into the configuration.

use std::collections::BTreeSet;

use ipnet::IpNet;

use crate::model::{BackendSource, PoolMember, PoolSnapshot, PoolState, within};

/// The snapshot of a static source, addresses outside `pod_networks` left out (validation has refused them already);
/// `None` for any other kind of source.
pub fn snapshot(source: &BackendSource, pod_networks: &[IpNet]) -> Option<PoolSnapshot> {
    let BackendSource::Static(addresses) = source else { return None };
    let members: BTreeSet<PoolMember> = addresses
        .iter()
        .filter(|address| within(pod_networks, address.ip()))
        .map(|address| PoolMember { address: *address, weight: 1 })
        .collect();
    Some(PoolSnapshot { source: source.clone(), members, state: PoolState::Fresh })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn static_backends_are_fresh_sorted_and_inside_the_pod_networks() {
        let addresses = ["10.1.1.4:443", "10.1.0.4:443", "10.1.0.4:443", "192.0.2.1:443"];
        let source = BackendSource::Static(addresses.iter().map(|text| text.parse().unwrap()).collect());
        let snapshot = snapshot(&source, &["10.1.0.0/16".parse().unwrap()]).unwrap();
        let found: Vec<String> = snapshot.members.iter().map(|member| member.address.to_string()).collect();
        assert_eq!(found, ["10.1.0.4:443", "10.1.1.4:443"]);
        assert_eq!(snapshot.state, PoolState::Fresh);
    }
}
