//! UPDATEs that both we and routecore take for sound must say the same to both.

use std::collections::BTreeSet;

use edge_ctl::bgp::wire::{self, Context, Message, Nlri};
use routecore::bgp::{
    message::{SessionConfig, UpdateMessage},
    nlri::afisafi::Nlri as Theirs,
};

use crate::targets;

/// As [`targets::update`], with a second opinion.
pub fn update(data: &[u8]) {
    targets::update(data);
    let Some((settings, body)) = data.split_first() else { return };
    // Without path identifiers, which the two show differently.
    let context = Context { add_path: wire::AddPath::None, ..targets::context(*settings) };
    let Some(frame) = targets::framed(2, body) else { return };
    let Ok(Message::Update(ours)) = wire::decode(frame.clone().into(), context) else { return };
    if !ours.problems.is_empty() {
        return;
    }
    let session = if context.four_octet_as { SessionConfig::modern() } else { SessionConfig::legacy() };
    let Ok(theirs) = UpdateMessage::from_octets(frame, &session) else { return };
    let (Ok(announced), Ok(withdrawn)) = (theirs.announcements_vec(), theirs.withdrawals_vec()) else { return };
    let ours_announced = ours.announced.iter().flat_map(|announcement| &announcement.prefixes);
    assert_eq!(texts(ours_announced), unicast(&announced), "announced: {ours:?}");
    assert_eq!(texts(ours.withdrawn.iter()), unicast(&withdrawn), "withdrawn: {ours:?}");
    if let Ok(Some(med)) = theirs.multi_exit_disc()
        && !announced.is_empty()
    {
        assert_eq!(ours.attributes.med, Some(med.0), "{ours:?}");
    }
}

fn texts<'a>(prefixes: impl Iterator<Item = &'a Nlri>) -> BTreeSet<String> {
    prefixes.map(|nlri| nlri.prefix.to_string()).collect()
}

fn unicast<T: AsRef<[u8]>>(all: &[Theirs<T>]) -> BTreeSet<String> {
    all.iter()
        .filter_map(|nlri| match nlri {
            Theirs::Ipv4Unicast(prefix) => Some(prefix.to_string()),
            Theirs::Ipv6Unicast(prefix) => Some(prefix.to_string()),
            _ => None,
        })
        .collect()
}
