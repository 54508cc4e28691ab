//! `import` and `export` of a peer or group: what may be said, term by term; and what else decides about routes.
//!
//! A list is read from the top and the first term that matches decides; what no term matches is refused. A string is a
//! prefix list element that permits; a table may ask for more and may change attributes.

use std::{fmt, net::IpAddr, time::Duration};

use ipnet::IpNet;
use regex::Regex;

use super::{
    raw::{Node, Value},
    read::{Mixed, Section},
    valid::PrefixRule,
    values,
};
use crate::model::Community;

const TERM: &str = "\"PREFIX [ge N] [le M]\", or { prefixes, as_path, communities, action, set }";
const NEXT_HOP: &str = "\"self\", \"unchanged\", or an IP address";
const MAX_PREFIXES: &str = "a number, or { limit, warning, restart }";

/// One term of a policy. Every condition that is given must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Term {
    /// One of these must match the prefix; none given: any prefix does.
    pub prefixes: Vec<PrefixRule>,
    /// The AS path must match.
    pub as_path: Option<AsPathPattern>,
    /// The path must carry all of these.
    pub communities: Vec<Community>,
    /// What it matches is refused.
    pub deny: bool,
    /// What is changed in what it permits.
    pub set: Changes,
}

impl From<PrefixRule> for Term {
    fn from(rule: PrefixRule) -> Self {
        Self { prefixes: vec![rule], ..Self::default() }
    }
}

/// A regular expression over the AS path as shown, numbers with spaces between; `_` stands for a border of a number.
#[derive(Clone, Debug)]
pub struct AsPathPattern {
    text: String,
    regex: Regex,
}

impl AsPathPattern {
    /// Compiles a pattern in the manner of vtysh's `as-path access-list`.
    ///
    /// # Errors
    /// What is wrong with the expression.
    pub fn new(text: &str) -> Result<Self, String> {
        let expression = text.replace('_', r"(?:^|$|[ ,{}()])");
        // Bounded, so that a configuration cannot take the daemon's memory.
        let built = regex::RegexBuilder::new(&expression).size_limit(1 << 20).build();
        let regex = built.map_err(|error| error.to_string().replace('\n', " "))?;
        Ok(Self { text: text.to_owned(), regex })
    }

    /// True where it matches a path as shown: `64512 65001 {65002,65003}`.
    pub fn matches(&self, path: &str) -> bool {
        self.regex.is_match(path)
    }
}

impl fmt::Display for AsPathPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl PartialEq for AsPathPattern {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for AsPathPattern {}

/// Changes of attributes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// LOCAL_PREF.
    pub local_pref: Option<u32>,
    /// MULTI_EXIT_DISC.
    pub med: Option<u32>,
    /// Communities added.
    pub add: Vec<Community>,
    /// Communities removed, before others are added.
    pub remove: Vec<Community>,
    /// How often our AS number is put in front of the path.
    pub prepend: u8,
    /// Next hop.
    pub next_hop: Option<NextHop>,
}

impl Changes {
    /// True where nothing is changed.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// What the next hop becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NextHop {
    /// On export: our address on the session. On import: the peer's.
    Own,
    /// It stays, where it would be ours by default.
    Unchanged,
    /// This address.
    Address(IpAddr),
}

/// `max_prefixes`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MaxPrefixes {
    /// Prefixes received, rejected ones included, that end the session when exceeded.
    pub limit: u32,
    /// Prefixes from which on a warning is given.
    pub warning: u32,
    /// The session may come back after this time; `None`: when an operator or a reload says so.
    pub restart: Option<Duration>,
}

/// What decides about a peer's routes beside `import` and `export`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Intake {
    /// `max_prefixes`.
    pub max_prefixes: Option<MaxPrefixes>,
    /// `add_path`: several paths to one prefix are asked for (RFC 7911, receiving).
    pub add_path: bool,
}

/// What every import is guarded by, whatever the peer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Guard {
    /// Without `import` only these are accepted of an internal peer; `None`: any (speakers without `[edge]`).
    pub pod_networks: Option<Vec<IpNet>>,
    /// Addresses that we serve.
    pub vips: std::collections::BTreeSet<IpAddr>,
}

/// `import` or `export`; `None`: not given.
pub(super) fn terms(section: &Section<'_>, key: &'static str) -> Option<Vec<Term>> {
    let elements = section.mixed(key, TERM)?;
    Some(
        elements
            .into_iter()
            .filter_map(|(at, element)| match element {
                Mixed::Text(text) => match values::prefix_rule(text) {
                    Ok(rule) => Some(Term::from(rule)),
                    Err(why) => {
                        section.fault(
                            &at,
                            format!("`{key}`: \"{text}\" is refused: {why}; expected {}", values::PREFIX_RULE),
                        );
                        None
                    }
                },
                Mixed::Table(table) => Some(term(table)),
            })
            .collect(),
    )
}

