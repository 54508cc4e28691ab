use std::{net::IpAddr, time::Duration};

use super::*;
use crate::model::{
    BackendSource, Balance, Lifetimes, Mode, NextHopStyle, RecordType, Selection, StaticBackend, Tier,
    access::{Format, Target},
};

/// The example of the documentation, which `deploy/edge.toml` also is.
const EXAMPLE: &str = include_str!("../../../deploy/edge.toml");

fn ok(text: &str) -> Config {
    parse(text, Path::new("edge.toml")).unwrap_or_else(|error| panic!("{error}"))
}

fn faults(text: &str) -> Vec<String> {
    parse(text, Path::new("edge.toml")).expect_err("it was accepted").lines()
}

/// A valid configuration of eleven lines, ending in a service; what is appended belongs to the service.
const BASE: &str = r#"[edge]
interfaces = ["ens33"]
pod_networks = ["10.1.0.0/16"]
[resolver.kube-dns]
servers = ["10.1.0.41"]
[bgp]
asn = 64512
router_id = "172.16.1.88"
[service.web]
listen = ["172.16.1.88:80/tcp"]
backends = { static = ["10.1.0.4:80"] }
"#;

/// Each case: what replaces what in [`BASE`], the line of the one fault, and words it must contain.
fn refused(cases: &[(&str, &str, usize, &[&str])]) {
    for (from, to, line, words) in cases {
        assert!(BASE.contains(from), "{from} is not in the base");
        let faults = faults(&BASE.replacen(from, to, 1));
        assert_eq!(faults.len(), 1, "{to}: {faults:#?}");
        assert!(faults[0].starts_with(&format!("edge.toml:{line}: ")), "{to}: {}", faults[0]);
        for word in *words {
            assert!(faults[0].contains(word), "{to}: no `{word}` in {}", faults[0]);
        }
    }
}

#[test]
fn the_example_is_read_to_the_last_key() {
    let config = ok(EXAMPLE);
    assert_eq!(config.edge.interfaces, ["ens33"]);
    assert_eq!(config.http, Some("127.0.0.1:9180".parse().unwrap()));
    assert_eq!(config.resolvers["kube-dns"].servers[0], "10.1.0.41:53".parse().unwrap());
    assert_eq!(config.resolvers["kube-dns"].valid, Some(Duration::from_secs(10)));
    let bgp = config.bgp.unwrap();
    assert_eq!((bgp.asn, bgp.listen_port, bgp.peers.len()), (64512, Some(179), 3));
    let peer = &bgp.peers[&"172.16.1.80".parse::<IpAddr>().unwrap()];
    assert_eq!((peer.description.as_str(), peer.group.as_deref()), ("kcontrol", Some("calico")));
    assert_eq!(peer.import.as_ref().unwrap()[0].prefixes[0].max_length, 32);
    let service = &config.services["ingress-https"];
    assert_eq!(service.mode, Mode::FullNat);
    assert_eq!(
        service.backends,
        BackendSource::Dns {
            name: "nginx-ingress-svc.nginx-ingress.svc.cluster.local".into(),
            port: Some(443),
            resolver: "kube-dns".into(),
            record: RecordType::A,
        }
    );
}

#[test]
fn the_base_of_these_tests_is_valid_and_has_the_documented_defaults() {
    let config = ok(BASE);
    assert_eq!(config.edge.pin_path, Path::new("/sys/fs/bpf/edge"));
    assert_eq!(config.edge.socket, Path::new("/run/edge/edge.sock"));
    assert_eq!(config.edge.state_dir, Path::new("/var/lib/edge"));
    assert_eq!(config.http, Some("127.0.0.1:9180".parse().unwrap()));
    assert_eq!(config.services["web"].announce, None);
}

#[test]
fn unknown_keys_are_named_with_line_and_nearest_key() {
    refused(&[
        ("interfaces =", "hok = \"auto\"\ninterfaces =", 2, &["[edge]", "`hok`", "did you mean `hook`"]),
        ("servers =", "valld = \"1s\"\nservers =", 5, &["[resolver.kube-dns]", "`valld`", "`valid`"]),
        ("[bgp]", "[bpg]\n[bgp]", 6, &["unknown key `bpg`", "`bgp`"]),
        ("listen =", "anounce = false\nlisten =", 10, &["[service.web]", "`announce`"]),
        ("listen =", "zzzzzz = 1\nlisten =", 10, &["`zzzzzz`", "known here:", "balance"]),
        ("{ static", "{ weight = 1, static", 11, &["[service.web.backends]", "`weight`"]),
    ]);
}

#[test]
fn wrong_values_are_refused_with_line_and_what_is_accepted() {
    refused(&[
        ("[\"ens33\"]", "[]", 1, &["`interfaces` is missing"]),
        ("[\"ens33\"]", "\"ens33\"", 2, &["a string; expected an array"]),
        ("[\"ens33\"]", "[\"a/b\"]", 2, &["not an interface name"]),
        ("[\"ens33\"]", "[\"averyveryverylongname\"]", 2, &["longer than 15"]),
        ("[\"ens33\"]", "[\"ens33\", \"ens33\"]", 2, &["twice"]),
        ("[\"ens33\"]", "[\"ens33\"]\nhook = \"xdp\"", 3, &["\"xdp\"", "xdp-native"]),
        ("[\"ens33\"]", "[\"ens33\"]\nsocket = \"edge.sock\"", 3, &["not absolute"]),
        ("10.1.0.0/16", "10.1.0.1/16", 3, &["host bits", "10.1.0.0/16"]),
        ("\"10.1.0.0/16\"", "\"10.1.0.0/16\", \"0.0.0.0/0\"", 3, &["any host in the world"]),
        ("10.1.0.41", "kube-dns.local", 5, &["not an IP address"]),
        ("\"10.1.0.41\"]", "\"10.1.0.41\"]\nvalid = \"10\"", 6, &["the unit is missing"]),
        ("\"10.1.0.41\"]", "\"10.1.0.41\"]\nvalid = \"10ms\"", 6, &["1s"]),
        ("64512", "0", 7, &["0 is refused", "1 to 4294967295"]),
        ("64512", "\"64512\"", 7, &["a string"]),
        ("\"172.16.1.88\"\n", "\"edge\"\n", 8, &["not an IPv4 address"]),
        ("router_id = \"172.16.1.88\"\n", "", 6, &["`router_id` is missing"]),
        ("\"172.16.1.88\"\n", "\"172.16.1.88\"\nlisten_port = 70000\n", 9, &["70000", "65535"]),
        ("172.16.1.88:80/tcp", "172.16.1.88/tcp", 10, &["ADDRESS:PORT/tcp"]),
        ("172.16.1.88:80/tcp", "172.16.1.88:80/sctp", 10, &["ADDRESS:PORT/udp"]),
        ("172.16.1.88:80/tcp", "0.0.0.0:80/tcp", 10, &["clients cannot send"]),
        ("172.16.1.88:80/tcp", "10.1.3.3:80/tcp", 10, &["lies in `pod_networks`"]),
        ("\"172.16.1.88:80/tcp\"", "", 9, &["`listen` is missing"]),
        ("10.1.0.4:80", "10.2.0.4:80", 11, &["outside `pod_networks` (10.1.0.0/16)"]),
        ("10.1.0.4:80", "10.1.0.4", 11, &["not an address with a port"]),
        ("\"10.1.0.4:80\"", "\"10.1.0.4:80\", \"10.1.0.4:80\"", 11, &["twice"]),
        ("{ static = [\"10.1.0.4:80\"] }", "{}", 11, &["neither `dns` nor `static`"]),
        ("{ static", "{ dns = \"a.b\", static", 11, &["exclude each other"]),
    ]);
}

