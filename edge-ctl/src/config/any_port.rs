//! `*` as the port of a listen address or of backends, and what it needs of the rest of the configuration.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use super::{
    raw::{Place, Value},
    read::{At, Section},
    service::Context,
    valid::Bgp,
};
use crate::model::{ANY_PORT, BackendSource, Check, Frontend, Health, Mode, RecordType, Service};

/// What `port` of DNS backends may be.
pub(super) const PORT: &str = "the backends' port, 1 to 65535, or \"*\" for the one that the client asked for";

/// `port` of DNS backends.
pub(super) fn backend_port(source: &Section<'_>) -> Option<u16> {
    match source.get("port").map(|node| (&node.value, &node.at)) {
        Some((Value::String(text), _)) if text == "*" => Some(ANY_PORT),
        Some((Value::String(text), at)) => {
            source.fault(at, format!("`port`: \"{text}\" is refused; expected {PORT}"));
            None
        }
        _ => source.port("port", 1),
    }
}

/// What a service with `*` needs.
pub(super) fn check(
    section: &Section<'_>,
    listen: &[At<Frontend>],
    backends: &BackendSource,
    mode: Mode,
    is_announced: bool,
    health: Option<&Health>,
) {
    let of_backends = section.get("backends").map_or_else(|| section.place(), |node| &node.at);
    if let Some(every) = listen.iter().find(|listen| listen.value.takes_every_port()) {
        if !is_announced {
            let message = format!(
                "`listen`: {} needs a VIP of its own, or ssh and BGP to this host would go to the backends, too; add \
                 `announce`, or list the ports",
                every.value
            );
            section.fault(&every.at, message);
        }
        if matches!(backends, BackendSource::Dns { record: RecordType::Srv, port: None, .. }) {
            let message = format!(
                "`backends`: SRV answers name a port of their own for each backend, and {} has them all; use `record = \"a\"` \
                 with `port = \"*\"`, or list the ports",
                every.value
            );
            section.fault(of_backends, message);
        } else if mode == Mode::Dnat && !backends.keeps_all_ports() {
            let message = format!(
                "`backends`: in dnat mode only the port of a reply tells to which port of {} it belongs; make the backends' \
                 port `*`, or use full-nat",
                every.value
            );
            section.fault(of_backends, message);
        }
    }
    if !backends.keeps_ports() {
        return;
    }
    if let Some(one) = listen.iter().find(|listen| !listen.value.takes_every_port()) {
        let message = format!(
            "`backends`: `*` keeps the port that the client asked for, and {} is one port; name the backends' port, or listen on \
             ADDRESS:*",
            one.value
        );
        section.fault(of_backends, message);
    }
    if health.is_some_and(|health| health.port.is_none() && health.check != Check::None)
        && let Some(node) = section.get("health")
    {
        let message = "`health`: backends with port `*` have none that could be checked; add `port`";
        section.fault(&node.at, message.to_owned());
    }
}

/// Addresses that the daemon itself speaks from or listens on, and for what.
pub(super) fn own_addresses(http: Option<SocketAddr>, bgp: Option<&Bgp>) -> BTreeMap<IpAddr, &'static str> {
    let mut own: BTreeMap<_, _> = http.map(|http| (http.ip(), "`http` of [api]")).into_iter().collect();
    let peers = bgp.into_iter().flat_map(|bgp| bgp.peers.values());
    own.extend(peers.filter_map(|peer| Some((peer.local_address?, "`local_address` of a peer"))));
    own
}

/// What comes to a VIP of every port goes to its backends, answers to this host's own questions included.
pub(super) fn check_own_addresses(
    root: &Section<'_>,
    services: &BTreeMap<String, Service>,
    listen: &BTreeMap<Frontend, (String, Place)>,
    context: &Context<'_>,
) {
    for (frontend, (service, at)) in listen.iter().filter(|(frontend, _)| frontend.takes_every_port()) {
        let vip = frontend.address.ip();
        let source = services.values().find(|other| other.snat.addresses.contains(&vip));
        let source = source.map(|other| format!("`snat` of service `{}`", other.name));
        if let Some(what) = context.own.get(&vip).map(|what| (*what).to_owned()).or(source) {
            let message = format!(
                "[service.{service}]: `listen`: {frontend} would take what is meant for {what}; use an address that is the VIP \
                 alone"
            );
            root.fault(at, message);
        }
    }
}
