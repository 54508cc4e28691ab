use std::{
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, UdpSocket},
};

use super::*;
use crate::model::{Exchange, Health, Http, Tls};

const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

fn order(address: SocketAddr, check: Check) -> Order {
    let health = Health {
        check,
        interval: Duration::from_secs(1),
        fast_interval: Duration::from_secs(1),
        jitter: 0,
        timeout: Duration::from_millis(500),
        fall: 1,
        rise: 1,
        port: None,
        mandatory: false,
        panic: 0,
        passive: None,
    };
    Order { address, source: Some(HERE), health: Arc::new(health) }
}

fn reason(outcome: Outcome) -> String {
    match outcome {
        Outcome::Fail { reason } => reason,
        other => panic!("{other:?}"),
    }
}

fn http(status: &[(u16, u16)], body: Option<&str>) -> Check {
    let body = body.map(str::to_owned);
    let wanted = Http { method: "GET".into(), path: "/healthz".into(), host: None, status: status.into(), body };
    Check::Http(wanted, None)
}

/// Answers every connection with `answer` once a request has come, and closes.
async fn server(answer: &'static [u8]) -> SocketAddr {
    let listener = TcpListener::bind((HERE, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = [0; 1024];
            let _ = stream.read(&mut request).await;
            let _ = stream.write_all(answer).await;
        }
    });
    address
}

#[tokio::test]
async fn a_connect_check_passes_where_somebody_listens_and_leaves_from_the_source_by_an_ephemeral_port() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut order = order(listener.local_addr().unwrap(), Check::Tcp(Exchange::default()));
    order.source = Some("127.0.0.9".parse().unwrap());
    assert!(matches!(probe(&order, None).await, Outcome::Pass { .. }));
    let (_, peer) = listener.accept().await.unwrap();
    assert_eq!(peer.ip().to_string(), "127.0.0.9");
    let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap();
    let ends: Vec<u16> = range.split_whitespace().map(|end| end.parse().unwrap()).collect();
    assert!((ends[0]..=ends[1]).contains(&peer.port()), "{peer} is not in {range}");
}

#[tokio::test]
async fn a_closed_port_fails_and_an_address_that_this_host_lacks_says_nothing_of_the_backend() {
    let closed = {
        let listener = TcpListener::bind((HERE, 0)).await.unwrap();
        listener.local_addr().unwrap()
    };
    let mut order = order(closed, Check::Tcp(Exchange::default()));
    assert_eq!(reason(probe(&order, None).await), "connect: connection refused");
    order.source = Some("192.0.2.1".parse().unwrap());
    let outcome = probe(&order, None).await;
    assert!(matches!(&outcome, Outcome::Local { reason } if reason.contains("192.0.2.1")), "{outcome:?}");
}

#[tokio::test]
async fn a_server_that_accepts_and_says_nothing_passes_connect_and_fails_everything_else_in_time() {
    let listener = TcpListener::bind((HERE, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let connect = probe(&order(address, Check::Tcp(Exchange::default())), None).await;
    assert!(matches!(connect, Outcome::Pass { .. }));
    let connector = tls::connector(&Tls::default(), false);
    let expect = Exchange { send: Vec::new(), expect: b"220".into() };
    let grpc = Check::Grpc { service: String::new(), tls: None };
    for check in [http(&[(200, 399)], None), Check::Tcp(expect), Check::Tls(Tls::default()), grpc] {
        let reason = reason(probe(&order(address, check), Some(&connector)).await);
        assert_eq!(reason, "connected, but no good answer within 500 ms");
    }
}

#[tokio::test]
async fn http_wants_the_status_and_the_text_even_across_chunks() {
    let good =
        server(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nall o\r\n5\r\nk now\r\n0\r\n\r\n").await;
    for (statuses, body, passes) in [
        (&[(200, 299)][..], None, true),
        (&[(200, 299)], Some("ok"), true),
        (&[(200, 299)], Some("bad"), false),
        (&[(204, 204), (300, 399)], None, false),
    ] {
        let outcome = probe(&order(good, http(statuses, body)), None).await;
        assert_eq!(matches!(outcome, Outcome::Pass { .. }), passes, "{statuses:?} {body:?}: {outcome:?}");
    }
    let broken = server(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n").await;
    assert_eq!(reason(probe(&order(broken, http(&[(200, 399)], None)), None).await), "status 503");
    let other = server(b"SSH-2.0-OpenSSH_9.2\r\n").await;
    assert!(reason(probe(&order(other, http(&[(200, 399)], None)), None).await).starts_with("HTTP"));
}

#[tokio::test]
async fn send_and_expect_find_their_text_and_miss_it() {
    let redis = server(b"+PONG\r\n").await;
    let exchange = |expect: &str| Exchange { send: b"PING\r\n".into(), expect: expect.into() };
    assert!(matches!(probe(&order(redis, Check::Tcp(exchange("+PONG"))), None).await, Outcome::Pass { .. }));
    let missed = reason(probe(&order(redis, Check::Tcp(exchange("-ERR"))), None).await);
    assert_eq!(missed, "7 bytes came, without what is expected");
}

#[tokio::test]
async fn udp_wants_an_answer_and_a_closed_port_says_so_at_once() {
    let socket = UdpSocket::bind((HERE, 0)).await.unwrap();
    let address = socket.local_addr().unwrap();
    let wanted = |expect: &str| Check::Udp(Exchange { send: b"ask".into(), expect: expect.into() });
    let silent = reason(probe(&order(address, wanted("")), None).await);
    assert_eq!(silent, "no connection within 500 ms");
    let answering = tokio::spawn(async move {
        let mut buffer = [0; 16];
        let _first = socket.recv_from(&mut buffer).await.unwrap();
        for _ in 0..2 {
            let (length, peer) = socket.recv_from(&mut buffer).await.unwrap();
            socket.send_to(&buffer[..length], peer).await.unwrap();
        }
    });
    assert!(matches!(probe(&order(address, wanted("ask")), None).await, Outcome::Pass { .. }));
    assert!(matches!(probe(&order(address, wanted("other")), None).await, Outcome::Fail { .. }));
    answering.await.unwrap();
    let refused = reason(probe(&order(address, wanted("ask")), None).await);
    assert!(refused.contains("refused"), "{refused}");
}
