//! Real VLAN devices (802.1Q, and 802.1Q in 802.1ad) towards clients, a real bond and a VLAN on it towards backends, sockets at
//! both ends, whose kernels check every checksum. Not every kernel has these devices; Debian's do (`cargo xtask kernel-test`).

use std::{
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use edge_common::{
    flow::{TCP, UDP},
    maps::{mode, name},
};
use edge_tests::{
    datapath::{
        live::echo_back,
        namespace::{in_namespace, ip},
        rig::{FAMILIES, Family, Hook, Rig, Settings},
        vlan_devices::{FAR, Network, VlanDevices, missing},
    },
    skip::skipped,
};

const PATIENCE: Duration = Duration::from_secs(30);
/// Bytes that go through each TCP connection and come back.
const LEN: usize = 256 << 10;

/// A service with one backend.
#[derive(Clone, Copy, Debug)]
struct Service {
    number: u16,
    family: Family,
    mode: u8,
    protocol: u8,
    /// Its backend is in the VLAN on the bond, not on the bond itself.
    rack: bool,
}

impl Service {
    fn vip(&self) -> SocketAddr {
        SocketAddr::new(self.family.vip(), 8000 + self.number)
    }

    fn backend(&self) -> SocketAddr {
        let address = if self.rack { Network::Rack.address(self.family, FAR) } else { self.family.pod(0) };
        SocketAddr::new(address, 9000 + self.number)
    }
}

fn services() -> Vec<Service> {
    let mut all = Vec::new();
    for family in FAMILIES {
        for mode in [mode::FULL_NAT, mode::DNAT] {
            for protocol in [TCP, UDP] {
                for rack in [false, true] {
                    let number = u16::try_from(all.len() + 1).unwrap_or(u16::MAX);
                    all.push(Service { number, family, mode, protocol, rack });
                }
            }
        }
    }
    all
}

/// Each connection's and datagram's bytes as they came; on a connection its source address first.
fn serve(service: Service) -> Result<()> {
    if service.protocol == UDP {
        let socket = UdpSocket::bind(service.backend())?;
        thread::spawn(move || -> Result<()> {
            let mut buffer = [0; 2048];
            loop {
                let (n, from) = socket.recv_from(&mut buffer)?;
                socket.send_to(&buffer[..n], from)?;
            }
        });
        return Ok(());
    }
    let listener = TcpListener::bind(service.backend())?;
    thread::spawn(move || -> Result<()> {
        loop {
            let (mut stream, from) = listener.accept()?;
            stream.write_all(format!("{:>40}", from.ip()).as_bytes())?;
            thread::spawn(move || -> Result<()> { echo_back(&mut stream) });
        }
    });
    Ok(())
}

/// A connection, and the address that the backend saw.
fn connect(vip: SocketAddr) -> Result<(TcpStream, IpAddr)> {
    let mut stream = TcpStream::connect_timeout(&vip, PATIENCE).with_context(|| format!("connect to {vip}"))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut seen = [0; 40];
    stream.read_exact(&mut seen).context("the backend's first line")?;
    Ok((stream, String::from_utf8_lossy(&seen).trim().parse()?))
}

fn echo(stream: &TcpStream, len: usize) -> Result<()> {
    let sent: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
    let (mut reader, mut writer, copy) = (stream.try_clone()?, stream.try_clone()?, sent.clone());
    let writing = thread::spawn(move || writer.write_all(&copy));
    let mut got = vec![0; len];
    reader.read_exact(&mut got).context("what came back")?;
    ensure!(writing.join().is_ok_and(|written| written.is_ok()), "could not send all");
    ensure!(got == sent, "bytes came back changed");
    Ok(())
}

fn datagrams(vip: SocketAddr) -> Result<()> {
    let any = if vip.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any)?;
    socket.connect(vip)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    for len in (0..1400).step_by(233) {
        let sent = vec![len as u8; len];
        socket.send(&sent)?;
        let mut buffer = [0; 2048];
        let n = socket.recv(&mut buffer).with_context(|| format!("{len} bytes to {vip}"))?;
        ensure!(buffer[..n] == sent, "{len} bytes came back as {n} other ones");
    }
    Ok(())
}

