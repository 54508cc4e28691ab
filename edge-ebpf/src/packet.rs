//! The packet under either hook. All pointer handling of the program is in this file.
//!
//! A header is borrowed from the packet, so no reference into it outlives a helper that may move the data: those
//! helpers take the packet by `&mut`.
#![allow(unsafe_code, reason = "this is one of the two modules that may hold it")]

use core::arch::asm;

use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, bpf_fib_lookup, xdp_md},
    helpers::generated,
    programs::{TcContext, XdpContext},
};
use edge_common::{
    address::{Address, Wide, mapped},
    maps::capture::CaptureHeader,
};
use network_types::{eth::EthHdr, ip::Ipv4Hdr, tcp::TcpHdr, udp::UdpHdr};

use crate::maps;

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
    /// UDP, where zero means "no checksum".
    pub udp: bool,
    /// IPv6, whose header has no checksum that changes with the addresses.
    pub v6: bool,
}

/// A question to the kernel's FIB, and then its answer.
#[repr(transparent)]
pub struct Route(pub bpf_fib_lookup);

/// A packet at one of the hooks, from its Ethernet header on.
pub trait Packet {
    /// True where every interface can take redirected packets from this hook.
    const REDIRECTS_ANYWHERE: bool;

    /// The hook's element of [`maps::stages::handover`].
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

/// A packet at XDP.
pub struct XdpPacket {
    ctx: *mut xdp_md,
}

impl XdpPacket {
    /// The packet of this program run.
    #[inline(always)]
    pub fn new(ctx: &XdpContext) -> Self {
        Self { ctx: ctx.ctx }
    }
}

/// A packet at TC.
pub struct SkbPacket {
    ctx: *mut __sk_buff,
}

impl XdpPacket {
    /// Bytes in the first buffer, which is all of most packets.
    #[inline(always)]
    fn first_buffer(&self) -> usize {
        // SAFETY: the kernel hands a valid context to the program run this value lives in.
        unsafe { (*self.ctx).data_end as usize - (*self.ctx).data as usize }
    }
}

/// Bytes in all buffers of a packet. Kernels before 5.18 lack the helper and have no second buffer: for them the loader
/// writes 0 in place of the call.
#[inline(never)]
fn buffers(ctx: *mut xdp_md) -> usize {
    // SAFETY: valid context; the helper takes nothing else.
    unsafe { generated::bpf_xdp_get_buff_len(ctx) as usize }
}

impl SkbPacket {
    /// The packet of this program run.
    #[inline(always)]
    pub fn new(ctx: &TcContext) -> Self {
        Self { ctx: ctx.skb.skb }
    }
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

impl Packet for XdpPacket {
    const REDIRECTS_ANYWHERE: bool = false;
    const HOOK: u32 = maps::stages::XDP;

    #[inline(always)]
    fn ingress(&self) -> u32 {
        // SAFETY: the kernel hands a valid context to the program run this value lives in.
        unsafe { (*self.ctx).ingress_ifindex }
    }

    #[inline(always)]
    fn has_hidden_tag(&self) -> bool {
        false
    }

    #[inline(always)]
    fn hidden_tag(&self) -> u32 {
        0
    }

    #[inline(always)]
    fn pop_tags(&mut self, two: bool) -> bool {
        let Some(addresses) = self.header_anew::<[u16; 6]>(0).map(|addresses| *addresses) else {
            return false;
        };
        // SAFETY: valid context; the kernel checks the amount.
        if unsafe { generated::bpf_xdp_adjust_head(self.ctx, if two { 2 * TAG } else { TAG }) } != 0 {
            return false;
        }
        let Some(room) = self.header_anew::<[u16; 6]>(0) else {
            return false;
        };
        *room = addresses;
        true
    }

    #[inline(always)]
    fn push_tags(&mut self, tags: [u32; 2]) -> bool {
        let [outer, inner] = tags;
        let Some(addresses) = self.header_anew::<[u16; 6]>(0).map(|addresses| *addresses) else {
            return false;
        };
        // SAFETY: as in `pop_tags`.
        if unsafe { generated::bpf_xdp_adjust_head(self.ctx, if inner != 0 { -2 * TAG } else { -TAG }) } != 0 {
            return false;
        }
        let [a, b, c, d, e, f] = addresses;
        let Some(room) = self.header_anew::<[u16; 8]>(0) else {
            return false;
        };
        *room = [a, b, c, d, e, f, ((outer >> 16) as u16).to_be(), (outer as u16).to_be()];
        if inner == 0 {
            return true;
        }
        let Some(room) = self.header_anew::<[u16; 2]>(16) else {
            return false;
        };
        *room = [((inner >> 16) as u16).to_be(), (inner as u16).to_be()];
        true
    }

