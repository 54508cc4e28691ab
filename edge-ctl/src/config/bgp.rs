//! `[bgp]`, `[bgp.group.NAME]`, `[[bgp.peer]]`: groups are merged into their peers here and nowhere else.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use ipnet::IpNet;

use super::{
    bgp_session::RawSession,
    policy::{self, Guard, Intake, MaxPrefixes, Term},
    raw::Place,
    read::{At, Section},
    valid::{Bgp, Peer, PeerRange},
    values,
};
use crate::model::{NextHopStyle, Service, scope};

const DEFAULT_PORT: u16 = 179;
/// RFC 4271 10 suggests 90 s, and a third of it for keepalives.
const DEFAULT_HOLD: Duration = Duration::from_secs(90);
/// RFC 4271 4.2: zero, or at least three seconds.
const SHORTEST_HOLD: u64 = 3;
/// `fe80::`.
const LINK_LOCAL: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0);
const AS_NUMBER: std::ops::RangeInclusive<u32> = 1..=u32::MAX;

/// What may stand in a group as on a peer; `None`: not said there.
#[derive(Clone, Debug, Default)]
struct Settings {
    remote_asn: Option<u32>,
    port: Option<u16>,
    passive: Option<bool>,
    peer_edge: Option<bool>,
    local_address: Option<At<IpAddr>>,
    keepalive: Option<At<Duration>>,
    hold: Option<At<Duration>>,
    ebgp_multihop: Option<u8>,
    session: RawSession,
    import: Option<Vec<Term>>,
    export: Option<Vec<Term>>,
    client_networks: Option<Vec<At<IpNet>>>,
    max_prefixes: Option<MaxPrefixes>,
    add_path: Option<bool>,
}

impl Settings {
    fn read(section: &Section<'_>) -> Self {
        let mut session = RawSession::read(section);
        let (keepalive, hold) = timers(section, &mut session);
        Self {
            session,
            remote_asn: section.integer("remote_asn", AS_NUMBER),
            port: section.port("port", 1),
            passive: section.boolean("passive"),
            peer_edge: section.boolean("peer_edge"),
            local_address: section.parse("local_address", "an IP address of this host", address),
            keepalive,
            hold,
            ebgp_multihop: section.integer("ebgp_multihop", 1..=255).and_then(|hops| u8::try_from(hops).ok()),
            import: policy::terms(section, "import"),
            export: policy::terms(section, "export"),
            client_networks: section.list("client_networks", values::PREFIX, values::prefix),
            max_prefixes: policy::max_prefixes(section),
            add_path: section.boolean("add_path"),
        }
    }

    /// These settings, and the group's where these say nothing.
    fn over(self, group: &Settings) -> Self {
        let group = group.clone();
        Self {
            remote_asn: self.remote_asn.or(group.remote_asn),
            port: self.port.or(group.port),
            passive: self.passive.or(group.passive),
            peer_edge: self.peer_edge.or(group.peer_edge),
            local_address: self.local_address.or(group.local_address),
            // The pair belongs together: a peer's hold with the group's keepalive may contradict each other.
            keepalive: if self.hold.is_some() { self.keepalive } else { self.keepalive.or(group.keepalive) },
            hold: self.hold.or(group.hold),
            session: self.session.over(group.session),
            ebgp_multihop: self.ebgp_multihop.or(group.ebgp_multihop),
            import: self.import.or(group.import),
            export: self.export.or(group.export),
            client_networks: self.client_networks.or(group.client_networks),
            max_prefixes: self.max_prefixes.or(group.max_prefixes),
            add_path: self.add_path.or(group.add_path),
        }
    }
}

impl Settings {
    fn into_peer(
        self,
        section: &Section<'_>,
        address: IpAddr,
        remote_asn: u32,
        asn: Option<u32>,
        group: Option<String>,
        description: String,
    ) -> Peer {
        let (keepalive, hold) = agreed_timers(section, &self);
        let internal = asn == Some(remote_asn);
        let link_local = scope::number_of(address).is_some();
        if let Some(local) = self.local_address.as_ref().filter(|_| link_local) {
            section
                .fault(&local.at, "a link-local peer is spoken to from its interface's own address; remove it".into());
        }
        Peer {
            address,
            remote_asn,
            port: self.port.unwrap_or(DEFAULT_PORT),
            description,
            group,
            passive: self.passive.unwrap_or(false),
            peer_edge: self.peer_edge.unwrap_or(false),
            local_address: self.local_address.map(|local| local.value),
            keepalive,
            hold,
            ebgp_multihop: self.ebgp_multihop.unwrap_or(1),
            session: self.session.settle(section, internal, self.ebgp_multihop.is_some(), link_local),
            import: self.import,
            export: self.export,
            client_networks: self.client_networks.into_iter().flatten().map(|network| network.value).collect(),
            intake: Intake { max_prefixes: self.max_prefixes, add_path: self.add_path.unwrap_or(false) },
        }
    }
}

