//! Real stacks and the ICMP they send and believe: path MTU through the VIP, traceroute, refused datagrams, ping.

use std::{
    io::{ErrorKind, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    process::Command,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use edge_common::{
    flow::{TCP, UDP},
    maps::mode,
};
use edge_tests::datapath::{
    ends::{MODES, backend, vip},
    live::{Live, echo_back},
    namespace::{in_namespace, ip},
    rig::{FAMILIES, Family, HOOKS, Hook, Rig, Settings},
};

const PATIENCE: Duration = Duration::from_secs(10);

/// Runs `test` on both hooks, in both modes, with a service of each family.
fn each(protocol: u8, test: impl Fn(&mut Rig, &Live, Hook, Family) -> Result<()> + Sync) -> Result<()> {
    for (hook, mode) in HOOKS.into_iter().flat_map(|hook| MODES.map(|mode| (hook, mode))) {
        in_namespace(|| {
            let (mut rig, live) = both(hook, mode, protocol)?;
            FAMILIES.into_iter().try_for_each(|family| {
                let outcome = test(&mut rig, &live, hook, family);
                outcome.with_context(|| format!("{hook:?} {family:?} mode {mode}: {:?}", rig.reasons()))
            })
        })?;
    }
    Ok(())
}

/// A service of each family, and a client and a pod that have both.
fn both(hook: Hook, mode: u8, protocol: u8) -> Result<(Rig, Live)> {
    let mut rig = Rig::new(hook, Settings::default())?;
    for (number, family) in (1..).zip(FAMILIES) {
        rig.set_family(family);
        rig.service(number, 8443, protocol, mode, 1, 443)?;
    }
    let live = Live::new(&mut rig, hook, true)?;
    Ok((rig, live))
}

/// A socket that waits at the most so long: a client's.
fn socket(family: Family) -> Result<UdpSocket> {
    bound(SocketAddr::new(family.client(), 0))
}

fn bound(to: SocketAddr) -> Result<UdpSocket> {
    let socket = UdpSocket::bind(to)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}

/// Sends `len` bytes there and back.
fn echo(family: Family, len: usize) -> Result<()> {
    let mut stream = TcpStream::connect_timeout(&vip(family), PATIENCE)?;
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

/// Echoes one connection.
fn serve(family: Family) -> Result<()> {
    let listener = TcpListener::bind(backend(family))?;
    thread::spawn(move || -> Result<()> {
        let (mut stream, _) = listener.accept()?;
        drop(listener);
        stream.set_read_timeout(Some(PATIENCE))?;
        echo_back(&mut stream)
    });
    Ok(())
}

/// Has a host agree on segments for 1500 bytes, although its link takes 1300.
fn pretend(family: Family, link: &str, gateway: IpAddr) -> Result<()> {
    let (version, mss, network) = match gateway {
        IpAddr::V4(address) => ("-4", 1460, format!("{}/24", Ipv4Addr::from_bits(address.to_bits() & !0xff))),
        IpAddr::V6(address) => {
            ("-6", 1440, format!("{}/64", Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX))))
        }
    };
    ip(&format!("{version} route replace default via {gateway} advmss {mss}"))?;
    // Preferred to the kernel's own.
    let metric = if family == Family::V4 { "" } else { "metric 1" };
    ip(&format!("{version} route replace {network} dev {link} advmss {mss} {metric}"))
}

/// Where the link beyond the edge takes 1300 bytes only, and neither end knows, since the segment size they agree on at
/// the start is for 1500.
#[test]
fn path_mtu_discovery_works_through_the_vip_both_ways() -> Result<()> {
    for (hook, mode, narrow) in HOOKS
        .into_iter()
        .flat_map(|hook| MODES.into_iter().flat_map(move |mode| ["pods", "uplink"].map(|n| (hook, mode, n))))
    {
        in_namespace(|| {
            let (mut rig, live) = both(hook, mode, TCP)?;
            ip(&format!("link set {narrow} mtu 1300"))?;
            let host = if narrow == "pods" { &live.pod } else { &live.client };
            host.run(move || {
                ip(&format!("link set {narrow}-peer mtu 1300"))?;
                FAMILIES.into_iter().try_for_each(|family| {
                    let gateway = if narrow == "pods" { family.snat() } else { family.vip() };
                    pretend(family, &format!("{narrow}-peer"), gateway)
                })
            })?;
            let mut told = 0;
            for family in FAMILIES {
                live.pod.run(move || serve(family))?;
                let echoed = live.client.run(move || echo(family, 4 << 20));
                let reasons = rig.reasons()?;
                let what = format!("{hook:?} {family:?} mode {mode} {narrow}: {reasons:?}");
                echoed.context(what.clone())?;
                let so_far = reasons.iter().find(|(reason, _)| *reason == "too-big").map_or(0, |(_, count)| *count);
                ensure!(so_far > told, "nobody had to be told: {what}");
                told = so_far;
            }
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn a_refused_datagram_is_an_error_at_the_socket_that_sent_it_both_ways() -> Result<()> {
    each(UDP, |_, live, _, family| {
        // Nobody listens at the pod.
        let refused = live.client.run(move || {
            let socket = socket(family)?;
            socket.connect(vip(family))?;
            socket.send(b"anybody?")?;
            Ok(socket.recv(&mut [0; 16]).err().map(|error| error.kind()))
        })?;
        ensure!(refused == Some(ErrorKind::ConnectionRefused), "the client sees {refused:?}");
        // The client goes, and the pod answers.
        let server = live.pod.run(move || bound(backend(family)))?;
        live.client.run(move || {
            socket(family)?.send_to(b"a question", vip(family))?;
            Ok(())
        })?;
        let (_, from) = server.recv_from(&mut [0; 16])?;
        server.connect(from)?;
        server.send(b"an answer")?;
        let refused = server.recv(&mut [0; 16]).err().map(|error| error.kind());
        if refused != Some(ErrorKind::ConnectionRefused) {
            let counted = live.client.run(|| Ok(std::fs::read_to_string("/proc/thread-self/net/snmp")?))?;
            bail!("the pod sees {refused:?}; the client has counted {counted}");
        }
        Ok(())
    })
}

/// Sends a datagram to the VIP with a TTL and prints who sends an ICMP error about it. Neighbour discovery is none.
const PROBE: &str = r#"
import socket, sys
v6 = ":" in sys.argv[1]
family = socket.AF_INET6 if v6 else socket.AF_INET
icmp = socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_ICMPV6 if v6 else socket.IPPROTO_ICMP)
icmp.settimeout(10)
probe = socket.socket(family, socket.SOCK_DGRAM)
if v6:
    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, int(sys.argv[2]))
else:
    probe.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, int(sys.argv[2]))
probe.sendto(b"x" * 32, (sys.argv[1], 8443))
while True:
    message, (address, *_) = icmp.recvfrom(2048)
    message = message if v6 else message[20:]
    if not v6 or message[0] < 128:
        break
print(address, message[0], message[1])
"#;

/// Runs a program and gives what it printed.
fn python(program: &str, arguments: &[String]) -> Result<String> {
    let output = Command::new("python3").args(["-c", program]).args(arguments).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

#[test]
fn a_traceroute_shows_the_edge_and_then_the_vip() -> Result<()> {
    each(UDP, |_, live, _, family| {
        let (vip, own) = (family.vip(), family.own()[0]);
        let hops = match family {
            Family::V4 => [(1, format!("{own} 11 0")), (2, format!("{vip} 3 3"))],
            Family::V6 => [(1, format!("{own} 3 0")), (2, format!("{vip} 1 4"))],
        };
        for (ttl, expected) in hops {
            let shown = live.client.run(move || python(PROBE, &[vip.to_string(), ttl.to_string()]));
            let shown = shown.with_context(|| format!("TTL {ttl}"))?;
            ensure!(shown == expected, "TTL {ttl}: {shown}, not {expected}");
        }
        Ok(())
    })
}

/// Sends an echo request and waits for the reply.
const PING: &str = r#"
import socket, sys
v6 = ":" in sys.argv[1]
icmp = socket.socket(
    socket.AF_INET6 if v6 else socket.AF_INET,
    socket.SOCK_RAW,
    socket.IPPROTO_ICMPV6 if v6 else socket.IPPROTO_ICMP,
)
icmp.settimeout(10)
# Echo request, code 0, checksum (ICMPv6's is the kernel's to write), identifier 1, sequence 1.
icmp.sendto(bytes.fromhex("8000000000010001" if v6 else "0800f7fd00010001"), (sys.argv[1], 0))
while True:
    message, (address, *_) = icmp.recvfrom(2048)
    message = message if v6 else message[20:]
    # Neighbour discovery comes to this socket, too.
    if not v6 or message[0] < 130:
        break
assert address == sys.argv[1] and message[0] == (129 if v6 else 0), (address, message)
"#;

#[test]
fn a_ping_and_a_closed_port_of_the_vip_are_answered_by_the_kernel() -> Result<()> {
    for hook in HOOKS {
        in_namespace(|| {
            let (mut rig, live) = both(hook, mode::FULL_NAT, UDP)?;
            for family in FAMILIES {
                live.client.run(move || python(PING, &[family.vip().to_string()]))?;
                assert_eq!(rig.reasons()?, [], "{hook:?} {family:?}");
            }
            for family in FAMILIES {
                let closed = SocketAddr::new(family.vip(), 9);
                live.client.run(move || {
                    let connected = TcpStream::connect_timeout(&closed, PATIENCE).map_err(|error| error.kind());
                    ensure!(matches!(connected, Err(ErrorKind::ConnectionRefused)), "TCP: {connected:?}");
                    let socket = socket(family)?;
                    socket.connect(closed)?;
                    socket.send(b"anybody?")?;
                    let answer = socket.recv(&mut [0; 16]).map_err(|error| error.kind());
                    ensure!(matches!(answer, Err(ErrorKind::ConnectionRefused)), "UDP: {answer:?}");
                    Ok(())
                })?;
            }
            assert_eq!(rig.reasons()?, [("no-frontend", 4)], "{hook:?}");
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn datagrams_longer_than_the_links_come_back_whole() -> Result<()> {
    each(UDP, |_, live, _, family| {
        live.pod.run(move || {
            let socket = bound(backend(family))?;
            thread::spawn(move || -> Result<()> {
                let mut buffer = [0; 65536];
                loop {
                    let (n, from) = socket.recv_from(&mut buffer)?;
                    socket.send_to(&buffer[..n], from)?;
                }
            });
            Ok(())
        })?;
        live.client.run(move || {
            let socket = socket(family)?;
            socket.connect(vip(family))?;
            for len in [4000, 1473, 1453, 4096, 20_000, 4001] {
                let sent: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
                socket.send(&sent)?;
                let mut buffer = [0; 65536];
                let n = socket.recv(&mut buffer).with_context(|| format!("{len} bytes"))?;
                ensure!(buffer[..n] == sent, "{len} bytes came back as {n} other ones");
            }
            Ok(())
        })
    })
}
