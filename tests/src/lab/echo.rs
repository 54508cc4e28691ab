//! The echo servers inside the ingress pods: `edge-lab udp-echo` and `edge-lab tcp-echo`.

use std::{
    io::{BufRead, BufReader, Write},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread,
};

use anyhow::{Context, Result};

/// Answers every datagram with `NAME `, the datagram, until the process is ended.
///
/// # Errors
/// Where the address is taken.
pub fn udp(listen: SocketAddr, name: &str) -> Result<()> {
    let socket = UdpSocket::bind(listen).with_context(|| format!("listen on {listen}/udp"))?;
    let mut buffer = [0_u8; 2048];
    loop {
        let (length, client) = socket.recv_from(&mut buffer).context("receive")?;
        let reply = [name.as_bytes(), b" ", &buffer[..length]].concat();
        // A client that has gone is its own affair.
        let _ = socket.send_to(&reply, client);
    }
}

/// Greets every connection with `NAME\n`, then sends each line back, until the process is ended.
///
/// # Errors
/// Where the address is taken.
pub fn tcp(listen: SocketAddr, name: &str) -> Result<()> {
    let listener = TcpListener::bind(listen).with_context(|| format!("listen on {listen}/tcp"))?;
    for stream in listener.incoming().flatten() {
        let name = name.to_owned();
        thread::Builder::new().stack_size(64 << 10).spawn(move || lines(&stream, &name)).context("start a thread")?;
    }
    Ok(())
}

fn lines(stream: &TcpStream, name: &str) -> Option<()> {
    let mut out = stream;
    stream.set_nodelay(true).ok()?;
    out.write_all(format!("{name}\n").as_bytes()).ok()?;
    let mut reader = BufReader::with_capacity(1024, stream);
    let mut line = Vec::new();
    while reader.read_until(b'\n', &mut line).ok()? > 0 {
        out.write_all(&line).ok()?;
        line.clear();
    }
    Some(())
}
