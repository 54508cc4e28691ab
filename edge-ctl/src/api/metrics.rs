//! OpenMetrics, rendered from the same rows that the command line shows, at scrape time: one table of metrics, each with
//! the function that finds its samples.

use std::{collections::BTreeMap, fmt};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet, text},
    metrics::MetricType,
    registry::{Registry, Unit},
};

use super::{Answer, Query, Views};
use crate::model::{
    SnatRow,
    query::ReasonRow,
    view::{
        BackendRow, BfdRow, BgpPeerRow, DnsRow, DnsServerRow, DnsZoneRow, HealthRow, MapRow, RouteRow, ServiceRow,
        StatusRow, XdpRow,
    },
};

/// What HTTP calls the format.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// Before every name.
const PREFIX: &str = "edge";

/// Asks every view and writes what it answered. A view that fails is counted in `edge_scrape_errors` and its metrics are
/// absent, which tells more than a zero.
///
/// # Errors
/// Never in practice: writing to a string fails only where a value cannot be encoded.
pub async fn render(views: &dyn Views) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix(PREFIX);
    registry.register_collector(Box::new(Sampled::take(views).await));
    let mut out = String::new();
    text::encode(&mut out, &registry)?;
    Ok(out)
}

/// The answers of one scrape.
#[derive(Debug, Default)]
struct Sampled {
    status: Option<StatusRow>,
    services: Vec<ServiceRow>,
    backends: Vec<BackendRow>,
    dns: Vec<DnsRow>,
    dns_zones: Vec<DnsZoneRow>,
    peers: Vec<BgpPeerRow>,
    routes: Vec<RouteRow>,
    maps: Vec<MapRow>,
    xdp: Vec<XdpRow>,
    reasons: Vec<ReasonRow>,
    health: Vec<HealthRow>,
    errors: BTreeMap<&'static str, u64>,
}

impl Sampled {
    async fn take(views: &dyn Views) -> Self {
        let mut sampled = Self::default();
        let questions = [
            ("status", Query::Status),
            ("services", Query::Services),
            ("backends", Query::Backends),
            ("dns", Query::Dns),
            ("dns_stats", Query::DnsZones),
            ("bgp_peers", Query::BgpPeers),
            ("routes", Query::Routes),
            ("maps", Query::Maps),
            ("xdp", Query::Xdp),
            ("reasons", Query::Reasons),
            ("health", Query::Health),
        ];
        for (view, query) in questions {
            let answer = views.answer(query).await;
            sampled.errors.insert(view, u64::from(answer.is_err()));
            match answer {
                Ok(Answer::Status(row)) => sampled.status = Some(*row),
                Ok(Answer::Services(rows)) => sampled.services = rows,
                Ok(Answer::Backends(rows)) => sampled.backends = rows,
                Ok(Answer::Dns(rows)) => sampled.dns = rows,
                Ok(Answer::DnsZones(rows)) => sampled.dns_zones = rows,
                Ok(Answer::BgpPeers(rows)) => sampled.peers = rows,
                Ok(Answer::Routes(rows)) => sampled.routes = rows,
                Ok(Answer::Maps(rows)) => sampled.maps = rows,
                Ok(Answer::Xdp(rows)) => sampled.xdp = rows,
                Ok(Answer::Reasons(rows)) => sampled.reasons = rows,
                Ok(Answer::Health(rows)) => sampled.health = rows,
                Ok(_) => *sampled.errors.entry(view).or_default() = 1,
                Err(error) => tracing::debug!(view, %error, "a view could not be scraped"),
            }
        }
        sampled
    }

    fn status<T>(&self, value: impl Fn(&StatusRow) -> T) -> Vec<(Labels, T)> {
        self.status.iter().map(|row| (Vec::new(), value(row))).collect()
    }
}

type Labels = Vec<(&'static str, String)>;
type Samples = Vec<(Labels, u64)>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Counter,
    Gauge,
    Info,
}

struct Metric {
    name: &'static str,
    /// Becomes part of the name; empty: none.
    unit: &'static str,
    kind: Kind,
    help: &'static str,
    samples: fn(&Sampled) -> Samples,
}

const fn counter(name: &'static str, help: &'static str, samples: fn(&Sampled) -> Samples) -> Metric {
    Metric { name, unit: "", kind: Kind::Counter, help, samples }
}

