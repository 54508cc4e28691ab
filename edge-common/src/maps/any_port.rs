//! Port 0 in a map: every port.
//!
//! A frontend's key with port 0 takes what no other frontend of its address and protocol takes; so does a dnat backend's key
//! of replies. A backend with port 0 gets a packet at the port that the client asked for. A packet to port 0 meets such a
//! frontend as it would with any other port, and no other frontend, since no exact key has that port.

use super::{BackendEntry, ServiceEntry};

/// The port that stands for all of them.
pub const ANY_PORT: u16 = 0;

impl BackendEntry {
    /// The port at which it gets a packet to the VIP's port `asked`, both in network order.
    #[inline(always)]
    pub const fn port_for(&self, asked: u16) -> u16 {
        if self.port == ANY_PORT { asked } else { self.port }
    }
}

impl ServiceEntry {
    /// The VIP's port of a dnat backend's reply from its port `replies`, both in network order. A dnat service of every port has
    /// only backends that keep it.
    #[inline(always)]
    pub const fn port_of(&self, replies: u16) -> u16 {
        if self.port == ANY_PORT { replies } else { self.port }
    }
}
