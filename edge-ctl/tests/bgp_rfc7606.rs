//! What becomes of malformed attributes, section by section of RFC 7606.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first broken assumption")]

use edge_ctl::bgp::wire::{self, AddPath, Context, Message, Notification, Update};

const ORIGIN: &[u8] = &[0x40, 1, 1, 0];
const AS_PATH: &[u8] = &[0x40, 2, 6, 2, 1, 0, 0, 0xfc, 0x01];
const NEXT_HOP: &[u8] = &[0x40, 3, 4, 10, 0, 0, 2];
const LOCAL_PREF: &[u8] = &[0x40, 5, 4, 0, 0, 0, 100];
/// 10.1.2.0/24.
const NLRI: &[u8] = &[24, 10, 1, 2];

const EXTERNAL: Context = Context { four_octet_as: true, internal: false, extended: false, add_path: AddPath::None };
const INTERNAL: Context = Context { internal: true, ..EXTERNAL };

/// An UPDATE with these attributes as they stand, whatever they say of themselves.
fn message(withdrawn: &[u8], attributes: &[&[u8]], nlri: &[u8]) -> Vec<u8> {
    let attributes = attributes.concat();
    let mut body = u16::try_from(withdrawn.len()).unwrap().to_be_bytes().to_vec();
    body.extend(withdrawn);
    body.extend(u16::try_from(attributes.len()).unwrap().to_be_bytes());
    body.extend(attributes);
    body.extend(nlri);
    let mut message = vec![0xff; 16];
    message.extend(u16::try_from(19 + body.len()).unwrap().to_be_bytes());
    message.push(2);
    message.extend(body);
    message
}

