//! The address prefilter: two bitmaps that tell traffic which cannot be ours from traffic that may be, before
//! any hash lookup. One multiplicative hash; false positives only cost the lookups that follow.

/// Bits in each of the two bitmaps.
pub const BITS: usize = 1 << 16;
/// 64-bit words in each of the two bitmaps.
pub const WORDS: usize = BITS / 64;

/// The bit that stands for an IPv4 address (network order as read from the packet), below [`BITS`].
#[inline(always)]
pub const fn bit(address: u32) -> u32 {
    address.wrapping_mul(0x9e37_79b1) >> 16
}

/// The bit that stands for an IPv6 address (words in network order as read from the packet), below [`BITS`]: a
/// multilinear sum, so that addresses which differ in one word only are told apart as well as IPv4 ones.
#[inline(always)]
pub const fn bit_v6(address: [u32; 4]) -> u32 {
    address[0]
        .wrapping_mul(0x85eb_ca6b)
        .wrapping_add(address[1].wrapping_mul(0xc2b2_ae35))
        .wrapping_add(address[2].wrapping_mul(0x27d4_eb2f))
        .wrapping_add(address[3].wrapping_mul(0x9e37_79b1))
        >> 16
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;

    #[test]
    fn the_addresses_of_a_subnet_rarely_share_a_bit() {
        // 2001:db8::/64 with interface identifiers that count up, and with ones that count in their upper half.
        for word in [2, 3] {
            let mut seen = std::collections::HashSet::new();
            for host in 0..4096_u32 {
                let mut address = [u32::from_be(0x2001_0db8), 0, 0, 0];
                address[word] = host.to_be();
                seen.insert(bit_v6(address));
            }
            assert!(seen.len() > 3800, "word {word}: {} of 4096", seen.len());
        }
    }
}
