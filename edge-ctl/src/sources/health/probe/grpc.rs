//! `grpc.health.v1.Health/Check`: one call over HTTP/2. The two messages have a field each, so they are written and read
//! here instead of by a protobuf library.

use std::{net::SocketAddr, pin::pin};

use bytes::Bytes;
use futures::future::{Either, select};
use h2::client;
use hyper::{HeaderMap, Request};

use super::{MOST_BYTES, Stream, Trouble};

/// `HealthCheckResponse.ServingStatus.SERVING`.
const SERVING: u64 = 1;
/// Field 1 with wire type 2 (length-delimited): `HealthCheckRequest.service`.
const SERVICE: u8 = 1 << 3 | 2;
/// Field 1 with wire type 0 (varint): `HealthCheckResponse.status`.
const STATUS: u8 = 1 << 3;

pub(super) async fn ask(stream: impl Stream + 'static, address: SocketAddr, service: &str) -> Result<(), Trouble> {
    let (sender, connection) = client::handshake(stream).await.map_err(|error| trouble(&error))?;
    let exchange = pin!(call(sender, address, service));
    match select(exchange, pin!(connection)).await {
        Either::Left((judged, _)) => judged,
        Either::Right((_, exchange)) => exchange.await,
    }
}

async fn call(sender: client::SendRequest<Bytes>, address: SocketAddr, service: &str) -> Result<(), Trouble> {
    let request = Request::post(format!("http://{address}/grpc.health.v1.Health/Check"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())
        .map_err(|error| Trouble::Local(format!("the request cannot be written: {error}")))?;
    let mut sender = sender.ready().await.map_err(|error| trouble(&error))?;
    let (response, mut stream) = sender.send_request(request, false).map_err(|error| trouble(&error))?;
    stream.send_data(message(service), true).map_err(|error| trouble(&error))?;
    let response = response.await.map_err(|error| trouble(&error))?;
    let status = response.status();
    if !status.is_success() {
        return Err(Trouble::backend(format!("HTTP status {}", status.as_u16())));
    }
    // An answer without a message has its status in the headers ("Trailers-Only").
    grpc_status(response.headers())?;
    let (mut body, mut answer) = (response.into_body(), Vec::new());
    while let Some(data) = body.data().await {
        let data = data.map_err(|error| trouble(&error))?;
        // Without this the window closes and the rest never comes; the answer is short, so an error hardly matters.
        let _ = body.flow_control().release_capacity(data.len());
        answer.extend_from_slice(&data);
        if answer.len() > MOST_BYTES {
            return Err(Trouble::backend("the answer is too long"));
        }
    }
    if let Some(trailers) = body.trailers().await.map_err(|error| trouble(&error))? {
        grpc_status(&trailers)?;
    }
    match serving_status(&answer) {
        Some(SERVING) => Ok(()),
        Some(status) => Err(Trouble::backend(format!("serving status {}", name(status)))),
        None => Err(Trouble::backend("the answer is no HealthCheckResponse")),
    }
}

fn grpc_status(headers: &HeaderMap) -> Result<(), Trouble> {
    match headers.get("grpc-status").map(|value| value.as_bytes()) {
        None | Some(b"0") => Ok(()),
        Some(status) => Err(Trouble::backend(format!("gRPC status {}", String::from_utf8_lossy(status)))),
    }
}

fn name(status: u64) -> String {
    match status {
        0 => "UNKNOWN".to_owned(),
        2 => "NOT_SERVING".to_owned(),
        3 => "SERVICE_UNKNOWN".to_owned(),
        other => other.to_string(),
    }
}

/// A length-prefixed message: not compressed, length in network order, `HealthCheckRequest`. Configuration keeps the name
/// below 128 bytes, so its length is one byte.
fn message(service: &str) -> Bytes {
    let mut body = Vec::new();
    if !service.is_empty() {
        body.push(SERVICE);
        body.push(u8::try_from(service.len().min(127)).unwrap_or(127));
        body.extend(service.bytes().take(127));
    }
    let mut message = vec![0];
    message.extend_from_slice(&u32::try_from(body.len()).unwrap_or(0).to_be_bytes());
    message.append(&mut body);
    message.into()
}

/// `status` of a length-prefixed `HealthCheckResponse`; a field that is not there is 0 (proto3).
fn serving_status(answer: &[u8]) -> Option<u64> {
    let (head, body) = answer.split_at_checked(5)?;
    let length = u32::from_be_bytes(head.get(1..5)?.try_into().ok()?);
    if head.first() != Some(&0) || body.len() != usize::try_from(length).ok()? {
        return None;
    }
    match body {
        [] => Some(0),
        [STATUS, value] if *value < 128 => Some(u64::from(*value)),
        _ => None,
    }
}

fn trouble(error: &h2::Error) -> Trouble {
    match error.get_io() {
        Some(io) => Trouble::io("HTTP/2", io),
        None => Trouble::backend(format!("HTTP/2: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_those_of_the_published_protocol() {
        // As protoc encodes `service: "web"`, with the five bytes of the framing before it.
        assert_eq!(message("web").as_ref(), b"\0\0\0\0\x05\x0a\x03web");
        assert_eq!(message("").as_ref(), b"\0\0\0\0\0");
        assert_eq!(serving_status(b"\0\0\0\0\x02\x08\x01"), Some(SERVING));
        assert_eq!(serving_status(b"\0\0\0\0\x02\x08\x02"), Some(2));
        assert_eq!(serving_status(b"\0\0\0\0\0"), Some(0));
        for broken in [&b""[..], b"\0\0\0\0", b"\0\0\0\0\x02\x08", b"\x01\0\0\0\x02\x08\x01", b"\0\0\0\0\x02\x10\x01"] {
            assert_eq!(serving_status(broken), None, "{broken:?}");
        }
    }
}
