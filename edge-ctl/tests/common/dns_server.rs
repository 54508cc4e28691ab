//! A DNS server on loopback that says recorded bytes.

#![allow(dead_code, reason = "every test binary compiles this module and uses its own part of it")]

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, UdpSocket},
    task::AbortHandle,
};

/// What the server says over UDP and TCP; `None`: nothing at all.
#[derive(Default)]
struct Script {
    udp: Option<Vec<u8>>,
    tcp: Option<Vec<u8>>,
}

/// A DNS server that says what it is told.
pub struct Server {
    /// Where it listens.
    pub address: SocketAddr,
    script: Arc<Mutex<Script>>,
    asked: Arc<AtomicUsize>,
    tasks: Vec<AbortHandle>,
}

impl Server {
    /// Starts on a free port of the loopback address; says nothing yet.
    pub async fn start() -> Self {
        let (tcp, udp) = loop {
            let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
            if let Ok(udp) = UdpSocket::bind(tcp.local_addr().unwrap()).await {
                break (tcp, udp);
            }
        };
        let address = tcp.local_addr().unwrap();
        let script = Arc::<Mutex<Script>>::default();
        let asked = Arc::<AtomicUsize>::default();
        let over_udp = tokio::spawn(serve_udp(udp, Arc::clone(&script), Arc::clone(&asked)));
        let over_tcp = tokio::spawn(serve_tcp(tcp, Arc::clone(&script)));
        Self { address, script, asked, tasks: vec![over_udp.abort_handle(), over_tcp.abort_handle()] }
    }

    /// Says these bytes from now on, under the id of whoever asks.
    pub fn speaks(&self, udp: Option<Vec<u8>>, tcp: Option<Vec<u8>>) {
        *self.script.lock().unwrap() = Script { udp, tcp };
    }

    /// As [`Server::speaks`], over TCP only.
    pub fn speaks_over_tcp(&self, tcp: Option<Vec<u8>>) {
        self.script.lock().unwrap().tcp = tcp;
    }

    /// Queries over UDP so far.
    pub fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

/// A recorded response under the id of the present query.
fn answer_to(query: &[u8], recorded: Vec<u8>) -> Vec<u8> {
    let mut response = recorded;
    response[..2].copy_from_slice(&query[..2]);
    response
}

async fn serve_udp(socket: UdpSocket, script: Arc<Mutex<Script>>, asked: Arc<AtomicUsize>) {
    let mut buffer = [0; 4096];
    while let Ok((length, client)) = socket.recv_from(&mut buffer).await {
        asked.fetch_add(1, Ordering::SeqCst);
        let recorded = script.lock().unwrap().udp.clone();
        if let Some(recorded) = recorded {
            socket.send_to(&answer_to(&buffer[..length], recorded), client).await.unwrap();
        }
    }
}

/// Connections are reused, so that what to say is looked up with each query; nothing to say closes the connection.
async fn serve_tcp(listener: TcpListener, script: Arc<Mutex<Script>>) {
    while let Ok((mut stream, _)) = listener.accept().await {
        let script = Arc::clone(&script);
        tokio::spawn(async move {
            while let Ok(length) = stream.read_u16().await {
                let mut query = vec![0; length.into()];
                stream.read_exact(&mut query).await.unwrap();
                let recorded = script.lock().unwrap().tcp.clone();
                let Some(recorded) = recorded else { return };
                let response = answer_to(&query, recorded);
                stream.write_u16(response.len().try_into().unwrap()).await.unwrap();
                stream.write_all(&response).await.unwrap();
            }
        });
    }
}
