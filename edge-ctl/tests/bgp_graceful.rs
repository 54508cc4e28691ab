//! Graceful restart with real speakers: as their helper, and restarting ourselves without a goodbye.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first broken assumption")]

mod common;

use std::{
    process::{Child, Command},
    time::Duration,
};

use common::{
    bgp::{Edge, Lab, NODE, PATIENCE, config, peer, says},
    eventually,
    speakers::{Bird, Frr, ibgp, missing},
};
use edge_ctl::{
    bgp::{self, BgpEvent},
    config::valid,
    model::{PathAttributes, bgp_session::GracefulRestart, view::BgpPeerRow},
};
use tokio::sync::mpsc;

const VIP: &str = "10.9.0.1/32";

fn established(row: &BgpPeerRow) -> bool {
    row.state == "Established"
}

fn graceful(time: u64) -> valid::Peer {
    let mut graceful = peer(NODE, 64512);
    let settings = GracefulRestart { time: Duration::from_secs(time), ..GracefulRestart::default() };
    graceful.session.graceful_restart = Some(settings);
    graceful.session.connect_retry = Duration::from_secs(1);
    graceful
}

/// Lives as a speaker in the edge's namespace until it is killed, in a process of its own: started with the name of this
/// test alone and told by the environment what to do.
#[test]
fn helper_process_that_is_killed_without_a_goodbye() {
    let Ok(namespace) = std::env::var("EDGE_TEST_SPEAKER") else { return };
    let restarting = std::env::var_os("EDGE_TEST_RESTARTING").is_some();
    common::enter(&namespace);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (events, mut inbox) = mpsc::channel(16);
        let speaker = bgp::Speaker::bind(config([graceful(60)]), events).unwrap();
        let handle = if restarting { speaker.restarting() } else { speaker }.start();
        let mut announced = false;
        while let Some(event) = inbox.recv().await {
            // As the daemon does: what was announced before is announced again some time after the session is up.
            if matches!(event, BgpEvent::PeerUp { .. }) && !announced {
                announced = true;
                tokio::time::sleep(Duration::from_millis(1500)).await;
                handle.announce(VIP.parse().unwrap(), PathAttributes::default()).await;
                handle.restarted().await;
            }
        }
    });
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn speaker(lab: &Lab, restarting: bool) -> Killed {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "helper_process_that_is_killed_without_a_goodbye", "--nocapture"]);
    command.env("EDGE_TEST_SPEAKER", &lab.edge.name);
    if restarting {
        command.env("EDGE_TEST_RESTARTING", "1");
    }
    Killed(command.stdout(std::process::Stdio::null()).spawn().unwrap())
}

/// Asks without a pause; every answer must hold the VIP until the restarted speaker has ended its restart.
fn never_without(what: &str, vip: impl Fn() -> String, done: impl Fn() -> bool) {
    let shown = |answer: &str| answer.contains("10.9.0.1");
    eventually(what, PATIENCE, || {
        let answer = vip();
        assert!(shown(&answer), "{what}: the VIP was deleted while we were away: {answer}");
        if done() { Ok(()) } else { Err("the restart has not ended".to_owned()) }
    });
    assert!(shown(&vip()), "{what}: the VIP was deleted at the end of the restart");
}

#[test]
fn killed_and_restarted_inside_the_timer_no_route_is_deleted_at_bird() {
    if missing("killed_and_restarted_inside_the_timer_no_route_is_deleted_at_bird", &["bird", "birdc"]) {
        return;
    }
    let mut lab = Lab::new();
    lab.bird(&ibgp(NODE, "10.0.0.1", "connect delay time 1; connect retry time 1; error wait time 1, 1;"));
    let first = speaker(&lab, false);
    eventually("the VIP", PATIENCE, || {
        let answer = lab.birdc("show route 10.9.0.1/32");
        if answer.contains("10.0.0.1") { Ok(()) } else { Err(answer) }
    });
    drop(first);
    eventually("BIRD helps", PATIENCE, || {
        let answer = lab.birdc("show protocols all edge");
        if answer.contains("Neighbor graceful restart active") { Ok(()) } else { Err(answer) }
    });
    let second = speaker(&lab, true);
    let ended = || {
        let answer = lab.birdc("show protocols all edge");
        answer.contains("Established") && !answer.contains("Neighbor graceful restart active")
    };
    never_without("BIRD", || lab.birdc("show route 10.9.0.1/32"), ended);
    drop(second);
    // The counter-check: without a restart inside the timer the route goes.
    lab.birdc("disable edge");
    assert!(!lab.birdc("show route 10.9.0.1/32").contains("10.0.0.1"));
}

