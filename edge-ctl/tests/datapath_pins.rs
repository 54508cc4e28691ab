//! Loading, adoption and the maps port against the kernel: each test in network and mount namespaces of its own, with a
//! bpffs of its own, as root.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test stops at the first broken assumption"
)]
#![allow(unsafe_code, reason = "unshare and mount have no safe wrapper here")]

use std::{
    collections::BTreeMap,
    ffi::CString,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, LazyLock, Mutex},
};

use aya::{
    TestRun as _, TestRunOptions,
    maps::{Array, HashMap, MapData, PerCpuArray, PerCpuValues},
    programs::Xdp,
};
use aya_obj::programs::XdpAttachType;
use edge_common::{
    filter,
    flow::{FlowKeyV4, TCP},
    maps::{AddressFilter, FlowV4, SERVICES, ServiceEntry, ServiceKey, ServiceStats, name},
};
use edge_ctl::{
    config::valid::{Edge, Hook, Tables},
    datapath::{
        attach,
        kernel_view::KernelView,
        loader::{Datapath, LoadError},
        maps::Maps,
        object::EBPF_OBJECT,
        pins, stages, sys,
    },
    desired::{Announced, DesiredBackend, DesiredFrontend, DesiredState, Timeouts},
    model::{
        Balance, Frontend, Mode, PathAttributes, PoolMember, Protection, Protocol, Selection, Snat, TableShape, Tier,
    },
    reconcile::{
        actor::{Intervals, Reconciler},
        ports::{AnnouncementPort, DatapathPort, NumberSets, PortError},
    },
};
use ipnet::IpNet;

/// Runs a test in a thread with its own namespaces, which end with the thread. The folder it is given has a bpffs at `bpf`.
fn in_namespaces(name: &str, test: impl FnOnce(&Path) + Send + 'static) {
    // SAFETY: geteuid has no preconditions.
    if unsafe { libc::geteuid() } != 0 {
        println!("SKIPPED {name}: needs root");
        return;
    }
    let thread = std::thread::spawn(move || {
        let folder = tempfile::tempdir().unwrap();
        let bpffs = folder.path().join("bpf");
        std::fs::create_dir(&bpffs).unwrap();
        let target = CString::new(bpffs.to_str().unwrap()).unwrap();
        let none = std::ptr::null();
        // SAFETY: unshare affects this thread alone; all strings are C strings that live across the calls.
        unsafe {
            assert_eq!(libc::unshare(libc::CLONE_NEWNET | libc::CLONE_NEWNS), 0);
            let private = libc::MS_REC | libc::MS_PRIVATE;
            assert_eq!(libc::mount(none, c"/".as_ptr(), none, private, none.cast()), 0);
            assert_eq!(libc::mount(c"bpf".as_ptr(), target.as_ptr(), c"bpf".as_ptr(), 0, none.cast()), 0);
        }
        ip("link add in type veth peer name in-peer");
        ip("link add out type veth peer name out-peer");
        for interface in ["lo", "in", "in-peer", "out", "out-peer"] {
            ip(&format!("link set {interface} up"));
        }
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| test(folder.path())));
        // SAFETY: the C string is alive; the mount is ours, in our own mount namespace.
        unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) };
        if let Err(panic) = result {
            std::panic::resume_unwind(panic);
        }
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split_whitespace()).status().unwrap();
    assert!(status.success(), "ip {arguments}");
}

fn edge(folder: &Path, hook: Hook, interfaces: &[&str]) -> Edge {
    Edge {
        interfaces: interfaces.iter().map(|name| (*name).to_owned()).collect(),
        hook,
        pod_networks: vec!["10.1.0.0/16".parse().unwrap()],
        pin_path: folder.join("bpf/edge"),
        socket: folder.join("edge.sock"),
        state_dir: folder.join("state"),
        seed_file: None,
        tables: Tables {
            established: 4096,
            half_open: 4096,
            closing: 4096,
            established_v6: 4096,
            half_open_v6: 4096,
            closing_v6: 4096,
            ..Tables::default()
        },
    }
}

/// Opens with [`quick`], for tests in which no packet goes through the program.
fn open(edge: &Edge) -> Datapath {
    Datapath::open(edge, quick()).unwrap()
}

fn open_whole(edge: &Edge) -> Datapath {
    Datapath::open(edge, EBPF_OBJECT).unwrap()
}

