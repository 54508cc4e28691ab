//! VLAN devices and bonds as the program knows them: it runs on the interface below, whose frames carry the tags, and is told
//! which device of the host those tags stand for.

use std::collections::{BTreeMap, BTreeSet};

use edge_common::maps::{CUSTOMER_TAG, Port};

use super::interfaces::Interface;

/// Where the program runs for an interface: of a VLAN device the one below, with the tags of its frames, the outer one first.
/// `None` for anything else, and for a VLAN device with more tags than the program handles or nothing below it here: the
/// program then runs on the device itself.
pub fn below<'a>(interface: &Interface, known: &'a [Interface]) -> Option<(&'a Interface, [u32; 2])> {
    let (mut index, own) = interface.vlan?;
    let mut tags = [own, 0];
    loop {
        let lower = known.iter().find(|lower| lower.ifindex == index)?;
        let Some((next, outer)) = lower.vlan else {
            return Some((lower, tags));
        };
        if tags[1] != 0 {
            return None;
        }
        (index, tags) = (next, [outer, tags[0]]);
    }
}

/// For each of `configured` the name of the interface that the program runs on for it.
pub fn bases(configured: &[String], known: &[Interface]) -> BTreeMap<String, String> {
    let base = |name: &String| {
        let interface = known.iter().find(|interface| interface.name == *name)?;
        Some(below(interface, known)?.0.name.clone())
    };
    configured.iter().map(|name| (name.clone(), base(name).unwrap_or_else(|| name.clone()))).collect()
}

/// Tags as users write them: `VLAN 100`, or `VLAN 200 in 802.1ad VLAN 100`.
pub fn describe(tags: [u32; 2]) -> String {
    let one = |tag: u32| {
        let kind = if tag >> 16 == u32::from(CUSTOMER_TAG) { "" } else { "802.1ad " };
        format!("{kind}VLAN {}", tag & 0xfff)
    };
    match tags {
        [only, 0] => one(only),
        [outer, inner] => format!("{} in {}", one(inner), one(outer)),
    }
}

/// Both sides of each VLAN device, and the bond of each of its ports, at which a native XDP program sees the bond's frames.
pub fn ports(known: &[Interface]) -> BTreeMap<Port, Port> {
    let mut ports = BTreeMap::new();
    let bond_of = |port: &Interface| {
        let bond = known.iter().find(|bond| bond.bond && Some(bond.ifindex) == port.controller)?;
        Some(bond.ifindex)
    };
    for port in known {
        if let Some(bond) = bond_of(port) {
            ports.insert(Port::untagged(port.ifindex), Port::untagged(bond));
        }
    }
    for device in known {
        let Some((lower, tags)) = below(device, known) else { continue };
        let device = Port::untagged(device.ifindex);
        ports.insert(device, Port { ifindex: lower.ifindex, tags });
        let members = known.iter().filter(|port| bond_of(port) == Some(lower.ifindex)).map(|port| port.ifindex);
        for ifindex in members.chain([lower.ifindex]) {
            ports.insert(Port { ifindex, tags }, device);
        }
    }
    ports
}

/// The interfaces that packets are received by, in the eyes of the stack, where the program runs on `attached`: those, and
/// the VLAN devices on them.
pub fn receiving(attached: &BTreeSet<u32>, known: &[Interface]) -> BTreeSet<u32> {
    let on_them =
        known.iter().filter(|device| below(device, known).is_some_and(|(l, _)| attached.contains(&l.ifindex)));
    attached.iter().copied().chain(on_them.map(|device| device.ifindex)).collect()
}

#[cfg(test)]
mod tests {
    use edge_common::maps::{SERVICE_TAG, tag};

    use super::*;

    fn plain(name: &str, ifindex: u32) -> Interface {
        Interface { name: name.to_owned(), ifindex, ..Interface::default() }
    }

    fn vlan(name: &str, ifindex: u32, lower: u32, tag: u32) -> Interface {
        Interface { vlan: Some((lower, tag)), ..plain(name, ifindex) }
    }

    const Q100: u32 = tag(CUSTOMER_TAG, 100);
    const Q200: u32 = tag(CUSTOMER_TAG, 200);
    const AD100: u32 = tag(SERVICE_TAG, 100);

    fn port(ifindex: u32, tags: [u32; 2]) -> Port {
        Port { ifindex, tags }
    }

    #[test]
    fn a_vlan_device_is_served_on_the_interface_below_under_its_tags_the_outer_one_first() {
        let known = [plain("eth0", 2), vlan("eth0.100", 3, 2, AD100), vlan("eth0.100.200", 4, 3, Q200)];
        assert_eq!(below(&known[0], &known), None);
        assert_eq!(below(&known[1], &known), Some((&known[0], [AD100, 0])));
        assert_eq!(below(&known[2], &known), Some((&known[0], [AD100, Q200])));
        assert_eq!(describe([AD100, Q200]), "VLAN 200 in 802.1ad VLAN 100");
        assert_eq!(describe([Q100, 0]), "VLAN 100");
        let names = ["eth0.100".to_owned(), "eth0".to_owned(), "gone".to_owned()];
        let bases = bases(&names, &known);
        assert_eq!((&*bases["eth0.100"], &*bases["eth0"], &*bases["gone"]), ("eth0", "eth0", "gone"));
        assert_eq!(receiving(&BTreeSet::from([2]), &known), BTreeSet::from([2, 3, 4]));
        assert_eq!(receiving(&BTreeSet::from([9]), &known), BTreeSet::from([9]));
    }

    #[test]
    fn a_third_tag_and_a_lower_interface_out_of_sight_leave_the_vlan_device_to_itself() {
        let known = [
            plain("eth0", 2),
            vlan("a", 3, 2, Q100),
            vlan("b", 4, 3, Q100),
            vlan("c", 5, 4, Q100),
            vlan("d", 6, 99, Q100),
        ];
        assert_eq!(below(&known[3], &known), None);
        assert_eq!(below(&known[4], &known), None);
        assert_eq!(bases(&["c".to_owned()], &known)["c"], "c");
    }

    #[test]
    fn both_sides_of_a_vlan_are_found_and_a_bond_s_ports_stand_for_the_bond() {
        let slave = |name, ifindex| Interface { controller: Some(2), ..plain(name, ifindex) };
        let bond = Interface { bond: true, ..plain("bond0", 2) };
        let bridge_port = Interface { controller: Some(9), ..plain("tap", 8) };
        let known = [bond, slave("eth0", 3), slave("eth1", 4), vlan("bond0.100", 5, 2, Q100), bridge_port];
        let expected = [
            (Port::untagged(3), Port::untagged(2)),
            (Port::untagged(4), Port::untagged(2)),
            (Port::untagged(5), port(2, [Q100, 0])),
            (port(2, [Q100, 0]), Port::untagged(5)),
            (port(3, [Q100, 0]), Port::untagged(5)),
            (port(4, [Q100, 0]), Port::untagged(5)),
        ];
        assert_eq!(ports(&known), BTreeMap::from(expected));
    }
}
