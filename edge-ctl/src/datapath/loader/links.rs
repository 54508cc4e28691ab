//! Which interfaces the program runs on, and what it is told of them.

use std::collections::{BTreeMap, BTreeSet};

use aya::maps::{HashMap, MapData};
use edge_common::maps::{OwnAddresses, Port, interface_flag, name};

use super::{
    Datapath, LoadError,
    make::{is_loaded, load_program, object_error, program_tag},
};
use crate::{
    datapath::{
        attach::{self, AttachedHook, Attachment, How},
        interfaces::{self, Interface},
        migrate, own_addresses,
        pins::{self, Pins},
        vlans,
    },
    model::view::XdpRow,
};

/// A program that has yet to be verified by the kernel.
pub struct ProgramLoad {
    pins: Pins,
    object: &'static [u8],
    xdp: bool,
}

/// What became of a [`ProgramLoad`].
pub struct ProgramLoaded {
    xdp: bool,
    result: Result<u64, LoadError>,
}

impl ProgramLoad {
    /// Loads and pins it, with its stages; takes seconds. Nothing runs it yet.
    pub fn run(self) -> ProgramLoaded {
        ProgramLoaded { xdp: self.xdp, result: load_program(&self.pins, self.object, self.xdp) }
    }
}

impl Datapath {
    /// As [`Datapath::attach_loaded`], with the programs that are missing loaded meanwhile, which takes seconds each.
    pub fn attach_missing(&mut self) -> Vec<(String, LoadError)> {
        loop {
            let failed = self.attach_loaded();
            let loads = self.loads();
            if loads.is_empty() {
                return failed;
            }
            for load in loads {
                let done = load.run();
                self.loaded(done);
            }
        }
    }

    /// Attaches to every configured interface that does not have the program yet, adopts the others, and detaches from
    /// interfaces that are no longer configured. To be called at start, when a link comes or goes, and on reload.
    /// Returns what failed, by interface. What waits for a program is left as it is: [`Datapath::loads`].
    pub fn attach_loaded(&mut self) -> Vec<(String, LoadError)> {
        let known = match interfaces::list() {
            Ok(known) => known,
            Err(error) => {
                let error = LoadError::Object { what: "listing interfaces".to_owned(), reason: error.to_string() };
                return vec![(String::new(), error)];
            }
        };
        self.bases = vlans::bases(&self.edge.interfaces, &known);
        self.detach_unconfigured();
        let mut failed = Vec::new();
        let refused = std::mem::take(&mut self.refused);
        self.waiting.clear();
        for interface in self.bases.values().cloned().collect::<BTreeSet<_>>() {
            match self.attach_one(&interface, &known, &refused) {
                Ok(attachment) => {
                    self.failures.remove(&interface);
                    self.attachments.insert(interface, attachment);
                }
                Err(LoadError::NotLoaded { xdp }) => {
                    self.waiting.insert(interface, xdp);
                }
                Err(error) => {
                    self.attachments.remove(&interface);
                    self.failures.insert(interface.clone(), error.to_string());
                    failed.push((interface, error));
                }
            }
        }
        if let Err(error) = self.sync_maps(&known) {
            failed.push((String::new(), error));
        }
        if failed.is_empty() && self.waiting.is_empty() {
            match migrate::catch_up(&self.pins) {
                Ok(added) => {
                    self.writes += added;
                    self.retire_old_pins();
                }
                // The old maps stay for the next attempt.
                Err(error) => failed.push((String::new(), error.into())),
            }
        }
        failed
    }

    /// The programs that interfaces wait for, to be loaded where it holds nothing up, and handed to [`Datapath::loaded`].
    pub fn loads(&self) -> Vec<ProgramLoad> {
        let programs: BTreeSet<bool> = self.waiting.values().copied().collect();
        programs.into_iter().map(|xdp| ProgramLoad { pins: self.pins.clone(), object: self.object, xdp }).collect()
    }

    /// Takes note of a load, before the next [`Datapath::attach_loaded`].
    pub fn loaded(&mut self, done: ProgramLoaded) {
        match done.result {
            Ok(loads) => self.writes += loads,
            Err(error) => {
                self.refused.insert(done.xdp, error.to_string());
            }
        }
    }

    /// Interfaces that wait for their program.
    pub fn waiting(&self) -> impl Iterator<Item = &str> {
        self.waiting.keys().map(String::as_str)
    }

