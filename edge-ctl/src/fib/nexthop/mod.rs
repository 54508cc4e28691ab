//! Next-hop objects of the kernel (Linux 5.3): one for each gateway, and a group for each set of them (ECMP), which routes
//! name by number. A route is so short, the kernel checks a gateway once, and `ip nexthop` shows every node once.
//!
//! Pure: which objects there are, which ones changes need first, which ones nothing needs any more. Ours have protocol
//! `bgp` and a number from [`FIRST`] on; all others are left alone. Where the kernel has no such objects, or refuses one, a
//! route names its gateways itself.
//!
//! A resilient group (Linux 5.13) belongs to one prefix and changes its members in place: flows by the members that stay
//! keep their way.

pub(super) mod wire;

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;

use super::{
    NextHopStyle,
    plan::{NextHop, RouteChange},
};

/// First number of ours: far from those that other programs, and the kernel by itself, count up from 1.
pub(super) const FIRST: u32 = 0xED6E_0000;
/// How many numbers there are from [`FIRST`] on.
const NUMBERS: u32 = 0x1_0000;

/// What an object stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A gateway on an interface.
    Hop(NextHop),
    /// A group of other objects, by number, sorted.
    Group {
        /// The objects.
        members: Vec<u32>,
        /// Its buckets keep their members.
        resilient: bool,
    },
    /// Blackholes, tunnels, bridges.
    Other,
}

/// An object of the kernel's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Object {
    /// Its number.
    pub id: u32,
    /// It has our protocol and a number of ours.
    pub ours: bool,
    /// What it stands for.
    pub kind: Kind,
}

impl Object {
    /// `protocol` is `nh_protocol`.
    pub fn new(id: u32, protocol: u8, kind: Kind) -> Self {
        let ours = protocol == super::plan::PROTOCOL_BGP && id.wrapping_sub(FIRST) < NUMBERS;
        Self { id, ours, kind }
    }
}

/// One request of a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Request<'a> {
    /// Make an object; an existing one of this number is changed where `replace` says so, else left alone.
    Make {
        /// Its number.
        id: u32,
        /// What it stands for.
        kind: Kind,
        /// It may exist.
        replace: bool,
    },
    /// Change a route, which names this object, or its gateways itself.
    Route(&'a RouteChange, Option<u32>),
}

/// How many objects of ours there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ObjectCounts {
    /// Gateways.
    pub hops: usize,
    /// Groups.
    pub groups: usize,
}

/// The objects as they were last read, with our own changes since.
#[derive(Debug)]
pub(super) struct Objects {
    /// `None`: the kernel has none of them.
    kind: Option<NextHopStyle>,
    hops: BTreeMap<NextHop, u32>,
    groups: BTreeMap<Vec<u32>, u32>,
    /// Groups that belong to one prefix, with their members.
    resilient: BTreeMap<IpNet, (u32, Vec<u32>)>,
    /// Numbers of ours that are in use, by whomever.
    taken: BTreeSet<u32>,
    next: u32,
}

impl Objects {
    pub fn new(kind: NextHopStyle) -> Self {
        Self {
            kind: Some(kind).filter(|kind| *kind != NextHopStyle::Inline),
            hops: BTreeMap::new(),
            groups: BTreeMap::new(),
            resilient: BTreeMap::new(),
            taken: BTreeSet::new(),
            next: 0,
        }
    }

    /// From now on routes name their gateways themselves.
    pub fn give_up(&mut self) {
        *self = Self::new(NextHopStyle::Inline);
    }

    /// From now on groups are plain.
    pub fn no_resilience(&mut self) {
        self.kind = self.kind.map(|_| NextHopStyle::Objects);
        self.resilient.clear();
    }

    pub const fn are_used(&self) -> bool {
        self.kind.is_some()
    }

    pub fn counts(&self) -> ObjectCounts {
        ObjectCounts { hops: self.hops.len(), groups: self.groups.len() + self.resilient.len() }
    }

