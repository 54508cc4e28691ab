//! Numbers and names of the stages: programs of their own that a hook's entry program hands a packet to by a tail call.
//! Each has the verifier's budget and the 512 bytes of stack to itself. Numbers are slots of the two `PROG_ARRAY` maps,
//! which belong to one object file, so they may change between versions.

/// `PROG_ARRAY` of the XDP stages. A `PROG_ARRAY` takes programs of one type only.
pub const STAGES_XDP: &str = "STAGES_XDP";
/// `PROG_ARRAY` of the TC stages.
pub const STAGES_TC: &str = "STAGES_TC";
/// Slots of each.
pub const SLOTS: u32 = 32;

/// A packet that may change its flow's state, or that has no flow.
pub const TRACK: u32 = 0;
/// A packet without a flow: classified, and where it may start one, the flow is made.
pub const CREATE: u32 = 1;
/// A packet whose flow is known: sent on its way.
pub const SEND: u32 = 2;

/// An ICMP packet: where it is an error about a flow's packet, it is translated.
pub const RELAY: u32 = 3;
/// A packet whose sender is told by ICMP what became of it.
pub const ANSWER: u32 = 4;
/// A fragment: the first goes on to [`TRACK`], the rest follow it.
pub const FRAG: u32 = 5;

/// An IPv6 packet: all that the entry program does for an IPv4 one. A stage, so that IPv4 packets pay nothing for it and it
/// has a verifier's budget of its own.
pub const IPV6: u32 = 6;
/// As [`TRACK`], of IPv6.
pub const TRACK_V6: u32 = 7;
/// As [`CREATE`], of IPv6.
pub const CREATE_V6: u32 = 8;
/// As [`SEND`], of IPv6.
pub const SEND_V6: u32 = 9;

/// A TCP segment in mid-flow, or a dnat backend's reply, without a flow.
pub const MID_FLOW: u32 = 16;
/// As [`MID_FLOW`], of IPv6.
pub const MID_FLOW_V6: u32 = 17;
/// As [`RELAY`], of ICMPv6.
pub const RELAY_V6: u32 = 10;
/// As [`ANSWER`], of IPv6.
pub const ANSWER_V6: u32 = 11;
/// As [`FRAG`], of IPv6.
pub const FRAG_V6: u32 = 12;

/// A frame with VLAN tags, which are taken off: then as the entry program does, so that untagged packets pay nothing for it.
pub const VLAN: u32 = 18;
/// As [`VLAN`], from an IPv6 packet's header on.
pub const VLAN_V6: u32 = 19;

/// Every stage: its number, and its program's name after `edge_xdp_` or `edge_tc_`. The kernel keeps 15 bytes of the whole.
pub const ALL: &[(u32, &str)] = &[
    (TRACK, "track"),
    (CREATE, "create"),
    (SEND, "send"),
    (RELAY, "relay"),
    (ANSWER, "answer"),
    (FRAG, "frag"),
    (IPV6, "ipv6"),
    (TRACK_V6, "track6"),
    (CREATE_V6, "creat6"),
    (SEND_V6, "send6"),
    (MID_FLOW, "midflo"),
    (MID_FLOW_V6, "midfl6"),
    (RELAY_V6, "relay6"),
    (ANSWER_V6, "answe6"),
    (FRAG_V6, "frag6"),
    (VLAN, "vlan"),
    (VLAN_V6, "vlan6"),
];

const _: () = {
    let mut at = 0;
    while at < ALL.len() {
        assert!(ALL[at].0 < SLOTS && ALL[at].1.len() <= 6);
        at += 1;
    }
};
