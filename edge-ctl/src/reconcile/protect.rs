//! Protection as maps hold it: fields of a service, and source ranges by service number. Pure.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv6Addr},
};

use edge_common::maps::{RANGE_PREFIX, RangeSource, ServiceEntry, SourceKey, range_action, service_flag};
use ipnet::IpNet;

use crate::model::{Protection, RangeAction, Rate};

/// A service's entry with what its protection says.
pub fn protected(entry: ServiceEntry, protection: &Protection) -> ServiceEntry {
    let limits = &protection.limits;
    let rate = |rate: Option<Rate>| rate.map_or((0, 0), |rate| (rate.per_second, rate.burst));
    let (source_flow_rate, source_flow_burst) = rate(limits.new_flows);
    let (source_packet_rate, source_packet_burst) = rate(limits.packets);
    let mut flags = entry.flags & !(service_flag::SOURCE_RANGES | service_flag::SOURCES_REFUSED_BY_DEFAULT);
    if !protection.source_ranges.ranges.is_empty() || protection.source_ranges.refuse_others {
        flags |= service_flag::SOURCE_RANGES;
    }
    if protection.source_ranges.refuse_others {
        flags |= service_flag::SOURCES_REFUSED_BY_DEFAULT;
    }
    ServiceEntry {
        flags,
        mss: protection.mss.unwrap_or(0),
        source_flow_rate,
        source_flow_burst,
        source_packet_rate,
        source_packet_burst,
        source_half_open: limits.half_open.unwrap_or(0),
        ..entry
    }
}

/// The entries of a service number's source ranges. Those of the other family than the listen address are left out: no
/// packet can match them, and `::/0` would take in every IPv4 address.
pub fn ranges(service: u32, vip: IpAddr, protection: &Protection) -> BTreeMap<SourceKey, u32> {
    let ranges = protection.source_ranges.ranges.iter();
    let ours = ranges.filter(|(prefix, _)| prefix.addr().is_ipv4() == vip.is_ipv4());
    ours.map(|(prefix, action)| (range_key(service, prefix), action_number(*action))).collect()
}

/// The key of a range.
pub fn range_key(service: u32, prefix: &IpNet) -> SourceKey {
    let (address, length) = match prefix {
        IpNet::V4(prefix) => (prefix.network().to_ipv6_mapped(), 96 + u32::from(prefix.prefix_len())),
        IpNet::V6(prefix) => (prefix.network(), u32::from(prefix.prefix_len())),
    };
    SourceKey { prefix_len: RANGE_PREFIX + length, source: RangeSource { service, address: words(address) } }
}

/// The range of a key; `None` where its length is none.
pub fn range_of(key: &SourceKey) -> Option<IpNet> {
    let octets: Vec<u8> = key.source.address.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let address = Ipv6Addr::from(<[u8; 16]>::try_from(octets).ok()?);
    let length = u8::try_from(key.prefix_len.checked_sub(RANGE_PREFIX)?).ok()?;
    match address.to_ipv4_mapped() {
        Some(address) if length >= 96 => IpNet::new(address.into(), length - 96).ok(),
        _ => IpNet::new(address.into(), length).ok(),
    }
}

fn words(address: Ipv6Addr) -> [u32; 4] {
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = address.octets();
    [[a, b, c, d], [e, f, g, h], [i, j, k, l], [m, n, o, p]].map(u32::from_ne_bytes)
}

const fn action_number(action: RangeAction) -> u32 {
    match action {
        RangeAction::Allow => range_action::ALLOW,
        RangeAction::Deny => range_action::DENY,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_reads_back_from_its_key() {
        for text in ["203.0.113.0/24", "0.0.0.0/0", "10.0.0.1/32", "2001:db8::/32", "::/0", "2001:db8::1/128"] {
            let prefix: IpNet = text.parse().unwrap();
            assert_eq!(range_of(&range_key(7, &prefix)), Some(prefix), "{text}");
        }
    }

    #[test]
    fn a_service_takes_only_ranges_of_its_own_family() {
        let mut protection = Protection::default();
        for text in ["::/0", "203.0.113.0/24"] {
            protection.source_ranges.ranges.insert(text.parse().unwrap(), RangeAction::Deny);
        }
        let of = |vip: &str| {
            let keys = ranges(1, vip.parse().unwrap(), &protection).into_keys();
            keys.filter_map(|key| range_of(&key)).map(|range| range.to_string()).collect::<Vec<_>>()
        };
        assert_eq!(of("172.16.1.88"), ["203.0.113.0/24"]);
        assert_eq!(of("2001:db8::1"), ["::/0"]);
    }
}
