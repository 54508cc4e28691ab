//! The kernel side in network namespaces of its own, checked with iproute2.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests may stop at the first broken assumption"
)]

use std::{
    collections::BTreeSet,
    fs::File,
    future::Future,
    net::IpAddr,
    os::fd::AsRawFd,
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use edge_ctl::{
    fib::{self, FibEvent, FibHandle, FibOptions, sysctl},
    model::{RouteSet, RouteUpdate},
};
use serde_json::Value;
use tokio::sync::mpsc;

/// How long a test waits for something that should happen.
const PATIENCE: Duration = Duration::from_secs(10);

/// Two namespaces joined by a veth pair: the edge at 172.31.0.1/24 on `up0`, the nodes .2 to .4 on `node0`.
struct Lab {
    edge: String,
    nodes: String,
}

impl Lab {
    /// `None`, said aloud, where namespaces cannot be made.
    fn new() -> Option<Self> {
        // SAFETY: geteuid cannot fail and touches no memory.
        #[allow(unsafe_code, reason = "no safe wrapper among our dependencies")]
        if unsafe { libc::geteuid() } != 0 {
            println!("SKIPPED {}: needs root", std::thread::current().name().unwrap_or("fib_netlink"));
            return None;
        }
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::SeqCst);
        let name = |role: &str| format!("fibt-{}-{number}-{role}", std::process::id());
        let lab = Self { edge: name("e"), nodes: name("n") };
        for namespace in [&lab.edge, &lab.nodes] {
            ip(&["netns", "add", namespace]);
            ip(&["-n", namespace, "link", "set", "lo", "up"]);
        }
        ip(&["-n", &lab.edge, "link", "add", "up0", "type", "veth", "peer", "name", "node0", "netns", &lab.nodes]);
        lab.edge(&["addr", "add", "172.31.0.1/24", "dev", "up0"]);
        lab.edge(&["addr", "add", "fd31::1/64", "dev", "up0", "nodad"]);
        for host in ["172.31.0.2/24", "172.31.0.3/24", "172.31.0.4/24"] {
            lab.nodes(&["addr", "add", host, "dev", "node0"]);
        }
        lab.nodes(&["link", "set", "node0", "up"]);
        lab.edge(&["link", "set", "up0", "up"]);
        Some(lab)
    }

    fn edge(&self, arguments: &[&str]) {
        ip(&[&["-n", &self.edge], arguments].concat());
    }

    fn nodes(&self, arguments: &[&str]) {
        ip(&[&["-n", &self.nodes], arguments].concat());
    }

    /// `ip -j ...` on the edge.
    fn json(&self, arguments: &[&str]) -> Vec<Value> {
        let text = ip(&[&["-n", &self.edge, "-j"], arguments].concat());
        serde_json::from_str(if text.trim().is_empty() { "[]" } else { &text }).unwrap()
    }

    /// Gateways of the BGP route to `prefix`; empty: there is none.
    fn gateways(&self, prefix: &str) -> Vec<String> {
        let family = if prefix.contains(':') { "-6" } else { "-4" };
        let routes = self.json(&[family, "route", "show", prefix, "proto", "bgp", "metric", "20"]);
        let mut gateways = Vec::new();
        for route in &routes {
            gateways.extend(route["gateway"].as_str().map(str::to_owned));
            let hops = route["nexthops"].as_array().into_iter().flatten();
            gateways.extend(hops.filter_map(|hop| hop["gateway"].as_str().map(str::to_owned)));
        }
        gateways.sort();
        gateways
    }

    /// Runs `test` inside the edge's namespace, on a thread and runtime of its own.
    fn run<F: Future<Output = ()>>(&self, test: impl FnOnce(FibHandle, mpsc::Receiver<FibEvent>) -> F + Send) {
        self.run_with(FibOptions::default(), test);
    }

    fn run_with<F: Future<Output = ()>>(
        &self,
        options: FibOptions,
        test: impl FnOnce(FibHandle, mpsc::Receiver<FibEvent>) -> F + Send,
    ) {
        std::thread::scope(|scope| {
            let joined = scope.spawn(|| {
                enter(&self.edge);
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(async {
                    let (sender, events) = mpsc::channel(256);
                    let handle = fib::spawn(options, sender).await.unwrap();
                    test(handle, events).await;
                });
            });
            if let Err(panic) = joined.join() {
                std::panic::resume_unwind(panic);
            }
        });
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for namespace in [&self.edge, &self.nodes] {
            let _ = Command::new("ip").args(["netns", "del", namespace]).status();
        }
    }
}

