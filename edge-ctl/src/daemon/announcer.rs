//! The reconciler's way to BGP: it decides synchronously, the speaker is told in order by a task of its own.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use tokio::sync::mpsc;

use crate::{
    bgp::BgpHandle,
    model::PathAttributes,
    reconcile::ports::{AnnouncementPort, PortError},
};

/// What to tell the speaker.
enum Order {
    Announce(IpNet, PathAttributes),
    Withdraw(IpNet),
}

/// Remembers what was announced and hands orders on. Without BGP it accepts nothing, and nothing is asked of it.
pub struct Announcer {
    announced: BTreeMap<IpNet, PathAttributes>,
    orders: Option<mpsc::UnboundedSender<Order>>,
}

impl Announcer {
    /// Starts the task that carries orders to `bgp`.
    pub fn spawn(bgp: Option<BgpHandle>) -> Self {
        let orders = bgp.map(|bgp| {
            let (sender, mut receiver) = mpsc::unbounded_channel();
            tokio::spawn(async move {
                while let Some(order) = receiver.recv().await {
                    match order {
                        Order::Announce(prefix, attributes) => bgp.announce(prefix, attributes).await,
                        Order::Withdraw(prefix) => bgp.withdraw(prefix).await,
                    }
                }
            });
            sender
        });
        Self { announced: BTreeMap::new(), orders }
    }

    fn order(&self, order: Order) -> Result<(), PortError> {
        let gone = || PortError::new("telling BGP about a VIP", "the speaker is not running");
        self.orders.as_ref().ok_or_else(gone)?.send(order).map_err(|_| gone())
    }
}

impl AnnouncementPort for Announcer {
    fn announced(&self) -> BTreeMap<IpNet, PathAttributes> {
        self.announced.clone()
    }

    fn announce(&mut self, prefix: IpNet, attributes: &PathAttributes) -> Result<(), PortError> {
        self.order(Order::Announce(prefix, attributes.clone()))?;
        self.announced.insert(prefix, attributes.clone());
        Ok(())
    }

    fn withdraw(&mut self, prefix: IpNet) -> Result<(), PortError> {
        self.order(Order::Withdraw(prefix))?;
        self.announced.remove(&prefix);
        Ok(())
    }
}

/// Between two looks at what is announced.
const LOOK: std::time::Duration = std::time::Duration::from_millis(50);

/// Once routes have settled after a start: waits until the speaker announces what is desired, then lets peers forget what
/// else an earlier life had announced. Where that never comes, the speaker's own restart timer says so.
pub(super) async fn end_restart(bgp: BgpHandle, shared: super::SharedState) {
    loop {
        // Nothing is desired while the program that has yet to be attached is verified.
        let wanted: Option<BTreeSet<IpNet>> = {
            let shared = super::lock(&shared);
            (!shared.starting).then(|| shared.desired.announcements.keys().copied().collect())
        };
        if let Some(wanted) = wanted
            && wanted.is_subset(&bgp.originated().await)
        {
            return bgp.restarted().await;
        }
        tokio::time::sleep(LOOK).await;
    }
}
