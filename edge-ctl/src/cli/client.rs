//! One request over the daemon's unix socket.

use std::{
    fmt, io,
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::UnixStream;

use crate::model::query::{Query, Refusal};

/// Why there is no answer.
#[derive(Debug)]
pub(super) enum ClientError {
    /// Nobody answers at the socket.
    Unreachable { socket: PathBuf, source: io::Error },
    /// The daemon did not answer in time.
    TimedOut { socket: PathBuf, after: Duration },
    /// The daemon refused, with its reasons.
    Refused { status: StatusCode, refusal: Refusal },
    /// What came back was no answer.
    Garbled(String),
}

impl fmt::Display for ClientError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreachable { socket, source } => unreachable_help(f, socket, source),
            Self::TimedOut { socket, after } => write!(
                f,
                "the daemon on {} did not answer within {} s; `--timeout` waits longer, `--kernel` reads the pinned maps \
                 without it",
                socket.display(),
                after.as_secs_f64()
            ),
            Self::Refused { refusal, .. } if refusal.problems.len() > 1 => f.write_str(&refusal.problems.join("\n")),
            Self::Refused { refusal, .. } => f.write_str(&refusal.error),
            Self::Garbled(why) => write!(f, "the daemon's answer cannot be read: {why}; is it another version?"),
        }
    }
}

fn unreachable_help(f: &mut fmt::Formatter<'_>, socket: &Path, source: &io::Error) -> fmt::Result {
    let socket = socket.display();
    if source.kind() == io::ErrorKind::PermissionDenied {
        return write!(
            f,
            "socket {socket} may not be used by you: {source}\n  members of group `edge` may (usermod -aG edge NAME, then \
             log in again), or use sudo"
        );
    }
    write!(
        f,
        "the daemon does not answer on socket {socket}: {source}\n  start it:               systemctl start edge   (or: \
         edge-ctl run -c /etc/edge/edge.toml)\n  it uses another socket:  --socket PATH, or -c FILE\n  read the pinned \
         maps:    the same command with --kernel"
    )
}

/// Asks and returns the answer's JSON.
pub(super) fn ask(socket: &Path, timeout: Duration, query: &Query) -> Result<Value, ClientError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| ClientError::Garbled(format!("no runtime: {error}")))?;
    runtime.block_on(async {
        match tokio::time::timeout(timeout, exchange(socket, query)).await {
            Ok(result) => result,
            Err(_) => Err(ClientError::TimedOut { socket: socket.to_owned(), after: timeout }),
        }
    })
}

async fn exchange(socket: &Path, query: &Query) -> Result<Value, ClientError> {
    let garbled = |error: &dyn fmt::Display| ClientError::Garbled(error.to_string());
    let stream = UnixStream::connect(socket)
        .await
        .map_err(|source| ClientError::Unreachable { socket: socket.to_owned(), source })?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|error| garbled(&error))?;
    let driver = tokio::spawn(connection);
    let (method, path) = query.request();
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(header::HOST, "edge")
        .body(Full::new(Bytes::from(query.body())))
        .map_err(|error| garbled(&error))?;
    let response = sender.send_request(request).await.map_err(|error| garbled(&error))?;
    let status = response.status();
    let body = response.into_body().collect().await.map_err(|error| garbled(&error))?.to_bytes();
    driver.abort();
    if status.is_success() {
        return serde_json::from_slice(&body).map_err(|error| garbled(&error));
    }
    let refusal = serde_json::from_slice(&body).unwrap_or_else(|_| Refusal {
        error: format!("{status}: {}", String::from_utf8_lossy(&body)),
        problems: Vec::new(),
    });
    Err(ClientError::Refused { status, refusal })
}
