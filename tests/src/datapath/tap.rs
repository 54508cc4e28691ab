//! Real frames over the rig's links: sent by AF_PACKET at their far ends, and captured whole wherever they come out.
#![allow(unsafe_code, reason = "AF_PACKET sockets have no safe wrapper among our dependencies")]

use std::{
    io,
    net::SocketAddr,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

use anyhow::{Context, Result, bail, ensure};
use aya::programs::{SchedClassifier, TcAttachType, Xdp, XdpMode, tc};
use edge_common::{
    flow::UDP,
    maps::{mode, name},
};
use edge_ctl::datapath::attach::{AttachedHook, tc_hook};

use crate::lab::xdp_pass;

use super::{
    frame::Frame,
    namespace::ifindex,
    rig::{CLIENT, CLIENT_MAC, Hook, PODS_MAC, Rig, Settings, UPLINK_MAC, VIP, key, pod, pod_mac, snat_of},
};

/// Where frames meet the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wire {
    /// XDP in the driver.
    Native,
    /// XDP on socket buffers.
    Generic,
    /// TC ingress.
    Tc,
}

/// All three, for tests that go over them.
pub const WIRES: [Wire; 3] = [Wire::Native, Wire::Generic, Wire::Tc];

/// A link of the rig.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Towards clients.
    Uplink,
    /// Towards pods.
    Pods,
}

/// What must become of a frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expect {
    /// Out of this link, as these bytes, and nowhere else.
    Out(Side, Vec<u8>),
    /// To the edge's own stack, as these bytes, and nowhere else.
    Stack(Vec<u8>),
    /// Nothing anywhere.
    Nothing,
}

/// A line of a table of frames.
pub struct Row {
    /// What it shows.
    pub what: String,
    /// The link by which the frame comes to the edge.
    pub comes_by: Side,
    /// Its bytes.
    pub frame: Vec<u8>,
    /// What must become of it.
    pub expect: Expect,
}

impl Row {
    /// A row.
    pub fn new(what: impl Into<String>, comes_by: Side, frame: impl Into<Vec<u8>>, expect: Expect) -> Self {
        Self { what: what.into(), comes_by, frame: frame.into(), expect }
    }
}

/// Ethernet types under which the stack is watched (`ETH_P_IP`, `ETH_P_ARP`, `ETH_P_IPV6`, `ETH_P_8021Q`).
const STACK_TYPES: [u16; 4] = [0x0800, 0x0806, 0x86dd, 0x8100];
/// The port that the marks' flow is sent to.
const MARKS: u16 = 7;
/// How long a frame may be on its way, milliseconds.
const PATIENCE: i32 = 10_000;

/// The attached program between two links, and ears at every place where a frame may come out.
///
/// Frames carry destination MACs that are nobody's, so the edge's stack, which gets what the program passes, never answers:
/// the tests of the stack's own answers are elsewhere.
pub struct Taps {
    /// The program and its maps.
    pub rig: Rig,
    uplink: Tap,
    pods: Tap,
    stack: Vec<Tap>,
    marks: u64,
    mark_source: SocketAddr,
    /// What lets the far ends take frames that XDP sends.
    _listeners: Vec<OwnedFd>,
}

/// Link by which a mark comes, link by which it leaves, and its bytes before and after.
type Mark = (Side, Side, (Vec<u8>, Vec<u8>));

impl Taps {
    /// Makes the rig in this thread's namespace, lets `services` fill its maps, and attaches the program to both links.
    /// Service number 1 is taken.
    ///
    /// # Errors
    /// Where a link, a socket, a map or the program is refused.
    pub fn new(wire: Wire, settings: Settings, services: impl FnOnce(&mut Rig) -> Result<()>) -> Result<Self> {
        let hook = if wire == Wire::Tc { Hook::Tc } else { Hook::Xdp };
        let mut rig = Rig::new(hook, settings)?;
        rig.service(1, MARKS, UDP, mode::FULL_NAT, 1, MARKS)?;
        services(&mut rig)?;
        let mut listeners = Vec::new();
        if wire == Wire::Native {
            for peer in ["uplink-peer", "pods-peer"] {
                listeners.push(xdp_pass::listen(ifindex(peer)?)?);
            }
        }
        attach(&mut rig, wire)?;
        let mut stack = Vec::new();
        for link in ["uplink", "pods"] {
            for kind in STACK_TYPES {
                stack.push(Tap::open(link, kind)?);
            }
        }
        let (uplink, pods) = (Tap::open("uplink-peer", ALL_TYPES)?, Tap::open("pods-peer", ALL_TYPES)?);
        let mut taps = Self { rig, uplink, pods, stack, marks: 0, mark_source: mark_vip(), _listeners: listeners };
        taps.open_marks()?;
        Ok(taps)
    }

