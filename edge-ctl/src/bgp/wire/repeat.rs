//! UPDATEs whose attributes were seen on the same session before: a full table has a few prefixes to a message and the
//! same attributes in many. Those are compared as bytes and not decoded again.
//!
//! What is remembered decoded without a remark, has no prefixes among its attributes (RFC 4760), and is what the whole
//! decoder makes of it; a message that is not entirely plain is left to that decoder.

use std::hash::{BuildHasher, RandomState};

use ipnet::{IpNet, Ipv4Net};

use super::{Nlri, Update};

/// Sets of attributes that are remembered of a session.
const SETS: usize = 64;
/// Longer ones are rare, and are decoded each time.
const LONGEST: usize = 1024;
/// Octets of a header; the type is the last.
const HEADER: usize = 19;
const UPDATE: u8 = 2;

/// Attributes of a session by their bytes, each with what somebody made of them.
#[derive(Debug)]
pub struct Recent<T> {
    sets: Vec<Option<(Box<[u8]>, T)>>,
    hasher: RandomState,
}

impl<T> Default for Recent<T> {
    fn default() -> Self {
        Self { sets: Vec::new(), hasher: RandomState::new() }
    }
}

/// The three parts of an UPDATE (RFC 4271 4.3).
struct Parts<'a> {
    withdrawn: &'a [u8],
    attributes: &'a [u8],
    announced: &'a [u8],
}

impl<T> Recent<T> {
    /// What was made of the attributes of this message, where they are known; its prefixes are put into the lists. `frame`
    /// is of a session without IPv4 path identifiers.
    pub fn find(&self, frame: &[u8], withdrawn: &mut Vec<Nlri>, announced: &mut Vec<Nlri>) -> Option<&T> {
        let parts = parts(frame)?;
        let (bytes, known) = self.sets.get(self.place(parts.attributes))?.as_ref()?;
        let same = **bytes == *parts.attributes && !parts.announced.is_empty();
        (same && read(parts.withdrawn, withdrawn) && read(parts.announced, announced)).then_some(known)
    }

    /// Remembers what was made of the attributes of a message that decoded to `update`.
    pub fn remember(&mut self, frame: &[u8], update: &Update, made: T) {
        let Some(Parts { attributes, announced, .. }) = parts(frame) else { return };
        let plain = update.problems.is_empty() && update.announced.len() == 1 && !announced.is_empty();
        let own = update.announced.first().map_or(0, |all| all.prefixes.len());
        let (mut count, mut plain_again) = (Vec::new(), false);
        if plain && attributes.len() <= LONGEST {
            plain_again = read(announced, &mut count);
        }
        // As many prefixes as the body has: none stand among the attributes.
        if !plain_again || count.len() != own {
            return;
        }
        if self.sets.is_empty() {
            self.sets.resize_with(SETS, || None);
        }
        let place = self.place(attributes);
        if let Some(set) = self.sets.get_mut(place) {
            *set = Some((attributes.into(), made));
        }
    }

    fn place(&self, attributes: &[u8]) -> usize {
        self.hasher.hash_one(attributes) as usize % SETS
    }
}

fn parts(frame: &[u8]) -> Option<Parts<'_>> {
    let (header, body) = frame.split_at_checked(HEADER)?;
    if header.last() != Some(&UPDATE) {
        return None;
    }
    let (withdrawn, rest) = counted(body)?;
    let (attributes, announced) = counted(rest)?;
    Some(Parts { withdrawn, attributes, announced })
}

/// What the two octets in front give the length of, and the rest.
fn counted(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = bytes.split_first_chunk::<2>()?;
    rest.split_at_checked(usize::from(u16::from_be_bytes(*length)))
}

