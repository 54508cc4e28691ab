//! One test for each class of bug that BGP parsers are known for: the CVE lists of FRR, BIRD, GoBGP and OpenBGPD.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first broken assumption")]

use edge_ctl::bgp::wire::{
    self, AddPath, AsPath, Attributes, Context, Family, Message, Notification, Open, Segment, Update,
};

const CONTEXT: Context = Context { four_octet_as: true, internal: false, extended: false, add_path: AddPath::None };
const ORIGIN: &[u8] = &[0x40, 1, 1, 0];
const AS_PATH: &[u8] = &[0x40, 2, 6, 2, 1, 0, 0, 0xfc, 0x01];
const NEXT_HOP: &[u8] = &[0x40, 3, 4, 10, 0, 0, 2];
/// 10.1.2.0/24.
const NLRI: &[u8] = &[24, 10, 1, 2];

fn framed(kind: u8, body: &[u8]) -> Vec<u8> {
    let mut message = vec![0xff; 16];
    message.extend(u16::try_from(19 + body.len()).unwrap().to_be_bytes());
    message.push(kind);
    message.extend(body);
    message
}

fn update(withdrawn: &[u8], attributes: &[&[u8]], nlri: &[u8]) -> Result<Update, Notification> {
    let attributes = attributes.concat();
    let mut body = u16::try_from(withdrawn.len()).unwrap().to_be_bytes().to_vec();
    body.extend(withdrawn);
    body.extend(u16::try_from(attributes.len()).unwrap().to_be_bytes());
    body.extend(attributes);
    body.extend(nlri);
    of_body(&body)
}

fn of_body(body: &[u8]) -> Result<Update, Notification> {
    match wire::decode(framed(2, body).into(), CONTEXT)? {
        Message::Update(update) => Ok(*update),
        other => panic!("{other:?}"),
    }
}

fn announced(update: &Update) -> Vec<String> {
    update.announced.iter().flat_map(|it| &it.prefixes).map(|nlri| nlri.prefix.to_string()).collect()
}

fn withdrawn(update: &Update) -> Vec<String> {
    update.withdrawn.iter().map(|nlri| nlri.prefix.to_string()).collect()
}

/// FRR CVE-2022-40302, CVE-2023-46752, CVE-2023-46753: an attribute's length against all attributes' and the buffer's.
#[test]
fn an_attribute_that_ends_behind_all_attributes_never_reads_what_follows_them() {
    let overruns: [&[u8]; 6] = [
        // One more than is left, as far as a length goes, and the same with two octets of length.
        &[0xc0, 8, 5, 0, 0, 0, 1],
        &[0xc0, 8, 0xff, 0, 0, 0, 1],
        &[0xd0, 8, 0, 5, 0, 0, 0, 1],
        &[0xd0, 8, 0xff, 0xff, 0, 0, 0, 1],
        // Headers that are cut off.
        &[0xd0, 8, 0],
        &[0xc0, 8],
    ];
    for overrun in overruns {
        let update = update(&[], &[ORIGIN, AS_PATH, NEXT_HOP, overrun], NLRI).unwrap();
        assert_eq!((announced(&update), withdrawn(&update)), (vec![], vec!["10.1.2.0/24".to_owned()]), "{overrun:?}");
        assert!(update.attributes.communities.is_empty(), "{overrun:?}");
    }
    // All attributes, and all withdrawn routes, beyond the message.
    for body in
        [&[0, 0, 0, 9, 0x40, 1, 1, 0][..], &[0, 9, 24, 10, 1, 2, 0, 0], &[0xff, 0xff, 0, 0], &[0, 0, 0xff, 0xff]]
    {
        assert_eq!(of_body(body).unwrap_err().code, 3, "{body:?}");
    }
}