fn read(bytes: Vec<u8>, context: Context) -> Result<Update, Notification> {
    match wire::decode(bytes.into(), context)? {
        Message::Update(update) => Ok(*update),
        other => panic!("{other:?}"),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Accepted,
    Discarded,
    Withdrawn,
    Reset(u8, u8),
}
use Outcome::{Accepted, Discarded, Reset, Withdrawn};

/// What became of a message with 10.1.2.0/24 in its body.
fn outcome(bytes: Vec<u8>, context: Context) -> Outcome {
    match read(bytes, context) {
        Err(notification) => Reset(notification.code, notification.subcode),
        Ok(update) => {
            let prefix = "10.1.2.0/24".parse().unwrap();
            let announced = update.announced.iter().any(|announcement| announcement.prefixes.contains(&prefix));
            match (announced, update.withdrawn.contains(&prefix)) {
                (false, true) => Withdrawn,
                (true, false) if update.problems.is_empty() => Accepted,
                (true, false) => Discarded,
                both => panic!("announced, withdrawn: {both:?}; {update:?}"),
            }
        }
    }
}

fn with(attribute: &[u8], context: Context) -> Outcome {
    let mut list = vec![ORIGIN, AS_PATH, NEXT_HOP];
    if context.internal {
        list.push(LOCAL_PREF);
    }
    // In the place of the one of its kind, or at the end.
    let place = list.iter().position(|known| known[1] == attribute[1]);
    match place {
        Some(place) => list[place] = attribute,
        None => list.push(attribute),
    }
    outcome(message(&[], &list, NLRI), context)
}

#[test]
fn every_malformed_attribute_has_the_treatment_of_its_section() {
    let wrong_cluster = [0x80, 10, 3, 1, 2, 3];
    let cases: &[(&str, Context, &[u8], Outcome)] = &[
        ("7.1 ORIGIN: length other than 1", EXTERNAL, &[0x40, 1, 2, 0, 0], Withdrawn),
        ("7.1 ORIGIN: undefined value", EXTERNAL, &[0x40, 1, 1, 3], Withdrawn),
        ("7.2 AS_PATH: unrecognized segment type", EXTERNAL, &[0x40, 2, 6, 9, 1, 0, 0, 0xfc, 1], Withdrawn),
        ("7.2 AS_PATH: segment overrun", EXTERNAL, &[0x40, 2, 6, 2, 2, 0, 0, 0xfc, 1], Withdrawn),
        ("7.2 AS_PATH: segment underrun, one octet left", EXTERNAL, &[0x40, 2, 7, 2, 1, 0, 0, 0xfc, 1, 2], Withdrawn),
        ("7.2 AS_PATH: segment of length zero", EXTERNAL, &[0x40, 2, 2, 2, 0], Withdrawn),
        ("7.3 NEXT_HOP: length other than 4", EXTERNAL, &[0x40, 3, 3, 10, 0, 0], Withdrawn),
        ("7.4 MULTI_EXIT_DISC: length other than 4", EXTERNAL, &[0x80, 4, 3, 0, 0, 1], Withdrawn),
        ("7.5 LOCAL_PREF from an internal peer: length other than 4", INTERNAL, &[0x40, 5, 3, 0, 0, 1], Withdrawn),
        ("7.6 ATOMIC_AGGREGATE: length other than 0", EXTERNAL, &[0x40, 6, 1, 0], Discarded),
        ("7.7 AGGREGATOR: length other than 8", EXTERNAL, &[0xc0, 7, 6, 0xfc, 1, 10, 0, 0, 2], Discarded),
        ("7.8 COMMUNITIES: length no multiple of 4", EXTERNAL, &[0xc0, 8, 3, 0, 0, 1], Withdrawn),
        ("7.9 ORIGINATOR_ID from an internal peer: length other than 4", INTERNAL, &[0x80, 9, 3, 1, 1, 1], Withdrawn),
        ("7.10 CLUSTER_LIST from an internal peer: length no multiple of 4", INTERNAL, &wrong_cluster, Withdrawn),
        (
            "7.14 EXTENDED COMMUNITIES: length no multiple of 8",
            EXTERNAL,
            &[0xc0, 16, 7, 0, 2, 0, 0, 0, 0, 1],
            Withdrawn,
        ),
        ("RFC 8092 5 LARGE COMMUNITIES: length no multiple of 12", EXTERNAL, &[0xc0, 32, 4, 0, 0, 0, 1], Withdrawn),
        ("3 (c) flags of ORIGIN that contradict the registry", EXTERNAL, &[0xc0, 1, 1, 0], Withdrawn),
        ("3 (c) an unknown well-known attribute", EXTERNAL, &[0x40, 99, 1, 0], Withdrawn),
        ("an unknown optional transitive attribute is none of our business", EXTERNAL, &[0xc0, 99, 1, 7], Accepted),
        ("an unknown optional non-transitive attribute is ignored", EXTERNAL, &[0x80, 99, 1, 7], Accepted),
    ];
    for (name, context, attribute, expected) in cases {
        assert_eq!(with(attribute, *context), *expected, "{name}");
    }
}

#[test]
fn attributes_that_are_an_internal_peer_s_alone_are_discarded_from_an_external_one() {
    // 7.5, 7.9 and 7.10.
    let list: [&[u8]; 3] = [&[0x40, 5, 4, 0, 0, 0, 7], &[0x80, 9, 4, 1, 1, 1, 1], &[0x80, 10, 4, 1, 1, 1, 1]];
    let all: Vec<&[u8]> = [ORIGIN, AS_PATH, NEXT_HOP].into_iter().chain(list).collect();
    let update = read(message(&[], &all, NLRI), EXTERNAL).unwrap();
    assert_eq!(update.announced.len(), 1);
    let kept = &update.attributes;
    assert_eq!((kept.local_pref, kept.originator_id, kept.cluster_list_length), (None, None, 0));
    let update = read(message(&[], &all, NLRI), INTERNAL).unwrap();
    let kept = &update.attributes;
    assert_eq!((kept.local_pref, kept.cluster_list_length), (Some(7), 1));
    assert!(kept.originator_id.is_some());
}

#[test]
fn a_missing_mandatory_attribute_is_treated_as_a_withdrawal() {
    for (name, list) in
        [("ORIGIN", [AS_PATH, NEXT_HOP]), ("AS_PATH", [ORIGIN, NEXT_HOP]), ("NEXT_HOP", [ORIGIN, AS_PATH])]
    {
        assert_eq!(outcome(message(&[], &list, NLRI), EXTERNAL), Withdrawn, "{name}");
    }
}

#[test]
fn of_an_attribute_that_stands_there_twice_the_first_counts_and_mp_reach_twice_resets() {
    // 3 (g).
    let second: &[u8] = &[0x40, 1, 1, 2];
    let update = read(message(&[], &[ORIGIN, AS_PATH, NEXT_HOP, second], NLRI), EXTERNAL).unwrap();
    assert_eq!(update.attributes.origin, wire::Origin::Igp);
    assert!(update.withdrawn.is_empty(), "{update:?}");
    let mp: &[u8] = &[0x80, 15, 3, 0, 2, 1];
    assert_eq!(outcome(message(&[], &[ORIGIN, AS_PATH, NEXT_HOP, mp, mp], NLRI), EXTERNAL), Reset(3, 1));
}

#[test]
fn lengths_that_contradict_each_other_keep_the_prefixes_where_they_can_be_found() {
    // 4: the last attribute says that it is longer than what is left of all attributes.
    let overrun: &[u8] = &[0xc0, 8, 40, 0, 0, 0, 1];
    assert_eq!(with(overrun, EXTERNAL), Withdrawn);
    // 4: one octet is left where an attribute would begin.
    assert_eq!(outcome(message(&[], &[ORIGIN, AS_PATH, NEXT_HOP, &[0xc0]], NLRI), EXTERNAL), Withdrawn);
    // The length of all attributes goes beyond the message: the prefixes cannot be found (RFC 4271 6.3).
    let mut bytes = message(&[], &[ORIGIN, AS_PATH, NEXT_HOP], NLRI);
    bytes[22] = 0xff;
    assert_eq!(outcome(bytes, EXTERNAL), Reset(3, 1));
}

#[test]
fn prefixes_that_cannot_be_read_reset_the_session() {
    // 5.3: a length beyond 32, and one that goes beyond the field.
    for nlri in [&[33, 10, 1, 2, 0, 0][..], &[24, 10, 1]] {
        let found = outcome(message(&[], &[ORIGIN, AS_PATH, NEXT_HOP], nlri), EXTERNAL);
        assert_eq!(found, Reset(3, 10), "NLRI {nlri:?}");
        let found = outcome(message(nlri, &[], &[]), EXTERNAL);
        assert!(matches!(found, Reset(3, 1 | 10)), "withdrawn {nlri:?}: {found:?}");
    }
}

#[test]
fn a_next_hop_of_mp_reach_with_an_impossible_length_resets_the_session() {
    // 7.11: the prefixes behind it cannot be located. AFI 2, SAFI 1, next hop of 5 octets.
    let mut reach = vec![0x80, 14, 10, 0, 2, 1, 5, 1, 2, 3, 4, 5];
    reach[2] = u8::try_from(reach.len() - 3).unwrap();
    let found = outcome(message(&[], &[ORIGIN, AS_PATH, &reach], &[]), EXTERNAL);
    assert!(matches!(found, Reset(3, _)), "{found:?}");
}

#[test]
fn the_strongest_treatment_wins_and_every_problem_is_told() {
    // 3 (h): one attribute to be discarded, one that withdraws.
    let (discard, withdraw): (&[u8], &[u8]) = (&[0x40, 6, 1, 0], &[0xc0, 8, 3, 0, 0, 1]);
    let update = read(message(&[], &[ORIGIN, AS_PATH, NEXT_HOP, discard, withdraw], NLRI), EXTERNAL).unwrap();
    assert!(update.announced.is_empty());
    let mut told: Vec<u8> = update.problems.iter().map(|problem| problem.attribute).collect();
    told.sort();
    assert_eq!(told, [6, 8]);
}

#[test]
fn path_identifiers_are_read_where_they_were_negotiated() {
    let bytes = message(&[], &[ORIGIN, AS_PATH, NEXT_HOP], &[0, 0, 0, 7, 24, 10, 1, 2]);
    let update = read(bytes, Context { add_path: AddPath::Ipv4, ..EXTERNAL }).unwrap();
    let nlri = update.announced[0].prefixes[0];
    assert_eq!((nlri.path, nlri.prefix.to_string()), (7, "10.1.2.0/24".to_owned()));
}