const fn gauge(name: &'static str, help: &'static str, samples: fn(&Sampled) -> Samples) -> Metric {
    Metric { name, unit: "", kind: Kind::Gauge, help, samples }
}

impl Metric {
    const fn seconds(self) -> Self {
        Self { unit: "seconds", ..self }
    }

    const fn microseconds(self) -> Self {
        Self { unit: "microseconds", ..self }
    }

    const fn bytes(self) -> Self {
        Self { unit: "bytes", ..self }
    }
}

/// Name (with unit, without `_total`), kind and help of every metric, in the order in which they are exported.
pub fn catalogue() -> Vec<(String, &'static str, &'static str)> {
    METRICS
        .iter()
        .map(|metric| {
            let unit = if metric.unit.is_empty() { String::new() } else { format!("_{}", metric.unit) };
            let kind = match metric.kind {
                Kind::Counter => "counter",
                Kind::Gauge => "gauge",
                Kind::Info => "info",
            };
            (format!("{PREFIX}_{}{unit}", metric.name), kind, metric.help)
        })
        .collect()
}

static METRICS: &[Metric] = &[
    Metric {
        name: "build",
        unit: "",
        kind: Kind::Info,
        help: "Version of the daemon",
        samples: |s| s.status.iter().map(|row| (vec![("version", row.version.clone())], 1)).collect(),
    },
    gauge("uptime", "Time since the daemon started", |s| s.status(|row| row.uptime)).seconds(),
    gauge("degraded", "1 while something is wrong; `edge-ctl status` says what", |s| {
        s.status(|row| u64::from(row.state != "ok"))
    }),
    gauge("flows", "Established flows", |s| s.status(|row| row.flows)),
    counter("reconcile_writes", "Map writes since the daemon started", |s| s.status(|row| row.map_writes)),
    counter("reconcile_actions", "Actions of the reconciler since the daemon started, by kind", |s| {
        let actions = s.status.iter().flat_map(|row| &row.actions);
        actions.map(|(kind, count)| (vec![("action", kind.clone())], *count)).collect()
    }),
    counter("service_connections", "Flows opened", |s| of_services(s, |row| row.connections)),
    gauge("service_active", "Established flows", |s| of_services(s, |row| row.active)),
    counter("service_attempts", "Flows begun, whatever became of them", |s| of_services(s, |row| row.attempts)),
    gauge("service_affinity", "How long a client stays with its backend; 0: no affinity", |s| {
        of_services(s, |row| row.affinity)
    })
    .seconds(),
    gauge("service_slots", "Slots of the selection table in force", |s| of_services(s, |row| row.slots)),
    counter("service", "Bytes from the IP header on; `in` is from clients", |s| {
        directed(s.services.iter().map(|row| (service_labels(row), row.bytes_in, row.bytes_out)))
    })
    .bytes(),
    counter("service_packets", "Packets; `in` is from clients", |s| {
        directed(s.services.iter().map(|row| (service_labels(row), row.packets_in, row.packets_out)))
    }),
    counter("service_drops", "Packets dropped, by reason", |s| {
        let drops = s.services.iter().flat_map(|row| row.drops.iter().map(move |drop| (row, drop)));
        drops.map(|(row, (reason, count))| (with(service_labels(row), "reason", reason), *count)).collect()
    }),
    gauge("service_announced", "1 while the VIP is announced by BGP", |s| {
        of_services(s, |row| u64::from(row.announced == "yes"))
    }),
    counter("backend_connections", "Flows opened", |s| of_backends(s, |row| row.connections)),
    gauge("backend_active", "Established flows", |s| of_backends(s, |row| row.active)),
    gauge("backend_up", "1 while new flows may go there", |s| of_backends(s, |row| u64::from(row.state == "up"))),
    counter("backend_downtime", "Time in which it could not be used for another reason than an order", |s| {
        of_backends(s, |row| row.downtime)
    })
    .seconds(),
    gauge("backend_drained", "1 where an administrator drains it and no flow is left", |s| {
        of_backends(s, |row| u64::from(row.state == "drained"))
    }),
    counter("health_checks", "Checks made", |s| of_checked(s, |row| row.checks)),
    counter("health_fails", "Checks that failed", |s| of_checked(s, |row| row.fails)),
    counter("health_inconclusive", "Checks that this host could not make", |s| of_checked(s, |row| row.inconclusive)),
    counter("health_unavailable", "Times that checks took it out of use", |s| of_checked(s, |row| row.unavail)),
    counter("health_ejections", "Times that what clients saw took it out of use", |s| {
        of_checked(s, |row| row.ejections)
    }),
    gauge("health_up", "1 while checks do not speak against it", |s| of_checked(s, |row| u64::from(row.state == "up"))),
    gauge("service_panic", "1 while too few backends are healthy and health is ignored", |s| {
        of_services(s, |row| u64::from(row.panic))
    }),
    gauge("backend_weight", "Relative weight", |s| of_backends(s, |row| u64::from(row.w))),
    gauge("backend_limit", "Connections it may have at once; 0: no limit", |s| of_backends(s, |row| row.limit)),
    gauge("backend_share", "Share of its weight while it starts slowly, percent", |s| {
        of_backends(s, |row| u64::from(row.share))
    }),
    gauge("backend_backup", "1 for a backend of the backup tier", |s| {
        of_backends(s, |row| u64::from(row.tier == "backup"))
    }),
    counter("backend", "Bytes from the IP header on; `in` is from clients", |s| {
        directed(s.backends.iter().map(|row| (backend_labels(row), row.bytes_in, row.bytes_out)))
    })
    .bytes(),
    counter("backend_failures", "Connections that failed, by what the program saw", |s| {
        let kinds = |row: &BackendRow| {
            [("unanswered", row.unanswered), ("refused", row.refused), ("reset_early", row.reset_early)]
        };
        let samples = s.backends.iter().flat_map(|row| kinds(row).map(|(kind, count)| (row, kind, count)));
        samples.map(|(row, kind, count)| (with(backend_labels(row), "kind", kind), count)).collect()
    }),
    gauge("backend_connect", "Average time to the SYN-ACK or first datagram", |s| {
        s.backends.iter().filter_map(|row| Some((backend_labels(row), micros(row.connect?)))).collect()
    })
    .microseconds(),
    gauge("backend_first_byte", "Average time to the first byte of payload", |s| {
        s.backends.iter().filter_map(|row| Some((backend_labels(row), micros(row.first_byte?)))).collect()
    })
    .microseconds(),
    gauge("snat_ports_used", "SNAT ports that flows hold, as of the sweep's last walk", |s| of_snat(s, |row| row.used)),
    gauge("snat_ports_allowed", "SNAT ports that may be used", |s| of_snat(s, |row| row.allowed)),
    gauge("snat_alarm", "SNAT ports in use: 0 enough free, 1 from 75 % (warning), 2 from 90 % (critical)", |s| {
        of_snat(s, |row| row.level.number())
    }),
    counter("access_log_lines", "Access log lines, by what became of them", |s| {
        let both = |row: &StatusRow| [("written", row.access_written), ("lost", row.access_lost)];
        let samples = s.status.iter().flat_map(both);
        samples.map(|(result, count)| (vec![("result", result.to_owned())], count)).collect()
    }),
    gauge("midflow_quiet_seconds", "Seconds for which clients of unknown connections are still told nothing", |s| {
        s.status(|row| row.quiet)
    }),
    counter("peer_edges_lost", "Sessions lost with other edges of this group", |s| s.status(|row| row.edges_lost)),
    counter("events_lost", "Records that the events ring buffer had no room for", |s| s.status(|row| row.events_lost)),
    counter("backend_packets", "Packets; `in` is from clients", |s| {
        directed(s.backends.iter().map(|row| (backend_labels(row), row.packets_in, row.packets_out)))
    }),
    counter("reasons", "Packets dropped or given to the stack by the program, by service and reason", |s| {
        let labels = |row: &ReasonRow| {
            vec![("service", row.service.clone()), ("reason", row.reason.clone()), ("action", row.action.clone())]
        };
        s.reasons.iter().map(|row| (labels(row), row.packets)).collect()
    }),
    counter("dns_requests", "Queries asked", |s| of_names(s, |row| row.requests)),
    counter("dns_responses", "Answers, by class", |s| {
        let responses = s.dns.iter().flat_map(|row| row.responses.iter().map(move |class| (row, class)));
        responses.map(|(row, (class, count))| (with(name_labels(row), "class", class), *count)).collect()
    }),
    gauge("dns_addresses", "Addresses in use", |s| of_names(s, |row| row.addresses.len() as u64)),
    gauge("dns_fresh", "1 while the newest answer was good", |s| of_names(s, |row| u64::from(row.state == "fresh"))),
    gauge("dns_answer_age", "Time since the last good answer", |s| {
        s.dns.iter().filter_map(|row| Some((name_labels(row), row.age?))).collect()
    })
    .seconds(),
    counter("dns_pool_changes", "Changes of the addresses in use", |s| of_names(s, |row| row.changes)),
    counter("dns_holds", "Changes that were held", |s| of_names(s, |row| row.holds)),
    gauge("dns_held", "1 while a change is held", |s| of_names(s, |row| u64::from(row.held.is_some()))),
    gauge("dns_held_age", "Time since a change is held", |s| {
        s.dns.iter().filter_map(|row| Some((name_labels(row), row.held_age?))).collect()
    })
    .seconds(),
    gauge("dns_held_addresses", "Addresses in use that the answer left out", |s| {
        of_names(s, |row| row.held_addresses.len() as u64)
    }),
    counter("dns_resolver_requests", "Requests by type, as NGINX Plus counts them: name, srv, addr", |s| {
        of_zones(s, "type", |row| &row.requests)
    }),
    counter("dns_resolver_responses", "Answers by class", |s| of_zones(s, "class", |row| &row.responses)),
    gauge("dns_server_up", "1 while the newest query brought an answer that can be used", |s| {
        of_dns_servers(s, |server| u64::from(server.state == "up"))
    }),
    counter("dns_server_requests", "Queries asked", |s| of_dns_servers(s, |server| server.requests)),
    counter("dns_refused_addresses", "Addresses refused: outside pod_networks, special, or our own", |s| {
        of_names(s, |row| row.refused_addresses)
    }),
    gauge("bgp_peer_up", "1 while the session is established", |s| {
        of_peers(s, |row| u64::from(row.state.eq_ignore_ascii_case("established")))
    }),
    gauge("bgp_peer_prefixes_received", "Prefixes it sends, before policy", |s| of_peers(s, |row| row.pfx_received)),
    gauge("bgp_peer_prefixes_limit", "Prefixes that it may send; absent: any number", |s| {
        let limited = s.peers.iter().filter_map(|row| Some((peer_labels(row), row.max_prefixes?)));
        limited.collect()
    }),
    gauge("bgp_peer_prefixes_accepted", "Prefixes accepted from it", |s| of_peers(s, |row| row.pfx_rcd)),
    gauge("bgp_peer_prefixes_announced", "Prefixes announced to it", |s| of_peers(s, |row| row.pfx_snt)),
    counter("bgp_peer_established", "Times a session was established", |s| of_peers(s, |row| row.established_count)),
    gauge("bgp_peer_prefixes_stale", "Prefixes of it that are stale: it restarts, or tells its table anew", |s| {
        of_peers(s, |row| row.pfx_stale)
    }),
    gauge("bgp_peer_connect_failures", "Attempts in a row that brought no lasting session", |s| {
        of_peers(s, |row| row.failures)
    }),
    gauge("bgp_peer_shutdown", "1 while an administrator has shut it down", |s| {
        of_peers(s, |row| u64::from(row.shutdown.is_some()))
    }),
    gauge("bgp_peer_bfd_up", "1 while BFD reaches it; absent: it is not watched", |s| {
        of_watched(s, |bfd| u64::from(bfd.state == "Up"))
    }),
    counter("bgp_peer_bfd_downs", "Times BFD lost it", |s| of_watched(s, |bfd| bfd.downs)),
    counter("bgp_peer_bfd_packets_sent", "BFD packets sent to it", |s| of_watched(s, |bfd| bfd.sent)),
    counter("bgp_peer_bfd_packets_received", "BFD packets received from it", |s| of_watched(s, |bfd| bfd.received)),
    counter("bgp_peer_messages", "Messages, by type and direction", |s| {
        let messages = s.peers.iter().flat_map(|row| row.messages.iter().map(move |message| (row, message)));
        messages.map(|(row, (kind, count))| (with(peer_labels(row), "message", kind), *count)).collect()
    }),
    gauge("bgp_prefixes", "Prefixes in the Loc-RIB", |s| s.status(|row| row.prefixes)),
    gauge("route_prefixes", "Kernel routes that concern us, by protocol", |s| {
        s.routes.iter().filter(|row| row.installed).map(|row| (vec![("protocol", row.protocol.clone())], 1)).collect()
    }),
    gauge("route_missing", "Prefixes that BGP has and the kernel has not", |s| {
        vec![(Vec::new(), s.routes.iter().filter(|row| !row.installed).count() as u64)]
    }),
    gauge("route_next_hop_objects", "Next-hop objects of ours in the kernel, by kind: gateway or group", |s| {
        let kinds = [("gateway", s.status(|row| row.next_hops)), ("group", s.status(|row| row.next_hop_groups))];
        let samples =
            kinds.into_iter().flat_map(|(kind, samples)| samples.into_iter().map(move |sample| (kind, sample)));
        samples.map(|(kind, (_, count))| (vec![("kind", kind.to_owned())], count)).collect()
    }),
    gauge(
        "map_entries",
        "Entries in use, where they can be counted; of the flow tables as of the sweep's last walk",
        |s| s.maps.iter().filter_map(|row| Some((map_labels(row), row.entries?))).collect(),
    ),
    gauge("map_max_entries", "Capacity", |s| of_maps(s, |row| u64::from(row.max_entries))),
    gauge("map_memory", "Kernel memory", |s| of_maps(s, |row| row.memory)).bytes(),
    counter("flow_cache_hits", "Packets of established flows that the flow cache served", |s| {
        cached(s, |row| row.hits)
    }),
    counter("flow_cache_misses", "Packets of established flows that asked the flow tables", |s| {
        cached(s, |row| row.misses)
    }),
    counter("flow_cache_displaced", "Slots of the flow cache given to another flow", |s| {
        cached(s, |row| row.displaced)
    }),
    gauge("xdp_attached", "1 while the program is attached", |s| {
        let labels = |row: &XdpRow| vec![("interface", row.interface.clone()), ("hook", row.hook.clone())];
        let attached = |row: &XdpRow| u64::from(row.state == "attached" || row.state == "adopted");
        s.xdp.iter().map(|row| (labels(row), attached(row))).collect()
    }),
    gauge("scrape_errors", "1 where a view could not be read for this scrape", |s| {
        s.errors.iter().map(|(view, failed)| (vec![("view", (*view).to_owned())], *failed)).collect()
    }),
];

