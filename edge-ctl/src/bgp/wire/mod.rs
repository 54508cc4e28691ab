//! BGP messages: the only place that knows the codec crate.
//!
//! Bytes come in framed, our own plain types go out, and every decoding failure is already the NOTIFICATION that RFC
//! 4271 6 wants for it. UPDATEs are read by RFC 7606: a malformed attribute costs its routes or itself, and resets
//! the session only where the NLRI cannot be located.

mod attributes;
mod notification;
mod open;
mod repeat;
mod update;

use std::{fmt, net::IpAddr};

use bytes::Bytes;
use ipnet::IpNet;
use rustbgpd_wire as codec;

pub use attributes::{AsPath, Attributes, Community, Opaque, Origin, Segment};
pub use notification::{Notification, cease, open_error};
pub use open::{Capability, Open, Restart};
pub use repeat::Recent;
pub use update::{Announcement, Nlri, Problem, Update, encode_announcements, encode_end_of_rib, encode_withdrawals};

/// Largest message without RFC 8654. We send none that is longer.
pub const MAX_MESSAGE: u16 = codec::MAX_MESSAGE_LEN;
/// Largest message with RFC 8654.
pub const MAX_EXTENDED_MESSAGE: u16 = codec::EXTENDED_MAX_MESSAGE_LEN;

/// An address family of unicast routes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// AFI 1, SAFI 1.
    Ipv4,
    /// AFI 2, SAFI 1.
    Ipv6,
}

impl Family {
    /// Both families that we speak.
    pub const ALL: [Self; 2] = [Self::Ipv4, Self::Ipv6];

    /// The family of an address.
    pub const fn of_address(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::Ipv4,
            IpAddr::V6(_) => Self::Ipv6,
        }
    }

    /// The family of a prefix.
    pub const fn of(prefix: &IpNet) -> Self {
        match prefix {
            IpNet::V4(_) => Self::Ipv4,
            IpNet::V6(_) => Self::Ipv6,
        }
    }

    const fn afi(self) -> codec::Afi {
        match self {
            Self::Ipv4 => codec::Afi::Ipv4,
            Self::Ipv6 => codec::Afi::Ipv6,
        }
    }

    const fn from_codec(afi: codec::Afi, safi: codec::Safi) -> Option<Self> {
        match (afi, safi) {
            (codec::Afi::Ipv4, codec::Safi::Unicast) => Some(Self::Ipv4),
            (codec::Afi::Ipv6, codec::Safi::Unicast) => Some(Self::Ipv6),
            _ => None,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ipv4 => "ipv4-unicast",
            Self::Ipv6 => "ipv6-unicast",
        })
    }
}

/// What the session's OPENs settled, as far as the bytes depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Context {
    /// Both sides sent the 4-octet AS capability (RFC 6793).
    pub four_octet_as: bool,
    /// The peer is in our AS; some attributes are judged differently (RFC 7606 7).
    pub internal: bool,
    /// Both sides take messages of up to 65,535 octets (RFC 8654).
    pub extended: bool,
    /// Families in which the peer sends path identifiers (RFC 7911).
    pub add_path: AddPath,
}

impl Context {
    /// Octets that a message may have.
    pub const fn longest(self) -> u16 {
        if self.extended { MAX_EXTENDED_MESSAGE } else { MAX_MESSAGE }
    }
}

/// Families with path identifiers in what the peer sends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AddPath {
    /// None.
    #[default]
    None,
    /// IPv4 alone.
    Ipv4,
    /// IPv6 alone.
    Ipv6,
    /// Both.
    Both,
}

impl AddPath {
    /// The families of an iterator.
    pub fn of(families: impl IntoIterator<Item = Family>) -> Self {
        let (mut ipv4, mut ipv6) = (false, false);
        for family in families {
            match family {
                Family::Ipv4 => ipv4 = true,
                Family::Ipv6 => ipv6 = true,
            }
        }
        match (ipv4, ipv6) {
            (false, false) => Self::None,
            (true, false) => Self::Ipv4,
            (false, true) => Self::Ipv6,
            (true, true) => Self::Both,
        }
    }

    /// True where NLRI of `family` carry a path identifier.
    pub const fn contains(self, family: Family) -> bool {
        matches!((self, family), (Self::Both, _) | (Self::Ipv4, Family::Ipv4) | (Self::Ipv6, Family::Ipv6))
    }

    const fn codec(self) -> &'static [(codec::Afi, codec::Safi)] {
        const IPV4: (codec::Afi, codec::Safi) = (codec::Afi::Ipv4, codec::Safi::Unicast);
        const IPV6: (codec::Afi, codec::Safi) = (codec::Afi::Ipv6, codec::Safi::Unicast);
        match self {
            Self::None => &[],
            Self::Ipv4 => &[IPV4],
            Self::Ipv6 => &[IPV6],
            Self::Both => &[IPV4, IPV6],
        }
    }
}

