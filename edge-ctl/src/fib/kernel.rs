//! The port to the kernel that the actor drives.

use std::{collections::BTreeMap, future::Future, net::IpAddr};

use super::{
    FibError, ObjectCounts,
    plan::{RouteChange, Table},
};

/// An interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Name.
    pub name: String,
    /// Administratively up and with carrier.
    pub up: bool,
    /// The loopback interface.
    pub loopback: bool,
    /// Bytes, without the link-layer header.
    pub mtu: u32,
    /// Link-layer address, where it is an Ethernet one.
    pub mac: Option<[u8; 6]>,
}

/// An address of this host.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LocalAddress {
    /// Kernel index of its interface.
    pub ifindex: u32,
    /// The address.
    pub address: IpAddr,
    /// Prefix length.
    pub length: u8,
    /// It carries the mark of the addresses that we add.
    pub ours: bool,
}

/// One entry of the neighbour table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// Kernel index of its interface.
    pub ifindex: u32,
    /// Network-layer address.
    pub address: IpAddr,
    /// Usable link-layer address; `None`: being resolved, failed or deleted.
    pub mac: Option<[u8; 6]>,
    /// Set by an operator: not to be touched.
    pub fixed: bool,
    /// The kernel keeps it resolved (`NTF_EXT_MANAGED`).
    pub managed: bool,
}

/// How the kernel would send to an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteTo {
    /// Kernel index of the outgoing interface.
    pub ifindex: u32,
    /// Gateway; `None`: on the link.
    pub gateway: Option<IpAddr>,
    /// Address of this host that it would use.
    pub source: Option<IpAddr>,
    /// The destination is this host itself.
    pub local: bool,
}

/// Links, addresses and main table, read together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Interfaces by kernel index.
    pub links: BTreeMap<u32, Link>,
    /// Addresses, sorted.
    pub addresses: Vec<LocalAddress>,
    /// Unicast routes of the main table.
    pub table: Table,
}

/// Something changed in the kernel, by other hands than ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// Links, addresses or routes: the tables must be read again.
    Tables,
    /// A neighbour.
    Neighbour(Neighbour),
    /// Notifications were lost: everything must be read again.
    Lost,
}

/// What the actor asks of the kernel.
pub trait Kernel: Send + Sync + 'static {
    /// Reads links, addresses and routes.
    fn snapshot(&self) -> impl Future<Output = Result<Snapshot, FibError>> + Send;
    /// Reads this host's addresses alone.
    fn addresses(&self) -> impl Future<Output = Result<Vec<LocalAddress>, FibError>> + Send;
    /// Reads the neighbour table.
    fn neighbours(&self) -> impl Future<Output = Result<Vec<Neighbour>, FibError>> + Send;
    /// Makes changes in order; one result for each.
    fn change(&self, changes: &[RouteChange]) -> impl Future<Output = Vec<Result<(), FibError>>> + Send;
    /// How many next-hop objects of ours there are.
    fn objects(&self) -> ObjectCounts {
        ObjectCounts::default()
    }
    /// Looks a destination up; `None`: no route.
    fn route_to(&self, destination: IpAddr) -> impl Future<Output = Result<Option<RouteTo>, FibError>> + Send;
    /// Adds a /32 or /128, with our mark.
    fn add_address(&self, ifindex: u32, address: IpAddr) -> impl Future<Output = Result<(), FibError>> + Send;
    /// Removes a /32 or /128.
    fn remove_address(&self, ifindex: u32, address: IpAddr) -> impl Future<Output = Result<(), FibError>> + Send;
    /// Starts resolving a neighbour (`NTF_USE`), and has the kernel keep it resolved or no longer.
    fn probe(&self, ifindex: u32, address: IpAddr, managed: bool) -> impl Future<Output = Result<(), FibError>> + Send;
}