fn cached(sampled: &Sampled, of: fn(&MapRow) -> Option<u64>) -> Samples {
    sampled.maps.iter().filter_map(|row| Some((Vec::new(), of(row)?))).collect()
}

fn micros(milliseconds: f64) -> u64 {
    (milliseconds * 1000.0).round() as u64
}

fn with(mut labels: Labels, name: &'static str, value: &str) -> Labels {
    labels.push((name, value.to_owned()));
    labels
}

fn directed(rows: impl Iterator<Item = (Labels, u64, u64)>) -> Samples {
    rows.flat_map(|(labels, inwards, outwards)| {
        [(with(labels.clone(), "direction", "in"), inwards), (with(labels, "direction", "out"), outwards)]
    })
    .collect()
}

fn service_labels(row: &ServiceRow) -> Labels {
    vec![("service", row.name.clone()), ("vip", row.vip.clone()), ("proto", row.proto.clone())]
}

fn of_services(s: &Sampled, value: fn(&ServiceRow) -> u64) -> Samples {
    s.services.iter().map(|row| (service_labels(row), value(row))).collect()
}

fn backend_labels(row: &BackendRow) -> Labels {
    vec![
        ("service", row.service.clone()),
        ("vip", row.vip.clone()),
        ("proto", row.proto.clone()),
        ("backend", row.backend.clone()),
        ("node", row.node.clone()),
    ]
}

