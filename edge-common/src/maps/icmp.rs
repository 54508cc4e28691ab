//! Layouts for ICMP messages of our own.

/// The addresses that the edge has towards an interface, each as network-order words; zero: none. 32 bytes, alignment 4.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OwnAddresses {
    /// IPv4, mapped (`::ffff:a.b.c.d`).
    pub v4: [u32; 4],
    /// IPv6.
    pub v6: [u32; 4],
}

const _: () = assert!(size_of::<OwnAddresses>() == 32 && align_of::<OwnAddresses>() == 4);
