//! OPEN messages and capabilities (RFC 5492).

use std::{fmt, net::Ipv4Addr};

use bytes::{BufMut, Bytes, BytesMut};
use rustbgpd_wire as codec;

use super::{EncodeError, Family};
use crate::model::bgp_session::Role;

/// AS number that stands for one that does not fit two octets (RFC 6793).
const AS_TRANS: u16 = 23456;
/// IANA's code of the FQDN capability (draft-walton-bgp-hostname-capability).
const FQDN: u8 = 73;

/// Graceful restart as one side offers it (RFC 4724 3).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Restart {
    /// R: the sender has restarted, and waits for nobody's End-of-RIB that says the same.
    pub restarting: bool,
    /// N: it restarts gracefully after NOTIFICATIONs too (RFC 8538).
    pub notification: bool,
    /// How long its routes are to be kept while it is away, seconds.
    pub time: u16,
    /// Families whose forwarding outlives a restart, each with F: it has done so.
    pub families: Vec<(Family, bool)>,
}

/// A capability. Those that we do not use are kept by code, so that users see what the peer offers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Capability {
    /// Multiprotocol extensions for a family that we speak (RFC 4760).
    Multiprotocol(Family),
    /// Route refresh (RFC 2918).
    RouteRefresh,
    /// Families whose NLRI may have an IPv6 next hop (RFC 8950).
    ExtendedNextHop(Vec<Family>),
    /// Messages of up to 65,535 octets (RFC 8654).
    ExtendedMessage,
    /// Role (RFC 9234).
    Role(Role),
    /// Graceful restart (RFC 4724).
    GracefulRestart(Restart),
    /// 4-octet AS number (RFC 6793).
    FourOctetAs(u32),
    /// ADD-PATH by family (RFC 7911), each with the mode: 1 receives, 2 sends, 3 both.
    AddPath(Vec<(Family, u8)>),
    /// Enhanced route refresh (RFC 7313).
    EnhancedRouteRefresh,
    /// Long-lived graceful restart (RFC 9494): family, F, stale time in seconds.
    LongLived(Vec<(Family, bool, u32)>),
    /// Host and domain name of the sender.
    Fqdn {
        /// Host name.
        host: String,
        /// Domain; may be empty.
        domain: String,
    },
    /// Any other, by its code.
    Other(u8),
}

impl fmt::Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Multiprotocol(family) => write!(f, "{family}"),
            Self::RouteRefresh => f.write_str("route-refresh"),
            Self::FourOctetAs(asn) => write!(f, "4-octet-as {asn}"),
            Self::ExtendedNextHop(families) => list(f, "extended-next-hop", families),
            Self::ExtendedMessage => f.write_str("extended-message"),
            Self::Role(role) => write!(f, "role {role}"),
            Self::GracefulRestart(restart) => write!(f, "{restart}"),
            Self::AddPath(families) => {
                f.write_str("add-path")?;
                families.iter().try_for_each(|(family, mode)| {
                    let mode = ["", " receive", " send", " both"].get(usize::from(*mode)).copied().unwrap_or_default();
                    write!(f, " {family}{mode}")
                })
            }
            Self::EnhancedRouteRefresh => f.write_str("enhanced-route-refresh"),
            Self::LongLived(families) => {
                f.write_str("long-lived-graceful-restart")?;
                families.iter().try_for_each(|(family, _, time)| write!(f, " {family} {time} s"))
            }
            // The name is the peer's: `escape_debug` keeps its control characters off our terminals.
            Self::Fqdn { host, domain } if domain.is_empty() => write!(f, "fqdn {}", host.escape_debug()),
            Self::Fqdn { host, domain } => write!(f, "fqdn {}.{}", host.escape_debug(), domain.escape_debug()),
            // IANA's registry of capability codes.
            Self::Other(code) => match code {
                5 => f.write_str("extended-next-hop"),
                9 => f.write_str("role"),
                64 => f.write_str("graceful-restart"),
                67 => f.write_str("dynamic"),
                69 => f.write_str("add-path"),
                71 => f.write_str("long-lived-graceful-restart"),
                73 => f.write_str("fqdn"),
                _ => write!(f, "capability-{code}"),
            },
        }
    }
}

fn list(f: &mut fmt::Formatter<'_>, name: &str, families: &[Family]) -> fmt::Result {
    f.write_str(name)?;
    families.iter().try_for_each(|family| write!(f, " {family}"))
}