fn of_backends(s: &Sampled, value: fn(&BackendRow) -> u64) -> Samples {
    s.backends.iter().map(|row| (backend_labels(row), value(row))).collect()
}

fn of_snat(s: &Sampled, value: fn(&SnatRow) -> u64) -> Samples {
    let rows = s.backends.iter().flat_map(|row| row.snat.iter().map(move |snat| (row, snat)));
    rows.map(|(row, snat)| (with(backend_labels(row), "address", &snat.address), value(snat))).collect()
}

fn of_checked(s: &Sampled, value: fn(&HealthRow) -> u64) -> Samples {
    let labels = |row: &HealthRow| vec![("service", row.service.clone()), ("backend", row.backend.clone())];
    s.health.iter().map(|row| (labels(row), value(row))).collect()
}

fn name_labels(row: &DnsRow) -> Labels {
    vec![("name", row.name.clone()), ("type", row.kind.clone()), ("resolver", row.resolver.clone())]
}

fn of_names(s: &Sampled, value: fn(&DnsRow) -> u64) -> Samples {
    s.dns.iter().map(|row| (name_labels(row), value(row))).collect()
}

fn of_zones(s: &Sampled, label: &'static str, counts: fn(&DnsZoneRow) -> &BTreeMap<String, u64>) -> Samples {
    let all = s.dns_zones.iter().flat_map(|row| counts(row).iter().map(move |count| (row, count)));
    all.map(|(row, (kind, count))| (with(vec![("resolver", row.resolver.clone())], label, kind), *count)).collect()
}