#[test]
fn services_by_dns_are_checked() {
    let with = |backends: &str| BASE.replace("{ static = [\"10.1.0.4:80\"] }", backends);
    ok(&with("{ dns = \"web.prod.svc.cluster.local.\", port = 80, resolver = \"kube-dns\" }"));
    ok(&with("{ dns = \"_http._tcp.web.prod.svc.cluster.local\", resolver = \"kube-dns\", record = \"srv\" }"));
    for (backends, word) in [
        ("{ dns = \"web\", port = 80, resolver = \"kube-dns\" }", "not fully qualified"),
        ("{ dns = \"web.prod.svc\", port = 80, resolver = \"kube-dns\" }", ".svc.cluster.local"),
        ("{ dns = \"web.local\", port = 80, resolver = \"kubedns\" }", "did you mean `kube-dns`"),
        ("{ dns = \"web.local\", port = 80 }", "`resolver` is missing"),
        ("{ dns = \"web.local\", resolver = \"kube-dns\" }", "`port` is missing"),
        ("{ dns = \"web.local\", resolver = \"kube-dns\", port = 0 }", "1 to 65535"),
        ("{ dns = \"web.local\", resolver = \"kube-dns\", port = 1, record = \"srv\" }", "SRV answers carry the port"),
        ("{ dns = \"web.local\", resolver = \"kube-dns\", port = 1, record = \"mx\" }", "\"srv\""),
    ] {
        let faults = faults(&with(backends));
        assert_eq!(faults.len(), 1, "{backends}: {faults:#?}");
        assert!(faults[0].starts_with("edge.toml:11: ") && faults[0].contains(word), "{backends}: {}", faults[0]);
    }
}

#[test]
fn a_service_has_backends_of_each_of_its_families_and_of_no_other() {
    let both = BASE.replace("[\"10.1.0.0/16\"]", "[\"10.1.0.0/16\", \"fd00:10:1::/48\"]");
    let with = |listen: &str, backends: &str| {
        both.replace("\"172.16.1.88:80/tcp\"", listen).replace("{ static = [\"10.1.0.4:80\"] }", backends)
    };
    let (v4, v6) = ("\"172.16.1.88:80/tcp\"", "\"[2001:db8::88]:80/tcp\"");
    let dual = format!("{v4}, {v6}");
    let dns =
        |record: &str| format!("{{ dns = \"web.local\", port = 1, resolver = \"kube-dns\", record = \"{record}\" }}");
    let fixed = |addresses: &str| format!("{{ static = [{addresses}] }}");
    let (pod4, pod6) = ("\"10.1.0.4:80\"", "\"[fd00:10:1::4]:80\"");
    ok(&with(v6, &dns("aaaa")));
    ok(&with(v6, &fixed(pod6)));
    ok(&with(&dual, &fixed(&format!("{pod4}, {pod6}"))));
    ok(&with(&dual, "{ dns = \"_http._tcp.web.local\", resolver = \"kube-dns\", record = \"srv\" }"));
    for (listen, backends, word) in [
        (v6, dns("a"), "has no IPv6 backends"),
        (v4, dns("aaaa"), "has no IPv4 backends"),
        (&dual, dns("aaaa"), "172.16.1.88:80/tcp has no IPv4 backends"),
        (&dual, fixed(pod4), "[2001:db8::88]:80/tcp has no IPv6 backends"),
        (v4, fixed(&format!("{pod4}, {pod6}")), "the IPv6 ones get nothing"),
    ] {
        let faults = faults(&with(listen, &backends));
        assert_eq!(faults.len(), 1, "{listen} {backends}: {faults:#?}");
        assert!(faults[0].contains(word), "{listen} {backends}: {}", faults[0]);
    }
    let link_local = faults(&with("\"[fe80::1]:80/tcp\"", &dns("aaaa")));
    assert!(link_local[0].contains("clients cannot send to that address"), "{link_local:?}");
}

#[test]
fn selection_is_read_with_weights_and_tiers() {
    let static_backends = "backends = { static = [\"10.1.0.4:80\", { address = \"10.1.0.5:80\", weight = 3 }], \
                           backup = [\"10.1.0.6:80\"] }";
    let keys = "balance = \"least-conn\"\naffinity = \"10m\"\nmax_connections = 100\nslow_start = \"30s\"\n\
                maglev_size = 65537\n";
    let text = BASE.replace("backends = { static = [\"10.1.0.4:80\"] }", static_backends);
    let config = ok(&format!("{text}{keys}"));
    let service = &config.services["web"];
    assert_eq!(service.balance, Balance::LeastConnections);
    let selection = Selection {
        affinity: Some(Duration::from_secs(600)),
        max_connections: Some(100),
        slow_start: Some(Duration::from_secs(30)),
        maglev_size: Some(65537),
    };
    assert_eq!(service.selection, selection);
    let backend = |address: &str, weight, tier| StaticBackend { address: address.parse().unwrap(), weight, tier };
    let expected = vec![
        backend("10.1.0.4:80", 1, Tier::Primary),
        backend("10.1.0.5:80", 3, Tier::Primary),
        backend("10.1.0.6:80", 1, Tier::Backup),
    ];
    assert_eq!(service.backends, BackendSource::Static(expected));
}