    fn attach_one(
        &mut self,
        name: &str,
        known: &[Interface],
        refused: &BTreeMap<bool, String>,
    ) -> Result<Attachment, LoadError> {
        let interface = known.iter().find(|interface| interface.name == name);
        let interface = interface.ok_or_else(|| LoadError::NoInterface { name: name.to_owned() })?;
        if let Some(above) = interfaces::seen_twice(interface, &self.bases(), known) {
            for xdp in [true, false] {
                let pin = self.pins.link(name, xdp);
                if pin.exists() {
                    attach::detach_pin(&pin);
                    self.writes += 1;
                }
            }
            if self.attachments.get(name).is_some_and(|before| before.hook == AttachedHook::Clsact) {
                attach::detach_clsact(name);
            }
            return Err(LoadError::Hook {
                interface: name.to_owned(),
                reason: format!(
                    "it is a port of {0}, which is configured too: the program would see each packet twice; take one of \
                     the two out of edge.interfaces",
                    above.name
                ),
            });
        }
        let before = self.attachments.get(name).cloned();
        let program = |xdp| match refused.get(&xdp) {
            Some(reason) => Err(LoadError::Refused { reason: reason.clone() }),
            None if is_loaded(&self.pins, xdp) => Ok(()),
            None => Err(LoadError::NotLoaded { xdp }),
        };
        // A clsact filter cannot be seen through a pin, so what this process attached is remembered.
        if let Some(before) =
            before.clone().filter(|b| b.hook == AttachedHook::Clsact && b.ifindex == interface.ifindex)
        {
            return Ok(before);
        }
        let attachment = attach::attach(&self.pins, self.edge.hook, interface, known, program)?;
        self.writes += u64::from(attachment.how != How::Adopted);
        if attachment.how == How::Attached {
            self.begin_quiet()?;
        }
        // Finding again what this process attached does not change how it came there, nor why on that hook.
        let same =
            |b: &Attachment| (b.link, b.program, b.hook) == (attachment.link, attachment.program, attachment.hook);
        Ok(before.filter(same).unwrap_or(attachment))
    }

    /// The interfaces that the program is to run on.
    fn bases(&self) -> Vec<String> {
        self.bases.values().cloned().collect()
    }

    fn detach_unconfigured(&mut self) {
        let bases = self.bases();
        for (interface, xdp) in self.pins.linked().unwrap_or_default() {
            if !bases.contains(&interface) {
                attach::detach_pin(&self.pins.link(&interface, xdp));
                self.attachments.remove(&interface);
                self.writes += 1;
            }
        }
        let gone: Vec<_> = self.attachments.keys().filter(|name| !bases.contains(name)).cloned().collect();
        for interface in gone {
            attach::detach_clsact(&interface);
            self.attachments.remove(&interface);
            self.writes += 1;
        }
        self.failures.retain(|interface, _| bases.contains(interface));
        self.waiting.retain(|interface, _| bases.contains(interface));
    }

    /// True while the program is attached to every configured interface.
    pub fn is_ready(&self) -> bool {
        self.failures.is_empty()
            && self.edge.interfaces.iter().all(|name| self.attachments.contains_key(self.base(name)))
    }

    /// True where nothing but programs that are being verified is in the way of [`Datapath::is_ready`].
    pub fn only_waits(&self) -> bool {
        let has = |base: &str| self.attachments.contains_key(base) || self.waiting.contains_key(base);
        self.failures.is_empty() && self.edge.interfaces.iter().all(|name| has(self.base(name)))
    }

    fn base<'a>(&'a self, name: &'a str) -> &'a str {
        self.bases.get(name).map_or(name, String::as_str)
    }

    /// One row for each configured interface.
    pub fn xdp_rows(&self) -> Vec<XdpRow> {
        let known = interfaces::list().unwrap_or_default();
        let vlan = |name: &str| {
            let (lower, tags) = vlans::below(known.iter().find(|known| known.name == name)?, &known)?;
            Some(format!("{}: the program runs on {}", vlans::describe(tags), lower.name))
        };
        let reason = |name: &str, reason: Option<&String>| {
            let parts: Vec<String> = vlan(name).into_iter().chain(reason.cloned()).collect();
            (!parts.is_empty()).then(|| parts.join("; "))
        };
        let waits = |name: &str| self.waiting.contains_key(self.base(name));
        let verified = "the kernel verifies the program".to_owned();
        let row = |name: &String| match (self.attachments.get(self.base(name)), self.failures.get(self.base(name))) {
            (Some(attachment), _) => XdpRow {
                interface: name.clone(),
                ifindex: attachment.ifindex,
                hook: attachment.hook.name().to_owned(),
                state: if attachment.how == How::Adopted { "adopted" } else { "attached" }.to_owned(),
                program: Some(attachment.program),
                tag: program_tag(&self.pins, attachment.hook),
                link: attachment.link,
                reason: reason(name, attachment.reason.as_ref()),
            },
            (None, failure) => XdpRow {
                interface: name.clone(),
                hook: "-".to_owned(),
                state: if waits(name) { "attaching" } else { "missing" }.to_owned(),
                reason: reason(name, failure.or(waits(name).then_some(&verified))),
                ..XdpRow::default()
            },
        };
        self.edge.interfaces.iter().map(row).collect()
    }

