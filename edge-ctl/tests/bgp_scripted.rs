//! A peer under the test's control, which speaks with what BIRD was recorded to say: what no real peer does on demand.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first broken assumption")]

mod common;

use std::{
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use common::bgp::{Edge, Lab, NODE, PATIENCE, config, peer};

/// The messages of `bird-internal`: OPEN, KEEPALIVE, then three IPv4 routes.
fn recorded(number: usize) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/bgp/bird-internal.hex");
    let text = fs::read_to_string(path).unwrap();
    let line = text.lines().nth(number).unwrap();
    (0..line.len()).step_by(2).map(|at| u8::from_str_radix(&line[at..at + 2], 16).unwrap()).collect()
}

const OPEN: usize = 0;
const KEEPALIVE: usize = 1;
const ROUTES: usize = 2;

/// One connection as the peer sees it.
struct Wire(TcpStream);

impl Wire {
    fn new(stream: TcpStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self(stream)
    }

    fn send(&mut self, number: usize) {
        self.0.write_all(&recorded(number)).unwrap();
    }

    /// The next message's type and body.
    fn read(&mut self) -> (u8, Vec<u8>) {
        let mut header = [0; 19];
        self.0.read_exact(&mut header).unwrap();
        let mut body = vec![0; usize::from(u16::from_be_bytes([header[16], header[17]])) - 19];
        self.0.read_exact(&mut body).unwrap();
        (header[18], body)
    }

    /// Reads up to a NOTIFICATION; its code and subcode.
    fn notification(&mut self) -> (u8, u8) {
        loop {
            let (kind, body) = self.read();
            if kind == 3 {
                return (body[0], body[1]);
            }
        }
    }

    /// From OPEN to Established.
    fn establish(&mut self) {
        assert_eq!(self.read().0, 1);
        self.send(OPEN);
        assert_eq!(self.read().0, 4);
        self.send(KEEPALIVE);
    }
}