/// The object with programs that end at once, so that the kernel verifies nothing of the rest: all of it takes seconds of a
/// CPU for each load. Maps, sections and names are the same.
fn quick() -> &'static [u8] {
    static QUICK: LazyLock<Vec<u8>> = LazyLock::new(|| {
        // r0 = 2, which passes a packet (XDP) or stops it (TC); if r0 != 2 goto the rest; exit.
        let end: [[u8; 8]; 3] = [[0xb7, 0, 0, 0, 2, 0, 0, 0], [0x55, 0, 1, 0, 2, 0, 0, 0], [0x95, 0, 0, 0, 0, 0, 0, 0]];
        let object = aya_obj::Object::parse(EBPF_OBJECT).unwrap();
        let mut bytes = EBPF_OBJECT.to_vec();
        let number =
            |at: usize| usize::try_from(u64::from_le_bytes(*EBPF_OBJECT[at..].first_chunk().unwrap())).unwrap();
        let (sections, size) = (number(40), usize::from(u16::from_le_bytes([EBPF_OBJECT[58], EBPF_OBJECT[59]])));
        for program in object.programs.values() {
            let start =
                number(sections + program.section_index * size + 24) + usize::try_from(program.address).unwrap();
            let code = &mut bytes[start..start + 24];
            // Neither a call nor the address of a map, which the loader fills in.
            assert!(code.chunks_exact(8).all(|instruction| !matches!(instruction[0], 0x85 | 0x18 | 0)), "{code:?}");
            code.copy_from_slice(end.as_flattened());
        }
        bytes
    });
    &QUICK
}

fn attach_all(datapath: &mut Datapath) {
    let failed = datapath.attach_missing();
    assert!(failed.is_empty(), "{failed:?}");
    assert!(datapath.is_ready());
}

fn states(datapath: &Datapath) -> Vec<(String, String)> {
    datapath.xdp_rows().into_iter().map(|row| (row.hook, row.state)).collect()
}

fn row(hook: &str, state: &str) -> (String, String) {
    (hook.to_owned(), state.to_owned())
}

#[test]
fn a_second_start_adopts_maps_programs_and_links_and_writes_nothing() {
    in_namespaces("second start", |folder| {
        let edge = edge(folder, Hook::XdpNative, &["in", "out"]);
        let mut first = open_whole(&edge);
        attach_all(&mut first);
        assert!(first.writes() > 0);
        assert_eq!(states(&first), [row("xdp-native", "attached"), row("xdp-native", "attached")]);
        let links = |datapath: &Datapath| {
            datapath.xdp_rows().into_iter().map(|row| (row.program, row.link)).collect::<Vec<_>>()
        };
        let before = links(&first);
        drop(first);

        let mut second = open_whole(&edge);
        attach_all(&mut second);
        assert_eq!(second.writes(), 0);
        assert_eq!(states(&second), [row("xdp-native", "adopted"), row("xdp-native", "adopted")]);
        assert_eq!(links(&second), before);
    });
}

/// Log lines of this process, kept.
static LINES: Lines = Lines(Mutex::new(Vec::new()));

struct Lines(Mutex<Vec<String>>);

impl log::Log for Lines {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        self.0.lock().unwrap().push(format!("{}: {}", record.target(), record.args()));
    }

    fn flush(&self) {}
}

#[test]
fn what_the_program_says_with_no_daemon_waits_for_the_next_one() {
    in_namespaces("program log", |folder| {
        log::set_logger(&LINES).unwrap();
        let edge = edge(folder, Hook::XdpNative, &["in", "out"]);
        let mut first = open_whole(&edge);
        attach_all(&mut first);
        drop(first.program_log().unwrap());
        let pins = first.pins().clone();
        drop(first);

        let all = AddressFilter { destinations: [u64::MAX; filter::WORDS], sources: [0; filter::WORDS] };
        pins::open::<Array<MapData, AddressFilter>>(&pins, name::ADDRESS_FILTER).unwrap().set(0, all, 0).unwrap();
        let frontend = ServiceKey { address: edge_common::address::mapped(0), port: 0, protocol: TCP, _pad: 0 };
        let mut index: HashMap<MapData, ServiceKey, u32> = pins::open(&pins, name::SERVICE_INDEX).unwrap();
        index.insert(frontend, SERVICES, 0).unwrap();
        // A SYN from and to zeroes.
        let mut frame = [0_u8; 64];
        (frame[12], frame[14], frame[17], frame[22], frame[23]) = (8, 0x45, 40, 64, TCP);
        (frame[46], frame[47]) = (0x50, 2);
        let program = Xdp::from_pin(pins.program("edge_xdp"), XdpAttachType::Interface).unwrap();
        program.test_run(TestRunOptions { data_in: Some(&frame), ..TestRunOptions::default() }).unwrap();

        let again = open_whole(&edge);
        again.program_log().unwrap().drain();
        let said: Vec<_> =
            LINES.0.lock().unwrap().iter().filter(|line| line.starts_with("edge-ebpf")).cloned().collect();
        assert_eq!(said.len(), 1, "{said:?}");
        assert!(said[0].contains("not-ready"), "{said:?}");
    });
}

