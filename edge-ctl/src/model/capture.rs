//! Captured packets, and whoever gives them.

use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

/// What is to be captured, for how long.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CaptureOrder {
    /// A listen address and port, or a service's name.
    pub vip: String,
    /// Only this backend's, by address and port.
    pub backend: Option<String>,
    /// Bytes of each frame at most.
    pub length: u16,
    /// How long the order stands unless it is given again, seconds; 0 ends it.
    pub seconds: u8,
}

/// What is captured.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CaptureRow {
    /// Service name.
    pub service: String,
    /// Listen address and port.
    pub vip: String,
}

/// A captured packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// As it left, rather than as it came.
    pub after: bool,
    /// When.
    pub time: SystemTime,
    /// Bytes it had.
    pub length: u32,
    /// Those that were copied, from the Ethernet header on.
    pub bytes: Vec<u8>,
}

/// Gives captured packets.
pub trait Tap {
    /// Waits up to about `wait` and hands over what there is; the number of packets that found no room.
    ///
    /// # Errors
    /// Where the kernel cannot be asked.
    fn take(&mut self, wait: Duration, visit: &mut dyn FnMut(Frame)) -> Result<u64, String>;
}