fn timers(section: &Section<'_>, session: &mut RawSession) -> (Option<At<Duration>>, Option<At<Duration>>) {
    let Some(timers) = section.table("timers") else { return (None, None) };
    let whole = |longest: u64| {
        move |text: &str| match values::duration(text)? {
            duration if duration.subsec_millis() != 0 => Err("BGP counts whole seconds".to_owned()),
            duration if duration.as_secs() > longest => Err(format!("at most {longest} s")),
            duration => Ok(duration),
        }
    };
    let keepalive = timers.parse("keepalive", values::DURATION, whole(u64::from(u16::MAX)));
    let hold = timers.parse("hold", "\"0s\", or at least \"3s\"", |text| match whole(u64::from(u16::MAX))(text)? {
        hold if (1..SHORTEST_HOLD).contains(&hold.as_secs()) => Err("RFC 4271 4.2 forbids 1 s and 2 s".to_owned()),
        hold => Ok(hold),
    });
    session.read_timers(&timers);
    timers.finish();
    (keepalive, hold)
}

fn address(text: &str) -> Result<IpAddr, String> {
    match text.parse() {
        Ok(address) if values::is_host(address) => Ok(address),
        Ok(_) => Err("no packet can be sent there".into()),
        Err(_) => Err("not an IP address".into()),
    }
}

/// As [`address`], or link-local.
fn peer_address(text: &str) -> Result<IpAddr, String> {
    match text.parse() {
        Ok(IpAddr::V6(link_local)) if link_local.is_unicast_link_local() => Ok(IpAddr::V6(link_local)),
        _ => address(text),
    }
}

/// `None` without `[bgp]`, or where something was reported.
pub(super) fn bgp(root: &Section<'_>) -> Option<Bgp> {
    let section = root.table("bgp")?;
    let asn = section.integer("asn", AS_NUMBER);
    if !section.has("asn") {
        section.missing("asn", "our AS number, 1 to 4294967295");
    }
    let listen_port = section.port("listen_port", 0).unwrap_or(DEFAULT_PORT);
    let networks = section.list("networks", values::PREFIX, values::prefix).unwrap_or_default();
    let mut ranges = Vec::new();
    let groups: BTreeMap<&str, Settings> =
        section.named("group").into_iter().map(|named| group(named, asn, &mut ranges)).collect();
    let mut neighbours = Neighbours::default();
    for peer in section.each("peer") {
        read_peer(peer, asn, &groups, &mut neighbours);
    }
    let router_id = router_id(&section, &neighbours.peers);
    let transit = section.boolean("transit").unwrap_or(false);
    let next_hops = section
        .parse("next_hops", "\"objects\", \"resilient\" or \"inline\"", next_hops)
        .map(|next_hops| next_hops.value);
    let drain = section.parse("drain", values::DURATION, values::duration).map(|drain| drain.value);
    section.finish();
    Some(Bgp {
        asn: asn?,
        router_id: router_id?,
        listen_port: Some(listen_port).filter(|port| *port != 0),
        networks: networks.into_iter().map(|network| network.value).collect(),
        peers: neighbours.peers.into_iter().map(|(address, (peer, _))| (address, peer)).collect(),
        transit,
        next_hops: next_hops.unwrap_or_default(),
        drain,
        guard: Guard::default(),
        ranges: by_length(ranges),
        links: neighbours.links.into_iter().map(|(interface, (peer, _))| (interface, peer)).collect(),
    })
}

fn next_hops(text: &str) -> Result<NextHopStyle, String> {
    match text {
        "objects" => Ok(NextHopStyle::Objects),
        "resilient" => Ok(NextHopStyle::Resilient),
        "inline" => Ok(NextHopStyle::Inline),
        _ => Err(String::new()),
    }
}

/// With what no import may bring in unasked: pods are routed, our own addresses are not.
pub(super) fn guarded(bgp: Bgp, pod_networks: &[IpNet], services: &BTreeMap<String, Service>) -> Bgp {
    let vips = services.values().flat_map(|service| &service.listen).map(|frontend| frontend.address.ip()).collect();
    Bgp { guard: Guard { pod_networks: Some(pod_networks.to_vec()), vips }, ..bgp }
}