#[test]
fn a_new_version_takes_over_by_link_update_with_the_maps_as_they_are() {
    in_namespaces("new version", |folder| {
        // The same program in another file.
        let newer: &'static [u8] = {
            let mut bytes = quick().to_vec();
            bytes.extend([0; 8]);
            Box::leak(bytes.into_boxed_slice())
        };
        for hook in [Hook::XdpNative, Hook::Tc] {
            let edge = edge(folder, hook, &["in"]);
            let mut first = open(&edge);
            attach_all(&mut first);
            let before = first.xdp_rows();
            let seed = first.seed().unwrap();
            let mut established = table::<FlowKeyV4>(&first);
            established.insert(flow(1000, 1).key, flow(1000, 1), 0).unwrap();
            drop(first);

            let mut second = Datapath::open(&edge, newer).unwrap();
            attach_all(&mut second);
            let after = second.xdp_rows();
            assert_eq!(after[0].link, before[0].link, "updated, not attached anew");
            assert_ne!(after[0].program, before[0].program);
            assert_eq!(second.seed().unwrap(), seed);
            assert!(table::<FlowKeyV4>(&second).get(&flow(1000, 1).key, 0).is_ok());
            let programs = pins::files(&second.pins().programs()).unwrap();
            assert_eq!(programs.len(), 1, "the old program is retired: {programs:?}");
            second.detach_all().unwrap();
        }
    });
}

#[test]
fn a_start_that_died_between_the_slots_and_the_entry_program_is_finished_by_the_next() {
    in_namespaces("half a program", |folder| {
        for hook in [Hook::XdpNative, Hook::Tc] {
            let edge = edge(folder, hook, &["in"]);
            let mut first = open(&edge);
            attach_all(&mut first);
            let xdp = hook == Hook::XdpNative;
            let before = first.xdp_rows();
            let slots = first.pins().stages(stages::map(xdp));
            let entry = first.pins().program(stages::entry(xdp));
            drop(first);
            for lost in [&entry, &slots] {
                std::fs::remove_file(lost).unwrap();
                let mut next = open(&edge);
                attach_all(&mut next);
                assert!(next.writes() > 0, "{} was made anew", lost.display());
                assert!(entry.exists() && slots.exists());
                let after = next.xdp_rows();
                assert_eq!(after[0].link, before[0].link, "updated, not attached anew");
                let left = pins::files(&next.pins().all_stages()).unwrap();
                assert_eq!(left.len(), 1, "what was set aside is retired: {left:?}");
            }
            let adopted = open(&edge);
            assert_eq!(adopted.writes(), 0);
            adopted.detach_all().unwrap();
        }
    });
}

#[test]
fn links_outlive_the_process_that_made_them_and_detach_all_leaves_nothing() {
    in_namespaces("detach", |folder| {
        let edge = edge(folder, Hook::Auto, &["in"]);
        let mut datapath = open(&edge);
        attach_all(&mut datapath);
        assert_eq!(states(&datapath), [row(attach::tc_hook().name(), "attached")], "veth gets TC");
        let link = datapath.pins().link("in", false);
        drop(datapath);
        assert_ne!(sys::link_target(&link).unwrap().ifindex, 0, "still attached with nobody there");
        let view = KernelView::open(&edge.pin_path, quick()).unwrap();
        assert_eq!(view.xdp_rows().unwrap()[0].state, "attached");

        open(&edge).detach_all().unwrap();
        assert!(pins::files(&edge.pin_path).unwrap().is_empty());
        assert!(KernelView::open(&edge.pin_path, quick()).is_err());
    });
}

/// The hook of each interface and why it is not a better one.
fn choices(datapath: &Datapath) -> Vec<(String, String)> {
    datapath.xdp_rows().into_iter().map(|row| (row.hook, row.reason.unwrap_or_default())).collect()
}

