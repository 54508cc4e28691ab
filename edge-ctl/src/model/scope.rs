//! Link-local addresses with the interface that they belong to.
//!
//! `fe80::2` is a neighbour only together with an interface. Inside the daemon such an address carries its interface in
//! octets 4 to 7, which are zero on the wire (RFC 4291 2.5.6), as a number that follows from the interface's name: so a
//! peer, a next hop and a connected network remain an address and a prefix everywhere, and the number is the same after a
//! restart, in the command line, and when the interface comes back with another index. [`bare`] is for the kernel and the
//! wire, [`shown`] for people.

use std::{
    net::{IpAddr, Ipv6Addr},
    sync::{PoisonError, RwLock},
};

use ipnet::{IpNet, Ipv6Net};

/// Names of interfaces that addresses were given, for [`shown`] and [`interface`].
static NAMES: RwLock<Vec<String>> = RwLock::new(Vec::new());

/// The number of an interface's name (FNV-1a), never 0.
pub fn number(name: &str) -> u32 {
    let hash = name.bytes().fold(0x811c_9dc5_u32, |hash, octet| (hash ^ u32::from(octet)).wrapping_mul(0x0100_0193));
    hash.max(1)
}

/// `address` on `interface`; any but a link-local one as it is.
pub fn on(address: IpAddr, interface: &str) -> IpAddr {
    let IpAddr::V6(v6) = address else { return address };
    if !v6.is_unicast_link_local() {
        return address;
    }
    let mut names = NAMES.write().unwrap_or_else(PoisonError::into_inner);
    if !names.iter().any(|name| name == interface) {
        names.push(interface.to_owned());
    }
    IpAddr::V6(with(v6, number(interface)))
}

/// As [`on`], for a link-local network.
pub fn network_on(network: IpNet, interface: &str) -> IpNet {
    match (network, on(network.addr(), interface)) {
        (IpNet::V6(_), IpAddr::V6(address)) => {
            Ipv6Net::new(address, network.prefix_len().max(64)).map_or(network, IpNet::V6)
        }
        _ => network,
    }
}

/// The number of the interface that `address` is on; `None`: it says nothing about one.
pub fn number_of(address: IpAddr) -> Option<u32> {
    let IpAddr::V6(address) = address else { return None };
    let octets = address.octets();
    let number = u32::from_be_bytes([octets[4], octets[5], octets[6], octets[7]]);
    (address.is_unicast_link_local() && number != 0).then_some(number)
}

/// The interface that `address` is on.
pub fn interface(address: IpAddr) -> Option<String> {
    let wanted = number_of(address)?;
    let names = NAMES.read().unwrap_or_else(PoisonError::into_inner);
    names.iter().find(|name| number(name) == wanted).cloned()
}

/// `fe80::` on the interface that `address` is on: stands for whoever is there.
pub fn link(address: IpAddr) -> Option<IpAddr> {
    number_of(address).map(|number| IpAddr::V6(with(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), number)))
}

/// The address as the wire and the kernel have it.
pub fn bare(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V6(v6) if number_of(address).is_some() => IpAddr::V6(with(v6, 0)),
        _ => address,
    }
}

/// `fe80::2%ens33`.
pub fn shown(address: IpAddr) -> String {
    match interface(address) {
        Some(interface) => format!("{}%{interface}", bare(address)),
        None => address.to_string(),
    }
}

/// Reads what [`shown`] says, and every other address.
///
/// # Errors
/// In words.
pub fn parse(text: &str) -> Result<IpAddr, String> {
    let (address, interface) = match text.split_once('%') {
        Some((address, interface)) => (address, Some(interface)),
        None => (text, None),
    };
    let address: IpAddr = address.parse().map_err(|_| format!("`{text}` is not an IP address"))?;
    match interface {
        None => Ok(address),
        Some(name) if !name.is_empty() && number_of(on(address, name)).is_some() => Ok(on(address, name)),
        Some(_) => Err(format!("`{text}`: only a link-local address has an interface")),
    }
}

fn with(address: Ipv6Addr, number: u32) -> Ipv6Addr {
    let mut octets = address.octets();
    octets[4..8].copy_from_slice(&number.to_be_bytes());
    Ipv6Addr::from(octets)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn the_same_address_on_two_interfaces_is_two_and_each_is_shown_and_read_with_its_own() {
        let (one, two) = (on(ip("fe80::2"), "ens33"), on(ip("fe80::2"), "ens34"));
        assert_ne!(one, two);
        assert_eq!((shown(one), shown(two)), ("fe80::2%ens33".to_owned(), "fe80::2%ens34".to_owned()));
        assert_eq!((parse("fe80::2%ens33"), parse("fe80::2%ens34")), (Ok(one), Ok(two)));
        assert_eq!((bare(one), bare(two)), (ip("fe80::2"), ip("fe80::2")));
        assert_eq!((interface(one).as_deref(), number_of(ip("fe80::2"))), (Some("ens33"), None));
        assert!(network_on("fe80::/64".parse().unwrap(), "ens33").contains(&one));
        assert!(!network_on("fe80::/64".parse().unwrap(), "ens34").contains(&one));
    }

    #[test]
    fn every_other_address_stays_what_it_is() {
        for text in ["10.0.0.2", "fd00::2", "2001:db8::1"] {
            assert_eq!((on(ip(text), "ens33"), bare(ip(text)), shown(ip(text))), (ip(text), ip(text), text.to_owned()));
            assert!(parse(&format!("{text}%ens33")).is_err());
        }
        assert!(parse("fe80::2%").is_err() && parse("ens33").is_err());
    }
}
