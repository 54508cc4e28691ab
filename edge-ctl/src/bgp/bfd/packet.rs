//! BFD Control packets (RFC 5880 4.1), without authentication.

use std::fmt;

/// Octets of a packet without authentication.
pub const LENGTH: usize = 24;
const VERSION: u8 = 1;

/// State of a session as packets carry it (RFC 5880 4.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Name {
    /// Held down by an administrator.
    AdminDown,
    /// No packets, or the other side does not see ours.
    Down,
    /// The other side is heard.
    Init,
    /// Both are heard.
    Up,
}

impl Name {
    /// The name in the RFC.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::AdminDown => "AdminDown",
            Self::Down => "Down",
            Self::Init => "Init",
            Self::Up => "Up",
        }
    }
}

/// Why a session left Up (RFC 5880 4.1); of the codes those that are ever told by us have names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Diagnostic(pub u8);

impl Diagnostic {
    /// Nothing.
    pub const NONE: Self = Self(0);
    /// Nothing was heard for the detection time.
    pub const TIME_EXPIRED: Self = Self(1);
    /// The other side said that it is down.
    pub const NEIGHBOR_SIGNALED: Self = Self(3);
    /// An administrator's doing.
    pub const ADMINISTRATIVELY_DOWN: Self = Self(7);
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            0 => "none",
            1 => "control detection time expired",
            2 => "echo function failed",
            3 => "neighbor signaled session down",
            4 => "forwarding plane reset",
            5 => "path down",
            6 => "concatenated path down",
            7 => "administratively down",
            8 => "reverse concatenated path down",
            other => return write!(f, "diagnostic {other}"),
        })
    }
}

/// A packet, received or to be sent. Intervals are microseconds, as on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Why the sender last left Up.
    pub diagnostic: Diagnostic,
    /// The sender's state.
    pub state: Name,
    /// P: an answer with F is wanted.
    pub poll: bool,
    /// F: this is the answer.
    pub answer: bool,
    /// C: the sender's BFD does not share fate with its control plane.
    pub independent: bool,
    /// D: the sender wants no periodic packets while both are Up.
    pub demand: bool,
    /// So many packets may be missed.
    pub multiplier: u8,
    /// The sender's discriminator; never 0.
    pub mine: u32,
    /// The receiver's, as far as the sender knows it; else 0.
    pub yours: u32,
    /// The interval that the sender would like to send at.
    pub desired_min_tx: u32,
    /// The shortest that it can receive at; 0: it wants none.
    pub required_min_rx: u32,
}

impl Packet {
    /// Reads a packet with the checks of RFC 5880 6.8.6 that need no session.
    ///
    /// # Errors
    /// Why it is to be discarded.
    pub fn parse(bytes: &[u8]) -> Result<Self, &'static str> {
        let fixed: &[u8; LENGTH] = bytes.first_chunk().ok_or("shorter than 24 octets")?;
        let [version_diagnostic, flags, multiplier, length, rest @ ..] = *fixed;
        let word = |at: usize| {
            let octets = rest.get(at * 4..).and_then(|rest| rest.first_chunk::<4>());
            octets.map_or(0, |octets| u32::from_be_bytes(*octets))
        };
        let state = match flags >> 6 {
            0 => Name::AdminDown,
            1 => Name::Down,
            2 => Name::Init,
            _ => Name::Up,
        };
        let packet = Self {
            diagnostic: Diagnostic(version_diagnostic & 0x1f),
            state,
            poll: flags & 0x20 != 0,
            answer: flags & 0x10 != 0,
            independent: flags & 0x08 != 0,
            demand: flags & 0x02 != 0,
            multiplier,
            mine: word(0),
            yours: word(1),
            desired_min_tx: word(2),
            required_min_rx: word(3),
        };
        match packet {
            _ if version_diagnostic >> 5 != VERSION => Err("another version than 1"),
            _ if usize::from(length) < LENGTH || usize::from(length) > bytes.len() => Err("a length that cannot be"),
            _ if multiplier == 0 => Err("a detection multiplier of 0"),
            _ if flags & 0x01 != 0 => Err("multipoint"),
            _ if flags & 0x04 != 0 => Err("authenticated, and no key is configured"),
            Self { mine: 0, .. } => Err("a sender without discriminator"),
            Self { yours: 0, state: Name::Init | Name::Up, .. } => Err("a session is up that names no receiver"),
            _ => Ok(packet),
        }
    }

    /// As it is sent.
    pub fn encode(&self) -> [u8; LENGTH] {
        let state: u8 = match self.state {
            Name::AdminDown => 0,
            Name::Down => 1,
            Name::Init => 2,
            Name::Up => 3,
        };
        let flag = |set: bool, bit: u8| if set { bit } else { 0 };
        let mut bytes = [0; LENGTH];
        bytes[0] = VERSION << 5 | self.diagnostic.0 & 0x1f;
        bytes[1] = state << 6
            | flag(self.poll, 0x20)
            | flag(self.answer, 0x10)
            | flag(self.independent, 0x08)
            | flag(self.demand, 0x02);
        bytes[2] = self.multiplier;
        bytes[3] = LENGTH as u8;
        // No echo packets are wanted: the last word stays 0.
        let words = [self.mine, self.yours, self.desired_min_tx, self.required_min_rx];
        for (at, word) in bytes[4..].chunks_exact_mut(4).zip(words) {
            at.copy_from_slice(&word.to_be_bytes());
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sent by bfdd of FRR 8.4 in Up: 3 x 50 ms, discriminators 0xa8d39c51 and 0x00000001, echo 50 ms.
    const FRR_UP: [u8; 24] = [
        0x20, 0xc0, 0x03, 0x18, 0xa8, 0xd3, 0x9c, 0x51, 0x00, 0x00, 0x00, 0x01, 0x00, 0x00, 0xc3, 0x50, 0x00, 0x00,
        0xc3, 0x50, 0x00, 0x00, 0xc3, 0x50,
    ];

    #[test]
    fn a_packet_of_another_implementation_reads_as_it_was_meant() {
        let packet = Packet::parse(&FRR_UP).unwrap();
        assert_eq!((packet.state, packet.multiplier, packet.independent), (Name::Up, 3, false));
        assert_eq!((packet.mine, packet.yours), (0xa8d3_9c51, 1));
        assert_eq!((packet.desired_min_tx, packet.required_min_rx), (50_000, 50_000));
        assert_eq!(packet.encode()[..20], FRR_UP[..20], "all but echo, which we do not do");
    }

    #[test]
    fn what_rfc_5880_discards_is_discarded() {
        let with = |at: usize, value: u8| {
            let mut bytes = FRR_UP;
            bytes[at] = value;
            Packet::parse(&bytes)
        };
        assert!(Packet::parse(&FRR_UP[..23]).is_err());
        for (at, value, why) in [
            (0, 0x40, "version"),
            (1, 0xc1, "multipoint"),
            (1, 0xc4, "authenticated"),
            (2, 0, "multiplier"),
            (3, 23, "length"),
            (3, 25, "length"),
        ] {
            assert!(with(at, value).unwrap_err().contains(why), "{why}");
        }
        let mut nobody = FRR_UP;
        nobody[8..12].fill(0);
        assert!(Packet::parse(&nobody).unwrap_err().contains("names no receiver"));
        nobody[1] = 0x40;
        assert!(Packet::parse(&nobody).is_ok(), "a Down session may not know us yet");
        nobody[4..8].fill(0);
        assert!(Packet::parse(&nobody).unwrap_err().contains("without discriminator"));
    }
}