/// FRR CVE-2022-40318, CVE-2022-43681: lengths of optional parameters, in one octet and in two (RFC 9072).
#[test]
fn optional_parameters_that_contradict_their_lengths_are_refused_and_sound_ones_are_read_in_both_forms() {
    let fixed = [4, 0xfc, 1, 0, 90, 10, 0, 0, 2];
    let open = |rest: &[u8]| -> Result<Open, Notification> {
        match wire::decode(framed(1, &[&fixed[..], rest].concat()).into(), CONTEXT)? {
            Message::Open(open) => Ok(open),
            other => panic!("{other:?}"),
        }
    };
    let capabilities: &[u8] = &[1, 4, 0, 2, 0, 1, 65, 4, 0, 0, 0xfc, 1];
    let length = u8::try_from(capabilities.len()).unwrap();
    let short = [&[length + 2, 2, length][..], capabilities].concat();
    let long = [&[255, 255, 0, length + 3, 2, 0, length][..], capabilities].concat();
    for sound in [&short, &long] {
        let open = open(sound).unwrap();
        assert_eq!((open.families(), open.four_octet_as()), (vec![Family::Ipv6], true), "{sound:?}");
    }
    for (why, wrong) in [
        ("beyond the message", &[200, 2, 6, 1, 4, 0, 2, 0, 1][..]),
        ("short of the message", &[2, 2, 6, 1, 4, 0, 2, 0, 1]),
        ("a parameter beyond all of them", &[8, 2, 200, 1, 4, 0, 2, 0, 1]),
        ("a parameter without a length", &[1, 2]),
        ("a capability beyond its parameter", &[8, 2, 6, 1, 40, 0, 2, 0, 1]),
        ("a capability without a length", &[3, 2, 1, 1]),
        ("extended, without a length", &[255, 255]),
        ("extended, half a length", &[255, 255, 0]),
        ("extended, beyond the message", &[255, 255, 0xff, 0xff, 2, 0, 6, 1, 4, 0, 2, 0, 1]),
        ("extended, a parameter beyond all of them", &[255, 255, 0, 9, 2, 0xff, 0xff, 1, 4, 0, 2, 0, 1]),
        ("extended, a parameter with half a length", &[255, 255, 0, 2, 2, 0]),
    ] {
        let refused = open(wrong).expect_err(why);
        assert!([1, 2].contains(&refused.code), "{why}: {refused}");
    }
}

/// FRR CVE-2023-41358, GoBGP CVE-2023-46565 and kin: lengths of the next hop in MP_REACH_NLRI.
#[test]
fn a_next_hop_of_mp_reach_has_a_length_of_its_family_or_costs_the_session() {
    for length in 0u8..=64 {
        let mut value = vec![0, 2, 1, length];
        value.extend((0..length).map(|octet| if octet % 16 == 0 { 0xfd } else { 0 }));
        value.extend([0, 16, 0xfd, 0x01]);
        let reach = [&[0x80, 14, u8::try_from(value.len()).unwrap()][..], &value].concat();
        let result = update(&[], &[ORIGIN, AS_PATH, &reach], &[]);
        if [16, 32].contains(&length) {
            assert_eq!(announced(&result.unwrap()), ["fd01::/16"], "{length} octets");
        } else {
            let found = result.map(|update| announced(&update));
            assert!(found.as_ref().is_err_and(|refused| refused.code == 3), "{length} octets: {found:?}");
        }
    }
    // Cut off inside the next hop, in the reserved octet's place, and before anything.
    for value in [&[0, 2, 1, 16, 0xfd, 0][..], &[0, 2, 1], &[0, 2], &[]] {
        let reach = [&[0x80, 14, u8::try_from(value.len()).unwrap()][..], value].concat();
        assert_eq!(update(&[], &[ORIGIN, AS_PATH, &reach], &[]).unwrap_err().code, 3, "{value:?}");
    }
}

/// FRR and BIRD: segments of no numbers, wherever they stand.
#[test]
fn an_as_path_segment_of_no_numbers_withdraws_wherever_it_stands() {
    for path in [
        &[0x40, 2, 2, 2, 0][..],
        &[0x40, 2, 8, 2, 0, 2, 1, 0, 0, 0xfc, 1],
        &[0x40, 2, 8, 2, 1, 0, 0, 0xfc, 1, 2, 0],
        &[0x40, 2, 8, 2, 1, 0, 0, 0xfc, 1, 1, 0],
    ] {
        let update = update(&[], &[ORIGIN, path, NEXT_HOP], NLRI).unwrap();
        assert_eq!((announced(&update).len(), withdrawn(&update)), (0, vec!["10.1.2.0/24".to_owned()]), "{path:?}");
    }
    // An empty path is none of these: it is what internal peers send.
    let internal = Context { internal: true, ..CONTEXT };
    let body = [&[0, 0, 0, 14][..], ORIGIN, &[0x40, 2, 0], NEXT_HOP, NLRI].concat();
    let Message::Update(update) = wire::decode(framed(2, &body).into(), internal).unwrap() else { panic!("an UPDATE") };
    assert_eq!((update.problems.len(), update.attributes.as_path.length()), (0, 0));
}