    #[inline(always)]
    fn frame_len(&self) -> usize {
        let (first, whole) = (self.first_buffer(), buffers(self.ctx));
        if whole > first { whole } else { first }
    }

    /// Nearly every packet lies in one buffer, and asks the kernel nothing.
    #[inline(always)]
    fn holds(&self, len: usize) -> bool {
        len <= self.first_buffer() || len <= buffers(self.ctx)
    }

    #[inline(always)]
    fn pull(&mut self, _len: usize) {}

    #[inline(always)]
    fn pull_anew(&mut self, _len: usize) {}

    #[inline(always)]
    fn segment_len(&self, total_len: usize, _headers: usize) -> usize {
        total_len
    }

    #[inline(always)]
    fn header<T: Header>(&mut self, offset: usize) -> Option<&mut T> {
        // SAFETY: as in `ingress`.
        let (data, end) = unsafe { ((*self.ctx).data as usize, (*self.ctx).data_end as usize) };
        at(data, end, offset)
    }

    #[inline(always)]
    fn header_anew<T: Header>(&mut self, offset: usize) -> Option<&mut T> {
        // SAFETY: as in `ingress`; both fields are aligned u32 of the context.
        let (data, end) = unsafe { (read(&raw const (*self.ctx).data), read(&raw const (*self.ctx).data_end)) };
        at(data, end, offset)
    }

    #[inline(always)]
    fn fix_l4(&mut self, fix: L4Fix) -> bool {
        use edge_common::checksum::{add, apply, apply_udp};
        let Some([field]) = self.header::<[u16; 1]>(fix.offset) else {
            return false;
        };
        let check = *field;
        let delta = add(fix.addresses, fix.ports);
        let check = if fix.udp { apply_udp(check, delta) } else { apply(check, delta) };
        *field = check;
        true
    }

    #[inline(always)]
    fn enter(&mut self, stage: u32) {
        maps::stages::enter_xdp(&XdpContext::new(self.ctx), stage);
    }

    #[inline(always)]
    fn capture(&self, header: &CaptureHeader) {
        maps::capture::put(&XdpContext::new(self.ctx), header);
    }

    #[inline(always)]
    fn quote(&mut self, front: usize, keep: usize) -> bool {
        // Hidden from the compiler, which would subtract the two pointers as the 32 bits that are needed of the result.
        let len = core::hint::black_box(self.frame_len());
        let cut = (EthHdr::LEN + keep) as i64 - len as i64;
        // SAFETY: valid context; the kernel checks both amounts.
        unsafe {
            generated::bpf_xdp_adjust_tail(self.ctx, cut as i32) == 0
                && generated::bpf_xdp_adjust_head(self.ctx, -(front as i32)) == 0
        }
    }

    #[inline(always)]
    fn has_unfinished_checksum(&mut self, _offset: usize) -> bool {
        false
    }

    #[inline(always)]
    fn add_to_sum(&mut self, _sum: u16) {}

    #[inline(always)]
    fn route(&mut self, query: &mut Route) -> i64 {
        // SAFETY: valid context; the kernel writes at most the size given.
        unsafe { generated::bpf_fib_lookup(self.ctx.cast(), &raw mut query.0, size_of::<bpf_fib_lookup>() as i32, 0) }
    }
}

impl Packet for SkbPacket {
    #[inline(always)]
    fn enter(&mut self, stage: u32) {
        maps::stages::enter_tc(&TcContext::new(self.ctx), stage);
    }

    const REDIRECTS_ANYWHERE: bool = true;
    const HOOK: u32 = maps::stages::TC;

    #[inline(always)]
    fn ingress(&self) -> u32 {
        // SAFETY: the kernel hands a valid context to the program run this value lives in.
        unsafe { (*self.ctx).ifindex }
    }

    #[inline(always)]
    fn has_hidden_tag(&self) -> bool {
        // SAFETY: as in `ingress`.
        unsafe { (*self.ctx).vlan_present != 0 }
    }

    #[inline(always)]
    fn hidden_tag(&self) -> u32 {
        if !self.has_hidden_tag() {
            return 0;
        }
        // SAFETY: as in `ingress`.
        let (kind, tag) = unsafe { ((*self.ctx).vlan_proto, (*self.ctx).vlan_tci) };
        u32::from(u16::from_be(kind as u16)) << 16 | tag & 0xffff
    }

    #[inline(always)]
    fn pop_tags(&mut self, two: bool) -> bool {
        // SAFETY: valid context.
        unsafe { generated::bpf_skb_vlan_pop(self.ctx) == 0 && (!two || generated::bpf_skb_vlan_pop(self.ctx) == 0) }
    }

