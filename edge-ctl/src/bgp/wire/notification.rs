//! NOTIFICATION messages and their meaning in words.

use std::fmt;

use bytes::Bytes;
use rustbgpd_wire as codec;

use super::EncodeError;

/// Cease subcodes (RFC 4486).
pub mod cease {
    /// Maximum Number of Prefixes Reached; carries family and limit.
    pub const MAXIMUM_PREFIXES: u8 = 1;
    /// Administrative Shutdown; carries a text (RFC 9003).
    pub const ADMINISTRATIVE_SHUTDOWN: u8 = 2;
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
}

/// OPEN error subcodes (RFC 4271 4.5).
pub mod open_error {
    /// Bad Peer AS.
    pub const BAD_PEER_AS: u8 = 2;
    /// Bad BGP Identifier.
    pub const BAD_BGP_IDENTIFIER: u8 = 3;
    /// Unacceptable Hold Time.
    pub const UNACCEPTABLE_HOLD_TIME: u8 = 6;
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
        let message = codec::NotificationMessage::new(code, self.subcode, self.data.clone());
        if let Ok(Some(text)) = codec::notification::extract_shutdown_communication(&message)
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
    fn codes_nobody_registered_are_still_shown_by_number() {
        assert_eq!(Notification::new(42, 7, Bytes::new()).to_string(), "unknown error: Unknown Error Code (42/7)");
    }
}
