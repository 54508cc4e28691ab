//! What the datapath needs from this host, and what it must leave alone: bpffs, capabilities, the kernel's version, ports
//! of local sockets, and the seed.

use std::{
    fs, io,
    io::Write as _,
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use aya::{programs::ProgramType, util::KernelVersion};
use edge_common::maps::PortSet;

use super::{listeners, loader::LoadError};
use crate::config::valid::Edge;

/// `BPF_FS_MAGIC` of linux/magic.h.
const BPF_FS_MAGIC: u64 = 0xcafe_4a11;
const CAP_NET_ADMIN: u32 = 12;
const CAP_SYS_ADMIN: u32 = 21;
const CAP_PERFMON: u32 = 38;
const CAP_BPF: u32 = 39;

/// Checks all that must hold before anything is loaded.
///
/// # Errors
/// Names the missing capability, kernel feature or mount, and what to do about it.
pub fn check() -> Result<(), LoadError> {
    let missing = missing_capabilities();
    if !missing.is_empty() {
        return Err(LoadError::Capability { missing: missing.join(", ") });
    }
    if !kernel_is_at_least(5, 15) {
        return Err(LoadError::Feature { what: "this kernel is older than 5.15".to_owned() });
    }
    for (kind, what) in [(ProgramType::Xdp, "XDP programs"), (ProgramType::SchedClassifier, "TC classifier programs")] {
        if let Ok(false) = aya::sys::is_program_supported(kind) {
            return Err(LoadError::Feature { what: format!("this kernel has no {what}") });
        }
    }
    Ok(())
}

/// Compares the running kernel; one whose version cannot be read is taken as new.
pub fn kernel_is_at_least(major: u8, minor: u8) -> bool {
    KernelVersion::current().map_or(true, |current| current >= KernelVersion::new(major, minor, 0))
}

/// Names of the capabilities that loading and attaching need and this thread lacks. CAP_SYS_ADMIN stands for CAP_BPF and
/// CAP_PERFMON.
pub fn missing_capabilities() -> Vec<&'static str> {
    let Ok(status) = fs::read_to_string("/proc/thread-self/status") else { return Vec::new() };
    missing_in(effective(&status).unwrap_or(u64::MAX))
}

fn effective(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

fn missing_in(effective: u64) -> Vec<&'static str> {
    let has = |capability: u32| effective & (1 << capability) != 0;
    let admin = has(CAP_SYS_ADMIN);
    let needed = [
        ("CAP_BPF", has(CAP_BPF) || admin),
        ("CAP_NET_ADMIN", has(CAP_NET_ADMIN)),
        ("CAP_PERFMON", has(CAP_PERFMON) || admin),
    ];
    needed.into_iter().filter(|(_, present)| !present).map(|(name, _)| name).collect()
}

/// Makes the pin folder and its subfolders, after checking that they are on a bpffs.
///
/// # Errors
/// Where they are not, or may not be made.
pub fn prepare_pin_folder(root: &Path) -> Result<(), LoadError> {
    let mut existing = root;
    while !existing.exists() {
        match existing.parent() {
            Some(parent) => existing = parent,
            None => break,
        }
    }
    if !is_bpffs(existing) {
        return Err(LoadError::NoBpffs { path: root.to_owned() });
    }
    for folder in ["", "maps", "incoming", "layouts", "programs", "stages", "links"] {
        let folder = root.join(folder);
        match fs::create_dir_all(&folder) {
            Ok(()) => {}
            Err(source) => return Err(LoadError::Folder { path: folder, source }),
        }
    }
    Ok(())
}

fn is_bpffs(path: &Path) -> bool {
    super::sys::filesystem_magic(path).is_ok_and(|magic| magic == BPF_FS_MAGIC)
}

/// Ports that SNAT may use on the host's own addresses: all from 1024 on but the range from which the kernel gives out
/// ephemeral ports, the ports reserved by the administrator, and those of sockets that listen now.
///
/// # Errors
/// Where the kernel's port range cannot be read.
pub fn snat_ports() -> io::Result<PortSet> {
    let range = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range")?;
    let reserved = fs::read_to_string("/proc/sys/net/ipv4/ip_local_reserved_ports").unwrap_or_default();
    let mut taken = vec![parse_range(&range)];
    taken.extend(reserved.trim().split(',').map(parse_reserved));
    // A kernel may have been built without the diagnosis.
    let (listening, tcp) = match listeners::tcp() {
        Ok(ports) => (ports, &[][..]),
        Err(_) => (Vec::new(), &[("tcp", "0A"), ("tcp6", "0A")][..]),
    };
    taken.extend(listening.into_iter().map(|port| Some((port, port))));
    for (table, state) in tcp.iter().chain(&[("udp", "07"), ("udp6", "07")]) {
        let sockets = fs::read_to_string(format!("/proc/thread-self/net/{table}")).unwrap_or_default();
        taken.extend(bound_ports(&sockets, state).into_iter().map(|port| Some((port, port))));
    }
    let mut set = PortSet([u64::MAX; 1024]);
    let mut clear = |port: u16| {
        if let Some(word) = set.0.get_mut(usize::from(port / 64)) {
            *word &= !(1 << (port % 64));
        }
    };
    (0..1024).for_each(&mut clear);
    for (low, high) in taken.into_iter().flatten() {
        (low..=high).for_each(&mut clear);
    }
    Ok(set)
}

fn parse_range(text: &str) -> Option<(u16, u16)> {
    let mut ports = text.split_whitespace().map_while(|port| port.parse().ok());
    Some((ports.next()?, ports.next()?))
}

