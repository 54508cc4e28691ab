//! The packet at XDP.

use aya_ebpf::{
    bindings::{bpf_fib_lookup, xdp_md},
    helpers::generated,
    programs::XdpContext,
};
use edge_common::{
    checksum::{add, apply, apply_udp},
    maps::capture::CaptureHeader,
};
use network_types::eth::EthHdr;

use super::{Header, L4Fix, Packet, Route, at, read};
use crate::maps;

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
    fn has_in_place(&self, _len: usize) -> bool {
        true
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

/// Bytes of a VLAN tag.
const TAG: i32 = 4;
