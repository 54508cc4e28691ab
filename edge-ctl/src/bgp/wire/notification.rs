//! NOTIFICATION messages and their meaning in words.

use std::fmt;

use bytes::Bytes;
use rustbgpd_wire as codec;

use super::{Capability, EncodeError};

/// Cease subcodes (RFC 4486).
pub mod cease {
    /// Maximum Number of Prefixes Reached; carries family and limit.
    pub const MAXIMUM_PREFIXES: u8 = 1;
    /// Administrative Shutdown; carries a text (RFC 9003).
    pub const ADMINISTRATIVE_SHUTDOWN: u8 = 2;
    /// Administrative Reset; may carry a text too (RFC 9003).
    pub const ADMINISTRATIVE_RESET: u8 = 4;
    /// Hard Reset: ends the session without graceful restart (RFC 8538).
    pub const HARD_RESET: u8 = 9;
    /// Peer De-configured.
    pub const PEER_DECONFIGURED: u8 = 3;
    /// Connection Rejected.
    pub const CONNECTION_REJECTED: u8 = 5;
    /// Other Configuration Change.
    pub const OTHER_CONFIGURATION_CHANGE: u8 = 6;
    /// Connection Collision Resolution.
    pub const CONNECTION_COLLISION_RESOLUTION: u8 = 7;
    /// Out of Resources.
    pub const OUT_OF_RESOURCES: u8 = 8;
    /// BFD Down (RFC 9384).
    pub const BFD_DOWN: u8 = 10;
}

/// OPEN error subcodes (RFC 4271 4.5).
pub mod open_error {
    /// Bad Peer AS.
    pub const BAD_PEER_AS: u8 = 2;
    /// Bad BGP Identifier.
    pub const BAD_BGP_IDENTIFIER: u8 = 3;
    /// Unacceptable Hold Time.
    pub const UNACCEPTABLE_HOLD_TIME: u8 = 6;
    /// Role Mismatch (RFC 9234).
    pub const ROLE_MISMATCH: u8 = 11;
}

/// A NOTIFICATION, received or to be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notification {
    /// Error code.
    pub code: u8,
    /// Error subcode.
    pub subcode: u8,
    /// Data; its meaning depends on code and subcode.
    pub data: Bytes,
    /// What our decoder complained about; never sent.
    pub detail: Option<String>,
}

impl Notification {
    /// A NOTIFICATION with the given fields.
    pub const fn new(code: u8, subcode: u8, data: Bytes) -> Self {
        Self { code, subcode, data, detail: None }
    }

    /// Cease with a subcode of RFC 4486.
    pub const fn cease(subcode: u8) -> Self {
        Self::new(6, subcode, Bytes::new())
    }

    /// Cease, Administrative Shutdown, with a text for the peer's operator (RFC 9003).
    pub fn shutdown(text: &str) -> Self {
        Self::new(6, cease::ADMINISTRATIVE_SHUTDOWN, codec::notification::encode_shutdown_communication(text))
    }

    /// Cease, Administrative Reset: the session may come back at once.
    pub const fn reset() -> Self {
        Self::cease(cease::ADMINISTRATIVE_RESET)
    }

    /// True where the routes of the session are to go, graceful restart or not: always without RFC 8538, and with it
    /// for a Hard Reset only.
    pub const fn is_final(&self, notification_restart: bool) -> bool {
        !notification_restart || (self.code == 6 && self.subcode == cease::HARD_RESET)
    }

    /// The same as the content of a Hard Reset (RFC 8538 3.1), for a peer that would otherwise keep our routes.
    #[must_use]
    pub fn hard(&self) -> Self {
        let mut data = vec![self.code, self.subcode];
        data.extend_from_slice(&self.data);
        Self::new(6, cease::HARD_RESET, data.into())
    }

    /// Cease, Maximum Number of Prefixes Reached: AFI, SAFI and the limit, big-endian (RFC 4486 4).
    pub fn too_many_prefixes(family: super::Family, limit: u32) -> Self {
        let mut data = vec![0, if family == super::Family::Ipv4 { 1 } else { 2 }, 1];
        data.extend(limit.to_be_bytes());
        Self::new(6, cease::MAXIMUM_PREFIXES, Bytes::from(data))
    }

    /// An OPEN Message Error.
    pub const fn open_error(subcode: u8) -> Self {
        Self::new(2, subcode, Bytes::new())
    }

    /// Hold Timer Expired.
    pub const fn hold_timer_expired() -> Self {
        Self::new(4, 0, Bytes::new())
    }

    /// Send Hold Timer Expired (RFC 9687).
    pub const fn send_hold_timer_expired() -> Self {
        Self::new(8, 0, Bytes::new())
    }

    /// Finite State Machine Error (RFC 6608 subcodes).
    pub const fn fsm_error(subcode: u8) -> Self {
        Self::new(5, subcode, Bytes::new())
    }

    pub(super) fn from_decode(error: &codec::DecodeError) -> Self {
        let (code, subcode, data) = error.to_notification();
        // RFC 4271 4.1 bounds the whole message; the data is for the operator, so its head is enough.
        let data = data.slice(..data.len().min(1024));
        Self { code: code.as_u8(), subcode, data, detail: Some(error.to_string()) }
    }

    pub(super) fn from_codec(message: &codec::NotificationMessage) -> Self {
        Self::new(message.code.as_u8(), message.subcode, message.data.clone())
    }

