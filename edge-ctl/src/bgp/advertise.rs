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

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::{super::wire::Message, *};
    use crate::config::valid::PrefixRule;

    const CONTEXT: Context = Context { four_octet_as: true, internal: false, extended: false };

    fn out(next_hop: &str) -> AdjRibOut {
        AdjRibOut::new(64512, next_hop.parse().unwrap(), Family::ALL.to_vec(), CONTEXT)
    }

    fn everything() -> Policy {
        let rule = |prefix: &str, max_length| PrefixRule { prefix: prefix.parse().unwrap(), min_length: 0, max_length };
        Policy { export: Some(vec![rule("0.0.0.0/0", 32), rule("::/0", 128)]), ..Policy::default() }
    }

    fn originated(prefixes: &[&str]) -> Originated {
        let mut originated = Originated::default();
        for prefix in prefixes {
            originated.announce(prefix.parse().unwrap(), PathAttributes::default());
        }
        originated
    }

    /// Announced and withdrawn prefixes, as a receiver reads them.
    fn read(messages: &[Bytes]) -> (Vec<String>, Vec<String>) {
        let (mut announced, mut withdrawn) = (vec![], vec![]);
        for message in messages {
            assert!(message.len() <= usize::from(wire::MAX_MESSAGE));
            let Message::Update(update) = wire::decode(message.clone(), CONTEXT).unwrap() else { panic!("an UPDATE") };
            assert!(update.problems.is_empty(), "{:?}", update.problems);
            announced.extend(update.announced.iter().flat_map(|a| &a.prefixes).map(IpNet::to_string));
            withdrawn.extend(update.withdrawn.iter().map(IpNet::to_string));
        }
        (announced, withdrawn)
    }

    #[test]
    fn only_what_changed_is_said() {
        let mut out = out("10.0.0.1");
        let first = out.sync(&originated(&["10.9.0.1/32", "10.9.0.2/32"]), &everything()).unwrap();
        assert_eq!(read(&first).0, ["10.9.0.1/32", "10.9.0.2/32"]);
        let mut changed = originated(&["10.9.0.2/32"]);
        changed.announce("10.9.0.3/32".parse().unwrap(), PathAttributes { med: Some(1), ..Default::default() });
        let second = out.sync(&changed, &everything()).unwrap();
        assert_eq!(read(&second), (vec!["10.9.0.3/32".to_owned()], vec!["10.9.0.1/32".to_owned()]));
        assert!(out.sync(&changed, &everything()).unwrap().is_empty());
        changed.announce("10.9.0.3/32".parse().unwrap(), PathAttributes { med: Some(2), ..Default::default() });
        assert_eq!(read(&out.sync(&changed, &everything()).unwrap()).0, ["10.9.0.3/32"]);
    }

    #[test]
    fn prefixes_of_the_other_family_and_unlisted_ones_are_not_announced() {
        let all = originated(&["10.9.0.1/32", "fd09::1/128"]);
        assert_eq!(read(&out("10.0.0.1").sync(&all, &everything()).unwrap()).0, ["10.9.0.1/32"]);
        assert_eq!(read(&out("fd00::1").sync(&all, &everything()).unwrap()).0, ["fd09::1/128"]);
        assert!(out("10.0.0.1").sync(&all, &Policy::default()).unwrap().is_empty(), "RFC 8212");
    }

    #[test]
    fn thousands_of_prefixes_are_split_over_messages_and_none_is_lost() {
        for (next_hop, family) in [("10.0.0.1", "10.9"), ("fd00::1", "fd09")] {
            let mut all = Originated::default();
            for number in 0..3000u32 {
                let (high, low) = (number >> 8, number & 255);
                let text = if family == "10.9" {
                    format!("10.{high}.{low}.1/32")
                } else {
                    format!("fd09::{high:x}:{low:x}/128")
                };
                all.announce(text.parse().unwrap(), PathAttributes::default());
            }
            let mut out = out(next_hop);
            let messages = out.sync(&all, &everything()).unwrap();
            assert_eq!(read(&messages).0.len(), 3000);
            assert_eq!(read(&out.refresh(Family::of_address(out.next_hop())).unwrap()).0.len(), 3000);
            let gone = out.sync(&Originated::default(), &everything()).unwrap();
            assert_eq!(read(&gone).1.len(), 3000);
        }
    }

    #[test]
    fn a_network_stays_when_the_announcement_of_the_same_prefix_goes() {
        let mut all = Originated::default();
        all.set_networks(&["10.9.0.1/32".parse().unwrap()]);
        let prefix: IpNet = "10.9.0.1/32".parse().unwrap();
        all.announce(prefix, PathAttributes { med: Some(7), ..Default::default() });
        assert_eq!(all.iter().collect::<Vec<_>>(), [(prefix, PathAttributes { med: Some(7), ..Default::default() })]);
        all.withdraw(&prefix);
        assert_eq!(all.iter().collect::<Vec<_>>(), [(prefix, PathAttributes::default())]);
    }

    #[test]
    fn attributes_too_long_for_a_message_are_an_error_and_not_a_truncation() {
        let mut all = Originated::default();
        let communities = (0..2000).map(|low| (64512, low)).collect();
        all.announce("10.9.0.1/32".parse().unwrap(), PathAttributes { communities, ..Default::default() });
        assert!(out("10.0.0.1").sync(&all, &everything()).is_err());
    }
}
