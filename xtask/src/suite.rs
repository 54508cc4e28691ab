//! `cargo xtask test`: every test, with the counts of what passed, failed and was skipped.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    process::{Command, ExitCode, Stdio},
    sync::Mutex,
    thread,
};

use anyhow::{Context, Result};

use crate::sh::{cargo, root, show, step};

/// Ten times as many schedules in the same time. The daemon itself is built without, which takes a third of the time.
const OPTIMISED: &str = "profile.dev.package.edge-ctl.opt-level=1";
/// Schedules of each kind for the simulation as it is built with all other tests: that it builds and runs there too.
const FEW_SCHEDULES: &str = "100";

/// What the output of test programs amounts to.
#[derive(Debug, Default, PartialEq, Eq)]
struct Counts {
    passed: usize,
    failed: usize,
    ignored: usize,
    skipped: Vec<String>,
    broken: Vec<String>,
}

/// Runs everything. Fails where a test fails, or cannot be built or run.
pub fn run(full: bool) -> Result<ExitCode> {
    step(if full { "tests, full counts" } else { "tests, reduced counts (--full for all of them)" });
    let counts = Mutex::new(Counts::default());
    // Scenarios start edge-ctl and edge-lab, which the tests of other packages would not build.
    step("build");
    let built = execute(cargo().args(["build", "--workspace", "--locked", "--bins"]), &counts)?;
    if built {
        step("unit tests");
        // The simulation has a step of its own, below.
        unit_tests(full, &[], FEW_SCHEDULES, &counts)?;
        test(full, &["--package", "edge-tests", "--lib", "--bins"], &[], &counts)?;
        for name in test_programs()? {
            step(&format!("tests/{name}"));
            // A scenario has the machine to itself: its limits are on time.
            let serial: &[&str] = if name.starts_with("scenario_") { &["--test-threads=1"] } else { &[] };
            test(full, &["--package", "edge-tests", "--test", &name], serial, &counts)?;
        }
        step("the simulation of BGP, optimised");
        let schedules = if full { "100000" } else { "50000" };
        unit_tests(full, &["--config", OPTIMISED, "--test", "bgp_simulation"], schedules, &counts)?;
    }
    let counts = counts.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    Ok(if report(&counts, full) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn report(counts: &Counts, full: bool) -> bool {
    println!();
    for line in &counts.skipped {
        println!("SKIPPED {line}");
    }
    for command in &counts.broken {
        println!("FAILED  {command}");
    }
    println!("scenario counts: {}", if full { "full" } else { "reduced (`cargo xtask test --full` for all of them)" });
    // libtest counts a test that found it cannot run as passed.
    let passed = counts.passed.saturating_sub(counts.skipped.len());
    println!("{passed} passed, {} failed, {} skipped", counts.failed, counts.skipped.len() + counts.ignored);
    counts.failed == 0 && counts.broken.is_empty()
}

fn test_programs() -> Result<Vec<String>> {
    let folder = root().join("tests/tests");
    let entries = fs::read_dir(&folder).with_context(|| format!("read {}", folder.display()))?;
    let mut names: Vec<String> =
        entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.strip_suffix(".rs").map(str::to_owned)).collect();
    // Scenarios last: what is wrong in a part shows before they do.
    names.sort_by_key(|name| (name.starts_with("scenario_"), name.clone()));
    Ok(names)
}

/// The tests of every package but edge-tests: always the same packages, or their dependencies would be built anew with other
/// features.
fn unit_tests(full: bool, options: &[&str], schedules: &str, counts: &Mutex<Counts>) -> Result<()> {
    let mut command = cargo();
    command.args(["test", "--locked", "--no-fail-fast", "--workspace", "--exclude", "edge-tests"]).args(options);
    command.env("EDGE_TEST_FULL", full_flag(full)).env("EDGE_SIM_SCHEDULES", schedules);
    execute(&mut command, counts).map(|_| ())
}

const fn full_flag(full: bool) -> &'static str {
    if full { "1" } else { "0" }
}

fn test(full: bool, what: &[&str], options: &[&str], counts: &Mutex<Counts>) -> Result<()> {
    let mut command = cargo();
    command.args(["test", "--locked", "--no-fail-fast"]).args(what).arg("--").args(options);
    command.env("EDGE_TEST_FULL", full_flag(full));
    execute(&mut command, counts).map(|_| ())
}

