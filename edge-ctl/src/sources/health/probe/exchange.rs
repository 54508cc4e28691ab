//! Send and expect, over TCP and UDP.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UdpSocket},
};

use super::{MOST_BYTES, Order, Trouble, holds};
use crate::model::Exchange;

/// Sends and reads until what is expected has come, where anything is.
pub(super) async fn stream(tcp: &mut TcpStream, wanted: &Exchange) -> Result<(), Trouble> {
    if !wanted.send.is_empty() {
        tcp.write_all(&wanted.send).await.map_err(|error| Trouble::io("send", &error))?;
    }
    if wanted.expect.is_empty() {
        return Ok(());
    }
    let mut answer = Vec::new();
    while answer.len() < MOST_BYTES {
        let read = tcp.read_buf(&mut answer).await.map_err(|error| Trouble::io("receive", &error))?;
        if holds(&answer, &wanted.expect) {
            return Ok(());
        }
        if read == 0 {
            break;
        }
    }
    Err(Trouble::backend(format!("{} bytes came, without what is expected", answer.len())))
}

/// Sends one datagram and reads until one answers as expected: the time that took.
pub(super) async fn udp(order: &Order, wanted: &Exchange) -> Result<Duration, Trouble> {
    let any: IpAddr = match order.address {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let source = order.source.unwrap_or(any);
    let socket = UdpSocket::bind((source, 0)).await;
    let socket = socket.map_err(|error| Trouble::io(&format!("bind to {source}"), &error))?;
    socket.connect(order.address).await.map_err(|error| Trouble::io("connect", &error))?;
    let start = Instant::now();
    socket.send(&wanted.send).await.map_err(|error| Trouble::io("send", &error))?;
    let mut answer = vec![0; MOST_BYTES];
    loop {
        let length = socket.recv(&mut answer).await.map_err(|error| Trouble::io("receive", &error))?;
        if holds(answer.get(..length).unwrap_or_default(), &wanted.expect) {
            return Ok(start.elapsed());
        }
    }
}
