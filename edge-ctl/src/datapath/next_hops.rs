//! The next-hop array from the daemon's side: which neighbours forwarding depends on, and a new MAC as one write.

use std::net::IpAddr;

use aya::maps::{Array, HashMap, MapData, MapError};
use edge_common::maps::{NeighbourKey, NextHop, name};

use super::pins::{Pins, chain, open};
use crate::reconcile::ports::{PortError, ip, wire};

/// Next hops that the program has given out numbers for.
pub struct NextHops {
    slots: Array<MapData, NextHop>,
    index: HashMap<MapData, NeighbourKey, u32>,
}

impl NextHops {
    /// Opens the pins.
    ///
    /// # Errors
    /// Where one is missing or has another layout.
    pub fn open(pins: &Pins) -> Result<Self, PortError> {
        Ok(Self { slots: open(pins, name::NEXT_HOPS)?, index: open(pins, name::NEXT_HOP_INDEX)? })
    }

    /// Interface index and address of every neighbour that has a number.
    ///
    /// # Errors
    /// Where the map cannot be read.
    pub fn neighbours(&self) -> Result<Vec<(u32, IpAddr)>, PortError> {
        let keys: Result<Vec<_>, _> = self.index.keys().collect();
        let keys = keys.map_err(|error| PortError::new("reading the next-hop index", chain(&error)))?;
        Ok(keys.into_iter().map(|key| (key.ifindex, ip(key.address))).collect())
    }

    /// Gives a neighbour's slot its new MAC; false where no slot names it or the MAC is the one it has.
    ///
    /// # Errors
    /// Where a map cannot be read or written.
    pub fn set_mac(&mut self, ifindex: u32, address: IpAddr, mac: [u8; 6]) -> Result<bool, PortError> {
        let failed = |error: MapError| PortError::new("writing a next hop", chain(&error));
        let number = match self.index.get(&NeighbourKey { ifindex, address: wire(address) }, 0) {
            Ok(number) => number,
            Err(MapError::KeyNotFound) => return Ok(false),
            Err(error) => return Err(failed(error)),
        };
        let slot = self.slots.get(&number, 0).map_err(failed)?;
        if slot.dst_mac == mac {
            return Ok(false);
        }
        self.slots.set(number, NextHop { dst_mac: mac, ..slot }, 0).map_err(failed)?;
        Ok(true)
    }
}