    /// Sends a frame in by `comes_by` and says what came out, where: in the order of the links, the stack last.
    ///
    /// # Errors
    /// Where a socket fails, or the program forwards nothing any more.
    pub fn pass(&mut self, comes_by: Side, frame: &[u8]) -> Result<Vec<Expect>> {
        self.tap(comes_by).send(frame)?;
        self.settle()
    }

    /// Sends each row's frame and compares what came out with what must.
    ///
    /// # Errors
    /// With the first row that differs, and what was seen.
    pub fn check(&mut self, rows: &[Row]) -> Result<()> {
        for row in rows {
            let seen = self.pass(row.comes_by, &row.frame).with_context(|| row.what.clone())?;
            let wanted: &[Expect] = if row.expect == Expect::Nothing { &[] } else { std::slice::from_ref(&row.expect) };
            if seen != wanted {
                bail!(
                    "{}\n  sent {:02x?}\n  want {wanted:02x?}\n  seen {seen:02x?}\n  {:?}",
                    row.what,
                    row.frame,
                    self.rig.reasons()?
                );
            }
        }
        Ok(())
    }

    fn tap(&self, side: Side) -> &Tap {
        match side {
            Side::Uplink => &self.uplink,
            Side::Pods => &self.pods,
        }
    }

    /// Waits until everything sent so far has come out. Each link is a queue, so what was sent before a mark comes out
    /// before it; two rounds, since the first mark to the pods may overtake what pods sent to pods.
    fn settle(&mut self) -> Result<Vec<Expect>> {
        let mut seen = Vec::new();
        for _ in 0..2 {
            for (from, to, mark) in self.next_marks() {
                self.tap(from).send(&mark.0)?;
                let came = self.tap(to).until(&mark.1)?;
                seen.extend(came.into_iter().map(|frame| Expect::Out(to, frame)));
            }
        }
        for tap in &self.stack {
            while let Some(frame) = tap.next(0)? {
                seen.push(Expect::Stack(frame));
            }
        }
        Ok(seen)
    }

    /// A mark in each direction: link by which it comes, link by which it leaves, and its bytes before and after.
    fn next_marks(&mut self) -> [Mark; 2] {
        self.marks += 1;
        let number = self.marks.to_be_bytes().to_vec();
        let (backend, source) = (SocketAddr::new(pod(0).into(), MARKS), self.mark_source);
        let request = Frame::udp(mark_client(), mark_vip()).payload(number.clone());
        let reply = Frame::udp(backend, source).payload(number);
        let forward = request.translated(source, backend, Some((pod_mac(0), PODS_MAC)));
        let back = reply.translated(mark_vip(), mark_client(), Some((CLIENT_MAC, UPLINK_MAC)));
        [(Side::Uplink, Side::Pods, (request.bytes(), forward)), (Side::Pods, Side::Uplink, (reply.bytes(), back))]
    }

    /// The first datagram makes the marks' flow.
    fn open_marks(&mut self) -> Result<()> {
        self.uplink.send(&Frame::udp(mark_client(), mark_vip()).payload(vec![0; 8]).bytes())?;
        ensure!(self.pods.next(PATIENCE)?.is_some(), "the first frame did not come through: {:?}", self.rig.reasons()?);
        let flow = self.rig.flow(name::HALF_OPEN, &key(mark_client(), mark_vip(), UDP)).context("no flow for marks")?;
        self.mark_source = snat_of(&flow);
        self.settle().map(drop)
    }
}

fn mark_client() -> SocketAddr {
    SocketAddr::new(CLIENT.into(), 7777)
}

fn mark_vip() -> SocketAddr {
    SocketAddr::new(VIP.into(), MARKS)
}

fn attach(rig: &mut Rig, wire: Wire) -> Result<()> {
    for interface in ["uplink", "pods"] {
        if wire == Wire::Tc {
            let program: &mut SchedClassifier = rig.ebpf.program_mut("edge_tc").context("no edge_tc")?.try_into()?;
            if tc_hook() == AttachedHook::Clsact {
                tc::qdisc_add_clsact(interface)?;
            }
            program.attach(interface, TcAttachType::Ingress)?;
        } else {
            let program: &mut Xdp = rig.ebpf.program_mut("edge_xdp").context("no edge_xdp")?.try_into()?;
            program.attach(interface, if wire == Wire::Native { XdpMode::Driver } else { XdpMode::Skb })?;
        }
    }
    Ok(())
}

/// How destination MACs of IPv6 multicasts begin (RFC 2464, section 7): the kernel sends some by itself.
const IPV6_MULTICAST: [u8; 2] = [0x33, 0x33];
const ALL_TYPES: u16 = libc::ETH_P_ALL as u16;

