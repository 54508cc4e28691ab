//! Decoding what BIRD, FRR and GoBGP sent (fixtures/bgp/README.md), whole and damaged.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first broken assumption")]

use std::{fs, path::Path};

use bytes::Bytes;
use edge_ctl::bgp::wire::{self, Capability, Context, Family, Message, Notification, Open, Origin, Update};
use proptest::prelude::*;

const FILES: [&str; 4] = ["bird-internal", "bird-two-octet", "frr-external", "gobgp-external"];
const HEADER: usize = 19;

fn frames(name: &str) -> Vec<Bytes> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/fixtures/bgp/{name}.hex"));
    let text = fs::read_to_string(path).unwrap();
    text.lines()
        .map(|line| {
            let byte = |at: usize| u8::from_str_radix(&line[at..at + 2], 16).unwrap();
            (0..line.len()).step_by(2).map(byte).collect()
        })
        .collect()
}

fn context(name: &str) -> Context {
    Context {
        four_octet_as: name != "bird-two-octet",
        internal: name == "bird-internal",
        extended: false,
        add_path: wire::AddPath::None,
    }
}

fn messages(name: &str) -> Vec<Message> {
    frames(name).into_iter().map(|frame| wire::decode(frame, context(name)).unwrap()).collect()
}

fn open(name: &str) -> Open {
    let Some(Message::Open(open)) = messages(name).into_iter().next() else { panic!("{name} begins with an OPEN") };
    open
}

fn updates(name: &str) -> Vec<Update> {
    messages(name)
        .into_iter()
        .filter_map(|message| match message {
            Message::Update(update) => Some(*update),
            _ => None,
        })
        .collect()
}

/// The UPDATE that announces `prefix`, and its next hop.
fn announced(name: &str, prefix: &str) -> (Update, String) {
    let wanted = prefix.parse().unwrap();
    updates(name)
        .into_iter()
        .find_map(|update| {
            let found = update.announced.iter().find(|a| a.prefixes.contains(&wanted))?.next_hop.to_string();
            Some((update, found))
        })
        .unwrap_or_else(|| panic!("{name} announces {prefix}"))
}

fn goodbye(name: &str) -> Notification {
    let Some(Message::Notification(notification)) = messages(name).pop() else { panic!("{name} ends with a goodbye") };
    notification
}

#[test]
fn every_recorded_message_is_framed_and_decoded_without_complaint() {
    for name in FILES {
        for frame in frames(name) {
            assert_eq!(wire::message_length(&frame, wire::MAX_MESSAGE), Ok(Some(frame.len())));
        }
        assert!(updates(name).iter().all(|update| update.problems.is_empty()), "{name}");
    }
}

#[test]
fn opens_tell_the_as_number_and_the_families() {
    for (name, asn, hold) in [
        ("bird-internal", 64512, 240),
        ("bird-two-octet", 4_200_000_002, 240),
        ("frr-external", 64513, 180),
        ("gobgp-external", 4_200_000_002, 90),
    ] {
        let open = open(name);
        assert_eq!((open.asn, open.hold, open.router_id.to_string().as_str()), (asn, hold, "10.0.0.2"), "{name}");
        assert_eq!(open.families(), Family::ALL, "{name}");
        assert!(open.has(&Capability::RouteRefresh) && open.four_octet_as(), "{name}");
    }
}

#[test]
fn capabilities_that_we_do_not_use_are_kept_by_name() {
    let frr: Vec<String> = open("frr-external").capabilities.iter().map(Capability::to_string).collect();
    for name in ["fqdn", "add-path", "extended-message", "graceful-restart"] {
        assert!(frr.iter().any(|shown| shown.starts_with(name)), "{name} in {frr:?}");
    }
    let gobgp: Vec<String> = open("gobgp-external").capabilities.iter().map(Capability::to_string).collect();
    assert!(gobgp.iter().any(|shown| shown.starts_with("long-lived-graceful-restart")), "{gobgp:?}");
}