fn ip(arguments: &[&str]) -> String {
    let output = Command::new("ip").args(arguments).output().unwrap();
    assert!(output.status.success(), "ip {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[allow(unsafe_code, reason = "setns has no safe wrapper among our dependencies")]
fn enter(namespace: &str) {
    let file = File::open(format!("/run/netns/{namespace}")).unwrap();
    // SAFETY: the descriptor is open, and setns changes the calling thread only.
    let result = unsafe { libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) };
    assert_eq!(result, 0, "setns: {}", std::io::Error::last_os_error());
}

/// Leaves the calling thread these capabilities and no others.
#[allow(unsafe_code, reason = "capset has no safe wrapper among our dependencies")]
fn keep_capabilities(mask: u32) {
    const VERSION_3: u32 = 0x2008_0522;
    let header = [VERSION_3, 0];
    // Effective, permitted, inheritable; twice, for the low and the high half.
    let data = [mask, mask, 0, 0, 0, 0];
    // SAFETY: both arrays have the layout of version 3 (capget(2)), live through the call, and pid 0 is this thread.
    let result = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), data.as_ptr()) };
    assert_eq!(result, 0, "capset: {}", std::io::Error::last_os_error());
}

fn update(prefix: &str, hops: &[&str]) -> RouteUpdate {
    RouteUpdate {
        prefix: prefix.parse().unwrap(),
        next_hops: hops.iter().map(|hop| hop.parse().unwrap()).collect(),
        internal: false,
    }
}

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let waiting = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, waiting).await.unwrap_or_else(|_| panic!("never: {what}"));
}

async fn event(events: &mut mpsc::Receiver<FibEvent>, wanted: impl Fn(&FibEvent) -> bool) -> FibEvent {
    let waiting = async {
        loop {
            let event = events.recv().await.expect("the actor lives");
            if wanted(&event) {
                return event;
            }
        }
    };
    tokio::time::timeout(PATIENCE, waiting).await.expect("the event")
}

#[test]
fn routes_are_installed_replaced_multipathed_and_withdrawn() {
    let Some(lab) = Lab::new() else { return };
    lab.run(async |fib, _events| {
        fib.apply(vec![
            update("10.1.0.0/24", &["172.31.0.2"]),
            update("10.1.1.0/24", &["172.31.0.2", "172.31.0.3"]),
            update("fd10::/64", &["fd31::2", "fd31::3"]),
        ])
        .await;
        assert_eq!(lab.gateways("10.1.0.0/24"), ["172.31.0.2"]);
        assert_eq!(lab.gateways("10.1.1.0/24"), ["172.31.0.2", "172.31.0.3"]);
        assert_eq!(lab.gateways("fd10::/64"), ["fd31::2", "fd31::3"]);

        fib.apply(vec![
            update("10.1.0.0/24", &["172.31.0.4"]),
            update("10.1.1.0/24", &["172.31.0.3"]),
            update("fd10::/64", &["fd31::4"]),
        ])
        .await;
        assert_eq!(lab.gateways("10.1.0.0/24"), ["172.31.0.4"]);
        assert_eq!(lab.gateways("10.1.1.0/24"), ["172.31.0.3"]);
        assert_eq!(lab.gateways("fd10::/64"), ["fd31::4"]);
        let rows = fib.routes().await;
        let row = rows.iter().find(|row| row.prefix == "10.1.0.0/24").unwrap();
        assert_eq!((row.code.as_str(), row.installed), ("B", true));
        assert_eq!(row.next_hops, ["via 172.31.0.4 dev up0"]);
        assert!(rows.iter().any(|row| row.code == "C" && row.prefix == "172.31.0.0/24"));

        fib.apply(vec![update("10.1.0.0/24", &[]), update("10.1.1.0/24", &[]), update("fd10::/64", &[])]).await;
        for prefix in ["10.1.0.0/24", "10.1.1.0/24", "fd10::/64"] {
            assert_eq!(lab.gateways(prefix), Vec::<String>::new(), "{prefix}");
        }
        assert_eq!(fib.status().await.errors.len(), 0);
    });
}

