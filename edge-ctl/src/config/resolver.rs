//! Settings of `[resolver.NAME]` that say how far its answers are believed, and where short names are looked for.

use std::time::Duration;

use super::{read::Section, values};
use crate::model::{Follow, RecordType, ResolverPolicy};

/// A pool kept against its source for longer than this is a mistake.
const LONGEST_HOLD: Duration = Duration::from_secs(86_400);
/// As glibc's resolver had it (resolv.conf(5)).
const MOST_DOMAINS: usize = 6;
/// RFC 1035 4.2.
const DNS_PORT: u16 = 53;

pub(super) fn policy(section: &Section<'_>) -> ResolverPolicy {
    let default = ResolverPolicy::default();
    let hold = |key: &'static str, otherwise| {
        let read = section.parse(key, "a duration up to \"1d\"", |text| match values::duration(text)? {
            hold if hold > LONGEST_HOLD => Err("pods that are gone would be kept".to_owned()),
            hold => Ok(hold),
        });
        read.map_or(otherwise, |hold| hold.value)
    };
    let search = section.list("search", "a domain such as \"svc.cluster.local\"", values::dns_label_path);
    let search: Vec<String> = search.unwrap_or_default().into_iter().map(|domain| domain.value).collect();
    if search.len() > MOST_DOMAINS {
        section.fault(section.place(), format!("`search`: {} domains; at most {MOST_DOMAINS} are tried", search.len()));
    }
    let limit = section.integer("shrink_limit", 1..=99);
    ResolverPolicy {
        hold: hold("hold", default.hold),
        shrink_hold: hold("shrink_hold", default.shrink_hold),
        shrink_limit: limit.and_then(|limit| u8::try_from(limit).ok()).unwrap_or(default.shrink_limit),
        search,
        follow: follow(section),
    }
}

/// `follow = { dns = NAME, port = N, record = "a" | "srv" }`.
fn follow(section: &Section<'_>) -> Option<Follow> {
    let source = section.table("follow")?;
    let name = source.parse("dns", "a fully qualified DNS name", values::dns_name);
    if !source.has("dns") {
        source.missing("dns", "the name of the headless service that the servers belong to");
    }
    let record = source.parse("record", "\"a\" or \"srv\"", |text| match text {
        "a" => Ok(RecordType::A),
        "srv" => Ok(RecordType::Srv),
        _ => Err(String::new()),
    });
    let record = record.map_or(RecordType::A, |record| record.value);
    let port = source.port("port", 1);
    if record == RecordType::Srv && source.has("port") {
        source.fault(source.place(), "`port` with `record = \"srv\"`: SRV answers carry the port; remove it".into());
    }
    source.finish();
    let port = port.unwrap_or(DNS_PORT);
    Some(Follow { name: name?.value, record, port })
}