/// Runs `script` in the node's namespace, beside `edge` in its own.
fn with_peer<F: Future<Output = ()>>(script: impl FnOnce() + Send, edge: impl FnOnce() -> F + Send, lab: &Lab) {
    thread::scope(|scope| {
        let node = scope.spawn(|| {
            lab.node.enter();
            script();
        });
        lab.edge.block_on(edge);
        node.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}

fn listener() -> TcpListener {
    TcpListener::bind("10.0.0.2:179").unwrap()
}

#[test]
fn of_two_connections_at_once_the_one_from_the_higher_identifier_survives() {
    let lab = Lab::new();
    let (bound, listening) = mpsc::channel();
    let (finish, finished) = mpsc::channel();
    let script = move || {
        let listener = listener();
        bound.send(()).unwrap();
        let mut dialled_by_edge = Wire::new(listener.accept().unwrap().0);
        let mut dialled_by_us = Wire::new(TcpStream::connect("10.0.0.1:179").unwrap());
        // Both connections are in OpenSent on the edge's side before either gets its OPEN.
        assert_eq!(dialled_by_edge.read().0, 1);
        assert_eq!(dialled_by_us.read().0, 1);
        dialled_by_edge.send(OPEN);
        assert_eq!(dialled_by_edge.read().0, 4, "OpenConfirm");
        dialled_by_us.send(OPEN);
        assert_eq!(dialled_by_edge.notification(), (6, 7), "10.0.0.2 is higher than 10.0.0.1: ours survives");
        assert_eq!(dialled_by_us.read().0, 4);
        dialled_by_us.send(KEEPALIVE);
        dialled_by_us.send(ROUTES);
        finished.recv_timeout(PATIENCE).unwrap();
    };
    let edge = || async move {
        listening.recv_timeout(PATIENCE).unwrap();
        let mut edge = Edge::start(config([peer(NODE, 64512)])).await;
        edge.until("the route", |edge| edge.hops("10.1.2.0/26") == [NODE]).await;
        assert_eq!(edge.row(NODE).await.established_count, 1);
        finish.send(()).unwrap();
    };
    with_peer(script, edge, &lab);
}

#[test]
fn a_malformed_attribute_withdraws_its_routes_and_a_bad_marker_resets() {
    let lab = Lab::new();
    let (bound, listening) = mpsc::channel();
    let (next, turn) = mpsc::channel();
    let script = move || {
        let listener = listener();
        bound.send(()).unwrap();
        let mut wire = Wire::new(listener.accept().unwrap().0);
        wire.establish();
        wire.send(ROUTES);
        turn.recv_timeout(PATIENCE).unwrap();
        // ORIGIN 9 does not exist: RFC 7606 7.1 wants treat-as-withdraw.
        let mut damaged = recorded(ROUTES);
        let origin = damaged.windows(3).position(|bytes| bytes == [0x40, 1, 1]).unwrap() + 3;
        damaged[origin] = 9;
        wire.0.write_all(&damaged).unwrap();
        turn.recv_timeout(PATIENCE).unwrap();
        wire.send(ROUTES);
        turn.recv_timeout(PATIENCE).unwrap();
        let mut noise = recorded(KEEPALIVE);
        noise[3] = 0;
        wire.0.write_all(&noise).unwrap();
        assert_eq!(wire.notification(), (1, 1), "Connection Not Synchronized");
    };
    let edge = || async move {
        listening.recv_timeout(PATIENCE).unwrap();
        let mut edge = Edge::start(config([peer(NODE, 64512)])).await;
        edge.until("the route", |edge| edge.hops("10.1.2.0/26") == [NODE]).await;
        next.send(()).unwrap();
        edge.until("treat-as-withdraw", |edge| edge.routes.is_empty()).await;
        let row = edge.row(NODE).await;
        assert_eq!((row.state.as_str(), row.messages["update_treat_as_withdraw"]), ("Established", 1));
        next.send(()).unwrap();
        edge.until("the route again", |edge| edge.hops("10.1.2.0/26") == [NODE]).await;
        next.send(()).unwrap();
        edge.until("the reset", |edge| edge.routes.is_empty()).await;
        let reset = edge.row(NODE).await.last_reset.unwrap();
        assert!(reset.starts_with("sent Message Header Error: Connection Not Synchronized (1/1)"), "{reset}");
    };
    with_peer(script, edge, &lab);
}

#[test]
fn a_stranger_is_refused_and_a_second_connection_is_told_of_the_first() {
    let lab = Lab::new();
    let (ready, started) = mpsc::channel();
    let (learn, learnt) = mpsc::channel();
    let script = move || {
        started.recv_timeout(PATIENCE).unwrap();
        let from = |source: &str| {
            let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
            let source: SocketAddr = source.parse().unwrap();
            socket.bind(&source.into()).unwrap();
            socket.connect(&"10.0.0.1:179".parse::<SocketAddr>().unwrap().into()).unwrap();
            Wire::new(socket.into())
        };
        let mut stranger = from("10.0.0.3:0");
        assert!(matches!(stranger.0.read(&mut [0; 1]), Ok(0) | Err(_)), "closed without a word");
        let mut first = from("10.0.0.2:0");
        first.establish();
        first.send(ROUTES);
        let mut second = from("10.0.0.2:0");
        assert_eq!(second.notification(), (6, 7));
        learnt.recv_timeout(PATIENCE).unwrap();
    };
    let edge = || async move {
        let mut passive = peer(NODE, 64512);
        passive.passive = true;
        // The end of the first connection is to be the end of its routes.
        passive.session.graceful_restart = None;
        let mut edge = Edge::start(config([passive])).await;
        ready.send(()).unwrap();
        edge.until("the route", |edge| edge.hops("10.1.2.0/26") == [NODE]).await;
        learn.send(()).unwrap();
        // The script ends, and with it the first connection, once the second one was refused.
        edge.until("the end", |edge| edge.routes.is_empty()).await;
        assert_eq!(edge.row(NODE).await.established_count, 1);
    };
    with_peer(script, edge, &lab);
}

#[test]
fn a_peer_that_reads_nothing_loses_its_session_after_the_send_hold_time_though_it_keeps_talking() {
    let lab = Lab::new();
    let (bound, listening) = mpsc::channel();
    let (finish, finished) = mpsc::channel();
    let script = move || {
        let listener = listener();
        bound.send(()).unwrap();
        let mut wire = Wire::new(listener.accept().unwrap().0);
        wire.establish();
        // It never reads again, and its keepalives hold the session for as long as the hold time alone decides.
        while finished.recv_timeout(Duration::from_millis(500)).is_err() {
            if wire.0.write_all(&recorded(KEEPALIVE)).is_err() {
                break;
            }
        }
    };
    let edge = || async move {
        listening.recv_timeout(PATIENCE).unwrap();
        let mut deaf = peer(NODE, 64512);
        deaf.session.send_hold = Some(Duration::from_secs(3));
        let mut bgp = config([deaf]);
        // More than both sockets' buffers hold.
        bgp.networks = (0..1_500_000u32)
            .map(|n| ipnet::Ipv4Net::new((0x2000_0000 + (n << 4)).into(), 28).unwrap().into())
            .collect();
        let mut edge = Edge::start(bgp).await;
        let stuck = |row: &edge_ctl::model::view::BgpPeerRow| {
            row.last_reset.as_ref().is_some_and(|why| why.starts_with("send hold timer expired"))
        };
        let row = edge.row_until(NODE, "the end", stuck).await;
        assert_eq!(row.established_count, 1, "{row:#?}");
        // The script may have noticed already.
        let _ = finish.send(());
    };
    with_peer(script, edge, &lab);
}

/// The class of bug by which sessions flap for ever (the attribute errors of 2023 in FRR, OpenBGPD and others): whoever
/// resets over an UPDATE gets it again on the next session.
#[test]
fn an_update_that_comes_again_on_every_session_makes_no_flap_loop() {
    /// The wait after the first failure, jittered down to three quarters; it doubles from then on.
    const FIRST_WAIT: Duration = Duration::from_millis(750);
    let lab = Lab::new();
    let (bound, listening) = mpsc::channel();
    let (next, turn) = mpsc::channel();
    let script = move || {
        let listener = listener();
        bound.send(()).unwrap();
        let mut wire = Wire::new(listener.accept().unwrap().0);
        wire.establish();
        // ORIGIN 9 costs its routes and never the session, however often.
        let mut damaged = recorded(ROUTES);
        let origin = damaged.windows(3).position(|bytes| bytes == [0x40, 1, 1]).unwrap() + 3;
        damaged[origin] = 9;
        for _ in 0..100 {
            wire.0.write_all(&damaged).unwrap();
        }
        wire.send(ROUTES);
        turn.recv_timeout(PATIENCE).unwrap();
        // Attributes that end behind their message leave no choice (RFC 7606 3, RFC 4271 6.3).
        let fatal = [&[0xff; 16][..], &[0, 23, 2, 0, 0, 0xff, 0xff]].concat();
        let mut wait = FIRST_WAIT;
        for attempt in 0..3 {
            wire.0.write_all(&fatal).unwrap();
            assert_eq!(wire.notification(), (3, 1), "Malformed Attribute List");
            drop(wire);
            if attempt == 2 {
                break;
            }
            let refused = Instant::now();
            wire = Wire::new(listener.accept().unwrap().0);
            assert!(refused.elapsed() > wait.mul_f64(0.9), "attempt {attempt} after {:?}", refused.elapsed());
            wait *= 2;
            wire.establish();
        }
    };
    let edge = || async move {
        listening.recv_timeout(PATIENCE).unwrap();
        let mut edge = Edge::start(config([peer(NODE, 64512)])).await;
        edge.until("the route", |edge| edge.hops("10.1.2.0/26") == [NODE]).await;
        let row = edge.row(NODE).await;
        assert_eq!((row.established_count, row.messages["update_treat_as_withdraw"]), (1, 100), "{row:#?}");
        next.send(()).unwrap();
        let row = edge.row_until(NODE, "the third reset", |row| row.failures == 3 && row.state != "Established").await;
        assert_eq!(row.established_count, 3, "{row:#?}");
        assert!(row.next_connect.is_some_and(|seconds| seconds >= 2), "the wait grows: {row:#?}");
    };
    with_peer(script, edge, &lab);
}
