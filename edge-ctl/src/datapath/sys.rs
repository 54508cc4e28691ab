//! The bpf() calls that aya 0.14 does not have: opening a pin read-only, reading maps in batches, and which interface a
//! link is attached to. Beside `bgp::socket` the one module of this crate that may hold `unsafe`.
#![allow(unsafe_code, reason = "raw bpf() calls; each names the fact that makes it sound")]

use std::{
    ffi::CString,
    io,
    mem::{MaybeUninit, size_of},
    os::{
        fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use aya::Pod;

pub mod shared;

const BPF_MAP_LOOKUP_ELEM: libc::c_long = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_MAP_GET_NEXT_KEY: libc::c_long = 4;
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_MAP_LOOKUP_BATCH: libc::c_long = 24;
const BPF_LINK_DETACH: libc::c_long = 34;
const BPF_F_RDONLY: u32 = 1 << 3;
/// `BPF_NOEXIST`: an element that is there stays as it is.
pub const NOEXIST: u64 = 1;
/// The kernel's own "operation not supported" (ENOTSUPP), which batch commands return for maps without them.
const ENOTSUPP: i32 = 524;
/// `BPF_LINK_TYPE_XDP` and `BPF_LINK_TYPE_TCX`.
const LINK_XDP: u32 = 6;
const LINK_TCX: u32 = 11;

#[repr(C)]
#[derive(Default)]
struct ObjGetAttr {
    path: u64,
    fd: u32,
    file_flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct ElementAttr {
    map_fd: u32,
    _pad: u32,
    key: u64,
    value_or_next_key: u64,
    flags: u64,
}

#[repr(C)]
#[derive(Default)]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

#[repr(C)]
#[derive(Default)]
struct InfoAttr {
    fd: u32,
    length: u32,
    info: u64,
}

/// The head of `struct bpf_link_info` and, for XDP and tcx alike, the interface index that follows it.
#[repr(C)]
#[derive(Default)]
struct RawLinkInfo {
    kind: u32,
    id: u32,
    program: u32,
    _pad: u32,
    ifindex: u32,
    attach_type: u32,
    _rest: [u64; 8],
}

/// What a link is attached to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkTarget {
    /// Kernel id of the link.
    pub id: u32,
    /// Kernel id of the program.
    pub program: u32,
    /// Interface; 0 where it is gone.
    pub ifindex: u32,
    /// True for XDP, false for tcx.
    pub xdp: bool,
}

fn bpf<T>(command: libc::c_long, attr: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: `attr` is a live, initialized `repr(C)` prefix of `union bpf_attr` of exactly the length passed; the
    // pointers in it were made by the callers below from buffers that live across the call and have the sizes that
    // the kernel derives from the map or the command.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn raw(fd: RawFd) -> u32 {
    // Descriptors of open files are not negative.
    u32::try_from(fd).unwrap_or(u32::MAX)
}

/// Opens a pinned map, program or link.
///
/// # Errors
/// Those of `BPF_OBJ_GET`; links and programs cannot be opened read-only.
pub fn open_pin(path: &Path, read_only: bool) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let file_flags = if read_only { BPF_F_RDONLY } else { 0 };
    let mut attr = ObjGetAttr { path: path.as_ptr() as u64, fd: 0, file_flags };
    let fd = bpf(BPF_OBJ_GET, &mut attr)?;
    let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just returned this descriptor, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// What a pinned link is attached to.
///
/// # Errors
/// Where there is no such pin, or it is no XDP or tcx link.
pub fn link_target(path: &Path) -> io::Result<LinkTarget> {
    let link = open_pin(path, false)?;
    let mut info = RawLinkInfo::default();
    let mut attr = InfoAttr {
        fd: raw(link.as_raw_fd()),
        length: u32::try_from(size_of::<RawLinkInfo>()).map_err(io::Error::other)?,
        info: std::ptr::from_mut(&mut info) as u64,
    };
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr)?;
    match info.kind {
        LINK_XDP | LINK_TCX => {
            Ok(LinkTarget { id: info.id, program: info.program, ifindex: info.ifindex, xdp: info.kind == LINK_XDP })
        }
        kind => Err(io::Error::other(format!("link type {kind} is neither XDP nor tcx"))),
    }
}

/// Detaches a pinned link now; removing the pin alone would leave it attached until a kernel worker gets to it.
///
/// # Errors
/// Where there is no such pin, or the kernel refuses.
pub fn detach_link(path: &Path) -> io::Result<()> {
    let link = open_pin(path, false)?;
    let mut fd = raw(link.as_raw_fd());
    bpf(BPF_LINK_DETACH, &mut fd).map(drop)
}

/// A value of a plain type from the bytes that the kernel gave for it; `None` where there are too few.
pub fn from_bytes<T: Pod>(bytes: &[u8]) -> Option<T> {
    if bytes.len() < size_of::<T>() {
        return None;
    }
    let mut value = MaybeUninit::<T>::uninit();
    // SAFETY: at least `size_of::<T>()` bytes are readable (checked above), the regions cannot overlap, and every bit
    // pattern is a valid `Pod`, so the copy initializes `value`.
    unsafe {
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), value.as_mut_ptr().cast::<u8>(), size_of::<T>());
        Some(value.assume_init())
    }
}

