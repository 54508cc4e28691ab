//! Notifications of the kernel, translated.

use futures::{Stream, StreamExt};
use rtnetlink::{
    packet_core::{NetlinkMessage, NetlinkPayload},
    packet_route::{RouteNetlinkMessage, route::RouteType},
    sys::SocketAddr,
};
use tokio::sync::mpsc;

use super::{Notice, netlink::neighbour};

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
