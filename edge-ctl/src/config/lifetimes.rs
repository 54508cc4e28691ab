//! `timeouts` and `one_reply` of a service.

use std::ops::RangeInclusive;

use super::{read::Section, values};
use crate::model::{Lifetimes, Protocol};

const DAY: u64 = 86_400;
/// A flow is touched after an eighth of its timeout, and the program's clock is coarse.
const ESTABLISHED: RangeInclusive<u64> = 8..=30 * DAY;
/// Below it a client's repeated SYN would begin anew.
const HALF_OPEN: RangeInclusive<u64> = 2..=600;
const CLOSING: RangeInclusive<u64> = 1..=3600;
const UDP: RangeInclusive<u64> = 8..=DAY;
const UNANSWERED: RangeInclusive<u64> = 1..=600;

pub(super) fn lifetimes(section: &Section<'_>, protocols: &[Protocol]) -> Lifetimes {
    let mut lifetimes = Lifetimes { one_reply: one_reply(section, protocols), ..Lifetimes::default() };
    let Some(table) = section.table("timeouts") else { return lifetimes };
    lifetimes.established = seconds(&table, "established", ESTABLISHED, Protocol::Tcp, protocols);
    lifetimes.half_open = seconds(&table, "half_open", HALF_OPEN, Protocol::Tcp, protocols);
    lifetimes.udp = seconds(&table, "udp", UDP, Protocol::Udp, protocols);
    lifetimes.udp_unanswered = seconds(&table, "udp_unanswered", UNANSWERED, Protocol::Udp, protocols);
    lifetimes.closing = period(&table, "closing", CLOSING);
    if lifetimes.one_reply && lifetimes.udp.is_some() {
        table.fault(
            table.place(),
            "`udp`: with `one_reply` no flow lives on after its answer; remove one of them".into(),
        );
    }
    table.finish();
    lifetimes
}

fn one_reply(section: &Section<'_>, protocols: &[Protocol]) -> bool {
    let one_reply = section.boolean("one_reply").unwrap_or(false);
    if one_reply && !protocols.is_empty() && !protocols.contains(&Protocol::Udp) {
        section.fault(section.place(), "`one_reply` is for UDP, and no listen address is; remove it".into());
    }
    one_reply
}

/// A timeout of one protocol, which the service must have.
fn seconds(
    table: &Section<'_>,
    key: &'static str,
    range: RangeInclusive<u64>,
    protocol: Protocol,
    protocols: &[Protocol],
) -> Option<u32> {
    if table.has(key) && !protocols.is_empty() && !protocols.contains(&protocol) {
        let name = if protocol == Protocol::Tcp { "TCP" } else { "UDP" };
        table.fault(table.place(), format!("`{key}` is for {name}, and no listen address is; remove it"));
    }
    period(table, key, range)
}

/// Whole seconds within the range.
fn period(table: &Section<'_>, key: &'static str, range: RangeInclusive<u64>) -> Option<u32> {
    let expected = format!("whole seconds from \"{}s\" to \"{}s\"", range.start(), range.end());
    let parse = |text: &str| match values::duration(text)? {
        period if period.subsec_millis() != 0 => Err("it is counted in whole seconds".to_owned()),
        period if range.contains(&period.as_secs()) => {
            u32::try_from(period.as_secs()).map_err(|error| error.to_string())
        }
        _ => Err(String::new()),
    };
    table.parse(key, &expected, parse).map(|period| period.value)
}
