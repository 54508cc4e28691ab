//! Incremental Internet checksum update (RFC 1624, equation 3), and the one rule about UDP's zero.
//!
//! A ones'-complement sum does not depend on byte order, so everything here works on 16-bit words loaded as they
//! stand in the packet; no value is ever swapped.

use crate::address::Address;

/// What a TTL decrement adds to the IPv4 header's sum: minus one in the high byte of its word.
pub const TTL_DECREMENT: u16 = !u16::from_ne_bytes([1, 0]);

/// What a hop limit decrement adds to the sum of an IPv6 packet: minus one in the low byte of its word.
pub const HOP_LIMIT_DECREMENT: u16 = !u16::from_ne_bytes([0, 1]);

/// Folds carries until 16 bits are left.
#[inline(always)]
pub const fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

/// Ones'-complement sum of two differences.
#[inline(always)]
pub const fn add(a: u16, b: u16) -> u16 {
    fold(a as u32 + b as u32)
}

/// New minus old, for one 32-bit field; unfolded, at most four 16-bit words.
#[inline(always)]
pub(crate) const fn difference(old: u32, new: u32) -> u32 {
    (!old & 0xffff) + (!old >> 16) + (new & 0xffff) + (new >> 16)
}

/// The difference that replacing both addresses makes. Addresses as loaded from the packet.
#[inline(always)]
pub fn address_delta<A: Address>(old_src: A, old_dst: A, new_src: A, new_dst: A) -> u16 {
    fold(A::difference(old_src, new_src) + A::difference(old_dst, new_dst))
}

/// The difference that replacing both ports makes. Ports as loaded from the packet.
#[inline(always)]
pub const fn port_delta(old_src: u16, old_dst: u16, new_src: u16, new_dst: u16) -> u16 {
    fold(!old_src as u32 + !old_dst as u32 + new_src as u32 + new_dst as u32)
}

/// The sum of a pseudo-header, folded. Addresses as loaded from the packet, `len` of the layer-4 header and what it carries in host
/// order.
#[inline(always)]
pub fn pseudo_header<A: Address>(src: A, dst: A, protocol: u8, len: u16) -> u16 {
    fold(src.sum() + dst.sum() + u32::from(u16::from(protocol).to_be()) + u32::from(len.to_be()))
}

/// True where two sums are the same number: all ones are another zero.
#[inline(always)]
pub const fn is_same_sum(a: u16, b: u16) -> bool {
    matches!(add(a, !b), 0 | 0xffff)
}

/// The checksum field after a change of `delta`: `~(~check + delta)`.
#[inline(always)]
pub const fn apply(check: u16, delta: u16) -> u16 {
    !add(!check, delta)
}

/// As [`apply`], for UDP: a zero field means "no checksum" and stays; a computed zero is sent as all ones (RFC 768).
#[inline(always)]
pub const fn apply_udp(check: u16, delta: u16) -> u16 {
    if check == 0 {
        return 0;
    }
    match apply(check, delta) {
        0 => 0xffff,
        check => check,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The checksum of `words` from scratch (RFC 1071), the thing an incremental update must agree with.
    fn full(words: &[u16]) -> u16 {
        let mut sum: u64 = words.iter().map(|word| u64::from(*word)).sum();
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !(sum as u16)
    }

    fn halves(value: u32) -> [u16; 2] {
        [value as u16, (value >> 16) as u16]
    }

    proptest! {
        #[test]
        fn an_incremental_update_equals_a_recomputation(
            old in any::<[u32; 2]>(), new in any::<[u32; 2]>(),
            old_ports in any::<[u16; 2]>(), new_ports in any::<[u16; 2]>(),
            // A real header holds at least one non-zero word (version, protocol), so its sum is never zero.
            rest in proptest::collection::vec(any::<u16>(), 0..40), protocol in 1u16..,
        ) {
            let sum = |addresses: [u32; 2], ports: [u16; 2]| {
                let mut words = rest.clone();
                words.push(protocol);
                for address in addresses { words.extend(halves(address)); }
                words.extend(ports);
                full(&words)
            };
            let delta = add(
                address_delta(old[0], old[1], new[0], new[1]),
                port_delta(old_ports[0], old_ports[1], new_ports[0], new_ports[1]),
            );
            prop_assert_eq!(apply(sum(old, old_ports), delta), sum(new, new_ports));
        }

        #[test]
        fn an_incremental_update_equals_a_recomputation_for_ipv6(
            old in any::<[[u32; 4]; 2]>(), new in any::<[[u32; 4]; 2]>(),
            rest in proptest::collection::vec(any::<u16>(), 0..40), protocol in 1u16..,
        ) {
            let sum = |addresses: [[u32; 4]; 2]| {
                let mut words = rest.clone();
                words.push(protocol);
                for word in addresses.as_flattened() { words.extend(halves(*word)); }
                full(&words)
            };
            prop_assert_eq!(apply(sum(old), address_delta(old[0], old[1], new[0], new[1])), sum(new));
        }

        #[test]
        fn the_reverse_delta_is_the_complement(old in any::<[u32; 2]>(), new in any::<[u32; 2]>(), check in 0u16..0xffff) {
            let there = address_delta(old[0], old[1], new[0], new[1]);
            prop_assert_eq!(apply(apply(check, there), !there), check);
        }

        #[test]
        fn a_ttl_decrement_equals_a_recomputation(ttl in 1u8.., protocol in any::<u8>(), rest in any::<[u16; 8]>()) {
            let sum = |ttl: u8| {
                let mut words = [0; 9];
                words[..8].copy_from_slice(&rest);
                words[8] = u16::from_ne_bytes([ttl, protocol]);
                full(&words)
            };
            prop_assume!(sum(ttl - 1) != 0xffff);
            prop_assert_eq!(apply(sum(ttl), TTL_DECREMENT), sum(ttl - 1));
        }

        #[test]
        fn a_pseudo_header_sums_to_what_finishes_an_empty_segment(
            src in any::<u32>(), dst in any::<u32>(), protocol in 1u8.., len in any::<u16>(),
        ) {
            let [src_words, dst_words] = [src, dst].map(halves);
            let words = [src_words, dst_words, [u16::from(protocol).to_be(), len.to_be()]];
            prop_assert!(is_same_sum(pseudo_header(src, dst, protocol, len), !full(words.as_flattened())));
        }

        #[test]
        fn sums_are_the_same_where_they_leave_the_same_remainder(a in any::<u16>(), b in any::<u16>()) {
            prop_assert_eq!(is_same_sum(a, b), a % 0xffff == b % 0xffff);
            prop_assert!(is_same_sum(a, a) && is_same_sum(0, 0xffff) && is_same_sum(0xffff, 0));
        }

        #[test]
        fn udp_never_turns_a_checksum_into_none(check in 1u16.., delta in any::<u16>()) {
            prop_assert_ne!(apply_udp(check, delta), 0);
            prop_assert_eq!(apply_udp(0, delta), 0);
        }
    }
}
