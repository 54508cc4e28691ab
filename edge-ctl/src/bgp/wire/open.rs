//! OPEN messages and capabilities (RFC 5492).

use std::{fmt, net::Ipv4Addr};

use bytes::Bytes;
use rustbgpd_wire as codec;

use super::{EncodeError, Family};

/// AS number that stands for one that does not fit two octets (RFC 6793).
const AS_TRANS: u16 = 23456;

/// A capability. Those that we do not use are kept by code, so that users see what the peer offers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Capability {
    /// Multiprotocol extensions for a family that we speak (RFC 4760).
    Multiprotocol(Family),
    /// Route refresh (RFC 2918).
    RouteRefresh,
    /// 4-octet AS number (RFC 6793).
    FourOctetAs(u32),
    /// ADD-PATH: for each family 1 (receive), 2 (send) or 3 (both) (RFC 7911 4).
    AddPath(Vec<(Family, u8)>),
    /// Any other, by its code.
    Other(u8),
}

impl fmt::Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Multiprotocol(family) => write!(f, "{family}"),
            Self::RouteRefresh => f.write_str("route-refresh"),
            Self::FourOctetAs(_) => f.write_str("4-octet-as"),
            Self::AddPath(_) => f.write_str("add-path"),
            // IANA's registry of capability codes.
            Self::Other(code) => match code {
                5 => f.write_str("extended-next-hop"),
                6 => f.write_str("extended-message"),
                9 => f.write_str("role"),
                64 => f.write_str("graceful-restart"),
                67 => f.write_str("dynamic"),
                69 => f.write_str("add-path"),
                70 => f.write_str("enhanced-route-refresh"),
                71 => f.write_str("long-lived-graceful-restart"),
                73 => f.write_str("fqdn"),
                _ => write!(f, "capability-{code}"),
            },
        }
    }
}

/// An OPEN message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Open {
    /// The sender's AS number, from the capability where there is one.
    pub asn: u32,
    /// Proposed hold time, seconds.
    pub hold: u16,
    /// BGP identifier.
    pub router_id: Ipv4Addr,
    /// Capabilities, in the order sent.
    pub capabilities: Vec<Capability>,
}

impl Open {
    /// Our OPEN: both unicast families, route refresh and the 4-octet AS number. Graceful restart is not offered.
    pub fn ours(asn: u32, hold: u16, router_id: Ipv4Addr) -> Self {
        let mut capabilities: Vec<_> = Family::ALL.map(Capability::Multiprotocol).into();
        capabilities.extend([Capability::RouteRefresh, Capability::FourOctetAs(asn)]);
        Self { asn, hold, router_id, capabilities }
    }

    /// Families the sender speaks; without any multiprotocol capability it is IPv4 alone (RFC 4760 8).
    pub fn families(&self, multiprotocol: bool) -> Vec<Family> {
        let families: Vec<Family> = self
            .capabilities
            .iter()
            .filter_map(|capability| match capability {
                Capability::Multiprotocol(family) => Some(*family),
                _ => None,
            })
            .collect();
        if families.is_empty() && !multiprotocol { vec![Family::Ipv4] } else { families }
    }

    /// With the wish for several paths to a prefix (RFC 7911), which we only receive.
    pub fn with_add_path(mut self) -> Self {
        self.capabilities.push(Capability::AddPath(Family::ALL.map(|family| (family, 1)).into()));
        self
    }

    /// Families in which the sender can send several paths to a prefix (RFC 7911).
    pub fn sends_paths(&self) -> Vec<Family> {
        let families = self.capabilities.iter().filter_map(|capability| match capability {
            Capability::AddPath(families) => Some(families),
            _ => None,
        });
        families.flatten().filter(|(_, mode)| mode & 2 != 0).map(|(family, _)| *family).collect()
    }

    /// True where the sender can receive ROUTE-REFRESH.
    pub fn route_refresh(&self) -> bool {
        self.capabilities.contains(&Capability::RouteRefresh)
    }

    /// True where the sender uses 4-octet AS numbers.
    pub fn four_octet_as(&self) -> bool {
        self.capabilities.iter().any(|capability| matches!(capability, Capability::FourOctetAs(_)))
    }

    pub(super) fn from_codec(open: &codec::OpenMessage) -> Self {
        let capabilities = open
            .capabilities
            .iter()
            .map(|capability| match capability {
                codec::Capability::MultiProtocol { afi, safi } => {
                    Family::from_codec(*afi, *safi).map_or(Capability::Other(1), Capability::Multiprotocol)
                }
                codec::Capability::RouteRefresh => Capability::RouteRefresh,
                codec::Capability::FourOctetAs { asn } => Capability::FourOctetAs(*asn),
                codec::Capability::AddPath(families) => Capability::AddPath(
                    families
                        .iter()
                        .filter_map(|entry| {
                            Some((Family::from_codec(entry.afi, entry.safi)?, entry.send_receive as u8))
                        })
                        .collect(),
                ),
                other => Capability::Other(other.code()),
            })
            .collect();
        Self { asn: open.four_byte_as(), hold: open.hold_time, router_id: open.bgp_identifier, capabilities }
    }

    /// The bytes to send.
    ///
    /// # Errors
    /// More capabilities than an OPEN can hold.
    pub fn encode(&self) -> Result<Bytes, EncodeError> {
        let capabilities = self
            .capabilities
            .iter()
            .map(|capability| match capability {
                Capability::Multiprotocol(family) => {
                    codec::Capability::MultiProtocol { afi: family.afi(), safi: codec::Safi::Unicast }
                }
                Capability::RouteRefresh => codec::Capability::RouteRefresh,
                Capability::FourOctetAs(asn) => codec::Capability::FourOctetAs { asn: *asn },
                Capability::AddPath(families) => codec::Capability::AddPath(
                    families
                        .iter()
                        .filter_map(|(family, mode)| {
                            let send_receive = codec::AddPathMode::from_u8(*mode)?;
                            Some(codec::AddPathFamily { afi: family.afi(), safi: codec::Safi::Unicast, send_receive })
                        })
                        .collect(),
                ),
                Capability::Other(code) => codec::Capability::Unknown { code: *code, data: Bytes::new() },
            })
            .collect();
        super::encode(&codec::Message::Open(codec::OpenMessage {
            version: 4,
            my_as: u16::try_from(self.asn).unwrap_or(AS_TRANS),
            hold_time: self.hold,
            bgp_identifier: self.router_id,
            capabilities,
        }))
    }
}
