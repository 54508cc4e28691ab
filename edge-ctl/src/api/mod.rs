//! The API: JSON over a unix socket for the command line, and OpenMetrics over loopback HTTP. It knows rows and questions
//! ([`crate::model`]) and nothing of where answers come from: the daemon hands it something that is [`Views`].

mod http;
pub mod metrics;
mod socket;

use std::{
    future::Future,
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use futures::FutureExt;
use tokio::net::{TcpListener, UnixListener};

pub use crate::model::query::{Answer, Query, ViewError};

/// A future on the heap, so that [`Views`] can be a trait object.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// How long open requests may take to finish once the daemon stops.
const DRAIN: Duration = Duration::from_secs(2);

/// Whoever can answer questions about the running edge.
pub trait Views: Send + Sync + 'static {
    /// Answers with the [`Answer`] variant that the [`Query`]'s documentation names.
    ///
    /// # Errors
    /// As [`ViewError`] says; the API turns it into an HTTP status and shows its text to the user.
    fn answer(&self, query: Query) -> BoxFuture<'_, Result<Answer, ViewError>>;
}

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listen {
    /// Unix socket of the API.
    pub socket: PathBuf,
    /// Address of `/metrics`; `None`: off.
    pub http: Option<SocketAddr>,
}

/// Why the API cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The socket's folder is missing or not writable, or the path is taken by something that is no socket.
    #[error(
        "cannot listen on socket {path}: {source}; its folder must exist and be writable (systemd makes it from \
         RuntimeDirectory=edge; `[edge] socket` moves it)"
    )]
    Socket {
        /// The socket's path.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A daemon answers there already.
    #[error("another edge already answers on socket {0}; stop it, or give this one its own `[edge] socket`")]
    Taken(PathBuf),
    /// The address of `[api] http` cannot be used.
    #[error("cannot listen on [api] http = \"{address}\": {source}; another address, or \"\" to turn it off")]
    Http {
        /// The address.
        address: SocketAddr,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Sockets that listen, not served yet.
#[derive(Debug)]
pub struct Bound {
    unix: UnixListener,
    file: SocketFile,
    http: Option<TcpListener>,
}

/// The socket's place in the file system, given back when dropped.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    /// Device and inode, which tell it from a successor's.
    identity: Option<(u64, u64)>,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // A successor may stand there already: it found that nobody answers while open requests were finishing.
        if self.identity.is_some() && socket::identity(&self.path) == self.identity {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl Bound {
    /// The address of `/metrics`, with the port the kernel chose where port 0 was asked for.
    pub fn http_address(&self) -> Option<SocketAddr> {
        self.http.as_ref().and_then(|listener| listener.local_addr().ok())
    }

    /// The API's socket.
    pub fn socket(&self) -> &Path {
        &self.file.path
    }
}

/// Opens the sockets. A stale unix socket is replaced, a living one is not.
///
/// # Errors
/// As [`BindError`] says; nothing is left behind.
pub async fn bind(listen: &Listen) -> Result<Bound, BindError> {
    // The socket first: where another edge runs, it is that which has the other address too.
    let unix = socket::bind(&listen.socket).await?;
    let file = SocketFile { path: listen.socket.clone(), identity: socket::identity(&listen.socket) };
    let http = match listen.http {
        Some(address) => Some(TcpListener::bind(address).await.map_err(|source| BindError::Http { address, source })?),
        None => None,
    };
    Ok(Bound { unix, file, http })
}

/// Serves until `shutdown` resolves, lets open requests finish, and removes the socket.
///
/// # Errors
/// What the listeners fail with.
pub async fn serve_bound(
    bound: Bound,
    views: Arc<dyn Views>,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let shutdown = shutdown.shared();
    let api = axum::serve(bound.unix, http::api(Arc::clone(&views))).with_graceful_shutdown(shutdown.clone());
    let metrics = async {
        match bound.http {
            Some(listener) => {
                axum::serve(listener, http::metrics(views)).with_graceful_shutdown(shutdown.clone()).await
            }
            None => Ok(()),
        }
    };
    let stopped = async {
        shutdown.clone().await;
        tokio::time::sleep(DRAIN).await;
        Ok(())
    };
    let served = async { tokio::try_join!(api, metrics).map(|_| ()) };
    let result = tokio::select! {
        result = served => result,
        result = stopped => result,
    };
    drop(bound.file);
    result
}

/// [`bind`] and [`serve_bound`] in one.
///
/// # Errors
/// As those two.
pub async fn serve(
    listen: Listen,
    views: Arc<dyn Views>,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> anyhow::Result<()> {
    let bound = bind(&listen).await?;
    Ok(serve_bound(bound, views, shutdown).await?)
}

#[cfg(test)]
mod tests;
