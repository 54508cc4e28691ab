//! What we originate, and each peer's Adj-RIB-Out.
//!
//! `networks` and announcements go out. What is learnt goes out only with `transit`, only where the peer's export list
//! permits it, and never from one internal peer to another (RFC 4271 9.2; we are no reflector).

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;

use super::{
    policy::{self, Permit, Policy, Withheld},
    rib::Best,
    wire::{self, Attributes, Community, Context, EncodeError, Family},
};
use crate::{
    config::valid::NextHop,
    model::{PathAttributes, scope},
};

/// Prefixes that we originate.
#[derive(Clone, Debug, Default)]
pub struct Originated {
    networks: BTreeSet<IpNet>,
    announcements: BTreeMap<IpNet, PathAttributes>,
    leaving: bool,
    ended: bool,
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

    /// From now on everything carries GRACEFUL_SHUTDOWN and the least preference (RFC 8326 4.2): who has another way
    /// takes it, and packets under way still arrive.
    pub const fn leave(&mut self) {
        self.leaving = true;
    }

    /// Nothing is ours any more.
    pub fn clear(&mut self) {
        self.networks.clear();
        self.announcements.clear();
        self.ended = true;
    }

    /// What a peer is told of the networks that it alone is told of; of those that are ours anyway see
    /// [`Originated::iter`].
    pub fn for_one<'a>(&'a self, networks: &'a [IpNet]) -> impl Iterator<Item = (IpNet, PathAttributes)> + 'a {
        let networks = networks.iter().filter(|prefix| !self.ended && self.get(prefix).is_none());
        networks.map(|prefix| (*prefix, self.told(PathAttributes::default())))
    }

    fn told(&self, mut attributes: PathAttributes) -> PathAttributes {
        if self.leaving {
            attributes.communities.push(Community::GRACEFUL_SHUTDOWN);
            attributes.local_pref = Some(0);
        }
        attributes
    }

    /// Every prefix with its attributes.
    pub fn iter(&self) -> impl Iterator<Item = (IpNet, PathAttributes)> {
        let networks = self.networks.iter().filter(|prefix| !self.announcements.contains_key(prefix));
        let networks = networks.map(|prefix| (*prefix, self.told(PathAttributes::default())));
        let announcements = self.announcements.iter();
        networks.chain(announcements.map(|(prefix, attributes)| (*prefix, self.told(attributes.clone()))))
    }

    /// The attributes of `prefix`, where we originate it.
    pub fn get(&self, prefix: &IpNet) -> Option<PathAttributes> {
        let network = || self.networks.contains(prefix).then(PathAttributes::default);
        self.announcements.get(prefix).cloned().or_else(network).map(|attributes| self.told(attributes))
    }

    /// The prefixes alone.
    pub fn prefixes(&self) -> BTreeSet<IpNet> {
        self.iter().map(|(prefix, _)| prefix).collect()
    }
}

/// What could be announced.
#[derive(Clone, Copy, Debug)]
pub enum Candidate<'a> {
    /// A prefix of ours.
    Own(&'a PathAttributes),
    /// The best learnt path.
    Learnt(Best<'a>),
}

/// A path as the peer gets it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Outgoing {
    /// Attributes, our own AS number in the path towards external peers.
    pub attributes: Arc<Attributes>,
    /// Next hop.
    pub next_hop: IpAddr,
}

/// What a session is, as far as it decides what is said on it and how.
#[derive(Clone, Debug)]
pub struct Terms {
    /// Our AS number.
    pub local_asn: u32,
    /// The peer's AS number.
    pub remote_asn: u32,
    /// The peer.
    pub peer: IpAddr,
    /// Our address on the session: the next hop by default.
    pub next_hop: IpAddr,
    /// Families in force.
    pub families: Vec<Family>,
    /// Families whose prefixes may have an IPv6 next hop (RFC 8950).
    pub extended_next_hop: Vec<Family>,
    /// How bytes are written.
    pub context: Context,
    /// What is learnt may go out.
    pub transit: bool,
}

