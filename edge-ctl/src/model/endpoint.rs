//! Addresses with a port, or with `*` for every port, as users write and read them.
//!
//! Inside the daemon, and in the maps, `*` is port 0: a frontend takes every port of its VIP that no other frontend has, and a
//! backend gets a packet at the port that the client asked for. Port 0 itself is nowhere accepted from outside.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    str::FromStr,
};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// The port that stands for all of them.
pub const ANY_PORT: u16 = edge_common::maps::ANY_PORT;

/// An address and port in text: `10.1.0.4:443`, `[2001:db8::4]:*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Endpoint(pub SocketAddr);

impl Endpoint {
    /// True where a flow with `other` is a flow with this: the same, or any port of the address where this is every port.
    pub fn covers(self, other: SocketAddr) -> bool {
        self.0 == other || (self.0.port() == ANY_PORT && self.0.ip() == other.ip())
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            address if address.port() != ANY_PORT => write!(f, "{address}"),
            SocketAddr::V4(address) => write!(f, "{}:*", address.ip()),
            SocketAddr::V6(address) => write!(f, "[{}]:*", address.ip()),
        }
    }
}

/// Why a text is not an address with a port.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseEndpointError {
    /// It is one of port 0.
    #[error("port 0 cannot be used; `*` is every port")]
    PortZero,
    /// It is something else.
    #[error("not an address with a port")]
    NoAddress,
}

impl FromStr for Endpoint {
    type Err = ParseEndpointError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Some(address) = text.strip_suffix(":*") {
            let inside = address.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
            // IPv6 in brackets and IPv4 without them, as with a port.
            let address: Option<IpAddr> = match inside {
                Some(inside) => inside.parse().ok().filter(IpAddr::is_ipv6),
                None => address.parse().ok().filter(IpAddr::is_ipv4),
            };
            let address = address.ok_or(ParseEndpointError::NoAddress)?;
            return Ok(Self(SocketAddr::new(address, ANY_PORT)));
        }
        match text.parse::<SocketAddr>() {
            Ok(address) if address.port() == ANY_PORT => Err(ParseEndpointError::PortZero),
            Ok(address) => Ok(Self(address)),
            Err(_) => Err(ParseEndpointError::NoAddress),
        }
    }
}

impl Serialize for Endpoint {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Endpoint {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(|why| de::Error::custom(format!("`{text}`: {why}")))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn an_endpoint_reads_back_as_it_was_written_in_text_and_as_a_key_of_json() {
        for text in ["10.1.0.4:443", "10.1.0.4:*", "[2001:db8::4]:53", "[2001:db8::4]:*"] {
            let endpoint: Endpoint = text.parse().unwrap();
            assert_eq!(endpoint.to_string(), text);
            let json = serde_json::to_string(&BTreeMap::from([(endpoint, 1)])).unwrap();
            assert_eq!(json, format!("{{\"{text}\":1}}"));
            assert_eq!(serde_json::from_str::<BTreeMap<Endpoint, u8>>(&json).unwrap(), BTreeMap::from([(endpoint, 1)]));
        }
    }

    #[test]
    fn port_zero_brackets_in_the_wrong_place_and_names_are_refused() {
        assert_eq!("10.1.0.4:0".parse::<Endpoint>(), Err(ParseEndpointError::PortZero));
        for text in ["10.1.0.4", "10.1.0.4:", "[10.1.0.4]:*", "2001:db8::4:*", "pod:*", "*:*", ":*", "*", "10.1.0.4:**"]
        {
            assert_eq!(text.parse::<Endpoint>(), Err(ParseEndpointError::NoAddress), "{text}");
        }
    }

    #[test]
    fn every_port_covers_those_of_its_address_alone() {
        let [every, one] = ["10.1.0.4:*", "10.1.0.4:443"].map(|text| text.parse::<Endpoint>().unwrap());
        assert!(every.covers("10.1.0.4:80".parse().unwrap()) && !every.covers("10.1.0.5:80".parse().unwrap()));
        assert!(one.covers("10.1.0.4:443".parse().unwrap()) && !one.covers("10.1.0.4:80".parse().unwrap()));
    }
}
