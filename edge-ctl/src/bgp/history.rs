//! What happened to a peer: its last messages, the last errors both ways, and when sessions came and went.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use crate::model::view::{BgpErrorRow, BgpFlapRow, BgpMessageRow};

/// Messages kept for each peer.
const MESSAGES: usize = 64;
/// Octets of them kept for each peer.
const OCTETS: usize = 32 * 1024;
/// Comings and goings kept for each peer.
const FLAPS: usize = 16;

#[derive(Clone, Debug)]
struct Recorded {
    time: SystemTime,
    sent: bool,
    local: SocketAddr,
    remote: SocketAddr,
    bytes: Box<[u8]>,
}

/// An error as a NOTIFICATION told it.
#[derive(Clone, Debug)]
pub struct ToldError {
    at: Duration,
    text: String,
}

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct History {
    messages: VecDeque<Recorded>,
    octets: usize,
    flaps: VecDeque<(Duration, bool, String)>,
    sent: Option<ToldError>,
    received: Option<ToldError>,
}

impl History {
    /// A message went over the wire. It is copied: a slice would keep the whole read buffer.
    pub fn message(&mut self, sent: bool, local: SocketAddr, remote: SocketAddr, bytes: &[u8]) {
        self.octets += bytes.len();
        self.messages.push_back(Recorded { time: SystemTime::now(), sent, local, remote, bytes: bytes.into() });
        while self.messages.len() > MESSAGES || (self.octets > OCTETS && self.messages.len() > 1) {
            self.octets -= self.messages.pop_front().map_or(0, |message| message.bytes.len());
        }
    }

    /// A NOTIFICATION went out, or came.
    pub fn error(&mut self, sent: bool, text: String, at: Duration) {
        *(if sent { &mut self.sent } else { &mut self.received }) = Some(ToldError { at, text });
    }

    /// The session came up, or went down for this reason.
    pub fn flap(&mut self, up: bool, reason: String, at: Duration) {
        self.flaps.push_back((at, up, reason));
        if self.flaps.len() > FLAPS {
            self.flaps.pop_front();
        }
    }

    /// The last errors sent and received.
    pub fn errors(&self, now: Duration) -> (Option<BgpErrorRow>, Option<BgpErrorRow>) {
        let row = |error: &Option<ToldError>| {
            error
                .as_ref()
                .map(|error| BgpErrorRow { ago: now.saturating_sub(error.at).as_secs(), text: error.text.clone() })
        };
        (row(&self.sent), row(&self.received))
    }

    /// Comings and goings, newest first.
    pub fn flaps(&self, now: Duration) -> Vec<BgpFlapRow> {
        let row = |(at, up, reason): &(Duration, bool, String)| BgpFlapRow {
            ago: now.saturating_sub(*at).as_secs(),
            up: *up,
            reason: reason.clone(),
        };
        self.flaps.iter().rev().map(row).collect()
    }

    /// The last messages, oldest first.
    pub fn messages(&self) -> Vec<BgpMessageRow> {
        let row = |message: &Recorded| BgpMessageRow {
            time: message
                .time
                .duration_since(UNIX_EPOCH)
                .unwrap_or_default()
                .as_micros()
                .try_into()
                .unwrap_or(u64::MAX),
            sent: message.sent,
            local: message.local,
            remote: message.remote,
            kind: kind(&message.bytes).to_owned(),
            length: message.bytes.len(),
            bytes: message.bytes.iter().map(|byte| format!("{byte:02x}")).collect(),
        };
        self.messages.iter().map(row).collect()
    }
}

/// A message's type by its number (RFC 4271 4.1, RFC 2918).
fn kind(bytes: &[u8]) -> &'static str {
    match bytes.get(18) {
        Some(1) => "OPEN",
        Some(2) => "UPDATE",
        Some(3) => "NOTIFICATION",
        Some(4) => "KEEPALIVE",
        Some(5) => "ROUTE-REFRESH",
        _ => "unknown",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_messages_stay_within_number_and_size() {
        let (local, remote) = ("10.0.0.1:179".parse().unwrap(), "10.0.0.2:40000".parse().unwrap());
        let mut history = History::default();
        for number in 0..100u8 {
            history.message(number % 2 == 0, local, remote, &[number; 19]);
        }
        let rows = history.messages();
        assert_eq!((rows.len(), rows[MESSAGES - 1].bytes.as_str()), (MESSAGES, "63".repeat(19).as_str()));
        for number in 0..20u8 {
            history.message(true, local, remote, &[number; 4096]);
        }
        assert_eq!(history.messages().len(), OCTETS / 4096);
        history.message(true, local, remote, &[0; 65_535]);
        assert_eq!(history.messages().len(), 1, "one that is longer than all is kept alone");
    }
}
