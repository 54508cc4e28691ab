//! Keys of a peer or group that say how its session is spoken: password, hops, capabilities, graceful restart.

use std::{path::PathBuf, time::Duration};

use super::{
    raw::Value,
    read::{At, Section},
    values,
};
use crate::model::bgp_session::{Bfd, GracefulRestart, PasswordSource, Role, SessionSettings};

/// The restart time has twelve bits (RFC 4724 3).
const LONGEST_RESTART: u64 = 4095;
/// The long-lived stale time has 24 bits (RFC 9494 3); a day is what anybody should trust.
const LONGEST_STALE: u64 = 86_400;

/// Faster than this userspace cannot promise.
const SHORTEST_BFD: Duration = Duration::from_millis(10);
const LONGEST_BFD: Duration = Duration::from_secs(60);

/// As read; `None`: not said there.
#[derive(Clone, Debug, Default)]
pub(super) struct RawSession {
    password: Option<At<PasswordSource>>,
    ttl_security: Option<At<u8>>,
    send_hold: Option<Duration>,
    connect_retry: Option<Duration>,
    families: Option<(bool, bool)>,
    role: Option<Role>,
    role_strict: Option<bool>,
    extended_next_hop: Option<bool>,
    graceful_restart: Option<Option<GracefulRestart>>,
    bfd: Option<Option<RawBfd>>,
}

/// `bfd` as read; whether it is multihop may follow from the peer.
#[derive(Clone, Debug)]
struct RawBfd {
    interval: Duration,
    multiplier: u8,
    multihop: Option<At<bool>>,
}

impl RawSession {
    /// All keys but those of `timers`, which has its own table.
    pub fn read(section: &Section<'_>) -> Self {
        Self {
            password: password(section),
            ttl_security: ttl_security(section),
            send_hold: None,
            connect_retry: None,
            families: families(section),
            role: section
                .parse("role", "\"provider\", \"customer\", \"peer\", \"rs-server\" or \"rs-client\"", role)
                .map(|role| role.value),
            role_strict: section.boolean("role_strict"),
            extended_next_hop: section.boolean("extended_next_hop"),
            graceful_restart: graceful_restart(section),
            bfd: bfd(section),
        }
    }

    /// The keys of `timers` that belong here.
    pub fn read_timers(&mut self, timers: &Section<'_>) {
        let between = |shortest: u64, longest: u64| {
            move |text: &str| match values::duration(text)? {
                time if (shortest..=longest).contains(&time.as_secs()) => Ok(time),
                _ => Err(format!("{shortest} s to {longest} s")),
            }
        };
        let retry = timers.parse("connect_retry", values::DURATION, between(1, 3600));
        self.connect_retry = retry.map(|time| time.value);
        let send_hold = timers.parse("send_hold", values::DURATION, between(3, 65_535));
        self.send_hold = send_hold.map(|time| time.value);
    }

    /// These settings, and the group's where these say nothing.
    pub fn over(self, group: Self) -> Self {
        Self {
            password: self.password.or(group.password),
            ttl_security: self.ttl_security.or(group.ttl_security),
            send_hold: self.send_hold.or(group.send_hold),
            connect_retry: self.connect_retry.or(group.connect_retry),
            families: self.families.or(group.families),
            role: self.role.or(group.role),
            role_strict: self.role_strict.or(group.role_strict),
            extended_next_hop: self.extended_next_hop.or(group.extended_next_hop),
            graceful_restart: self.graceful_restart.or(group.graceful_restart),
            bfd: self.bfd.or(group.bfd),
        }
    }