#[test]
fn the_same_routes_again_write_nothing() {
    let Some(lab) = Lab::new() else { return };
    lab.run(async |fib, _events| {
        let routes = vec![update("10.1.0.0/24", &["172.31.0.2", "172.31.0.3"]), update("fd10::/64", &["fd31::2"])];
        fib.apply(routes.clone()).await;
        let writes = fib.status().await.route_writes;
        fib.apply(routes).await;
        assert_eq!((writes, fib.status().await.route_writes), (2, 2));
    });
}

#[test]
fn a_restart_keeps_stale_routes_until_bgp_has_converged_and_then_sweeps_the_others() {
    let Some(lab) = Lab::new() else { return };
    let kept = [update("10.1.0.0/24", &["172.31.0.2", "172.31.0.3"]), update("fd10::/64", &["fd31::2", "fd31::3"])];
    lab.run(async |fib, _events| {
        fib.apply([kept.to_vec(), vec![update("10.1.9.0/24", &["172.31.0.3"])]].concat()).await;
    });
    lab.run(async |fib, _events| {
        let stale = fib.stale().await;
        assert_eq!(stale.len(), 3);
        assert_eq!(stale.get(&"10.1.9.0/24".parse().unwrap()), Some(&[address("172.31.0.3")][..]));
        fib.apply(kept.to_vec()).await;
        assert_eq!(lab.gateways("10.1.9.0/24"), ["172.31.0.3"], "kept while BGP has not converged");

        let mut converged = RouteSet::default();
        for route in kept.clone() {
            converged.apply(route);
        }
        fib.finish_restart(&converged).await;
        assert_eq!(lab.gateways("10.1.9.0/24"), Vec::<String>::new());
        assert_eq!(lab.gateways("10.1.0.0/24"), ["172.31.0.2", "172.31.0.3"]);
        let status = fib.status().await;
        assert_eq!((status.route_writes, status.stale), (1, 0), "nothing but the sweep was written");
    });
}

#[test]
fn a_route_deleted_or_changed_by_hand_is_repaired_and_reported() {
    let Some(lab) = Lab::new() else { return };
    lab.run(async |fib, mut events| {
        fib.apply(vec![update("10.1.0.0/24", &["172.31.0.2"]), update("10.1.1.0/24", &["172.31.0.3"])]).await;
        lab.edge(&["route", "del", "10.1.0.0/24", "proto", "bgp"]);
        let prefix = "10.1.0.0/24".parse().unwrap();
        event(&mut events, |event| *event == FibEvent::ForeignChange { prefix }).await;
        assert_eq!(lab.gateways("10.1.0.0/24"), ["172.31.0.2"]);

        lab.edge(&["route", "replace", "10.1.1.0/24", "via", "172.31.0.4", "proto", "bgp", "metric", "20"]);
        let prefix = "10.1.1.0/24".parse().unwrap();
        event(&mut events, |event| *event == FibEvent::ForeignChange { prefix }).await;
        assert_eq!(lab.gateways("10.1.1.0/24"), ["172.31.0.3"]);
        assert_eq!(fib.status().await.repairs, 2);
    });
}

/// What iproute2 sends to flush a route that names an object the kernel refuses, so that such a flush leaves them alone.
#[test]
fn routes_that_name_their_gateways_come_back_after_a_flush() {
    let Some(lab) = Lab::new() else { return };
    lab.run_with(FibOptions { next_hops: fib::NextHopStyle::Inline, ..FibOptions::default() }, async |fib, _events| {
        fib.apply(vec![update("10.1.0.0/24", &["172.31.0.2"]), update("10.1.1.0/24", &["172.31.0.3"])]).await;
        assert_eq!((objects(&lab).len(), fib.status().await.objects), (0, fib::ObjectCounts::default()));
        lab.edge(&["route", "flush", "proto", "bgp"]);
        let both = || !lab.gateways("10.1.0.0/24").is_empty() && !lab.gateways("10.1.1.0/24").is_empty();
        until("both come back after a flush", both).await;
    });
}

