//! The packet under either hook. All pointer handling of the program is in this file and in those below it.
//!
//! A header is borrowed from the packet, so no reference into it outlives a helper that may move the data: those
//! helpers take the packet by `&mut`.
#![allow(unsafe_code, reason = "this is one of the two modules that may hold it")]

use core::arch::asm;

use aya_ebpf::helpers::generated;
use edge_common::maps::capture::CaptureHeader;
use network_types::{eth::EthHdr, ip::Ipv4Hdr, tcp::TcpHdr, udp::UdpHdr};

pub use route::{Query, Route};
pub use skb::SkbPacket;
pub use xdp::XdpPacket;

mod route;
mod skb;
mod xdp;

/// Headers that may be read and written in place.
///
/// # Safety
/// Every bit pattern is a valid value, and the alignment is at most 2, which is how the kernel lays frames out; what
/// uses the 2 stands at an even offset.
pub unsafe trait Header {}
// SAFETY: integers and byte arrays only; alignment asserted below.
unsafe impl Header for EthHdr {}
// SAFETY: as above.
unsafe impl Header for Ipv4Hdr {}
// SAFETY: as above.
unsafe impl Header for TcpHdr {}
// SAFETY: as above.
unsafe impl Header for UdpHdr {}
// SAFETY: as above.
unsafe impl<const N: usize> Header for [u8; N] {}
// SAFETY: as above, alignment 2.
unsafe impl<const N: usize> Header for [u16; N] {}

const _: () = {
    assert!(align_of::<EthHdr>() <= 2 && align_of::<Ipv4Hdr>() == 1);
    assert!(align_of::<TcpHdr>() == 1 && align_of::<UdpHdr>() == 1);
};

/// The 32 bits at `OFFSET` of a header, as loaded from the packet. One instruction, where the compiler, which knows of an
/// alignment of 2 at most, makes seven: the kernels of the machines that programs run on load from any address.
#[inline(always)]
pub fn word<const OFFSET: usize, T: Header>(header: &T) -> u32 {
    const { assert!(OFFSET + 4 <= size_of::<T>()) };
    let value: u64;
    // SAFETY: four bytes inside the header, which the verifier checks too; changes nothing.
    unsafe {
        asm!(
            "{value} = *(u32 *)({header} + {offset})",
            value = out(reg) value,
            header = in(reg) header,
            offset = const OFFSET,
            options(pure, readonly, nostack, preserves_flags)
        );
    }
    value as u32
}

/// Writes the 32 bits at `OFFSET` of a header; see [`word`].
#[inline(always)]
pub fn set_word<const OFFSET: usize, T: Header>(header: &mut T, value: u32) {
    const { assert!(OFFSET + 4 <= size_of::<T>()) };
    // SAFETY: as in `word`; any bits are a valid header.
    unsafe {
        asm!(
            "*(u32 *)({header} + {offset}) = {value}",
            header = in(reg) header,
            value = in(reg) u64::from(value),
            offset = const OFFSET,
            options(nostack, preserves_flags)
        );
    }
}

/// A checksum field of layer 4 and how it changes.
#[derive(Clone, Copy)]
pub struct L4Fix {
    /// Offset of the field from the start of the frame.
    pub offset: usize,
    /// Difference that the pseudo-header's addresses make.
    pub addresses: u16,
    /// Difference that the ports make.
    pub ports: u16,
    /// The pseudo-header's sum as the packet came (`Parsed::pseudo_header`).
    pub pseudo_header: u16,
    /// UDP, where zero means "no checksum".
    pub udp: bool,
    /// IPv6, whose header has no checksum that changes with the addresses.
    pub v6: bool,
}

/// A packet at one of the hooks, from its Ethernet header on.
pub trait Packet {
    /// True where every interface can take redirected packets from this hook.
    const REDIRECTS_ANYWHERE: bool;

    /// The hook's element of `maps::stages::handover`.
    const HOOK: u32;

    /// The interface it came in by.
    fn ingress(&self) -> u32;

    /// True where a VLAN tag was taken off the frame before the program ran, so that the frame does not show it.
    fn has_hidden_tag(&self) -> bool;

