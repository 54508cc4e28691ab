//! `[resolver.NAME]` and `[service.NAME]`, with the checks that need more than one of them.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use ipnet::IpNet;

use super::{
    any_port, health,
    lifetimes::lifetimes,
    protect::protection,
    raw::{Place, Value},
    read::{At, Section, nearest},
    selection, values,
};
use crate::model::{
    Announce, BackendSource, Capacity, Frontend, Mode, PathAttributes, RecordType, Resolver, Service, Snat, within,
};

const DNS_PORT: u16 = 53;
/// Service and backend numbers start at 1.
const MOST_FRONTENDS: usize = edge_common::maps::SERVICES as usize - 1;
/// Source ranges, each counted for every listen address of its service.
const MOST_RANGES: usize = edge_common::maps::SOURCE_RANGES as usize;
const BACKENDS: &str = "{ dns = NAME, port = N, resolver = NAME } or { static = [\"ADDRESS:PORT\"], backup = [...] }";

/// Resolvers as configured; a faulty one still has a name that services may refer to.
pub(super) struct Resolvers {
    names: BTreeSet<String>,
    values: BTreeMap<String, Resolver>,
}

impl Resolvers {
    pub fn into_values(self) -> BTreeMap<String, Resolver> {
        self.values
    }
}

pub(super) fn resolvers(root: &Section<'_>) -> Resolvers {
    let mut resolvers = Resolvers { names: BTreeSet::new(), values: BTreeMap::new() };
    for (name, section) in root.named("resolver") {
        if let Err(why) = values::table_name(name) {
            section.fault(section.place(), why);
        }
        resolvers.names.insert(name.to_owned());
        let expected = "ADDRESS or ADDRESS:PORT of a DNS server";
        let servers = section.required_list("servers", expected, "at least one DNS server's address", server);
        let valid = section.parse("valid", "a duration from \"1s\" to \"1d\"", |text| match values::duration(text)? {
            valid if valid < Duration::from_secs(1) => Err("the servers would be asked without a pause".to_owned()),
            valid if valid > Duration::from_secs(86_400) => Err("new pods would not be seen".to_owned()),
            valid => Ok(valid),
        });
        let policy = super::resolver::policy(&section);
        section.finish();
        let servers = servers.into_iter().map(|server| server.value).collect();
        let valid = valid.map(|valid| valid.value);
        let resolver = Resolver { name: name.to_owned(), servers, valid, policy };
        resolvers.values.insert(name.to_owned(), resolver);
    }
    resolvers
}

fn server(text: &str) -> Result<SocketAddr, String> {
    let parsed = text.parse().or_else(|_| text.parse::<IpAddr>().map(|address| SocketAddr::new(address, DNS_PORT)));
    match parsed {
        Ok(server) if server.port() == 0 => Err("port 0 cannot be used".into()),
        Ok(server) if server.ip().is_unspecified() => Err("no packet can be sent there".into()),
        Ok(server) => Ok(server),
        Err(_) => Err("not an IP address (names would need a resolver themselves)".into()),
    }
}

/// What services refer to.
pub(super) struct Context<'a> {
    pub pod_networks: &'a [IpNet],
    pub resolvers: &'a Resolvers,
    pub has_bgp: bool,
    /// Numbers in the table of backends, 0 included.
    pub backends: u32,
    /// Addresses that the daemon itself speaks from or listens on, and for what.
    pub own: BTreeMap<IpAddr, &'static str>,
}