/// Reads IPv4 prefixes; false: they are not as they should be.
fn read(mut bytes: &[u8], list: &mut Vec<Nlri>) -> bool {
    while let Some((length, rest)) = bytes.split_first() {
        let Some((octets, rest)) = rest.split_at_checked(usize::from(length.div_ceil(8))) else { return false };
        let mut address = [0; 4];
        match address.get_mut(..octets.len()) {
            Some(start) => start.copy_from_slice(octets),
            None => return false,
        }
        let Ok(prefix) = Ipv4Net::new(address.into(), *length) else { return false };
        list.push(Nlri::from(IpNet::V4(prefix.trunc())));
        bytes = rest;
    }
    true
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{
        super::{AddPath, Context, Message, decode},
        *,
    };

    const CONTEXT: Context =
        Context { four_octet_as: false, internal: false, extended: false, add_path: AddPath::None };

    fn frame(withdrawn: &[u8], attributes: &[u8], announced: &[u8]) -> Vec<u8> {
        let length = |bytes: &[u8]| u16::try_from(bytes.len()).unwrap().to_be_bytes();
        let body = [&length(withdrawn)[..], withdrawn, &length(attributes), attributes, announced].concat();
        let total = u16::try_from(HEADER + body.len()).unwrap().to_be_bytes();
        [&[0xff; 16][..], &total, &[UPDATE], &body].concat()
    }

    /// ORIGIN IGP, AS_PATH 64513, NEXT_HOP 10.0.0.2.
    fn attributes() -> Vec<u8> {
        let mut attributes = vec![0x40, 1, 1, 0, 0x40, 2, 4, 2, 1];
        attributes.extend(64513u16.to_be_bytes());
        attributes.extend([0x40, 3, 4, 10, 0, 0, 2]);
        attributes
    }

    fn decoded(frame: &[u8]) -> Option<Update> {
        match decode(frame.to_vec().into(), CONTEXT) {
            Ok(Message::Update(update)) => Some(*update),
            _ => None,
        }
    }

    proptest! {
        #[test]
        fn what_is_found_is_what_the_decoder_would_have_said(
            withdrawn in proptest::collection::vec(any::<u8>(), 0..12),
            announced in proptest::collection::vec(any::<u8>(), 0..12),
            sound in proptest::collection::vec((0u8..=32, any::<[u8; 4]>()), 0..4),
        ) {
            let octets = |(length, address): &(u8, [u8; 4])| {
                [&[*length][..], &address[..usize::from(length.div_ceil(8))]].concat()
            };
            let sound: Vec<u8> = sound.iter().flat_map(octets).collect();
            let mut recent = Recent::default();
            let first = frame(&[], &attributes(), &[24, 10, 1, 2]);
            recent.remember(&first, &decoded(&first).unwrap(), "made");
            for message in [frame(&withdrawn, &attributes(), &announced), frame(&[], &attributes(), &sound), first] {
                let (mut gone, mut new) = (Vec::new(), Vec::new());
                if recent.find(&message, &mut gone, &mut new).is_some() {
                    let update = decoded(&message);
                    prop_assert!(update.is_some(), "the decoder would have reset the session: {message:02x?}");
                    let update = update.unwrap();
                    prop_assert_eq!(&update.withdrawn, &gone);
                    prop_assert_eq!(&update.announced[0].prefixes, &new);
                    prop_assert!(update.problems.is_empty());
                }
            }
        }
    }

    #[test]
    fn only_plain_messages_with_the_same_attributes_are_found() {
        let mut recent = Recent::default();
        let first = frame(&[], &attributes(), &[24, 10, 1, 2]);
        let find = |recent: &Recent<u8>, frame: &[u8]| recent.find(frame, &mut Vec::new(), &mut Vec::new()).copied();
        assert_eq!(find(&recent, &first), None);
        recent.remember(&first, &decoded(&first).unwrap(), 7);
        assert_eq!(find(&recent, &frame(&[16, 10, 9], &attributes(), &[24, 10, 1, 3, 8, 11])), Some(7));
        let mut other = attributes();
        other[3] = 1;
        assert_eq!(find(&recent, &frame(&[], &other, &[24, 10, 1, 3])), None, "another ORIGIN");
        assert_eq!(find(&recent, &frame(&[], &attributes(), &[])), None, "nothing announced");
        assert_eq!(find(&recent, &frame(&[], &attributes(), &[33, 1, 2, 3, 4, 5])), None, "a length that cannot be");
        let broken = frame(&[], &[0x40, 1, 1, 9], &[24, 10, 1, 2]);
        recent.remember(&broken, &decoded(&broken).unwrap(), 8);
        assert_eq!(find(&recent, &broken), None, "what had a remark is decoded, and remarked upon, each time");
    }
}
