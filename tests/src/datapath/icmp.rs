//! ICMP messages built byte by byte, without any product code.

use std::net::IpAddr;

use super::frame::{checksum, pseudo};

/// IP protocol number of ICMPv6.
const ICMPV6: u8 = 58;

/// An ICMP message about a packet, before it becomes bytes.
#[derive(Clone, Debug)]
pub struct IcmpError {
    /// Destination MAC.
    pub dst_mac: [u8; 6],
    /// Source MAC.
    pub src_mac: [u8; 6],
    /// Who tells.
    pub src: IpAddr,
    /// Who is told, of the same family.
    pub dst: IpAddr,
    /// Time to live, or hop limit.
    pub ttl: u8,
    /// Type of service, or traffic class.
    pub tos: u8,
    /// IP ID; nothing of IPv6, as the next.
    pub id: u16,
    /// Flags and fragment offset.
    pub fragment: u16,
    /// IPv4 options of the message itself, a multiple of 4 bytes.
    pub options: Vec<u8>,
    /// IPv6 extension headers of the message itself: each its number and its bytes, the first of which is written here.
    pub extensions: Vec<(u8, Vec<u8>)>,
    /// ICMP type.
    pub kind: u8,
    /// ICMP code.
    pub code: u8,
    /// The second word: an MTU, a pointer, or nothing.
    pub rest: [u8; 4],
    /// The packet it is about, from its IP header on, as far as quoted.
    pub quote: Vec<u8>,
}

impl IcmpError {
    /// A message about `quote`.
    pub fn new(src: impl Into<IpAddr>, dst: impl Into<IpAddr>, kind: u8, code: u8, quote: &[u8]) -> Self {
        Self {
            dst_mac: [2, 0, 0, 0, 0, 1],
            src_mac: [2, 0, 0, 0, 0, 2],
            src: src.into(),
            dst: dst.into(),
            ttl: 64,
            tos: 0xc0,
            id: 0x1234,
            fragment: 0,
            options: Vec::new(),
            extensions: Vec::new(),
            kind,
            code,
            rest: [0; 4],
            quote: quote.to_vec(),
        }
    }

    /// As a router sends it on to the next hop with these MACs (destination, source).
    pub fn forwarded(self, macs: ([u8; 6], [u8; 6])) -> Self {
        Self { dst_mac: macs.0, src_mac: macs.1, ttl: self.ttl - 1, ..self }
    }

    /// The frame's bytes, all checksums right.
    pub fn bytes(&self) -> Vec<u8> {
        let mut icmp = vec![self.kind, self.code, 0, 0];
        icmp.extend(self.rest);
        icmp.extend(&self.quote);
        let covered = if self.src.is_ipv4() { Vec::new() } else { pseudo(self.src, self.dst, ICMPV6, icmp.len()) };
        let check = checksum(&[&covered, &icmp]);
        icmp[2..4].copy_from_slice(&check.to_be_bytes());
        let mut frame = Vec::new();
        frame.extend(self.dst_mac);
        frame.extend(self.src_mac);
        match (self.src, self.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => self.ipv4(&mut frame, &src.octets(), &dst.octets(), icmp.len()),
            (IpAddr::V6(src), IpAddr::V6(dst)) => self.ipv6(&mut frame, &src.octets(), &dst.octets(), icmp.len()),
            mixed => unreachable!("{mixed:?} of two families"),
        }
        frame.extend(icmp);
        frame
    }

    fn ipv4(&self, frame: &mut Vec<u8>, src: &[u8], dst: &[u8], icmp_len: usize) {
        frame.extend([0x08, 0x00]);
        let mut ip = vec![0x45 + (self.options.len() / 4) as u8, self.tos];
        ip.extend(((20 + self.options.len() + icmp_len) as u16).to_be_bytes());
        ip.extend(self.id.to_be_bytes());
        ip.extend(self.fragment.to_be_bytes());
        ip.extend([self.ttl, 1, 0, 0]);
        ip.extend(src);
        ip.extend(dst);
        ip.extend(&self.options);
        let check = checksum(&[&ip]);
        ip[10..12].copy_from_slice(&check.to_be_bytes());
        frame.extend(ip);
    }

    fn ipv6(&self, frame: &mut Vec<u8>, src: &[u8], dst: &[u8], icmp_len: usize) {
        let extensions: usize = self.extensions.iter().map(|(_, bytes)| bytes.len()).sum();
        frame.extend([0x86, 0xdd, 0x60 | self.tos >> 4, self.tos << 4, 0, 0]);
        frame.extend(((extensions + icmp_len) as u16).to_be_bytes());
        let numbers: Vec<u8> = self.extensions.iter().map(|(number, _)| *number).chain([ICMPV6]).collect();
        frame.extend([numbers[0], self.ttl]);
        frame.extend(src);
        frame.extend(dst);
        for ((_, bytes), next) in self.extensions.iter().zip(&numbers[1..]) {
            frame.push(*next);
            frame.extend(&bytes[1..]);
        }
    }
}