    fn sync_maps(&mut self, known: &[Interface]) -> Result<(), LoadError> {
        self.sync_interfaces(known)?;
        self.sync_own_addresses(known)?;
        self.sync_vlans(known)
    }

    /// Tells the program where it is attached and where XDP may redirect to; only differences are written.
    fn sync_interfaces(&mut self, known: &[Interface]) -> Result<(), LoadError> {
        let what = "writing the interfaces map";
        let mut wanted: BTreeMap<u32, u32> = BTreeMap::new();
        for attachment in self.attachments.values() {
            *wanted.entry(attachment.ifindex).or_default() |= interface_flag::ATTACHED;
        }
        for ifindex in interfaces::redirectable(known) {
            *wanted.entry(ifindex).or_default() |= interface_flag::XDP_REDIRECT;
        }
        let present: BTreeMap<u32, u32> =
            self.interfaces.iter().collect::<Result<_, _>>().map_err(|error| object_error(what, &error))?;
        for ifindex in present.keys().filter(|ifindex| !wanted.contains_key(ifindex)) {
            self.interfaces.remove(ifindex).map_err(|error| object_error(what, &error))?;
            self.writes += 1;
        }
        // Attached interfaces first, should the map be too small for all.
        let mut changes: Vec<_> = wanted.into_iter().filter(|(i, flags)| present.get(i) != Some(flags)).collect();
        changes.sort_by_key(|(_, flags)| flags & interface_flag::ATTACHED == 0);
        for (ifindex, flags) in changes {
            let result = self.interfaces.insert(ifindex, flags, 0);
            if flags & interface_flag::ATTACHED != 0 {
                result.map_err(|error| object_error(what, &error))?;
            }
            self.writes += 1;
        }
        Ok(())
    }

    /// Tells the program which addresses to sign its ICMP messages with; only differences are written.
    fn sync_own_addresses(&mut self, known: &[Interface]) -> Result<(), LoadError> {
        let what = "writing the edge's own addresses";
        let addresses = own_addresses::list().map_err(|error| object_error("listing addresses", &error))?;
        let attached = self.attachments.values().map(|attachment| attachment.ifindex).collect();
        let wanted = own_addresses::choose(&vlans::receiving(&attached, known), &addresses);
        let mut map: HashMap<MapData, u32, OwnAddresses> = pins::open(&self.pins, name::OWN_ADDRESSES)?;
        let present: BTreeMap<u32, OwnAddresses> =
            map.iter().collect::<Result<_, _>>().map_err(|error| object_error(what, &error))?;
        for ifindex in present.keys().filter(|ifindex| !wanted.contains_key(ifindex)) {
            map.remove(ifindex).map_err(|error| object_error(what, &error))?;
            self.writes += 1;
        }
        for (ifindex, own) in wanted.iter().filter(|(ifindex, own)| present.get(ifindex) != Some(own)) {
            map.insert(ifindex, own, 0).map_err(|error| object_error(what, &error))?;
            self.writes += 1;
        }
        Ok(())
    }

    /// Tells the program which interface stands for which tags; only differences are written.
    fn sync_vlans(&mut self, known: &[Interface]) -> Result<(), LoadError> {
        let what = "writing the VLANs";
        let wanted = vlans::ports(known);
        let mut map: HashMap<MapData, Port, Port> = pins::open(&self.pins, name::VLANS)?;
        let present: BTreeMap<Port, Port> =
            map.iter().collect::<Result<_, _>>().map_err(|error| object_error(what, &error))?;
        if present == wanted {
            return Ok(());
        }
        for port in present.keys().filter(|port| !wanted.contains_key(port)) {
            map.remove(port).map_err(|error| object_error(what, &error))?;
            self.writes += 1;
        }
        for (port, other) in wanted.iter().filter(|(port, other)| present.get(port) != Some(other)) {
            map.insert(port, other, 0).map_err(|error| object_error(what, &error))?;
            self.writes += 1;
        }
        // Next hops hold the tags, and are brought up to date by a lookup.
        self.bump_route_generation().map(drop)
    }
}