#[test]
fn faults_of_selection_are_found_with_their_lines() {
    let service = "[service.web]\n";
    let old = "backends = { static = [\"10.1.0.4:80\"] }";
    let backends = |list: &str| format!("backends = {{ {list} }}");
    refused(&[
        (service, "[service.web]\nbalance = \"random\"\n", 10, &["random", "round-robin", "least-conn"]),
        (service, "[service.web]\naffinity = \"0s\"\n", 10, &["affinity", "1s"]),
        (service, "[service.web]\naffinity = \"1500ms\"\n", 10, &["whole seconds"]),
        (service, "[service.web]\nmax_connections = 0\n", 10, &["max_connections"]),
        (service, "[service.web]\nslow_start = \"2h\"\n", 10, &["slow_start", "1h"]),
        (service, "[service.web]\nmaglev_size = 1000\n", 10, &["maglev_size", "1021", "65537"]),
        (old, &backends("static = [{ address = \"10.1.0.4:80\", weight = 0 }]"), 11, &["weight", "0"]),
        (old, &backends("static = [{ weight = 2 }]"), 11, &["address", "missing"]),
        (old, &backends("static = [{ address = \"10.1.0.4:80\", wieght = 2 }]"), 11, &["wieght", "weight"]),
        (old, &backends("static = [\"10.1.0.4:80\"], backup = [\"10.1.0.4:80\"]"), 11, &["twice"]),
        (old, &backends("static = [\"10.1.0.4:80\"], backup = []"), 11, &["backup"]),
    ]);
    let udp = BASE.replace("80/tcp", "80/udp");
    assert!(faults(&format!("{udp}max_connections = 5\n"))[0].contains("UDP"));
    let text = format!("{BASE}balance = \"round-robin\"\nmaglev_size = 1021\n");
    assert!(faults(&text)[0].starts_with("edge.toml:13: "), "{:?}", faults(&text));
}

#[test]
fn timeouts_are_read_for_each_protocol() {
    let text = BASE.replace("80/tcp\"", "80/tcp\", \"172.16.1.88:53/udp\"");
    let keys = "timeouts = { established = \"1h\", half_open = \"10s\", closing = \"30s\", udp_unanswered = \"5s\" }\n\
                one_reply = true\n";
    let config = ok(&format!("{text}{keys}"));
    let lifetimes = Lifetimes {
        established: Some(3600),
        half_open: Some(10),
        closing: Some(30),
        udp: None,
        udp_unanswered: Some(5),
        one_reply: true,
    };
    assert_eq!(config.services["web"].lifetimes, lifetimes);
}

#[test]
fn faults_of_timeouts_are_found_with_their_lines() {
    let service = "[service.web]\n";
    let with = |keys: &str| format!("[service.web]\n{keys}\n");
    refused(&[
        (service, &with("timeouts = { established = \"7s\" }"), 10, &["established", "8s", "2592000s"]),
        (service, &with("timeouts = { half_open = \"1500ms\" }"), 10, &["half_open", "whole seconds"]),
        (service, &with("timeouts = { closing = \"2h\" }"), 10, &["closing", "3600s"]),
        (service, &with("timeouts = { udp = \"10s\" }"), 10, &["udp", "no listen address"]),
        (service, &with("timeouts = { establised = \"10s\" }"), 10, &["establised", "established"]),
        (service, &with("one_reply = true"), 10, &["one_reply", "UDP"]),
    ]);
    let udp = BASE.replace("80/tcp", "80/udp");
    let text = format!("{udp}one_reply = true\ntimeouts = {{ udp = \"60s\" }}\n");
    assert!(faults(&text)[0].contains("one_reply"), "{:?}", faults(&text));
}

#[test]
fn what_this_version_cannot_do_is_refused_and_not_ignored() {
    let service = ["backends = { kubernetes = { service = \"web\" } }"];
    for key in service {
        let name = key.split(' ').next().unwrap();
        let base: String =
            BASE.lines().filter(|line| !line.starts_with(name)).map(|line| format!("{line}\n")).collect();
        let line = base.lines().count() + 1;
        let faults = faults(&format!("{base}{key}\n"));
        assert_eq!(faults.len(), 1, "{key}: {faults:#?}");
        assert!(faults[0].starts_with(&format!("edge.toml:{line}: ")), "{key}: {}", faults[0]);
        assert!(faults[0].contains("known, but this version does not do it yet"), "{key}: {}", faults[0]);
    }
}

#[test]
fn an_access_log_goes_to_a_file_or_the_journal_and_anything_else_is_refused_with_its_line() {
    let read = |text: &str| ok(&format!("{BASE}[log]\n{text}\n")).access_log;
    let log = read("access = \"/var/log/edge/access.log\"").unwrap();
    assert_eq!((log.target, log.format), (Target::File("/var/log/edge/access.log".into()), Format::default()));
    let log = read("access = \"journal\"\nformat = \"$end $client\"").unwrap();
    assert_eq!((log.target, log.format), (Target::Journal, Format::parse("$end $client").unwrap()));
    assert_eq!(ok(BASE).access_log, None);
    for (text, line, why) in [
        ("access = \"access.log\"", 13, "not absolute"),
        ("access = \"/var/log/edge/\"", 13, "folder"),
        ("access = \"journal\"\nformat = \"$time $nothing\"", 14, "no variable `$nothing`"),
        ("format = \"$time\"", 13, "no effect without `access`"),
        ("acess = \"journal\"", 13, "did you mean `access`?"),
    ] {
        let faults = faults(&format!("{BASE}[log]\n{text}\n"));
        assert!(faults[0].starts_with(&format!("edge.toml:{line}: [log]: ")), "{faults:?}");
        assert!(faults[0].contains(why), "{faults:?}");
    }
}

#[test]
fn two_services_on_one_listen_address_are_refused_with_both_lines() {
    let text =
        format!("{BASE}[service.api]\nlisten = [\"172.16.1.88:80\"]\nbackends = {{ static = [\"10.1.0.5:80\"] }}\n");
    let faults = faults(&text);
    assert_eq!(faults.len(), 1, "{faults:#?}");
    assert!(faults[0].starts_with("edge.toml:13: "), "{}", faults[0]);
    assert!(faults[0].contains("service `web` at edge.toml:10"), "{}", faults[0]);
    ok(&text.replace("172.16.1.88:80\"]", "172.16.1.88:80/udp\"]"));
}