fn group<'a>(
    (name, section): (&'a str, Section<'_>),
    asn: Option<u32>,
    ranges: &mut Vec<(At<IpNet>, Peer)>,
) -> (&'a str, Settings) {
    if let Err(why) = values::table_name(name) {
        section.fault(section.place(), why);
    }
    let settings = Settings::read(&section);
    listen_ranges(name, &section, &settings, asn, ranges);
    section.finish();
    (name, settings)
}

/// Who connects from one of these networks is a passive peer with the group's settings.
fn listen_ranges(
    name: &str,
    section: &Section<'_>,
    settings: &Settings,
    asn: Option<u32>,
    ranges: &mut Vec<(At<IpNet>, Peer)>,
) {
    let Some(networks) = section.list("listen_range", values::PREFIX, values::prefix) else { return };
    let Some(remote_asn) = settings.remote_asn else {
        return section.missing("remote_asn", "the AS number of those who connect from `listen_range`");
    };
    for network in networks {
        if let Some((first, _)) = ranges.iter().find(|(other, _)| other.value == network.value) {
            section.fault(&network.at, format!("{} is already a `listen_range` at {}", network.value, first.at));
            continue;
        }
        let settled = Settings { passive: Some(true), ..settings.clone() };
        let template =
            settled.into_peer(section, network.value.addr(), remote_asn, asn, Some(name.to_owned()), String::new());
        ranges.push((network, template));
    }
}

/// The most specific first.
fn by_length(ranges: Vec<(At<IpNet>, Peer)>) -> Vec<PeerRange> {
    let mut ranges: Vec<PeerRange> =
        ranges.into_iter().map(|(network, template)| PeerRange { network: network.value, template }).collect();
    ranges.sort_by_key(|range| std::cmp::Reverse(range.network.prefix_len()));
    ranges
}

/// The peers of the file, each with its place.
#[derive(Default)]
struct Neighbours {
    /// By address.
    peers: BTreeMap<IpAddr, (Peer, Place)>,
    /// By the interface that they are found on.
    links: BTreeMap<String, (Peer, Place)>,
}

/// Who a `[[bgp.peer]]` is.
enum Neighbour {
    At(At<IpAddr>),
    /// Whoever advertises itself as a router on this interface.
    On(At<String>),
}

fn read_peer(section: Section<'_>, asn: Option<u32>, groups: &BTreeMap<&str, Settings>, neighbours: &mut Neighbours) {
    let at = section.place().clone();
    let neighbour = neighbour(&section);
    let group = section.parse("group", "the name of a [bgp.group.NAME]", |name| {
        if groups.contains_key(name) { Ok(name.to_owned()) } else { Err(unknown_group(name, groups)) }
    });
    let group = group.map(|group| group.value);
    let group_known = group.is_some() || !section.has("group");
    let own = Settings::read(&section);
    let settings = match group.as_deref().and_then(|name| groups.get(name)) {
        Some(group) => own.over(group),
        None => own,
    };
    let description = section.parse("description", "a string", |text| Ok(text.to_owned()));
    if settings.remote_asn.is_none() && group_known && !section.has("remote_asn") {
        section.missing("remote_asn", "the peer's AS number, here or in its group");
    }
    if let (Some(neighbour), Some(remote_asn)) = (neighbour, settings.remote_asn) {
        if asn == Some(remote_asn) && settings.ebgp_multihop.is_some() {
            section.fault(&at, "`ebgp_multihop` has no meaning for an iBGP peer (same AS number); remove it".into());
        }
        let description = description.map(|text| text.value).unwrap_or_default();
        match neighbour {
            Neighbour::At(neighbour) => {
                check_family(&section, &neighbour, settings.local_address.as_ref());
                if let Some((_, first)) = neighbours.peers.get(&neighbour.value) {
                    let shown = scope::shown(neighbour.value);
                    section.fault(&neighbour.at, format!("peer {shown} is already configured at {first}"));
                }
                let peer = settings.into_peer(&section, neighbour.value, remote_asn, asn, group, description);
                neighbours.peers.entry(neighbour.value).or_insert((peer, neighbour.at));
            }
            Neighbour::On(interface) => {
                if settings.ebgp_multihop.is_some() {
                    let text =
                        format!("`ebgp_multihop`: who is found on {} is one hop away; remove it", interface.value);
                    section.fault(&at, text);
                }
                if let Some((_, first)) = neighbours.links.get(&interface.value) {
                    let text = format!("the peer on {} is already configured at {first}", interface.value);
                    section.fault(&interface.at, text);
                }
                let address = scope::on(IpAddr::V6(LINK_LOCAL), &interface.value);
                let peer = settings.into_peer(&section, address, remote_asn, asn, group, description);
                neighbours.links.entry(interface.value).or_insert((peer, interface.at));
            }
        }
    }
    section.finish();
}

