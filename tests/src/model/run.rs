//! Worlds run through the program and the model side by side; a difference is located and made small.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};
use edge_common::{
    address::Wide,
    maps::{CUSTOMER_TAG, Port, name, tag},
    verdict::Reason,
};
use edge_ctl::datapath::object::EBPF_OBJECT;

use super::{
    compare,
    coverage::{Coverage, Point},
    decide::{Choices, Input, decide},
    dice::Dice,
    flow::Key,
    generate::{self, Move, TAG, VLAN},
    kernel::{self, Kernel, LONGEST},
    moves,
    network::{BASE, Network},
    protect,
    state::{State, TABLES},
    wire,
    world::{self, ESTABLISHED, LRU, World},
};
use crate::datapath::{
    cpu,
    namespace::in_namespace,
    rig::{Action, Hook, Rig, Settings, load},
};

/// Steps of one world.
const STEPS: u64 = 2000;
/// Steps between two looks at everything.
const INTERVAL: usize = 250;
/// Parts in which the time that the program took is looked at, where its ends explain nothing.
const BETWEEN: u64 = 16;
/// Longest time spent on making a difference small.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a run amounts to.
#[derive(Default)]
pub struct Report {
    /// Packets run.
    pub packets: u64,
    /// Frames too short for a test run.
    pub too_short: u64,
    /// Worlds.
    pub worlds: u64,
    /// Decision points met.
    pub coverage: Coverage,
    /// Counts by reason number.
    pub reasons: std::collections::BTreeMap<u32, u64>,
    /// SNAT ports refused although some were free.
    pub refusals: u64,
    /// How long it took.
    pub took: Duration,
    /// Packets that the flow cache served.
    pub cached: u64,
}

impl Report {
    /// Reasons that were never counted.
    pub fn missed_reasons(&self) -> Vec<Reason> {
        let seen = |reason: &Reason| self.reasons.get(&(*reason as u32)).copied().unwrap_or(0) != 0;
        Reason::ALL.iter().copied().filter(|reason| !seen(reason)).collect()
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let each = self.took.as_secs_f64() * 1e6 / self.packets.max(1) as f64;
        writeln!(
            f,
            "{} packets in {} worlds, {:.1} s, {each:.1} us a packet; {} frames too short for a test run; \
             {} times no SNAT port found although some were free; {} packets served by the flow cache",
            self.packets,
            self.worlds,
            self.took.as_secs_f64(),
            self.too_short,
            self.refusals,
            self.cached,
        )?;
        let missed: Vec<&str> = self.missed_reasons().into_iter().map(Reason::name).collect();
        writeln!(
            f,
            "reasons never counted: {}",
            if missed.is_empty() { "none".to_owned() } else { missed.join(", ") }
        )?;
        let points = self.coverage.missed();
        let never = if points.is_empty() { "none".to_owned() } else { format!("{points:?}") };
        write!(f, "branches never taken: {never}; seldom: {:?}", self.coverage.seldom())
    }
}

/// Runs at least `packets` packets through the program of `hook`, in worlds that follow from `seed`.
///
/// # Errors
/// At the first difference, with what is needed to see it again; where the namespace or a map is refused.
pub fn fuzz(hook: Hook, seed: u64, packets: u64) -> Result<Report> {
    fuzz_object(EBPF_OBJECT, hook, seed, packets, CACHES[0])
}

/// Sets of the flow cache that a run may have: enough, one for each CPU, none.
pub const CACHES: [u32; 3] = [512, 2, 0];