/// The bytes of a plain value.
pub fn to_bytes<T: Pod>(value: &T) -> Vec<u8> {
    let mut bytes = vec![0; size_of::<T>()];
    // SAFETY: both regions are `size_of::<T>()` bytes and distinct, and a `Pod` without implicit padding has every byte
    // initialized (sizes are asserted in edge_common::maps).
    unsafe {
        std::ptr::copy_nonoverlapping(std::ptr::from_ref(value).cast::<u8>(), bytes.as_mut_ptr(), bytes.len());
    }
    bytes
}

/// Sizes of a map's elements as userspace sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Key, bytes.
    pub key: usize,
    /// Value, bytes; for per-CPU maps the sum over all possible CPUs, each rounded up to 8.
    pub value: usize,
}

/// Elements read in one call, packed one after the other.
#[derive(Clone, Debug, Default)]
pub struct Page {
    /// Keys.
    pub keys: Vec<u8>,
    /// Values.
    pub values: Vec<u8>,
}

impl Page {
    /// The elements.
    pub fn iter(&self, shape: Shape) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.keys.chunks_exact(shape.key.max(1)).zip(self.values.chunks_exact(shape.value.max(1)))
    }
}

/// A position in a map that is being read page by page. A map that changes meanwhile may show an element twice or not
/// at all, as with every walk over a kernel hash table.
#[derive(Clone, Debug)]
pub struct Cursor {
    position: Option<Vec<u8>>,
    finished: bool,
    batches: bool,
}

impl Default for Cursor {
    fn default() -> Self {
        Self { position: None, finished: false, batches: true }
    }
}

impl Cursor {
    /// The position after an array's element of this number: reading goes on with the next one.
    pub fn after(number: u32) -> Self {
        let mut position = number.to_ne_bytes().to_vec();
        // As long as what the kernel writes there.
        position.resize(8, 0);
        Self { position: Some(position), ..Self::default() }
    }

    /// True once the last page was read.
    pub fn is_finished(&self) -> bool {
        self.finished
    }

    /// The next at most `limit` elements, but at least one hash bucket where the map is a hash.
    ///
    /// # Errors
    /// Those of the kernel; a map type without batches is read key by key instead.
    pub fn next_page(&mut self, map: BorrowedFd<'_>, shape: Shape, limit: usize) -> io::Result<Page> {
        if self.finished {
            return Ok(Page::default());
        }
        if self.batches {
            match self.next_batch(map, shape, limit.max(1)) {
                Err(error) if self.position.is_none() && is_unsupported(&error) => self.batches = false,
                result => return result,
            }
        }
        self.next_keys(map, shape, limit.max(1))
    }