    /// Checks what depends on the kind of session, and fills in defaults.
    pub fn settle(self, section: &Section<'_>, internal: bool, multihop: bool, link_local: bool) -> SessionSettings {
        let at = section.place();
        if let Some(hops) = self.ttl_security.as_ref().filter(|_| multihop) {
            let message = "`ttl_security` and `ebgp_multihop` contradict each other (RFC 5082); \
                           `ttl_security = HOPS` alone allows HOPS hops";
            section.fault(&hops.at, message.to_owned());
        }
        if internal && self.role.is_some() {
            section.fault(at, "`role` is for eBGP (RFC 9234 4); remove it from this iBGP peer".to_owned());
        }
        if self.role.is_none() && self.role_strict == Some(true) {
            section.fault(at, "`role_strict` needs `role`: which one do we have?".to_owned());
        }
        let bfd = self.bfd.flatten().map(|bfd| settle_bfd(section, &bfd, multihop));
        let defaults = SessionSettings::default();
        let (ipv4, ipv6) = self.families.unwrap_or((true, true));
        SessionSettings {
            password: self.password.map(|password| password.value),
            ttl_security: self.ttl_security.map(|hops| hops.value),
            send_hold: self.send_hold,
            connect_retry: self.connect_retry.unwrap_or(defaults.connect_retry),
            ipv4,
            ipv6,
            role: self.role,
            role_strict: self.role_strict.unwrap_or(false),
            // Without it a link-local peer could speak of no IPv4 route.
            extended_next_hop: self.extended_next_hop.unwrap_or(link_local),
            graceful_restart: self.graceful_restart.unwrap_or(defaults.graceful_restart),
            bfd,
        }
    }
}

/// Of the three keys only one may be given. The password itself may not stand in the file, which many may read.
fn password(section: &Section<'_>) -> Option<At<PasswordSource>> {
    // It is no key: only where it stands there it is looked at.
    if section.has("password")
        && let Some(node) = section.get("password")
    {
        let message = "a password does not belong into the configuration; use `password_file`, \
                       `password_credential` or `password_env`";
        section.fault(&node.at, message.to_owned());
    }
    let file = section.parse("password_file", "an absolute path", |text| match PathBuf::from(text) {
        path if path.is_absolute() => Ok(PasswordSource::File(path)),
        _ => Err("not absolute".to_owned()),
    });
    let credential = section.parse("password_credential", "the name of a systemd credential", |text| {
        let plain = !text.is_empty() && !text.contains('/') && text != "." && text != "..";
        if plain { Ok(PasswordSource::Credential(text.to_owned())) } else { Err("not a credential's name".to_owned()) }
    });
    let environment = section.parse("password_env", "the name of an environment variable", |text| {
        let plain = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
        if plain { Ok(PasswordSource::Environment(text.to_owned())) } else { Err("not a variable's name".to_owned()) }
    });
    let mut given = [file, credential, environment].into_iter().flatten();
    let first = given.next();
    if let Some(second) = given.next() {
        section
            .fault(&second.at, format!("the password is already said to come from another place ({})", second.value));
    }
    first
}

/// `true`: a neighbour on the wire; a number: so many hops away.
fn ttl_security(section: &Section<'_>) -> Option<At<u8>> {
    let node = section.get("ttl_security")?;
    match &node.value {
        Value::Boolean(true) => Some(At { value: 1, at: node.at.clone() }),
        Value::Boolean(false) => None,
        Value::Integer(hops) => match u8::try_from(*hops) {
            Ok(hops @ 1..=254) => Some(At { value: hops, at: node.at.clone() }),
            _ => {
                section.fault(&node.at, format!("`ttl_security`: {hops} is refused; expected 1 to 254 hops, or true"));
                None
            }
        },
        _ => {
            section.wrong_kind("ttl_security", node, "true, or the number of hops that the peer is away");
            None
        }
    }
}

fn families(section: &Section<'_>) -> Option<(bool, bool)> {
    let list = section.list("families", "\"ipv4\" or \"ipv6\"", |text| match text {
        "ipv4" => Ok(false),
        "ipv6" => Ok(true),
        _ => Err(String::new()),
    })?;
    let node = section.get("families")?;
    if matches!(&node.value, Value::Array(nodes) if nodes.is_empty()) {
        section.fault(&node.at, "`families` is empty: a session without a family carries nothing".to_owned());
    }
    Some((list.iter().any(|family| !family.value), list.iter().any(|family| family.value)))
}

