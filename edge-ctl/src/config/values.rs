//! The small languages of single values: durations, prefixes, prefix rules, port ranges, communities, names. Pure; an
//! error says what is wrong with the text, the caller adds what is accepted.

use std::{net::IpAddr, time::Duration};

use ipnet::IpNet;

use super::valid::PrefixRule;
use crate::model::Community;

pub(super) const DURATION: &str = "a duration such as \"500ms\", \"10s\", \"2h4m\"";
pub(super) const PREFIX: &str = "a prefix such as \"10.1.0.0/16\"";
pub(super) const PREFIX_RULE: &str = "\"PREFIX [ge N] [le M]\", such as \"10.1.0.0/16 le 32\"";
pub(super) const PORT_RANGE: &str = "\"LOWEST-HIGHEST\", such as \"1024-32767\"";
pub(super) const COMMUNITY: &str = "\"N:M\" with both up to 65535, a large one \"N:A:B\", \"rt:N:A\", \"soo:N:A\", or no-export, \
     no-advertise, graceful-shutdown, blackhole";

/// `10s`, `500ms`, `2h4m`: numbers with units, largest first.
pub fn duration(text: &str) -> Result<Duration, String> {
    let mut rest = text;
    let mut total_ms: u64 = 0;
    let mut last_unit = u64::MAX;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or("the unit is missing")?;
        let (number, tail) = rest.split_at(digits);
        let letters = tail.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(letters);
        let unit_ms = match unit {
            "ms" => 1,
            "s" => 1_000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            other => return Err(format!("`{other}` is not a unit (ms, s, m, h, d)")),
        };
        if unit_ms >= last_unit {
            return Err("units go from the largest to the smallest".into());
        }
        last_unit = unit_ms;
        let number: u64 = number.parse().map_err(|_| format!("no number before `{unit}`"))?;
        total_ms = number
            .checked_mul(unit_ms)
            .and_then(|part| total_ms.checked_add(part))
            .ok_or("that is longer than can be counted")?;
        rest = tail;
    }
    if text.is_empty() { Err("it is empty".into()) } else { Ok(Duration::from_millis(total_ms)) }
}

/// A prefix without host bits.
pub(super) fn prefix(text: &str) -> Result<IpNet, String> {
    let network: IpNet = text.parse().map_err(|_| "not a prefix".to_owned())?;
    if network.addr() == network.network() {
        Ok(network)
    } else {
        Err(format!("it has host bits; the prefix is {}", network.trunc()))
    }
}

/// `10.1.0.0/16 ge 24 le 32`; without `ge` and `le` only the prefix itself, as in FRR.
pub(super) fn prefix_rule(text: &str) -> Result<PrefixRule, String> {
    let mut words = text.split_whitespace();
    let prefix = prefix(words.next().ok_or("it is empty")?)?;
    let (mut ge, mut le) = (None, None);
    while let Some(word) = words.next() {
        let slot = match word {
            "ge" => &mut ge,
            "le" => &mut le,
            other => return Err(format!("`{other}` is neither `ge` nor `le`")),
        };
        let length: u8 = words
            .next()
            .and_then(|number| number.parse().ok())
            .ok_or_else(|| format!("no prefix length after `{word}`"))?;
        if slot.replace(length).is_some() {
            return Err(format!("`{word}` stands there twice"));
        }
    }
    let own = prefix.prefix_len();
    let longest = prefix.max_prefix_len();
    let (min_length, max_length) = match (ge, le) {
        (None, None) => (own, own),
        (Some(ge), None) => (ge, longest),
        (None, Some(le)) => (own, le),
        (Some(ge), Some(le)) => (ge, le),
    };
    if own <= min_length && min_length <= max_length && max_length <= longest {
        Ok(PrefixRule { prefix, min_length, max_length })
    } else {
        Err(format!("lengths must hold {own} <= ge <= le <= {longest}"))
    }
}

/// `1024-32767`, both inclusive.
pub(super) fn port_range(text: &str) -> Result<(u16, u16), String> {
    let (low, high) = text.split_once('-').ok_or("not a range")?;
    let parse = |port: &str| port.trim().parse::<u16>().map_err(|_| format!("`{port}` is not a port"));
    match (parse(low)?, parse(high)?) {
        (0, _) => Err("port 0 cannot be used".into()),
        (low, high) if low > high => Err("the lowest port comes first".into()),
        range => Ok(range),
    }
}

/// A community of any kind.
pub(super) fn community(text: &str) -> Result<Community, String> {
    text.parse()
}

