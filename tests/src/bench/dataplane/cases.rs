//! The dataplane's figures by name.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use edge_common::maps::mode;

use super::Effort;
use crate::datapath::rig::{Family, Hook};

/// Flows that are busy beside many others.
const FEW: u32 = 1024;
/// Packets that fill the half-open table.
const FULL: u32 = 200_000;
/// Flows opened and closed per second beside a measurement: with churn, in a storm.
const CHURN: u32 = 10_000;
const STORM: u32 = 50_000;

/// What is measured.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Subject {
    Forward,
    Reply,
    NewFlow,
    NotOurs,
    Lookup,
    BareNewFlow,
}

/// Which flow the wrapper picks next, as its script says it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Pick {
    Any = 0,
    Zipf = 1,
    InTurn = 2,
}

/// A figure that can be measured.
#[derive(Clone)]
pub struct Case {
    pub name: String,
    pub hook: Hook,
    pub mode: u8,
    pub family: Family,
    pub subject: Subject,
    /// Flows that packets are of.
    pub flows: u32,
    pub pick: Pick,
    /// Established flows beside them that have no packets.
    pub idle: u32,
    /// Flows that are opened and closed per second beside them.
    pub storm: u32,
    /// CPUs that receive such packets at once.
    pub queues: usize,
    /// Packets in a run.
    pub repeat: u32,
}

impl Case {
    /// Packets before those that count: each flow in turn, twice, so that each has its slot, or what fills the table.
    pub fn warm_up(&self) -> u32 {
        if self.is_new() { FULL } else { 2 * self.flows }
    }

    pub fn is_new(&self) -> bool {
        matches!(self.subject, Subject::NewFlow | Subject::BareNewFlow)
    }

    pub fn first_client(&self) -> IpAddr {
        match self.family {
            Family::V4 => Ipv4Addr::new(100, 64, 0, 0).into(),
            Family::V6 => Ipv6Addr::new(0x2001, 0xdb8, 0x64, 0, 0, 0, 0x64, 0).into(),
        }
    }

    pub fn first_backend(&self) -> IpAddr {
        match self.family {
            Family::V4 => Ipv4Addr::new(10, 1, 64, 0).into(),
            Family::V6 => Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0x64, 0).into(),
        }
    }

    /// Baseline and subject.
    pub fn programs(&self) -> [&'static str; 2] {
        match (self.hook, self.family, self.subject) {
            (Hook::Xdp, _, Subject::Lookup) => ["bench_xdp_baseline", "bench_xdp_lookup"],
            (Hook::Xdp, _, Subject::BareNewFlow) => ["bench_xdp_baseline", "bench_xdp_new"],
            (Hook::Xdp, Family::V4, _) => ["bench_xdp_baseline", "bench_xdp_pipeline"],
            (Hook::Xdp, Family::V6, _) => ["bench_xdp_base6", "bench_xdp_pipe6"],
            (Hook::Tc, Family::V4, _) => ["bench_tc_baseline", "bench_tc_pipeline"],
            (Hook::Tc, Family::V6, _) => ["bench_tc_base6", "bench_tc_pipe6"],
        }
    }
}

/// All of them.
pub fn cases(effort: Effort) -> Vec<Case> {
    let mut cases = Vec::new();
    for (hook, hook_name) in [(Hook::Xdp, "xdp"), (Hook::Tc, "tc")] {
        for (mode, mode_name) in [(mode::FULL_NAT, "full-nat"), (mode::DNAT, "dnat")] {
            for (family, family_name) in [(Family::V4, "v4"), (Family::V6, "v6")] {
                for (subject, subject_name) in [
                    (Subject::Forward, "established-forward"),
                    (Subject::Reply, "established-reply"),
                    (Subject::NewFlow, "new-flow"),
                ] {
                    let prefix = format!("{hook_name}/{mode_name}/{family_name}/{subject_name}");
                    cases.extend(each_mix(effort, &prefix, |case| {
                        (case.hook, case.mode, case.family, case.subject) = (hook, mode, family, subject);
                    }));
                }
            }
        }
    }
    let plain = |name: &str, subject, flows| plain(effort, name, subject, flows);
    let forward =
        |name: &str, flows| plain(&format!("xdp/full-nat/v4/established-forward/{name}"), Subject::Forward, flows);
    cases.extend([
        Case { storm: CHURN, ..forward("1m-flows-churn", effort.many) },
        forward("1k-flows", FEW),
        Case { storm: STORM, ..forward("1k-flows-storm", FEW) },
        Case { idle: effort.many, ..forward("1k-flows-1m-idle", FEW) },
        Case { idle: effort.many, storm: STORM, ..forward("1k-flows-1m-idle-storm", FEW) },
        Case { queues: 2, ..forward("1k-flows-2-queues", FEW) },
        plain("xdp/non-vip/1-flow", Subject::NotOurs, 1),
        plain("xdp/non-vip/1m-sources", Subject::NotOurs, effort.many),
        // As a new flow beside a million: the wrapper's sources are all different, and the half-open table is full.
        plain("xdp/syn-flood/1m-flows", Subject::NewFlow, effort.many),
        plain("xdp/bare-new-flow/1-flow", Subject::BareNewFlow, 1),
        plain("xdp/bare-new-flow/1m-flows", Subject::BareNewFlow, effort.many),
    ]);
    cases.extend(each_mix(effort, "xdp/bare-lru-lookup", |case| case.subject = Subject::Lookup));
    // A new flow takes as long as ten others' packets.
    for case in &mut cases {
        if case.is_new() {
            case.repeat /= 2;
        } else if case.flows <= FEW {
            case.repeat *= 2;
        }
    }
    cases
}

/// One flow, a million with equal shares, and a million by Zipf's law.
fn each_mix(effort: Effort, prefix: &str, set: impl Fn(&mut Case)) -> [Case; 3] {
    [("1-flow", 1, Pick::Any), ("1m-flows", effort.many, Pick::Any), ("1m-flows-zipf", effort.many, Pick::Zipf)].map(
        |(name, flows, pick)| {
            let mut case = plain(effort, &format!("{prefix}/{name}"), Subject::Forward, flows);
            case.pick = pick;
            set(&mut case);
            case
        },
    )
}

fn plain(effort: Effort, name: &str, subject: Subject, flows: u32) -> Case {
    Case {
        name: format!("dataplane/{name}"),
        hook: Hook::Xdp,
        mode: mode::FULL_NAT,
        family: Family::V4,
        subject,
        flows,
        pick: Pick::Any,
        idle: 0,
        storm: 0,
        queues: 1,
        repeat: effort.packets,
    }
}
