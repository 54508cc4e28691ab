//! BFD and BGP: whom to watch, and what follows from a session that goes down (RFC 5882 4.3).
//!
//! | BGP session                | BFD leaves Up                         | What happens                                  |
//! |----------------------------|---------------------------------------|-----------------------------------------------|
//! | Established                | time over, or the peer says Down      | Cease/10, and its routes go in the same step  |
//! | away, graceful restart     | the peer had set C                    | its forwarding is gone: its routes go         |
//! | away, graceful restart     | it had not                            | none: its BFD has ended with its BGP          |
//! | none                       | any                                   | none                                          |
//! | any                        | the peer says AdminDown               | none: an administrator's doing is no failure  |
//!
//! The peer is watched from its first session on, until it is shut down or no longer configured.

use std::{net::IpAddr, sync::Arc, time::Duration};

use super::{
    super::{
        bfd::{Counters, Handle, Report, Status, Target, packet::Name},
        fsm::Event,
        peer::Watched,
    },
    Actor,
};

impl Actor {
    /// Brings what is watched of a peer up to its configuration and its session.
    pub(super) fn watch(&mut self, address: IpAddr) {
        let now = self.start.elapsed();
        let Some(peer) = self.peers.get(&address) else { return };
        let settings = peer.config.session.bfd.filter(|_| peer.shutdown.is_none());
        let Some(settings) = settings else { return self.watch_no_longer(address) };
        let link = peer.session.as_ref().and_then(|session| peer.link(session.side));
        let known = peer.bfd.as_ref().map(|watched| (watched.target.local, watched.target.remote));
        let Some((local, remote)) = link.map(|link| (link.local, link.remote)).or(known) else { return };
        let target = Target { peer: address, local, remote, settings };
        let same = |watched: &Watched| {
            let (old, new) = (&watched.target, &target);
            (old.local.ip(), old.settings) == (new.local.ip(), new.settings)
        };
        if peer.bfd.as_ref().is_some_and(same) {
            return;
        }
        let Some(handle) = self.bfd_handle() else { return };
        let counters = Arc::new(Counters::default());
        handle.watch(target.clone(), Arc::clone(&counters));
        let status = Err("not started yet".to_owned());
        if let Some(peer) = self.peers.get_mut(&address) {
            let downs = peer.bfd.as_ref().map_or(0, |watched| watched.downs);
            peer.bfd = Some(Watched { target, status, counters, changed: now, downs });
        }
    }

    /// Says AdminDown to a peer, which is no failure.
    pub(super) fn watch_no_longer(&mut self, address: IpAddr) {
        let watched = self.peers.get_mut(&address).and_then(|peer| peer.bfd.take());
        if let (Some(_), Some(handle)) = (watched, &self.bfd) {
            handle.forget(address);
        }
    }

    /// The thread, which nobody needs who configures no BFD.
    fn bfd_handle(&mut self) -> Option<&Handle> {
        if self.bfd.is_none() {
            match Handle::start(self.bfd_report.clone()) {
                Ok(handle) => self.bfd = Some(handle),
                Err(error) => tracing::error!(%error, "BFD cannot be had: no thread; peers are not watched"),
            }
        }
        self.bfd.as_ref()
    }

    /// How a session stands has changed.
    pub(super) fn on_bfd(&mut self, report: Report) {
        let now = self.start.elapsed();
        let address = report.peer;
        let Some(watched) = self.peers.get_mut(&address).and_then(|peer| peer.bfd.as_mut()) else { return };
        let before = std::mem::replace(&mut watched.status, report.status);
        let was = before.as_ref().ok().map(|status| status.state);
        let was_up = was == Some(Name::Up);
        match &watched.status {
            Err(why) => tracing::warn!(peer = %address, %why, "the peer is not watched by BFD; it is tried again"),
            Ok(status) => {
                let status = *status;
                if was == Some(status.state) {
                    return;
                }
                watched.changed = now;
                watched.downs += u64::from(was_up && status.state != Name::Up);
                tracing::info!(peer = %address, state = status.state.as_str(), "BFD");
                if was_up && status.state != Name::Up {
                    self.path_lost(address, &status, now);
                }
            }
        }
    }

    fn path_lost(&mut self, address: IpAddr, status: &Status, now: Duration) {
        if status.remote_state == Name::AdminDown {
            return tracing::info!(peer = %address, "the peer has turned BFD off; its session stays");
        }
        let Some(peer) = self.peers.get_mut(&address) else { return };
        if peer.session.is_some() {
            let why = status.diagnostic.to_string();
            return self.feed(address, Event::BfdDown(why));
        }
        if !peer.helper.is_away() {
            return;
        }
        let withdrawn = peer.helper.unreachable(status.independent);
        let kept = withdrawn.is_empty();
        peer.history.flap(false, format!("BFD down while it restarts{}", if kept { ": kept" } else { "" }), now);
        tracing::warn!(peer = %address, kept, "BFD down while the peer restarts");
        self.helped(address, withdrawn);
    }
}