pub(super) fn services(root: &Section<'_>, context: &Context<'_>) -> BTreeMap<String, Service> {
    let mut services = BTreeMap::new();
    let mut taken = BTreeMap::new();
    let (mut backends, mut ranges) = (0, 0);
    for (name, section) in root.named("service") {
        if let Err(why) = values::table_name(name) {
            section.fault(section.place(), why);
        }
        let place = section.place().clone();
        if let Some(service) = service(name, section, context, &mut taken) {
            if let BackendSource::Static(addresses) = &service.backends {
                backends += addresses.len() * service.listen.len();
            }
            ranges += service.protection.source_ranges.ranges.len() * service.listen.len();
            services.insert(name.to_owned(), service);
        }
        if ranges > MOST_RANGES {
            let message = format!("`source_ranges`: more than {MOST_RANGES} in all, counted for each listen address");
            root.fault(&place, message);
            break;
        }
        if taken.len() > MOST_FRONTENDS {
            root.fault(&place, format!("more than {MOST_FRONTENDS} listen addresses"));
            break;
        }
        let most = usize::try_from(context.backends).unwrap_or(usize::MAX).saturating_sub(1);
        if backends > most {
            let help = "`backends` of [edge.tables] makes room for more";
            root.fault(&place, format!("more than {most} backends, counted for each listen address; {help}"));
            break;
        }
    }
    any_port::check_own_addresses(root, &services, &taken, context);
    services
}

fn service(
    name: &str,
    section: Section<'_>,
    context: &Context<'_>,
    taken: &mut BTreeMap<Frontend, (String, Place)>,
) -> Option<Service> {
    section.not_yet(&["arp"]);
    let mode = section.parse("mode", "\"full-nat\" or \"dnat\"", |text| match text {
        "full-nat" => Ok(Mode::FullNat),
        "dnat" => Ok(Mode::Dnat),
        _ => Err(String::new()),
    });
    let mode = mode.map_or(Mode::default(), |mode| mode.value);
    let listen = listen(name, &section, context, taken);
    let protocols: Vec<_> = listen.iter().map(|frontend| frontend.value.protocol).collect();
    let (balance, selection) = selection::selection(&section, &protocols);
    let backends = backends(&section, context);
    let frontends: Vec<_> = listen.iter().map(|frontend| frontend.value).collect();
    if let Some(backends) = &backends {
        one_family(&section, &frontends, backends);
    }
    let snat = snat(&section, mode, context);
    let announce = announce(&section, context);
    let health = health::health(&section, &protocols);
    let on_down = health::on_down(&section, &protocols);
    let lifetimes = lifetimes(&section, &protocols);
    let protection = protection(&section, &frontends);
    if let Some(backends) = &backends {
        any_port::check(&section, &listen, backends, mode, announce.is_some(), health.as_ref());
    }
    section.finish();
    Some(Service {
        name: name.to_owned(),
        listen: frontends,
        backends: backends?,
        mode,
        balance,
        selection,
        snat,
        announce,
        health,
        on_down,
        lifetimes,
        protection,
    })
}

fn listen(
    name: &str,
    section: &Section<'_>,
    context: &Context<'_>,
    taken: &mut BTreeMap<Frontend, (String, Place)>,
) -> Vec<At<Frontend>> {
    const EXPECTED: &str = "ADDRESS:PORT/tcp or ADDRESS:PORT/udp, or `*` as the port";
    let example = "at least one listen address, such as [\"172.16.1.88:8443/tcp\"]";
    let listen = section.required_list("listen", EXPECTED, example, frontend);
    for At { value: frontend, at } in &listen {
        if within(context.pod_networks, frontend.address.ip()) {
            let message = format!("`listen`: {frontend} lies in `pod_networks`; a VIP must not be a pod's address");
            section.fault(at, message);
        }
        if let Some((other, first)) = taken.get(frontend) {
            section.fault(at, format!("`listen`: {frontend} is already taken by service `{other}` at {first}"));
        } else {
            taken.insert(*frontend, (name.to_owned(), at.clone()));
        }
    }
    listen
}

fn frontend(text: &str) -> Result<Frontend, String> {
    let frontend: Frontend = text.parse().map_err(|_| String::new())?;
    match frontend.address.ip() {
        address if !values::is_host(address) => Err("clients cannot send to that address".into()),
        _ => Ok(frontend),
    }
}

