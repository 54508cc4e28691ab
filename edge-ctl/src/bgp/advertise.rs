//! What we originate, and each peer's Adj-RIB-Out.
//!
//! Only `networks` and announcements go out. Nothing learnt is advertised again, to any peer: this is an edge, not a
//! transit router, and a leak of the pod networks to the upstream would be worse than any use of it.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;

use super::{
    policy::Policy,
    wire::{self, Context, EncodeError, Family},
};
use crate::model::PathAttributes;

/// Prefixes that we originate.
#[derive(Clone, Debug, Default)]
pub struct Originated {
    networks: BTreeSet<IpNet>,
    announcements: BTreeMap<IpNet, PathAttributes>,
}

impl Originated {
    /// Replaces the configured networks.
    pub fn set_networks(&mut self, networks: &[IpNet]) {
        self.networks = networks.iter().map(IpNet::trunc).collect();
    }

    /// Adds or changes an announcement; its attributes win over those of an equal network.
    pub fn announce(&mut self, prefix: IpNet, attributes: PathAttributes) {
        self.announcements.insert(prefix.trunc(), attributes);
    }

    /// Removes an announcement. A network of the same prefix stays.
    pub fn withdraw(&mut self, prefix: &IpNet) {
        self.announcements.remove(&prefix.trunc());
    }

    /// Every prefix with its attributes.
    pub fn iter(&self) -> impl Iterator<Item = (IpNet, PathAttributes)> {
        let networks = self.networks.iter().filter(|prefix| !self.announcements.contains_key(prefix));
        let networks = networks.map(|prefix| (*prefix, PathAttributes::default()));
        networks.chain(self.announcements.iter().map(|(prefix, attributes)| (*prefix, attributes.clone())))
    }

    /// The prefixes alone.
    pub fn prefixes(&self) -> BTreeSet<IpNet> {
        self.iter().map(|(prefix, _)| prefix).collect()
    }
}

/// What a peer was told.
#[derive(Clone, Debug)]
pub struct AdjRibOut {
    local_asn: u32,
    next_hop: IpAddr,
    families: Vec<Family>,
    context: Context,
    sent: BTreeMap<IpNet, PathAttributes>,
}

impl AdjRibOut {
    /// Nothing was said yet on this session, whose local address is our next hop.
    pub const fn new(local_asn: u32, next_hop: IpAddr, families: Vec<Family>, context: Context) -> Self {
        Self { local_asn, next_hop, families, context, sent: BTreeMap::new() }
    }

    /// Prefixes and attributes that the peer has.
    pub fn iter(&self) -> impl Iterator<Item = (&IpNet, &PathAttributes)> {
        self.sent.iter()
    }

    /// Number of prefixes that the peer has.
    pub fn len(&self) -> usize {
        self.sent.len()
    }

    /// True where the peer has none.
    pub fn is_empty(&self) -> bool {
        self.sent.is_empty()
    }

    /// Our address on the session.
    pub const fn next_hop(&self) -> IpAddr {
        self.next_hop
    }

    /// UPDATEs that bring the peer to what it should have.
    ///
    /// Only prefixes of the transport's own family are announced: for the other one we have no next hop to give.
    ///
    /// # Errors
    /// Attributes that do not fit a message.
    pub fn sync(&mut self, originated: &Originated, policy: &Policy) -> Result<Vec<bytes::Bytes>, EncodeError> {
        let family = Family::of_address(self.next_hop);
        let desired: BTreeMap<IpNet, PathAttributes> = originated
            .iter()
            .filter(|(prefix, _)| Family::of(prefix) == family && self.families.contains(&family))
            .filter(|(prefix, _)| policy.exports(prefix))
            .collect();
        let gone: Vec<IpNet> = self.sent.keys().filter(|prefix| !desired.contains_key(prefix)).copied().collect();
        let changed: Vec<(IpNet, PathAttributes)> = desired
            .iter()
            .filter(|(prefix, attributes)| self.sent.get(prefix) != Some(attributes))
            .map(|(prefix, attributes)| (*prefix, attributes.clone()))
            .collect();
        let mut messages = wire::encode_withdrawals(&gone)?;
        messages.extend(self.encode(&changed)?);
        self.sent = desired;
        Ok(messages)
    }

    /// UPDATEs that say everything of one family again (RFC 2918).
    ///
    /// # Errors
    /// Attributes that do not fit a message.
    pub fn refresh(&self, family: Family) -> Result<Vec<bytes::Bytes>, EncodeError> {
        let all: Vec<(IpNet, PathAttributes)> = self
            .sent
            .iter()
            .filter(|(prefix, _)| Family::of(prefix) == family)
            .map(|(prefix, attributes)| (*prefix, attributes.clone()))
            .collect();
        self.encode(&all)
    }

    fn encode(&self, routes: &[(IpNet, PathAttributes)]) -> Result<Vec<bytes::Bytes>, EncodeError> {
        let mut groups: Vec<(&PathAttributes, Vec<IpNet>)> = Vec::new();
        for (prefix, attributes) in routes {
            match groups.iter_mut().find(|(group, _)| *group == attributes) {
                Some((_, prefixes)) => prefixes.push(*prefix),
                None => groups.push((attributes, vec![*prefix])),
            }
        }
        let mut messages = Vec::new();
        for (attributes, prefixes) in groups {
            messages.extend(wire::encode_announcements(
                &prefixes,
                attributes,
                self.next_hop,
                self.local_asn,
                self.context,
            )?);
        }
        Ok(messages)
    }
}