#[test]
fn peers_inherit_from_their_group_and_override_it() {
    let text = format!(
        "{BASE}[bgp.group.tor]\nremote_asn = 65001\nimport = []\nexport = [\"172.16.9.0/24 le 32\"]\nport = 1179\n\
         timers = {{ keepalive = \"3s\", hold = \"9s\" }}\nebgp_multihop = 2\npassive = true\npeer_edge = true\n\
         [[bgp.peer]]\naddress = \"192.0.2.1\"\ngroup = \"tor\"\npassive = false\npeer_edge = false\nimport = [\"10.0.0.0/8 ge 24\"]\n\
         timers = {{ hold = \"30s\" }}\n[[bgp.peer]]\naddress = \"2001:db8::1\"\ngroup = \"tor\"\n"
    );
    let peers = ok(&text).bgp.unwrap().peers;
    let first = &peers[&"192.0.2.1".parse::<IpAddr>().unwrap()];
    assert_eq!((first.remote_asn, first.port, first.passive, first.ebgp_multihop), (65001, 1179, false, 2));
    assert_eq!((first.keepalive.as_secs(), first.hold.as_secs()), (10, 30));
    assert_eq!(first.import.as_ref().unwrap()[0].prefixes[0].min_length, 24);
    let second = &peers[&"2001:db8::1".parse::<IpAddr>().unwrap()];
    assert_eq!((second.keepalive.as_secs(), second.hold.as_secs(), second.passive), (3, 9, true));
    assert_eq!(second.import, Some(vec![]));
    assert!(!first.peer_edge && second.peer_edge);
}

#[test]
fn faults_of_peers_are_found() {
    let with = |peer: &str| format!("{BASE}[[bgp.peer]]\n{peer}\n");
    for (peer, line, word) in [
        ("remote_asn = 1", 12, "`address` is missing"),
        ("address = \"172.16.1.80\"", 12, "`remote_asn` is missing"),
        ("address = \"kcontrol\"\nremote_asn = 1", 13, "not an IP address"),
        ("address = \"224.0.0.1\"\nremote_asn = 1", 13, "no packet can be sent"),
        ("address = \"172.16.1.80\"\nremote_asn = 0", 14, "0 is refused"),
        ("address = \"172.16.1.80\"\ngroup = \"calico\"", 14, "no [bgp.group.calico]"),
        ("address = \"172.16.1.80\"\nremote_asn = 1\ntimers = { hold = \"2s\" }", 15, "RFC 4271"),
        ("address = \"172.16.1.80\"\nremote_asn = 1\ntimers = { hold = \"3500ms\" }", 15, "whole seconds"),
        (
            "address = \"172.16.1.80\"\nremote_asn = 1\ntimers = { keepalive = \"9s\", hold = \"9s\" }",
            15,
            "lose the session",
        ),
        ("address = \"172.16.1.80\"\nremote_asn = 1\nlocal_address = \"2001:db8::2\"", 15, "differ in family"),
        ("address = \"172.16.1.80\"\nremote_asn = 64512\nebgp_multihop = 2", 12, "no meaning for an iBGP peer"),
        ("address = \"172.16.1.80\"\nremote_asn = 1\nimport = [\"10.1.0.0/16 le 8\"]", 15, "ge <= le"),
    ] {
        let faults = faults(&with(peer));
        assert_eq!(faults.len(), 1, "{peer}: {faults:#?}");
        assert!(
            faults[0].starts_with(&format!("edge.toml:{line}: ")) && faults[0].contains(word),
            "{peer}: {}",
            faults[0]
        );
    }
    let twice =
        with("address = \"172.16.1.80\"\nremote_asn = 1\n[[bgp.peer]]\naddress = \"172.16.1.80\"\nremote_asn = 1");
    let faults = faults(&twice);
    assert!(
        faults[0].starts_with("edge.toml:16: ") && faults[0].contains("already configured at edge.toml:13"),
        "{faults:?}"
    );
    ok(&with("address = \"172.16.1.80\"\nremote_asn = 1\ntimers = { hold = \"0s\" }"));
}

#[test]
fn routes_name_objects_unless_the_configuration_says_otherwise_which_waits_for_a_restart() {
    let style = |config: &Config| config.bgp.as_ref().unwrap().next_hops;
    let with = |line: &str| BASE.replace("[bgp]\n", &format!("[bgp]\n{line}\n"));
    assert!(with("next_hops").contains("next_hops"), "{BASE}");
    let plain = ok(BASE);
    assert_eq!(style(&plain), NextHopStyle::Objects);
    for (word, expected) in [("resilient", NextHopStyle::Resilient), ("inline", NextHopStyle::Inline)] {
        let other = ok(&with(&format!("next_hops = \"{word}\"")));
        assert_eq!(style(&other), expected);
        assert_eq!(diff::changes(&plain, &other).needs_restart, ["[bgp] next_hops"]);
        assert_eq!(style(&diff::until_restart(&plain, other)), NextHopStyle::Objects);
    }
    let faults = faults(&with("next_hops = \"groups\""));
    assert!(faults[0].contains("\"objects\", \"resilient\" or \"inline\""), "{faults:?}");
}

#[test]
fn client_networks_of_a_peer_win_over_its_groups_and_one_inside_the_pod_networks_is_warned_of() {
    let text = format!(
        "{BASE}[bgp.group.nodes]\nremote_asn = 64512\nclient_networks = [\"0.0.0.0/0\", \"::/0\"]\n\
         [[bgp.peer]]\naddress = \"172.16.1.80\"\ngroup = \"nodes\"\n\
         [[bgp.peer]]\naddress = \"172.16.1.81\"\ngroup = \"nodes\"\nclient_networks = [\"10.1.3.0/24\"]\n"
    );
    let config = ok(&text);
    let of = |address: &str| -> Vec<String> {
        let peer = &config.bgp.as_ref().unwrap().peers[&address.parse::<IpAddr>().unwrap()];
        peer.client_networks.iter().map(ToString::to_string).collect()
    };
    assert_eq!(
        (of("172.16.1.80"), of("172.16.1.81")),
        (vec!["0.0.0.0/0".into(), "::/0".into()], vec!["10.1.3.0/24".into()])
    );
    let warnings = lint::warnings(&config).join("\n");
    assert!(warnings.contains("172.16.1.81: `client_networks` 10.1.3.0/24 lies inside `pod_networks`"), "{warnings}");
    assert!(!warnings.contains("172.16.1.80: `client_networks`"), "{warnings}");
    let faults = faults(&text.replace("10.1.3.0/24", "10.1.3.0/33"));
    assert!(faults[0].contains("not a prefix"), "{faults:?}");
}