fn use_service(devices: &VlanDevices, service: Service, from: Network) -> Result<()> {
    let vip = service.vip();
    if service.protocol == UDP {
        return devices.client.run(move || datagrams(vip));
    }
    let source = devices.client.run(move || {
        let (stream, source) = connect(vip)?;
        echo(&stream, LEN)?;
        Ok(source)
    })?;
    let client = from.address(service.family, FAR);
    let expected = if service.mode == mode::DNAT { client } else { service.family.snat() };
    ensure!(source == expected, "the backend saw {source}, not {expected}");
    Ok(())
}

/// Every service from the client networks, then one connection across the loss of the bond's active port.
fn traffic(hook: Hook) -> Result<()> {
    in_namespace(|| {
        let mut rig = Rig::new(hook, Settings::default())?;
        for service in services() {
            rig.set_family(service.family);
            let (number, vip) = (u32::from(service.number), service.vip());
            let backends =
                rig.service(number, vip.port(), service.protocol, service.mode, 1, service.backend().port())?;
            if service.rack {
                rig.move_backend(backends[0], service.backend().ip(), service.mode)?;
            }
        }
        let devices = VlanDevices::new(&mut rig, hook)?;
        for service in services() {
            devices.pod.run(move || serve(service))?;
        }
        // At TC on Linux 6.1 no connection comes up from the double-tagged network: README says so under "Not yet".
        let networks: &[Network] =
            if hook == Hook::Xdp { &[Network::Tagged, Network::DoubleTagged] } else { &[Network::Tagged] };
        for &from in networks {
            devices.come_from(from)?;
            for service in services() {
                let done = use_service(&devices, service, from);
                let reasons = rig.reasons()?;
                done.with_context(|| format!("{hook:?} from {from:?}: {service:?}: {reasons:?}"))?;
            }
        }
        for service in services() {
            let stats = rig.service_stats(u32::from(service.number))?;
            ensure!(stats.opened == networks.len() as u64 && stats.packets_out > 4, "{service:?}: {stats:?}");
        }
        fail_over(&mut rig, &devices)
    })
}

/// The port that carried the connection goes away, and both bonds move to the other one.
fn fail_over(rig: &mut Rig, devices: &VlanDevices) -> Result<()> {
    for service in services().into_iter().filter(|service| service.protocol == TCP && service.family == Family::V4) {
        let vip = service.vip();
        let stream = devices.client.run(move || {
            let (stream, _) = connect(vip)?;
            echo(&stream, 1000)?;
            Ok(stream)
        })?;
        // Of this thread's namespace, not of the process's.
        let active = std::fs::read_to_string("/proc/thread-self/net/bonding/bond0").context("the bond's state")?;
        let active = active.lines().find_map(|line| line.strip_prefix("Currently Active Slave: "));
        let active = active.context("no active port")?.to_owned();
        ip(&format!("link set {active} down"))?;
        let went_on = devices.client.run(move || echo(&stream, LEN));
        went_on.with_context(|| format!("{service:?} after {active} went: {:?}", rig.reasons()))?;
        ip(&format!("link set {active} up"))?;
    }
    ensure!(!rig.flows(name::ESTABLISHED)?.is_empty(), "no flow is left");
    Ok(())
}

fn where_there_are_devices(test: &str, hook: Hook) -> Result<()> {
    match missing()? {
        Some(reason) => skipped(test, reason),
        None => traffic(hook)?,
    }
    Ok(())
}

#[test]
fn at_native_xdp_sockets_behind_vlan_devices_and_a_bond_talk_through_the_edge() -> Result<()> {
    where_there_are_devices("at_native_xdp_sockets_behind_vlan_devices_and_a_bond_talk_through_the_edge", Hook::Xdp)
}

#[test]
fn at_tc_sockets_behind_single_vlan_devices_and_a_bond_talk_through_the_edge() -> Result<()> {
    where_there_are_devices("at_tc_sockets_behind_single_vlan_devices_and_a_bond_talk_through_the_edge", Hook::Tc)
}
