//! The flow tables of a rig, in one form for both families.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use anyhow::{Result, anyhow};
use aya::maps::HashMap;
use edge_common::{
    address::{Address, Wide, unmapped},
    flow::{FlowKey, FlowKeyV4},
    maps::{Flow, FlowV4, name},
};
use edge_ctl::reconcile::ports::socket_address;

use super::{Rig, wire};

/// A flow key of either family, with addresses as maps hold them: [`Rig`] finds the table by them.
pub type Key = FlowKey<Wide>;
/// A flow entry of either family, as [`Key`].
pub type Entry = Flow<Wide>;

/// A flow key.
pub fn key(src: impl Into<SocketAddr>, dst: impl Into<SocketAddr>, protocol: u8) -> Key {
    let (src, dst) = (src.into(), dst.into());
    FlowKey::new(wire(src.ip()), wire(dst.ip()), src.port().to_be(), dst.port().to_be(), protocol)
}

/// The address of an IPv4 endpoint, for tests of that family.
///
/// # Panics
/// Where it is an IPv6 one.
pub fn ipv4(endpoint: SocketAddr) -> Ipv4Addr {
    match endpoint.ip() {
        IpAddr::V4(address) => address,
        IpAddr::V6(address) => unreachable!("{address} is not IPv4"),
    }
}

/// The source that a forward entry gives its packets.
pub fn snat_of(forward: &Entry) -> SocketAddr {
    socket_address(forward.new_src, forward.new_src_port)
}

/// The IPv4 form of a key; `None` for an IPv6 one.
fn narrow_key(key: &Key) -> Option<FlowKeyV4> {
    let (src, dst) = (unmapped(&key.src)?, unmapped(&key.dst)?);
    Some(FlowKey::new(src, dst, key.src_port, key.dst_port, key.protocol))
}

fn wide_key(key: &FlowKeyV4) -> Key {
    FlowKey::new(key.src.wide(), key.dst.wide(), key.src_port, key.dst_port, key.protocol)
}

/// An entry with its addresses in another form.
fn convert<A: Address, B: Address>(flow: &Flow<A>, address: impl Fn(A) -> B) -> Flow<B> {
    let Flow {
        key,
        new_src,
        new_dst,
        new_src_port,
        new_dst_port,
        address_delta,
        port_delta,
        next_hop,
        route_generation,
        service,
        backend,
        sequence,
        state,
        direction,
        flags,
        ack_floor,
        touch_due,
        answered_after,
        first_byte_after,
        created,
        last_seen,
        packets,
        bytes,
    } = *flow;
    Flow {
        key: FlowKey::new(address(key.src), address(key.dst), key.src_port, key.dst_port, key.protocol),
        new_src: address(new_src),
        new_dst: address(new_dst),
        new_src_port,
        new_dst_port,
        address_delta,
        port_delta,
        next_hop,
        route_generation,
        service,
        backend,
        sequence,
        state,
        direction,
        flags,
        ack_floor,
        touch_due,
        answered_after,
        first_byte_after,
        created,
        last_seen,
        packets,
        bytes,
    }
}

/// The name of a flow table's IPv6 twin.
pub fn v6_table(table: &str) -> String {
    format!("{table}_V6")
}

impl Rig {
    /// The entry of `key` in a flow table, with what the cache knows of it.
    pub fn flow(&mut self, table: &str, key: &Key) -> Option<Entry> {
        let established = table == name::ESTABLISHED;
        match narrow_key(key) {
            Some(key) => {
                let mut flow = self.hash::<FlowKeyV4, FlowV4>(table).ok()?.get(&key, 0).ok()?;
                if established {
                    self.cache.tell(&mut flow);
                }
                Some(convert(&flow, Address::wide))
            }
            None => {
                let mut flow = self.hash(&v6_table(table)).ok()?.get(key, 0).ok()?;
                if established {
                    self.cache.tell(&mut flow);
                }
                Some(flow)
            }
        }
    }

    /// What whoever changes an established entry owes the cache.
    fn changed(&self, table: &str, key: &Key) {
        if table != name::ESTABLISHED {
            return;
        }
        match narrow_key(key) {
            Some(key) => {
                self.cache.forget(&key);
                self.cache.changed(&key);
            }
            None => {
                self.cache.forget(key);
                self.cache.changed(key);
            }
        }
    }

    /// Adds an entry to a flow table, or replaces it.
    ///
    /// # Errors
    /// Where the write fails.
    pub fn put_flow(&mut self, table: &str, flow: &Entry) -> Result<()> {
        match narrow_key(&flow.key) {
            Some(key) => {
                let flow = convert(flow, |address| <u32 as Address>::narrow(&address));
                self.hash(table)?.insert(key, flow, 0)?;
            }
            None => self.hash(&v6_table(table))?.insert(flow.key, *flow, 0)?,
        }
        self.changed(table, &flow.key);
        Ok(())
    }

    /// Takes an entry out of a flow table.
    ///
    /// # Errors
    /// Where there is none.
    pub fn remove_flow(&mut self, table: &str, key: &Key) -> Result<()> {
        match narrow_key(key) {
            Some(key) => self.hash::<FlowKeyV4, FlowV4>(table)?.remove(&key)?,
            None => self.hash::<Key, Entry>(&v6_table(table))?.remove(key)?,
        }
        self.changed(table, key);
        Ok(())
    }

    /// Every entry of a flow table, of both families.
    ///
    /// # Errors
    /// Where a map cannot be read.
    pub fn flows(&mut self, table: &str) -> Result<Vec<Entry>> {
        let map: HashMap<_, FlowKeyV4, FlowV4> = self.hash(table)?;
        let mut keys: Vec<Key> = map.keys().map(|key| Ok(wide_key(&key?))).collect::<Result<_>>()?;
        let map: HashMap<_, Key, Entry> = self.hash(&v6_table(table))?;
        for key in map.keys() {
            keys.push(key?);
        }
        Ok(keys.iter().filter_map(|key| self.flow(table, key)).collect())
    }

    /// Changes an entry of a flow table in place.
    ///
    /// # Errors
    /// Where there is none, or the write fails.
    pub fn change_flow(&mut self, table: &str, key: &Key, change: impl FnOnce(&mut Entry)) -> Result<()> {
        let mut flow = self.flow(table, key).ok_or_else(|| anyhow!("no flow {key:?} in {table}"))?;
        change(&mut flow);
        self.put_flow(table, &flow)
    }
}