fn term(table: Section<'_>) -> Term {
    let prefixes = table.list("prefixes", values::PREFIX_RULE, values::prefix_rule).unwrap_or_default();
    let as_path = table.parse("as_path", "a regular expression such as \"^65001_\"", AsPathPattern::new);
    let communities = table.list("communities", values::COMMUNITY, values::community).unwrap_or_default();
    let action = table.parse("action", "\"permit\" or \"deny\"", |text| match text {
        "permit" => Ok(false),
        "deny" => Ok(true),
        _ => Err(String::new()),
    });
    let deny = action.is_some_and(|action| action.value);
    if table.get("prefixes").is_some_and(|node| matches!(&node.value, Value::Array(list) if list.is_empty())) {
        table
            .fault(table.place(), "`prefixes` is empty and matches nothing; leave it out to match every prefix".into());
    }
    let set = table.table("set").map(changes).unwrap_or_default();
    if deny && !set.is_empty() {
        table.fault(table.place(), "`set` has no meaning with `action = \"deny\"`; remove one of them".into());
    }
    table.finish();
    Term {
        prefixes: prefixes.into_iter().map(|rule| rule.value).collect(),
        as_path: as_path.map(|pattern| pattern.value),
        communities: communities.into_iter().map(|community| community.value).collect(),
        deny,
        set,
    }
}

fn changes(table: Section<'_>) -> Changes {
    let list = |key| {
        let list = table.list(key, values::COMMUNITY, values::community).unwrap_or_default();
        list.into_iter().map(|community| community.value).collect()
    };
    let changes = Changes {
        local_pref: table.integer("local_pref", 0..=u32::MAX),
        med: table.integer("med", 0..=u32::MAX),
        add: list("communities"),
        remove: list("remove_communities"),
        prepend: table.integer("prepend", 1..=16).and_then(|times| u8::try_from(times).ok()).unwrap_or(0),
        next_hop: table
            .parse("next_hop", NEXT_HOP, |text| match text {
                "self" => Ok(NextHop::Own),
                "unchanged" => Ok(NextHop::Unchanged),
                _ => match text.parse::<IpAddr>() {
                    Ok(address) if values::is_host(address) => Ok(NextHop::Address(address)),
                    Ok(_) => Err("no packet can be sent there".to_owned()),
                    Err(_) => Err(String::new()),
                },
            })
            .map(|next_hop| next_hop.value),
    };
    table.finish();
    changes
}

/// `max_prefixes = 1000` or `{ limit = 1000, warning = 75, restart = "5m" }`; the warning is in percent of the limit.
pub(super) fn max_prefixes(section: &Section<'_>) -> Option<MaxPrefixes> {
    let node: &Node = section.get("max_prefixes")?;
    let of = |limit: u32, percent: u32, restart| {
        let warning = u64::from(limit) * u64::from(percent) / 100;
        MaxPrefixes { limit, warning: u32::try_from(warning).unwrap_or(limit), restart }
    };
    match &node.value {
        Value::Integer(_) => Some(of(section.integer("max_prefixes", 1..=u32::MAX)?, 75, None)),
        Value::Table(_) => {
            let table = section.table("max_prefixes")?;
            let limit = table.integer("limit", 1..=u32::MAX);
            if !table.has("limit") {
                table.missing("limit", "the number of prefixes that ends the session when exceeded");
            }
            let warning = table.integer("warning", 1..=100).unwrap_or(75);
            let restart = table.parse("restart", values::DURATION, |text| match values::duration(text)? {
                restart if restart < Duration::from_secs(1) => Err("at least 1 s".to_owned()),
                restart => Ok(restart),
            });
            table.finish();
            Some(of(limit?, warning, restart.map(|restart| restart.value)))
        }
        _ => {
            section.wrong_kind("max_prefixes", node, MAX_PREFIXES);
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_underscore_is_the_border_of_a_number() {
        let pattern = AsPathPattern::new("_65001_").unwrap();
        for path in ["65001", "64512 65001", "65001 64512", "1 65001 2", "1 {65001,2}"] {
            assert!(pattern.matches(path), "{path}");
        }
        for path in ["", "165001", "650011", "1 650 01"] {
            assert!(!pattern.matches(path), "{path}");
        }
        let local = AsPathPattern::new("^$").unwrap();
        assert!(local.matches("") && !local.matches("65001"));
    }

    #[test]
    fn an_expression_that_is_none_is_refused_with_words() {
        assert!(AsPathPattern::new("(65001").unwrap_err().contains("unclosed"));
        assert!(AsPathPattern::new("((.{1000}){1000}){1000}").is_err(), "it would take gigabytes");
    }
}
