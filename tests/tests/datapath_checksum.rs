//! Layer-4 checksums that need more than the difference: packets that the NIC has summed up, and fields that look unfinished.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use edge_common::{
    flow::{TCP, UDP},
    maps::{mode, name},
};
use edge_tests::{
    datapath::{
        frame::{Frame, checksum, flag},
        namespace::in_namespace,
        rig::{CLIENT_MAC, Entry, Family, HOOKS, Hook, PODS_MAC, Rig, Settings, UPLINK_MAC, key, pod_mac, snat_of},
    },
    model::kernel::Kernel,
    skip,
};

const LISTEN: u16 = 8443;

/// The ends of the one flow here.
#[derive(Clone, Copy, Debug)]
struct Ends {
    client: SocketAddr,
    vip: SocketAddr,
    backend: SocketAddr,
    protocol: u8,
}

impl Ends {
    fn of(family: Family, protocol: u8) -> Self {
        let at = |address, port| SocketAddr::new(address, port);
        Self {
            client: at(family.client(), 40_000),
            vip: at(family.vip(), LISTEN),
            backend: at(family.pod(0), 443),
            protocol,
        }
    }

    fn request(&self, flags: u8) -> Frame {
        match self.protocol {
            TCP => Frame::tcp(self.client, self.vip, flags).ack(1001),
            _ => Frame::udp(self.client, self.vip),
        }
        // Odd, so that the last byte stands alone in its word.
        .payload(vec![0x5a; 101])
    }

    fn reply(&self, source: SocketAddr, flags: u8, payload: Vec<u8>) -> Frame {
        match self.protocol {
            TCP => Frame::tcp(self.backend, source, flags).seq(1000),
            _ => Frame::udp(self.backend, source),
        }
        .payload(payload)
    }

    fn at_backend(&self, frame: &Frame, source: SocketAddr) -> Vec<u8> {
        frame.translated(source, self.backend, Some((pod_mac(0), PODS_MAC)))
    }

    fn at_client(&self, frame: &Frame) -> Vec<u8> {
        frame.translated(self.vip, self.client, Some((CLIENT_MAC, UPLINK_MAC)))
    }

    /// The client's half, in the table it is in.
    fn forward(&self, rig: &mut Rig) -> Result<Entry> {
        let key = key(self.client, self.vip, self.protocol);
        [name::ESTABLISHED, name::HALF_OPEN].iter().find_map(|table| rig.flow(table, &key)).context("no flow")
    }
}

fn families_and_protocols() -> impl Iterator<Item = (Family, u8)> {
    [Family::V4, Family::V6].into_iter().flat_map(|family| [(family, TCP), (family, UDP)])
}

#[test]
fn the_sum_of_the_whole_packet_that_a_nic_took_is_right_after_translation() -> Result<()> {
    for (family, protocol) in families_and_protocols() {
        in_namespace(|| {
            let ends = Ends::of(family, protocol);
            let mut rig = Rig::new(Hook::Tc, Settings { family, ..Settings::default() })?;
            rig.service(1, LISTEN, protocol, mode::FULL_NAT, 1, 443)?;
            let (uplink, pods) = (rig.uplink, rig.pods);
            let mut kernel = Kernel::new(rig, Hook::Tc)?;
            let syn = ends.request(flag::SYN);
            let refused = |error: &anyhow::Error| {
                let cause = error.root_cause().downcast_ref::<std::io::Error>();
                cause.and_then(std::io::Error::raw_os_error) == Some(libc::EINVAL)
            };
            match kernel.run_summed(&syn.bytes(), uplink) {
                Err(error) if refused(&error) => {
                    skip::skipped("the sum of a whole packet", "the kernel's test runs do not check it (before 6.17)");
                    return Ok(());
                }
                other => drop(other?),
            }
            let source = snat_of(&ends.forward(&mut kernel.rig)?);
            // Half-open, then established from the table, then twice from the cache.
            let answer = ends.reply(source, flag::SYN | flag::ACK, Vec::new());
            assert_eq!(kernel.run_summed(&answer.bytes(), pods)?.1, ends.at_client(&answer));
            for turn in 0..4 {
                let request = ends.request(flag::ACK);
                let out = kernel.run_summed(&request.bytes(), uplink)?.1;
                assert_eq!(out, ends.at_backend(&request, source), "{ends:?}: request {turn}");
                let reply = Frame {
                    no_checksum: protocol == UDP && family == Family::V4 && turn % 2 == 1,
                    ..ends.reply(source, flag::ACK, vec![turn; 33]).seq(1001)
                };
                let out = kernel.run_summed(&reply.bytes(), pods)?.1;
                assert_eq!(out, ends.at_client(&reply), "{ends:?}: reply {turn}");
            }
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn a_checksum_that_happens_to_be_the_pseudo_header_s_sum_is_translated_like_any_other() -> Result<()> {
    for (hook, (family, protocol)) in
        HOOKS.into_iter().flat_map(|hook| families_and_protocols().map(move |of| (hook, of)))
    {
        in_namespace(|| {
            let ends = Ends::of(family, protocol);
            let mut rig = Rig::new(hook, Settings { family, ..Settings::default() })?;
            rig.service(1, LISTEN, protocol, mode::FULL_NAT, 1, 443)?;
            rig.run(&ends.request(flag::SYN).bytes(), rig.uplink)?;
            let source = snat_of(&ends.forward(&mut rig)?);
            rig.run(&ends.reply(source, flag::SYN | flag::ACK, Vec::new()).bytes(), rig.pods)?;
            for turn in 0..3 {
                let request = with_unfinished_looks(&ends.request(flag::ACK), family, protocol);
                let out = rig.run(&request.bytes(), rig.uplink)?.frame;
                assert_eq!(out, ends.at_backend(&request, source), "{hook:?} {ends:?}: request {turn}");
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// The frame with a first word of payload by which its checksum field is the sum of its pseudo-header, as it is where the sender's
/// NIC was to finish it.
fn with_unfinished_looks(frame: &Frame, family: Family, protocol: u8) -> Frame {
    let of = |first: u16| {
        let mut payload = vec![0x5a; 102];
        payload[..2].copy_from_slice(&first.to_be_bytes());
        Frame { ..frame.clone() }.payload(payload)
    };
    let bytes = of(0).bytes();
    let l4 = 14 + family.header_len();
    let addresses = match family {
        Family::V4 => &bytes[26..34],
        Family::V6 => &bytes[22..54],
    };
    let len = ((bytes.len() - l4) as u16).to_be_bytes();
    // Neither is inverted on the wire of a packet whose field is to be finished.
    let pseudo = !checksum(&[addresses, &[0, protocol], &len]);
    let at = l4 + if protocol == TCP { 16 } else { 6 };
    let field = u16::from_be_bytes([bytes[at], bytes[at + 1]]);
    // The field is to become the pseudo-header's sum, so the sum is to grow by what lies between: ~(~field + word) = pseudo.
    let word = !checksum(&[&field.to_be_bytes(), &(!pseudo).to_be_bytes()]);
    let frame = of(word);
    let bytes = frame.bytes();
    assert_eq!(u16::from_be_bytes([bytes[at], bytes[at + 1]]), pseudo, "the field does not look unfinished");
    frame
}