/// As [`fuzz`], of another object with the same maps: one that was broken on purpose must be found out.
///
/// # Errors
/// As [`fuzz`].
pub fn fuzz_object(object: &[u8], hook: Hook, seed: u64, packets: u64, cache: u32) -> Result<Report> {
    in_namespace(|| {
        let mut bench = Bench::new(object, hook, cache)?;
        let mut report = Report::default();
        let start = Instant::now();
        let mut seeds = Dice(seed);
        let online = aya::util::online_cpus().map_err(|(_, error)| error)?;
        // What slots of another CPU have counted of a flow that a packet closes, only the daemon adds: the model knows one CPU.
        cpu::on(online.first().copied().unwrap_or_default(), || {
            while report.packets < packets {
                let world = seeds.word();
                bench.world(seed, world, &mut report)?;
            }
            Ok(())
        })?;
        report.took = start.elapsed();
        report.cached = bench.kernel.rig.cache.cpus().iter().map(|cpu| cpu.hits).sum();
        Ok(report)
    })
}

/// The program with its network.
struct Bench {
    kernel: Kernel,
    network: Network,
}

/// A difference between the program and the model.
struct Difference {
    step: usize,
    what: String,
}

enum Trouble {
    Difference(Difference),
    Error(anyhow::Error),
}

impl From<anyhow::Error> for Trouble {
    fn from(error: anyhow::Error) -> Self {
        Self::Error(error)
    }
}

impl Choices for Kernel {
    fn source(&self, key: &Key) -> Option<(Wide, u16)> {
        let flow = self.flow(name::HALF_OPEN, key)?;
        Some((flow.new_src, flow.new_src_port))
    }

    fn cursor(&self, backend: u32) -> u32 {
        self.map(name::BACKEND_CURSOR).ok().and_then(|map| map.get(&backend)).unwrap_or(0)
    }
}

impl Bench {
    fn new(object: &[u8], hook: Hook, cache: u32) -> Result<Self> {
        let settings = Settings { established: ESTABLISHED, lru: LRU, cache, ..Settings::default() };
        let mut rig = Rig::from_object(object, hook, settings)?;
        load(&mut rig.ebpf, hook)?;
        let kernel = Kernel::new(rig, hook)?;
        let network = Network::new()?;
        let vlans = kernel.map(name::VLANS)?;
        for ifindex in [network.uplink, network.pods] {
            vlans.set(&Port { ifindex, tags: [tag(CUSTOMER_TAG, VLAN), 0] }, &Port::untagged(ifindex))?;
        }
        Ok(Self { kernel, network })
    }

    fn world(&mut self, run: u64, seed: u64, report: &mut Report) -> Result<()> {
        let steps: Vec<u64> = (0..STEPS).map(|step| Dice(seed.wrapping_add(step << 32)).word()).collect();
        match self.steps(seed, &steps, INTERVAL, Some(report)) {
            Ok(()) => Ok(()),
            Err(Trouble::Error(error)) => Err(error),
            Err(Trouble::Difference(difference)) => self.explain(run, seed, &steps, &difference),
        }
    }

    /// Runs steps in a fresh world; `every`: steps between two looks at everything.
    fn steps(&mut self, seed: u64, steps: &[u64], every: usize, report: Option<&mut Report>) -> Result<(), Trouble> {
        self.network.become_(BASE)?;
        let mut world = world::draw(seed, &self.network);
        world::write(&mut world, &self.kernel)?;
        let before = compare::counted(&self.kernel)?;
        let mut state = world.start.clone();
        state.base = Arc::new(before);
        let mut tally = Report::default();
        for (n, step) in steps.iter().enumerate() {
            let next = generate::next(*step, &world, &state, &self.network);
            let shown = |what: String, next: &Move| {
                Trouble::Difference(Difference { step: n, what: format!("{}\n  {what}", describe(next)) })
            };
            self.step(&mut state, &next, &mut tally).map_err(|trouble| match trouble {
                Trouble::Difference(difference) => shown(difference.what, &next),
                error => error,
            })?;
            if (n + 1) % every == 0 || n + 1 == steps.len() {
                self.look(&mut state).map_err(|what| shown(what, &next))?;
            }
        }
        if let Some(report) = report {
            report.packets += tally.packets;
            report.too_short += tally.too_short;
            report.worlds += 1;
            report.coverage.add(&state.coverage);
            report.refusals += state.refusals;
            // A service that no map has is not counted for.
            for ((_, reason), count) in state.counters.reasons.range(..(world::SERVICES, 0)) {
                *report.reasons.entry(*reason).or_default() += count;
            }
        }
        Ok(())
    }