fn parse_reserved(text: &str) -> Option<(u16, u16)> {
    let (low, high) = text.trim().split_once('-').unwrap_or((text.trim(), text.trim()));
    Some((low.parse().ok()?, high.parse().ok()?))
}

/// Local ports of the sockets in this state, in a table of /proc/net.
fn bound_ports(table: &str, state: &str) -> Vec<u16> {
    let port = |line: &str| {
        let mut fields = line.split_whitespace().skip(1);
        let local = fields.next()?;
        let is_bound = fields.nth(1)? == state;
        let (_, port) = local.rsplit_once(':')?;
        is_bound.then(|| u16::from_str_radix(port, 16).ok())?
    };
    table.lines().skip(1).filter_map(port).collect()
}

/// The secret that keys the tuple hash: read from `seed_file`, or made once in the state folder, readable by the daemon
/// alone. All edges behind one ECMP route need the same.
///
/// # Errors
/// Where the file cannot be read or made, is shorter than 16 bytes, or others may read it.
pub fn seed(edge: &Edge) -> Result<[u64; 2], LoadError> {
    let own = edge.state_dir.join("seed");
    let path = edge.seed_file.as_ref().unwrap_or(&own);
    let error = |reason: String| LoadError::Seed { path: path.clone(), reason };
    match fs::read(path) {
        Ok(bytes) => {
            let mode = fs::metadata(path).map_err(|e| error(e.to_string()))?.permissions().mode();
            if mode & 0o007 != 0 {
                return Err(error(format!("it is a secret, but its mode is {:03o}; chmod o= it", mode & 0o777)));
            }
            seed_from(&bytes).ok_or_else(|| error("it holds fewer than 16 bytes".to_owned()))
        }
        Err(missing) if missing.kind() == io::ErrorKind::NotFound && edge.seed_file.is_none() => {
            let bytes = make_seed(path).map_err(|e| error(e.to_string()))?;
            seed_from(&bytes).ok_or_else(|| error("too short".to_owned()))
        }
        Err(source) => Err(error(source.to_string())),
    }
}

/// 16 raw bytes; or a longer text, such as 32 hex digits or a passphrase, of which the hash counts. A final newline does
/// not.
fn seed_from(bytes: &[u8]) -> Option<[u64; 2]> {
    let bytes = if bytes.len() > 16 { bytes.strip_suffix(b"\n").unwrap_or(bytes) } else { bytes };
    if let Ok([a0, a1, a2, a3, a4, a5, a6, a7, b @ ..]) = <[u8; 16]>::try_from(bytes) {
        return Some([u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]), u64::from_le_bytes(b)]);
    }
    let fold = |salt: &[u8]| super::pins::fnv1a(&[salt, bytes]);
    (bytes.len() >= 16).then(|| [fold(b"a"), fold(b"b")])
}

fn make_seed(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = [0; 16];
    io::Read::read_exact(&mut fs::File::open("/dev/urandom")?, &mut bytes)?;
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let temporary: PathBuf = path.with_extension("new");
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    file.write_all(&bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    Ok(bytes.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ordinary_user_with_the_units_capabilities_lacks_nothing_and_one_without_is_told_which() {
        let unit = 1 << CAP_BPF | 1 << CAP_NET_ADMIN | 1 << CAP_PERFMON;
        assert!(missing_in(unit).is_empty());
        assert_eq!(missing_in(0), ["CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON"]);
        assert_eq!(missing_in(unit & !(1 << CAP_PERFMON)), ["CAP_PERFMON"]);
        assert_eq!(missing_in(1 << CAP_SYS_ADMIN), ["CAP_NET_ADMIN"]);
        assert_eq!(effective("Name:\tx\nCapEff:\t000001ffffffffff\n"), Some(0x1ff_ffff_ffff));
    }

    #[test]
    fn only_listening_and_bound_sockets_take_a_port_away() {
        let table = "  sl  local_address rem_address   st tx_queue\n\
            \x20  0: 00000000:1F90 00000000:0000 0A 00000000:00000000\n\
            \x20  1: 0100007F:1F91 0100007F:D431 01 00000000:00000000\n";
        assert_eq!(bound_ports(table, "0A"), [8080]);
    }

    #[test]
    fn reserved_ports_may_be_single_or_ranges() {
        assert_eq!(parse_reserved("8080"), Some((8080, 8080)));
        assert_eq!(parse_reserved("9000-9002"), Some((9000, 9002)));
        assert_eq!(parse_reserved(""), None);
        assert_eq!(parse_range("32768\t60999\n"), Some((32768, 60999)));
    }

    #[test]
    fn the_hosts_ephemeral_range_is_never_used_for_snat() {
        let set = snat_ports().unwrap();
        let (low, high) = parse_range(&fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap()).unwrap();
        for port in [0, low, low + 1, high] {
            assert_eq!(set.0[usize::from(port / 64)] & (1 << (port % 64)), 0, "port {port}");
        }
    }

    #[test]
    fn a_seed_is_sixteen_bytes_or_a_text_and_a_final_newline_does_not_change_it() {
        assert_eq!(seed_from(&[1; 16]), Some([0x0101_0101_0101_0101; 2]));
        let text = seed_from(b"00112233445566778899aabbccddeeff");
        assert!(text.is_some());
        assert_eq!(seed_from(b"00112233445566778899aabbccddeeff\n"), text);
        assert_eq!(seed_from(b"short"), None);
    }
}
