//! The keys of a service that decide which backend gets a new flow, and static backends with weight and tier.

use std::{collections::BTreeSet, net::SocketAddr, time::Duration};

use edge_common::maglev;

use super::{
    raw::Place,
    read::{Mixed, Section},
    values,
};
use crate::model::{Balance, Endpoint, Protocol, Selection, StaticBackend, Tier, within};

const BALANCE: &str = "\"maglev\", \"round-robin\" or \"least-conn\"";
const STATIC: &str = "ADDRESS:PORT or { address = \"ADDRESS:PORT\", weight = N }";
const ADDRESS: &str = "ADDRESS:PORT, or ADDRESS:* for the port that the client asked for";

/// `balance`, `affinity`, `max_connections`, `slow_start`, `maglev_size`.
pub(super) fn selection(section: &Section<'_>, protocols: &[Protocol]) -> (Balance, Selection) {
    let balance = section.parse("balance", BALANCE, |text| match text {
        "maglev" => Ok(Balance::Maglev),
        "round-robin" => Ok(Balance::RoundRobin),
        "least-conn" => Ok(Balance::LeastConnections),
        _ => Err(String::new()),
    });
    let balance = balance.map_or(Balance::default(), |balance| balance.value);
    let affinity = section.parse("affinity", "a duration from \"1s\" to \"7d\"", |text| period(text, 7 * 86_400));
    let slow_start = section.parse("slow_start", "a duration from \"1s\" to \"1h\"", |text| period(text, 3600));
    let max_connections = section.integer("max_connections", 1..=crate::model::MOST_CONNECTIONS);
    let sizes = maglev::SIZES.map(|size| size.to_string()).join(", ");
    let maglev_size = section.integer("maglev_size", 1..=maglev::SIZES[maglev::SIZES.len() - 1]);
    if let Some(node) = section.get("maglev_size") {
        if balance == Balance::RoundRobin {
            section.fault(&node.at, "`maglev_size`: a round robin has no Maglev table; remove it".into());
        } else if maglev_size.is_some_and(|size| !maglev::SIZES.contains(&size)) {
            section.fault(&node.at, format!("`maglev_size`: expected one of {sizes}"));
        }
    }
    if max_connections.is_some()
        && protocols.iter().all(|protocol| *protocol == Protocol::Udp)
        && !protocols.is_empty()
        && let Some(node) = section.get("max_connections")
    {
        let why = "a UDP flow has no end that could be seen, only an idle timeout; remove it, or listen on TCP";
        section.fault(&node.at, format!("`max_connections`: {why}"));
    }
    let selection = Selection {
        affinity: affinity.map(|affinity| affinity.value),
        max_connections,
        slow_start: slow_start.map(|slow_start| slow_start.value),
        maglev_size,
    };
    (balance, selection)
}

/// Whole seconds, from one up to `most`.
fn period(text: &str, most: u64) -> Result<Duration, String> {
    match values::duration(text)? {
        period if period.subsec_millis() != 0 => Err("it is counted in whole seconds".to_owned()),
        period if (1..=most).contains(&period.as_secs()) => Ok(period),
        _ => Err(String::new()),
    }
}

/// `static` and `backup` of a service's `backends`.
pub(super) fn fixed(source: &Section<'_>, pod_networks: &[ipnet::IpNet]) -> Vec<StaticBackend> {
    let parse = |text: &str| match text.parse::<Endpoint>() {
        // Without any network the fault is there, not here.
        Ok(Endpoint(address)) if !pod_networks.is_empty() && !within(pod_networks, address.ip()) => {
            let networks: Vec<_> = pod_networks.iter().map(ToString::to_string).collect();
            Err(format!("it lies outside `pod_networks` ({})", networks.join(", ")))
        }
        Ok(Endpoint(address)) => Ok(address),
        Err(why) => Err(why.to_string()),
    };
    let mut seen = BTreeSet::new();
    let mut backends = Vec::new();
    for (key, tier) in [("static", Tier::Primary), ("backup", Tier::Backup)] {
        let elements = source.mixed(key, STATIC);
        if elements.as_ref().is_some_and(Vec::is_empty) {
            source.missing(key, "at least one ADDRESS:PORT");
        }
        for (at, element) in elements.unwrap_or_default() {
            let Some((address, weight)) = element_of(source, key, &at, element, &parse) else { continue };
            if !seen.insert(address) {
                source.fault(&at, format!("`{key}`: {} stands there twice", Endpoint(address)));
            }
            backends.push(StaticBackend { address, weight, tier });
        }
    }
    backends.shrink_to_fit();
    backends
}

fn element_of(
    source: &Section<'_>,
    key: &'static str,
    at: &Place,
    element: Mixed<'_>,
    parse: &impl Fn(&str) -> Result<SocketAddr, String>,
) -> Option<(SocketAddr, u16)> {
    match element {
        Mixed::Text(text) => match parse(text) {
            Ok(address) => Some((address, 1)),
            Err(why) => {
                source.fault(at, format!("`{key}`: \"{text}\" is refused: {why}; expected {ADDRESS}"));
                None
            }
        },
        Mixed::Table(table) => {
            let address = table.parse("address", ADDRESS, parse);
            if !table.has("address") {
                table.missing("address", "ADDRESS:PORT");
            }
            let weight = table.integer("weight", 1..=u32::from(u16::MAX));
            table.finish();
            let weight = weight.and_then(|weight| u16::try_from(weight).ok()).unwrap_or(1);
            address.map(|address| (address.value, weight))
        }
    }
}