fn role(text: &str) -> Result<Role, String> {
    Role::ALL.into_iter().find(|role| role.as_str() == text).ok_or_else(|| "not a role of RFC 9234".to_owned())
}

/// `false`, or a table.
fn graceful_restart(section: &Section<'_>) -> Option<Option<GracefulRestart>> {
    let node = section.get("graceful_restart")?;
    match &node.value {
        Value::Boolean(false) => return Some(None),
        Value::Boolean(true) => return Some(Some(GracefulRestart::default())),
        Value::Table(_) => {}
        _ => {
            section.wrong_kind("graceful_restart", node, "a table such as { time = \"120s\" }, or false");
            return None;
        }
    }
    let table = section.table("graceful_restart")?;
    let defaults = GracefulRestart::default();
    let seconds = |key: &'static str, longest: u64, default: Duration| {
        let time = table.parse(key, values::DURATION, |text| match values::duration(text)? {
            time if time.subsec_millis() != 0 => Err("BGP counts whole seconds".to_owned()),
            time if time.as_secs() > longest => Err(format!("at most {longest} s")),
            time => Ok(time),
        });
        time.map_or(default, |time| time.value)
    };
    let settings = GracefulRestart {
        time: seconds("time", LONGEST_RESTART, defaults.time),
        stale: seconds("stale", LONGEST_STALE, defaults.stale),
        long_lived: seconds("long_lived", LONGEST_STALE, defaults.long_lived),
        notification: table.boolean("notification").unwrap_or(defaults.notification),
    };
    table.finish();
    Some(Some(settings))
}

/// `true`, `false`, or a table.
fn bfd(section: &Section<'_>) -> Option<Option<RawBfd>> {
    let node = section.get("bfd")?;
    let defaults = RawBfd { interval: Bfd::INTERVAL, multiplier: Bfd::MULTIPLIER, multihop: None };
    match &node.value {
        Value::Boolean(false) => return Some(None),
        Value::Boolean(true) => return Some(Some(defaults)),
        Value::Table(_) => {}
        _ => {
            section.wrong_kind("bfd", node, "a table such as { interval = \"50ms\", multiplier = 3 }, true, or false");
            return None;
        }
    }
    let table = section.table("bfd")?;
    let interval = table.parse("interval", "\"10ms\" to \"60s\"", |text| match values::duration(text)? {
        time if SHORTEST_BFD <= time && time <= LONGEST_BFD => Ok(time),
        _ => Err("10 ms to 60 s".to_owned()),
    });
    let multiplier = table.integer("multiplier", 1..=255).and_then(|times| u8::try_from(times).ok());
    let multihop = table.get("multihop").map(|node| node.at.clone());
    let multihop = table.boolean("multihop").zip(multihop).map(|(value, at)| At { value, at });
    table.finish();
    Some(Some(RawBfd {
        interval: interval.map_or(defaults.interval, |interval| interval.value),
        multiplier: multiplier.unwrap_or(defaults.multiplier),
        multihop,
    }))
}