impl Terms {
    /// What the peer gets of `candidate`.
    ///
    /// # Errors
    /// Why it gets nothing.
    pub fn judge(&self, policy: &Policy, prefix: &IpNet, candidate: Candidate<'_>) -> Result<Outgoing, Withheld> {
        let (mut attributes, permit, learnt) = match candidate {
            Candidate::Own(own) => {
                let attributes = originated(own);
                let permit = policy.export(prefix, &attributes, false)?;
                (attributes, permit, None)
            }
            Candidate::Learnt(best) => {
                self.may_pass_on(&best)?;
                let permit = policy.export(prefix, &best.route.attributes, true)?;
                (passed_on(&best, self.context.internal), permit, Some(best.route.next_hop))
            }
        };
        // Prefixes of the transport's own family, and those of another one that may have our address as next hop: else we
        // have no next hop to give.
        let family = Family::of(prefix);
        let reachable = family == Family::of_address(self.next_hop)
            || (self.next_hop.is_ipv6() && self.extended_next_hop.contains(&family));
        if !reachable || !self.families.contains(&family) {
            return Err(Withheld::Family);
        }
        policy.mark_sent(&mut attributes, self.local_asn)?;
        let prepend = match candidate {
            Candidate::Own(own) => usize::from(own.prepend),
            Candidate::Learnt(_) => 0,
        };
        Ok(self.finish(attributes, permit, learnt, prepend))
    }

    fn may_pass_on(&self, best: &Best<'_>) -> Result<(), Withheld> {
        let attributes = &best.route.attributes;
        if best.peer == self.peer {
            return Err(Withheld::Sender);
        }
        if !self.transit {
            return Err(Withheld::NoTransit);
        }
        if best.internal && self.context.internal {
            return Err(Withheld::InternalToInternal);
        }
        if attributes.has_community(Community::NO_ADVERTISE) {
            return Err(Withheld::Community(Community::NO_ADVERTISE));
        }
        let outside = [Community::NO_EXPORT, Community::NO_EXPORT_SUBCONFED];
        if let Some(community) = outside.into_iter().find(|c| !self.context.internal && attributes.has_community(*c)) {
            return Err(Withheld::Community(community));
        }
        if !self.context.internal && attributes.as_path.contains(self.remote_asn) {
            return Err(Withheld::Loop(self.remote_asn));
        }
        Ok(())
    }

    fn finish(&self, attributes: Attributes, permit: Permit<'_>, learnt: Option<IpAddr>, prepend: usize) -> Outgoing {
        let (mut attributes, mut next_hop) = (attributes, self.next_hop);
        if let Some(changes) = permit.changes {
            // A neighbour on one link is none on another.
            let learnt = learnt.filter(|hop| scope::number_of(*hop).is_none());
            if let (Some(NextHop::Unchanged), Some(learnt)) = (changes.next_hop, learnt) {
                next_hop = learnt;
            }
            policy::apply(changes, &mut attributes, &mut next_hop, self.next_hop, self.local_asn);
        }
        if self.context.internal {
            attributes.local_pref.get_or_insert(100);
        } else {
            attributes.local_pref = None;
            attributes.as_path.prepend(self.local_asn, 1 + prepend);
        }
        Outgoing { attributes: Arc::new(attributes), next_hop }
    }
}

/// Attributes of a route that we originate: ORIGIN IGP, an empty path.
fn originated(own: &PathAttributes) -> Attributes {
    let mut attributes = Attributes { med: own.med, local_pref: own.local_pref, ..Attributes::default() };
    own.communities.iter().for_each(|community| attributes.add_community(*community));
    attributes
}

/// Attributes of a route that we pass on. MED is for the neighbouring AS alone (RFC 4271 5.1.4), and ORIGINATOR_ID and
/// CLUSTER_LIST never leave the AS.
fn passed_on(best: &Best<'_>, to_internal: bool) -> Attributes {
    let mut attributes = best.route.attributes.clone();
    if !to_internal {
        attributes.med = None;
    }
    attributes.originator_id = None;
    attributes.cluster_list_length = 0;
    attributes
}

/// What a peer was told.
#[derive(Clone, Debug)]
pub struct AdjRibOut {
    /// What the session is.
    pub terms: Terms,
    sent: BTreeMap<IpNet, Outgoing>,
}

impl AdjRibOut {
    /// Nothing was said yet to this peer.
    pub const fn new(terms: Terms) -> Self {
        Self { terms, sent: BTreeMap::new() }
    }

