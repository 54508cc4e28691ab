//! Real stacks and the ICMP they send and believe: path MTU through the VIP, traceroute, refused datagrams, ping.

use std::{
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    process::Command,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use edge_common::{
    flow::{TCP, UDP},
    maps::mode,
};
use edge_tests::datapath::{
    live::Live,
    namespace::{in_namespace, ip},
    rig::{HOOKS, Hook, OWN, Rig, SNAT, Settings, VIP},
};

const MODES: [u8; 2] = [mode::FULL_NAT, mode::DNAT];
const PATIENCE: Duration = Duration::from_secs(10);

fn vip() -> SocketAddr {
    SocketAddr::new(VIP.into(), 8443)
}

fn each(test: impl Fn(Hook, u8) -> Result<()>) -> Result<()> {
    HOOKS.into_iter().flat_map(|hook| MODES.map(|mode| (hook, mode))).try_for_each(|(hook, mode)| test(hook, mode))
}

/// Sends `len` bytes there and back.
fn echo(len: usize) -> Result<()> {
    let mut stream = TcpStream::connect_timeout(&vip(), PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
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

fn serve() -> Result<()> {
    let listener = TcpListener::bind("0.0.0.0:443")?;
    thread::spawn(move || -> Result<()> {
        let (mut stream, _) = listener.accept()?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut buffer = vec![0; 65536];
        loop {
            match stream.read(&mut buffer)? {
                0 => return Ok(()),
                n => stream.write_all(&buffer[..n])?,
            }
        }
    });
    Ok(())
}

/// Where the link beyond the edge takes 1300 bytes only, and neither end knows, since the segment size they agree on at
/// the start is for 1500.
#[test]
fn path_mtu_discovery_works_through_the_vip_both_ways() -> Result<()> {
    each(|hook, mode| {
        for narrow in ["pods", "uplink"] {
            in_namespace(|| {
                let mut rig = Rig::new(hook, Settings::default())?;
                rig.service(1, 8443, TCP, mode, 1, 443)?;
                let live = Live::new(&mut rig, hook, true)?;
                ip(&format!("link set {narrow} mtu 1300"))?;
                let (host, gateway) = if narrow == "pods" { (&live.pod, SNAT) } else { (&live.client, VIP) };
                host.run(move || {
                    ip(&format!("link set {narrow}-peer mtu 1300"))?;
                    ip(&format!("route replace default via {gateway} advmss 1460"))?;
                    let network = gateway.octets();
                    let connected = format!("{}.{}.{}.0/24", network[0], network[1], network[2]);
                    ip(&format!("route replace {connected} dev {narrow}-peer advmss 1460"))
                })?;
                live.pod.run(serve)?;
                let echoed = live.client.run(|| echo(4 << 20));
                let reasons = rig.reasons()?;
                echoed.with_context(|| format!("{hook:?} mode {mode} {narrow}: {reasons:?}"))?;
                let told = reasons.iter().any(|(reason, _)| *reason == "too-big");
                ensure!(told, "{hook:?} mode {mode} {narrow}: nobody had to be told: {reasons:?}");
                Ok(())
            })?;
        }
        Ok(())
    })
}

#[test]
fn a_refused_datagram_is_an_error_at_the_socket_that_sent_it_both_ways() -> Result<()> {
    each(|hook, mode| {
        in_namespace(|| {
            let mut rig = Rig::new(hook, Settings::default())?;
            rig.service(1, 8443, UDP, mode, 1, 443)?;
            let live = Live::new(&mut rig, hook, true)?;
            // Nobody listens at the pod.
            let refused = live.client.run(|| {
                let socket = UdpSocket::bind("0.0.0.0:0")?;
                socket.set_read_timeout(Some(PATIENCE))?;
                socket.connect(vip())?;
                socket.send(b"anybody?")?;
                Ok(socket.recv(&mut [0; 16]).err().map(|error| error.kind()))
            })?;
            assert_eq!(refused, Some(ErrorKind::ConnectionRefused), "{hook:?} mode {mode}: {:?}", rig.reasons()?);
            // The client goes, and the pod answers.
            let server = live.pod.run(|| {
                let socket = UdpSocket::bind("0.0.0.0:443")?;
                socket.set_read_timeout(Some(PATIENCE))?;
                Ok(socket)
            })?;
            live.client.run(|| {
                let socket = UdpSocket::bind("0.0.0.0:0")?;
                socket.send_to(b"a question", vip())?;
                Ok(())
            })?;
            let (_, from) = server.recv_from(&mut [0; 16])?;
            server.connect(from)?;
            server.send(b"an answer")?;
            let refused = server.recv(&mut [0; 16]).err().map(|error| error.kind());
            assert_eq!(refused, Some(ErrorKind::ConnectionRefused), "{hook:?} mode {mode}: {:?}", rig.reasons()?);
            Ok(())
        })
    })
}

/// Sends a datagram to the VIP with a TTL and prints who sends an ICMP message about it.
const PROBE: &str = r#"
import socket, sys
icmp = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
icmp.settimeout(10)
probe = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
probe.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, int(sys.argv[2]))
probe.sendto(b"x" * 32, (sys.argv[1], 8443))
message, (address, _) = icmp.recvfrom(2048)
print(address, message[20], message[21])
"#;

#[test]
fn a_traceroute_shows_the_edge_and_then_the_vip() -> Result<()> {
    each(|hook, mode| {
        in_namespace(|| {
            let mut rig = Rig::new(hook, Settings::default())?;
            rig.service(1, 8443, UDP, mode, 1, 443)?;
            let live = Live::new(&mut rig, hook, true)?;
            let hops = [(1, format!("{} 11 0", OWN[0])), (2, format!("{VIP} 3 3"))];
            for (ttl, expected) in hops {
                let shown = live.client.run(move || {
                    let output =
                        Command::new("python3").args(["-c", PROBE, &VIP.to_string(), &ttl.to_string()]).output()?;
                    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
                    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
                });
                let shown = shown.with_context(|| format!("{hook:?} mode {mode} TTL {ttl}"))?;
                assert_eq!(shown, expected, "{hook:?} mode {mode} TTL {ttl}: {:?}", rig.reasons()?);
            }
            Ok(())
        })
    })
}

/// Sends an echo request and waits for the reply.
const PING: &str = r#"
import socket, sys
icmp = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
icmp.settimeout(10)
# Type 8, code 0, checksum, identifier 1, sequence 1.
icmp.sendto(bytes.fromhex("0800f7fd00010001"), (sys.argv[1], 0))
message, (address, _) = icmp.recvfrom(2048)
assert address == sys.argv[1] and message[20] == 0, (address, message)
"#;

#[test]
fn a_ping_to_the_vip_is_answered_by_the_kernel() -> Result<()> {
    for hook in HOOKS {
        in_namespace(|| {
            let mut rig = Rig::new(hook, Settings::default())?;
            rig.service(1, 8443, UDP, mode::FULL_NAT, 1, 443)?;
            let live = Live::new(&mut rig, hook, true)?;
            live.client.run(|| {
                let output = Command::new("python3").args(["-c", PING, &VIP.to_string()]).output()?;
                ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
                Ok(())
            })?;
            assert_eq!(rig.reasons()?, []);
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn datagrams_longer_than_the_links_come_back_whole() -> Result<()> {
    each(|hook, mode| {
        in_namespace(|| {
            let mut rig = Rig::new(hook, Settings::default())?;
            rig.service(1, 8443, UDP, mode, 1, 443)?;
            let live = Live::new(&mut rig, hook, true)?;
            live.pod.run(|| {
                let socket = UdpSocket::bind("0.0.0.0:443")?;
                socket.set_read_timeout(Some(PATIENCE))?;
                thread::spawn(move || -> Result<()> {
                    let mut buffer = [0; 65536];
                    loop {
                        let (n, from) = socket.recv_from(&mut buffer)?;
                        socket.send_to(&buffer[..n], from)?;
                    }
                });
                Ok(())
            })?;
            let echoed = live.client.run(|| {
                let socket = UdpSocket::bind("0.0.0.0:0")?;
                socket.connect(vip())?;
                socket.set_read_timeout(Some(PATIENCE))?;
                for len in [4000, 1473, 4096, 20_000, 4001] {
                    let sent: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
                    socket.send(&sent)?;
                    let mut buffer = [0; 65536];
                    let n = socket.recv(&mut buffer)?;
                    ensure!(buffer[..n] == sent, "{len} bytes came back as {n} other ones");
                }
                Ok(())
            });
            let reasons = rig.reasons()?;
            echoed.with_context(|| format!("{hook:?} mode {mode}: {reasons:?}"))
        })
    })
}
