//! The addresses that the program signs its ICMP messages with, for each interface: without one it tells nobody that a
//! packet expired or was too big.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
};

use edge_common::maps::OwnAddresses;
use rtnetlink::{
    packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload},
    packet_route::{
        RouteNetlinkMessage,
        address::{AddressAttribute, AddressMessage, AddressScope},
    },
    sys::protocols,
};

use super::interfaces::exchange;

/// The host's addresses of global scope, by interface, in the kernel's order: an interface's first one is its primary.
///
/// # Errors
/// Those of the netlink socket.
pub fn list() -> io::Result<Vec<(u32, IpAddr)>> {
    let mut request = NetlinkMessage::from(RouteNetlinkMessage::GetAddress(AddressMessage::default()));
    request.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    request.finalize();
    let mut bytes = vec![0; request.buffer_len()];
    request.serialize(&mut bytes);
    let mut addresses = Vec::new();
    for message in exchange(protocols::NETLINK_ROUTE, &bytes)? {
        let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&message).map_err(io::Error::other)?;
        if let NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewAddress(message)) = message.payload {
            addresses.extend(global(&message));
        }
    }
    Ok(addresses)
}

fn global(message: &AddressMessage) -> Option<(u32, IpAddr)> {
    if message.header.scope != AddressScope::Universe {
        return None;
    }
    // IPv4 says its own address in Local (Address is a peer's), IPv6 in Address.
    let local = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Local(address) => Some(*address),
        _ => None,
    });
    let address = local.or_else(|| {
        message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Address(address) => Some(*address),
            _ => None,
        })
    });
    Some((message.header.index, address?))
}

/// For each of `interfaces` its own first address of each family, or where it has none the first of another of them, as
/// the kernel would choose. Addresses of `lo` and other interfaces are left out: VIPs are among them.
pub fn choose(interfaces: &BTreeSet<u32>, addresses: &[(u32, IpAddr)]) -> BTreeMap<u32, OwnAddresses> {
    let first = |ifindex: u32, v4: bool| {
        let usable = |(index, address): &&(u32, IpAddr)| interfaces.contains(index) && address.is_ipv4() == v4;
        let own = addresses.iter().find(|entry| entry.0 == ifindex && usable(entry));
        own.or_else(|| addresses.iter().find(usable)).map_or([0; 4], |(_, address)| words(*address))
    };
    interfaces.iter().map(|&i| (i, OwnAddresses { v4: first(i, true), v6: first(i, false) })).collect()
}

fn words(address: IpAddr) -> [u32; 4] {
    let bytes = match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    };
    let mut words = [0; 4];
    for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(4)) {
        *word = bytes.try_into().map_or(0, u32::from_ne_bytes);
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_signs_with_its_own_first_address_and_else_with_a_neighbour_s_but_never_with_lo_s() {
        let address = |text: &str| text.parse::<IpAddr>().expect("an address");
        let addresses = [
            (1, address("192.0.2.80")),
            (2, address("172.16.1.1")),
            (2, address("172.16.1.2")),
            (3, address("2001:db8::3")),
        ];
        let chosen = choose(&BTreeSet::from([2, 3, 4]), &addresses);
        let v4 = [0, 0, 0xffffu32.to_be(), u32::from_ne_bytes([172, 16, 1, 1])];
        let v6 = [u32::from_ne_bytes([0x20, 1, 0xd, 0xb8]), 0, 0, u32::from_ne_bytes([0, 0, 0, 3])];
        for ifindex in [2, 3, 4] {
            assert_eq!(chosen[&ifindex], OwnAddresses { v4, v6 }, "{ifindex}");
        }
        assert_eq!(choose(&BTreeSet::from([3]), &addresses)[&3], OwnAddresses { v4: [0; 4], v6 });
    }
}
