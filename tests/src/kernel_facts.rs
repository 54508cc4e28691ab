//! What the running kernel's verifier says of each program: instructions processed, stack, size. `edge-lab kernel-facts`
//! prints it, and `cargo xtask build-ebpf --docs` writes it into docs/kernels.md.
#![allow(unsafe_code, reason = "aya gives the verifier's log only where it refuses a program")]

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    fmt, io,
    os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd},
};

use anyhow::{Context, Result, bail};
use aya::{Ebpf, programs::ProgramInfo};
use aya_obj::{
    Object, ProgramSection,
    generated::{bpf_insn, bpf_map_type},
};
use edge_ctl::datapath::btf::Btf;

/// The programs of the object, with the number of their type.
const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;
const BPF_PROG_TYPE_XDP: u32 = 6;
const BPF_PROG_LOAD: libc::c_int = 5;
/// `BPF_LOG_STATS`: the verifier's last lines only.
const LOG_STATS: u32 = 4;
/// `BPF_F_XDP_HAS_FRAGS` (kernel 5.18).
const XDP_HAS_FRAGS: u32 = 1 << 5;
/// `BPF_JMP | BPF_CALL`.
const CALL: u8 = 0x85;
/// `src_reg` of a call of another function of the same program.
const PSEUDO_CALL: u8 = 1;
/// The largest stack of a chain of calls, bytes (`MAX_BPF_STACK`).
pub const MAX_STACK: u32 = 512;
/// Instructions that the verifier processes at most (`BPF_COMPLEXITY_LIMIT_INSNS`, kernel 5.2).
pub const MAX_PROCESSED: u32 = 1_000_000;

/// One program.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// Its name.
    pub program: String,
    /// Instructions in the object.
    pub instructions: usize,
    /// Instructions that the verifier processed, over all paths.
    pub processed: u32,
    /// States that the verifier held at most.
    pub peak_states: u32,
    /// Stack of each function, bytes, the entry point first.
    pub stacks: Vec<u32>,
    /// Stack of the deepest chain of calls, each frame rounded up to 32 as the verifier does.
    pub deepest: u32,
    /// Names of the functions of that chain and their stack.
    pub chain: Vec<(String, u32)>,
    /// Machine code, bytes; 0 where there is no JIT, or it may not be read.
    pub jited: u32,
}

impl fmt::Display for Facts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let stacks: Vec<String> = self.stacks.iter().map(u32::to_string).collect();
        write!(
            f,
            "| `{}` | {} | {} | {} | {} | {} | {} |",
            self.program,
            self.instructions,
            self.processed,
            self.peak_states,
            self.deepest,
            stacks.join(" "),
            self.jited
        )
    }
}

/// Head of the table of [`Facts`].
pub const HEAD: &str = "| program | instructions | processed by the verifier (limit 1,000,000) | peak states | deepest stack (limit 512) | stack of each function | machine code, bytes |\n\
                        | --- | --- | --- | --- | --- | --- | --- |";

/// Numbers of the helpers that any program of the object calls.
///
/// # Errors
/// Where it is no eBPF object.
pub fn helpers(object: &[u8]) -> Result<BTreeSet<i32>> {
    let object = Object::parse(object).context("read the eBPF object")?;
    let instructions = object.functions.values().flat_map(|function| &function.instructions);
    Ok(instructions.filter(|ins| ins.code == CALL && ins.src_reg() == 0).map(|ins| ins.imm).collect())
}

/// Types of the maps of the object.
///
/// # Errors
/// Where it is no eBPF object.
pub fn map_types(object: &[u8]) -> Result<BTreeSet<String>> {
    let object = Object::parse(object).context("read the eBPF object")?;
    let name = |map: &aya_obj::Map| -> Result<String> {
        let kind = bpf_map_type::try_from(map.map_type()).ok().context("a map of a type unknown to aya")?;
        Ok(format!("{kind:?}").trim_start_matches("BPF_MAP_TYPE_").to_owned())
    };
    object.maps.values().map(name).collect()
}

/// Prints the table of this kernel.
///
/// # Errors
/// As [`of`].
pub fn print() -> Result<()> {
    println!("{HEAD}");
    let all = of(edge_ctl::datapath::object::EBPF_OBJECT)?;
    for facts in &all {
        println!("{facts}");
    }
    for facts in &all {
        let chain: Vec<String> = facts.chain.iter().map(|(name, stack)| format!("{name} {stack}")).collect();
        println!("{}: {} bytes = {}", facts.program, facts.deepest, chain.join(" > "));
    }
    Ok(())
}