#[test]
fn policies_are_read_term_by_term_and_their_faults_have_a_line() {
    let with = |lines: &str| format!("{BASE}[[bgp.peer]]\naddress = \"172.16.1.80\"\nremote_asn = 1\n{lines}\n");
    let text = with(
        "import = [\"10.1.0.0/16 le 32\",\n{ prefixes = [\"10.2.0.0/16\"], as_path = \"_65001_\", communities = \
         [\"1:2\", \"1:2:3\"], set = { local_pref = 200, communities = [\"rt:1:2\"], prepend = 3, next_hop = \"self\" } },\n\
         { action = \"deny\" }]\nmax_prefixes = { limit = 200, warning = 50, restart = \"1m\" }\nadd_path = true",
    );
    let bgp = ok(&text).bgp.unwrap();
    let peer = bgp.peers.values().next().unwrap();
    let terms = peer.import.as_ref().unwrap();
    assert_eq!((terms.len(), terms[0].prefixes[0].max_length, terms[2].deny), (3, 32, true));
    assert_eq!((terms[1].set.local_pref, terms[1].set.prepend, terms[1].communities.len()), (Some(200), 3, 2));
    let limit = peer.intake.max_prefixes.unwrap();
    assert_eq!((limit.limit, limit.warning, limit.restart), (200, 100, Some(Duration::from_secs(60))));
    assert!(peer.intake.add_path && peer.client_networks.is_empty());
    assert!(bgp.guard.vips.contains(&"172.16.1.88".parse::<IpAddr>().unwrap()));
    for (lines, line, word) in [
        ("import = [{ prefix = [\"10.1.0.0/16\"] }]", 15, "did you mean `prefixes`?"),
        ("import = [\"10.1.0.0/16\",\n\"10.1.0.0/33\"]", 16, "not a prefix"),
        ("import = [{ as_path = \"(65001\" }]", 15, "unclosed group"),
        ("import = [{ action = \"drop\" }]", 15, "\"permit\" or \"deny\""),
        ("import = [{ action = \"deny\", set = { med = 1 } }]", 15, "no meaning"),
        ("import = [{ prefixes = [] }]", 15, "matches nothing"),
        ("export = [{ set = { prepend = 17 } }]", 15, "17 is refused"),
        ("export = [{ set = { next_hop = \"peer\" } }]", 15, "\"self\""),
        ("max_prefixes = 0", 15, "0 is refused"),
        ("max_prefixes = { warning = 80 }", 15, "`limit` is missing"),
        ("max_prefixes = { limit = 5, restart = \"10ms\" }", 15, "at least 1 s"),
    ] {
        let faults = faults(&with(lines));
        assert_eq!(faults.len(), 1, "{lines}: {faults:#?}");
        assert!(faults[0].starts_with(&format!("edge.toml:{line}: ")) && faults[0].contains(word), "{}", faults[0]);
    }
}

#[test]
fn the_router_id_follows_from_the_one_local_address() {
    let text = BASE.replace("router_id = \"172.16.1.88\"\n", "")
        + "[[bgp.peer]]\naddress = \"172.16.1.80\"\nremote_asn = 64512\nlocal_address = \"172.16.1.88\"\n";
    assert_eq!(ok(&text).bgp.unwrap().router_id.to_string(), "172.16.1.88");
}

#[test]
fn announcing_needs_bgp_and_carries_its_attributes() {
    let announce = ok(&format!("{BASE}announce = {{ communities = [\"64512:100\", \"no-export\"], med = 10 }}\n"));
    let announce = announce.services["web"].announce.clone().unwrap();
    assert_eq!((announce.min_backends, announce.attributes.med), (1, Some(10)));
    let communities: Vec<_> = announce.attributes.communities.iter().map(ToString::to_string).collect();
    assert_eq!(communities, ["64512:100", "no-export"]);
    assert_eq!(ok(&format!("{BASE}announce = false\n")).services["web"].announce, None);
    let without = BASE.replace("[bgp]\nasn = 64512\nrouter_id = \"172.16.1.88\"\n", "");
    let faults = faults(&format!("{without}announce = true\n"));
    assert!(faults.len() == 1 && faults[0].starts_with("edge.toml:9: ") && faults[0].contains("[bgp]"), "{faults:?}");
}

#[test]
fn a_link_local_peer_has_an_interface_and_the_same_address_on_two_links_is_two_peers() {
    let peer = |keys: &str| format!("[[bgp.peer]]\naddress = \"fe80::2\"\nremote_asn = 64513\n{keys}\n");
    let both = peer("interface = \"ens33\"") + &peer("interface = \"ens34\"\nextended_next_hop = false");
    let bgp = ok(&format!("{BASE}{both}")).bgp.unwrap();
    let shown: Vec<_> = bgp.peers.values().map(|peer| crate::model::scope::shown(peer.address)).collect();
    assert!(shown.contains(&"fe80::2%ens33".to_owned()) && shown.contains(&"fe80::2%ens34".to_owned()), "{shown:?}");
    let extended = |interface: &str| {
        let peer = bgp.peers.values().find(|peer| crate::model::scope::shown(peer.address).ends_with(interface));
        peer.unwrap().session.extended_next_hop
    };
    assert_eq!((extended("ens33"), extended("ens34")), (true, false), "on by itself, unless it is turned off");
    for (keys, why) in [
        (peer(""), "has to say on which link"),
        (peer("interface = \"ens33\"").replace("fe80::2", "172.16.1.80"), "is for link-local peers"),
        (peer("interface = \"a/b\""), "no interface has such a name"),
        (peer("interface = \"ens33\"\nlocal_address = \"fd00::1\""), "from its interface's own address"),
        (peer("interface = \"ens33\"").repeat(2), "fe80::2%ens33 is already configured"),
    ] {
        let faults = faults(&format!("{BASE}{keys}"));
        assert!(faults.len() == 1 && faults[0].contains(why), "{keys}: {faults:#?}");
    }
}

#[test]
fn snat_is_for_full_nat_only_and_bounded() {
    let snat = ok(&format!("{BASE}snat = {{ addresses = [\"172.16.1.89\"], ports = \"1024-32767\" }}\n"));
    assert_eq!(snat.services["web"].snat.ports, Some((1024, 32767)));
    for (line, word) in [
        ("mode = \"dnat\"\nsnat = { ports = \"1-2\" }", "keeps the client's address"),
        ("snat = { ports = \"10-9\" }", "lowest port comes first"),
        ("snat = { addresses = [\"10.1.0.9\"] }", "lies in `pod_networks`"),
        ("snat = { addresses = [\"192.0.2.1\",\"192.0.2.2\",\"192.0.2.3\",\"192.0.2.4\",\"192.0.2.5\"] }", "at most 4"),
    ] {
        let faults = faults(&format!("{BASE}{line}\n"));
        assert!(faults.len() == 1 && faults[0].contains(word), "{line}: {faults:?}");
    }
}