#[test]
fn routes_lost_with_the_link_or_the_address_come_back_with_it() {
    let Some(lab) = Lab::new() else { return };
    lab.run(async |fib, mut events| {
        fib.apply(vec![update("10.1.0.0/24", &["172.31.0.2"])]).await;
        let is_link = |up: bool| move |event: &FibEvent| matches!(event, FibEvent::LinkChanged { name, up: now, .. } if name == "up0" && *now == up);
        lab.edge(&["link", "set", "up0", "down"]);
        event(&mut events, is_link(false)).await;
        until("the route goes with the link", || lab.gateways("10.1.0.0/24").is_empty()).await;
        let status = fib.status().await;
        let error = &status.errors[&"10.1.0.0/24".parse().unwrap()];
        assert!(error.contains("172.31.0.2"), "{error}");
        lab.edge(&["link", "set", "up0", "up"]);
        event(&mut events, is_link(true)).await;
        until("the route comes back", || lab.gateways("10.1.0.0/24") == ["172.31.0.2"]).await;

        lab.edge(&["addr", "del", "172.31.0.1/24", "dev", "up0"]);
        event(&mut events, |event| *event == FibEvent::AddressChanged).await;
        until("the route goes with the address", || lab.gateways("10.1.0.0/24").is_empty()).await;
        lab.edge(&["addr", "add", "172.31.0.1/24", "dev", "up0"]);
        until("the route comes back", || lab.gateways("10.1.0.0/24") == ["172.31.0.2"]).await;
        assert_eq!(fib.status().await.errors.len(), 0);
    });
}

#[test]
fn a_next_hop_off_the_link_is_named_and_the_others_are_used() {
    let Some(lab) = Lab::new() else { return };
    lab.run(async |fib, _events| {
        fib.apply(vec![update("10.1.0.0/24", &["172.31.0.2", "192.0.2.9"]), update("10.1.1.0/24", &["192.0.2.9"])])
            .await;
        assert_eq!(lab.gateways("10.1.0.0/24"), ["172.31.0.2"]);
        let status = fib.status().await;
        assert_eq!(status.errors.len(), 2);
        assert!(status.errors.values().all(|error| error.contains("192.0.2.9")));
        let rows = fib.routes().await;
        for prefix in ["10.1.0.0/24", "10.1.1.0/24"] {
            assert!(!rows.iter().find(|row| row.prefix == prefix).unwrap().installed, "{prefix}");
        }
    });
}

#[test]
fn kernel_prefixes_are_connected_and_static_ones_and_their_changes_are_reported() {
    let Some(lab) = Lab::new() else { return };
    lab.run(async |fib, mut events| {
        fib.apply(vec![update("10.1.0.0/24", &["172.31.0.2"])]).await;
        lab.edge(&["route", "add", "default", "via", "172.31.0.2"]);
        lab.edge(&["route", "add", "10.9.0.0/16", "via", "172.31.0.3"]);
        event(&mut events, |event| *event == FibEvent::RoutesChanged).await;
        let expected = [("10.9.0.0/16", Some("172.31.0.3")), ("172.31.0.0/24", None)]
            .map(|(prefix, gateway)| (prefix.parse().unwrap(), gateway.map(address)));
        let found = async || {
            let prefixes = fib.kernel_prefixes().await;
            prefixes.into_iter().filter(|(prefix, _)| prefix.addr().is_ipv4()).collect::<Vec<_>>()
        };
        let mut seen = found().await;
        while seen != expected {
            // The two routes may have been reported one by one.
            event(&mut events, |event| *event == FibEvent::RoutesChanged).await;
            seen = found().await;
        }
    });
}