#[test]
fn killed_and_restarted_inside_the_timer_no_route_is_deleted_at_frr() {
    if missing("killed_and_restarted_inside_the_timer_no_route_is_deleted_at_frr", &["bgpd", "vtysh"]) {
        return;
    }
    let mut lab = Lab::new();
    lab.bgpd(
        "router bgp 64512\n bgp router-id 10.0.0.2\n bgp graceful-restart\n neighbor 10.0.0.1 remote-as 64512\n \
         neighbor 10.0.0.1 timers connect 1\nexit",
    );
    let first = speaker(&lab, false);
    let show = || lab.vtysh("show bgp ipv4 unicast 10.9.0.1/32");
    eventually("the VIP", PATIENCE, || if show().contains("10.0.0.1 from") { Ok(()) } else { Err(show()) });
    drop(first);
    eventually("FRR keeps it stale", PATIENCE, || if show().contains("stale") { Ok(()) } else { Err(show()) });
    let second = speaker(&lab, true);
    never_without("FRR", || show().replace("Network not in table", ""), || !show().contains("stale"));
    drop(second);
}

#[test]
fn a_killed_peer_that_comes_back_keeps_its_routes_and_loses_what_it_does_not_say_again() {
    if missing(
        "a_killed_peer_that_comes_back_keeps_its_routes_and_loses_what_it_does_not_say_again",
        &["bird", "birdc"],
    ) {
        return;
    }
    let mut lab = Lab::new();
    let options = "graceful restart on; graceful restart time 30; connect delay time 1; connect retry time 1;";
    let protocol = ibgp(NODE, "10.0.0.1", options);
    let extra = "protocol static more { ipv4; route 10.1.9.0/26 blackhole; }";
    lab.bird(&format!("{protocol}\n{extra}"));
    let namespace = lab.edge.clone();
    namespace.block_on(|| async {
        let mut edge = Edge::start(config([graceful(60)])).await;
        edge.until("three routes", |edge| edge.hops("10.1.9.0/26") == [NODE]).await;
        lab.kill();
        let row = edge.row_until(NODE, "stale routes", |row| row.pfx_stale > 0).await;
        assert!(row.stale.iter().any(|stale| stale.stage == "restarting" && stale.left <= 30), "{row:#?}");
        edge.until("the loss is told", |edge| edge.seen.iter().any(|event| matches!(event, BgpEvent::PeerDown { .. })))
            .await;
        for prefix in ["10.1.2.0/26", "10.1.3.0/26", "10.1.9.0/26", "fd01:2::/64"] {
            assert!(!edge.hops(prefix).is_empty(), "{prefix} while the peer is away");
        }
        // -R: BIRD recovers, and says that it has preserved its forwarding state.
        lab.bird_with(&protocol, &["-R"]);
        edge.until("the sweep", |edge| edge.hops("10.1.9.0/26").is_empty()).await;
        let row = edge.row_until(NODE, "nothing stale", |row| row.pfx_stale == 0 && established(row)).await;
        assert!(row.capabilities_received.iter().any(|shown| shown.contains("restarting")), "{row:#?}");
        for prefix in ["10.1.2.0/26", "10.1.3.0/26"] {
            assert_eq!(edge.hops(prefix), [NODE], "{prefix} was said again");
        }
    });
}

#[test]
fn a_killed_peer_that_stays_away_loses_its_routes_when_its_restart_time_is_over() {
    if missing("a_killed_peer_that_stays_away_loses_its_routes_when_its_restart_time_is_over", &["bird", "birdc"]) {
        return;
    }
    let mut lab = Lab::new();
    lab.bird(&ibgp(NODE, "10.0.0.1", "graceful restart on; graceful restart time 3; connect delay time 1;"));
    let namespace = lab.edge.clone();
    namespace.block_on(|| async {
        let mut edge = Edge::start(config([graceful(60)])).await;
        edge.until("the route", |edge| edge.hops("10.1.2.0/26") == [NODE]).await;
        lab.kill();
        edge.row_until(NODE, "stale routes", |row| row.pfx_stale > 0).await;
        let away = std::time::Instant::now();
        edge.until("no routes", |edge| edge.routes.is_empty()).await;
        assert!(away.elapsed() > Duration::from_secs(2), "before its restart time: {:?}", away.elapsed());
    });
}

