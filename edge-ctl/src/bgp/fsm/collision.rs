//! Two connections of one peer: which of them is closed (RFC 4271 6.8, RFC 6286 2.3).

use std::time::Duration;

use super::{CONNECT_TIMEOUT, Connection, Now, OPEN_HOLD, Phase, STABLE, Side, Stage, State};
use crate::bgp::wire::Open;

/// Connections that cross have their OPENs within this time. A connection that is older and has none may belong to a life
/// of the peer that is over, and must not be what keeps the peer away.
const CROSSING: Duration = Duration::from_secs(5);
/// A dial that is younger may have reached the peer, which will hear of it in a moment. An older one has been swallowed on
/// its way, and must not be what keeps the peer away.
const DIALLING: Duration = Duration::from_secs(1);

/// True where `other` is the established connection of an earlier life of the peer, which has restarted. Within one life
/// R is only ever cleared, so that it tells a new life where the established OPEN had none, unless the session is so young
/// that the two may have crossed: the peer said R on the connection that it opened first, and no longer on the one that arrived
/// first. Where both have it, the two may have crossed in one restart, unless the session has lasted.
pub(super) fn outlived(other: &Connection, new: &Open, now: Now) -> bool {
    let Stage::Established(established) = &other.stage else { return false };
    let restarting = |open: &Open| open.restart().is_some_and(|restart| restart.restarting);
    let lasted = |time: Duration| other.since.is_some_and(|since| now.time.saturating_sub(since) >= time);
    restarting(new) && lasted(if restarting(&established.peer) { STABLE } else { CROSSING })
}

/// RFC 4271 6.8 and RFC 6286 2.3: which connection is closed. The one that the side with the higher identifier opened
/// survives; with equal identifiers, the higher AS decides.
///
/// Were that decided only where both connections have their OPENs, each side would decide at another moment: the one with
/// the higher identifier might be established on the lower one's connection and close its own, while the OPEN on that one
/// makes the lower side close the first. Both would be lost, and with them, in a restart, what the other side kept stale.
/// So the higher side alone decides, when the lower one's OPEN comes: if its own connection is there by then, the other is
/// closed before a KEEPALIVE could establish it (RFC 4271 6.8 lets OpenSent count where the identifier is known, and this
/// OPEN has told it), and so it is while its dial is young; if not, its dial comes too late and says no OPEN (see
/// [`super::connected`]). The lower side never has both a KEEPALIVE on the one and an OPEN on the other.
///
/// A dial that arrives once the peer is established does harm even without an OPEN: RFC 4724 4.2 has a peer with graceful
/// restart take any new connection for a restart, and BIRD ends the session at once. So the lower side gives a dial up
/// when it confirms the peer's connection (see [`super::opened`]).
pub(super) fn loser(state: &State, now: Now, side: Side, peer: &Open) -> Option<Side> {
    let settings = &state.settings;
    let lower = (settings.router_id, settings.local_asn) < (peer.router_id, settings.remote_asn);
    let Some(other) = state.connection(side.other()) else {
        let Phase::Connect { until } = state.phase else { return None };
        let young = until.saturating_sub(now.time) + DIALLING > CONNECT_TIMEOUT;
        return (!lower && side == Side::Incoming && young).then_some(side);
    };
    match other.stage {
        Stage::OpenSent => {
            let left = other.hold_at.unwrap_or_default().saturating_sub(now.time);
            (!lower && side == Side::Incoming && left + CROSSING > OPEN_HOLD).then_some(side)
        }
        Stage::Established(_) => Some(side),
        Stage::OpenConfirm(_) => Some(if lower { Side::Outgoing } else { Side::Incoming }),
    }
}