#[test]
fn a_vip_is_held_on_lo_restored_and_released_but_never_taken_from_its_owner() {
    let Some(lab) = Lab::new() else { return };
    let on_lo = |vip: &str| {
        lab.json(&["addr", "show", "dev", "lo"])
            .iter()
            .flat_map(|link| link["addr_info"].as_array().unwrap().clone())
            .any(|info| info["local"] == vip && [32, 128].contains(&info["prefixlen"].as_u64().unwrap()))
    };
    lab.run(async |fib, _events| {
        for vip in ["192.0.2.10", "2001:db8::10", "172.31.0.1"] {
            fib.hold_vip(address(vip)).await.unwrap();
        }
        assert!(on_lo("192.0.2.10") && on_lo("2001:db8::10"));
        assert!(!on_lo("172.31.0.1"), "up0 has it already");
        assert!(fib.local_addresses().await.contains(&address("192.0.2.10")));
        lab.edge(&["addr", "del", "192.0.2.10/32", "dev", "lo"]);
        until("the VIP is restored", || on_lo("192.0.2.10")).await;
        fib.release_vip(address("172.31.0.1")).await.unwrap();
        assert!(fib.local_addresses().await.contains(&address("172.31.0.1")));
    });
    lab.run(async |fib, _events| {
        let held = BTreeSet::from([address("192.0.2.10"), address("2001:db8::10")]);
        assert_eq!(fib.status().await.held, held, "known by its mark after a restart");
        for vip in held {
            fib.release_vip(vip).await.unwrap();
        }
        assert!(!on_lo("192.0.2.10") && !on_lo("2001:db8::10"));
    });
}

#[test]
fn the_source_towards_a_backend_is_the_kernels_choice() {
    let Some(lab) = Lab::new() else { return };
    lab.edge(&["addr", "add", "172.31.0.77/24", "dev", "up0"]);
    lab.edge(&["route", "add", "10.9.0.0/16", "via", "172.31.0.3", "src", "172.31.0.77"]);
    lab.run(async |fib, _events| {
        fib.apply(vec![update("10.1.0.0/24", &["172.31.0.2"])]).await;
        assert_eq!(fib.source_for(address("10.1.0.4")).await, Some(address("172.31.0.1")));
        assert_eq!(fib.source_for(address("10.9.0.4")).await, Some(address("172.31.0.77")));
        assert_eq!(fib.source_for(address("203.0.113.1")).await, None);
    });
}

#[test]
fn watched_neighbours_are_resolved_kept_and_reported_when_their_address_changes() {
    let Some(lab) = Lab::new() else { return };
    lab.run(async |fib, mut events| {
        let links = fib.links().await;
        let (ifindex, _) = links.iter().find(|(_, link)| link.name == "up0").map(|(index, link)| (*index, link)).unwrap();
        fib.apply(vec![update("10.1.0.0/24", &["172.31.0.2"])]).await;
        fib.watch_neighbours(BTreeSet::from([(ifindex, address("172.31.0.2"))])).await;
        let resolved = |wanted: &'static str| {
            move |event: &FibEvent| {
                matches!(event, FibEvent::NeighbourChanged { address, mac: Some(_), .. } if *address == self::address(wanted))
            }
        };
        event(&mut events, resolved("172.31.0.2")).await;
        let entry = &lab.json(&["neigh", "show", "172.31.0.2"])[0];
        assert!(entry["lladdr"].is_string(), "{entry}");
        assert!(entry.get("managed").is_some(), "kept by the kernel from 5.16 on: {entry}");
        fib.watch_neighbours(BTreeSet::new()).await;
        let entry = &lab.json(&["neigh", "show", "172.31.0.2"])[0];
        assert!(entry.get("managed").is_none(), "given back: {entry}");

        // A backend behind a gateway that nobody watches.
        fib.apply(vec![update("10.1.1.0/24", &["172.31.0.3"])]).await;
        fib.resolve(vec![address("10.1.1.4")]).await;
        event(&mut events, resolved("172.31.0.3")).await;

        lab.edge(&["neigh", "replace", "172.31.0.3", "lladdr", "02:00:00:00:00:99", "dev", "up0"]);
        let changed = FibEvent::NeighbourChanged {
            ifindex,
            address: address("172.31.0.3"),
            mac: Some([2, 0, 0, 0, 0, 0x99]),
        };
        event(&mut events, |event| *event == changed).await;
        fib.watch_neighbours(BTreeSet::from([(ifindex, address("172.31.0.3"))])).await;
        let entry = &lab.json(&["neigh", "show", "172.31.0.3"])[0];
        assert_eq!(entry["state"][0], "PERMANENT", "a static entry is left alone: {entry}");
    });
}

