//! Questions to the kernel's FIB.

use aya_ebpf::bindings::bpf_fib_lookup;
use edge_common::address::{Address, Wide, mapped};

/// A question to the kernel's FIB, and then its answer.
#[repr(transparent)]
pub struct Route(pub bpf_fib_lookup);

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