    fn look(&self, state: &mut State) -> Result<(), String> {
        compare::tables(state, &self.kernel)?;
        compare::counters(state, &self.kernel)
    }

    fn step(&mut self, state: &mut State, next: &Move, tally: &mut Report) -> Result<(), Trouble> {
        let Move::Packet { frame, ingress, gso_size, tagged } = next else {
            return Ok(moves::apply(state, &self.kernel, &mut self.network, next, kernel::now())?);
        };
        let frame = &frame[..frame.len().min(LONGEST)];
        let (from, from_precise) = (kernel::now(), kernel::precise_now());
        let sent = if *tagged { [&frame[..12], &TAG, &frame[12..]].concat() } else { frame.to_vec() };
        let Some((action, out)) = self.kernel.run(&sent, *ingress, *gso_size)? else {
            tally.too_short += 1;
            return Ok(());
        };
        let (to, to_precise) = (kernel::now(), kernel::precise_now());
        tally.packets += 1;
        let mut out = out.to_vec();
        // TC keeps the tag beside the frame, where a test run does not show it.
        let has_tag = *tagged && out.get(12..16) == Some(&TAG);
        if has_tag {
            out.drain(12..16);
        }
        let mut input = Input {
            frame,
            ingress: *ingress,
            hook: self.kernel.hook,
            gso_size: *gso_size,
            now: from,
            window: from,
            chosen: from,
            precise: from_precise,
            ran: (from_precise, to_precise),
            was_sent: matches!(action, Action::Transmit | Action::Redirect),
            id_after: wire::id(&out),
        };
        let judge = |state: &mut State, input: &Input| {
            let decision = decide(state, input, &self.kernel)?;
            let returns = action == Action::Pass || decision.told.is_some() || decision.reset;
            if *tagged && action != Action::Drop {
                state.hit(if returns { Point::TagReturned } else { Point::TagGone });
                if self.kernel.hook == Hook::Xdp && has_tag != returns {
                    return Err(format!("tagged as it came: {has_tag}, expected {returns}"));
                }
            }
            compare::packet(&decision, frame, action, &out)
                .map_err(|what| format!("{what}\n{}", compare::entries(state, &self.kernel, frame)))?;
            let times = compare::Times { coarse: input.now, precise: input.precise, after: to_precise };
            compare::touched(state, &self.kernel, times)
        };
        let before = state.clone();
        let Err(first) = judge(state, &input) else { return Ok(()) };
        // The program read both clocks somewhere between: at a boundary, either side of it is right.
        let tokens = protect::next_tokens(&before);
        for moment in self.moments(frame, (from, to), (from_precise, to_precise), tokens) {
            *state = before.clone();
            (input.now, input.window, input.chosen, input.precise) = moment;
            if judge(state, &input).is_ok() {
                return Ok(());
            }
        }
        Err(Trouble::Difference(Difference { step: 0, what: first }))
    }

    /// What the two clocks may have said while the program ran: the ends, what it stamped, and, since a run that others have
    /// interrupted takes long enough for more than one thing to change, moments between and those at which a bucket has a token.
    fn moments(
        &self,
        frame: &[u8],
        coarse: (u64, u64),
        precise: (u64, u64),
        tokens: Vec<u64>,
    ) -> Vec<(u64, u64, u64, u64)> {
        let mut ticks = vec![coarse.0, coarse.1];
        let mut moments = tokens;
        moments.extend([precise.0, precise.1]);
        let key = wire::whole_segment(frame).map(|segment| segment.key);
        let flows = TABLES.iter().filter_map(|table| self.kernel.flow(moves::map_name(*table), &key?));
        for flow in flows {
            ticks.push(flow.last_seen);
            moments.push(flow.created);
        }
        moments.extend((1..BETWEEN).map(|part| precise.0 + (precise.1 - precise.0) * part / BETWEEN));
        ticks.retain(|tick| (coarse.0..=coarse.1).contains(tick));
        moments.retain(|moment| (precise.0..=precise.1).contains(moment));
        ticks.dedup();
        let windows: &[u64] = if coarse.0 == coarse.1 { &[coarse.0] } else { &[coarse.0, coarse.1] };
        let mut all = Vec::new();
        for now in ticks {
            for window in windows {
                for chosen in windows {
                    all.extend(moments.iter().map(|moment| (now, *window, *chosen, *moment)));
                }
            }
        }
        all
    }