/// A fully qualified name; the final dot may be left out.
pub(super) fn dns_name(text: &str) -> Result<String, String> {
    let name = dns_label_path(text)?;
    // No search list is applied, so a short name would be asked as it stands and never be found.
    match name.rsplit_once('.') {
        None => Err("it is not fully qualified".into()),
        Some((_, "svc")) => Err("the cluster domain is missing after `.svc` (often `.svc.cluster.local`)".into()),
        Some(_) => Ok(name),
    }
}

/// A name that search domains are appended to, unless it has a final dot, which is kept.
pub(super) fn searched_dns_name(text: &str) -> Result<String, String> {
    let name = dns_label_path(text)?;
    Ok(if text.ends_with('.') { name + "." } else { name })
}

/// Labels with dots between; the final dot may be left out.
pub(super) fn dns_label_path(text: &str) -> Result<String, String> {
    let name = text.strip_suffix('.').unwrap_or(text);
    if name.len() > 253 {
        return Err("longer than 253 characters".into());
    }
    for label in name.split('.') {
        let plain = label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_');
        if !plain || label.is_empty() || label.len() > 63 || label.starts_with('-') || label.ends_with('-') {
            return Err(format!("`{label}` is not a label"));
        }
    }
    Ok(name.to_ascii_lowercase())
}

/// A name in `[service.NAME]` and the like; it becomes part of paths, metrics labels and map labels.
pub(super) fn table_name(name: &str) -> Result<(), String> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    match name.as_bytes() {
        [first, ..] if first.is_ascii_alphanumeric() && name.len() <= 63 && name.bytes().all(plain) => Ok(()),
        _ => Err(format!("`{name}` is not a name: expected up to 63 letters, digits, `-`, `_`, `.`")),
    }
}

/// True for an address that a packet can be sent to: neither unspecified, loopback, multicast nor broadcast.
pub(super) fn is_host(address: IpAddr) -> bool {
    let special = match address {
        IpAddr::V4(address) => address.is_broadcast() || address.is_link_local(),
        // A link-local one needs a scope, and v4-mapped ones never stand in packets.
        IpAddr::V6(address) => address.is_unicast_link_local() || address.to_ipv4_mapped().is_some(),
    };
    !(special || address.is_unspecified() || address.is_loopback() || address.is_multicast())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_with_their_units() {
        for (text, ms) in [("10s", 10_000), ("500ms", 500), ("2h4m", 7_440_000), ("0s", 0), ("1d", 86_400_000)] {
            assert_eq!(duration(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for text in
            ["", "10", "s", "4m2h", "1s1s", "10 s", "-1s", "1w", "99999999999999999999s", "18446744073709551615s"]
        {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn prefix_rules_follow_the_rules_of_prefix_lists() {
        let rule = |text| prefix_rule(text).map(|rule| (rule.min_length, rule.max_length));
        assert_eq!(rule("10.1.0.0/16"), Ok((16, 16)));
        assert_eq!(rule("10.1.0.0/16 le 32"), Ok((16, 32)));
        assert_eq!(rule("10.1.0.0/16 ge 24"), Ok((24, 32)));
        assert_eq!(rule("10.1.0.0/16 ge 24 le 26"), Ok((24, 26)));
        assert_eq!(rule("2001:db8::/32 le 64"), Ok((32, 64)));
        for text in [
            "",
            "10.1.0.1/16",
            "10.1.0.0/16 le 8",
            "10.1.0.0/16 ge 26 le 24",
            "10.1.0.0/16 le 33",
            "10.1.0.0/16 le",
            "10.1.0.0/16 lt 24",
            "10.1.0.0/16 le 24 le 26",
            "10.1.0.0",
        ] {
            assert!(prefix_rule(text).is_err(), "{text}");
        }
    }

    #[test]
    fn port_ranges_have_two_ends_in_order() {
        assert_eq!(port_range("1024-32767"), Ok((1024, 32767)));
        assert_eq!(port_range("5-5"), Ok((5, 5)));
        for text in ["", "1024", "0-10", "10-9", "1-65536", "a-b"] {
            assert!(port_range(text).is_err(), "{text}");
        }
    }

    #[test]
    fn names_must_be_fully_qualified() {
        assert_eq!(dns_name("Web.prod.svc.cluster.local."), Ok("web.prod.svc.cluster.local".into()));
        assert_eq!(dns_name("_https._tcp.web.example.com"), Ok("_https._tcp.web.example.com".into()));
        for text in ["web", "web.prod.svc", "web..local", "-web.local", "we b.local", "", "."] {
            assert!(dns_name(text).is_err(), "{text}");
        }
    }
}