fn settle_bfd(section: &Section<'_>, bfd: &RawBfd, multihop: bool) -> Bfd {
    if let Some(said) = bfd.multihop.as_ref().filter(|said| multihop && !said.value) {
        let message = "`bfd.multihop = false` contradicts `ebgp_multihop`: a peer that is routers away is watched by \
                       multihop BFD (RFC 5883)";
        section.fault(&said.at, message.to_owned());
    }
    let said = bfd.multihop.as_ref().map(|said| said.value);
    Bfd { interval: bfd.interval, multiplier: bfd.multiplier, multihop: said.unwrap_or(multihop) }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::{parse, valid::Config};

    const BASE: &str = "[edge]\ninterfaces = [\"ens33\"]\npod_networks = [\"10.1.0.0/16\"]\n[bgp]\nasn = 64512\n\
                        router_id = \"172.16.1.88\"\n[bgp.group.tor]\nremote_asn = 65001\n";
    const PEER: &str = "[[bgp.peer]]\naddress = \"172.16.1.1\"\ngroup = \"tor\"\n";

    fn read(group: &str, peer: &str) -> Result<Config, Vec<String>> {
        let text = format!("{BASE}{group}\n{PEER}{peer}\n");
        parse(&text, Path::new("edge.toml")).map_err(|error| error.lines())
    }

    fn session(group: &str, peer: &str) -> SessionSettings {
        let bgp = read(group, peer).unwrap().bgp.unwrap();
        bgp.peers.into_values().next().unwrap().session
    }

    #[test]
    fn a_session_without_settings_restarts_gracefully_and_signs_nothing() {
        assert_eq!(session("", ""), SessionSettings::default());
        assert_eq!(SessionSettings::default().graceful_restart, Some(GracefulRestart::default()));
    }

    #[test]
    fn a_peers_settings_win_over_its_groups_key_by_key() {
        let group = "password_file = \"/etc/edge/tor\"\nttl_security = true\nrole = \"customer\"\n\
                     graceful_restart = false\ntimers = { connect_retry = \"5s\", send_hold = \"60s\" }";
        let both = session(group, "password_env = \"TOR\"\nfamilies = [\"ipv6\"]\nrole_strict = true");
        assert_eq!(both.password, Some(PasswordSource::Environment("TOR".to_owned())));
        assert_eq!((both.ttl_security, both.role, both.role_strict), (Some(1), Some(Role::Customer), true));
        assert_eq!((both.ipv4, both.ipv6, both.graceful_restart), (false, true, None));
        assert_eq!((both.connect_retry, both.send_hold), (Duration::from_secs(5), Some(Duration::from_secs(60))));
        let again = session(group, "graceful_restart = { time = \"30s\", long_lived = \"1h\", notification = true }");
        let graceful = again.graceful_restart.unwrap();
        assert_eq!((graceful.time, graceful.long_lived), (Duration::from_secs(30), Duration::from_secs(3600)));
        assert!(graceful.notification);
    }

    #[test]
    fn bfd_is_off_unless_asked_for_and_multihop_where_the_session_is() {
        assert_eq!(session("", "").bfd, None);
        let simple = Bfd { interval: Bfd::INTERVAL, multiplier: Bfd::MULTIPLIER, multihop: false };
        assert_eq!(session("bfd = true", "").bfd, Some(simple));
        assert_eq!(session("bfd = true", "bfd = false").bfd, None);
        let fast = Bfd { interval: Duration::from_millis(50), multiplier: 5, multihop: true };
        let said = "bfd = { interval = \"50ms\", multiplier = 5 }";
        assert_eq!(session(said, "ebgp_multihop = 3").bfd, Some(fast));
        assert_eq!(session(said, "").bfd, Some(Bfd { multihop: false, ..fast }));
        assert_eq!(session("", "bfd = { multihop = true }").bfd, Some(Bfd { multihop: true, ..simple }));
    }

    #[test]
    fn a_listen_range_makes_passive_peers_of_the_groups_kind_and_the_most_specific_comes_first() {
        let bgp = read("listen_range = [\"172.16.0.0/16\", \"172.16.2.0/24\"]", "").unwrap().bgp.unwrap();
        let networks: Vec<String> = bgp.ranges.iter().map(|range| range.network.to_string()).collect();
        assert_eq!(networks, ["172.16.2.0/24", "172.16.0.0/16"]);
        let template = &bgp.ranges[0].template;
        assert_eq!((template.passive, template.remote_asn, template.group.as_deref()), (true, 65001, Some("tor")));
    }

    #[test]
    fn an_interface_without_an_address_is_for_whoever_is_found_there() {
        let bgp = read("", "[[bgp.peer]]\ninterface = \"eth0\"\ngroup = \"tor\"\ndescription = \"leaf\"")
            .unwrap()
            .bgp
            .unwrap();
        assert_eq!((bgp.peers.len(), bgp.links.len()), (1, 1));
        let link = &bgp.links["eth0"];
        assert_eq!((link.remote_asn, link.description.as_str(), link.passive), (65001, "leaf", false));
        assert!(link.session.extended_next_hop, "it could speak of no IPv4 route else");
        for (more, why) in [
            ("[[bgp.peer]]\ngroup = \"tor\"", "`interface` for the router that is found there"),
            ("[[bgp.peer]]\ninterface = \"a/b\"\ngroup = \"tor\"", "no interface has such a name"),
            ("[[bgp.peer]]\ninterface = \"eth0\"", "remote_asn"),
            ("[[bgp.peer]]\ninterface = \"eth0\"\ngroup = \"tor\"\nebgp_multihop = 2", "one hop away"),
            ("[[bgp.peer]]\ninterface = \"eth0\"\ngroup = \"tor\"\nlocal_address = \"10.0.0.1\"", "remove it"),
            (
                "[[bgp.peer]]\ninterface = \"eth0\"\ngroup = \"tor\"\n[[bgp.peer]]\ninterface = \"eth0\"\ngroup = \"tor\"",
                "the peer on eth0 is already configured at edge.toml:14",
            ),
        ] {
            let faults = read("", more).expect_err(more);
            assert!(faults.len() == 1 && faults[0].contains(why), "{more}: {faults:#?}");
        }
    }

    #[test]
    fn what_cannot_be_meant_is_refused_with_its_line() {
        for (peer, line, why) in [
            ("password = \"x\"", 13, "does not belong into the configuration"),
            ("password_file = \"md5\"", 13, "not absolute"),
            ("password_credential = \"../x\"", 13, "not a credential's name"),
            ("password_file = \"/a\"\npassword_env = \"B\"", 14, "already said to come from another place"),
            ("ttl_security = 255", 13, "1 to 254 hops"),
            ("ttl_security = 1\nebgp_multihop = 2", 13, "contradict each other"),
            ("role = \"uplink\"", 13, "not a role"),
            ("role_strict = true", 10, "needs `role`"),
            ("families = [\"ipv5\"]", 13, "families"),
            ("families = []", 13, "carries nothing"),
            ("graceful_restart = { time = \"2h\" }", 13, "at most 4095 s"),
            ("graceful_restart = { tme = \"2s\" }", 13, "did you mean `time`?"),
            ("graceful_restart = 120", 13, "a table such as"),
            ("bfd = 50", 13, "a table such as"),
            ("bfd = { interval = \"5ms\" }", 13, "10 ms to 60 s"),
            ("bfd = { multiplier = 0 }", 13, "1 to 255"),
            ("bfd = { interval = \"50ms\", min_rx = \"50ms\" }", 13, "unknown key `min_rx`"),
            ("ebgp_multihop = 2\nbfd = { multihop = false }", 14, "contradicts `ebgp_multihop`"),
            ("timers = { send_hold = \"1s\" }", 13, "3 s to 65535 s"),
            ("listen_range = [\"10.0.0.0/8\"]", 13, "unknown key `listen_range`"),
        ] {
            let faults = read("", peer).expect_err(peer);
            assert_eq!(faults.len(), 1, "{peer}: {faults:#?}");
            assert!(
                faults[0].starts_with(&format!("edge.toml:{line}: ")) && faults[0].contains(why),
                "{peer}: {faults:?}"
            );
        }
        let internal = read("", "remote_asn = 64512\nrole = \"peer\"").expect_err("a role on iBGP");
        assert!(internal[0].contains("`role` is for eBGP"), "{internal:?}");
        let twice = read("listen_range = [\"10.0.0.0/8\", \"10.0.0.0/8\"]", "").expect_err("the same range twice");
        assert!(twice[0].contains("already a `listen_range`"), "{twice:?}");
    }
}
