//! Capture of forwarded packets: what the daemon orders in [`super::Control`], and what goes before each packet's bytes.

/// Which form of a packet was captured.
pub mod side {
    /// As it came in.
    pub const BEFORE: u8 = 0;
    /// As it leaves.
    pub const AFTER: u8 = 1;
}

/// What stands before a packet's bytes in the capture's perf buffers. 32 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CaptureHeader {
    /// ns of CLOCK_MONOTONIC.
    pub time: u64,
    /// Bytes of the whole frame.
    pub length: u32,
    /// Bytes of it that follow.
    pub captured: u32,
    /// Interface it came in by.
    pub ifindex: u32,
    /// Service number.
    pub service: u32,
    /// Backend number.
    pub backend: u32,
    /// One of [`side`].
    pub side: u8,
    /// A [`crate::conntrack::Direction`] number.
    pub direction: u8,
    /// Zero.
    pub _pad: [u8; 2],
}

const _: () = assert!(size_of::<CaptureHeader>() == 32);

#[cfg(feature = "user")]
mod pod {
    #![allow(unsafe_code, reason = "aya::Pod is an unsafe marker; this is the one place that asserts it")]
    use super::*;
    // SAFETY: repr(C), integers only, explicit padding (asserted above), Copy and 'static.
    unsafe impl aya::Pod for CaptureHeader {}
}