    /// Locates a difference, leaves out the steps it does not need, and fails with what remains.
    fn explain(&mut self, run: u64, seed: u64, steps: &[u64], first: &Difference) -> Result<()> {
        let lost = match self.network.lost()? {
            lost if lost.is_empty() => String::new(),
            lost => format!("the kernel has lost neighbours that the model counts on: {}\n", lost.join(", ")),
        };
        let deadline = Instant::now() + PATIENCE;
        let (mut kept, mut last) = (steps[..=first.step].to_vec(), first.what.clone());
        let mut repeats = false;
        if let Some((located, what)) = self.fails(seed, &kept)? {
            (kept, last, repeats) = (located, what, true);
        }
        let mut piece = kept.len() / 2;
        while repeats && piece > 0 && Instant::now() < deadline {
            let mut at = 0;
            while at < kept.len() && Instant::now() < deadline {
                let mut fewer = kept.clone();
                fewer.drain(at..(at + piece).min(kept.len()));
                match self.fails(seed, &fewer)? {
                    Some((located, what)) => (kept, last) = (located, what),
                    None => at += piece,
                }
            }
            piece /= 2;
        }
        if !repeats {
            kept.clear();
        }
        let history = if repeats { self.history(seed, &kept)? } else { "does not repeat by itself".to_owned() };
        bail!(
            "{lost}the program and the model differ ({:?}): seed {run:#x}, world {seed:#x}, step {}\nfirst seen: {}\n\n\
             smallest sequence found, {} steps:\n{history}\nthere: {last}",
            self.kernel.hook,
            first.step,
            first.what,
            kept.len()
        )
    }

    /// The steps up to the first difference, and that, where there is one.
    fn fails(&mut self, seed: u64, steps: &[u64]) -> Result<Option<(Vec<u64>, String)>> {
        match self.steps(seed, steps, 1, None) {
            Ok(()) => Ok(None),
            Err(Trouble::Error(error)) => Err(error),
            Err(Trouble::Difference(difference)) => Ok(Some((steps[..=difference.step].to_vec(), difference.what))),
        }
    }

    /// What the steps are, in words and bytes.
    fn history(&mut self, seed: u64, steps: &[u64]) -> Result<String> {
        self.network.become_(BASE)?;
        let mut world: World = world::draw(seed, &self.network);
        world::write(&mut world, &self.kernel)?;
        let mut state = world.start.clone();
        state.base = Arc::new(compare::counted(&self.kernel)?);
        let mut lines = format!("services: {:#?}\n", state.config.services);
        lines.push_str(&format!("backends: {:?}\n", world.backends));
        for step in steps {
            let next = generate::next(*step, &world, &state, &self.network);
            lines.push_str(&format!("  {}\n", describe(&next)));
            if self.step(&mut state, &next, &mut Report::default()).is_err() {
                break;
            }
        }
        Ok(lines)
    }
}

fn describe(next: &Move) -> String {
    match next {
        Move::Packet { frame, ingress, gso_size, tagged } => {
            let tag = if *tagged { ", tagged" } else { "" };
            format!(
                "packet by interface {ingress}, gso {gso_size}{tag}: {}",
                compare::hex(&frame[..frame.len().min(96)])
            )
        }
        other => format!("{other:?}"),
    }
}
