//! `edge-lab run`: the lab with the daemon in it, for a person to look at.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use edge_tests::lab::{
    Lab, Speaker,
    edge::{EdgeDaemon, vip},
    topology::{CLIENT, CLIENT2, EDGE, NODES},
};
use tokio::signal::unix::{SignalKind, signal};

/// Builds, shows, waits for Ctrl-C, takes down.
pub fn run() -> Result<()> {
    Lab::none_is_up()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start a runtime")?;
    runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt()).context("listen for Ctrl-C")?;
        let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
        // The lab is built on a thread so that Ctrl-C during it is kept and obeyed right after.
        let mut built = tokio::task::spawn_blocking(build).await.context("build the lab")??;
        loop {
            tokio::select! {
                _ = interrupt.recv() => break,
                _ = terminate.recv() => break,
                () = tokio::time::sleep(Duration::from_secs(1)) => {
                    if let Some(status) = built.1.ended()? {
                        bail!("the daemon ended: {status}\n{}", built.1.log());
                    }
                }
            }
        }
        println!("\ntaking everything down");
        let (mut lab, mut daemon) = built;
        let stopped = daemon.stop();
        lab.down()?;
        stopped
    })
}

fn build() -> Result<(Lab, EdgeDaemon)> {
    let started = Instant::now();
    println!("building the network of the first seed");
    let lab = Lab::up(Speaker::Bird, 1)?;
    lab.publish()?;
    println!("lab {} is up after {:.1} s; starting the daemon", lab.state.prefix, started.elapsed().as_secs_f64());
    let mut daemon = lab.start_edge(&lab.edge_configuration("10s"))?;
    daemon.wait_ready(&lab, NODES.len() as u64, Duration::from_secs(30))?;
    show(&lab)?;
    Ok((lab, daemon))
}

fn show(lab: &Lab) -> Result<()> {
    println!("\nWhat the edge learnt");
    for view in [&["bgp", "summary"][..], &["bgp", "routes"], &["route", "list"], &["dns", "list"]] {
        section(lab, view)?;
    }
    println!("What it serves");
    for view in [&["service", "list"][..], &["backend", "list"], &["xdp", "status"]] {
        section(lab, view)?;
    }
    // A request each way, so that what is printed below is known to work.
    let http = lab.http("client", (EDGE, vip::HTTP).into(), 1)?;
    let dnat = lab.http("client2", (EDGE, vip::HTTP_DNAT).into(), 1)?;
    println!("a request from {CLIENT} was answered by {}", http.into_keys().collect::<String>());
    println!("a request from {CLIENT2} was answered by {}", dnat.into_keys().collect::<String>());
    let socket = lab.edge_socket();
    let socket = socket.display();
    println!(
        "\nTry, from another terminal:\n\
         \x20 cargo xtask lab shell client curl -s http://{EDGE}:{http}/\n\
         \x20 cargo xtask lab shell client curl -sk https://{EDGE}:{https}/\n\
         \x20 cargo xtask lab shell client2 curl -s http://{EDGE}:{dnat}/      # the pod sees the client's address\n\
         \x20 cargo xtask lab scale 3\n\
         \x20 cargo xtask lab stop knode1\n\
         \x20 cargo xtask lab start knode1\n\
         \x20 edge-ctl --socket {socket} service list\n\
         \x20 edge-ctl --socket {socket} backend list\n\
         \x20 cargo xtask lab shell edge ip route\n\
         Ctrl-C takes everything down.",
        http = vip::HTTP,
        https = vip::HTTPS,
        dnat = vip::HTTP_DNAT,
    );
    Ok(())
}

/// Prints a view as a user sees it. The first answers may still be on their way: a view that fails is asked again.
fn section(lab: &Lab, view: &[&str]) -> Result<()> {
    let text = match lab.edge_ctl_text(view) {
        Ok(text) => text,
        Err(_) => {
            thread::sleep(Duration::from_millis(100));
            lab.edge_ctl_text(view)?
        }
    };
    println!("# edge-ctl {}\n{text}", view.join(" "));
    Ok(())
}