/// A link-local neighbour needs the interface that it is on; an interface alone is for whoever is found there.
fn neighbour(section: &Section<'_>) -> Option<Neighbour> {
    let address = section.parse("address", "the peer's IP address", peer_address);
    let interface = section.parse("interface", "the name of an interface", |name| {
        let sound =
            (1..16).contains(&name.len()) && !name.contains(|c: char| c == '/' || c == '%' || c.is_whitespace());
        if sound { Ok(name.to_owned()) } else { Err("no interface has such a name".to_owned()) }
    });
    if !section.has("address") {
        if !section.has("interface") {
            section.missing("address", "the peer's IP address, or `interface` for the router that is found there");
        }
        return interface.map(Neighbour::On);
    }
    let At { value, at } = address?;
    let link_local = matches!(value, IpAddr::V6(address) if address.is_unicast_link_local());
    match interface {
        Some(interface) if link_local => {
            return Some(Neighbour::At(At { value: scope::on(value, &interface.value), at }));
        }
        Some(interface) => {
            section
                .fault(&interface.at, format!("`interface` is for link-local peers, and {value} is none; remove it"));
        }
        None if link_local && !section.has("interface") => {
            section.fault(&at, format!("{value} is link-local: `interface` has to say on which link"));
        }
        None => {}
    }
    Some(Neighbour::At(At { value, at }))
}

fn unknown_group(name: &str, groups: &BTreeMap<&str, Settings>) -> String {
    match super::read::nearest(name, groups.keys().copied()) {
        Some(near) => format!("there is no [bgp.group.{name}]; did you mean `{near}`?"),
        None => format!("there is no [bgp.group.{name}]"),
    }
}

fn check_family(section: &Section<'_>, neighbour: &At<IpAddr>, local: Option<&At<IpAddr>>) {
    let Some(local) = local else { return };
    if local.value.is_ipv4() != neighbour.value.is_ipv4() {
        let message = format!("`local_address` {} and peer {} differ in family", local.value, neighbour.value);
        section.fault(&local.at, message);
    } else if local.value == neighbour.value {
        section.fault(&local.at, format!("`local_address` {} is the peer's own address", local.value));
    }
}

/// Keepalive and hold time; each follows from the other where only one is given.
fn agreed_timers(section: &Section<'_>, settings: &Settings) -> (Duration, Duration) {
    let hold = match (&settings.hold, &settings.keepalive) {
        (Some(hold), _) => hold.value,
        (None, Some(keepalive)) if !keepalive.value.is_zero() => {
            (keepalive.value * 3).max(Duration::from_secs(SHORTEST_HOLD)).min(Duration::from_secs(u16::MAX.into()))
        }
        _ => DEFAULT_HOLD,
    };
    let Some(keepalive) = &settings.keepalive else { return (Duration::from_secs(hold.as_secs() / 3), hold) };
    let contradicts = match (hold.is_zero(), keepalive.value.is_zero()) {
        (true, true) => false,
        (false, false) => keepalive.value >= hold,
        _ => true,
    };
    if contradicts {
        let (keepalive_s, hold_s) = (keepalive.value.as_secs(), hold.as_secs());
        let message = format!(
            "keepalive of {keepalive_s} s with a hold time of {hold_s} s would lose the session; expected a keepalive \
             shorter than the hold time, or both 0"
        );
        section.fault(&keepalive.at, message);
    }
    (keepalive.value, hold)
}

/// The configured router id, or the one IPv4 address that every session is spoken from.
fn router_id(section: &Section<'_>, peers: &BTreeMap<IpAddr, (Peer, Place)>) -> Option<Ipv4Addr> {
    const EXPECTED: &str = "an IPv4 address, unique among the speakers, usually this host's own";
    if section.has("router_id") {
        return section
            .parse("router_id", EXPECTED, |text| match text.parse::<Ipv4Addr>() {
                Ok(id) if id.is_unspecified() => Err("zero is not a router id (RFC 6286)".to_owned()),
                Ok(id) => Ok(id),
                Err(_) => Err("not an IPv4 address".to_owned()),
            })
            .map(|id| id.value);
    }
    // Marks the key as known.
    section.get("router_id");
    let mut locals: Vec<Ipv4Addr> = peers
        .values()
        .filter_map(|(peer, _)| match peer.local_address {
            Some(IpAddr::V4(local)) => Some(local),
            _ => None,
        })
        .collect();
    locals.sort();
    locals.dedup();
    match locals.as_slice() {
        [only] => Some(*only),
        _ => {
            section.missing("router_id", EXPECTED);
            None
        }
    }
}
