//! Rows of the daemon's views that many scenarios wait for.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{Lab, exec::wait_for};

impl Lab {
    /// The row of `backend list` of one backend of one service.
    ///
    /// # Errors
    /// Where there is none.
    pub fn backend_row(&self, service: &str, backend: SocketAddr) -> Result<Value> {
        let rows = self.edge_ctl(&["backend", "list", service])?;
        let mine = |row: &&Value| row["backend"] == backend.to_string();
        let row = rows.as_array().and_then(|rows| rows.iter().find(mine).cloned());
        row.with_context(|| format!("{backend} is not in {rows}"))
    }

    /// Waits until a backend's STATE is this.
    ///
    /// # Errors
    /// Where it is another after `limit`.
    pub fn wait_backend(&self, service: &str, backend: SocketAddr, state: &str, limit: Duration) -> Result<()> {
        wait_for(&format!("{backend} of {service} to be {state}"), limit, || {
            let row = self.backend_row(service, backend)?;
            ensure!(row["state"] == state, "{row}");
            Ok(true)
        })
        .map(drop)
    }
}