    /// The bytes to send.
    ///
    /// # Errors
    /// Data longer than a message can hold.
    pub fn encode(&self) -> Result<Bytes, EncodeError> {
        super::encode(&codec::Message::Notification(codec::NotificationMessage::new(
            codec::NotificationCode::from_u8(self.code),
            self.subcode,
            self.data.clone(),
        )))
    }
}

impl Notification {
    /// What the data says where the RFC of its code gives it a form; `None`: nothing, or a text (RFC 9003).
    fn meaning(&self) -> Option<String> {
        let word = |at: usize| Some(u16::from_be_bytes([*self.data.get(at)?, *self.data.get(at + 1)?]));
        match (self.code, self.subcode) {
            // RFC 4271 6.1: the length or type that was wrong.
            (1, 2) => Some(format!("length {}", word(0)?)),
            (1, 3) => Some(format!("type {}", self.data.first()?)),
            // RFC 4271 6.2: the largest version that is supported.
            (2, 1) => Some(format!("it speaks version {}", word(0)?)),
            // RFC 5492 5: the capabilities that are missed.
            (2, 7) => {
                let mut codes = Vec::new();
                let mut rest = self.data.as_ref();
                while let [code, length, tail @ ..] = rest {
                    codes.push(Capability::Other(*code).to_string());
                    rest = tail.get(usize::from(*length)..).unwrap_or_default();
                }
                (!codes.is_empty()).then(|| codes.join(", "))
            }
            // RFC 4271 6.3: the attribute at fault.
            (3, 1..=9) => Some(format!("attribute {}", self.data.get(1)?)),
            // RFC 4486 4: family and limit.
            (6, 1) if self.data.len() >= 7 => {
                let limit = u32::from_be_bytes([self.data[3], self.data[4], self.data[5], self.data[6]]);
                Some(format!("at most {limit} prefixes of AFI {} SAFI {}", word(0)?, self.data[2]))
            }
            // RFC 8538 3.1: what would have been sent without it.
            (6, 9) if self.data.len() >= 2 => {
                let inner = Self::new(self.data[0], self.data[1], self.data.slice(2..));
                (inner.subcode != cease::HARD_RESET).then(|| inner.to_string())
            }
            _ => None,
        }
    }
}

impl fmt::Display for Notification {
    /// `Cease: Administrative Shutdown (6/2): "maintenance"`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let code = codec::NotificationCode::from_u8(self.code);
        let category = match self.code {
            1 => "Message Header Error",
            2 => "OPEN Message Error",
            3 => "UPDATE Message Error",
            4 => "Hold Timer Expired",
            5 => "Finite State Machine Error",
            6 => "Cease",
            7 => "ROUTE-REFRESH Message Error",
            8 => "Send Hold Timer Expired",
            _ => "unknown error",
        };
        f.write_str(category)?;
        if self.subcode != 0 {
            write!(f, ": {}", codec::notification::description(code, self.subcode))?;
        }
        write!(f, " ({}/{})", self.code, self.subcode)?;
        if let Some(meaning) = self.meaning() {
            write!(f, ": {meaning}")?;
        }
        let message = codec::NotificationMessage::new(code, self.subcode, self.data.clone());
        if self.subcode != cease::HARD_RESET
            && let Ok(Some(text)) = codec::notification::extract_shutdown_communication(&message)
            && !text.is_empty()
        {
            // The text is the peer's: `escape_debug` keeps its control characters off our terminals.
            write!(f, ": \"{}\"", text.escape_debug())?;
        }
        if let Some(detail) = &self.detail {
            write!(f, ": {detail}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shutdown_text_is_shown_with_its_control_characters_escaped() {
        let text = Notification::shutdown("reboot\u{1b}[2J at 10:00").to_string();
        assert_eq!(text, "Cease: Administrative Shutdown (6/2): \"reboot\\u{1b}[2J at 10:00\"");
    }

    #[test]
    fn data_of_a_known_form_is_read_out() {
        let says =
            |code, subcode, data: &'static [u8]| Notification::new(code, subcode, Bytes::from_static(data)).to_string();
        assert_eq!(says(1, 2, &[0x10, 1]), "Message Header Error: Bad Message Length (1/2): length 4097");
        assert_eq!(
            says(2, 7, &[65, 4, 0, 0, 0, 1, 67, 0]),
            "OPEN Message Error: Unsupported Capability (2/7): capability-65, dynamic"
        );
        let limit = "Cease: Maximum Number of Prefixes Reached (6/1): at most 100 prefixes of AFI 1 SAFI 1";
        assert_eq!(says(6, 1, &[0, 1, 1, 0, 0, 0, 100]), limit);
        for (code, subcode) in [(1, 2), (1, 3), (2, 1), (2, 7), (3, 5), (6, 1), (6, 9)] {
            assert!(says(code, subcode, &[]).ends_with(&format!("({code}/{subcode})")), "no data, no meaning");
        }
    }

    #[test]
    fn a_hard_reset_shows_what_it_stands_for() {
        let hard = Notification::shutdown("reboot").hard();
        assert_eq!(hard.to_string(), "Cease: Hard Reset (6/9): Cease: Administrative Shutdown (6/2): \"reboot\"");
        assert!(hard.is_final(true) && !Notification::shutdown("").is_final(true));
        assert!(Notification::hold_timer_expired().is_final(false));
        assert_eq!(hard.hard().to_string(), "Cease: Hard Reset (6/9)", "nothing nests");
    }

    #[test]
    fn codes_nobody_registered_are_still_shown_by_number() {
        assert_eq!(Notification::new(42, 7, Bytes::new()).to_string(), "unknown error: Unknown Error Code (42/7)");
    }
}
