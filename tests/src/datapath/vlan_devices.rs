//! Real VLAN devices and bonds of the kernel around a [`Rig`], with sockets behind them, as an operator has them:
//!
//! ```text
//! client: uplink-peer.5 ------- uplink.5 (802.1Q)            bond0 (active-backup) ------- bond1: pod
//!         uplink-peer.9.6 ----- uplink.9.6 (802.1Q in 802.1ad)   bond0.7 (802.1Q on the bond) -- bond1.7
//! ```

use std::{net::IpAddr, os::fd::OwnedFd};

use anyhow::{Context, Result, ensure};
use edge_common::maps::{OwnAddresses, Port, interface_flag, name};
use edge_ctl::datapath::{interfaces, own_addresses, vlans};

use super::{
    live::Host,
    namespace::{ifindex, in_namespace, ip, run, sysctl},
    rig::{CLIENT_MAC, Family, Hook, PODS_MAC, Rig, SNAT, SNAT6, mac, pod, pod_mac, pod6},
    tap::Wire,
};
use crate::lab::xdp_pass;

/// A network behind a VLAN device of the edge, which is its first host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Network {
    /// Clients in one 802.1Q VLAN.
    Tagged,
    /// Clients in an 802.1Q VLAN inside an 802.1ad one.
    DoubleTagged,
    /// Backends in an 802.1Q VLAN on the bond.
    Rack,
}

impl Network {
    /// Address `host` of the network, in either family.
    pub fn address(self, family: Family, host: u8) -> IpAddr {
        let number = match self {
            Self::Tagged => 5,
            Self::DoubleTagged => 6,
            Self::Rack => 7,
        };
        let v6 = [0x2001, 0xdb8, 0x100 + u16::from(number), 0, 0, 0, 0, u16::from(host)];
        family.of([192, 168, number, host].into(), v6.into())
    }
}

/// The edge's interfaces as a configuration would name them.
pub const CONFIGURED: [&str; 4] = ["uplink.5", "uplink.9.6", "bond0", "bond0.7"];
/// Host number of the client and of the pod in their networks.
pub const FAR: u8 = 10;

/// Why the kernel cannot have these devices, if it cannot.
///
/// # Errors
/// Where no namespace can be made to try it in.
pub fn missing() -> Result<Option<&'static str>> {
    in_namespace(|| {
        ip("link add try type veth peer name try-peer")?;
        Ok(if ip("link add link try name try.1 type vlan id 1").is_err() {
            Some("the kernel has no VLAN devices (8021q)")
        } else if ip("link add try-bond type bond mode active-backup").is_err() {
            Some("the kernel has no bonds (bonding)")
        } else {
            None
        })
    })
}

/// A client and a pod behind VLAN devices and a bond, with the program attached as the product would.
pub struct VlanDevices {
    /// In both client networks.
    pub client: Host,
    /// Pod 0 on the bond, and in [`Network::Rack`].
    pub pod: Host,
    _awake: Vec<OwnedFd>,
}

impl VlanDevices {
    /// Makes the devices, tells the program of them by the product's own code, and attaches it to what that finds below them.
    ///
    /// # Errors
    /// Where a device, a setting or the attachment is refused, or the product finds other interfaces below the devices.
    pub fn new(rig: &mut Rig, hook: Hook) -> Result<Self> {
        for scope in ["all", "default"] {
            sysctl(&format!("ipv4/conf/{scope}/accept_local"), "1")?;
            sysctl(&format!("ipv4/conf/{scope}/rp_filter"), "0")?;
        }
        ip("link add pods2 type veth peer name pods2-peer")?;
        wire_like_a_nic(hook)?;
        let mut devices = Self { client: Host::new()?, pod: Host::new()?, _awake: Vec::new() };
        clients(&devices.client)?;
        backends(&devices.pod)?;
        neighbours()?;
        if hook == Hook::Xdp {
            devices._awake.push(devices.client.run(|| xdp_pass::listen(ifindex("uplink-peer")?))?);
        }
        tell(rig)?;
        let wire = if hook == Hook::Xdp { Wire::Native } else { Wire::Tc };
        ["uplink", "bond0"].into_iter().try_for_each(|interface| rig.ebpf.attach(interface, wire))?;
        Ok(devices)
    }

    /// Has the client reach everything by way of one of its networks.
    ///
    /// # Errors
    /// Where the routes are refused.
    pub fn come_from(&self, network: Network) -> Result<()> {
        self.client.run(move || {
            ip(&format!("route replace default via {}", network.address(Family::V4, 1)))?;
            ip(&format!("-6 route replace default via {}", network.address(Family::V6, 1)))
        })
    }
}

/// Sockets finish their checksums and put tags into the frames where XDP sees those as they are; at TC, what the program left of
/// an unfinished checksum is finished as the frame leaves, so that its receiver looks at it.
fn wire_like_a_nic(hook: Hook) -> Result<()> {
    let (ends, features) = match hook {
        Hook::Xdp => {
            (["uplink-peer", "pods-peer", "pods2-peer"], "tx off gro on txvlan off tx-vlan-stag-hw-insert off")
        }
        Hook::Tc => (["uplink", "pods", "pods2"], "tx off"),
    };
    ends.into_iter().try_for_each(|end| run("ethtool", &format!("-K {end} {features}")))
}