fn of_dns_servers(s: &Sampled, value: fn(&DnsServerRow) -> u64) -> Samples {
    let all = s.dns_zones.iter().flat_map(|row| row.servers.iter().map(move |server| (row, server)));
    let labels = |row: &DnsZoneRow, server: &DnsServerRow| {
        vec![("resolver", row.resolver.clone()), ("server", server.server.clone())]
    };
    all.map(|(row, server)| (labels(row, server), value(server))).collect()
}

fn peer_labels(row: &BgpPeerRow) -> Labels {
    vec![("peer", row.neighbor.clone()), ("asn", row.asn.to_string()), ("description", row.desc.clone())]
}

fn of_peers(s: &Sampled, value: fn(&BgpPeerRow) -> u64) -> Samples {
    s.peers.iter().map(|row| (peer_labels(row), value(row))).collect()
}

fn of_watched(s: &Sampled, value: fn(&BfdRow) -> u64) -> Samples {
    s.peers.iter().filter_map(|row| Some((peer_labels(row), value(row.bfd.as_ref()?)))).collect()
}

fn map_labels(row: &MapRow) -> Labels {
    vec![("map", row.name.clone())]
}

fn of_maps(s: &Sampled, value: fn(&MapRow) -> u64) -> Samples {
    s.maps.iter().map(|row| (map_labels(row), value(row))).collect()
}