#[test]
fn auto_is_native_xdp_where_the_driver_has_it_and_tc_elsewhere_with_the_reason() {
    in_namespaces("automatic hook", |folder| {
        ip("tuntap add dev tap0 mode tap");
        ip("link add br0 type bridge");
        let mut datapath = open(&edge(folder, Hook::Auto, &["tap0", "in", "br0"]));
        attach_all(&mut datapath);
        let tc = attach::tc_hook().name();
        let [tap, veth, bridge] = &choices(&datapath)[..] else { panic!("three interfaces") };
        assert_eq!(*tap, row("xdp-native", ""));
        assert_eq!(veth.0, tc);
        assert!(veth.1.starts_with("veth: "), "{}", veth.1);
        assert_eq!(bridge.0, tc);
        assert!(bridge.1.starts_with("xdp-native: not supported by this driver"), "{}", bridge.1);
    });
}

#[test]
fn generic_xdp_comes_only_where_it_is_asked_for() {
    in_namespaces("generic hook", |folder| {
        ip("link add br0 type bridge");
        let mut datapath = open(&edge(folder, Hook::XdpGeneric, &["br0"]));
        attach_all(&mut datapath);
        assert_eq!(choices(&datapath), [row("xdp-generic", "hook = \"xdp-generic\"")]);
        let mut datapath = open(&edge(folder, Hook::XdpNative, &["br0"]));
        assert_eq!(datapath.attach_missing().len(), 1);
        assert!(choices(&datapath)[0].1.contains("not supported by this driver"), "{:?}", choices(&datapath));
    });
}

#[test]
fn a_port_is_refused_beside_the_bridge_it_belongs_to_and_let_go_where_it_was_attached_before() {
    in_namespaces("bridge and port", |folder| {
        ip("link add br0 type bridge");
        let edge = edge(folder, Hook::Tc, &["in", "br0"]);
        let mut datapath = open(&edge);
        attach_all(&mut datapath);
        ip("link set in master br0");
        let failed = datapath.attach_missing();
        assert!(matches!(&failed[..], [(name, LoadError::Hook { .. })] if name == "in"), "{failed:?}");
        assert!(failed[0].1.to_string().contains("it is a port of br0"), "{}", failed[0].1);
        assert_eq!(states(&datapath), [row("-", "missing"), row(attach::tc_hook().name(), "attached")]);
        ip("link set in nomaster");
        attach_all(&mut datapath);
    });
}

#[test]
fn a_vlan_device_is_served_on_the_bond_or_link_below_it_and_its_row_says_so() {
    in_namespaces("VLAN devices and bonds", |folder| {
        let can =
            |arguments: &str| Command::new("ip").args(arguments.split_whitespace()).output().unwrap().status.success();
        if !can("link add link in name in.100 type vlan id 100") || !can("link add bond0 type bond mode active-backup")
        {
            println!("SKIPPED VLAN devices and bonds: the kernel has none (8021q, bonding)");
            return;
        }
        ip("link set out down");
        ip("link set out master bond0");
        ip("link set bond0 up");
        ip("link add link bond0 name bond0.7 type vlan proto 802.1ad id 7");
        let mut datapath = open(&edge(folder, Hook::Auto, &["in.100", "bond0.7", "bond0", "out"]));
        let failed = datapath.attach_missing();
        assert!(matches!(&failed[..], [(name, LoadError::Hook { .. })] if name == "out"), "{failed:?}");
        assert!(failed[0].1.to_string().contains("it is a port of bond0"), "{}", failed[0].1);
        let [tagged, on_bond, bond, _] = &choices(&datapath)[..] else { panic!("four interfaces") };
        let tc = attach::tc_hook().name();
        assert_eq!([&tagged.0, &on_bond.0, &bond.0], [tc; 3]);
        assert!(tagged.1.starts_with("VLAN 100: the program runs on in; veth: "), "{}", tagged.1);
        assert!(on_bond.1.starts_with("802.1ad VLAN 7: the program runs on bond0; veth: "), "{}", on_bond.1);
        assert!(bond.1.starts_with("veth: "), "a bond is what its ports are: {}", bond.1);

        let mut datapath = open(&edge(folder, Hook::XdpNative, &["in.100", "bond0.7"]));
        attach_all(&mut datapath);
        assert_eq!(
            choices(&datapath),
            [
                row("xdp-native", "VLAN 100: the program runs on in"),
                row("xdp-native", "802.1ad VLAN 7: the program runs on bond0")
            ]
        );
    });
}