fn vlan_devices(lower: &str, far: bool, network: Network) -> Result<()> {
    let host = if far { FAR } else { 1 };
    let device = match network {
        Network::Tagged => {
            ip(&format!("link add link {lower} name {lower}.5 type vlan id 5"))?;
            format!("{lower}.5")
        }
        Network::DoubleTagged => {
            ip(&format!("link add link {lower} name {lower}.9 type vlan proto 802.1ad id 9"))?;
            ip(&format!("link set {lower}.9 up"))?;
            ip(&format!("link add link {lower}.9 name {lower}.9.6 type vlan id 6"))?;
            format!("{lower}.9.6")
        }
        Network::Rack => {
            ip(&format!("link add link {lower} name {lower}.7 type vlan id 7"))?;
            format!("{lower}.7")
        }
    };
    ip(&format!("link set {device} mtu 1500 up"))?;
    ip(&format!("address add {}/24 dev {device}", network.address(Family::V4, host)))?;
    ip(&format!("address add {}/64 dev {device} nodad", network.address(Family::V6, host)))
}

fn clients(client: &Host) -> Result<()> {
    // Room for both tags.
    ip("link set uplink mtu 1508")?;
    ip("link set uplink-peer mtu 1508")?;
    ip(&format!("link set uplink-peer netns {}", client.id()))?;
    let networks = [Network::Tagged, Network::DoubleTagged];
    client.run(move || {
        ip(&format!("link set uplink-peer address {} up", mac(CLIENT_MAC)))?;
        networks.into_iter().try_for_each(|network| vlan_devices("uplink-peer", true, network))
    })?;
    networks.into_iter().try_for_each(|network| vlan_devices("uplink", false, network))
}

fn bond(name: &str, ports: [&str; 2], address: [u8; 6]) -> Result<()> {
    ip(&format!("link add {name} type bond mode active-backup miimon 20"))?;
    for port in ports {
        ip(&format!("address flush dev {port}"))?;
        ip(&format!("link set {port} mtu 1504 down"))?;
        ip(&format!("link set {port} master {name}"))?;
    }
    ip(&format!("link set {name} mtu 1504 address {} up", mac(address)))
}

fn backends(far: &Host) -> Result<()> {
    for port in ["pods-peer", "pods2-peer"] {
        ip(&format!("link set {port} netns {}", far.id()))?;
    }
    bond("bond0", ["pods", "pods2"], PODS_MAC)?;
    ip(&format!("address add {SNAT}/24 dev bond0"))?;
    ip(&format!("address add {SNAT6}/64 dev bond0 nodad"))?;
    vlan_devices("bond0", false, Network::Rack)?;
    far.run(|| {
        bond("bond1", ["pods-peer", "pods2-peer"], pod_mac(0))?;
        ip(&format!("address add {}/24 dev bond1", pod(0)))?;
        ip(&format!("address add {}/64 dev bond1 nodad", pod6(0)))?;
        vlan_devices("bond1", true, Network::Rack)?;
        ip(&format!("route add default via {SNAT}"))?;
        ip(&format!("route add default via {SNAT6}"))?;
        // The rack answers by its own VLAN, though the edge's source address is on the bond itself.
        for (family, option) in [(Family::V4, "-4"), (Family::V6, "-6")] {
            let [gateway, own] = [1, FAR].map(|host| Network::Rack.address(family, host));
            ip(&format!("{option} route add default via {gateway} table 7"))?;
            ip(&format!("{option} rule add from {own} lookup 7"))?;
        }
        Ok(())
    })
}

fn neighbours() -> Result<()> {
    let [v4, v6] = [Family::V4, Family::V6];
    let far = |network: Network| [network.address(v4, FAR), network.address(v6, FAR)];
    for (device, address, addresses) in [
        ("uplink.5", CLIENT_MAC, far(Network::Tagged)),
        ("uplink.9.6", CLIENT_MAC, far(Network::DoubleTagged)),
        ("bond0.7", pod_mac(0), far(Network::Rack)),
        ("bond0", pod_mac(0), [pod(0).into(), pod6(0).into()]),
    ] {
        for neighbour in addresses {
            ip(&format!("neigh replace {neighbour} lladdr {} dev {device} nud permanent", mac(address)))?;
        }
    }
    Ok(())
}

/// What the daemon tells the program of the host's interfaces.
fn tell(rig: &mut Rig) -> Result<()> {
    let known = interfaces::list()?;
    let configured = CONFIGURED.map(str::to_owned);
    let bases = vlans::bases(&configured, &known);
    let expected = ["uplink", "uplink", "bond0", "bond0"];
    ensure!(
        configured.iter().zip(expected).all(|(name, base)| bases.get(name).is_some_and(|found| found == base)),
        "below the configured interfaces: {bases:?}"
    );
    let mut map = rig.hash::<Port, Port>(name::VLANS)?;
    for (one, other) in vlans::ports(&known) {
        map.insert(one, other, 0)?;
    }
    let attached = [ifindex("uplink")?, ifindex("bond0")?];
    let mut flags = rig.hash::<u32, u32>(name::INTERFACES)?;
    let old: Vec<u32> = flags.keys().collect::<Result<_, _>>().context("interfaces")?;
    old.into_iter().try_for_each(|index| flags.remove(&index))?;
    let redirectable = interfaces::redirectable(&known);
    for interface in &known {
        let is = |list: &[u32], flag: u32| if list.contains(&interface.ifindex) { flag } else { 0 };
        let value = is(&attached, interface_flag::ATTACHED) | is(&redirectable, interface_flag::XDP_REDIRECT);
        if value != 0 {
            flags.insert(interface.ifindex, value, 0)?;
        }
    }
    let receiving = vlans::receiving(&attached.into(), &known);
    let mut own = rig.hash::<u32, OwnAddresses>(name::OWN_ADDRESSES)?;
    for (index, addresses) in own_addresses::choose(&receiving, &own_addresses::list()?) {
        own.insert(index, addresses, 0)?;
    }
    Ok(())
}
