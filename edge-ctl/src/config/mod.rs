//! Configuration. `raw` holds what the files say and where, `read` takes it apart key by key, and [`valid`] is the only
//! form that travels: one door between the two, [`load`]. Every fault is reported, each with its file and line.

mod any_port;
mod bgp;
mod bgp_session;
pub mod diff;
mod edge;
mod health;
pub mod import_frr;
mod lifetimes;
pub mod lint;
mod log;
pub mod memory;
mod policy;
mod protect;
mod raw;
mod read;
mod resolver;
mod selection;
mod service;
pub mod valid;
pub use protect::range as source_range;
pub use values::duration;
mod values;

use std::{
    fmt, fs,
    path::{Path, PathBuf},
};

pub use valid::Config;

use raw::{Merged, Place};
use read::{Report, Section};

/// JSON schema of the configuration, draft 2020-12, for editors; [`load`] is what decides.
pub const SCHEMA: &str = include_str!("../../../deploy/edge.schema.json");

/// One fault in a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The file.
    pub file: PathBuf,
    /// Line from 1; `None`: the fault is in no line (the file cannot be read, a table is missing).
    pub line: Option<usize>,
    /// What is wrong and what is accepted.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(f, "{}:{line}: {}", self.file.display(), self.message),
            None => write!(f, "{}: {}", self.file.display(), self.message),
        }
    }
}

/// Why a configuration is refused: every fault found, in the order of files and lines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    /// At least one.
    pub problems: Vec<Problem>,
}

impl ConfigError {
    /// One line for each fault.
    pub fn lines(&self) -> Vec<String> {
        self.problems.iter().map(ToString::to_string).collect()
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.lines().join("\n"))
    }
}

impl std::error::Error for ConfigError {}

/// Reads `path` and, merged into it, `conf.d/*.toml` beside it in the order of their names.
///
/// # Errors
/// All faults of all files; a file that cannot be read is one of them.
pub fn load(path: &Path) -> Result<Config, ConfigError> {
    let texts = read_texts(path)?;
    build(&texts, path)
}

/// The text of one configuration, as from a file called `file`.
///
/// # Errors
/// All faults in it.
pub fn parse(text: &str, file: &Path) -> Result<Config, ConfigError> {
    build(&[(file.to_owned(), text.to_owned())], file)
}

/// The configuration in these files, the main one first: [`read_texts`] and this are [`load`].
///
/// # Errors
/// All faults in them.
pub fn parse_texts(texts: &[(PathBuf, String)]) -> Result<Config, ConfigError> {
    let main = texts.first().map_or(Path::new("edge.toml"), |(file, _)| file.as_path());
    build(texts, main)
}

/// The files that [`load`] reads, with their texts: the main file first.
///
/// # Errors
/// The files that cannot be read.
pub fn read_texts(path: &Path) -> Result<Vec<(PathBuf, String)>, ConfigError> {
    let mut files = vec![path.to_owned()];
    let fragments = path.parent().unwrap_or(Path::new("")).join("conf.d");
    let mut problems = Vec::new();
    match fs::read_dir(&fragments) {
        Ok(entries) => {
            let mut found: Vec<_> = entries
                .filter_map(|entry| entry.ok().map(|entry| entry.path()))
                .filter(|path| path.extension().is_some_and(|extension| extension == "toml"))
                .collect();
            found.sort();
            files.append(&mut found);
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => {
            problems.push(Problem { file: fragments, line: None, message: format!("cannot be read: {error}") })
        }
    }
    let mut texts = Vec::new();
    for file in files {
        match fs::read_to_string(&file) {
            Ok(text) => texts.push((file, text)),
            Err(error) => problems.push(Problem { file, line: None, message: format!("cannot be read: {error}") }),
        }
    }
    if problems.is_empty() { Ok(texts) } else { Err(ConfigError { problems }) }
}

fn build(texts: &[(PathBuf, String)], main: &Path) -> Result<Config, ConfigError> {
    let report = Report::default();
    let mut merged = Merged::default();
    for (file, text) in texts {
        merged.add(file, text, &report);
    }
    // A file that is not TOML would only cause errors that follow from it ("table missing").
    if report.is_empty() {
        let at = Place::of_file(main);
        if let (Some(config), true) = (validate(&merged, at, &report), report.is_empty()) {
            return Ok(config);
        }
    }
    Err(ConfigError { problems: report.into_problems() })
}

/// `None` only where something was reported; a part that is wrong is left out so that the rest is still read.
fn validate(merged: &Merged, at: Place, report: &Report) -> Option<Config> {
    let root = Section::root(report, at, merged.table());
    let edge = edge::edge(&root);
    let http = edge::http(&root);
    let access_log = log::log(&root);
    let resolvers = service::resolvers(&root);
    let bgp = bgp::bgp(&root);
    let pod_networks = edge.as_ref().map_or(&[][..], |edge| &edge.pod_networks);
    let backends = edge.as_ref().map_or(edge_common::maps::BACKENDS, |edge| edge.tables.backends);
    let own = any_port::own_addresses(http, bgp.as_ref());
    let context = service::Context { pod_networks, resolvers: &resolvers, has_bgp: root.has("bgp"), backends, own };
    let services = service::services(&root, &context);
    root.finish();
    let bgp = bgp.map(|bgp| bgp::guarded(bgp, pod_networks, &services));
    Some(Config { edge: edge?, http, access_log, resolvers: resolvers.into_values(), bgp, services })
}

#[cfg(test)]
mod schema_tests;
#[cfg(test)]
mod tests;
