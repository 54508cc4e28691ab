//! `health` and `on_down` of a service.

use std::{path::PathBuf, time::Duration};

use super::{raw::Value, read::Section, values};
use crate::model::{Check, Exchange, Health, Http, OnDown, Passive, Protocol, Tls};

const KINDS: &str = "one of tcp, tls, http, https, udp, grpc, such as { tcp = {} }, or `passive` alone";
const SHORTEST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(3600);

/// `health`; `None` where it is not given or faulty. `protocols` are those of the service's listen addresses.
pub(super) fn health(service: &Section<'_>, protocols: &[Protocol]) -> Option<Health> {
    let section = service.table("health")?;
    let check = check(&section);
    let interval = within(&section, "interval", SHORTEST, LONGEST).unwrap_or(Duration::from_secs(5));
    let fast = within(&section, "fast_interval", SHORTEST, LONGEST);
    if fast.is_some_and(|fast| fast > interval) {
        section.fault(
            section.place(),
            "`fast_interval` is longer than `interval`; it is for when a change has begun".into(),
        );
    }
    let timeout = within(&section, "timeout", Duration::from_millis(10), LONGEST);
    let port = section.port("port", 1);
    if port.is_none()
        && protocols.contains(&Protocol::Udp)
        && !matches!(check, Some(Check::Udp(_) | Check::None) | None)
    {
        let message = "a udp service's port speaks no TCP: check it by `udp`, or name the TCP `port` to be checked";
        section.fault(section.place(), message.into());
    }
    let passive = passive(&section);
    if check == Some(Check::None) {
        for key in ["interval", "fast_interval", "jitter", "timeout", "fall", "rise", "port", "mandatory"] {
            if section.has(key) {
                section
                    .fault(section.place(), format!("`{key}` is for checks, of which none is given; expected {KINDS}"));
            }
        }
    }
    let health = Health {
        check: check?,
        interval,
        fast_interval: fast.unwrap_or(interval),
        jitter: percent(&section, "jitter", 100).unwrap_or(10),
        timeout: timeout.unwrap_or(interval.min(Duration::from_secs(2))),
        fall: section.integer("fall", 1..=1000).unwrap_or(3),
        rise: section.integer("rise", 1..=1000).unwrap_or(2),
        port,
        mandatory: section.boolean("mandatory").unwrap_or(false),
        panic: percent(&section, "panic", 100).unwrap_or(0),
        passive,
    };
    section.finish();
    Some(health)
}

fn within(section: &Section<'_>, key: &'static str, shortest: Duration, longest: Duration) -> Option<Duration> {
    let parse = |text: &str| match values::duration(text)? {
        duration if duration < shortest => Err(format!("shorter than {} ms", shortest.as_millis())),
        duration if duration > longest => Err(format!("longer than {} s", longest.as_secs())),
        duration => Ok(duration),
    };
    section.parse(key, values::DURATION, parse).map(|duration| duration.value)
}

fn percent(section: &Section<'_>, key: &'static str, most: u32) -> Option<u8> {
    section.integer(key, 0..=most).and_then(|share| u8::try_from(share).ok())
}

fn check(section: &Section<'_>) -> Option<Check> {
    const KEYS: [&str; 6] = ["tcp", "tls", "http", "https", "udp", "grpc"];
    for key in KEYS {
        section.get(key);
    }
    let given: Vec<&'static str> = KEYS.into_iter().filter(|key| section.has(key)).collect();
    if given.is_empty() && section.has("passive") {
        return Some(Check::None);
    }
    let [kind] = given[..] else {
        let message = match &given[..] {
            [] => format!("no kind of check is given; expected {KINDS}"),
            several => format!("`{}` exclude each other; expected {KINDS}", several.join("` and `")),
        };
        section.fault(section.place(), message);
        return None;
    };
    let table = section.table(kind)?;
    let check = match kind {
        "tcp" => Check::Tcp(exchange(&table, false)),
        "udp" => Check::Udp(exchange(&table, true)),
        "tls" => Check::Tls(tls(&table)),
        "http" => Check::Http(http(&table), None),
        "https" => Check::Http(http(&table), Some(tls(&table))),
        _ => grpc(&table),
    };
    table.finish();
    Some(check)
}

fn exchange(table: &Section<'_>, datagram: bool) -> Exchange {
    let bytes = |key| table.parse(key, "a text", |text| Ok(text.as_bytes().to_vec())).map(|bytes| bytes.value);
    let (send, expect) = (bytes("send"), bytes("expect"));
    if datagram && send.as_ref().is_none_or(Vec::is_empty) {
        table.missing("send", "a text that the backend answers; nothing listens to an empty datagram");
    }
    Exchange { send: send.unwrap_or_default(), expect: expect.unwrap_or_default() }
}