#[test]
fn cap_net_admin_alone_is_enough_and_its_absence_is_named() {
    let Some(lab) = Lab::new() else { return };
    let try_with = |capabilities: u32| {
        let mut errors = Vec::new();
        std::thread::scope(|scope| {
            let work = || {
                enter(&lab.edge);
                keep_capabilities(capabilities);
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(async {
                    let (sender, _events) = mpsc::channel(256);
                    let fib = fib::spawn(FibOptions::default(), sender).await.unwrap();
                    fib.apply(vec![update("10.1.0.0/24", &["172.31.0.2"])]).await;
                    errors.extend(fib.status().await.errors.into_values());
                    errors.extend(fib.hold_vip(address("192.0.2.10")).await.err().map(|error| error.to_string()));
                    assert_eq!(fib.source_for(address("172.31.0.2")).await, Some(address("172.31.0.1")));
                });
            };
            if let Err(panic) = scope.spawn(work).join() {
                std::panic::resume_unwind(panic);
            }
        });
        errors
    };
    let refused = try_with(0);
    assert_eq!(refused.len(), 2);
    assert!(refused.iter().all(|error| error.contains("CAP_NET_ADMIN")), "{refused:?}");
    const CAP_NET_ADMIN: u32 = 12;
    assert_eq!(try_with(1 << CAP_NET_ADMIN), Vec::<String>::new());
    assert_eq!(lab.gateways("10.1.0.0/24"), ["172.31.0.2"]);
}

#[test]
fn ten_thousand_routes_go_in_and_out() {
    let Some(lab) = Lab::new() else { return };
    lab.run(async |fib, _events| {
        let prefix = |n: u32| format!("10.{}.{}.0/24", 100 + n / 256, n % 256);
        fib.apply((0..10_000).map(|n| update(&prefix(n), &["172.31.0.2"])).collect()).await;
        let installed = || lab.json(&["-4", "route", "show", "proto", "bgp"]).len();
        assert_eq!(installed(), 10_000);
        fib.apply((0..10_000).map(|n| update(&prefix(n), &[])).collect()).await;
        assert_eq!(installed(), 0);
        assert_eq!(fib.status().await.errors.len(), 0);
    });
}

#[test]
fn settings_that_drop_full_nat_packets_are_found_and_their_fix_works() {
    let Some(lab) = Lab::new() else { return };
    std::thread::scope(|scope| {
        let work = || {
            enter(&lab.edge);
            let set = |setting: &str| {
                assert!(Command::new("sysctl").args(["-qw", setting]).status().unwrap().success(), "{setting}");
            };
            for setting in ["net.ipv4.ip_forward=0", "net.ipv4.conf.all.rp_filter=1", "net.ipv4.conf.up0.rp_filter=0"] {
                set(setting);
            }
            let interfaces = ["up0".to_owned()];
            let problems = sysctl::check(&interfaces, true, false);
            let keys: Vec<&str> = problems.iter().map(|problem| problem.key.as_str()).collect();
            assert_eq!(keys, ["net.ipv4.ip_forward", "net.ipv4.conf.up0.rp_filter", "net.ipv4.conf.up0.accept_local"]);
            for problem in problems {
                set(problem.fix.strip_prefix("sysctl -w ").unwrap());
            }
            assert_eq!(sysctl::check(&interfaces, true, false), []);
        };
        if let Err(panic) = scope.spawn(work).join() {
            std::panic::resume_unwind(panic);
        }
    });
}

#[test]
fn an_ipv4_route_goes_by_an_ipv6_neighbour_alone_and_beside_an_ipv4_one() {
    let Some(lab) = &Lab::new() else { return };
    lab.nodes(&["addr", "add", "fd31::2/64", "dev", "node0", "nodad"]);
    lab.run(async |handle, _events| {
        handle
            .apply(vec![update("10.1.2.0/24", &["fd31::2"]), update("10.1.3.0/24", &["172.31.0.2", "fd31::2"])])
            .await;
        let shown = || lab.json(&["-4", "route", "show", "proto", "bgp"]);
        let texts = || shown().iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
        until("both routes", || texts().matches("fd31::2").count() == 2).await;
        assert!(texts().contains("172.31.0.2") && texts().contains("inet6"), "{}", texts());
        // What is read back is what was wanted: nothing is missing and nothing is written again.
        let status = handle.status().await;
        assert!(status.errors.is_empty() && status.route_writes == 2 && status.repairs == 0, "{status:?}");
        handle.apply(vec![update("10.1.2.0/24", &[]), update("10.1.3.0/24", &[])]).await;
        until("no routes", || shown().is_empty()).await;
    });
}