/// FRR CVE-2023-38802, CVE-2023-47234, CVE-2023-47235: what a malformed attribute does to the rest of its message.
#[test]
fn a_malformed_attribute_withdraws_both_families_keeps_withdrawals_and_is_no_end_of_rib() {
    let broken: &[u8] = &[0xc0, 8, 3, 0, 0, 1];
    let unreach: &[u8] = &[0x80, 15, 6, 0, 2, 1, 16, 0xfd, 0x07];
    let mut value = vec![0, 2, 1, 16, 0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2];
    value.extend([0, 16, 0xfd, 0x01]);
    let reach = [&[0x80, 14, u8::try_from(value.len()).unwrap()][..], &value].concat();
    // Before, between and behind the attributes that carry prefixes: the order must not matter.
    for order in [[broken, unreach, &reach], [unreach, broken, &reach], [unreach, &reach, broken]] {
        let attributes = [&[ORIGIN, AS_PATH, NEXT_HOP][..], &order].concat();
        let update = update(&[24, 10, 9, 9], &attributes, NLRI).unwrap();
        let mut gone = withdrawn(&update);
        gone.sort();
        assert_eq!(gone, ["10.1.2.0/24", "10.9.9.0/24", "fd01::/16", "fd07::/16"], "{order:?}");
        assert_eq!((announced(&update).len(), update.end_of_rib), (0, None));
    }
    for alone in [&[broken][..], &[&[0xe0, 0x63][..]], &[&[0x80, 15, 3, 0, 2, 1][..], broken]] {
        let result = update(&[], alone, &[]);
        assert!(result.as_ref().is_ok_and(|update| update.end_of_rib.is_none()) || result.is_err(), "{result:?}");
    }
}

/// A prefix that is withdrawn and announced in one message is announced (RFC 4271 4.3).
#[test]
fn a_prefix_withdrawn_and_announced_at_once_is_in_both_lists_so_that_the_announcement_is_applied_last() {
    let update = update(NLRI, &[ORIGIN, AS_PATH, NEXT_HOP], NLRI).unwrap();
    assert_eq!(
        (announced(&update), withdrawn(&update)),
        (vec!["10.1.2.0/24".to_owned()], vec!["10.1.2.0/24".to_owned()])
    );
}

/// Several speakers have sent messages whose lengths had wrapped, or paths longer than a segment holds.
#[test]
fn what_does_not_fit_is_an_error_and_a_long_path_is_split_into_segments() {
    let prefix = ["10.1.2.0/24".parse().unwrap()];
    let next_hop = "10.0.0.1".parse().unwrap();
    let mut path = AsPath(vec![Segment::Sequence((1..=255).collect())]);
    path.prepend(64512, 3);
    let attributes = Attributes { as_path: path, ..Attributes::default() };
    let messages = wire::encode_announcements(&prefix, &attributes, next_hop, CONTEXT).unwrap();
    let Message::Update(read) = wire::decode(messages[0].clone(), CONTEXT).unwrap() else { panic!("an UPDATE") };
    assert_eq!((read.attributes.as_path.length(), read.problems.len()), (258, 0));
    assert!(read.attributes.as_path.to_string().starts_with("64512 64512 64512 1 2 3"));
    // Each step over the limit, up to where sixteen bits of length have wrapped.
    for communities in [1_000, 1_100, 16_000, 16_384, 20_000, 70_000] {
        let attributes = Attributes { communities: (0..communities).collect(), ..Attributes::default() };
        let encoded = wire::encode_announcements(&prefix, &attributes, next_hop, CONTEXT);
        match encoded {
            Ok(messages) => {
                assert!(communities <= 1_010 && messages.iter().all(|it| it.len() <= 4096), "{communities}")
            }
            Err(_) => assert!(communities > 1_010, "{communities}"),
        }
    }
}

/// OpenBGPD and GoBGP: what stands in a NOTIFICATION comes from the peer and is shown to people.
#[test]
fn a_notification_of_any_content_is_read_and_shown_without_harm() {
    let shown = |body: &[u8]| match wire::decode(framed(3, body).into(), CONTEXT) {
        Ok(Message::Notification(notification)) => notification.to_string(),
        other => panic!("{body:?}: {other:?}"),
    };
    assert_eq!(shown(&[6, 2, 5, b'h', b'e', b'l', b'l', b'o']), "Cease: Administrative Shutdown (6/2): \"hello\"");
    for (why, body) in [
        ("a text shorter than it says", &[6, 2, 200, b'h'][..]),
        ("no text at all", &[6, 2]),
        ("no UTF-8", &[6, 2, 2, 0xff, 0xfe]),
        ("a hard reset in a hard reset in one", &[6, 9, 6, 9, 6, 9, 6, 9]),
        ("a hard reset of nothing", &[6, 9, 6]),
        ("capabilities that end early", &[2, 7, 1, 40, 0]),
        ("codes that nobody has defined", &[99, 250, 1, 2, 3]),
    ] {
        let text = shown(body);
        assert!(!text.is_empty() && !text.chars().any(char::is_control), "{why}: {text:?}");
    }
    let escapes = shown(&[6, 2, 5, 0x1b, b'[', b'2', b'J', b'\n']);
    assert!(!escapes.chars().any(char::is_control), "{escapes:?}");
    // Shorter than any NOTIFICATION: its length is at fault, and nothing is read from behind it.
    for body in [&[][..], &[6]] {
        let refused = wire::decode(framed(3, body).into(), CONTEXT).unwrap_err();
        assert_eq!((refused.code, refused.subcode), (1, 2));
    }
}