#[test]
fn every_fault_is_reported_in_the_order_of_lines() {
    let text = BASE.replace("64512", "0").replace("ens33", "a/b").replace("10.1.0.4:80", "10.9.0.4:80");
    let faults = faults(&text);
    let lines: Vec<&str> = faults.iter().map(|fault| fault.split(':').nth(1).unwrap()).collect();
    assert_eq!(lines, ["2", "7", "11"], "{faults:#?}");
}

#[test]
fn text_that_is_not_toml_is_refused_with_its_line_and_nothing_else() {
    let faults = faults("[edge]\ninterfaces = [\"ens33\"\nhook = \n");
    assert!(faults.iter().all(|fault| fault.contains("this line is not TOML")), "{faults:#?}");
    assert!(faults[0].starts_with("edge.toml:"), "{faults:#?}");
}

#[test]
fn fragments_of_conf_d_are_merged_and_contradictions_name_both_files() {
    let folder = tempfile::tempdir().unwrap();
    let main = folder.path().join("edge.toml");
    std::fs::write(&main, BASE).unwrap();
    let fragments = folder.path().join("conf.d");
    std::fs::create_dir(&fragments).unwrap();
    let more = "[service.dns]\nlisten = [\"172.16.1.88:53/udp\"]\nbackends = { static = [\"10.1.0.41:53\"] }\n\
                [[bgp.peer]]\naddress = \"172.16.1.80\"\nremote_asn = 64512\n";
    std::fs::write(fragments.join("10-dns.toml"), more).unwrap();
    std::fs::write(fragments.join("notes.txt"), "not read").unwrap();
    let config = load(&main).unwrap();
    assert_eq!((config.services.len(), config.bgp.unwrap().peers.len()), (2, 1));

    std::fs::write(fragments.join("20-again.toml"), "[service.web]\nmode = \"dnat\"\n[bgp]\nasn = 1\n").unwrap();
    let faults = load(&main).unwrap_err().lines();
    assert_eq!(faults.len(), 2, "{faults:#?}");
    assert!(faults[0].contains("20-again.toml:1: `service.web` is already set at"), "{}", faults[0]);
    assert!(faults[1].contains("20-again.toml:4: `bgp.asn` is already set at") && faults[1].contains("edge.toml:7"));
}

#[test]
fn a_file_that_cannot_be_read_is_named() {
    let faults = load(Path::new("/nonexistent/edge.toml")).unwrap_err().lines();
    assert!(faults.len() == 1 && faults[0].starts_with("/nonexistent/edge.toml: cannot be read: "), "{faults:?}");
}

#[test]
fn what_is_probably_not_meant_is_a_warning() {
    let text = BASE.replace(
        "\"172.16.1.88\"\n",
        "\"172.16.1.88\"\n[[bgp.peer]]\naddress = \"172.16.1.80\"\nremote_asn = 64512\nimport = [\"10.1.0.0/16\"]\n",
    );
    let warnings = lint::warnings(&ok(&text)).join("\n");
    assert!(warnings.contains("meant \"10.1.0.0/16 le 32\"?"), "{warnings}");
    assert!(warnings.contains("[resolver.kube-dns]: no service uses it"), "{warnings}");
    assert!(lint::warnings(&ok(EXAMPLE)).is_empty(), "{:?}", lint::warnings(&ok(EXAMPLE)));
    for (mode, warned) in [("dnat", true), ("full-nat", false)] {
        let warnings = lint::warnings(&ok(&every_port(KEPT, &format!("mode = \"{mode}\"\n")))).join("\n");
        assert_eq!(warnings.contains("masqueraded by their nodes"), warned, "{warnings}");
    }
    let own = |address: &str| std::collections::BTreeSet::from([address.parse().unwrap()]);
    let config = ok(&every_port(KEPT, ""));
    assert!(lint::not_dedicated(&config, &own("203.0.113.10"))[0].contains("web (203.0.113.10:*/tcp) is not served"));
    assert!(lint::not_dedicated(&config, &own("203.0.113.11")).is_empty());
    assert!(lint::not_dedicated(&ok(BASE), &own("172.16.1.88")).is_empty(), "other ports stay the host's");
}

#[test]
fn a_fault_of_a_group_is_told_once_however_many_peers_it_has() {
    let text = format!(
        "{BASE}[bgp.group.g]\nremote_asn = 1\ntimers = {{ keepalive = \"9s\", hold = \"9s\" }}\n\
         [[bgp.peer]]\naddress = \"192.0.2.1\"\ngroup = \"g\"\n[[bgp.peer]]\naddress = \"192.0.2.2\"\ngroup = \"g\"\n"
    );
    let faults: Vec<String> = faults(&text).into_iter().filter(|fault| fault.contains("lose the session")).collect();
    assert_eq!(faults.len(), 1, "{faults:#?}");
    assert!(faults[0].starts_with("edge.toml:14: "), "{faults:#?}");
}

/// Values of every kind and many wrong ones, for keys of every table.
fn any_document() -> impl proptest::strategy::Strategy<Value = String> {
    use proptest::prelude::*;
    let keys = "(edge|api|bgp|log|service|resolver|asn|router_id|peer|group|address|import|timers|hold|keepalive|listen|\
                backends|static|dns|port|record|announce|snat|ports|addresses|valid|servers|interfaces|tables|x)";
    let values = "(1|-1|0|99999999999999999999|1.5|true|1979-05-27|\"\"|\"10.1.0.0/16\"|\"10s\"|\"::1\"|\"10.1.0.4:80/tcp\"|\
                  \\[\\]|\\[1, \"a\"\\]|\\[\"10.1.0.0/16 le 32\"\\]|\\{\\}|\\{ static = \\[\"10.1.0.4:80\"\\] \\}|\\{ hold = \"1s\" \\}|\\[\\{\\}\\])";
    let line = prop_oneof![
        (keys, values).prop_map(|(key, value)| format!("{key} = {value}\n")),
        keys.prop_map(|key| format!("[{key}]\n")),
        (keys, keys).prop_map(|(table, key)| format!("[{table}.{key}]\n")),
        (keys, keys).prop_map(|(table, key)| format!("[[{table}.{key}]]\n")),
        "\\PC{0,20}\n".prop_map(String::from),
    ];
    proptest::collection::vec(line, 0..20).prop_map(|lines| lines.concat())
}

