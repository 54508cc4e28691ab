//! `reload`, `config diff`, `config commit`, `config rollback`.

use std::path::PathBuf;

use serde_json::Value;

use super::{
    Exit,
    args::ConfigVerb as Given,
    commands::{CONFIG, Failure, Outcome, Source, print, single},
    table,
};
use crate::{
    config,
    model::query::{ConfigChange, ConfigVerb, Query},
};

/// Carries out one of the verbs that change the configuration, or would.
pub(super) fn change(source: &Source<'_>, given: &Given) -> Outcome<Exit> {
    let (verb, file, done) = match given {
        Given::Diff { file } => (ConfigVerb::Diff, file, "would change"),
        Given::Commit { confirm: None, file: None } => (ConfigVerb::Confirm, &None, "kept"),
        Given::Commit { confirm, file } => (ConfigVerb::Commit(confirm.map(|time| time.as_secs())), file, "applied"),
        _ => (ConfigVerb::Rollback, &None, "in force again"),
    };
    let files = file.as_ref().map(texts).transpose()?;
    ask(source, &Query::Change(ConfigChange { verb, files }), done)
}

/// The files are read here: what a user may not read the daemon must not tell.
fn texts(file: &PathBuf) -> Outcome<Vec<(PathBuf, String)>> {
    let file = std::path::absolute(file).map_err(Failure::error)?;
    config::read_texts(&file).map_err(|error| Failure { exit: Exit::Usage, message: error.to_string() })
}

/// Asks for a change, and says what came of it.
pub(super) fn ask(source: &Source<'_>, query: &Query, done: &str) -> Outcome<Exit> {
    if source.global.kernel {
        let message = "the configuration is the daemon's; `--kernel` only reads the maps".into();
        return Err(Failure { exit: Exit::Usage, message });
    }
    let row = source.ask(query)?;
    let text = match source.global.output {
        super::args::Output::Table | super::args::Output::Wide => pretty(&row, done),
        _ => single(source, &CONFIG, row, |_| String::new())?,
    };
    print(&text);
    Ok(Exit::Ok)
}

fn pretty(row: &Value, done: &str) -> String {
    let lines = |key: &str| {
        let values = row.get(key).and_then(Value::as_array).cloned().unwrap_or_default();
        values.iter().map(table::plain).collect::<Vec<_>>()
    };
    let file = row.get("file").map(table::plain).unwrap_or_default();
    let (changes, restart) = (lines("changes"), lines("needs_restart"));
    let mut text = match (changes.is_empty(), restart.is_empty(), done) {
        (true, true, "applied" | "would change") => format!("{file}: nothing changed\n"),
        _ => format!("{file}: {done}\n"),
    };
    text.extend(changes.iter().map(|change| format!("  {change}\n")));
    text.extend(restart.iter().map(|change| format!("  needs a restart: {change}\n")));
    text.extend(lines("touches").iter().map(|touched| format!("  {touched}\n")));
    if let Some(seconds) = row.get("confirm_within").and_then(Value::as_u64) {
        text.push_str(&format!("  rolls back in {seconds} s unless `edge-ctl config commit` keeps it\n"));
    }
    if let Some(note) = row.get("note").and_then(Value::as_str) {
        text.push_str(&format!("  {note}\n"));
    }
    text
}