impl fmt::Display for Restart {
    /// `graceful-restart 120 s (restarting, notification) ipv4-unicast preserved ipv6-unicast`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "graceful-restart {} s", self.time)?;
        let flags = [(self.restarting, "restarting"), (self.notification, "notification")];
        let flags: Vec<&str> = flags.into_iter().filter(|(set, _)| *set).map(|(_, name)| name).collect();
        if !flags.is_empty() {
            write!(f, " ({})", flags.join(", "))?;
        }
        self.families
            .iter()
            .try_for_each(|(family, forwarding)| write!(f, " {family}{}", if *forwarding { " preserved" } else { "" }))
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
    /// Families the sender speaks; without any multiprotocol capability it is IPv4 alone (RFC 4760 8).
    pub fn families(&self) -> Vec<Family> {
        let mut multiprotocol = false;
        let mut families = Vec::new();
        for capability in &self.capabilities {
            match capability {
                Capability::Multiprotocol(family) => families.push(*family),
                // Multiprotocol extensions for a family that we do not speak.
                Capability::Other(1) => multiprotocol = true,
                _ => {}
            }
        }
        if families.is_empty() && !multiprotocol { vec![Family::Ipv4] } else { families }
    }

    /// True where the sender has this capability, which has no content.
    pub fn has(&self, capability: &Capability) -> bool {
        self.capabilities.contains(capability)
    }

    /// Families in which the sender takes several paths to a prefix (RFC 7911).
    pub fn receives_paths(&self) -> Vec<Family> {
        self.paths(1)
    }

    /// Families in which the sender can send several paths to a prefix (RFC 7911).
    pub fn sends_paths(&self) -> Vec<Family> {
        self.paths(2)
    }

    fn paths(&self, direction: u8) -> Vec<Family> {
        let families = self.capabilities.iter().filter_map(|capability| match capability {
            Capability::AddPath(families) => Some(families),
            _ => None,
        });
        families.flatten().filter(|(_, mode)| mode & direction != 0).map(|(family, _)| *family).collect()
    }

    /// True where the sender uses 4-octet AS numbers.
    pub fn four_octet_as(&self) -> bool {
        self.capabilities.iter().any(|capability| matches!(capability, Capability::FourOctetAs(_)))
    }

    /// Graceful restart, as the last such capability has it (RFC 4724 3).
    pub fn restart(&self) -> Option<&Restart> {
        self.capabilities.iter().rev().find_map(|capability| match capability {
            Capability::GracefulRestart(restart) => Some(restart),
            _ => None,
        })
    }

    /// Long-lived stale times by family, seconds; they count only beside graceful restart (RFC 9494 3).
    pub fn long_lived(&self) -> Vec<(Family, u32)> {
        let times = self.capabilities.iter().find_map(|capability| match capability {
            Capability::LongLived(families) => Some(families),
            _ => None,
        });
        let times = times.filter(|_| self.restart().is_some());
        times.into_iter().flatten().map(|(family, _, time)| (*family, *time)).collect()
    }

    /// Families whose NLRI the sender takes with an IPv6 next hop.
    pub fn extended_next_hop(&self) -> Vec<Family> {
        let families = self.capabilities.iter().filter_map(|capability| match capability {
            Capability::ExtendedNextHop(families) => Some(families),
            _ => None,
        });
        families.flatten().copied().collect()
    }

    /// Every role that the sender claims; more than one that differ is an error (RFC 9234 4.2).
    pub fn roles(&self) -> impl Iterator<Item = Role> {
        self.capabilities.iter().filter_map(|capability| match capability {
            Capability::Role(role) => Some(*role),
            _ => None,
        })
    }

    pub(super) fn from_codec(open: &codec::OpenMessage) -> Self {
        let capabilities = open.capabilities.iter().map(from_codec).collect();
        Self { asn: open.four_byte_as(), hold: open.hold_time, router_id: open.bgp_identifier, capabilities }
    }

    /// The bytes to send.
    ///
    /// # Errors
    /// More capabilities than an OPEN can hold.
    pub fn encode(&self) -> Result<Bytes, EncodeError> {
        super::encode(&codec::Message::Open(codec::OpenMessage {
            version: 4,
            my_as: u16::try_from(self.asn).unwrap_or(AS_TRANS),
            hold_time: self.hold,
            bgp_identifier: self.router_id,
            capabilities: self.capabilities.iter().map(to_codec).collect(),
        }))
    }
}