#[test]
fn a_changed_hook_moves_the_program_and_never_leaves_both() {
    in_namespaces("hook change", |folder| {
        let mut edge = edge(folder, Hook::XdpNative, &["in"]);
        let mut datapath = open(&edge);
        attach_all(&mut datapath);
        edge.hook = Hook::Tc;
        let mut datapath = open(&edge);
        // Until the kernel has verified the other program this one stays.
        assert!(datapath.attach_loaded().is_empty() && datapath.only_waits() && !datapath.is_ready());
        assert_eq!(states(&datapath), [row("-", "attaching")]);
        assert_eq!(datapath.loads().len(), 1);
        assert_eq!(datapath.pins().linked().unwrap(), [("in".to_owned(), true)]);
        attach_all(&mut datapath);
        assert_eq!(states(&datapath), [row(attach::tc_hook().name(), "attached")]);
        assert_eq!(datapath.pins().linked().unwrap(), [("in".to_owned(), false)]);
        edge.hook = Hook::XdpGeneric;
        datapath.reconfigure(&edge);
        attach_all(&mut datapath);
        assert_eq!(states(&datapath), [row("xdp-generic", "attached")]);
        assert_eq!(datapath.pins().linked().unwrap(), [("in".to_owned(), true)]);
    });
}

#[test]
fn an_interface_taken_out_of_the_configuration_is_let_go() {
    in_namespaces("interface removed", |folder| {
        let mut edge = edge(folder, Hook::Tc, &["in", "out"]);
        let mut datapath = open(&edge);
        attach_all(&mut datapath);
        edge.interfaces.pop();
        datapath.reconfigure(&edge);
        attach_all(&mut datapath);
        assert_eq!(datapath.pins().linked().unwrap(), [("in".to_owned(), false)]);
    });
}

#[test]
fn a_missing_interface_is_named_and_attached_once_it_appears() {
    in_namespaces("missing interface", |folder| {
        let edge = edge(folder, Hook::Tc, &["in", "late.100"]);
        let mut datapath = open(&edge);
        let failed = datapath.attach_missing();
        assert!(matches!(&failed[..], [(_, LoadError::NoInterface { name })] if name == "late.100"), "{failed:?}");
        assert!(failed[0].1.is_retryable() && !datapath.is_ready());
        assert_eq!(states(&datapath)[1], row("-", "missing"));
        ip("link add late.100 type veth peer name late-peer");
        attach_all(&mut datapath);
        // The name goes to another interface: the old link is of no use.
        ip("link del late.100");
        ip("link add late.100 type veth peer name late-peer");
        attach_all(&mut datapath);
        assert_eq!(states(&datapath)[1], row(attach::tc_hook().name(), "attached"));
    });
}

#[test]
fn a_foreign_xdp_program_is_named_and_left_alone() {
    in_namespaces("foreign program", |folder| {
        let mut foreign = aya::Ebpf::load(quick()).unwrap();
        let program: &mut aya::programs::Xdp = foreign.program_mut("edge_xdp").unwrap().try_into().unwrap();
        program.load().unwrap();
        program.attach("in", aya::programs::XdpMode::Skb).unwrap();
        let mut datapath = open(&edge(folder, Hook::XdpNative, &["in"]));
        let failed = datapath.attach_missing();
        let Some((_, LoadError::ForeignXdp { interface, program, id })) = failed.first() else {
            panic!("{failed:?}");
        };
        assert_eq!((interface.as_str(), program.as_str()), ("in", "edge_xdp"));
        let aya::programs::Program::Xdp(attached) = foreign.program("edge_xdp").unwrap() else { panic!() };
        assert_eq!(*id, attached.info().unwrap().id());
    });
}

/// Turns this thread into user 65534 with just these capabilities.
fn become_ordinary(folder: &Path, capabilities: u64) {
    const KEEP_CAPABILITIES: libc::c_int = 8;
    const VERSION_3: u32 = 0x2008_0522;
    let owned = [folder.to_owned(), folder.join("bpf")];
    for path in owned {
        std::os::unix::fs::chown(&path, Some(65534), Some(65534)).unwrap();
    }
    let (low, high) = (capabilities as u32, (capabilities >> 32) as u32);
    let header = [VERSION_3, 0];
    let sets = [low, low, 0, high, high, 0];
    // SAFETY: raw system calls change this thread's credentials alone; both arrays have the layout of
    // cap_user_header_t and of two cap_user_data_t, and live across the call.
    unsafe {
        assert_eq!(libc::prctl(KEEP_CAPABILITIES, 1, 0, 0, 0), 0);
        assert_eq!(libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534), 0);
        assert_eq!(libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr()), 0);
    }
}

