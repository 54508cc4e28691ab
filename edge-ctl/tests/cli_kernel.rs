//! `--kernel`: what the command line asks of whoever reads the pinned maps, and what it never asks.
#![allow(
    clippy::unwrap_used,
    reason = "a test may stop at the first broken assumption; clippy knows only #[test] as one"
)]

use std::{
    cell::RefCell,
    ffi::OsString,
    path::{Path, PathBuf},
};

use edge_ctl::{
    cli::{self, CheckedConfig, Exit, KernelViews, Wiring},
    model::{
        query::{Answer, Query, ViewError},
        view::ServiceRow,
    },
};

/// Knows services and backends, and remembers what it was asked.
#[derive(Default)]
struct Pins {
    asked: RefCell<Vec<(PathBuf, Query)>>,
}

impl KernelViews for Pins {
    fn answer(&self, pins: &Path, query: &Query) -> Result<Answer, ViewError> {
        self.asked.borrow_mut().push((pins.to_owned(), query.clone()));
        match query {
            Query::Services => Ok(Answer::Services(vec![ServiceRow { name: "web".into(), ..ServiceRow::default() }])),
            Query::Backends => Ok(Answer::Backends(Vec::new())),
            _ => Err(ViewError::Unavailable("only the daemon knows".into())),
        }
    }
}

fn run(pins: &Pins, line: &str) -> Exit {
    let check = |_: &Path| {
        Ok(CheckedConfig { socket: "/nonexistent".into(), pin_path: "/from/config".into(), ..CheckedConfig::default() })
    };
    let wiring = Wiring { run: &|_| Exit::Error, check: &check, kernel: pins, tap: &|_| Err(String::new()) };
    cli::main(std::iter::once("edge-ctl").chain(line.split(' ')).map(OsString::from), &wiring)
}

#[test]
fn rows_come_from_the_pins_and_no_daemon_is_asked() {
    let pins = Pins::default();
    assert_eq!(run(&pins, "--kernel service list"), Exit::Ok);
    assert_eq!(run(&pins, "service describe web --kernel --pin-path /else"), Exit::Ok);
    assert_eq!(run(&pins, "get services --kernel -c edge.toml"), Exit::Ok);
    let asked: Vec<(String, Query)> =
        pins.asked.take().into_iter().map(|(pins, query)| (pins.display().to_string(), query)).collect();
    let expected = [
        ("/sys/fs/bpf/edge", Query::Services),
        ("/else", Query::Services),
        ("/else", Query::Backends),
        ("/from/config", Query::Services),
    ];
    assert_eq!(asked, expected.map(|(pins, query)| (pins.to_owned(), query)));
}

#[test]
fn what_only_the_daemon_knows_is_an_error_and_a_reload_is_never_asked_for() {
    let pins = Pins::default();
    assert_eq!(run(&pins, "--kernel bgp summary"), Exit::Error);
    pins.asked.take();
    assert_eq!(run(&pins, "--kernel reload"), Exit::Usage);
    assert!(pins.asked.take().is_empty());
}

#[test]
fn the_daemon_runs_with_the_file_given_or_the_default() {
    let pins = Pins::default();
    for (line, file) in [("run -c /tmp/edge.toml", "/tmp/edge.toml"), ("run", "/etc/edge/edge.toml")] {
        let seen = RefCell::new(None);
        let start = |path: &Path| {
            *seen.borrow_mut() = Some(path.to_owned());
            Exit::Degraded
        };
        let wiring = Wiring { run: &start, check: &|_| Err(Vec::new()), kernel: &pins, tap: &|_| Err(String::new()) };
        let arguments = std::iter::once("edge-ctl").chain(line.split(' ')).map(OsString::from);
        assert_eq!(cli::main(arguments, &wiring), Exit::Degraded);
        assert_eq!(seen.take(), Some(PathBuf::from(file)));
    }
}