#[test]
fn an_internal_update_has_its_attributes() {
    let (update, next_hop) = announced("bird-internal", "10.1.2.0/26");
    assert_eq!(next_hop, "10.0.0.2");
    assert_eq!(update.attributes.local_pref, Some(150));
    assert_eq!(update.attributes.communities, [64512 << 16 | 100]);
    assert_eq!(update.attributes.as_path.length(), 0);
    assert!(update.announced.iter().any(|a| a.prefixes.contains(&"0.0.0.0/0".parse().unwrap())));
}

#[test]
fn ipv6_routes_come_by_multiprotocol_reach_with_their_next_hop_as_sent() {
    assert_eq!(announced("bird-internal", "fd01:2::/64").1, "fd00::2");
    assert_eq!(announced("gobgp-external", "fd01:2::/64").1, "fd00::2");
    assert_eq!(announced("frr-external", "fd01:2::/64").1, "::ffff:10.0.0.2");
}

#[test]
fn a_two_octet_path_is_completed_from_as4_path() {
    let (update, _) = announced("bird-two-octet", "10.1.2.0/26");
    assert_eq!(update.attributes.as_path.to_string(), "4200000002 4200000009");
}

#[test]
fn a_rich_external_update_has_its_attributes() {
    let (update, _) = announced("frr-external", "10.1.2.0/26");
    let attributes = update.attributes;
    assert_eq!(attributes.as_path.to_string(), "64513 65001 65002");
    assert_eq!((attributes.origin, attributes.med), (Origin::Incomplete, Some(50)));
    assert_eq!(attributes.communities, [64513 << 16 | 7, 0xffff_029a]);
    assert_eq!(announced("frr-external", "10.1.16.0/20").0.attributes.origin, Origin::Igp);
}

#[test]
fn withdrawals_of_both_families_are_read() {
    let withdrawn = |name: &str, prefix: &str| {
        let prefix = prefix.parse().unwrap();
        updates(name).iter().any(|update| update.withdrawn.contains(&prefix))
    };
    assert!(withdrawn("bird-internal", "10.1.3.0/26"));
    assert!(withdrawn("frr-external", "10.1.3.0/26"));
    assert!(withdrawn("gobgp-external", "10.1.2.0/26"));
    assert!(withdrawn("gobgp-external", "fd01:2::/64"));
}

#[test]
fn end_of_rib_is_recognised_for_both_families_and_in_nothing_else() {
    let ends = |name: &str| updates(name).iter().filter_map(|update| update.end_of_rib).collect::<Vec<_>>();
    for name in ["bird-internal", "bird-two-octet"] {
        let mut found = ends(name);
        found.sort_unstable();
        assert_eq!(found, Family::ALL, "{name}");
    }
    assert_eq!(ends("gobgp-external"), [], "GoBGP sends none to a peer without graceful restart");
}

#[test]
fn goodbyes_are_shown_with_their_texts() {
    for name in FILES {
        let shown = goodbye(name).to_string();
        assert_eq!(shown, "Cease: Administrative Shutdown (6/2): \"node maintenance\"", "{name}");
    }
}

/// Where the values of the attributes other than MP_REACH_NLRI and MP_UNREACH_NLRI lie in an UPDATE.
fn values(frame: &[u8]) -> Vec<std::ops::Range<usize>> {
    let short = |at: usize| usize::from(u16::from_be_bytes([frame[at], frame[at + 1]]));
    let mut at = HEADER + 2 + short(HEADER);
    let end = at + 2 + short(at);
    at += 2;
    let mut found = Vec::new();
    while at < end {
        let (flags, kind) = (frame[at], frame[at + 1]);
        let (length, start) =
            if flags & 0x10 == 0 { (usize::from(frame[at + 2]), at + 3) } else { (short(at + 2), at + 4) };
        if kind != 14 && kind != 15 {
            found.push(start..start + length);
        }
        at = start + length;
    }
    found
}

fn recorded_updates() -> Vec<(Bytes, Context)> {
    let of = |name: &'static str| frames(name).into_iter().map(move |frame| (frame, context(name)));
    FILES.into_iter().flat_map(of).filter(|(frame, _)| frame[18] == 2).collect()
}

