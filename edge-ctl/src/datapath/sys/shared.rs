//! A map of the kernel's in this process's memory: what programs and this process change at the same time, without a system call.
#![allow(unsafe_code, reason = "mmap(2) and what lies behind it; each block names the fact that makes it sound")]

use std::{
    io,
    mem::size_of,
    os::fd::{AsRawFd as _, BorrowedFd},
    ptr::NonNull,
    sync::atomic::{AtomicU32, AtomicU64},
};

use aya::Pod;

/// An array map that was made to be mapped (`BPF_F_MMAPABLE`, kernel 5.5), element after element.
#[derive(Debug)]
pub struct SharedArray {
    address: NonNull<u8>,
    bytes: usize,
    write: bool,
}

// SAFETY: the memory is the kernel's and stays until it is unmapped, whichever thread looks at it; every access goes through
// atomics or a volatile copy.
unsafe impl Send for SharedArray {}
// SAFETY: as above.
unsafe impl Sync for SharedArray {}

impl SharedArray {
    /// Maps the first `bytes` bytes of an array map's elements, for reading and, where `write` says so, writing.
    ///
    /// # Errors
    /// Those of mmap(2); a map that was not made for it is refused.
    pub fn new(map: BorrowedFd<'_>, bytes: usize, write: bool) -> io::Result<Self> {
        let access = if write { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
        // SAFETY: asks for a new mapping anywhere; the descriptor is open, and the kernel checks length and permissions.
        let address = unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, libc::MAP_SHARED, map.as_raw_fd(), 0) };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let address = NonNull::new(address.cast()).ok_or_else(|| io::Error::other("mapped at address zero"))?;
        Ok(Self { address, bytes, write })
    }

    /// An aligned 32-bit word, to be changed; `None` beyond the end, or where it is not aligned or only to be read.
    pub fn word(&self, offset: usize) -> Option<&AtomicU32> {
        if !self.write {
            return None;
        }
        // SAFETY: inside the mapping and aligned (checked by `at`); both sides access it as a whole.
        self.at::<AtomicU32>(offset).map(|word| unsafe { &*word })
    }

    /// As [`SharedArray::word`], of 64 bits.
    pub fn long(&self, offset: usize) -> Option<&AtomicU64> {
        if !self.write {
            return None;
        }
        // SAFETY: as in `word`.
        self.at::<AtomicU64>(offset).map(|word| unsafe { &*word })
    }

    /// A copy of a plain value. A program may be writing it: each field is of one moment, and two need not be of the same.
    pub fn read<T: Pod>(&self, offset: usize) -> Option<T> {
        // SAFETY: inside the mapping and aligned; every bit pattern is a valid `Pod`.
        self.at::<T>(offset).map(|value| unsafe { value.read_volatile() })
    }

    /// Overwrites a plain value that no program uses meanwhile.
    pub fn write<T: Pod>(&self, offset: usize, value: T) {
        if let Some(place) = self.at::<T>(offset).filter(|_| self.write) {
            // SAFETY: as in `read`.
            unsafe { place.write_volatile(value) }
        }
    }

    fn at<T>(&self, offset: usize) -> Option<*mut T> {
        let end = offset.checked_add(size_of::<T>())?;
        if end > self.bytes || !offset.is_multiple_of(align_of::<T>()) {
            return None;
        }
        // SAFETY: below the end of the mapping.
        Some(unsafe { self.address.as_ptr().add(offset).cast() })
    }
}

impl Drop for SharedArray {
    fn drop(&mut self) {
        // SAFETY: our own mapping, which nothing borrowed from outlives.
        unsafe { libc::munmap(self.address.as_ptr().cast(), self.bytes) };
    }
}

/// Returns once every program that was running when it was called has returned.
///
/// # Errors
/// Where the kernel lacks membarrier(2).
pub fn wait_for_programs() -> io::Result<()> {
    /// `MEMBARRIER_CMD_GLOBAL`: synchronize_rcu() (kernel/sched/membarrier.c), and programs run in RCU read sections.
    const GLOBAL: libc::c_int = 1;
    // SAFETY: takes integers only.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, GLOBAL, 0, 0) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