/// `ip -j nexthop show` of ours: number, and the gateway or the members.
fn objects(lab: &Lab) -> Vec<Value> {
    // By number: iproute2 knows the name since 6.2.
    lab.json(&["nexthop", "show", "proto", "186"])
}

fn gateways_of_objects(lab: &Lab) -> Vec<String> {
    let mut gateways: Vec<String> =
        objects(lab).iter().filter_map(|object| object["gateway"].as_str().map(str::to_owned)).collect();
    gateways.sort();
    gateways
}

/// Members of every group, by number.
fn groups(lab: &Lab) -> Vec<(u64, Vec<u64>)> {
    let group = |object: &Value| {
        let members = object["group"].as_array()?.iter().filter_map(|member| member["id"].as_u64()).collect();
        Some((object["id"].as_u64()?, members))
    };
    objects(lab).iter().filter_map(group).collect()
}

/// The number of the object that the BGP route to `prefix` names.
fn named_by(lab: &Lab, prefix: &str) -> Option<u64> {
    let family = if prefix.contains(':') { "-6" } else { "-4" };
    lab.json(&[family, "route", "show", prefix, "proto", "bgp"]).first()?["nhid"].as_u64()
}

#[test]
fn every_node_is_one_next_hop_object_that_all_its_routes_name_and_goes_with_the_last_of_them() {
    let Some(lab) = Lab::new() else { return };
    // Somebody else's objects, one with a gateway of ours.
    lab.edge(&["nexthop", "add", "id", "7", "via", "172.31.0.2", "dev", "up0"]);
    lab.edge(&["nexthop", "add", "id", "3983409152", "blackhole"]);
    lab.run(async |fib, _events| {
        let all = [
            update("10.1.0.0/24", &["172.31.0.2"]),
            update("10.1.1.0/24", &["172.31.0.2"]),
            update("10.1.2.0/24", &["172.31.0.2", "172.31.0.3"]),
            update("10.1.3.0/24", &["172.31.0.3", "172.31.0.2"]),
            update("fd10::/64", &["fd31::2", "fd31::3"]),
        ];
        fib.apply(all.to_vec()).await;
        assert_eq!(gateways_of_objects(&lab), ["172.31.0.2", "172.31.0.3", "fd31::2", "fd31::3"]);
        assert_eq!((groups(&lab).len(), fib.status().await.errors.len()), (2, 0));
        assert_eq!(fib.status().await.objects, fib::ObjectCounts { hops: 4, groups: 2 });
        let one = named_by(&lab, "10.1.0.0/24");
        assert!(one.is_some_and(|id| id != 7 && id != 3_983_409_152), "not another's: {one:?}");
        assert_eq!(one, named_by(&lab, "10.1.1.0/24"));
        assert_eq!(named_by(&lab, "10.1.2.0/24"), named_by(&lab, "10.1.3.0/24"));
        assert_eq!(lab.gateways("10.1.2.0/24"), ["172.31.0.2", "172.31.0.3"]);
        assert_eq!(lab.gateways("fd10::/64"), ["fd31::2", "fd31::3"]);
        let route = fib.route_to(address("10.1.0.9")).await.unwrap();
        assert_eq!(route.gateway, Some(address("172.31.0.2")));

        fib.apply(vec![update("10.1.2.0/24", &[]), update("10.1.3.0/24", &[]), update("fd10::/64", &[])]).await;
        // The next comparison, which somebody else's change brings about, deletes what nothing uses.
        lab.edge(&["nexthop", "add", "id", "8", "blackhole"]);
        until("the others to go", || gateways_of_objects(&lab) == ["172.31.0.2"] && groups(&lab).is_empty()).await;
        assert_eq!(named_by(&lab, "10.1.0.0/24"), one);
        for id in ["7", "8", "3983409152"] {
            lab.edge(&["nexthop", "show", "id", id]);
        }
    });
}

