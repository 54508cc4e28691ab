//! One HTTP/1.1 request on a connection of its own.

use std::{net::SocketAddr, pin::pin};

use bytes::Bytes;
use futures::future::{Either, select};
use http_body_util::{BodyExt, Empty};
use hyper::{Request, Response, body::Incoming, client::conn::http1, header};
use hyper_util::rt::TokioIo;

use super::{MOST_BYTES, Stream, Trouble, holds};
use crate::model::Http;

pub(super) async fn ask(stream: impl Stream + 'static, address: SocketAddr, wanted: &Http) -> Result<(), Trouble> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|error| trouble(&error))?;
    let host = wanted.host.clone().unwrap_or_else(|| address.to_string());
    let request = Request::builder()
        .method(wanted.method.as_str())
        .uri(&wanted.path)
        .header(header::HOST, host)
        .header(header::USER_AGENT, "edge-health")
        .header(header::CONNECTION, "close")
        .body(Empty::<Bytes>::new())
        .map_err(|error| Trouble::Local(format!("the request cannot be written: {error}")))?;
    let exchange = pin!(async {
        let response = sender.send_request(request).await.map_err(|error| trouble(&error))?;
        judge(response, wanted).await
    });
    match select(exchange, pin!(connection)).await {
        Either::Left((judged, _)) => judged,
        // The connection has ended: what it brought is there to be read, or the error.
        Either::Right((_, exchange)) => exchange.await,
    }
}

async fn judge(response: Response<Incoming>, wanted: &Http) -> Result<(), Trouble> {
    let status = response.status().as_u16();
    if !wanted.status.iter().any(|(low, high)| (*low..=*high).contains(&status)) {
        return Err(Trouble::backend(format!("status {status}")));
    }
    let Some(text) = &wanted.body else { return Ok(()) };
    let (mut body, mut seen) = (response.into_body(), Vec::new());
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| trouble(&error))?;
        seen.extend_from_slice(frame.data_ref().map_or(&[][..], |data| data));
        if holds(&seen, text.as_bytes()) {
            return Ok(());
        }
        if seen.len() >= MOST_BYTES {
            break;
        }
    }
    Err(Trouble::backend(format!("status {status}, but the text is not in the {} bytes of the body", seen.len())))
}

fn trouble(error: &hyper::Error) -> Trouble {
    let io = std::error::Error::source(error).and_then(|source| source.downcast_ref::<std::io::Error>());
    match io {
        Some(io) => Trouble::io("HTTP", io),
        None => Trouble::backend(format!("HTTP: {error}")),
    }
}
