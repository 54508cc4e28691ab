//! Established and new flows, both hooks, both modes, both directions: verdict, whole packet, counters, entries.

use std::net::SocketAddrV4;

use anyhow::Result;
use edge_common::{
    flow::TCP,
    maps::{mode, name},
};
use edge_tests::datapath::{
    frame::{Frame, flag},
    namespace::in_namespace,
    rig::{Action, CLIENT, CLIENT_MAC, HOOKS, PODS_MAC, Rig, SNAT, Settings, UPLINK_MAC, VIP, key, pod, pod_mac},
};

#[test]
fn a_tcp_flow_opens_and_is_translated_both_ways() -> Result<()> {
    for hook in HOOKS {
        in_namespace(|| {
            let mut rig = Rig::new(hook, Settings::default())?;
            rig.service(1, 8443, TCP, mode::FULL_NAT, 1, 443)?;
            let client = SocketAddrV4::new(CLIENT, 40_000);
            let vip = SocketAddrV4::new(VIP, 8443);
            let backend = SocketAddrV4::new(pod(0), 443);

            let syn = Frame::tcp(client, vip, flag::SYN);
            let outcome = rig.run(&syn.bytes(), rig.uplink)?;
            assert_eq!(outcome.action, Action::Redirect, "{hook:?} {:?}", rig.reasons()?);
            let half_open = rig.flow(name::HALF_OPEN, &key(client, vip, TCP)).expect("a half-open entry");
            let snat = SocketAddrV4::new(SNAT, u16::from_be(half_open.new_src_port));
            assert_eq!(outcome.frame, syn.translated(snat, backend, Some((pod_mac(0), PODS_MAC))));

            let syn_ack = Frame::tcp(backend, snat, flag::SYN | flag::ACK).seq(1000);
            let outcome = rig.run(&syn_ack.bytes(), rig.pods)?;
            assert_eq!(outcome.action, Action::Redirect);
            assert_eq!(outcome.frame, syn_ack.translated(vip, client, Some((CLIENT_MAC, UPLINK_MAC))));

            let ack = Frame::tcp(client, vip, flag::ACK).ack(1001);
            let outcome = rig.run(&ack.bytes(), rig.uplink)?;
            assert_eq!(outcome.action, Action::Redirect);
            assert_eq!(outcome.frame, ack.translated(snat, backend, Some((pod_mac(0), PODS_MAC))));
            assert!(rig.flow(name::HALF_OPEN, &key(client, vip, TCP)).is_none());
            assert!(rig.flow(name::HALF_OPEN, &key(backend, snat, TCP)).is_none());
            let forward = rig.flow(name::ESTABLISHED, &key(client, vip, TCP)).expect("established");
            let reply = rig.flow(name::ESTABLISHED, &key(backend, snat, TCP)).expect("established twin");
            assert_eq!((forward.packets, forward.bytes), (2, (syn.ip_len() + ack.ip_len()) as u64));
            assert_eq!((reply.packets, reply.bytes), (1, syn_ack.ip_len() as u64));
            let stats = rig.service_stats(1)?;
            assert_eq!((stats.half_opened, stats.opened, stats.packets_in, stats.packets_out), (1, 1, 2, 1));
            Ok(())
        })?;
    }
    Ok(())
}
