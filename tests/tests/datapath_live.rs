//! Real sockets through the attached program: on TC with all offloads on, so that segments are super-packets and
//! checksums are partial; on XDP as a NIC would deliver; with and without resolved neighbours.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use edge_common::{
    flow::{TCP, UDP},
    maps::{mode, name},
};
use edge_tests::datapath::{
    live::{Live, echo_back},
    namespace::in_namespace,
    rig::{HOOKS, Hook, Rig, Settings, VIP},
};

const MODES: [u8; 2] = [mode::FULL_NAT, mode::DNAT];
const PATIENCE: Duration = Duration::from_secs(10);

fn vip() -> SocketAddr {
    SocketAddr::new(VIP.into(), 8443)
}

/// Every byte as it came, until the client has said all.
fn serve_tcp() -> Result<()> {
    let listener = TcpListener::bind("0.0.0.0:443")?;
    thread::spawn(move || -> Result<()> {
        let (mut stream, _) = listener.accept()?;
        stream.set_read_timeout(Some(PATIENCE))?;
        echo_back(&mut stream)
    });
    Ok(())
}

/// Sends `len` bytes and checks that they come back.
fn echo_tcp(len: usize) -> Result<()> {
    let mut stream = TcpStream::connect_timeout(&vip(), PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let sent: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
    let mut writer = stream.try_clone()?;
    let copy = sent.clone();
    let writing = thread::spawn(move || writer.write_all(&copy));
    let mut got = vec![0; len];
    stream.read_exact(&mut got)?;
    ensure!(writing.join().is_ok_and(|written| written.is_ok()), "could not send all");
    ensure!(got == sent, "bytes came back changed");
    Ok(())
}

fn serve_udp() -> Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:443")?;
    socket.set_read_timeout(Some(PATIENCE))?;
    thread::spawn(move || -> Result<()> {
        let mut buffer = [0; 2048];
        loop {
            let (n, from) = socket.recv_from(&mut buffer)?;
            socket.send_to(&buffer[..n], from)?;
        }
    });
    Ok(())
}

/// Sends datagrams of growing size one by one and checks that each comes back.
fn echo_udp() -> Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.connect(vip())?;
    socket.set_read_timeout(Some(PATIENCE))?;
    for len in (0..1400).step_by(57) {
        let sent = vec![len as u8; len];
        socket.send(&sent)?;
        let mut buffer = [0; 2048];
        let n = socket.recv(&mut buffer)?;
        ensure!(buffer[..n] == sent, "{len} bytes came back as {n} other ones");
    }
    Ok(())
}

fn tcp(hook: Hook, mode: u8, resolved: bool) -> Result<()> {
    in_namespace(|| {
        let mut rig = Rig::new(hook, Settings::default())?;
        rig.service(1, 8443, TCP, mode, 1, 443)?;
        let live = Live::new(&mut rig, hook, resolved)?;
        live.pod.run(serve_tcp)?;
        const LEN: usize = 4 << 20;
        let echoed = live.client.run(|| echo_tcp(LEN));
        let reasons = rig.reasons()?;
        echoed.with_context(|| format!("{hook:?} mode {mode} resolved {resolved}: {reasons:?}"))?;
        let stats = rig.service_stats(1)?;
        assert_eq!((stats.half_opened, stats.opened), (1, 1));
        for (packets, bytes) in [(stats.packets_in, stats.bytes_in), (stats.packets_out, stats.bytes_out)] {
            assert!(bytes >= LEN as u64);
            if hook == Hook::Tc {
                assert!(bytes / packets > 1500, "no super-packet seen: {bytes} bytes in {packets} packets");
            }
        }
        let unresolved = rig.reasons()?.iter().any(|(reason, _)| *reason == "neighbour-unresolved");
        assert_eq!(unresolved, !resolved, "{:?}", rig.reasons()?);
        Ok(())
    })
}

fn udp(hook: Hook, mode: u8, resolved: bool) -> Result<()> {
    in_namespace(|| {
        let mut rig = Rig::new(hook, Settings::default())?;
        rig.service(1, 8443, UDP, mode, 1, 443)?;
        let live = Live::new(&mut rig, hook, resolved)?;
        live.pod.run(serve_udp)?;
        let echoed = live.client.run(echo_udp);
        let reasons = rig.reasons()?;
        echoed.with_context(|| format!("{hook:?} mode {mode} resolved {resolved}: {reasons:?}"))?;
        assert_eq!(rig.flows(name::ESTABLISHED)?.len(), 2);
        assert_eq!(rig.service_stats(1)?.packets_out, 25);
        Ok(())
    })
}

#[test]
fn super_packets_with_partial_checksums_come_through_tc_whole() -> Result<()> {
    MODES.into_iter().try_for_each(|mode| tcp(Hook::Tc, mode, true))
}

#[test]
fn datagrams_with_partial_checksums_come_through_tc_whole() -> Result<()> {
    MODES.into_iter().try_for_each(|mode| udp(Hook::Tc, mode, true))
}

#[test]
fn connections_and_datagrams_come_through_native_xdp_whole() -> Result<()> {
    MODES.into_iter().try_for_each(|mode| tcp(Hook::Xdp, mode, true).and_then(|()| udp(Hook::Xdp, mode, true)))
}

#[test]
fn the_first_packet_finds_an_unresolved_neighbour_by_way_of_the_stack() -> Result<()> {
    for hook in HOOKS {
        for mode in MODES {
            tcp(hook, mode, false)?;
            udp(hook, mode, false)?;
        }
    }
    Ok(())
}