    fn next_batch(&mut self, map: BorrowedFd<'_>, shape: Shape, limit: usize) -> io::Result<Page> {
        let mut count = limit;
        loop {
            let mut page = Page { keys: vec![0; count * shape.key], values: vec![0; count * shape.value] };
            // Hashes take a u32 bucket number here, other maps a key.
            let mut next = vec![0_u8; shape.key.max(8)];
            let mut attr = BatchAttr {
                in_batch: self.position.as_ref().map_or(0, |position| position.as_ptr() as u64),
                out_batch: next.as_mut_ptr() as u64,
                keys: page.keys.as_mut_ptr() as u64,
                values: page.values.as_mut_ptr() as u64,
                count: u32::try_from(count).map_err(io::Error::other)?,
                map_fd: raw(map.as_raw_fd()),
                ..BatchAttr::default()
            };
            let result = bpf(BPF_MAP_LOOKUP_BATCH, &mut attr);
            match result {
                Ok(_) => self.position = Some(next),
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => self.finished = true,
                // One bucket holds more than fits.
                Err(error) if error.raw_os_error() == Some(libc::ENOSPC) && count < 1 << 20 => {
                    count *= 2;
                    continue;
                }
                Err(error) => return Err(error),
            }
            let got = usize::try_from(attr.count).map_err(io::Error::other)?.min(count);
            page.keys.truncate(got * shape.key);
            page.values.truncate(got * shape.value);
            return Ok(page);
        }
    }

    fn next_keys(&mut self, map: BorrowedFd<'_>, shape: Shape, limit: usize) -> io::Result<Page> {
        let mut page = Page::default();
        for _ in 0..limit {
            let mut next = vec![0_u8; shape.key];
            let mut attr = ElementAttr {
                map_fd: raw(map.as_raw_fd()),
                key: self.position.as_ref().map_or(0, |position| position.as_ptr() as u64),
                value_or_next_key: next.as_mut_ptr() as u64,
                ..ElementAttr::default()
            };
            match bpf(BPF_MAP_GET_NEXT_KEY, &mut attr) {
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
                    self.finished = true;
                    break;
                }
                Err(error) => return Err(error),
            }
            if let Some(value) = lookup(map, shape, &next)? {
                page.keys.extend_from_slice(&next);
                page.values.extend_from_slice(&value);
            }
            self.position = Some(next);
        }
        Ok(page)
    }
}

/// One element's value; `None` where the map has no such key.
///
/// # Errors
/// Those of the kernel, and a key of the wrong length.
pub fn lookup(map: BorrowedFd<'_>, shape: Shape, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
    if key.len() != shape.key {
        return Err(io::Error::other(format!("the map's keys have {} bytes, not {}", shape.key, key.len())));
    }
    let mut value = vec![0_u8; shape.value];
    let mut attr = ElementAttr {
        map_fd: raw(map.as_raw_fd()),
        key: key.as_ptr() as u64,
        value_or_next_key: value.as_mut_ptr() as u64,
        ..ElementAttr::default()
    };
    match bpf(BPF_MAP_LOOKUP_ELEM, &mut attr) {
        Ok(_) => Ok(Some(value)),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Writes one element. Key and value must have the map's sizes (per-CPU values one after the other, each rounded up to 8).
///
/// # Errors
/// Those of the kernel.
pub fn update(map: BorrowedFd<'_>, key: &[u8], value: &[u8], flags: u64) -> io::Result<()> {
    let mut attr = ElementAttr {
        map_fd: raw(map.as_raw_fd()),
        key: key.as_ptr() as u64,
        value_or_next_key: value.as_ptr() as u64,
        flags,
        ..ElementAttr::default()
    };
    bpf(BPF_MAP_UPDATE_ELEM, &mut attr).map(drop)
}

fn is_unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP | ENOTSUPP))
}

/// The magic number of the file system that a path is on.
///
/// # Errors
/// Where there is no such path.
pub fn filesystem_magic(path: &Path) -> io::Result<u64> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut buffer = MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: the path is a C string, and the buffer has room for one `statfs`.
    let result = unsafe { libc::statfs(path.as_ptr(), buffer.as_mut_ptr()) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: statfs() returned 0, so it has filled the buffer.
    let statfs = unsafe { buffer.assume_init() };
    u64::try_from(statfs.f_type).map_err(io::Error::other)
}

