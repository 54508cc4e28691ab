//! What the kernel has of routes, as seen from beside the speaker.

use std::{
    fs,
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use rtnetlink::sys::{Socket, protocols::NETLINK_ROUTE};
use socket2::SockRef;

/// `RTNLGRP_IPV4_ROUTE`, `RTM_NEWROUTE`, `RTM_DELROUTE`, `RTA_DST` of linux/rtnetlink.h.
const GROUP: u32 = 7;
const NEW: u16 = 24;
const GONE: u16 = 25;
const DESTINATION: u16 = 1;
/// `struct nlmsghdr` and `struct rtmsg`.
const HEADER: usize = 16;
const ROUTE: usize = 12;
const BUFFER: usize = 4 << 20;

/// Routes of every table in the calling thread's namespace.
pub(super) fn count() -> Result<u64> {
    let path = "/proc/thread-self/net/fib_triestat";
    let text = fs::read_to_string(path).with_context(|| format!("read {path}"))?;
    let prefixes = text.lines().filter_map(|line| line.trim().strip_prefix("Prefixes:"));
    Ok(prefixes.filter_map(|number| number.trim().parse::<u64>().ok()).sum())
}

/// Notifications about routes.
pub(super) struct Watch(Socket);

impl Watch {
    /// Of the calling thread's namespace.
    pub fn new() -> Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        // As much as there may be without privileges.
        let _ = socket.set_rx_buf_sz(BUFFER);
        socket.add_membership(GROUP)?;
        SockRef::from(&socket).set_read_timeout(Some(Duration::from_secs(1)))?;
        Ok(Self(socket))
    }

    /// Waits until the route to a prefix has come (`there`) or gone; nanoseconds since `begun`.
    pub fn until(&self, prefix: (Ipv4Addr, u8), there: bool, begun: Instant, patience: Duration) -> Result<f64> {
        let mut buffer = Vec::with_capacity(1 << 16);
        while begun.elapsed() < patience {
            buffer.clear();
            match self.0.recv(&mut buffer, 0) {
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => continue,
                // What was lost is found by asking for the change again.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => bail!("route notifications were lost"),
                Err(error) => return Err(error).context("wait for a route notification"),
            }
            let now = begun.elapsed();
            let wanted = (if there { NEW } else { GONE }, prefix);
            if messages(&buffer).any(|message| message == wanted) {
                return Ok(now.as_nanos() as f64);
            }
        }
        let what = if there { "come" } else { "go" };
        ensure!(false, "the route to {}/{} did not {what} within {patience:?}", prefix.0, prefix.1);
        Ok(f64::NAN)
    }
}

/// Type and destination of every message in a buffer.
fn messages(mut bytes: &[u8]) -> impl Iterator<Item = (u16, (Ipv4Addr, u8))> {
    std::iter::from_fn(move || {
        loop {
            let length = u32::from_ne_bytes(*bytes.first_chunk()?) as usize;
            let message = bytes.get(..length).filter(|message| message.len() >= HEADER + ROUTE)?;
            bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
            let kind = u16::from_ne_bytes(*message.get(4..)?.first_chunk()?);
            let prefix_length = *message.get(HEADER + 1)?;
            if let Some(address) = destination(message.get(HEADER + ROUTE..)?) {
                return Some((kind, (address, prefix_length)));
            }
        }
    })
}

fn destination(mut attributes: &[u8]) -> Option<Ipv4Addr> {
    loop {
        let length = usize::from(u16::from_ne_bytes(*attributes.first_chunk()?));
        let kind = u16::from_ne_bytes(*attributes.get(2..)?.first_chunk()?);
        if kind == DESTINATION {
            return Some(Ipv4Addr::from(*attributes.get(4..)?.first_chunk::<4>()?));
        }
        attributes = attributes.get(length.max(4).next_multiple_of(4)..)?;
    }
}