    #[inline(always)]
    fn push_tags(&mut self, tags: [u32; 2]) -> bool {
        let [outer, inner] = tags;
        let push = |tag: u32| {
            // SAFETY: valid context.
            unsafe { generated::bpf_skb_vlan_push(self.ctx, ((tag >> 16) as u16).to_be(), tag as u16) == 0 }
        };
        (inner == 0 || push(inner)) && push(outer)
    }

    #[inline(always)]
    fn frame_len(&self) -> usize {
        // SAFETY: as in `ingress`.
        unsafe { (*self.ctx).len as usize }
    }

    #[inline(always)]
    fn pull(&mut self, len: usize) {
        let whole = self.frame_len();
        let len = if len < whole { len } else { whole };
        // SAFETY: as in `ingress`.
        let linear = unsafe { (*self.ctx).data_end as usize - (*self.ctx).data as usize };
        if linear < len {
            // SAFETY: valid context. A failure leaves the packet as it was, and `header` then finds it too short.
            unsafe { generated::bpf_skb_pull_data(self.ctx, len as u32) };
        }
    }

    #[inline(always)]
    fn pull_anew(&mut self, len: usize) {
        let whole = self.frame_len();
        let len = if len < whole { len } else { whole };
        // SAFETY: as in `ingress`; both fields are aligned u32 of the context.
        let (data, end) = unsafe { (read(&raw const (*self.ctx).data), read(&raw const (*self.ctx).data_end)) };
        if end - data < len {
            // SAFETY: as in `pull`.
            unsafe { generated::bpf_skb_pull_data(self.ctx, len as u32) };
        }
    }

    #[inline(always)]
    fn segment_len(&self, total_len: usize, headers: usize) -> usize {
        // SAFETY: as in `ingress`.
        let segment = unsafe { (*self.ctx).gso_size as usize };
        if segment == 0 { total_len } else { segment + headers }
    }

    #[inline(always)]
    fn header<T: Header>(&mut self, offset: usize) -> Option<&mut T> {
        // SAFETY: as in `ingress`.
        let (data, end) = unsafe { ((*self.ctx).data as usize, (*self.ctx).data_end as usize) };
        at(data, end, offset)
    }

    #[inline(always)]
    fn header_anew<T: Header>(&mut self, offset: usize) -> Option<&mut T> {
        // SAFETY: as in `ingress`; both fields are aligned u32 of the context.
        let (data, end) = unsafe { (read(&raw const (*self.ctx).data), read(&raw const (*self.ctx).data_end)) };
        at(data, end, offset)
    }

    #[inline(always)]
    fn fix_l4(&mut self, fix: L4Fix) -> bool {
        // The kernel knows whether the field is whole, partial (pseudo-header only, so no ports) or summed up in
        // skb->csum; from = 0 and size = 0 mean "to is a difference".
        let mangled = if fix.udp { BPF_F_MARK_MANGLED_0 } else { 0 };
        let pseudo = u64::from(BPF_F_PSEUDO_HDR | mangled);
        let offset = fix.offset as u32;
        let addresses = |flags| {
            // SAFETY: valid context; the kernel checks the offset.
            unsafe { generated::bpf_l4_csum_replace(self.ctx, offset, 0, u64::from(fix.addresses), flags) == 0 }
        };
        // Kernels that do not know the flag (before 6.16) refuse it, and keep a wrong sum of the whole packet where the
        // driver summed it up (CHECKSUM_COMPLETE), which only a receiver on this host would look at.
        if !(fix.v6 && addresses(pseudo | BPF_F_IPV6) || addresses(pseudo)) {
            return false;
        }
        // SAFETY: as above.
        unsafe { generated::bpf_l4_csum_replace(self.ctx, offset, 0, u64::from(fix.ports), u64::from(mangled)) == 0 }
    }

    #[inline(always)]
    fn capture(&self, header: &CaptureHeader) {
        maps::capture::put(&TcContext::new(self.ctx), header);
    }

    #[inline(always)]
    fn quote(&mut self, front: usize, keep: usize) -> bool {
        let flags = 0;
        // SAFETY: valid context; the kernel checks both amounts. Cutting first ends segmentation, which the second helper
        // would refuse for UDP.
        let moved = unsafe {
            generated::bpf_skb_change_tail(self.ctx, (EthHdr::LEN + keep) as u32, flags) == 0
                && generated::bpf_skb_adjust_room(self.ctx, front as i32, BPF_ADJ_ROOM_MAC, flags) == 0
        };
        if moved {
            self.pull(EthHdr::LEN + front + keep);
        }
        moved
    }