    /// Takes over what there is; `routes` are the kernel's with the object that each names. Returns the objects of ours
    /// that nothing uses, groups first: they are to be deleted.
    pub fn read(&mut self, all: &[Object], routes: &[(IpNet, u32)]) -> Vec<u32> {
        let named: BTreeSet<u32> = routes.iter().map(|(_, id)| *id).collect();
        let in_use = |object: &Object| !object.ours || named.contains(&object.id);
        let used: BTreeSet<u32> =
            all.iter().filter(|object| in_use(object)).flat_map(members).chain(named.clone()).collect();
        let (ours, others): (Vec<&Object>, Vec<&Object>) = all.iter().partition(|object| object.ours);
        let kind = self.kind.unwrap_or(NextHopStyle::Inline);
        let next = self.next;
        *self = Self { next, ..Self::new(kind) };
        self.taken = others.iter().map(|object| object.id).collect();
        let mut unused = Vec::new();
        for object in ours {
            if !used.contains(&object.id) {
                unused.push(object);
                continue;
            }
            self.taken.insert(object.id);
            match &object.kind {
                Kind::Hop(hop) => drop(self.hops.insert(hop.clone(), object.id)),
                Kind::Group { members, resilient: false } => drop(self.groups.insert(members.clone(), object.id)),
                Kind::Group { members, resilient: true } => {
                    let prefixes = routes.iter().filter(|(_, id)| *id == object.id);
                    self.resilient.extend(prefixes.map(|(prefix, _)| (*prefix, (object.id, members.clone()))));
                }
                Kind::Other => {}
            }
        }
        unused.sort_by_key(|object| matches!(object.kind, Kind::Hop(_)));
        unused.into_iter().map(|object| object.id).collect()
    }

    /// An object could not be made.
    pub fn failed(&mut self, id: u32) {
        self.hops.retain(|_, other| *other != id);
        self.groups.retain(|_, other| *other != id);
        self.resilient.retain(|_, (other, _)| *other != id);
    }

    /// Requests for as many of `changes` as about `most` of them hold, in order: objects before the routes that name
    /// them. The number of changes that they are for is at least one.
    pub fn requests<'a>(&mut self, changes: &'a [RouteChange], most: usize) -> (Vec<Request<'a>>, usize) {
        let mut requests = Vec::with_capacity(most);
        for (number, change) in changes.iter().enumerate() {
            if requests.len() >= most {
                return (requests, number);
            }
            let object = match change {
                RouteChange::Replace { prefix, next_hops, .. } => self.object(*prefix, next_hops, &mut requests),
                RouteChange::Delete { .. } => None,
            };
            requests.push(Request::Route(change, object));
        }
        (requests, changes.len())
    }

    /// The object that stands for these next hops; requests for what is missing are added.
    fn object(&mut self, prefix: IpNet, next_hops: &[NextHop], requests: &mut Vec<Request<'_>>) -> Option<u32> {
        let kind = self.kind?;
        let mut members = Vec::with_capacity(next_hops.len());
        for hop in next_hops {
            members.push(self.hop(hop, requests)?);
        }
        members.sort_unstable();
        match members.as_slice() {
            [only] if !self.resilient.contains_key(&prefix) => Some(*only),
            [] => None,
            _ if kind == NextHopStyle::Resilient => self.resilient_group(prefix, members, requests),
            _ => self.group(members, requests),
        }
    }

    fn hop(&mut self, hop: &NextHop, requests: &mut Vec<Request<'_>>) -> Option<u32> {
        if let Some(id) = self.hops.get(hop) {
            return Some(*id);
        }
        hop.gateway?;
        let id = self.number()?;
        self.hops.insert(hop.clone(), id);
        requests.push(Request::Make { id, kind: Kind::Hop(hop.clone()), replace: false });
        Some(id)
    }

    fn group(&mut self, members: Vec<u32>, requests: &mut Vec<Request<'_>>) -> Option<u32> {
        if let Some(id) = self.groups.get(&members) {
            return Some(*id);
        }
        let id = self.number()?;
        let kind = Kind::Group { members: members.clone(), resilient: false };
        requests.push(Request::Make { id, kind, replace: false });
        self.groups.insert(members, id);
        Some(id)
    }

    fn resilient_group(&mut self, prefix: IpNet, members: Vec<u32>, requests: &mut Vec<Request<'_>>) -> Option<u32> {
        let known = self.resilient.get(&prefix);
        if let Some((id, _)) = known.filter(|(_, same)| *same == members) {
            return Some(*id);
        }
        let (replace, id) = (known.is_some(), known.map(|(id, _)| *id));
        let id = id.or_else(|| self.number())?;
        let kind = Kind::Group { members: members.clone(), resilient: true };
        requests.push(Request::Make { id, kind, replace });
        self.resilient.insert(prefix, (id, members));
        Some(id)
    }

    fn number(&mut self) -> Option<u32> {
        let free = (0..NUMBERS).map(|step| FIRST + (self.next + step) % NUMBERS).find(|id| !self.taken.contains(id))?;
        self.next = (free - FIRST + 1) % NUMBERS;
        self.taken.insert(free);
        Some(free)
    }
}