/// A name for what an UPDATE says of a prefix, whatever the list it is in.
fn prefixes(update: &Update) -> Vec<wire::Nlri> {
    let announced = update.announced.iter().flat_map(|announcement| announcement.prefixes.iter().copied());
    let mut all: Vec<_> = announced.chain(update.withdrawn.iter().copied()).collect();
    all.sort_unstable();
    all
}

proptest! {
    #[test]
    fn a_damaged_attribute_never_resets_the_session_and_never_loses_a_prefix(
        which in any::<prop::sample::Index>(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let recorded = recorded_updates();
        let (frame, context) = which.get(&recorded);
        let places: Vec<usize> = values(frame).into_iter().flatten().collect();
        prop_assume!(!places.is_empty());
        let mut bytes = frame.to_vec();
        for (place, value) in damage {
            bytes[*place.get(&places)] = value;
        }
        let before = wire::decode(frame.clone(), *context);
        let after = wire::decode(bytes.into(), *context);
        let (Ok(Message::Update(before)), Ok(Message::Update(after))) = (before, after) else {
            return Err(TestCaseError::fail("RFC 7606 keeps the session"));
        };
        prop_assert_eq!(prefixes(&before), prefixes(&after));
        if after.problems.iter().any(|problem| problem.withdraws) {
            prop_assert!(after.announced.is_empty(), "treat-as-withdraw announces nothing");
        }
    }

    #[test]
    fn an_attribute_cut_short_by_its_length_withdraws_and_keeps_the_session(
        which in any::<prop::sample::Index>(),
        cut in any::<prop::sample::Index>(),
    ) {
        // Only UPDATEs without multiprotocol attributes: there a broken list could hide NLRI, and RFC 7606 5.3 resets.
        let recorded: Vec<_> = recorded_updates()
            .into_iter()
            .filter(|(frame, _)| !values(frame).is_empty() && !frame.windows(2).any(|pair| pair == [0x90, 14] || pair == [0x80, 14]))
            .collect();
        let (frame, context) = which.get(&recorded);
        let Some(last) = values(frame).pop() else { return Ok(()) };
        let mut bytes = frame.to_vec();
        bytes[last.start - 1] = 255 - cut.index(200) as u8;
        let Ok(Message::Update(update)) = wire::decode(bytes.into(), *context) else {
            return Err(TestCaseError::fail("RFC 7606 4 keeps the session"));
        };
        prop_assert!(update.announced.is_empty());
        prop_assert!(update.problems.iter().any(|problem| problem.withdraws));
    }

    #[test]
    fn no_recorded_message_panics_when_cut_or_damaged_anywhere(
        file in 0..FILES.len(),
        which in any::<prop::sample::Index>(),
        cut in any::<prop::sample::Index>(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
    ) {
        let name = FILES[file];
        let frames = frames(name);
        let mut bytes = which.get(&frames).to_vec();
        for (place, value) in damage {
            let place = place.index(bytes.len());
            bytes[place] = value;
        }
        let _ = wire::message_length(&bytes, wire::MAX_MESSAGE);
        let whole = wire::decode(bytes.clone().into(), context(name));
        if let Err(notification) = whole {
            prop_assert!((1..=7).contains(&notification.code));
            prop_assert!(notification.encode().is_ok());
        }
        bytes.truncate(cut.index(bytes.len()));
        prop_assert!(wire::decode(bytes.into(), context(name)).is_err(), "a message that is cut short is an error");
    }

    #[test]
    fn random_bodies_under_a_good_header_never_panic(kind in 0u8..8, body in prop::collection::vec(any::<u8>(), 0..300)) {
        let mut bytes = vec![0xff; 16];
        bytes.extend(((HEADER + body.len()) as u16).to_be_bytes());
        bytes.push(kind);
        bytes.extend(body);
        for internal in [false, true] {
            for four_octet_as in [false, true] {
                let context = Context { four_octet_as, internal, extended: false, add_path: wire::AddPath::None };
                let _ = wire::decode(bytes.clone().into(), context);
            }
        }
    }
}
