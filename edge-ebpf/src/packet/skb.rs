//! The packet at TC.

use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, bpf_fib_lookup},
    helpers::generated,
    programs::TcContext,
};
use edge_common::{
    checksum::{add, apply, apply_udp, is_same_sum},
    maps::capture::CaptureHeader,
};
use network_types::eth::EthHdr;

use super::{Header, L4Fix, Packet, Route, at, read};
use crate::maps;

/// A packet at TC.
pub struct SkbPacket {
    ctx: *mut __sk_buff,
}

impl SkbPacket {
    /// The packet of this program run.
    #[inline(always)]
    pub fn new(ctx: &TcContext) -> Self {
        Self { ctx: ctx.skb.skb }
    }
}

impl SkbPacket {
    /// As [`Packet::fix_l4`], whatever the field holds: the kernel knows whether it is whole, partial (of the pseudo-header only,
    /// so without ports) or whether `skb->csum` has the whole packet's. From 0 and size 0 mean that what follows is a difference.
    #[inline(always)]
    fn fix_unknown(&mut self, fix: &L4Fix) -> bool {
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
    fn has_in_place(&self, len: usize) -> bool {
        let whole = self.frame_len();
        let len = if len < whole { len } else { whole };
        // SAFETY: as in `ingress`.
        let linear = unsafe { (*self.ctx).data_end as usize - (*self.ctx).data as usize };
        linear >= len
    }

    #[inline(always)]
    fn pull(&mut self, len: usize) {
        if !self.has_in_place(len) {
            let whole = self.frame_len();
            let len = if len < whole { len } else { whole };
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

    /// In place, as at XDP, where the field is surely whole: two calls for it take longer than all else that a packet is put
    /// through. A field of which only the pseudo-header has been summed up (CHECKSUM_PARTIAL) holds that sum, or what finishes it
    /// would come to a wrong one; of segments it is left to the kernel in any case, since who cuts them may sum up anew.
    #[inline(always)]
    fn fix_l4(&mut self, fix: L4Fix) -> bool {
        // SAFETY: as in `ingress`.
        if unsafe { (*self.ctx).gso_size } != 0 {
            return self.fix_unknown(&fix);
        }
        let Some([field]) = self.header::<[u16; 1]>(fix.offset) else {
            return false;
        };
        let check = *field;
        if is_same_sum(check, fix.pseudo_header) {
            return self.fix_unknown(&fix);
        }
        let delta = add(fix.addresses, fix.ports);
        *field = if fix.udp { apply_udp(check, delta) } else { apply(check, delta) };
        // The NIC may have summed up the whole packet (CHECKSUM_COMPLETE). In that, what changed cancels out with this field but for
        // IPv4 addresses, which do so with their own header's already; and but for a field that stays.
        if fix.udp && check == 0 {
            self.add_to_sum(fix.ports);
        } else if !fix.v6 && fix.addresses != 0 {
            self.add_to_sum(!fix.addresses);
        }
        true
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

/// `BPF_ADJ_ROOM_MAC`: room between the link-layer and the IP header.
const BPF_ADJ_ROOM_MAC: u32 = 1;

/// `bpf_l4_csum_replace`: the addresses are IPv6 ones, so that their change and the checksum's cancel out in the sum of
/// the whole packet (kernel 6.16).
const BPF_F_IPV6: u64 = 1 << 7;