/// Runs a command, its output shown and counted; true where it succeeded.
fn execute(command: &mut Command, counts: &Mutex<Counts>) -> Result<bool> {
    execute_to(command, counts, std::io::stdout(), std::io::stderr())
}

fn execute_to(
    command: &mut Command,
    counts: &Mutex<Counts>,
    mut shown: impl Write + Send,
    mut shown_errors: impl Write + Send,
) -> Result<bool> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start `{}`", show(command)))?;
    let mut failed_before = 0;
    note(counts, |counts| failed_before = counts.failed);
    let (out, errors) = (child.stdout.take(), child.stderr.take());
    thread::scope(|scope| {
        scope.spawn(|| out.map(|pipe| follow(pipe, &mut shown, counts)));
        scope.spawn(|| errors.map(|pipe| follow(pipe, &mut shown_errors, counts)));
    });
    let status = child.wait().with_context(|| format!("wait for `{}`", show(command)))?;
    if !status.success() {
        note(counts, |counts| {
            counts.broken.push(show(command));
            // One that failed without a failed test was not built, or crashed.
            counts.failed += usize::from(counts.failed == failed_before);
        });
    }
    Ok(status.success())
}

fn follow(pipe: impl Read, terminal: &mut dyn Write, counts: &Mutex<Counts>) {
    for line in BufReader::new(pipe).split(b'\n').map_while(Result::ok) {
        let text = String::from_utf8_lossy(&line);
        note(counts, |counts| counts.read(&text));
        // A closed terminal must not end the tests.
        let _ = writeln!(terminal, "{text}");
    }
}

fn note(counts: &Mutex<Counts>, change: impl FnOnce(&mut Counts)) {
    change(&mut counts.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
}

impl Counts {
    /// Takes a line of output into account: libtest's summary, or a skipped test.
    fn read(&mut self, line: &str) {
        // libtest prints `test NAME ... ` without a newline, so the mark may stand inside a line.
        if let Some((_, skipped)) = line.split_once("SKIPPED ") {
            self.skipped.push(skipped.to_owned());
        }
        let Some(summary) = line.strip_prefix("test result: ") else { return };
        for part in summary.split([';', '.']) {
            let mut words = part.split_whitespace();
            let (Some(number), Some(kind)) = (words.next().and_then(|word| word.parse::<usize>().ok()), words.next())
            else {
                continue;
            };
            match kind {
                "passed" => self.passed += number,
                "failed" => self.failed += number,
                "ignored" => self.ignored += number,
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Without showing the output, which would be counted again by the run these tests are part of.
    fn hidden(command: &mut Command, counts: &Mutex<Counts>) -> bool {
        execute_to(command, counts, std::io::sink(), std::io::sink()).unwrap()
    }

    #[test]
    fn summaries_of_several_programs_add_up() {
        let mut counts = Counts::default();
        counts.read("test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s");
        counts
            .read("test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured; 7 filtered out; finished in 1.20s");
        assert_eq!((counts.passed, counts.failed, counts.ignored), (15, 2, 1));
    }

    #[test]
    fn a_skipped_test_is_counted_wherever_it_stands_in_a_line() {
        let mut counts = Counts::default();
        counts.read("test a_test ... SKIPPED a_test: no bpffs");
        counts.read("SKIPPED other: not root");
        counts.read("test third ... ok");
        assert_eq!(counts.skipped, ["a_test: no bpffs", "other: not root"]);
    }

    #[test]
    fn a_program_that_failed_without_a_summary_is_a_failure() {
        let counts = Counts { passed: 5, broken: vec!["cargo test".to_owned()], ..Counts::default() };
        assert!(!report(&counts, false));
        assert!(report(&Counts { passed: 5, ..Counts::default() }, false));
        let counts = Mutex::new(Counts::default());
        assert!(!hidden(Command::new("sh").args(["-c", "exit 3"]), &counts));
        assert_eq!(counts.into_inner().unwrap().failed, 1);
    }

    #[test]
    fn a_program_whose_tests_failed_is_counted_once() {
        let counts = Mutex::new(Counts::default());
        let summary = "test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out";
        assert!(!hidden(Command::new("sh").args(["-c", &format!("echo '{summary}'; exit 101")]), &counts));
        assert_eq!(counts.into_inner().unwrap().failed, 2);
    }
}
