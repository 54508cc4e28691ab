//! Jumbo frames: 9,000-byte links, on native XDP (packets in several buffers, kernel 5.18) and TC, with real sockets; and the
//! object as kernels without multi-buffer XDP get it.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use edge_common::{
    flow::{TCP, UDP},
    maps::{mode, name},
};
use edge_ctl::datapath::object::{EBPF_OBJECT, for_kernel, has_frags};
use edge_tests::datapath::{
    frame::{Frame, flag},
    live::Live,
    namespace::{in_namespace, ip},
    rig::{Action, CLIENT, HOOKS, Hook, PODS_MAC, Rig, Settings, VIP, key, load, pod, pod_mac, snat_of},
};

const MODES: [u8; 2] = [mode::FULL_NAT, mode::DNAT];
const PATIENCE: Duration = Duration::from_secs(10);
/// Payload of a datagram that fills a 9,000-byte packet.
const FULL: usize = 9000 - 28;
const TCP_BYTES: usize = 1 << 20;

fn vip() -> SocketAddr {
    SocketAddr::new(VIP.into(), 8443)
}

/// Echoes datagrams, and the bytes of one connection.
fn serve() -> Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:443")?;
    thread::spawn(move || -> std::io::Result<()> {
        let mut buffer = [0; 9000];
        loop {
            let (n, from) = socket.recv_from(&mut buffer)?;
            socket.send_to(&buffer[..n], from)?;
        }
    });
    let listener = TcpListener::bind("0.0.0.0:443")?;
    thread::spawn(move || -> std::io::Result<()> {
        let (mut stream, _) = listener.accept()?;
        let mut buffer = vec![0; 65_536];
        loop {
            let n = stream.read(&mut buffer)?;
            if n == 0 {
                return Ok(());
            }
            stream.write_all(&buffer[..n])?;
        }
    });
    Ok(())
}

/// Datagrams around the sizes at which a packet needs one buffer more, and the largest.
fn echo_udp() -> Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.connect(vip())?;
    socket.set_read_timeout(Some(PATIENCE))?;
    let sizes = (1400..FULL).step_by(331).chain(3400..3420).chain([FULL - 1, FULL]);
    for len in sizes {
        let sent: Vec<u8> = (0..len).map(|at| (at % 251) as u8).collect();
        socket.send(&sent)?;
        let mut buffer = [0; 9000];
        let n = socket.recv(&mut buffer).with_context(|| format!("{len} bytes did not come back"))?;
        ensure!(buffer[..n] == sent, "{len} bytes came back as {n} other ones");
    }
    Ok(())
}

fn echo_tcp() -> Result<()> {
    let stream = TcpStream::connect_timeout(&vip(), PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let sent: Vec<u8> = (0..TCP_BYTES).map(|at| (at % 251) as u8).collect();
    let (mut reader, mut writer, copy) = (stream.try_clone()?, stream, sent.clone());
    let writing = thread::spawn(move || writer.write_all(&copy));
    let mut got = vec![0; sent.len()];
    reader.read_exact(&mut got)?;
    ensure!(writing.join().is_ok_and(|written| written.is_ok()), "could not send all");
    ensure!(got == sent, "bytes came back changed");
    Ok(())
}

fn jumbo(hook: Hook, mode: u8) -> Result<()> {
    in_namespace(|| {
        let mut rig = Rig::new(hook, Settings::default())?;
        for link in ["uplink", "uplink-peer", "pods", "pods-peer"] {
            ip(&format!("link set {link} mtu 9000"))?;
        }
        rig.service(1, 8443, UDP, mode, 1, 443)?;
        rig.service(2, 8443, TCP, mode, 1, 443)?;
        let live = Live::new(&mut rig, hook, true)?;
        live.pod.run(serve)?;
        let echoed = live.client.run(|| echo_udp().and_then(|()| echo_tcp()));
        let reasons = rig.reasons()?;
        echoed.with_context(|| format!("{hook:?} mode {mode}: {reasons:?}"))?;
        ensure!(reasons.is_empty(), "{reasons:?}");
        let stats = rig.service_stats(2)?;
        for (packets, bytes) in [(stats.packets_in, stats.bytes_in), (stats.packets_out, stats.bytes_out)] {
            ensure!(bytes >= TCP_BYTES as u64 && bytes / packets > 1500, "{bytes} bytes in {packets} packets");
        }
        Ok(())
    })
}

#[test]
fn packets_of_9000_bytes_come_through_native_xdp_whole() -> Result<()> {
    if !has_frags() {
        println!("SKIPPED packets_of_9000_bytes_come_through_native_xdp_whole: no multi-buffer XDP before 5.18");
        return Ok(());
    }
    MODES.into_iter().try_for_each(|mode| jumbo(Hook::Xdp, mode))
}

#[test]
fn packets_of_9000_bytes_come_through_tc_whole() -> Result<()> {
    MODES.into_iter().try_for_each(|mode| jumbo(Hook::Tc, mode))
}

#[test]
fn the_object_for_kernels_without_multi_buffer_xdp_forwards_and_finds_frames_cut_short() -> Result<()> {
    for hook in HOOKS {
        in_namespace(|| {
            let mut rig = Rig::from_object(&for_kernel(EBPF_OBJECT, false), hook, Settings::default())?;
            load(&mut rig.ebpf, hook)?;
            rig.service(1, 8443, TCP, mode::FULL_NAT, 1, 443)?;
            let client = SocketAddr::new(CLIENT.into(), 40_000);
            let syn = Frame::tcp(client, vip(), flag::SYN);
            let outcome = rig.run(&syn.bytes(), rig.uplink)?;
            let flow = rig.flow(name::HALF_OPEN, &key(client, vip(), TCP)).context("half-open")?;
            let backend = SocketAddr::new(pod(0).into(), 443);
            let expected = syn.translated(snat_of(&flow), backend, Some((pod_mac(0), PODS_MAC)));
            assert_eq!((outcome.action, outcome.frame), (Action::Redirect, expected));
            let short = &syn.bytes()[..syn.bytes().len() - 1];
            assert_eq!(rig.run(short, rig.uplink)?.action, Action::Drop);
            Ok(())
        })?;
    }
    Ok(())
}