#[test]
fn an_ordinary_user_with_the_units_capabilities_loads_attaches_writes_and_reads() {
    in_namespaces("ordinary user", |folder| {
        // CAP_NET_ADMIN, CAP_PERFMON, CAP_BPF.
        become_ordinary(folder, 1 << 12 | 1 << 38 | 1 << 39);
        let edge = edge(folder, Hook::XdpNative, &["in", "out"]);
        let mut datapath = open_whole(&edge);
        attach_all(&mut datapath);
        let mut reconciler = reconciler(&datapath);
        reconciler.round(&desired(&["10.1.0.4:443"]));
        assert_eq!(reconciler.status().error, None);
        let mut sweeper = datapath.sweeper().unwrap();
        while !sweeper.step(4096).unwrap().finished {}
        datapath.program_log().unwrap().drain();
        let view = datapath.view().unwrap();
        assert_eq!(view.service_rows().unwrap().len(), 1);
        assert!(view.xdp_rows().unwrap().iter().all(|row| row.tag.is_some()));
        drop(datapath);
        let mut again = open_whole(&edge);
        attach_all(&mut again);
        assert_eq!(again.writes(), 0);
    });
}

#[test]
fn a_user_without_a_capability_is_told_which() {
    in_namespaces("capability", |folder| {
        become_ordinary(folder, 1 << 12 | 1 << 39);
        let error = Datapath::open(&edge(folder, Hook::Tc, &["in"]), EBPF_OBJECT).err().unwrap().to_string();
        assert!(error.starts_with("missing CAP_PERFMON:"), "{error}");
    });
}

#[test]
fn without_a_bpffs_the_error_says_how_to_mount_one() {
    in_namespaces("no bpffs", |folder| {
        let mut edge = edge(folder, Hook::Tc, &["in"]);
        edge.pin_path = folder.join("elsewhere/edge");
        let error = Datapath::open(&edge, EBPF_OBJECT).err().unwrap().to_string();
        assert!(error.contains("mount -t bpf bpf /sys/fs/bpf"), "{error}");
        assert!(!edge.pin_path.exists());
    });
}

#[test]
fn the_seed_is_made_once_and_kept_from_other_users() {
    in_namespaces("seed", |folder| {
        use std::os::unix::fs::PermissionsExt as _;
        let edge = edge(folder, Hook::Tc, &["in"]);
        let seed = open(&edge).seed().unwrap();
        assert_ne!(seed, [0, 0]);
        assert_eq!(open(&edge).seed().unwrap(), seed);
        let file = edge.state_dir.join("seed");
        assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
        let error = Datapath::open(&edge, EBPF_OBJECT).err().unwrap().to_string();
        assert!(error.contains("secret"), "{error}");
    });
}

#[test]
fn another_table_size_keeps_the_table_and_says_so() {
    in_namespaces("table size", |folder| {
        let mut edge = edge(folder, Hook::Tc, &["in"]);
        assert!(open(&edge).notes().is_empty());
        edge.tables.established = 8192;
        let datapath = open(&edge);
        assert_eq!(datapath.writes(), 0);
        assert!(datapath.notes()[0].contains("ESTABLISHED keeps its 4096 entries"), "{:?}", datapath.notes());
    });
}

/// BGP for tests: remembers.
#[derive(Default)]
struct Announcements(BTreeMap<IpNet, PathAttributes>);

impl AnnouncementPort for Announcements {
    fn announced(&self) -> BTreeMap<IpNet, PathAttributes> {
        self.0.clone()
    }

    fn announce(&mut self, prefix: IpNet, attributes: &PathAttributes) -> Result<(), PortError> {
        self.0.insert(prefix, attributes.clone());
        Ok(())
    }

    fn withdraw(&mut self, prefix: IpNet) -> Result<(), PortError> {
        self.0.remove(&prefix);
        Ok(())
    }
}