/// Nothing translates between IPv4 and IPv6: a listen address without backends of its family would never serve, and
/// backends without a listen address of theirs would get nothing.
fn one_family(section: &Section<'_>, listen: &[Frontend], backends: &BackendSource) {
    let of = |v6: bool| if v6 { "IPv6" } else { "IPv4" };
    let found: BTreeSet<bool> = match backends {
        BackendSource::Dns { record: RecordType::A, .. } => BTreeSet::from([false]),
        BackendSource::Dns { record: RecordType::Aaaa, .. } => BTreeSet::from([true]),
        BackendSource::Dns { record: RecordType::Srv, .. } => return,
        BackendSource::Static(backends) => backends.iter().map(|backend| backend.address.is_ipv6()).collect(),
    };
    if found.is_empty() || listen.is_empty() {
        return;
    }
    if let Some(frontend) = listen.iter().find(|frontend| !found.contains(&frontend.address.is_ipv6())) {
        let record = match backends {
            BackendSource::Dns { .. } if frontend.address.is_ipv6() => " (with `record = \"aaaa\"`)",
            _ => "",
        };
        let family = of(frontend.address.is_ipv6());
        let message = format!(
            "`listen`: {frontend} has no {family} backends; give it a service of its own with such backends{record}"
        );
        section.fault(section.place(), message);
    } else if let Some(v6) =
        found.into_iter().find(|v6| !listen.iter().any(|frontend| frontend.address.is_ipv6() == *v6))
    {
        let message =
            format!("`backends`: the {0} ones get nothing; add an {0} `listen` address or remove them", of(v6));
        section.fault(section.place(), message);
    }
}

fn backends(section: &Section<'_>, context: &Context<'_>) -> Option<BackendSource> {
    let Some(source) = section.table("backends") else {
        if !section.has("backends") {
            section.missing("backends", BACKENDS);
        }
        return None;
    };
    source.not_yet(&["kubernetes"]);
    let read = match (source.has("dns"), source.has("static")) {
        (true, false) => dns(&source, context),
        (false, true) => Some(BackendSource::Static(selection::fixed(&source, context.pod_networks))),
        (true, true) => {
            source.get("dns");
            source.get("static");
            source.fault(source.place(), format!("`dns` and `static` exclude each other; expected {BACKENDS}"));
            return None;
        }
        (false, false) => {
            // Named so that a misspelt one finds its nearest.
            for key in ["dns", "static", "backup", "port", "resolver", "record"] {
                source.get(key);
            }
            if !source.has("kubernetes") {
                source.fault(source.place(), format!("neither `dns` nor `static` is given; expected {BACKENDS}"));
            }
            None
        }
    };
    source.finish();
    read
}

fn dns(source: &Section<'_>, context: &Context<'_>) -> Option<BackendSource> {
    // Read twice: whether a short name will do is for the resolver's search domains to say.
    let searched = source.get("resolver").is_some_and(|node| match &node.value {
        Value::String(name) => {
            context.resolvers.values.get(name).is_some_and(|resolver| !resolver.policy.search.is_empty())
        }
        _ => false,
    });
    let name = if searched {
        source.parse("dns", "a DNS name", values::searched_dns_name)
    } else {
        source.parse("dns", "a fully qualified DNS name", values::dns_name)
    };
    let resolver = source.parse("resolver", "the name of a [resolver.NAME]", |name| {
        let names = &context.resolvers.names;
        match nearest(name, names.iter().map(String::as_str)) {
            _ if names.contains(name) => Ok(name.to_owned()),
            Some(near) => Err(format!("there is no [resolver.{name}]; did you mean `{near}`?")),
            None => Err(format!("there is no [resolver.{name}]")),
        }
    });
    if !source.has("resolver") {
        source.missing("resolver", "the name of a [resolver.NAME]");
    }
    let record = source.parse("record", "\"a\", \"aaaa\" or \"srv\"", |text| match text {
        "a" => Ok(RecordType::A),
        "srv" => Ok(RecordType::Srv),
        "aaaa" => Ok(RecordType::Aaaa),
        _ => Err(String::new()),
    });
    let record_known = record.is_some() || !source.has("record");
    let record = record.map_or(RecordType::default(), |record| record.value);
    let port = any_port::backend_port(source);
    match record {
        RecordType::Srv if source.has("port") => {
            source
                .fault(source.place(), "`port` with `record = \"srv\"`: SRV answers carry the port; remove it".into());
        }
        RecordType::A | RecordType::Aaaa if !source.has("port") && record_known => {
            source.missing("port", any_port::PORT);
        }
        _ => {}
    }
    Some(BackendSource::Dns { name: name?.value, port, resolver: resolver?.value, record })
}