fn from_codec(capability: &codec::Capability) -> Capability {
    match capability {
        codec::Capability::MultiProtocol { afi, safi } => {
            Family::from_codec(*afi, *safi).map_or(Capability::Other(1), Capability::Multiprotocol)
        }
        codec::Capability::RouteRefresh => Capability::RouteRefresh,
        codec::Capability::EnhancedRouteRefresh => Capability::EnhancedRouteRefresh,
        codec::Capability::ExtendedMessage => Capability::ExtendedMessage,
        codec::Capability::FourOctetAs { asn } => Capability::FourOctetAs(*asn),
        codec::Capability::Role { role } => {
            let known = Role::ALL.into_iter().find(|known| number(*known) == role.to_u8());
            known.map_or(Capability::Other(9), Capability::Role)
        }
        codec::Capability::GracefulRestart { restart_state, notification, restart_time, families } => {
            let ours = |entry: &codec::GracefulRestartFamily| {
                Some((Family::from_codec(entry.afi, entry.safi)?, entry.forwarding_preserved))
            };
            Capability::GracefulRestart(Restart {
                restarting: *restart_state,
                notification: *notification,
                time: *restart_time,
                families: families.iter().filter_map(ours).collect(),
            })
        }
        codec::Capability::LongLivedGracefulRestart(families) => {
            let ours = |entry: &codec::LlgrFamily| {
                Some((Family::from_codec(entry.afi, entry.safi)?, entry.forwarding_preserved, entry.stale_time))
            };
            Capability::LongLived(families.iter().filter_map(ours).collect())
        }
        codec::Capability::ExtendedNextHop(families) => {
            let ipv6 = families.iter().filter(|entry| entry.next_hop_afi == codec::Afi::Ipv6);
            let families = ipv6.filter_map(|entry| Family::from_codec(entry.nlri_afi, entry.nlri_safi));
            Capability::ExtendedNextHop(families.collect())
        }
        codec::Capability::AddPath(families) => {
            let ours = |entry: &codec::AddPathFamily| {
                Some((Family::from_codec(entry.afi, entry.safi)?, entry.send_receive as u8))
            };
            Capability::AddPath(families.iter().filter_map(ours).collect())
        }
        codec::Capability::Unknown { code: FQDN, data } => fqdn(data).unwrap_or(Capability::Other(FQDN)),
        other => Capability::Other(other.code()),
    }
}

fn to_codec(capability: &Capability) -> codec::Capability {
    let safi = codec::Safi::Unicast;
    match capability {
        Capability::Multiprotocol(family) => codec::Capability::MultiProtocol { afi: family.afi(), safi },
        Capability::RouteRefresh => codec::Capability::RouteRefresh,
        Capability::EnhancedRouteRefresh => codec::Capability::EnhancedRouteRefresh,
        Capability::ExtendedMessage => codec::Capability::ExtendedMessage,
        Capability::FourOctetAs(asn) => codec::Capability::FourOctetAs { asn: *asn },
        Capability::Role(role) => {
            codec::Capability::Unknown { code: 9, data: Bytes::copy_from_slice(&[number(*role)]) }
        }
        Capability::GracefulRestart(restart) => codec::Capability::GracefulRestart {
            restart_state: restart.restarting,
            notification: restart.notification,
            restart_time: restart.time,
            families: restart
                .families
                .iter()
                .map(|(family, forwarding_preserved)| codec::GracefulRestartFamily {
                    afi: family.afi(),
                    safi,
                    forwarding_preserved: *forwarding_preserved,
                })
                .collect(),
        },
        Capability::LongLived(families) => codec::Capability::LongLivedGracefulRestart(
            families
                .iter()
                .map(|(family, forwarding_preserved, stale_time)| codec::LlgrFamily {
                    afi: family.afi(),
                    safi,
                    forwarding_preserved: *forwarding_preserved,
                    stale_time: *stale_time,
                })
                .collect(),
        ),
        Capability::ExtendedNextHop(families) => codec::Capability::ExtendedNextHop(
            families
                .iter()
                .map(|family| codec::ExtendedNextHopFamily {
                    nlri_afi: family.afi(),
                    nlri_safi: safi,
                    next_hop_afi: codec::Afi::Ipv6,
                })
                .collect(),
        ),
        Capability::AddPath(families) => codec::Capability::AddPath(
            families
                .iter()
                .filter_map(|(family, mode)| {
                    let send_receive = codec::AddPathMode::from_u8(*mode)?;
                    Some(codec::AddPathFamily { afi: family.afi(), safi, send_receive })
                })
                .collect(),
        ),
        Capability::Fqdn { host, domain } => codec::Capability::Unknown { code: FQDN, data: fqdn_bytes(host, domain) },
        Capability::Other(code) => codec::Capability::Unknown { code: *code, data: Bytes::new() },
    }
}