/// Waits until `fd` can be read, or until `timeout` has passed, or a signal came.
///
/// # Errors
/// Those of poll(2).
pub fn wait_readable(fd: std::os::fd::RawFd, timeout: std::time::Duration) -> io::Result<()> {
    let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    let milliseconds = libc::c_int::try_from(timeout.as_millis()).unwrap_or(libc::c_int::MAX);
    // SAFETY: `poll` is one live pollfd for the length of the call.
    match unsafe { libc::poll(std::ptr::from_mut(&mut poll), 1, milliseconds) } {
        0.. => Ok(()),
        _ => match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            error => Err(error),
        },
    }
}

/// True where the driver takes VLAN tags off received frames before a program sees them (`ethtool -k`, rx-vlan-offload);
/// `None` where it does not say.
pub fn strips_vlan_tags(interface: &str) -> Option<bool> {
    /// `ETHTOOL_GFLAGS` and its bit `ETH_FLAG_RXVLAN` (include/uapi/linux/ethtool.h).
    const GET_FLAGS: u32 = 0x25;
    const RX_VLAN: u32 = 1 << 8;
    const SIOCETHTOOL: libc::c_ulong = 0x8946;
    // SAFETY: takes integers only.
    let socket = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if socket < 0 {
        return None;
    }
    // SAFETY: the kernel has just given this descriptor to us, and nobody else knows it.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    // `struct ethtool_value`: the command, and the answer.
    let mut value = [GET_FLAGS, 0];
    // SAFETY: integers and a union of integers and pointers, for which all zeroes are valid.
    let mut request: libc::ifreq = unsafe { MaybeUninit::zeroed().assume_init() };
    let name = interface.as_bytes();
    // The last byte ends the string.
    let room = request.ifr_name.len().checked_sub(1)?;
    for (to, from) in request.ifr_name.get_mut(..room)?.iter_mut().zip(name) {
        *to = libc::c_char::from_ne_bytes([*from]);
    }
    request.ifr_ifru.ifru_data = value.as_mut_ptr().cast();
    // SAFETY: an open socket; the request and the two integers it points to outlive the call.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL as _, std::ptr::from_mut(&mut request)) };
    (result == 0).then_some(value[1] & RX_VLAN != 0)
}

/// Gives memory that was freed back to the system: what was needed once, to read a configuration or to show a table, would
/// else be held for ever.
pub fn trim_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes an integer only, and locks what it looks at.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Keeps the heap close to what is in use, for a daemon that needs several times that at its start and for audits, and keeps it
/// for months: one arena for all threads, and large blocks straight from the system and back to it. To be called before there
/// are threads.
pub fn keep_heap_small() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes integers only; what the library does not know it refuses, and nothing depends on it.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        // Set once they stay as they are, where the library would else raise them with each large block that is freed.
        libc::mallopt(libc::M_MMAP_THRESHOLD, 128 << 10);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 128 << 10);
    }
}

/// From now on others go first: the calling thread, and those that it starts, take half of what others take of a CPU that both
/// want. Less would keep a daemon waiting for its program for minutes on a busy host.
pub fn give_way() {
    // SAFETY: takes integers only; 0 is the calling thread (Linux, setpriority(2) C library/kernel differences). Nobody is
    // refused a lower priority.
    unsafe {
        libc::setpriority(libc::PRIO_PROCESS, 0, 3);
    }
}

/// CLOCK_MONOTONIC, ns: the clock of every time in a flow entry.
pub fn monotonic_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a live timespec, and this clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, std::ptr::from_mut(&mut time)) };
    nanoseconds(&time)
}

/// Nanoseconds in one of the kernel's ticks (jiffies).
pub fn tick_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // The coarse clock moves with the tick, and its resolution is that (`KTIME_LOW_RES`).
    // SAFETY: `time` is a live timespec, and this clock has existed since 2.6.32.
    unsafe { libc::clock_getres(libc::CLOCK_MONOTONIC_COARSE, std::ptr::from_mut(&mut time)) };
    nanoseconds(&time)
}

fn nanoseconds(time: &libc::timespec) -> u64 {
    let part = |value: libc::c_long| u64::try_from(value).unwrap_or(0);
    part(time.tv_sec).saturating_mul(1_000_000_000).saturating_add(part(time.tv_nsec))
}