    /// The tag of [`Packet::has_hidden_tag`]: Ethernet type and tag control information, host order; 0: none.
    fn hidden_tag(&self) -> u32;

    /// Takes one or two tags off the frame, the hidden one first; false where the kernel refuses it.
    fn pop_tags(&mut self, two: bool) -> bool;

    /// Puts tags on the frame, the first of them outermost, 0 being none; false where the kernel refuses it.
    fn push_tags(&mut self, tags: [u32; 2]) -> bool;

    /// Bytes in the whole frame, in fragments too.
    fn frame_len(&self) -> usize;

    /// True where the frame has at least so many bytes, in fragments too.
    #[inline(always)]
    fn holds(&self, len: usize) -> bool {
        len <= self.frame_len()
    }

    /// True where [`Packet::header`] reads the first `len` bytes (or all, where there are fewer).
    fn has_in_place(&self, len: usize) -> bool;

    /// Makes the first `len` bytes (or all, where there are fewer) readable by [`Packet::header`].
    fn pull(&mut self, len: usize);

    /// As [`Packet::pull`], for use beside [`Packet::header_anew`].
    fn pull_anew(&mut self, len: usize);

    /// The longest piece this packet leaves in, from the IP header on: itself, or a segment of a GSO packet.
    fn segment_len(&self, total_len: usize, headers: usize) -> usize;

    /// A header at `offset`, if the packet is that long.
    fn header<T: Header>(&mut self, offset: usize) -> Option<&mut T>;

    /// As [`Packet::header`], where headers at several variable offsets are touched in turn. The compiler then does not keep
    /// the packet's start in a 32-bit register, as which the kernel declares it, and from which the verifier takes none.
    fn header_anew<T: Header>(&mut self, offset: usize) -> Option<&mut T>;

    /// Applies a difference to a layer-4 checksum; false where the packet is too short.
    fn fix_l4(&mut self, fix: L4Fix) -> bool;

    /// Gives a copy of the packet's beginning to `edge-ctl capture`.
    fn capture(&self, header: &CaptureHeader);

    /// Cuts the packet to `keep` bytes from its IP header on and makes room for `front` bytes before that; the Ethernet
    /// header and the new bytes hold anything. False where the packet cannot be changed so; it is then to be dropped.
    fn quote(&mut self, front: usize, keep: usize) -> bool;

    /// True where the layer-4 checksum field at `offset` holds the pseudo-header's sum only, and whoever sends the packet
    /// finishes it.
    fn has_unfinished_checksum(&mut self, offset: usize) -> bool;

    /// Tells a sum that the NIC took over the whole packet about bytes that add up to `sum`, put where zeroes were.
    fn add_to_sum(&mut self, sum: u16);

    /// Asks the kernel's FIB; the answer overwrites the question. 0: found; above: why not, as the kernel's
    /// `BPF_FIB_LKUP_RET_*`; below: an errno.
    fn route(&mut self, query: &mut Route) -> i64;

    /// Ends this program and starts a stage; returns only where the stage's slot is empty.
    fn enter(&mut self, stage: u32);
}

/// `size_of::<T>()` bytes at `data + offset`, if they end at or before `end`.
#[inline(always)]
fn at<'a, T: Header>(data: usize, end: usize, offset: usize) -> Option<&'a mut T> {
    if data + offset + size_of::<T>() > end {
        return None;
    }
    // SAFETY: in bounds (just checked, and the verifier insists on it), aligned, any bits valid (Header);
    // the callers tie the lifetime to the packet, of which there is one per program run.
    Some(unsafe { &mut *((data + offset) as *mut T) })
}

/// A field of the context, which the compiler must not merge with another reading of it.
///
/// # Safety
/// `field` is one of a valid context's.
#[inline(always)]
unsafe fn read(field: *const u32) -> usize {
    // SAFETY: the caller's promise.
    unsafe { field.read_volatile() as usize }
}

/// Asks the kernel to send the packet out of `ifindex` once the program returns this action.
#[inline(always)]
pub fn redirect(ifindex: u32) -> i64 {
    // SAFETY: takes integers only; a wrong ifindex makes the kernel drop the packet.
    unsafe { generated::bpf_redirect(ifindex, 0) }
}