fn desired(backends: &[&str]) -> Arc<DesiredState> {
    let address: IpAddr = "172.16.1.88".parse().unwrap();
    let frontend = Frontend { address: SocketAddr::new(address, 8443), protocol: Protocol::Tcp };
    let backend = |text: &&str| DesiredBackend {
        address: text.parse().unwrap(),
        weight: 1,
        limit: None,
        share: 100,
        tier: Tier::Primary,
        excluded: None,
        facts: edge_ctl::desired::Facts::favourable("dns"),
        node: None,
        source: "dns",
        snat_address: Some(address),
    };
    let service = DesiredFrontend {
        service: "ingress-https".to_owned(),
        mode: Mode::FullNat,
        balance: Balance::Maglev,
        selection: Selection::default(),
        snat: Snat::default(),
        protection: Protection::default(),
        timeouts: Timeouts::of(Protocol::Tcp),
        panic: None,
        pool: Some(backends.iter().map(backend).collect()),
        announced: Announced::Yes,
        dedicated: false,
    };
    Arc::new(DesiredState {
        frontends: BTreeMap::from([(frontend, service.into())]),
        announcements: BTreeMap::from([(address.into(), PathAttributes::default())]),
        addresses: [address].into(),
        ..DesiredState::default()
    })
}

fn fill(members: &[PoolMember], _: TableShape) -> Arc<[u16]> {
    let members = u16::try_from(members.len()).unwrap();
    (0..1021).map(|slot: u16| slot.checked_rem(members).unwrap_or(0)).collect()
}

fn reconciler(datapath: &Datapath) -> Reconciler<Maps, Announcements> {
    let port = datapath.port().unwrap();
    Reconciler::new(port, Announcements::default(), Box::new(fill), Intervals::default()).unwrap()
}

#[test]
fn what_the_reconciler_wrote_is_found_again_by_the_next_one_which_writes_nothing() {
    in_namespaces("reconciler", |folder| {
        let edge = edge(folder, Hook::Tc, &["in"]);
        let datapath = open(&edge);
        let wanted = desired(&["10.1.0.4:443", "10.1.1.5:443"]);
        let mut first = reconciler(&datapath);
        first.round(&wanted);
        assert_eq!(first.status().error, None);
        assert!(first.status().map_writes > 10);
        let written = first.status().state.clone();

        let mut second = reconciler(&open(&edge));
        assert_eq!(second.adopted().values().map(Vec::len).collect::<Vec<_>>(), [2]);
        second.round(&wanted);
        assert_eq!((second.status().map_writes, second.status().error.clone()), (0, None));
        let read = second.status().state.clone();
        assert_eq!((&read.services, &read.backends), (&written.services, &written.backends));
        assert_eq!((&read.index, &read.regions, &read.filter), (&written.index, &written.regions, &written.filter));

        let view = KernelView::open(&edge.pin_path, quick()).unwrap();
        let services = view.service_rows().unwrap();
        assert_eq!((services[0].name.as_str(), services[0].backends.as_str()), ("ingress-https", "2/2"));
        assert_eq!(services[0].vip, "172.16.1.88:8443");
        let backends: Vec<_> =
            view.backend_rows().unwrap().into_iter().map(|(_, row)| (row.backend, row.state)).collect();
        assert_eq!(backends, [("10.1.0.4:443".into(), "up".into()), ("10.1.1.5:443".into(), "up".into())]);
        for map in name::ALL {
            view.dump(map, 5).unwrap();
        }
        assert_eq!(view.dump("backends", 5).unwrap().len(), 2);
        assert!(view.dump("nonsense", 5).is_err());
        let rows = view.map_rows().unwrap();
        assert_eq!(rows.len(), name::ALL.len() + name::DAEMON.len());
        let index = rows.iter().find(|row| row.name == "SERVICE_INDEX").unwrap();
        assert_eq!((index.entries, index.key), (Some(1), 20));
        // Tries take memory with their entries only.
        assert!(rows.iter().all(|row| row.memory > 0 || row.name == "SOURCE_RANGES" && row.entries == Some(0)));
        assert!(rows.iter().all(|row| PathBuf::from(&row.pin).exists()));
    });
}

fn flow(port: u16, last_seen: u64) -> FlowV4 {
    let word = |address: [u8; 4]| u32::from_ne_bytes(address);
    let (client, vip, backend) = (word([192, 0, 2, 1]), word([172, 16, 1, 88]), word([10, 1, 0, 4]));
    FlowV4 {
        key: FlowKeyV4::new(client, vip, port.to_be(), 8443_u16.to_be(), TCP),
        new_src: vip,
        new_dst: backend,
        new_src_port: port.to_be(),
        new_dst_port: 443_u16.to_be(),
        service: 1,
        backend: 1,
        state: 2,
        last_seen,
        created: last_seen,
        ..FlowV4::default()
    }
}

fn reply(flow: &FlowV4, last_seen: u64) -> FlowV4 {
    FlowV4 {
        key: flow.twin(),
        new_src: flow.key.dst,
        new_dst: flow.key.src,
        new_src_port: flow.key.dst_port,
        new_dst_port: flow.key.src_port,
        direction: 1,
        last_seen,
        ..*flow
    }
}