    /// Prefixes and paths that the peer has.
    pub fn iter(&self) -> impl Iterator<Item = (&IpNet, &Outgoing)> {
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

    /// UPDATEs that bring the peer to what it should have, of everything that there is.
    ///
    /// # Errors
    /// Attributes that do not fit a message; what does is said all the same on the next call.
    pub fn sync<'a>(
        &mut self,
        policy: &Policy,
        all: impl Iterator<Item = (IpNet, Candidate<'a>)>,
    ) -> Result<Vec<bytes::Bytes>, EncodeError> {
        let desired: BTreeMap<IpNet, Outgoing> =
            all.filter_map(|(prefix, it)| Some((prefix, self.terms.judge(policy, &prefix, it).ok()?))).collect();
        let gone: Vec<IpNet> = self.sent.keys().filter(|prefix| !desired.contains_key(prefix)).copied().collect();
        let changed = desired.iter().filter(|(prefix, out)| self.sent.get(prefix) != Some(out));
        let mut messages = withdrawals(&gone)?;
        messages.extend(self.encode(changed)?);
        self.sent = desired;
        Ok(messages)
    }

    /// As [`AdjRibOut::sync`], for some prefixes; without a candidate the prefix is gone.
    ///
    /// # Errors
    /// As [`AdjRibOut::sync`].
    pub fn touch<'a>(
        &mut self,
        policy: &Policy,
        some: impl Iterator<Item = (IpNet, Option<Candidate<'a>>)>,
    ) -> Result<Vec<bytes::Bytes>, EncodeError> {
        let (mut gone, mut changed) = (Vec::new(), BTreeMap::new());
        for (prefix, candidate) in some {
            match candidate.and_then(|it| self.terms.judge(policy, &prefix, it).ok()) {
                Some(out) if self.sent.get(&prefix) != Some(&out) => drop(changed.insert(prefix, out)),
                Some(_) => {}
                None if self.sent.remove(&prefix).is_some() => gone.push(prefix),
                None => {}
            }
        }
        let mut messages = withdrawals(&gone)?;
        messages.extend(self.encode(changed.iter())?);
        self.sent.extend(changed);
        Ok(messages)
    }

    /// UPDATEs that say everything of one family again (RFC 2918).
    ///
    /// # Errors
    /// Attributes that do not fit a message.
    pub fn refresh(&self, family: Family) -> Result<Vec<bytes::Bytes>, EncodeError> {
        self.encode(self.sent.iter().filter(|(prefix, _)| Family::of(prefix) == family))
    }

    fn encode<'a>(
        &self,
        routes: impl Iterator<Item = (&'a IpNet, &'a Outgoing)>,
    ) -> Result<Vec<bytes::Bytes>, EncodeError> {
        // A message announces one family, and with an IPv6 next hop both may have all else in common (RFC 8950).
        let mut groups: BTreeMap<(Family, &Outgoing), Vec<IpNet>> = BTreeMap::new();
        for (prefix, out) in routes {
            groups.entry((Family::of(prefix), out)).or_default().push(*prefix);
        }
        let mut messages = Vec::new();
        for ((_, out), prefixes) in groups {
            messages.extend(wire::encode_announcements(&prefixes, &out.attributes, out.next_hop, self.terms.context)?);
        }
        Ok(messages)
    }
}

