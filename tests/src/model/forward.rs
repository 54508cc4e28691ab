//! From an entry to the wire: TTL, next hop, length, rewriting.

use edge_common::{
    address::unmapped,
    maps::{NextHop, next_hop_flag},
    verdict::Reason,
};

use super::{
    coverage::Point,
    decide::{Decision, Input, Original, Rewrite, answer, refuse},
    flow::Flow,
    fragments, mss,
    state::{Route, State, Table},
    told::What,
    wire::{Ip, Segment, UDP},
};
use crate::datapath::rig::{Action, Hook};

/// Where a packet goes.
#[allow(missing_docs, reason = "named by what they are")]
pub enum Way {
    /// A link: interface and MACs.
    Out {
        ifindex: u32,
        macs: ([u8; 6], [u8; 6]),
        mtu: u32,
        redirectable: bool,
        /// By a next-hop number.
        listed: bool,
    },
    /// Not there: why, and whether the stack gets it (rewritten) or nobody.
    Stack(Reason, Point),
    Nowhere(Reason, Point),
}

/// Sends the packet by the entry of its key in `table`.
pub fn send(state: &mut State, input: &Input, segment: &Segment, table: Table) -> Decision {
    let key = &segment.key;
    let Some(flow) = state.flow(table, key).copied() else {
        return Decision::DROP;
    };
    if segment.ip.ttl <= 1 {
        state.hit(Point::ForwardTtl);
        return answer(state, input, What::Expired, flow.service);
    }
    let (ifindex, macs, mtu, redirectable, listed) = match way(state, table, &flow) {
        Way::Nowhere(reason, point) => {
            state.hit(point);
            return refuse(state, reason, flow.service);
        }
        Way::Stack(reason, point) => {
            state.hit(point);
            return to_stack(state, input, segment, table, &flow, reason);
        }
        Way::Out { ifindex, macs, mtu, redirectable, listed } => (ifindex, macs, mtu, redirectable, listed),
    };
    let same = ifindex == input.ingress;
    let reachable = same || redirectable || input.hook == Hook::Tc;
    // By a number, the length is judged first; by a lookup of its own, whether XDP can go there at all.
    if longest_piece(state, input, segment.ip.total_len, segment.headers) > mtu as usize && (listed || reachable) {
        if segment.ip.dont_fragment {
            state.hit(Point::TooBig);
            return answer(state, input, What::TooBig(mtu), flow.service);
        }
        state.hit(Point::TooLongToStack);
        return to_stack(state, input, segment, table, &flow, Reason::ViaStack);
    }
    if !reachable {
        state.hit(Point::ViaStack);
        return to_stack(state, input, segment, table, &flow, Reason::ViaStack);
    }
    account(state, input, segment, table);
    state.hit(if same { Point::Transmit } else { Point::Redirect });
    // TC has no "transmit": it redirects to the interface the packet came by.
    let action = if same && input.hook == Hook::Xdp { Action::Transmit } else { Action::Redirect };
    Decision { action, rewrite: Some(rewritten(state, input, segment, &flow, Some(macs))), ..Decision::PASS }
}

/// Its length, or a segment's.
fn longest_piece(state: &mut State, input: &Input, total_len: usize, headers: usize) -> usize {
    if input.hook == Hook::Tc && input.gso_size != 0 {
        state.hit(Point::Gso);
        headers + input.gso_size as usize
    } else {
        total_len
    }
}

/// Where a packet goes that follows a flow without being one of its tuple.
#[allow(missing_docs, reason = "named by what they are")]
pub enum Onward {
    Nowhere(Reason),
    /// Longer than the next hop takes, which is so much, and not to be fragmented.
    TooBig(u32),
    Stack(Reason),
    /// With these MACs.
    Out(Action, ([u8; 6], [u8; 6])),
}

/// Where a packet with this IP header and `l4_len` bytes of headers behind it goes, that follows a flow.
pub fn onward(state: &mut State, input: &Input, ip: &Ip, l4_len: usize, (table, flow): (Table, &Flow)) -> Onward {
    let (ifindex, macs, mtu, redirectable, listed) = match way(state, table, flow) {
        Way::Nowhere(reason, point) => {
            state.hit(point);
            return Onward::Nowhere(reason);
        }
        Way::Stack(reason, point) => {
            state.hit(point);
            return Onward::Stack(reason);
        }
        Way::Out { ifindex, macs, mtu, redirectable, listed } => (ifindex, macs, mtu, redirectable, listed),
    };
    let same = ifindex == input.ingress;
    let reachable = same || redirectable || input.hook == Hook::Tc;
    let longest = longest_piece(state, input, ip.total_len, ip.header_len + l4_len);
    let too_long = longest > mtu as usize && (listed || reachable);
    if too_long && ip.dont_fragment {
        return Onward::TooBig(mtu);
    }
    if too_long || !reachable {
        return Onward::Stack(Reason::ViaStack);
    }
    Onward::Out(if same && input.hook == Hook::Xdp { Action::Transmit } else { Action::Redirect }, macs)
}

