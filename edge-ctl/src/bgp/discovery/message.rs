//! Router advertisements and solicitations (RFC 4861 4.1, 4.2), as far as finding a BGP neighbour needs them. Pure.

/// ICMPv6 type of a solicitation.
pub const SOLICITATION: u8 = 133;
/// ICMPv6 type of an advertisement.
pub const ADVERTISEMENT: u8 = 134;

/// Octets of an advertisement without options, and of a solicitation.
const LENGTHS: [(u8, usize); 2] = [(SOLICITATION, 8), (ADVERTISEMENT, 16)];

/// What a neighbour says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    /// It asks who is there.
    Solicitation,
    /// It is a router.
    Advertisement,
}

/// Reads an ICMPv6 message from its type on. `None`: another one, or one that RFC 4861 6.1 has a receiver discard. The hop
/// limit and the sender's address are the socket's to check, the checksum is the kernel's.
pub fn read(bytes: &[u8]) -> Option<Message> {
    let (kind, code) = (*bytes.first()?, *bytes.get(1)?);
    let (_, least) = LENGTHS.into_iter().find(|(other, _)| *other == kind)?;
    let options = bytes.get(least..)?;
    if code != 0 || !sound(options) {
        return None;
    }
    Some(if kind == SOLICITATION { Message::Solicitation } else { Message::Advertisement })
}

/// Every option has a length, in units of 8 octets, that is not zero and ends with the message.
fn sound(mut options: &[u8]) -> bool {
    while let [_, length, ..] = options {
        let length = usize::from(*length) * 8;
        match options.get(length..) {
            Some(rest) if length != 0 => options = rest,
            _ => return false,
        }
    }
    options.is_empty()
}

/// An advertisement of a router that is no default router (lifetime 0) and says nothing of hop limits, prefixes or timers:
/// no host on the link configures itself by it.
pub const fn advertisement() -> [u8; 16] {
    let mut message = [0; 16];
    message[0] = ADVERTISEMENT;
    message
}

/// A solicitation without options.
pub const fn solicitation() -> [u8; 8] {
    let mut message = [0; 8];
    message[0] = SOLICITATION;
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As FRR 8.4's zebra sends it: lifetime 1800 s, a source link-layer address.
    const FRR: [u8; 24] = [134, 0, 0x12, 0x34, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 2, 0, 0, 0, 0, 2];

    #[test]
    fn what_we_send_is_what_we_read_and_so_is_frrs() {
        assert_eq!(read(&advertisement()), Some(Message::Advertisement));
        assert_eq!(read(&solicitation()), Some(Message::Solicitation));
        assert_eq!(read(&FRR), Some(Message::Advertisement));
        assert_eq!(advertisement()[6..8], [0, 0], "nobody takes us for a default router");
    }

    #[test]
    fn what_is_cut_short_has_a_code_or_an_option_without_an_end_is_discarded() {
        for length in (0..16).chain(17..24) {
            assert_eq!(read(&FRR[..length]), None, "{length} octets");
        }
        assert_eq!(read(&FRR[..16]), Some(Message::Advertisement), "without options");
        for (at, octet) in [(1, 1), (17, 0), (17, 2), (0, 135), (0, 128)] {
            let mut message = FRR;
            message[at] = octet;
            assert_eq!(read(&message), None, "octet {at} is {octet}");
        }
    }
}