/// The tag that the kernel took off the received frame.
fn outer_tag(message: &libc::msghdr) -> Option<[u8; 4]> {
    // SAFETY: the kernel has filled the control buffer that the message names, and which is still there.
    let aux = unsafe {
        let header = libc::CMSG_FIRSTHDR(message);
        if header.is_null() || ((*header).cmsg_level, (*header).cmsg_type) != (libc::SOL_PACKET, libc::PACKET_AUXDATA) {
            return None;
        }
        libc::CMSG_DATA(header).cast::<libc::tpacket_auxdata>().read_unaligned()
    };
    if aux.tp_status & libc::TP_STATUS_VLAN_VALID == 0 {
        return None;
    }
    let ([a, b], [c, d]) = (aux.tp_vlan_tpid.to_be_bytes(), aux.tp_vlan_tci.to_be_bytes());
    Some([a, b, c, d])
}

/// A socket for whole frames on one interface.
struct Tap(OwnedFd);

impl Tap {
    /// Frames of this Ethernet type that the interface receives. `ETH_P_ALL` hears them before TC, others after it.
    fn open(interface: &str, kind: u16) -> Result<Self> {
        let kind = kind.to_be();
        // SAFETY: takes integers only.
        let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, i32::from(kind)) };
        ensure!(fd >= 0, "AF_PACKET: {}", io::Error::last_os_error());
        // SAFETY: a new descriptor that nobody else owns.
        let tap = Self(unsafe { OwnedFd::from_raw_fd(fd) });
        // SAFETY: plain integers, for which all zeroes are valid.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = kind;
        address.sll_ifindex = i32::try_from(ifindex(interface)?)?;
        let on: libc::c_int = 1;
        // SAFETY: an open socket; the structure and the integer are as long as said and outlive the calls.
        let ready = unsafe {
            libc::bind(fd, (&raw const address).cast(), size_of::<libc::sockaddr_ll>() as u32) == 0
                && libc::setsockopt(
                    fd,
                    libc::SOL_PACKET,
                    libc::PACKET_IGNORE_OUTGOING,
                    (&raw const on).cast(),
                    size_of::<libc::c_int>() as u32,
                ) == 0
                && libc::setsockopt(
                    fd,
                    libc::SOL_PACKET,
                    libc::PACKET_AUXDATA,
                    (&raw const on).cast(),
                    size_of::<libc::c_int>() as u32,
                ) == 0
        };
        ensure!(ready, "AF_PACKET on {interface}: {}", io::Error::last_os_error());
        Ok(tap)
    }

    fn send(&self, frame: &[u8]) -> Result<()> {
        // SAFETY: an open socket, and bytes that outlive the call.
        let sent = unsafe { libc::send(self.0.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
        ensure!(sent == frame.len() as isize, "send {} bytes: {}", frame.len(), io::Error::last_os_error());
        Ok(())
    }

    /// The next frame within so many milliseconds.
    fn receive(&self, patience: i32) -> Result<Option<Vec<u8>>> {
        let mut poll = libc::pollfd { fd: self.0.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one structure, which outlives the call.
        if unsafe { libc::poll(&raw mut poll, 1, patience) } <= 0 {
            return Ok(None);
        }
        let mut frame = vec![0; 65_536];
        let mut control = [0_u64; 16];
        let mut part = libc::iovec { iov_base: frame.as_mut_ptr().cast(), iov_len: frame.len() };
        // SAFETY: plain integers and pointers, for which all zeroes are valid.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        (message.msg_iov, message.msg_iovlen) = (&raw mut part, 1);
        (message.msg_control, message.msg_controllen) = (control.as_mut_ptr().cast(), size_of_val(&control));
        // SAFETY: an open socket; the buffers are as long as said and outlive the call.
        let length = unsafe { libc::recvmsg(self.0.as_raw_fd(), &raw mut message, 0) };
        ensure!(length >= 0, "recvmsg: {}", io::Error::last_os_error());
        frame.truncate(length as usize);
        if let Some(tag) = outer_tag(&message) {
            frame.splice(12..12, tag);
        }
        Ok(Some(frame))
    }

    /// The next frame that a test sent: the kernel's own multicasts over IPv6 are left out.
    fn next(&self, patience: i32) -> Result<Option<Vec<u8>>> {
        loop {
            match self.receive(patience)? {
                Some(frame) if frame.starts_with(&IPV6_MULTICAST) => {}
                other => return Ok(other),
            }
        }
    }

    /// The frames before this one.
    fn until(&self, last: &[u8]) -> Result<Vec<Vec<u8>>> {
        let mut before = Vec::new();
        loop {
            match self.next(PATIENCE)? {
                Some(frame) if frame == last => return Ok(before),
                Some(frame) => before.push(frame),
                None => bail!("a mark did not come through; before it came {before:02x?}"),
            }
        }
    }
}