    #[inline(always)]
    fn has_unfinished_checksum(&mut self, offset: usize) -> bool {
        let Some(field) = self.header_anew::<[u8; 2]>(offset) else {
            return false;
        };
        let before = *field;
        // A change that is not the pseudo-header's is not for an unfinished field (inet_proto_csum_replace4).
        // SAFETY: valid context; the kernel checks the offset.
        let asked = unsafe { generated::bpf_l4_csum_replace(self.ctx, offset as u32, 0, 1, 0) } == 0;
        let Some(field) = self.header_anew::<[u8; 2]>(offset) else {
            return false;
        };
        let unfinished = asked && *field == before;
        *field = before;
        unfinished
    }

    #[inline(always)]
    fn add_to_sum(&mut self, sum: u16) {
        // SAFETY: valid context. Refused where there is no such sum, which is as well.
        unsafe { generated::bpf_csum_update(self.ctx, u32::from(sum)) };
    }

    #[inline(always)]
    fn route(&mut self, query: &mut Route) -> i64 {
        // SAFETY: valid context; the kernel writes at most the size given.
        unsafe { generated::bpf_fib_lookup(self.ctx.cast(), &raw mut query.0, size_of::<bpf_fib_lookup>() as i32, 0) }
    }
}

/// Bytes of a VLAN tag.
const TAG: i32 = 4;

/// `BPF_ADJ_ROOM_MAC`: room between the link-layer and the IP header.
const BPF_ADJ_ROOM_MAC: u32 = 1;

/// Asks the kernel to send the packet out of `ifindex` once the program returns this action.
#[inline(always)]
pub fn redirect(ifindex: u32) -> i64 {
    // SAFETY: takes integers only; a wrong ifindex makes the kernel drop the packet.
    unsafe { generated::bpf_redirect(ifindex, 0) }
}

/// `bpf_l4_csum_replace`: the addresses are IPv6 ones, so that their change and the checksum's cancel out in the sum of
/// the whole packet (kernel 6.16).
const BPF_F_IPV6: u64 = 1 << 7;

/// A question to the FIB about a packet.
pub struct Query<A> {
    /// Translated source, network order.
    pub src: A,
    /// Translated destination, network order.
    pub dst: A,
    /// Translated source port, network order.
    pub src_port: u16,
    /// Translated destination port, network order.
    pub dst_port: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// Type of service, or traffic class.
    pub tos: u8,
    /// Interface the packet came in by.
    pub ingress: u32,
}

/// Length given to the FIB: non-zero, so that it reports the MTU; below any, so that it does not judge by it.
const PROBE_LEN: u16 = 20;

impl<A: Address> Query<A> {
    /// As the kernel wants it.
    #[inline(always)]
    pub fn encode(&self, route: &mut Route) {
        let query = &mut route.0;
        // In place, since a zeroed value would be made on the stack first.
        // SAFETY: plain integers, for which all zeroes are valid.
        unsafe { core::ptr::write_bytes(&raw mut *query, 0, 1) };
        query.l4_protocol = self.protocol;
        query.sport = self.src_port;
        query.dport = self.dst_port;
        query.ifindex = self.ingress;
        query.__bindgen_anon_1.tot_len = PROBE_LEN;
        let (src, dst) = (self.src.wide(), self.dst.wide());
        if A::V6 {
            query.family = AF_INET6;
            query.__bindgen_anon_2.flowinfo = (u32::from(self.tos) << 20).to_be();
            query.__bindgen_anon_3.ipv6_src = src;
            query.__bindgen_anon_4.ipv6_dst = dst;
        } else {
            query.family = AF_INET;
            query.__bindgen_anon_2.tos = self.tos;
            query.__bindgen_anon_3.ipv4_src = src[3];
            query.__bindgen_anon_4.ipv4_dst = dst[3];
        }
    }
}

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

impl Route {
    /// The neighbour's address, which need not be of the packet's family (RFC 8950).
    #[inline(always)]
    pub fn neighbour(&self) -> Wide {
        // SAFETY: any bits are valid integers, and the family says which member the kernel wrote.
        unsafe {
            if self.0.family == AF_INET {
                mapped(self.0.__bindgen_anon_4.ipv4_dst)
            } else {
                self.0.__bindgen_anon_4.ipv6_dst
            }
        }
    }

    /// The route's MTU, bytes from the IP header on.
    #[inline(always)]
    pub fn mtu(&self) -> u32 {
        // SAFETY: both members are a u16.
        u32::from(unsafe { self.0.__bindgen_anon_1.mtu_result })
    }
}