fn to_stack(
    state: &mut State,
    input: &Input,
    segment: &Segment,
    table: Table,
    flow: &Flow,
    reason: Reason,
) -> Decision {
    account(state, input, segment, table);
    state.because(reason, flow.service);
    Decision { rewrite: Some(rewritten(state, input, segment, flow, None)), ..Decision::PASS }
}

fn rewritten(
    state: &mut State,
    input: &Input,
    segment: &Segment,
    flow: &Flow,
    macs: Option<([u8; 6], [u8; 6])>,
) -> Rewrite {
    let id = if segment.ip.fragment { fragments::remember(state, input, segment, flow) } else { segment.ip.id };
    let mss = match state.config.services.get(&flow.service) {
        Some((service, _)) => mss::lowered(input.frame, segment, service),
        None => None,
    };
    state.coverage.hit_if(Point::MssLowered, mss.is_some());
    Rewrite {
        mss,
        addresses: (flow.new_src, flow.new_dst),
        ports: (flow.new_src_port, flow.new_dst_port),
        macs,
        id,
        segment: Original {
            l4: segment.l4,
            udp: segment.key.protocol == UDP,
            later_fragment: false,
            v6: segment.ip.v6,
            fragment_at: segment.ip.fragment_at,
        },
    }
}

/// Counts a packet of an entry.
pub fn account(state: &mut State, input: &Input, segment: &Segment, table: Table) {
    let bytes = segment.ip.total_len as u64;
    let Some(flow) = state.change(table, &segment.key) else { return };
    flow.last_seen = input.now;
    flow.packets += 1;
    flow.bytes += bytes;
    let (service, backend, reply) = (flow.service, flow.backend, flow.direction != 0);
    state.count(service, backend, |stats| {
        if reply {
            stats.packets_out += 1;
            stats.bytes_out += bytes;
        } else {
            stats.packets_in += 1;
            stats.bytes_in += bytes;
        }
    });
}

/// By the entry's next hop, or by a route lookup where it has none that is up to date.
pub fn way(state: &mut State, table: Table, flow: &Flow) -> Way {
    let generation = state.config.generation;
    if flow.next_hop != 0 && flow.route_generation == generation {
        return listed(state, flow.next_hop);
    }
    state.hit(Point::Resolve);
    if let Some(flow) = state.change(table, &flow.key) {
        (flow.next_hop, flow.route_generation) = (0, generation);
    }
    match state.config.route(flow.key.v6, &flow.new_src, &flow.new_dst) {
        Route::Unresolved => Way::Stack(Reason::NeighbourUnresolved, Point::NoNeighbour),
        Route::Refused | Route::NotForwarded => Way::Nowhere(Reason::NoRoute, Point::NoRoute),
        Route::Neighbour { ifindex, address, dst_mac, src_mac, mtu } => {
            let redirectable = state.config.redirectable.contains(&ifindex);
            let flags = if redirectable { 0 } else { next_hop_flag::VIA_STACK };
            let hop = NextHop { ifindex, neighbour: address, dst_mac, src_mac, mtu, flags, ..NextHop::default() };
            if !flow.key.v6 && unmapped(&address).is_none() {
                state.hit(Point::ForeignGateway);
            }
            match number(state, hop) {
                Some(number) => {
                    if let Some(flow) = state.change(table, &flow.key) {
                        flow.next_hop = number;
                    }
                    listed(state, number)
                }
                None => {
                    state.hit(Point::NoNextHopNumber);
                    Way::Out { ifindex, macs: (dst_mac, src_mac), mtu, redirectable, listed: false }
                }
            }
        }
    }
}

fn listed(state: &mut State, number: u32) -> Way {
    match state.next_hops.get(&number) {
        Some(hop) => Way::Out {
            ifindex: hop.ifindex,
            macs: (hop.dst_mac, hop.src_mac),
            mtu: hop.mtu,
            redirectable: hop.flags & next_hop_flag::VIA_STACK == 0,
            listed: true,
        },
        None => Way::Nowhere(Reason::NotReady, Point::NoNextHop),
    }
}

/// The number of a next hop, brought up to date or given out; `None` where none is left.
fn number(state: &mut State, hop: NextHop) -> Option<u32> {
    let key = (hop.ifindex, hop.neighbour);
    let number = match state.next_hop_index.get(&key).copied() {
        Some(number) => {
            if state.next_hops.get(&number) != Some(&hop) {
                state.hit(Point::ChangedNextHop);
            }
            number
        }
        None if state.next_hop_cursor >= state.config.next_hops => return None,
        None => {
            state.hit(Point::NewNextHop);
            state.next_hop_cursor += 1;
            state.next_hop_index.insert(key, state.next_hop_cursor);
            state.next_hop_cursor
        }
    };
    state.next_hops.insert(number, hop);
    state.touched_hops.push(number);
    Some(number)
}