/// Asks the verifier about every program of the object. Needs root; leaves nothing behind.
///
/// # Errors
/// What the verifier says where it refuses one.
pub fn of(object: &[u8]) -> Result<Vec<Facts>> {
    let object = &*edge_ctl::datapath::object::for_this_kernel(object);
    let loaded = Ebpf::load(object).context("create the object's maps")?;
    let mut parsed = Object::parse(object).context("read the eBPF object")?;
    let maps: Vec<(String, OwnedFd)> = parsed
        .maps
        .keys()
        .filter_map(|name| Some((name, loaded.map(name)?)))
        .map(|(name, map)| Ok((name.clone(), descriptor(map)?)))
        .collect::<Result<_>>()?;
    let text = parsed.functions.keys().map(|(section, _)| *section).collect::<HashSet<_>>();
    let definitions: BTreeMap<_, _> = parsed.maps.drain().collect();
    let by_name = maps.iter().filter_map(|(name, fd)| Some((name.as_str(), fd.as_raw_fd(), definitions.get(name)?)));
    parsed.relocate_maps(by_name, &text).context("relocate maps")?;
    parsed.relocate_calls(&text).context("relocate calls")?;
    let btf = parsed.btf.as_ref().and_then(|btf| Btf::parse(&btf.to_bytes()));
    let mut facts = Vec::new();
    for (name, program) in &parsed.programs {
        let (kind, flags) = match program.section {
            ProgramSection::Xdp { frags, .. } => (BPF_PROG_TYPE_XDP, if frags { XDP_HAS_FRAGS } else { 0 }),
            ProgramSection::SchedClassifier => (BPF_PROG_TYPE_SCHED_CLS, 0),
            _ => bail!("{name} has a program type without a place here"),
        };
        let function = parsed.functions.get(&program.function_key()).with_context(|| format!("no code of {name}"))?;
        let named = |at: usize| {
            // In bytes until the function is linked into its program, in instructions afterwards.
            let found = function.func_info.func_info.iter().find(|info| info.insn_off as usize == at);
            found.and_then(|info| btf.as_ref()?.function(info.type_id)).unwrap_or_else(|| format!("at {at}"))
        };
        let mut of_program = load(name, kind, flags, &function.instructions)?;
        let (deepest, chain) = deepest(&function.instructions, &of_program.stacks)
            .with_context(|| format!("follow the calls of {name}"))?;
        of_program.deepest = deepest;
        of_program.chain = chain.into_iter().map(|(at, stack)| (named(at), stack)).collect();
        facts.push(of_program);
    }
    facts.sort_by(|one, other| one.program.cmp(&other.program));
    Ok(facts)
}

/// A descriptor of a map of whatever type.
fn descriptor(map: &aya::maps::Map) -> Result<OwnedFd> {
    use aya::maps::Map;
    let (Map::Array(data)
    | Map::PerCpuArray(data)
    | Map::HashMap(data)
    | Map::LruHashMap(data)
    | Map::PerCpuHashMap(data)
    | Map::PerCpuLruHashMap(data)
    | Map::LpmTrie(data)
    | Map::RingBuf(data)
    | Map::ProgramArray(data)
    | Map::PerfEventArray(data)
    | Map::Unsupported(data)) = map
    else {
        bail!("a map of a type that the facts do not know")
    };
    data.fd().as_fd().try_clone_to_owned().context("duplicate a map's descriptor")
}

/// `union bpf_attr` as far as loading a program reads it (`include/uapi/linux/bpf.h`).
#[repr(C)]
#[derive(Default)]
struct Load {
    kind: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buffer: u64,
    kernel_version: u32,
    flags: u32,
}