fn snat(section: &Section<'_>, mode: Mode, context: &Context<'_>) -> Snat {
    let Some(snat) = section.table("snat") else { return Snat::default() };
    if mode == Mode::Dnat {
        snat.fault(snat.place(), "a dnat service keeps the client's address; remove `snat` or use full-nat".into());
    }
    let addresses = snat.list("addresses", "an address of this host", |text| match text.parse::<IpAddr>() {
        Ok(address) if !values::is_host(address) => Err("pods cannot answer to that address".to_owned()),
        Ok(address) if within(context.pod_networks, address) => Err("it lies in `pod_networks`".to_owned()),
        Ok(address) => Ok(address),
        Err(_) => Err("not an IP address".to_owned()),
    });
    let addresses: Vec<IpAddr> = addresses.unwrap_or_default().into_iter().map(|address| address.value).collect();
    let most = edge_common::maps::SNAT_ADDRESSES;
    if addresses.len() > most {
        snat.fault(snat.place(), format!("`addresses`: {} of them; at most {most} are used", addresses.len()));
    }
    let ports = snat.parse("ports", values::PORT_RANGE, values::port_range).map(|ports| ports.value);
    snat.finish();
    Snat { addresses, ports }
}

fn announce(section: &Section<'_>, context: &Context<'_>) -> Option<Announce> {
    const EXPECTED: &str = "true, false, or { min_backends, communities, med, local_pref, ... }";
    let node = section.get("announce")?;
    let announce = match &node.value {
        Value::Boolean(false) => return None,
        Value::Boolean(true) => Announce::default(),
        Value::Table(_) => {
            let table = section.table("announce")?;
            let announce = announcement(&table);
            table.finish();
            announce
        }
        _ => {
            section.wrong_kind("announce", node, EXPECTED);
            return None;
        }
    };
    if !context.has_bgp {
        section.fault(&node.at, "`announce` needs BGP; add [bgp] with at least one peer, or remove it".into());
    }
    Some(announce)
}

fn announcement(table: &Section<'_>) -> Announce {
    let count = |key| table.integer(key, 1..=65_535).and_then(|count| usize::try_from(count).ok());
    let communities = table.list("communities", values::COMMUNITY, values::community).unwrap_or_default();
    let min_backends = count("min_backends").unwrap_or(1);
    let keep_backends = count("keep_backends").unwrap_or(min_backends);
    if keep_backends > min_backends {
        let message =
            format!("`keep_backends` {keep_backends} is more than `min_backends` {min_backends}; it would flap");
        table.fault(table.place(), message);
    }
    let length = |key, range| table.integer(key, range).and_then(|length| u8::try_from(length).ok());
    let capacity = table.parse("capacity", "\"med\" or \"prepend\"", |text| match text {
        "med" => Ok(Capacity::Med),
        "prepend" => Ok(Capacity::Prepend),
        _ => Err(String::new()),
    });
    let prepend = table.integer("prepend", 0..=16).and_then(|times| u8::try_from(times).ok());
    Announce {
        min_backends,
        keep_backends,
        after: table.parse("after", values::DURATION, values::duration).map(|after| after.value).unwrap_or_default(),
        aggregate: (length("aggregate", 8..=32), length("aggregate_v6", 16..=128)),
        capacity: capacity.map(|capacity| capacity.value),
        attributes: PathAttributes {
            communities: communities.into_iter().map(|community| community.value).collect(),
            med: table.integer("med", 0..=u32::MAX),
            local_pref: table.integer("local_pref", 0..=u32::MAX),
            prepend: prepend.unwrap_or(0),
        },
    }
}