/// A role's number on the wire (RFC 9234 4.1).
const fn number(role: Role) -> u8 {
    match role {
        Role::Provider => 0,
        Role::RouteServer => 1,
        Role::RouteServerClient => 2,
        Role::Customer => 3,
        Role::Peer => 4,
    }
}

/// Two strings, each after its length; `None`: something else.
fn fqdn(data: &[u8]) -> Option<Capability> {
    let take = |data: &[u8]| {
        let (length, rest) = data.split_first()?;
        let (name, rest) = rest.split_at_checked(usize::from(*length))?;
        Some((String::from_utf8_lossy(name).into_owned(), rest.to_vec()))
    };
    let (host, rest) = take(data)?;
    // Some speakers leave the domain's length out where there is none.
    let domain = if rest.is_empty() { String::new() } else { take(&rest)?.0 };
    Some(Capability::Fqdn { host, domain })
}

/// Names are cut to 64 octets each, so that the capability always fits its length octet.
fn fqdn_bytes(host: &str, domain: &str) -> Bytes {
    let mut bytes = BytesMut::new();
    for name in [host, domain] {
        let name = &name.as_bytes()[..name.len().min(64)];
        bytes.put_u8(u8::try_from(name.len()).unwrap_or(0));
        bytes.put_slice(name);
    }
    bytes.freeze()
}

#[cfg(test)]
mod tests {
    use super::{
        super::{AddPath, Context, Message},
        *,
    };

    /// FRR 8.4's FQDN capability of host `frr-node` without a domain, as captured: the domain's length is there, zero.
    #[test]
    fn a_host_name_without_a_domain_is_read_with_and_without_the_second_length() {
        let expected = Capability::Fqdn { host: "frr-node".to_owned(), domain: String::new() };
        assert_eq!(fqdn(b"\x08frr-node\x00"), Some(expected.clone()));
        assert_eq!(fqdn(b"\x08frr-node"), Some(expected));
        for broken in [&b""[..], b"\x09frr-node", b"\x08frr-node\x05a"] {
            assert_eq!(fqdn(broken), None, "{broken:?}");
        }
    }

    #[test]
    fn every_capability_survives_the_wire() {
        let families = vec![Family::Ipv4, Family::Ipv6];
        let restart = Restart {
            restarting: true,
            notification: true,
            time: 4095,
            families: vec![(Family::Ipv4, true), (Family::Ipv6, false)],
        };
        let open = Open {
            asn: 4_200_000_001,
            hold: 90,
            router_id: Ipv4Addr::new(10, 0, 0, 1),
            capabilities: vec![
                Capability::Multiprotocol(Family::Ipv4),
                Capability::RouteRefresh,
                Capability::ExtendedNextHop(families),
                Capability::ExtendedMessage,
                Capability::Role(Role::Customer),
                Capability::GracefulRestart(restart),
                Capability::FourOctetAs(4_200_000_001),
                Capability::AddPath(vec![(Family::Ipv4, 1)]),
                Capability::EnhancedRouteRefresh,
                Capability::LongLived(vec![(Family::Ipv6, true, 3600)]),
                Capability::Fqdn { host: "edge".to_owned(), domain: "example.net".to_owned() },
                Capability::Other(67),
            ],
        };
        let context = Context { four_octet_as: true, internal: false, extended: false, add_path: AddPath::None };
        let Ok(Message::Open(read)) = super::super::decode(open.encode().unwrap(), context) else { panic!("an OPEN") };
        assert_eq!(read, open);
    }

    #[test]
    fn a_speaker_of_foreign_families_alone_does_not_speak_ipv4() {
        let open = |capabilities| Open { asn: 1, hold: 90, router_id: Ipv4Addr::LOCALHOST, capabilities };
        assert_eq!(open(vec![]).families(), [Family::Ipv4]);
        assert!(open(vec![Capability::Other(1)]).families().is_empty());
    }
}
