//! An XDP program that passes everything, for the far end of the edge's veth pair.
//!
//! XDP_TX out of a veth hands frames to its peer, but wakes the peer only where that has an XDP program itself
//! (`veth_xdp_flush`; GRO is enough for XDP_REDIRECT only). Without one, frames lie in the ring until something else
//! comes along: forwarding works, up to a second late.
#![allow(unsafe_code, reason = "bpf() has no safe wrapper that loads two instructions without an ELF object")]

use std::{
    ffi::CString,
    fs, io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::Path,
    process::Command,
};

use anyhow::{Context, Result};

use super::{exec, netns};

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_OBJ_PIN: libc::c_int = 6;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_PROG_TYPE_XDP: u32 = 6;
/// `BPF_XDP` of `enum bpf_attach_type`.
const BPF_XDP: u32 = 37;
/// `XDP_FLAGS_DRV_MODE`.
const DRIVER: u32 = 4;
/// `r0 = XDP_PASS; exit`
const INSTRUCTIONS: [u64; 2] = [0x0000_0002_0000_00b7, 0x0000_0000_0000_0095];

/// `union bpf_attr` as far as loading a program reads it (`include/uapi/linux/bpf.h`).
#[repr(C)]
#[derive(Default)]
struct Load {
    kind: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buffer: u64,
    kernel_version: u32,
    flags: u32,
}

/// `BPF_F_XDP_HAS_FRAGS` (5.18): a veth of more than a page of MTU takes no other program.
const HAS_FRAGS: u32 = 1 << 5;

/// `union bpf_attr` as far as making a link of XDP reads it.
#[repr(C)]
struct Link {
    program: u32,
    ifindex: u32,
    attach_type: u32,
    flags: u32,
}

/// `union bpf_attr` as far as pinning reads it.
#[repr(C)]
struct Pin {
    path: u64,
    descriptor: u32,
    flags: u32,
}

fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<libc::c_int> {
    // SAFETY: the kernel reads `size_of::<T>()` bytes of `attributes`, and the buffers its callers point to, all of
    // which outlive the call; it writes to none of them.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as libc::c_int) }
}

fn load() -> io::Result<OwnedFd> {
    let license = c"GPL";
    let attributes = Load {
        kind: BPF_PROG_TYPE_XDP,
        instruction_count: INSTRUCTIONS.len() as u32,
        instructions: INSTRUCTIONS.as_ptr() as u64,
        license: license.as_ptr() as u64,
        flags: HAS_FRAGS,
        ..Load::default()
    };
    // Kernels before 5.18 refuse the flag.
    let descriptor =
        bpf(BPF_PROG_LOAD, &attributes).or_else(|_| bpf(BPF_PROG_LOAD, &Load { flags: 0, ..attributes }))?;
    // SAFETY: the kernel has just given this descriptor to us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// Attaches the program to an interface of this thread's namespace, as long as the link lives.
///
/// # Errors
/// Where the kernel refuses.
pub(crate) fn listen(ifindex: u32) -> Result<OwnedFd> {
    let program = load().context("load an XDP program")?;
    let attributes =
        Link { program: program.as_raw_fd().cast_unsigned(), ifindex, attach_type: BPF_XDP, flags: DRIVER };
    let link = bpf(BPF_LINK_CREATE, &attributes).with_context(|| format!("attach XDP to interface {ifindex}"))?;
    // SAFETY: the kernel has just given this descriptor to us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(link) })
}

/// Attaches the program to an interface. `pin` is a path on bpffs that is used for the handing over and free again
/// afterwards.
///
/// # Errors
/// Where the kernel refuses, or bpffs is not mounted.
pub(super) fn attach(namespace: &str, interface: &str, pin: &Path) -> Result<()> {
    let program = load().context("load an XDP program")?;
    let path = CString::new(pin.to_string_lossy().into_owned()).context("path of the pin")?;
    let attributes = Pin { path: path.as_ptr() as u64, descriptor: program.as_raw_fd().cast_unsigned(), flags: 0 };
    bpf(BPF_OBJ_PIN, &attributes)
        .with_context(|| format!("pin {}: is bpffs mounted? `cargo xtask setup` does it", pin.display()))?;
    let mut command = Command::new(exec::program("ip", "iproute2")?);
    command.args(["link", "set", "dev", interface, "xdpdrv", "pinned"]).arg(pin);
    // Not `ip -n`, which hides the bpffs.
    netns::start_inside(&mut command, namespace, false)?;
    let attached = exec::run(&mut command);
    fs::remove_file(pin).with_context(|| format!("unpin {}", pin.display()))?;
    attached.map(|_| ())
}