fn load(name: &str, kind: u32, flags: u32, instructions: &[bpf_insn]) -> Result<Facts> {
    let license = c"Dual MIT/GPL";
    let mut log = vec![0_u8; 1 << 20];
    let attributes = Load {
        kind,
        instruction_count: u32::try_from(instructions.len())?,
        instructions: instructions.as_ptr() as u64,
        license: license.as_ptr() as u64,
        log_level: LOG_STATS,
        log_size: u32::try_from(log.len())?,
        log_buffer: log.as_mut_ptr() as u64,
        flags,
        ..Load::default()
    };
    // SAFETY: the kernel reads `size_of::<Load>()` bytes of `attributes` and the instructions and license it points to,
    // and writes at most `log_size` bytes to the log; all outlive the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw const attributes, size_of::<Load>()) };
    let error = io::Error::last_os_error();
    let log = String::from_utf8_lossy(log.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned();
    if result < 0 {
        bail!("the verifier refuses {name}: {error}\n{log}");
    }
    // SAFETY: the kernel has just given this descriptor to us, and nobody else knows it.
    let program = unsafe { OwnedFd::from_raw_fd(i32::try_from(result)?) };
    let mut facts = parse(name, &log).with_context(|| format!("the verifier said of {name}: {log}"))?;
    facts.instructions = instructions.len();
    facts.jited = size(&program)?;
    Ok(facts)
}

/// The size of the machine code, by way of a pin-less look at all programs.
fn size(program: &OwnedFd) -> Result<u32> {
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", program.as_raw_fd()))?;
    let id = info.lines().find_map(|line| line.strip_prefix("prog_id:")).context("no prog_id in fdinfo")?;
    let id: u32 = id.trim().parse()?;
    let found = aya::programs::loaded_programs().flatten().find(|info| info.id() == id);
    Ok(found.as_ref().map_or(0, ProgramInfo::size_jitted))
}

fn parse(name: &str, log: &str) -> Result<Facts> {
    let number = |word: &str, before: &str| -> Option<u32> {
        let (_, rest) = log.split_once(&format!("{before}{word} "))?;
        rest.split_whitespace().next()?.parse().ok()
    };
    let stacks = log.lines().find_map(|line| line.strip_prefix("stack depth ")).context("no stack depth")?;
    let stacks = stacks.split_whitespace().next().unwrap_or_default();
    Ok(Facts {
        program: name.to_owned(),
        processed: number("processed", "").context("no count of instructions")?,
        peak_states: number("peak_states", "").context("no count of states")?,
        stacks: stacks.split('+').map(str::parse).collect::<Result<_, _>>().context("stack depths")?,
        ..Facts::default()
    })
}

/// The stack of the deepest chain of calls from the first function; and the functions of that chain, by where they start,
/// with their own.
fn deepest(instructions: &[bpf_insn], stacks: &[u32]) -> Result<(u32, Vec<(usize, u32)>)> {
    let target = |at: usize, ins: &bpf_insn| usize::try_from(i64::try_from(at).ok()? + i64::from(ins.imm) + 1).ok();
    let calls: Vec<(usize, usize)> = instructions
        .iter()
        .enumerate()
        .filter(|(_, ins)| ins.code == CALL && ins.src_reg() == PSEUDO_CALL)
        .filter_map(|(at, ins)| Some((at, target(at, ins)?)))
        .collect();
    let starts: Vec<usize> =
        std::iter::once(0).chain(calls.iter().map(|(_, to)| *to)).collect::<BTreeSet<_>>().into_iter().collect();
    if starts.len() != stacks.len() {
        bail!("{} functions, but {} stack depths", starts.len(), stacks.len());
    }
    let owner = |at: usize| starts.partition_point(|start| *start <= at) - 1;
    let edges: BTreeSet<(usize, usize)> = calls.iter().map(|(at, to)| (owner(*at), owner(*to))).collect();
    let (depth, functions) = chain(0, &edges, stacks);
    let named = functions.into_iter().filter_map(|function| Some((*starts.get(function)?, *stacks.get(function)?)));
    Ok((depth, named.collect()))
}

/// Programs have no recursion: the verifier has accepted them.
fn chain(function: usize, edges: &BTreeSet<(usize, usize)>, stacks: &[u32]) -> (u32, Vec<usize>) {
    let own = stacks.get(function).map_or(0, |stack| (*stack).max(1).next_multiple_of(32));
    let callees = edges.range((function, 0)..=(function, usize::MAX));
    let (below, mut functions) =
        callees.map(|(_, callee)| chain(*callee, edges, stacks)).max_by_key(|(depth, _)| *depth).unwrap_or_default();
    functions.insert(0, function);
    (own + below, functions)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "verification time 4321 usec\nstack depth 200+40+0\nprocessed 8123 insns (limit 1000000) \
                       max_states_per_insn 9 total_states 400 peak_states 380 mark_read 60\n";

    #[test]
    fn the_verifiers_last_lines_are_understood() {
        let facts = parse("edge_xdp", LOG).unwrap();
        assert_eq!((facts.processed, facts.peak_states), (8123, 380));
        assert_eq!(facts.stacks, [200, 40, 0]);
        assert!(parse("edge_xdp", "stack depth 1\n").is_err());
    }

    #[test]
    fn the_deepest_chain_counts_whole_frames_of_32_bytes() {
        let edges = BTreeSet::from([(0, 1), (0, 2), (2, 3)]);
        assert_eq!(chain(0, &edges, &[200, 100, 40, 1]), (224 + 128, vec![0, 1]));
        assert_eq!(chain(0, &edges, &[200, 40, 40, 33]), (224 + 64 + 64, vec![0, 2, 3]));
    }
}