/// A message as the rest of the speaker sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// OPEN.
    Open(Open),
    /// UPDATE.
    Update(Box<Update>),
    /// NOTIFICATION.
    Notification(Notification),
    /// KEEPALIVE.
    Keepalive,
    /// ROUTE-REFRESH (RFC 2918); `None`: a family or subtype that we do not speak, ignored.
    RouteRefresh(Option<(Family, Refresh)>),
}

/// What a ROUTE-REFRESH says (RFC 7313 3.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refresh {
    /// Send your routes again.
    Ask,
    /// All of mine follow.
    Begin,
    /// These were all.
    End,
}

/// Length of the message that `buffer` begins with, which may be `longest` octets long; `None`: its header is not
/// complete yet.
///
/// # Errors
/// The NOTIFICATION for a bad marker, length or type (RFC 4271 6.1).
pub fn message_length(buffer: &[u8], longest: u16) -> Result<Option<usize>, Notification> {
    codec::peek_message_length(buffer, longest)
        .map(|length| length.map(usize::from))
        .map_err(|error| Notification::from_decode(&error))
}

/// Decodes one framed message.
///
/// # Errors
/// The NOTIFICATION to send before the session is closed (RFC 4271 6.1 to 6.3, as revised by RFC 7606).
pub fn decode(mut frame: Bytes, context: Context) -> Result<Message, Notification> {
    least_length(&frame)?;
    let message =
        codec::decode_message(&mut frame, context.longest()).map_err(|error| Notification::from_decode(&error))?;
    match message {
        codec::Message::Open(open) => Ok(Message::Open(Open::from_codec(&open))),
        codec::Message::Update(update) => {
            Update::from_codec(&update, context).map(|update| Message::Update(Box::new(update)))
        }
        codec::Message::Notification(notification) => {
            Ok(Message::Notification(Notification::from_codec(&notification)))
        }
        codec::Message::Keepalive => Ok(Message::Keepalive),
        codec::Message::RouteRefresh(refresh) => {
            let family = refresh.afi().zip(refresh.safi()).and_then(|(afi, safi)| Family::from_codec(afi, safi));
            let what = match refresh.subtype() {
                codec::RouteRefreshSubtype::Normal => Some(Refresh::Ask),
                codec::RouteRefreshSubtype::BoRR => Some(Refresh::Begin),
                codec::RouteRefreshSubtype::EoRR => Some(Refresh::End),
                _ => None,
            };
            Ok(Message::RouteRefresh(family.zip(what)))
        }
        // The codec's enum is open; a kind it learns later is one that we did not ask for.
        _ => Err(Notification::new(1, 3, Bytes::new())),
    }
}

/// Each type has its least length (RFC 4271 6.1); the codec blames what follows the header instead.
fn least_length(frame: &Bytes) -> Result<(), Notification> {
    let Some([high, low, kind]) = frame.get(16..19).and_then(|header| <[u8; 3]>::try_from(header).ok()) else {
        return Ok(());
    };
    let least = match kind {
        1 => 29,
        2 => 23,
        3 => 21,
        _ => return Ok(()),
    };
    if frame.len() < least { Err(Notification::new(1, 2, Bytes::copy_from_slice(&[high, low]))) } else { Ok(()) }
}

/// Why a message of ours does not fit the wire.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot encode a BGP message: {0}")]
pub struct EncodeError(String);

impl From<codec::EncodeError> for EncodeError {
    fn from(error: codec::EncodeError) -> Self {
        Self(error.to_string())
    }
}

fn encode(message: &codec::Message) -> Result<Bytes, EncodeError> {
    Ok(codec::encode_message(message)?.freeze())
}

/// A KEEPALIVE.
///
/// # Errors
/// None in practice; the codec's signature has one.
pub fn encode_keepalive() -> Result<Bytes, EncodeError> {
    encode(&codec::Message::Keepalive)
}

/// A ROUTE-REFRESH for one family.
///
/// # Errors
/// None in practice; the codec's signature has one.
pub fn encode_route_refresh(family: Family, what: Refresh) -> Result<Bytes, EncodeError> {
    let subtype = match what {
        Refresh::Ask => codec::RouteRefreshSubtype::Normal,
        Refresh::Begin => codec::RouteRefreshSubtype::BoRR,
        Refresh::End => codec::RouteRefreshSubtype::EoRR,
    };
    let safi = codec::Safi::Unicast;
    encode(&codec::Message::RouteRefresh(codec::RouteRefreshMessage::new_with_subtype(family.afi(), safi, subtype)))
}