fn tls(table: &Section<'_>) -> Tls {
    let name = table.parse("server_name", "a fully qualified DNS name", values::dns_name);
    let ca = table.parse("ca", "an absolute path of a PEM file", |text| match PathBuf::from(text) {
        path if path.is_absolute() => Ok(path),
        _ => Err("not absolute".to_owned()),
    });
    Tls { server_name: name.map(|name| name.value), ca: ca.map(|ca| ca.value) }
}

fn http(table: &Section<'_>) -> Http {
    let method = table.parse("method", "\"GET\", \"HEAD\", \"OPTIONS\" or \"POST\"", |text| match text {
        "GET" | "HEAD" | "OPTIONS" | "POST" => Ok(text.to_owned()),
        _ => Err(String::new()),
    });
    let printable = |text: &str| text.bytes().all(|byte| byte.is_ascii_graphic());
    let path = table.parse("path", "a path such as \"/healthz\"", |text| match text {
        text if text.starts_with('/') && printable(text) => Ok(text.to_owned()),
        _ => Err(String::new()),
    });
    let host = table.parse("host", "a host name, as in the Host header", |text| match text {
        "" => Err("it is empty".to_owned()),
        text if printable(text) => Ok(text.to_owned()),
        _ => Err(String::new()),
    });
    let status = table.list("status", "\"CODE\" or \"LOWEST-HIGHEST\", 100 to 599", status);
    if matches!(table.get("status").map(|node| &node.value), Some(Value::Array(nodes)) if nodes.is_empty()) {
        table.fault(table.place(), "`status` is empty: no answer would pass".into());
    }
    let body = table.parse("body", "a text that the body must hold", |text| Ok(text.to_owned()));
    if body.is_some() && method.as_ref().is_some_and(|method| method.value == "HEAD") {
        table.fault(table.place(), "`body` with `method = \"HEAD\"`: such an answer has none".into());
    }
    Http {
        method: method.map_or_else(|| "GET".to_owned(), |method| method.value),
        path: path.map_or_else(|| "/".to_owned(), |path| path.value),
        host: host.map(|host| host.value),
        status: status.map_or_else(|| vec![(200, 399)], |status| status.into_iter().map(|range| range.value).collect()),
        body: body.map(|body| body.value),
    }
}

fn status(text: &str) -> Result<(u16, u16), String> {
    let (low, high) = text.split_once('-').unwrap_or((text, text));
    match (low.parse(), high.parse()) {
        (Ok(low), Ok(high)) if (100..=599).contains(&low) && low <= high && high <= 599 => Ok((low, high)),
        _ => Err(String::new()),
    }
}

fn grpc(table: &Section<'_>) -> Check {
    let service = table.parse("service", "a service's name, up to 127 bytes", |text| match text.len() {
        0..=127 => Ok(text.to_owned()),
        _ => Err("it is too long".to_owned()),
    });
    let tls_keys = table.has("server_name") || table.has("ca");
    let encrypted = table.boolean("tls").unwrap_or(tls_keys);
    let settings = tls(table);
    if tls_keys && !encrypted {
        table.fault(table.place(), "`server_name` and `ca` are for TLS, which `tls = false` turns off".into());
    }
    Check::Grpc { service: service.map(|name| name.value).unwrap_or_default(), tls: encrypted.then_some(settings) }
}

fn passive(section: &Section<'_>) -> Option<Passive> {
    let table = section.table("passive")?;
    let eject = within(&table, "eject", Duration::from_secs(1), LONGEST).unwrap_or(Duration::from_secs(30));
    let eject_most = within(&table, "eject_most", Duration::from_secs(1), Duration::from_secs(24 * 3600));
    if eject_most.is_some_and(|most| most < eject) {
        table.fault(table.place(), "`eject_most` is shorter than `eject`, which is the first ejection's length".into());
    }
    let share = |key, least| table.integer(key, least..=100).and_then(|share| u8::try_from(share).ok());
    let passive = Passive {
        failures: table.integer("failures", 1..=1_000_000).unwrap_or(5),
        share: share("share", 1).unwrap_or(50),
        window: within(&table, "window", Duration::from_secs(1), LONGEST).unwrap_or(Duration::from_secs(10)),
        eject,
        eject_most: eject_most.unwrap_or(eject.saturating_mul(10)),
        limit: share("limit", 1).unwrap_or(50),
    };
    table.finish();
    Some(passive)
}

/// `on_down`: what becomes of the flows of a backend that goes down.
pub(super) fn on_down(service: &Section<'_>, protocols: &[Protocol]) -> OnDown {
    let given = service.parse("on_down", "\"keep\", \"reset\" or \"reselect\"", |text| match text {
        "keep" => Ok(OnDown::Keep),
        "reset" => Ok(OnDown::Reset),
        "reselect" => Ok(OnDown::Reselect),
        _ => Err(String::new()),
    });
    let Some(given) = given else { return OnDown::default() };
    if given.value == OnDown::Reselect && !protocols.contains(&Protocol::Udp) {
        let message = "`on_down`: only udp flows can be given another backend, and nothing listens on udp here; \
                       \"reset\" ends tcp connections";
        service.fault(&given.at, message.into());
    }
    given.value
}