#[test]
fn long_lived_routes_outlast_the_restart_time() {
    if missing("long_lived_routes_outlast_the_restart_time", &["bird", "birdc"]) {
        return;
    }
    let mut lab = Lab::new();
    let options = "graceful restart on; graceful restart time 2; long lived graceful restart on; \
                   long lived stale time 4; connect delay time 1;";
    lab.bird(&ibgp(NODE, "10.0.0.1", options));
    let namespace = lab.edge.clone();
    namespace.block_on(|| async {
        let mut patient = graceful(60);
        patient.session.graceful_restart.as_mut().unwrap().long_lived = Duration::from_secs(600);
        let mut edge = Edge::start(config([patient])).await;
        edge.until("the route", |edge| edge.hops("10.1.2.0/26") == [NODE]).await;
        lab.kill();
        let long = |row: &BgpPeerRow| row.stale.iter().any(|stale| stale.stage == "long-lived");
        edge.row_until(NODE, "long-lived stale routes", long).await;
        assert_eq!(edge.hops("10.1.2.0/26"), [NODE]);
        let received = edge.handle.received(NODE.parse().unwrap()).await;
        assert!(received.iter().all(|row| row.communities.iter().any(|c| c == "65535:6")), "LLGR_STALE: {received:#?}");
        edge.until("the end", |edge| edge.routes.is_empty()).await;
    });
}

#[test]
fn a_goodbye_withdraws_at_once_unless_both_sides_restart_after_notifications() {
    if missing("a_goodbye_withdraws_at_once_unless_both_sides_restart_after_notifications", &["bird", "birdc"]) {
        return;
    }
    let mut lab = Lab::new();
    lab.bird(&ibgp(NODE, "10.0.0.1", "graceful restart on; graceful restart time 60; connect delay time 1;"));
    lab.edge.block_on(|| async {
        let mut edge = Edge::start(config([graceful(60)])).await;
        edge.until("the route", |edge| edge.hops("10.1.2.0/26") == [NODE]).await;
        lab.birdc("disable edge");
        edge.until("no routes", |edge| edge.routes.is_empty()).await;
        assert_eq!(edge.row(NODE).await.pfx_stale, 0);
    });
}

#[test]
fn an_ipv4_only_peer_has_the_vip_within_a_second_and_waits_for_no_other_family() {
    if missing("an_ipv4_only_peer_has_the_vip_within_a_second_and_waits_for_no_other_family", &["gobgpd", "gobgp"]) {
        return;
    }
    let mut lab = Lab::new();
    let conf = "[global.config]\nas = 64512\nrouter-id = \"10.0.0.2\"\nport = 179\n[[neighbors]]\n[neighbors.config]\n\
                neighbor-address = \"10.0.0.1\"\npeer-as = 64512\n[neighbors.timers.config]\nconnect-retry = 1\n\
                [neighbors.graceful-restart.config]\nenabled = true\nrestart-time = 60\nhelper-only = false\n\
                [[neighbors.afi-safis]]\n[neighbors.afi-safis.config]\nafi-safi-name = \"ipv4-unicast\"\n\
                [neighbors.afi-safis.mp-graceful-restart.config]\nenabled = true\n";
    std::fs::write(lab.path("gobgp.toml"), conf).unwrap();
    let file = lab.path("gobgp.toml").display().to_string();
    lab.start("gobgpd", &["-f", &file, "-t", "toml", "--api-hosts", "127.0.0.1:50051", "--pprof-disable"]);
    let ask = |command: &str| {
        let output = lab.node.command("gobgp").args(command.split(' ')).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
    };
    lab.edge.block_on(|| async {
        let mut edge = Edge::start(config([graceful(60)])).await;
        edge.row_until(NODE, "the session", established).await;
        let start = std::time::Instant::now();
        edge.handle.announce(VIP.parse().unwrap(), PathAttributes::default()).await;
        says("GoBGP", "10.9.0.1/32", || ask("global rib")).await;
        assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
        let row = edge.row(NODE).await;
        assert!(!row.capabilities.contains(&"ipv6-unicast".to_owned()), "{row:#?}");
    });
}