#[test]
fn routes_and_objects_come_back_after_a_flush_of_the_objects_and_are_found_again_after_a_restart() {
    let Some(lab) = Lab::new() else { return };
    let routes = [update("10.1.0.0/24", &["172.31.0.2"]), update("10.1.1.0/24", &["172.31.0.2", "172.31.0.3"])];
    let back =
        || named_by(&lab, "10.1.0.0/24").is_some() && lab.gateways("10.1.1.0/24") == ["172.31.0.2", "172.31.0.3"];
    lab.run(async |fib, _events| {
        fib.apply(routes.to_vec()).await;
        assert!(back());
        lab.edge(&["nexthop", "flush"]);
        until("both routes by objects again", || back() && groups(&lab).len() == 1).await;
        // A member that is deleted leaves its group, and the group's routes.
        let id = named_by(&lab, "10.1.0.0/24").unwrap().to_string();
        lab.edge(&["nexthop", "del", "id", &id]);
        until("the member again", || back() && groups(&lab).iter().any(|(_, members)| members.len() == 2)).await;
        lab.edge(&["link", "set", "up0", "down"]);
        until("all to go with the link", || objects(&lab).is_empty()).await;
        lab.edge(&["link", "set", "up0", "up"]);
        until("both routes with the link", back).await;
        // Left behind by an earlier life.
        fib.apply(vec![update("10.1.8.0/24", &["172.31.0.4"])]).await;
    });
    let before: Vec<Option<u64>> = ["10.1.0.0/24", "10.1.1.0/24"].map(|prefix| named_by(&lab, prefix)).into();
    lab.run(async |fib, _events| {
        fib.apply(routes.to_vec()).await;
        fib.apply(vec![update("10.1.2.0/24", &["172.31.0.3", "172.31.0.2"])]).await;
        assert_eq!(fib.status().await.route_writes, 1);
        assert_eq!(named_by(&lab, "10.1.2.0/24"), before[1], "the group that was there");
        let mut converged = RouteSet::default();
        for route in routes.clone() {
            converged.apply(route);
        }
        fib.finish_restart(&converged).await;
        lab.edge(&["nexthop", "add", "id", "8", "blackhole"]);
        until("the stale node to go", || gateways_of_objects(&lab) == ["172.31.0.2", "172.31.0.3"]).await;
        let after: Vec<Option<u64>> = ["10.1.0.0/24", "10.1.1.0/24"].map(|prefix| named_by(&lab, prefix)).into();
        assert_eq!(after, before);
    });
}

#[test]
fn a_resilient_group_keeps_the_buckets_of_the_members_that_stay() {
    let Some(lab) = Lab::new() else { return };
    let options = FibOptions { next_hops: fib::NextHopStyle::Resilient, ..FibOptions::default() };
    lab.run_with(options, async |fib, _events| {
        fib.apply(vec![update("10.1.0.0/24", &["172.31.0.2", "172.31.0.3", "172.31.0.4"])]).await;
        let [(group, members)] = &groups(&lab)[..] else { panic!("{:?}", objects(&lab)) };
        assert_eq!((members.len(), named_by(&lab, "10.1.0.0/24")), (3, Some(*group)));
        let buckets = || -> Vec<u64> {
            let all = lab.json(&["nexthop", "bucket", "show", "id", &group.to_string()]);
            all.iter().filter_map(|bucket| bucket["bucket"]["nhid"].as_u64()).collect()
        };
        let before = buckets();
        assert_eq!(before.len(), 128, "{:?}", lab.json(&["nexthop", "bucket", "show"]));
        fib.apply(vec![update("10.1.0.0/24", &["172.31.0.2", "172.31.0.4"])]).await;
        let after = buckets();
        assert_eq!((groups(&lab).len(), named_by(&lab, "10.1.0.0/24")), (1, Some(*group)), "the same group");
        let gone: Vec<u64> = before.iter().filter(|member| !after.contains(member)).copied().collect();
        assert!(!gone.is_empty() && gone.iter().all(|member| *member == gone[0]), "one member left: {gone:?}");
        let moved = before.iter().zip(&after).filter(|(before, after)| before != after && **before != gone[0]).count();
        assert_eq!(moved, 0, "flows by the members that stay keep their way");
        // Down to one and up again, it still is the same group.
        fib.apply(vec![update("10.1.0.0/24", &["172.31.0.4"])]).await;
        assert_eq!(lab.gateways("10.1.0.0/24"), ["172.31.0.4"]);
        fib.apply(vec![update("10.1.0.0/24", &["172.31.0.2", "172.31.0.4"])]).await;
        assert_eq!(named_by(&lab, "10.1.0.0/24"), Some(*group));
    });
}
