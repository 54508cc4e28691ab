//! `source_ranges`, `limits` and `mss` of a service.

use std::net::IpAddr;

use ipnet::IpNet;

use super::{
    raw::Value,
    read::{At, Section},
    values,
};
use crate::model::{Frontend, Limits, Protection, Protocol, RangeAction, Rate, SourceRanges};

const RANGE: &str = "a prefix or an address, such as \"203.0.113.0/24\"";
const RANGES: &str = "an array of prefixes that may use the service, or { allow = [...], deny = [...] }";
const RATE: &str = "\"N/s\" with N from 1 to 10000000, such as \"100/s\"";
/// Beyond it a token takes less than 100 ns, and whole nanoseconds are too coarse.
const MOST_A_SECOND: u32 = 10_000_000;
/// The size that every host takes (RFC 9293 3.7.1), and the most that IPv4 can carry.
const MSS: std::ops::RangeInclusive<u32> = 536..=65_495;

pub(super) fn protection(section: &Section<'_>, listen: &[Frontend]) -> Protection {
    let source_ranges = source_ranges(section);
    let mss = section.integer("mss", MSS).and_then(|mss| u16::try_from(mss).ok());
    if mss.is_some() && listen.iter().all(|frontend| frontend.protocol != Protocol::Tcp) {
        section.fault(section.place(), "`mss` is for TCP, and no listen address is; remove it".into());
    }
    Protection { source_ranges, limits: limits(section), mss }
}

fn source_ranges(section: &Section<'_>) -> SourceRanges {
    let Some(node) = section.get("source_ranges") else { return SourceRanges::default() };
    let (allow, deny) = match &node.value {
        Value::Array(_) => (section.list("source_ranges", RANGE, range).unwrap_or_default(), Vec::new()),
        Value::Table(_) => {
            let Some(table) = section.table("source_ranges") else { return SourceRanges::default() };
            let lists = ["allow", "deny"].map(|key| table.list(key, RANGE, range).unwrap_or_default());
            table.finish();
            lists.into()
        }
        _ => {
            section.wrong_kind("source_ranges", node, RANGES);
            return SourceRanges::default();
        }
    };
    let is_empty = match &node.value {
        Value::Array(nodes) => nodes.is_empty(),
        Value::Table(table) => table.is_empty(),
        _ => false,
    };
    if is_empty {
        section.fault(&node.at, format!("`source_ranges` is empty; expected {RANGES}, or leave it out"));
    }
    let mut ranges = SourceRanges { refuse_others: !allow.is_empty(), ..SourceRanges::default() };
    for (list, action) in [(allow, RangeAction::Allow), (deny, RangeAction::Deny)] {
        for At { value, at } in list {
            if let Some(before) = ranges.ranges.insert(value, action) {
                let what = if before == action { "stands there twice" } else { "is both allowed and denied" };
                section.fault(&at, format!("`source_ranges`: {value} {what}"));
            }
        }
    }
    ranges
}

/// A prefix without host bits, or an address as the prefix of itself.
///
/// # Errors
/// What is wrong with the text.
pub fn range(text: &str) -> Result<IpNet, String> {
    match text.parse::<IpAddr>() {
        Ok(address) => Ok(IpNet::from(address)),
        Err(_) => values::prefix(text),
    }
}

fn limits(section: &Section<'_>) -> Limits {
    let Some(table) = section.table("limits") else { return Limits::default() };
    let limits = Limits {
        new_flows: rate(&table, "new_flows_per_source", "new_flows_burst"),
        packets: rate(&table, "packets_per_source", "packets_burst"),
        half_open: table.integer("half_open_per_source", 1..=u32::MAX),
    };
    table.finish();
    limits
}

/// A rate and its burst, which is what a second brings unless it is given.
fn rate(table: &Section<'_>, key: &'static str, burst_key: &'static str) -> Option<Rate> {
    let rate = table.parse(key, RATE, |text| {
        let number = text.strip_suffix("/s").ok_or("a rate is a number for each second")?;
        match number.trim().parse::<u32>() {
            Ok(number) if (1..=MOST_A_SECOND).contains(&number) => Ok(number),
            _ => Err(String::new()),
        }
    });
    let burst = table.integer(burst_key, 1..=u32::MAX);
    if burst.is_some() && !table.has(key) {
        table.fault(table.place(), format!("`{burst_key}` without `{key}` limits nothing"));
    }
    let per_second = rate?.value;
    Some(Rate { per_second, burst: burst.unwrap_or(per_second) })
}
