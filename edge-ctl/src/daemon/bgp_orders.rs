//! What administrators ordered for BGP sessions: a shutdown outlives the daemon, so it is on disk before it is in force.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use tracing::info;

use crate::{
    bgp::BgpHandle,
    model::{
        bgp_session::{Order, OrderError, PeerOrder},
        query::ViewError,
        scope,
    },
    state_file::{StateFile, StateFileError},
};

/// Name in `state_dir`.
const FILE: &str = "bgp.json";
/// Format of the file.
const VERSION: u32 = 1;

/// Peers that are shut down, with the messages they were given.
#[derive(Clone, Debug)]
pub struct BgpOrders {
    file: StateFile,
    shut: Arc<Mutex<BTreeMap<IpAddr, String>>>,
}

impl BgpOrders {
    /// Those of the daemon's earlier life.
    ///
    /// # Errors
    /// Where the file is there and cannot be read.
    pub fn load(state_dir: &Path) -> Result<Self, StateFileError> {
        let file = StateFile::new(state_dir, FILE, VERSION);
        let shut = Arc::new(Mutex::new(file.read()?.unwrap_or_default()));
        Ok(Self { file, shut })
    }

    /// Peers that are to stay down.
    pub fn shut_down(&self) -> BTreeMap<IpAddr, String> {
        self.shut.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes an order and has it carried out.
    ///
    /// # Errors
    /// There is no such peer, or the order cannot be kept; nothing has changed then.
    pub async fn give(&self, bgp: &BgpHandle, order: PeerOrder) -> Result<(), ViewError> {
        let peers: Vec<IpAddr> =
            bgp.summary().await.iter().filter_map(|row| scope::parse(&row.neighbor).ok()).collect();
        let named = match order.peer {
            Some(peer) if !peers.contains(&peer) => {
                return Err(ViewError::NotFound(OrderError::Unknown(peer).to_string()));
            }
            Some(peer) => vec![peer],
            None => peers,
        };
        self.keep(&named, &order.what)
            .map_err(|error| ViewError::Internal(format!("the order was not kept: {error}")))?;
        info!(peers = ?named, order = order.what.as_str(), "order for BGP sessions");
        bgp.order(order).await.map_err(|error| ViewError::Unavailable(error.to_string()))
    }

    fn keep(&self, peers: &[IpAddr], what: &Order) -> Result<(), StateFileError> {
        let mut held = self.shut.lock().unwrap_or_else(PoisonError::into_inner);
        let mut shut = held.clone();
        for peer in peers {
            match what {
                Order::Shutdown(message) => drop(shut.insert(*peer, message.clone())),
                Order::Enable => drop(shut.remove(peer)),
                Order::Clear | Order::Refresh => {}
            }
        }
        if shut != *held {
            self.file.write(&shut)?;
            *held = shut;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shutdown_outlives_the_daemon_until_the_peer_is_enabled() {
        let folder = tempfile::tempdir().unwrap();
        let (one, two): (IpAddr, IpAddr) = ("10.0.0.2".parse().unwrap(), "fd00::2".parse().unwrap());
        let orders = BgpOrders::load(folder.path()).unwrap();
        orders.keep(&[one, two], &Order::Shutdown("new line card".to_owned())).unwrap();
        orders.keep(&[two], &Order::Clear).unwrap();
        orders.keep(&[two], &Order::Enable).unwrap();
        let again = BgpOrders::load(folder.path()).unwrap();
        assert_eq!(again.shut_down(), BTreeMap::from([(one, "new line card".to_owned())]));
    }
}
