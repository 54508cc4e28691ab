//! What users see of the RIB.

use std::net::IpAddr;

use ipnet::IpNet;
use smallvec::SmallVec;

use super::{Entry, Path, Reason, Rib, bestpath};

/// A path and its standing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing<'a> {
    /// The path.
    pub path: &'a Path,
    /// Who it came from.
    pub peer: IpAddr,
    /// It is the best one.
    pub best: bool,
    /// It carries traffic, alone or with its equals.
    pub multipath: bool,
    /// Learnt inside our AS.
    pub internal: bool,
    /// Policy lets it in and its next hop can be reached.
    pub usable: bool,
    /// Why it is not the best, where it is usable.
    pub reason: Option<Reason>,
    /// Neighbours that its packets are handed to, where they are not the next hop itself.
    pub gateways: Vec<IpAddr>,
    /// What it had to show in each step of selection; only where asked for.
    pub steps: Vec<String>,
}

impl Rib {
    /// Every prefix that a peer has announced, with the standing of its paths.
    pub fn received(&self, peer: IpAddr) -> impl Iterator<Item = (IpNet, Standing<'_>)> {
        let id = self.id(peer);
        self.table
            .iter()
            .filter(move |(_, entry)| entry.paths.iter().any(|path| Some(path.source) == id))
            .flat_map(|(prefix, entry)| self.standings(entry, false).into_iter().map(move |path| (prefix, path)))
            .filter(move |(_, standing)| Some(standing.path.source) == id)
    }

    /// Every prefix with its paths' standing and whether we originate it. `explain` has the steps of selection told.
    pub fn iter(&self, explain: bool) -> impl Iterator<Item = (IpNet, bool, Vec<Standing<'_>>)> {
        self.table.iter().map(move |(prefix, entry)| (prefix, entry.originated, self.standings(entry, explain)))
    }

    fn standings<'a>(&'a self, entry: &'a Entry, explain: bool) -> Vec<Standing<'a>> {
        let usable: SmallVec<[&Path; 4]> = entry.paths.iter().filter(|path| self.usable(path)).collect();
        let candidates = self.candidates(&usable);
        let selection = bestpath::select(&candidates);
        let mut steps = if explain { bestpath::explain(&candidates) } else { Vec::new() };
        let mut position = 0;
        let mut standings: Vec<Standing<'a>> = entry
            .paths
            .iter()
            .map(|path| {
                let source = &self.sources[path.source as usize];
                let hop = path.used().next_hop;
                let mut standing = Standing {
                    path,
                    peer: source.peer,
                    best: false,
                    multipath: false,
                    internal: source.policy.internal,
                    usable: self.usable(path),
                    reason: None,
                    gateways: self.reach.gateways(hop).filter(|gateway| *gateway != hop).collect(),
                    steps: Vec::new(),
                };
                if !standing.usable {
                    return standing;
                }
                let index = position;
                position += 1;
                standing.steps = steps.get_mut(index).map(std::mem::take).unwrap_or_default();
                if entry.originated {
                    standing.reason = Some(Reason::Local);
                    return standing;
                }
                standing.best = selection.best == Some(index);
                standing.multipath = selection.multipath.contains(&index);
                standing.reason = selection.reasons.get(index).copied().flatten();
                standing
            })
            .collect();
        standings.sort_by_key(|standing| (standing.peer, standing.path.id));
        standings
    }
}
