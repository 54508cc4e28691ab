//! Connections between the two nodes: ordered streams of octets whose pieces arrive late, and a way between them that can
//! be cut for a while.

use std::time::Duration;

use bytes::{Bytes, BytesMut};

/// A generator of numbers that follow from a seed (splitmix64).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    /// True with this chance in a hundred.
    pub fn percent(&mut self, chance: u64) -> bool {
        self.below(100) < chance
    }

    pub fn millis(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_millis(from + self.below(to - from))
    }
}

pub type ConnectionId = usize;

/// One connection. End 0 is the one that dialled.
#[derive(Clone, Debug)]
pub struct Connection {
    /// Which node has which end.
    pub nodes: [usize; 2],
    /// Which end still holds it.
    pub held: [bool; 2],
    /// When the last piece towards an end arrives: what follows comes after it.
    pub busy: [Duration; 2],
    /// What has arrived at an end and is no whole message yet.
    pub buffer: [BytesMut; 2],
}

impl Connection {
    pub fn end_of(&self, node: usize) -> usize {
        usize::from(self.nodes[0] != node)
    }
}

/// What the network brings to an end of a connection.
#[derive(Clone, Debug)]
pub enum Arrival {
    Octets(Bytes),
    /// FIN or RST.
    Closed,
}

/// Cuts a message into pieces, as TCP may.
pub fn pieces(message: &Bytes, random: &mut Random) -> Vec<Bytes> {
    if message.len() < 2 || random.percent(80) {
        return vec![message.clone()];
    }
    let at = 1 + random.below(message.len() as u64 - 1) as usize;
    vec![message.slice(..at), message.slice(at..)]
}