fn withdrawals(gone: &[IpNet]) -> Result<Vec<bytes::Bytes>, EncodeError> {
    let (ipv4, ipv6): (Vec<IpNet>, Vec<IpNet>) = gone.iter().partition(|prefix| Family::of(prefix) == Family::Ipv4);
    let mut messages = wire::encode_withdrawals(&ipv4)?;
    messages.extend(wire::encode_withdrawals(&ipv6)?);
    Ok(messages)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::{
        super::{
            rib::Route,
            wire::{AddPath, AsPath, Message, Segment},
        },
        *,
    };
    use crate::config::valid::{Changes, Term};

    const CONTEXT: Context = Context { four_octet_as: true, internal: false, extended: false, add_path: AddPath::None };

    fn terms(next_hop: &str) -> Terms {
        Terms {
            local_asn: 64512,
            remote_asn: 64513,
            peer: "10.0.0.2".parse().unwrap(),
            next_hop: next_hop.parse().unwrap(),
            families: Family::ALL.to_vec(),
            extended_next_hop: vec![],
            context: CONTEXT,
            transit: false,
        }
    }

    fn out(next_hop: &str) -> AdjRibOut {
        AdjRibOut::new(terms(next_hop))
    }

    fn sync(out: &mut AdjRibOut, all: &Originated, policy: &Policy) -> Result<Vec<Bytes>, EncodeError> {
        let all: Vec<(IpNet, PathAttributes)> = all.iter().collect();
        out.sync(policy, all.iter().map(|(prefix, own)| (*prefix, Candidate::Own(own))))
    }

    fn everything() -> Policy {
        Policy { export: Some(Arc::new(vec![Term::default()])), ..Policy::default() }
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
            announced.extend(update.announced.iter().flat_map(|a| &a.prefixes).map(|nlri| nlri.prefix.to_string()));
            withdrawn.extend(update.withdrawn.iter().map(|nlri| nlri.prefix.to_string()));
        }
        (announced, withdrawn)
    }

    #[test]
    fn only_what_changed_is_said() {
        let mut out = out("10.0.0.1");
        let first = sync(&mut out, &originated(&["10.9.0.1/32", "10.9.0.2/32"]), &everything()).unwrap();
        assert_eq!(read(&first).0, ["10.9.0.1/32", "10.9.0.2/32"]);
        let mut changed = originated(&["10.9.0.2/32"]);
        changed.announce("10.9.0.3/32".parse().unwrap(), PathAttributes { med: Some(1), ..Default::default() });
        let second = sync(&mut out, &changed, &everything()).unwrap();
        assert_eq!(read(&second), (vec!["10.9.0.3/32".to_owned()], vec!["10.9.0.1/32".to_owned()]));
        assert!(sync(&mut out, &changed, &everything()).unwrap().is_empty());
        changed.announce("10.9.0.3/32".parse().unwrap(), PathAttributes { med: Some(2), ..Default::default() });
        assert_eq!(read(&sync(&mut out, &changed, &everything()).unwrap()).0, ["10.9.0.3/32"]);
    }

    #[test]
    fn ipv4_prefixes_go_with_an_ipv6_next_hop_where_the_peer_takes_that() {
        let all = originated(&["10.9.0.1/32", "fd09::1/128"]);
        let mut out = AdjRibOut::new(Terms { extended_next_hop: vec![Family::Ipv4], ..terms("fd00::1") });
        let messages = sync(&mut out, &all, &everything()).unwrap();
        let mut announced = Vec::new();
        for message in messages {
            let Message::Update(update) = wire::decode(message, CONTEXT).unwrap() else { panic!("an UPDATE") };
            assert!(update.problems.is_empty(), "{:?}", update.problems);
            for announcement in update.announced {
                let prefixes = announcement.prefixes.iter().map(|nlri| nlri.prefix.to_string());
                announced.extend(prefixes.map(|prefix| (prefix, announcement.next_hop.to_string())));
            }
        }
        announced.sort();
        let hop = "fd00::1".to_owned();
        assert_eq!(announced, [("10.9.0.1/32".to_owned(), hop.clone()), ("fd09::1/128".to_owned(), hop)]);
    }

    #[test]
    fn prefixes_of_the_other_family_and_unlisted_ones_are_not_announced() {
        let all = originated(&["10.9.0.1/32", "fd09::1/128"]);
        assert_eq!(read(&sync(&mut out("10.0.0.1"), &all, &everything()).unwrap()).0, ["10.9.0.1/32"]);
        assert_eq!(read(&sync(&mut out("fd00::1"), &all, &everything()).unwrap()).0, ["fd09::1/128"]);
        assert!(sync(&mut out("10.0.0.1"), &all, &Policy::default()).unwrap().is_empty(), "RFC 8212");
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
            let messages = sync(&mut out, &all, &everything()).unwrap();
            assert_eq!(read(&messages).0.len(), 3000);
            assert_eq!(read(&out.refresh(Family::of_address(out.terms.next_hop)).unwrap()).0.len(), 3000);
            let gone = sync(&mut out, &Originated::default(), &everything()).unwrap();
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
        let communities = (0..2000).map(|low| Community::Standard(64512 << 16 | low)).collect();
        all.announce("10.9.0.1/32".parse().unwrap(), PathAttributes { communities, ..Default::default() });
        assert!(sync(&mut out("10.0.0.1"), &all, &everything()).is_err());
    }

    fn route(path: &[u32], communities: &[&str]) -> Arc<Route> {
        let mut attributes = Attributes {
            as_path: AsPath(vec![Segment::Sequence(path.to_vec())]),
            med: Some(5),
            local_pref: Some(300),
            ..Attributes::default()
        };
        communities.iter().for_each(|community| attributes.add_community(community.parse().unwrap()));
        Arc::new(Route { attributes, next_hop: "10.0.0.9".parse().unwrap() })
    }

    fn learnt(route: &Arc<Route>, internal: bool) -> Candidate<'_> {
        Candidate::Learnt(Best { route, peer: "10.0.0.9".parse().unwrap(), internal })
    }

    fn said(terms: &Terms, policy: &Policy, candidate: Candidate<'_>) -> Result<Outgoing, Withheld> {
        terms.judge(policy, &"10.1.2.0/24".parse().unwrap(), candidate)
    }

    #[test]
    fn nothing_learnt_goes_out_without_transit_and_never_from_internal_to_internal() {
        let route = route(&[64514], &[]);
        let off = terms("10.0.0.1");
        assert_eq!(said(&off, &everything(), learnt(&route, false)), Err(Withheld::NoTransit));
        let external = Terms { transit: true, ..off };
        let internal = Terms { remote_asn: 64512, context: Context { internal: true, ..CONTEXT }, ..external.clone() };
        assert!(said(&external, &everything(), learnt(&route, false)).is_ok());
        assert!(said(&external, &everything(), learnt(&route, true)).is_ok());
        assert!(said(&internal, &everything(), learnt(&route, false)).is_ok());
        assert_eq!(said(&internal, &everything(), learnt(&route, true)), Err(Withheld::InternalToInternal));
        let lists = [Policy { internal: true, ..Policy::default() }, Policy::default()];
        for (terms, policy) in [&internal, &external].into_iter().zip(lists) {
            assert_eq!(said(terms, &policy, learnt(&route, false)), Err(Withheld::NoExportList));
        }
    }

    #[test]
    fn what_passes_from_external_to_internal_and_back_has_the_attributes_of_the_rfc() {
        let route = route(&[64514], &["64514:7"]);
        let external = Terms { transit: true, ..terms("10.0.0.1") };
        let out = said(&external, &everything(), learnt(&route, true)).unwrap();
        assert_eq!(out.attributes.as_path.to_string(), "64512 64514");
        assert_eq!((out.attributes.med, out.attributes.local_pref), (None, None));
        assert_eq!(out.attributes.community_texts(), ["64514:7"]);
        assert_eq!(out.next_hop.to_string(), "10.0.0.1", "next-hop-self");
        let internal = Terms { remote_asn: 64512, context: Context { internal: true, ..CONTEXT }, ..external };
        let out = said(&internal, &everything(), learnt(&route, false)).unwrap();
        assert_eq!(out.attributes.as_path.to_string(), "64514");
        assert_eq!((out.attributes.med, out.attributes.local_pref), (Some(5), Some(300)));
        assert_eq!(out.next_hop.to_string(), "10.0.0.1");
        let set = Changes { next_hop: Some(NextHop::Unchanged), ..Changes::default() };
        let unchanged = Policy { export: Some(Arc::new(vec![Term { set, ..Term::default() }])), ..Policy::default() };
        assert_eq!(said(&internal, &unchanged, learnt(&route, false)).unwrap().next_hop.to_string(), "10.0.0.9");
    }

    #[test]
    fn a_path_goes_neither_back_nor_into_a_loop_nor_where_its_communities_forbid_it() {
        let external = Terms { transit: true, ..terms("10.0.0.1") };
        let looped = route(&[64514, 64513], &[]);
        assert_eq!(said(&external, &everything(), learnt(&looped, false)), Err(Withheld::Loop(64513)));
        let sender = Terms { peer: "10.0.0.9".parse().unwrap(), ..external.clone() };
        assert_eq!(said(&sender, &everything(), learnt(&looped, false)), Err(Withheld::Sender));
        let kept = route(&[64514], &["no-export"]);
        let withheld = Err(Withheld::Community(Community::NO_EXPORT));
        assert_eq!(said(&external, &everything(), learnt(&kept, false)), withheld);
        let internal = Terms { context: Context { internal: true, ..CONTEXT }, ..external.clone() };
        assert!(said(&internal, &everything(), learnt(&kept, false)).is_ok());
        let hidden = route(&[64514], &["no-advertise"]);
        let withheld = Err(Withheld::Community(Community::NO_ADVERTISE));
        assert_eq!(said(&internal, &everything(), learnt(&hidden, false)), withheld);
    }

    #[test]
    fn a_prefix_of_ours_is_prepended_as_often_as_asked_and_only_outside() {
        let own = PathAttributes { prepend: 2, ..PathAttributes::default() };
        let out = said(&terms("10.0.0.1"), &everything(), Candidate::Own(&own)).unwrap();
        assert_eq!(out.attributes.as_path.to_string(), "64512 64512 64512");
        let internal = Terms { context: Context { internal: true, ..CONTEXT }, ..terms("10.0.0.1") };
        let out = said(&internal, &everything(), Candidate::Own(&own)).unwrap();
        assert_eq!((out.attributes.as_path.to_string(), out.attributes.local_pref), (String::new(), Some(100)));
    }
}
