//! Real sockets behind the two links of a [`Rig`]: the program attached, traffic through it.
#![allow(unsafe_code, reason = "unshare(2) and gettid(2) have no safe wrapper among our dependencies")]

use std::{
    io::{Read, Write},
    net::TcpStream,
    os::fd::OwnedFd,
    sync::mpsc,
    thread,
};

use crate::lab::xdp_pass;
use anyhow::{Context, Result};

use super::{
    namespace::{ifindex, ip, run, sysctl},
    rig::{CLIENT, CLIENT_MAC, CLIENT6, Hook, Rig, SNAT, SNAT6, VIP, VIP6, mac, pod, pod_mac, pod6},
    tap::Wire,
};

type Job = Box<dyn FnOnce() + Send>;

/// A host: a thread in a network namespace of its own, which goes when the value does.
pub struct Host {
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<thread::JoinHandle<()>>,
    id: i32,
}

impl Host {
    /// Starts the thread.
    ///
    /// # Errors
    /// Where the namespace cannot be made.
    pub fn new() -> Result<Self> {
        let (ready, is_ready) = mpsc::channel();
        let (jobs, queue) = mpsc::channel::<Job>();
        let thread = thread::spawn(move || {
            // SAFETY: takes flags only, and changes nothing but the network namespace of this new thread.
            let made = unsafe { libc::unshare(libc::CLONE_NEWNET) } == 0;
            // SAFETY: takes nothing and cannot fail.
            let id = unsafe { libc::gettid() };
            // Nobody waits where the other side has given up.
            let _ = ready.send(made.then_some(id));
            for job in queue {
                job();
            }
        });
        let id = is_ready.recv()?.context("no network namespace for a host")?;
        Ok(Self { jobs: Some(jobs), thread: Some(thread), id })
    }

    /// The thread, by which `ip` names its namespace.
    pub fn id(&self) -> i32 {
        self.id
    }

    /// Runs `job` in the host's namespace; threads it starts stay there.
    ///
    /// # Errors
    /// What the job returns; and where it panicked.
    pub fn run<T: Send + 'static>(&self, job: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
        let (done, result) = mpsc::channel();
        let job: Job = Box::new(move || {
            // The receiver is there until the result is.
            let _ = done.send(job());
        });
        self.jobs.as_ref().context("host is gone")?.send(job).ok().context("host is gone")?;
        result.recv().context("the job panicked")?
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.jobs.take();
        if let Some(thread) = self.thread.take() {
            // A panic in the host has been printed; the test fails by its own means.
            let _ = thread.join();
        }
    }
}

/// A client and a pod on either side of the rig.
pub struct Live {
    /// 172.16.1.10 and its IPv6 twin, on `uplink`.
    pub client: Host,
    /// Pod 0, 10.1.0.4 and its IPv6 twin, on `pods`.
    pub pod: Host,
    /// What lets the far ends of XDP links see frames that come back by XDP_TX.
    _awake: Vec<OwnedFd>,
}

impl Live {
    /// Gives the far ends of the rig's links to two hosts and attaches the program. Where not `resolved`, the edge
    /// has to find its neighbours first.
    ///
    /// # Errors
    /// Where a link, a setting or the attachment is refused.
    pub fn new(rig: &mut Rig, hook: Hook, resolved: bool) -> Result<Self> {
        let live = Self::without_program(hook, resolved)?;
        let wire = if hook == Hook::Xdp { Wire::Native } else { Wire::Tc };
        ["uplink", "pods"].into_iter().try_for_each(|interface| rig.ebpf.attach(interface, wire))?;
        Ok(live)
    }

    /// As [`Live::new`], with the program left to the caller.
    ///
    /// # Errors
    /// As [`Live::new`].
    pub fn without_program(hook: Hook, resolved: bool) -> Result<Self> {
        for interface in ["all", "uplink", "pods"] {
            sysctl(&format!("ipv4/conf/{interface}/accept_local"), "1")?;
            sysctl(&format!("ipv4/conf/{interface}/rp_filter"), "0")?;
        }
        if hook == Hook::Tc {
            // What the program left of an unfinished checksum is finished as it leaves, so that its receiver looks at it.
            for interface in ["uplink", "pods"] {
                run("ethtool", &format!("-K {interface} tx off"))?;
            }
        }
        let mut live = Self { client: Host::new()?, pod: Host::new()?, _awake: Vec::new() };
        let ends = [
            (&live.client, "uplink-peer", (CLIENT, CLIENT6), CLIENT_MAC, (VIP, VIP6)),
            (&live.pod, "pods-peer", (pod(0), pod6(0)), pod_mac(0), (SNAT, SNAT6)),
        ];
        let mut awake = Vec::new();
        for (host, link, address, host_mac, gateway) in ends {
            if hook == Hook::Xdp {
                // Native XDP sees frames as they are: sockets must finish their checksums and cut their segments
                // themselves, and the receiver of a redirected frame needs NAPI.
                run("ethtool", &format!("-K {link} tx off gro on"))?;
            }
            ip(&format!("link set {link} netns {}", host.id))?;
            host.run(move || {
                ip(&format!("link set {link} address {} up", mac(host_mac)))?;
                ip(&format!("address add {}/24 dev {link}", address.0))?;
                ip(&format!("address add {}/64 dev {link} nodad", address.1))?;
                ip(&format!("route add default via {}", gateway.0))?;
                ip(&format!("route add default via {}", gateway.1))
            })?;
            if hook == Hook::Xdp {
                awake.push(host.run(move || xdp_pass::listen(ifindex(link)?))?);
            }
        }
        live._awake = awake;
        if !resolved {
            for (interface, address) in [("uplink", CLIENT), ("pods", pod(0))] {
                ip(&format!("neigh del {address} dev {interface}"))?;
            }
        }
        Ok(live)
    }
}

/// Sends back what comes, until the other end has said all.
///
/// # Errors
/// Those of the connection.
pub fn echo_back(stream: &mut TcpStream) -> Result<()> {
    let mut buffer = vec![0; 65536];
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(()),
            n => stream.write_all(&buffer[..n])?,
        }
    }
}
