//! What settings of the host take from the services of an edge.

use std::net::IpAddr;

use super::Mode;

/// What a setting of the host breaks while it is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum HostFault {
    /// Forwarding of IPv4.
    Ipv4,
    /// Forwarding of IPv4 packets that carry an address of this host as their source, as those of full-nat services do.
    FullNat,
    /// Forwarding of IPv6.
    Ipv6,
}

impl HostFault {
    /// True where a service of this mode at this VIP cannot be trusted to forward.
    pub fn concerns(self, mode: Mode, vip: IpAddr) -> bool {
        match self {
            Self::Ipv4 => vip.is_ipv4(),
            Self::FullNat => vip.is_ipv4() && mode == Mode::FullNat,
            Self::Ipv6 => vip.is_ipv6(),
        }
    }
}
