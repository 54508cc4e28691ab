//! The command line: arguments -> a question -> rows -> a table, JSON or YAML. Rows come from the daemon's socket or, with
//! `--kernel`, from whoever reads the pinned maps; `main.rs` plugs that and everything else this layer may not import.

mod acl;
mod args;
mod bgp;
mod capture;
mod change;
mod client;
mod commands;
mod describe;
mod dns;
mod flows;
mod orders;
mod sessions;
mod table;
mod views;

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::Parser;

use crate::model::{
    capture::Tap,
    query::{Answer, Query, ViewError},
};

/// Where the configuration is unless `-c` says otherwise.
pub const DEFAULT_CONFIG: &str = "/etc/edge/edge.toml";
/// Where the daemon listens unless the configuration says otherwise.
pub const DEFAULT_SOCKET: &str = "/run/edge/edge.sock";
/// Where the pins are unless the configuration says otherwise.
pub const DEFAULT_PINS: &str = "/sys/fs/bpf/edge";

/// What the shell is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// 0.
    Ok,
    /// 1: something failed.
    Error,
    /// 2: wrong arguments or configuration.
    Usage,
    /// 3: it works, but not as configured (`status`).
    Degraded,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(match exit {
            Exit::Ok => 0,
            Exit::Error => 1,
            Exit::Usage => 2,
            Exit::Degraded => 3,
        })
    }
}

/// Whoever answers from the pinned maps, with the daemon alive or dead.
pub trait KernelViews {
    /// The same rows as the daemon's, out of the pins below `pins`.
    ///
    /// # Errors
    /// [`ViewError::Unavailable`] for what only the daemon knows.
    fn answer(&self, pins: &Path, query: &Query) -> Result<Answer, ViewError>;
}

/// A configuration that was found valid, as far as the command line needs it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckedConfig {
    /// `[edge] socket`.
    pub socket: PathBuf,
    /// `[edge] pin_path`.
    pub pin_path: PathBuf,
    /// What it holds, in words, one line.
    pub summary: String,
    /// Kernel memory of the maps: name, entries, bytes.
    pub memory: Vec<(String, u64, u64)>,
    /// What is allowed but probably not meant.
    pub warnings: Vec<String>,
}

/// Opens the program's capture below a pin folder, or says why it cannot.
pub type OpenTap = dyn Fn(&Path) -> Result<Box<dyn Tap>, String>;

/// What the command line calls but may not import.
pub struct Wiring<'a> {
    /// Runs the daemon with a configuration file until it is told to stop; prints its own errors.
    pub run: &'a dyn Fn(&Path) -> Exit,
    /// Reads and validates a configuration file; the lines are its faults.
    pub check: &'a dyn Fn(&Path) -> Result<CheckedConfig, Vec<String>>,
    /// Answers for `--kernel`.
    pub kernel: &'a dyn KernelViews,
    /// Opens the program's capture below a pin folder.
    pub tap: &'a OpenTap,
}

/// Parses `arguments` (the program's name first), does what they say, prints to stdout and stderr.
pub fn main(arguments: impl IntoIterator<Item = OsString>, wiring: &Wiring<'_>) -> Exit {
    match args::Cli::try_parse_from(arguments) {
        Ok(cli) => commands::execute(cli, wiring),
        Err(error) => {
            // Help and version are "errors" to clap; a closed stdout is nobody's problem here.
            let _ = error.print();
            if error.use_stderr() { Exit::Usage } else { Exit::Ok }
        }
    }
}