fn table<K: aya::Pod>(datapath: &Datapath) -> HashMap<MapData, K, FlowV4> {
    pins::open(datapath.pins(), name::ESTABLISHED).unwrap()
}

#[test]
fn the_sweep_ends_flows_whose_both_halves_are_idle_and_keeps_active_exact() {
    in_namespaces("sweep", |folder| {
        let edge = edge(folder, Hook::Tc, &["in"]);
        let datapath = open(&edge);
        reconciler(&datapath).round(&desired(&["10.1.0.4:443"]));
        // The machine may be younger than a real timeout.
        let mut services: Array<MapData, ServiceEntry> = pins::open(datapath.pins(), name::SERVICES).unwrap();
        let entry = ServiceEntry { established_timeout: 1, ..services.get(&1, 0).unwrap() };
        services.set(1, entry, 0).unwrap();
        let now = sys::monotonic_ns();
        let (idle, busy) = (now.saturating_sub(5_000_000_000), now + 60_000_000_000);
        let mut established = table::<FlowKeyV4>(&datapath);
        let mut insert = |flow: FlowV4, twin: FlowV4| {
            established.insert(flow.key, flow, 0).unwrap();
            established.insert(twin.key, twin, 0).unwrap();
        };
        for port in 1000..1100 {
            insert(flow(port, idle), reply(&flow(port, idle), idle));
        }
        let kept = [(flow(2000, idle), busy), (flow(2001, busy), idle)];
        for (flow, reply_seen) in kept {
            insert(flow, reply(&flow, reply_seen));
        }
        for map in [name::SERVICE_STATS, name::BACKEND_STATS] {
            let mut stats: PerCpuArray<MapData, ServiceStats> = pins::open(datapath.pins(), map).unwrap();
            let mut values: Vec<_> = stats.get(&1, 0).unwrap().iter().copied().collect();
            values[0] = ServiceStats { opened: 110, closed: 3, ..ServiceStats::default() };
            stats.set(1, PerCpuValues::try_from(values).unwrap(), 0).unwrap();
        }
        let mut sweeper = datapath.sweeper().unwrap();
        let (mut expired, mut steps) = (0, 0);
        loop {
            let report = sweeper.step(32).unwrap();
            (expired, steps) = (expired + report.expired, steps + 1);
            if report.finished {
                break;
            }
            assert!(steps < 1000);
        }
        assert_eq!(expired, 100);
        assert!(steps > 1, "bounded steps");
        assert!(kept.iter().all(|(flow, _)| established.get(&flow.key, 0).is_ok()));
        assert_eq!(established.iter().count(), 4);
        // 110 opened, 3 closed, 100 expired leaves 7; two were seen, and nothing moved: the counters are set right.
        let of = NumberSets { services: [1].into(), backends: [1].into() };
        let counts = datapath.port().unwrap().flow_counts(&of).unwrap();
        assert_eq!((counts.services[&1], counts.backends[&1]), (2, 2));
        let view = datapath.view().unwrap();
        assert_eq!(view.service_rows().unwrap()[0].active, 2);
        let flows = view.flow_rows(Some("ingress-https"), 10).unwrap();
        assert_eq!(flows.len(), 2);
        assert_eq!((flows[0].backend.as_str(), flows[0].vip.as_str()), ("10.1.0.4:443", "172.16.1.88:8443"));
        assert_eq!(view.flow_rows(None, 1).unwrap().len(), 1);
    });
}

#[test]
fn a_batch_walk_sees_every_entry_of_a_large_hash() {
    in_namespaces("batch", |folder| {
        let datapath = open(&edge(folder, Hook::Tc, &["in"]));
        let mut established = table::<FlowKeyV4>(&datapath);
        for port in 1..=3000 {
            let entry = flow(port, 1);
            established.insert(entry.key, entry, 0).unwrap();
        }
        assert_eq!(datapath.view().unwrap().tables().count(name::ESTABLISHED).unwrap(), 3000);
    });
}

#[test]
fn the_route_generation_moves_and_survives_a_restart() {
    in_namespaces("route generation", |folder| {
        let edge = edge(folder, Hook::Tc, &["in"]);
        let mut datapath = open(&edge);
        let generation = datapath.bump_route_generation().unwrap();
        assert_eq!(open(&edge).bump_route_generation().unwrap(), generation + 1);
    });
}
