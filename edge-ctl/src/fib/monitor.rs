//! Notifications of the kernel, translated.

use futures::{Stream, StreamExt};
use rtnetlink::{
    packet_core::{NetlinkMessage, NetlinkPayload},
    packet_route::{RouteNetlinkMessage, route::RouteType},
    sys::{AsyncSocket as _, AsyncSocketExt as _, Socket, SocketAddr, TokioSocket, protocols::NETLINK_ROUTE},
};
use socket2::{SockFilter, SockRef};
use tokio::sync::mpsc;

use super::{Notice, batch::messages, netlink::neighbour, nexthop::wire};

/// Hands on what concerns us until either side ends. `own_port` is the netlink port of our requests.
pub(super) async fn forward(
    mut messages: impl Stream<Item = (NetlinkMessage<RouteNetlinkMessage>, SocketAddr)> + Unpin,
    own_port: u32,
    notices: mpsc::UnboundedSender<Notice>,
) {
    while let Some((message, _)) = messages.next().await {
        if let Some(notice) = translate(message, own_port)
            && notices.send(notice).is_err()
        {
            return;
        }
    }
}

/// A socket for notifications about next-hop objects, which rtnetlink does not know.
///
/// # Errors
/// No socket, or no such group.
pub(super) fn of_objects() -> std::io::Result<TokioSocket> {
    let mut socket = TokioSocket::new(NETLINK_ROUTE)?;
    socket.socket_mut().bind_auto()?;
    // Before Linux 5.3 there is no such group, and nothing to hear of.
    if let Err(error) = socket.socket_mut().add_membership(wire::GROUP) {
        tracing::debug!(%error, "next-hop objects are not watched");
    }
    Ok(socket)
}

/// As [`forward`], for next-hop objects: who deletes one takes its routes along without a word about them.
pub(super) async fn forward_objects(socket: TokioSocket, own_port: u32, notices: mpsc::UnboundedSender<Notice>) {
    loop {
        let concerns = match socket.recv_from_full().await {
            Ok((bytes, _)) => messages(&bytes).any(|(kind, _, message)| {
                let port =
                    message.get(12..).and_then(|bytes| bytes.first_chunk()).map(|port| u32::from_ne_bytes(*port));
                [wire::NEW, wire::DELETE].contains(&kind) && port != Some(own_port)
            }),
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => true,
            Err(error) => {
                tracing::warn!(%error, "next-hop objects are watched no longer; routes are compared periodically");
                return;
            }
        };
        if concerns && notices.send(Notice::Tables).is_err() {
            return;
        }
    }
}

/// Lets the kernel leave out what one of our own sockets has changed of the routes: a full table would else come back,
/// message by message, only to be passed over.
///
/// # Errors
/// The socket option's error.
pub(super) fn leave_out(watching: &Socket, port: u32) -> std::io::Result<()> {
    /// `BPF_LD | BPF_H | BPF_ABS`, `BPF_LD | BPF_W | BPF_ABS`, `BPF_JMP | BPF_JEQ | BPF_K`, `BPF_RET | BPF_K`.
    const LOAD_HALF: u16 = 0x28;
    const LOAD_WORD: u16 = 0x20;
    const JUMP_IF_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    /// `RTM_NEWROUTE` and `RTM_DELROUTE`.
    const ROUTE_CHANGES: [u16; 2] = [24, 25];
    // Type and port of `struct nlmsghdr`; a filter loads big-endian, and the header is as the host has it.
    let (kind_at, port_at) = (4, 12);
    let [new, gone] = ROUTE_CHANGES.map(|kind| u32::from(kind.to_be()));
    SockRef::from(watching).attach_filter(&[
        SockFilter::new(LOAD_HALF, 0, 0, kind_at),
        SockFilter::new(JUMP_IF_EQUAL, 1, 0, new),
        SockFilter::new(JUMP_IF_EQUAL, 0, 3, gone),
        SockFilter::new(LOAD_WORD, 0, 0, port_at),
        SockFilter::new(JUMP_IF_EQUAL, 0, 1, port.to_be()),
        SockFilter::new(RETURN, 0, 0, 0),
        SockFilter::new(RETURN, 0, 0, u32::MAX),
    ])
}