impl Collector for Sampled {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        for metric in METRICS {
            // The same labels twice would be refused by whoever scrapes: rows that differ only in what is no label add up.
            let mut samples: BTreeMap<Labels, u64> = BTreeMap::new();
            for (labels, value) in (metric.samples)(self) {
                let sum = samples.entry(labels).or_default();
                *sum = sum.saturating_add(value);
            }
            if samples.is_empty() {
                continue;
            }
            let metric_type = match metric.kind {
                Kind::Counter => MetricType::Counter,
                Kind::Gauge => MetricType::Gauge,
                Kind::Info => MetricType::Info,
            };
            let unit = Some(Unit::Other(metric.unit.to_owned())).filter(|_| !metric.unit.is_empty());
            let mut family = encoder.encode_descriptor(metric.name, metric.help, unit.as_ref(), metric_type)?;
            for (labels, value) in samples {
                sample(&mut family, metric.kind, &labels, value)?;
            }
        }
        Ok(())
    }
}

fn sample(family: &mut MetricEncoder<'_>, kind: Kind, labels: &Labels, value: u64) -> Result<(), fmt::Error> {
    if kind == Kind::Info {
        return family.encode_info(labels);
    }
    if labels.is_empty() {
        return number(family, kind, value);
    }
    number(&mut family.encode_family(labels)?, kind, value)
}

fn number(encoder: &mut MetricEncoder<'_>, kind: Kind, value: u64) -> Result<(), fmt::Error> {
    match kind {
        Kind::Counter => encoder.encode_counter::<NoLabelSet, _, u64>(&value, None),
        Kind::Gauge | Kind::Info => encoder.encode_gauge(&value),
    }
}