/// The gateways that object `id` stands for, sorted.
pub(super) fn next_hops(all: &[Object], id: u32) -> Vec<NextHop> {
    let find = |id: u32| all.iter().find(|object| object.id == id);
    let Some(object) = find(id) else { return Vec::new() };
    let hop = |object: &Object| match &object.kind {
        Kind::Hop(hop) => Some(hop.clone()),
        Kind::Group { .. } | Kind::Other => None,
    };
    let mut hops: Vec<NextHop> =
        hop(object).into_iter().chain(members(object).into_iter().filter_map(find).filter_map(hop)).collect();
    hops.sort();
    hops
}

fn members(object: &Object) -> Vec<u32> {
    match &object.kind {
        Kind::Group { members, .. } => members.clone(),
        Kind::Hop(_) | Kind::Other => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fib::plan::{METRIC, PROTOCOL_BGP};

    fn hop(host: u8) -> NextHop {
        NextHop { gateway: Some([172, 16, 1, host].into()), ifindex: 2 }
    }

    fn prefix(number: u8) -> IpNet {
        format!("10.1.{number}.0/24").parse().unwrap()
    }

    fn route(number: u8, hosts: &[u8]) -> RouteChange {
        let next_hops = hosts.iter().map(|host| hop(*host)).collect();
        RouteChange::Replace { prefix: prefix(number), metric: METRIC, next_hops }
    }

    fn made(requests: &[Request<'_>]) -> Vec<(u32, Kind, bool)> {
        let made = |request: &Request<'_>| match request {
            Request::Make { id, kind, replace } => Some((id - FIRST, kind.clone(), *replace)),
            Request::Route(..) => None,
        };
        requests.iter().filter_map(made).collect()
    }

    fn named(requests: &[Request<'_>]) -> Vec<Option<u32>> {
        let named = |request: &Request<'_>| match request {
            Request::Route(_, id) => Some(id.map(|id| id - FIRST)),
            Request::Make { .. } => None,
        };
        requests.iter().filter_map(named).collect()
    }

    #[test]
    fn every_gateway_and_every_set_of_them_is_made_once_and_before_the_routes_that_name_it() {
        let mut objects = Objects::new(NextHopStyle::Objects);
        let delete = RouteChange::Delete { prefix: prefix(9), metric: METRIC };
        let changes = [route(1, &[80]), route(2, &[80]), route(3, &[80, 81]), route(4, &[81, 80]), delete];
        let (requests, taken) = objects.requests(&changes, 128);
        let group =
            |members: &[u32]| Kind::Group { members: members.iter().map(|n| FIRST + n).collect(), resilient: false };
        assert_eq!(
            made(&requests),
            [(0, Kind::Hop(hop(80)), false), (1, Kind::Hop(hop(81)), false), (2, group(&[0, 1]), false)]
        );
        assert_eq!((named(&requests), taken), (vec![Some(0), Some(0), Some(2), Some(2), None], 5));
        assert_eq!(requests[0], Request::Make { id: FIRST, kind: Kind::Hop(hop(80)), replace: false });
        let (again, _) = objects.requests(&changes, 128);
        assert!(made(&again).is_empty());
        assert_eq!(objects.counts(), ObjectCounts { hops: 2, groups: 1 });
        let (few, taken) = objects.requests(&changes, 2);
        assert_eq!((few.len(), taken), (2, 2), "the rest is for another batch");
    }

    #[test]
    fn a_resilient_group_is_one_prefixs_and_changes_in_place() {
        let mut objects = Objects::new(NextHopStyle::Resilient);
        let group =
            |members: &[u32]| Kind::Group { members: members.iter().map(|n| FIRST + n).collect(), resilient: true };
        let both = [route(1, &[80, 81]), route(2, &[80, 81])];
        let (requests, _) = objects.requests(&both, 128);
        assert_eq!(made(&requests)[2..], [(2, group(&[0, 1]), false), (3, group(&[0, 1]), false)]);
        let one = [route(1, &[81])];
        let (requests, _) = objects.requests(&one, 128);
        assert_eq!((made(&requests), named(&requests)), (vec![(2, group(&[1]), true)], vec![Some(2)]));
        let (requests, _) = objects.requests(&both[..1], 128);
        assert_eq!((made(&requests), named(&requests)), (vec![(2, group(&[0, 1]), true)], vec![Some(2)]));
    }

    #[test]
    fn what_was_read_is_used_again_what_nothing_uses_goes_and_what_is_not_ours_stays() {
        let mut objects = Objects::new(NextHopStyle::Objects);
        let bgp = |number: u32, kind| Object::new(FIRST + number, PROTOCOL_BGP, kind);
        let group =
            |members: &[u32]| Kind::Group { members: members.iter().map(|n| FIRST + n).collect(), resilient: false };
        let all = [
            bgp(0, Kind::Hop(hop(80))),
            bgp(1, Kind::Hop(hop(81))),
            bgp(2, Kind::Hop(hop(82))),
            bgp(3, group(&[0, 1])),
            bgp(4, group(&[1, 2])),
            bgp(5, Kind::Hop(hop(83))),
            // A number of ours in other hands, somebody's group of one of ours, and a BGP daemon's with its own number.
            Object::new(FIRST + 6, 4, Kind::Other),
            Object::new(7, 4, group(&[5])),
            Object::new(8, PROTOCOL_BGP, Kind::Hop(hop(84))),
        ];
        let gone = objects.read(&all, &[(prefix(1), FIRST + 3)]);
        assert_eq!(gone, [FIRST + 4, FIRST + 2], "groups before what they consist of");
        let changes = [route(1, &[80, 81]), route(2, &[83]), route(3, &[84])];
        objects.next = 6;
        let (requests, _) = objects.requests(&changes, 128);
        assert_eq!(named(&requests), [Some(3), Some(5), Some(7)]);
        assert_eq!(made(&requests), [(7, Kind::Hop(hop(84)), false)], "6 is taken");
        objects.failed(FIRST + 7);
        let (requests, _) = objects.requests(&changes[2..], 128);
        assert_eq!(named(&requests), [Some(8)], "another number");
    }

    #[test]
    fn without_objects_routes_name_their_gateways_themselves() {
        let changes = [route(1, &[80, 81])];
        for mut objects in [Objects::new(NextHopStyle::Inline), {
            let mut objects = Objects::new(NextHopStyle::Objects);
            objects.give_up();
            objects
        }] {
            assert_eq!(objects.requests(&changes, 128).0, [Request::Route(&changes[0], None)]);
            assert!(!objects.are_used());
        }
    }
}