proptest::proptest! {
    #[test]
    fn no_text_makes_the_reader_panic_and_every_refusal_names_a_fault(text in any_document()) {
        if let Err(error) = parse(&text, Path::new("edge.toml")) {
            proptest::prop_assert!(!error.problems.is_empty());
        }
    }
}

#[test]
fn health_checks_are_read_with_their_defaults() {
    let health = |text: &str| {
        let config = ok(&format!("{BASE}health = {{ {text} }}\n"));
        config.services.into_values().next().unwrap().health.unwrap()
    };
    let plain = health("tcp = {}");
    assert_eq!((plain.interval, plain.fast_interval, plain.timeout), (seconds(5), seconds(5), seconds(2)));
    assert_eq!((plain.fall, plain.rise, plain.jitter, plain.panic, plain.mandatory), (3, 2, 10, 0, false));
    let fast = health("http = { path = \"/x\", status = [\"204\", \"300-399\"] }, interval = \"1s\", mandatory = true");
    assert_eq!((fast.timeout, fast.mandatory), (seconds(1), true));
    let crate::model::Check::Http(http, None) = fast.check else { panic!("{:?}", fast.check) };
    assert_eq!((http.path.as_str(), http.status), ("/x", vec![(204, 204), (300, 399)]));
}

fn seconds(seconds: u64) -> std::time::Duration {
    std::time::Duration::from_secs(seconds)
}

#[test]
fn health_checks_that_cannot_be_meant_are_refused_with_their_line() {
    for (text, words) in [
        ("interval = \"5s\"", "no kind of check"),
        ("tcp = {}, udp = { send = \"x\" }", "exclude each other"),
        ("udp = {}", "`send` is missing"),
        ("tcp = {}, interval = \"1ms\"", "shorter than 100 ms"),
        ("tcp = {}, interval = \"1s\", fast_interval = \"2s\"", "longer than `interval`"),
        ("tcp = {}, fall = 0", "expected a number from 1"),
        ("tcp = {}, panic = 101", "expected a number from 0 to 100"),
        ("tcp = { sent = \"x\" }", "did you mean `send`"),
        ("http = { path = \"x\" }", "expected a path"),
        ("http = { status = [\"99\"] }", "100 to 599"),
        ("http = { status = [] }", "no answer would pass"),
        ("http = { method = \"HEAD\", body = \"x\" }", "such an answer has none"),
        ("http = { ca = \"/x\" }", "unknown key `ca`"),
        ("https = { ca = \"x\" }", "not absolute"),
        ("grpc = { tls = false, ca = \"/x\" }", "turns off"),
    ] {
        let faults = faults(&format!("{BASE}health = {{ {text} }}\n"));
        let line = BASE.lines().count() + 1;
        assert_eq!(faults.len(), 1, "{text}: {faults:#?}");
        assert!(faults[0].starts_with(&format!("edge.toml:{line}: ")), "{text}: {}", faults[0]);
        assert!(faults[0].contains(words), "{text}: {}", faults[0]);
    }
}

#[test]
fn a_service_says_who_may_use_it_how_much_and_with_which_segments() {
    use crate::model::{Limits, RangeAction, Rate};
    let protection = |keys: &str| ok(&format!("{BASE}{keys}\n")).services["web"].protection.clone();
    let text = |keys: &str| {
        let ranges = protection(keys).source_ranges;
        let list: Vec<_> = ranges.ranges.iter().map(|(prefix, action)| format!("{action} {prefix}")).collect();
        (list.join(", "), ranges.refuse_others)
    };
    let allowed = "allow 203.0.113.0/24, allow 2001:db8::/32";
    assert_eq!(text("source_ranges = [\"203.0.113.0/24\", \"2001:db8::/32\"]"), (allowed.into(), true));
    let both = "source_ranges = { allow = [\"10.0.0.0/8\"], deny = [\"10.6.6.6\"] }";
    assert_eq!(text(both), ("allow 10.0.0.0/8, deny 10.6.6.6/32".into(), true));
    assert_eq!(text("source_ranges = { deny = [\"10.6.6.6\"] }"), ("deny 10.6.6.6/32".into(), false));
    assert_eq!(text(""), (String::new(), false));
    assert_eq!(
        protection("source_ranges = { deny = [\"10.6.6.6\"] }").source_ranges.ranges.values().next(),
        Some(&RangeAction::Deny)
    );

    let limits = "limits = { new_flows_per_source = \"100/s\", new_flows_burst = 200, packets_per_source = \"9000/s\", half_open_per_source = 64 }";
    let expected = Limits {
        new_flows: Some(Rate { per_second: 100, burst: 200 }),
        packets: Some(Rate { per_second: 9000, burst: 9000 }),
        half_open: Some(64),
    };
    assert_eq!(protection(&format!("{limits}\nmss = 1400")).limits, expected);
    assert_eq!(protection("mss = 1400").mss, Some(1400));
}

#[test]
fn protection_that_cannot_be_meant_is_refused_with_its_line() {
    let cases: &[(&str, &str)] = &[
        ("source_ranges = []", "is empty"),
        ("source_ranges = {}", "is empty"),
        ("source_ranges = \"10.0.0.0/8\"", "an array of prefixes"),
        ("source_ranges = [\"10.0.0.1/8\"]", "host bits"),
        ("source_ranges = [\"client\"]", "a prefix or an address"),
        ("source_ranges = [\"10.0.0.0/8\", \"10.0.0.0/8\"]", "stands there twice"),
        ("source_ranges = { allow = [\"10.0.0.0/8\"], deny = [\"10.0.0.0/8\"] }", "both allowed and denied"),
        ("source_ranges = { block = [\"10.0.0.0/8\"] }", "unknown key `block`"),
        ("limits = { new_flows_per_source = \"100\" }", "for each second"),
        ("limits = { new_flows_per_source = \"0/s\" }", "from 1 to"),
        ("limits = { packets_burst = 5 }", "limits nothing"),
        ("limits = { half_open_per_source = 0 }", "from 1 to"),
        ("limits = { half_open = 1 }", "unknown key `half_open`"),
        ("mss = 500", "from 536 to 65495"),
    ];
    for (key, words) in cases {
        let faults = faults(&format!("{BASE}{key}\n"));
        assert_eq!(faults.len(), 1, "{key}: {faults:#?}");
        assert!(faults[0].starts_with("edge.toml:12: ") && faults[0].contains(words), "{key}: {}", faults[0]);
    }
    let udp = BASE.replace("80/tcp", "80/udp");
    assert!(faults(&format!("{udp}mss = 1400\n"))[0].contains("`mss` is for TCP"));
}

