//! What must hold of any bytes at all, one function for each kind of message. They panic where it does not.
//!
//! The long runs (`cargo fuzz`, see Cargo.toml) and the short one of every test run (`edge-ctl/tests/bgp_fuzz.rs`) call the
//! same functions.

use edge_ctl::bgp::wire::{
    self, AddPath, Attributes, Capability, Context, Family, Message, Notification, Open, Problem, Refresh, Update,
};

/// A target: its name, which is its corpus folder's, and its function.
pub type Target = (&'static str, fn(&[u8]));

/// Every target.
pub const TARGETS: [Target; 5] = [
    ("open", open),
    ("update", update),
    ("notification", notification),
    ("route_refresh", route_refresh),
    ("stream", stream),
];

/// A session's settings out of the first octet of an input.
pub fn context(octet: u8) -> Context {
    let add_path = [AddPath::None, AddPath::Ipv4, AddPath::Ipv6, AddPath::Both][usize::from(octet >> 2 & 3)];
    Context { four_octet_as: octet & 1 == 0, internal: octet & 2 != 0, extended: true, add_path }
}

/// `body` behind a good header; `None` where no message is so long.
pub fn framed(kind: u8, body: &[u8]) -> Option<Vec<u8>> {
    let length = u16::try_from(19 + body.len()).ok()?;
    let mut message = vec![0xff; 16];
    message.extend(length.to_be_bytes());
    message.push(kind);
    message.extend(body);
    Some(message)
}

/// Decodes `body`; a refusal must be one that RFC 4271 6 has for such a message.
fn decode(kind: u8, body: &[u8], context: Context) -> Option<Message> {
    let frame = framed(kind, body)?;
    match wire::decode(frame.into(), context) {
        Ok(message) => Some(message),
        Err(notification) => {
            // 1: header, 7: ROUTE-REFRESH (RFC 7313 5).
            let of_kind = match kind {
                1 => 2,
                2 => 3,
                5 => 7,
                _ => 1,
            };
            assert!([1, of_kind].contains(&notification.code), "type {kind} refused by {notification}");
            again(&notification);
            None
        }
    }
}

/// What is said in a NOTIFICATION can be sent and shown.
fn again(notification: &Notification) {
    assert!(!notification.to_string().is_empty());
    let bytes = notification.encode().unwrap_or_else(|error| panic!("{notification}: {error}"));
    match wire::decode(bytes, context(0)) {
        Ok(Message::Notification(read)) => {
            let facts = |it: &Notification| (it.code, it.subcode, it.data.clone());
            assert_eq!(facts(&read), facts(notification));
        }
        other => panic!("{notification} is read as {other:?}"),
    }
}

/// An OPEN that is understood can be said again, and is the same.
pub fn open(data: &[u8]) {
    let Some(Message::Open(open)) = decode(1, data, context(0)) else { return };
    // Questions that the state machine asks.
    let _ = (open.families(), open.receives_paths(), open.sends_paths(), open.long_lived(), open.extended_next_hop());
    assert!(open.roles().count() <= open.capabilities.len());
    open.capabilities.iter().for_each(|capability| assert!(!capability.to_string().is_empty()));
    // Of capabilities that we do not know the number alone is kept, and none is ever sent.
    let known = |capability: &Capability| !matches!(capability, Capability::Other(_));
    let open = Open { capabilities: open.capabilities.into_iter().filter(known).collect(), ..open };
    // Capabilities that do not fit an OPEN of ours are an error, never a message that says something else.
    let Some(said) = said_again(&open) else { return };
    let facts = |it: &Open| {
        (it.asn, it.hold, it.router_id, it.families(), it.restart().cloned(), it.receives_paths(), it.sends_paths())
    };
    assert_eq!(facts(&said), facts(&open));
    let lists = |it: &Open| (it.long_lived(), it.extended_next_hop(), it.roles().collect::<Vec<_>>());
    assert_eq!(lists(&said), lists(&open));
    // Lists that we leave out because nothing of them is ours are left out once.
    assert_eq!(said_again(&said).as_ref(), Some(&said));
}

fn said_again(open: &Open) -> Option<Open> {
    match wire::decode(open.encode().ok()?, context(0)) {
        Ok(Message::Open(read)) => Some(read),
        other => panic!("{open:?} is read as {other:?}"),
    }
}

/// An UPDATE that is understood keeps to RFC 7606, and what it announces can be said again and is the same.
pub fn update(data: &[u8]) {
    let Some((settings, body)) = data.split_first() else { return };
    let context = context(*settings);
    let Some(Message::Update(update)) = decode(2, body, context) else { return };
    sound(&update);
    for announcement in &update.announced {
        let of = |family| {
            let all = announcement.prefixes.iter().map(|nlri| nlri.prefix);
            all.filter(|prefix| Family::of(prefix) == family).collect::<Vec<_>>()
        };
        for family in Family::ALL {
            let prefixes = of(family);
            // IPv6 prefixes with an IPv4 next hop can be read and are never used.
            if prefixes.is_empty() || (family == Family::Ipv6 && announcement.next_hop.is_ipv4()) {
                continue;
            }
            let plain = Context { add_path: AddPath::None, ..context };
            let Ok(messages) = wire::encode_announcements(&prefixes, &update.attributes, announcement.next_hop, plain)
            else {
                continue;
            };
            let (mut said, mut attributes) = (Vec::new(), Vec::new());
            for message in messages {
                assert!(message.len() <= usize::from(wire::MAX_MESSAGE), "{} octets", message.len());
                match wire::decode(message, plain) {
                    Ok(Message::Update(read)) => {
                        assert_eq!(read.problems, [], "of our own making: {update:?}");
                        assert!(read.announced.iter().all(|it| it.next_hop == announcement.next_hop), "{read:?}");
                        said.extend(read.announced.iter().flat_map(|it| &it.prefixes).map(|nlri| nlri.prefix));
                        attributes.push(read.attributes);
                    }
                    other => panic!("{update:?} is read as {other:?}"),
                }
            }
            assert_eq!(said, prefixes);
            let told = told(&update.attributes, plain);
            assert!(attributes.iter().all(|read| *read == told), "{attributes:?} instead of {told:?}");
        }
    }
}

/// What a receiver sees of attributes that are said again: an internal peer's preference is there in any case, and what a
/// reflector added is not passed on.
fn told(attributes: &Attributes, context: Context) -> Attributes {
    let mut told = attributes.clone();
    if context.internal {
        told.local_pref.get_or_insert(100);
    }
    (told.originator_id, told.cluster_list_length) = (None, 0);
    told
}

fn sound(update: &Update) {
    if update.problems.iter().any(|problem: &Problem| problem.withdraws) {
        assert!(update.announced.is_empty(), "treat-as-withdraw, and still announced: {update:?}");
    }
    let announced = update.announced.iter().flat_map(|announcement| &announcement.prefixes);
    for nlri in announced.chain(&update.withdrawn) {
        assert_eq!(nlri.prefix, nlri.prefix.trunc(), "host bits");
    }
    if update.end_of_rib.is_some() {
        assert!(update.announced.is_empty() && update.withdrawn.is_empty(), "{update:?}");
    }
    assert!(!update.attributes.as_path.0.is_empty() || update.attributes.as_path.to_string().is_empty());
    let _ = update.attributes.community_texts();
}

/// A NOTIFICATION is never refused for its content, can be shown, and can be said again.
pub fn notification(data: &[u8]) {
    match decode(3, data, context(0)) {
        Some(Message::Notification(notification)) => again(&notification),
        other => assert!(data.len() < 2 || data.len() > 65_516, "{other:?}"),
    }
}

/// A ROUTE-REFRESH is one that we know, or ignored, or of a wrong length.
pub fn route_refresh(data: &[u8]) {
    let Some(Message::RouteRefresh(asked)) = decode(5, data, context(0)) else { return };
    let Some((family, what)) = asked else { return };
    let bytes = wire::encode_route_refresh(family, what).unwrap();
    assert_eq!(bytes[19..], data[..4]);
    assert!(matches!(what, Refresh::Ask | Refresh::Begin | Refresh::End));
}

/// However a stream is cut into pieces, the same messages come out of it, and the same error ends it.
pub fn stream(data: &[u8]) {
    let Some((cut, octets)) = data.split_first() else { return };
    let whole = messages(octets, octets.len().max(1));
    let pieces = messages(octets, usize::from(cut % 37) + 1);
    assert_eq!(whole, pieces);
    let taken: usize = whole.0.iter().map(Vec::len).sum();
    assert!(taken <= octets.len());
    assert_eq!(whole.0.concat(), octets[..taken], "nothing is lost or made up");
    for frame in &whole.0 {
        assert!((19..=usize::from(wire::MAX_MESSAGE)).contains(&frame.len()));
        let _ = wire::decode(frame.clone().into(), context(*cut));
    }
}

/// Reads pieces of `size` octets as a connection does.
fn messages(octets: &[u8], size: usize) -> (Vec<Vec<u8>>, Option<(u8, u8)>) {
    let (mut buffer, mut frames) = (Vec::new(), Vec::new());
    for piece in octets.chunks(size) {
        buffer.extend(piece);
        loop {
            match wire::message_length(&buffer, wire::MAX_MESSAGE) {
                Ok(Some(length)) if buffer.len() >= length => frames.push(buffer.drain(..length).collect()),
                Ok(_) => break,
                Err(notification) => return (frames, Some((notification.code, notification.subcode))),
            }
        }
    }
    (frames, None)
}