/// What a notification means; `None`: nothing to us, or the echo of a change of our own.
fn translate(message: NetlinkMessage<RouteNetlinkMessage>, own_port: u32) -> Option<Notice> {
    let own = message.header.port_number == own_port;
    let message = match message.payload {
        NetlinkPayload::InnerMessage(message) => message,
        NetlinkPayload::Overrun(_) => return Some(Notice::Lost),
        _ => return None,
    };
    match message {
        RouteNetlinkMessage::NewLink(_) | RouteNetlinkMessage::DelLink(_) => Some(Notice::Tables),
        RouteNetlinkMessage::NewAddress(_) | RouteNetlinkMessage::DelAddress(_) if !own => Some(Notice::Tables),
        // Broadcast, local and multicast routes come and go with addresses, which are reported by themselves.
        RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route)
            if !own && route.header.kind == RouteType::Unicast =>
        {
            Some(Notice::Tables)
        }
        RouteNetlinkMessage::NewNeighbour(message) => neighbour(&message).map(Notice::Neighbour),
        RouteNetlinkMessage::DelNeighbour(message) => {
            let gone = neighbour(&message)?;
            Some(Notice::Neighbour(super::Neighbour { mac: None, ..gone }))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use rtnetlink::packet_route::{
        link::LinkMessage,
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
        route::RouteMessage,
    };

    use super::*;

    const OWN: u32 = 77;

    fn said(message: RouteNetlinkMessage, port: u32) -> Option<Notice> {
        let mut message = NetlinkMessage::from(message);
        message.header.port_number = port;
        translate(message, OWN)
    }

    fn route(kind: RouteType) -> RouteNetlinkMessage {
        let mut message = RouteMessage::default();
        message.header.kind = kind;
        RouteNetlinkMessage::NewRoute(message)
    }

    #[test]
    fn the_echo_of_our_own_routes_is_not_a_notice_and_anybody_elses_is() {
        assert_eq!(said(route(RouteType::Unicast), OWN), None);
        assert_eq!(said(route(RouteType::Unicast), 4711), Some(Notice::Tables));
        assert_eq!(said(route(RouteType::Unicast), 0), Some(Notice::Tables), "the kernel itself");
        assert_eq!(said(route(RouteType::Broadcast), 4711), None);
    }

    #[test]
    fn links_are_noticed_whoever_changed_them_and_lost_messages_are_told() {
        assert_eq!(said(RouteNetlinkMessage::NewLink(LinkMessage::default()), OWN), Some(Notice::Tables));
        let lost = NetlinkMessage::new(Default::default(), NetlinkPayload::Overrun(Vec::new()));
        assert_eq!(translate(lost, OWN), Some(Notice::Lost));
    }

    #[test]
    fn a_neighbour_that_failed_or_went_has_no_usable_address() {
        let entry = |state| {
            let mut message = NeighbourMessage::default();
            message.header.ifindex = 2;
            message.header.state = state;
            message.attributes.push(NeighbourAttribute::Destination(NeighbourAddress::Inet([172, 16, 1, 80].into())));
            message.attributes.push(NeighbourAttribute::LinkLayerAddress(vec![2; 6]));
            message
        };
        let mac = |notice| match notice {
            Some(Notice::Neighbour(neighbour)) => neighbour.mac,
            other => panic!("{other:?}"),
        };
        for usable in [NeighbourState::Reachable, NeighbourState::Stale, NeighbourState::Delay, NeighbourState::Probe] {
            assert_eq!(mac(said(RouteNetlinkMessage::NewNeighbour(entry(usable)), 0)), Some([2; 6]), "{usable:?}");
        }
        assert_eq!(mac(said(RouteNetlinkMessage::NewNeighbour(entry(NeighbourState::Failed)), 0)), None);
        assert_eq!(mac(said(RouteNetlinkMessage::DelNeighbour(entry(NeighbourState::Stale)), 0)), None);
    }
}