/// [`BASE`] with a service of every port of a VIP of its own.
fn every_port(backends: &str, more: &str) -> String {
    BASE.replace("172.16.1.88:80/tcp\"", "203.0.113.10:*/tcp\"").replace("{ static = [\"10.1.0.4:80\"] }", backends)
        + "announce = true\n"
        + more
}

const KEPT: &str = "{ static = [\"10.1.0.4:*\"] }";

#[test]
fn a_service_takes_every_port_and_its_backends_keep_it_or_have_one_of_their_own() {
    let web = |text: &str| ok(text).services.remove("web").unwrap();
    let kept = web(&every_port(KEPT, ""));
    assert_eq!(kept.listen[0].to_string(), "203.0.113.10:*/tcp");
    assert!(kept.listen[0].takes_every_port() && kept.backends.keeps_all_ports());
    assert!(web(&every_port(KEPT, "mode = \"dnat\"\nhealth = { tcp = {}, port = 80 }\n")).backends.keeps_ports());
    assert!(!web(&every_port("{ static = [\"10.1.0.4:80\"] }", "health = { tcp = {} }\n")).backends.keeps_ports());
    web(&every_port(KEPT, "health = { passive = {} }\n"));
    for (port, keeps) in [("\"*\"", true), ("80", false)] {
        let dns = format!("{{ dns = \"web.local\", port = {port}, resolver = \"kube-dns\" }}");
        assert_eq!(web(&every_port(&dns, "")).backends.keeps_ports(), keeps);
    }
    let v6 = every_port("{ static = [{ address = \"[fd00:10:1::4]:*\", weight = 2 }] }", "")
        .replace("203.0.113.10:*/tcp", "[2001:db8::1]:*/udp")
        .replace("[\"10.1.0.0/16\"]", "[\"10.1.0.0/16\", \"fd00:10:1::/48\"]");
    assert_eq!(web(&v6).listen[0].to_string(), "[2001:db8::1]:*/udp");
}

#[test]
fn a_frontend_of_one_port_stands_beside_one_of_every_port_and_two_of_every_port_do_not() {
    let other = |listen: &str| {
        let backends = "backends = { static = [\"10.1.0.5:80\"] }";
        every_port(KEPT, &format!("[service.other]\nlisten = [\"{listen}\"]\nannounce = true\n{backends}\n"))
    };
    for listen in ["203.0.113.10:443/tcp", "203.0.113.10:*/udp", "203.0.113.11:*/tcp"] {
        assert_eq!(ok(&other(listen)).services.len(), 2, "{listen}");
    }
    let faults = faults(&other("203.0.113.10:*"));
    assert_eq!(faults.len(), 1, "{faults:#?}");
    assert!(
        faults[0].starts_with("edge.toml:14: ") && faults[0].contains("service `web` at edge.toml:10"),
        "{faults:?}"
    );
}

#[test]
fn faults_of_every_port_are_found_with_their_lines() {
    let srv = "{ dns = \"_x._tcp.web.local\", resolver = \"kube-dns\", record = \"srv\" }";
    let fixed = "{ static = [\"10.1.0.4:80\"] }";
    let mixed = "{ static = [\"10.1.0.4:*\", \"10.1.0.5:80\"] }";
    let dns = |port: &str| format!("{{ dns = \"web.local\", port = {port}, resolver = \"kube-dns\" }}");
    for (text, line, words) in [
        (every_port(KEPT, "").replace("announce = true\n", ""), 10, "add `announce`"),
        (every_port(srv, ""), 11, "use `record = \"a\"`"),
        (every_port(&srv.replace(" }", ", port = \"*\" }"), ""), 11, "SRV answers carry the port"),
        (every_port(fixed, "mode = \"dnat\"\n"), 11, "make the backends' port `*`, or use full-nat"),
        (every_port(mixed, "mode = \"dnat\"\n"), 11, "make the backends' port `*`, or use full-nat"),
        (every_port(&dns("80"), "mode = \"dnat\"\n"), 11, "make the backends' port `*`, or use full-nat"),
        (BASE.replace("10.1.0.4:80", "10.1.0.4:*"), 11, "172.16.1.88:80/tcp is one port"),
        (every_port(KEPT, "").replace("*/tcp\"", "*/tcp\", \"203.0.113.10:53/udp\""), 11, "53/udp is one port"),
        (BASE.replace("{ static = [\"10.1.0.4:80\"] }", &dns("\"*\"")), 11, "172.16.1.88:80/tcp is one port"),
        (every_port(&dns("\"any\""), ""), 11, "\"any\" is refused; expected the backends' port, 1 to 65535, or \"*\""),
        (every_port(KEPT, "health = { tcp = {} }\n"), 13, "add `port`"),
        (every_port(&dns("\"*\""), "health = { http = {} }\n"), 13, "add `port`"),
        (every_port("{ static = [\"10.1.0.4:0\"] }", ""), 11, "port 0 cannot be used; `*` is every port"),
        (every_port(KEPT, "").replace("10:*/tcp", "10:0/tcp"), 10, "or `*` as the port"),
        (every_port("{ static = [\"10.1.0.4:*\", \"10.1.0.4:*\"] }", ""), 11, "10.1.0.4:* stands there twice"),
        (every_port("{ static = [\"192.0.2.1:*\"] }", ""), 11, "outside `pod_networks`"),
        (every_port(KEPT, "snat = { addresses = [\"203.0.113.10\"] }\n"), 10, "`snat` of service `web`"),
        (every_port(KEPT, "") + "[api]\nhttp = \"203.0.113.10:9180\"\n", 10, "`http` of [api]"),
        (
            every_port(KEPT, "")
                + "[[bgp.peer]]\naddress = \"192.0.2.1\"\nremote_asn = 1\nlocal_address = \"203.0.113.10\"\n",
            10,
            "`local_address` of a peer",
        ),
    ] {
        let faults = faults(&text);
        assert_eq!(faults.len(), 1, "{text}: {faults:#?}");
        assert!(faults[0].starts_with(&format!("edge.toml:{line}: ")), "{words}: {}", faults[0]);
        assert!(faults[0].contains(words), "{words}: {}", faults[0]);
    }
}
