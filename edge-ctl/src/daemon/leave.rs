//! A planned end: peers are asked to look for another way, flows get time to end, and only then the VIPs are withdrawn.

use std::time::Duration;

use tokio::{
    signal::unix::Signal,
    time::{Instant, interval, timeout_at},
};
use tracing::{info, warn};

use super::Daemon;
use crate::{
    bgp::{BgpHandle, Leaving},
    notify,
};

/// Between two looks at the flows.
const LOOK: Duration = Duration::from_millis(250);

impl Daemon {
    /// Waits for established flows to end, for `drain` at most, while peers prefer other ways; then withdraws. Another
    /// signal ends the wait.
    pub(super) async fn leave(&self, bgp: &BgpHandle, drain: Duration, hurry: &mut Signal) {
        info!(
            seconds = drain.as_secs(),
            "peers are asked to look for another way (RFC 8326); waiting for flows to end"
        );
        bgp.leave(Leaving::Ask).await;
        let end = Instant::now() + drain;
        let mut look = interval(LOOK);
        while Instant::now() < end && self.has_flows() {
            notify::alive();
            tokio::select! {
                _ = hurry.recv() => break,
                _ = timeout_at(end, look.tick()) => {}
            }
        }
        bgp.leave(Leaving::Withdraw).await;
    }

    fn has_flows(&self) -> bool {
        match self.kernel.flow_rows(None, 1) {
            Ok(rows) => rows.iter().any(|row| row.state == "established"),
            Err(error) => {
                warn!(%error, "flows cannot be counted; not waiting for them");
                false
            }
        }
    }
}
