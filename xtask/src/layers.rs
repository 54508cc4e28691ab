//! `cargo xtask check-layers`: imports go one way only (`docs/architecture.md`).
//!
//! Sources are read without being compiled: comments and literals are blanked, then every path is looked at, in `use`
//! trees and elsewhere. Test modules at the end of a file are exempt from the rules about outside crates only as far
//! as they begin with `#[cfg(test)]`.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, Result};

use crate::sh::{root, step};

/// A module of edge-ctl and the modules of edge-ctl it may name. Modules that are not listed may name every one.
const MODULES: [(&str, &[&str]); 10] = [
    ("model", &[]),
    ("config", &["model"]),
    ("sources", &["model", "config", "desired", "reconcile"]),
    ("desired", &["model", "config", "sources", "bgp"]),
    ("bgp", &["model", "config"]),
    ("reconcile", &["model", "config", "sources", "desired", "bgp"]),
    ("datapath", &["model", "config", "sources", "desired", "reconcile"]),
    ("fib", &["model", "config", "sources", "desired", "reconcile"]),
    ("api", &["model", "status"]),
    ("cli", &["model", "config", "api", "status"]),
];

/// Modules that decide only: time and randomness come in as arguments, nothing goes out.
const PURE: [&str; 13] = [
    "model",
    "desired",
    "sources::health::book",
    "sources::health::panic",
    "sources::health::passive",
    "sources::health::state",
    "reconcile::diff",
    "reconcile::ports",
    "bgp::wire",
    "bgp::fsm",
    "bgp::rib",
    "bgp::bestpath",
    "bgp::policy",
];

/// What pure modules may not name.
const IMPURE: [&str; 22] = [
    "tokio",
    "aya",
    "rtnetlink",
    "netlink_packet_core",
    "netlink_packet_route",
    "socket2",
    "libc",
    "hyper",
    "axum",
    "rand",
    "std::net::TcpStream",
    "std::net::TcpListener",
    "std::net::UdpSocket",
    "std::os::unix::net",
    "std::fs",
    "std::process",
    "std::thread",
    "std::env",
    "std::time::Instant::now",
    "std::time::SystemTime::now",
    "Instant::now",
    "SystemTime::now",
];

/// A crate's sources and the product crates they may not name.
const CRATES: [(&str, &[&str]); 5] = [
    ("edge-common/src", &["edge_ctl", "edge_tests", "aya_ebpf", "tokio"]),
    ("edge-ebpf/src", &["edge_ctl", "edge_tests"]),
    ("edge-ctl/src", &["edge_tests"]),
    ("tests/src", &["xtask"]),
    ("xtask/src", &["edge_common", "edge_ctl", "edge_tests"]),
];

/// A forbidden import.
#[derive(Debug, PartialEq, Eq)]
struct Finding {
    file: PathBuf,
    line: usize,
    what: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.file.display(), self.line, self.what)
    }
}

/// Checks the whole repository.
pub fn run() -> Result<ExitCode> {
    step("check-layers");
    let mut findings = Vec::new();
    let mut files = 0;
    for (folder, forbidden) in CRATES {
        for file in sources(&root().join(folder))? {
            let text = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
            let shown = file.strip_prefix(root()).unwrap_or(&file).to_owned();
            let module = file.strip_prefix(root().join(folder)).ok().map(module_path).unwrap_or_default();
            findings.extend(check(&shown, &text, &module, forbidden, folder == "edge-ctl/src"));
            files += 1;
        }
    }
    for finding in &findings {
        println!("{finding}");
    }
    println!("{files} files, {} forbidden imports", findings.len());
    Ok(if findings.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn sources(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    if !folder.exists() {
        return Ok(found);
    }
    for entry in fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(sources(&path)?);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// `bgp/wire/mod.rs` -> `[bgp, wire]`; `lib.rs` -> `[]`.
fn module_path(file: &Path) -> Vec<String> {
    let mut parts: Vec<String> =
        file.with_extension("").iter().map(|part| part.to_string_lossy().into_owned()).collect();
    if parts.last().is_some_and(|last| ["mod", "lib", "main"].contains(&last.as_str())) {
        parts.pop();
    }
    parts
}

fn check(file: &Path, text: &str, module: &[String], forbidden: &[&str], layered: bool) -> Vec<Finding> {
    let code = blank(text);
    let tests_from = test_module_line(&code);
    let top = module.first().map(String::as_str).unwrap_or_default();
    let name = module.join("::");
    let pure = layered && PURE.iter().any(|pure| name == *pure || name.starts_with(&format!("{pure}::")));
    let allowed = MODULES.iter().find(|(module, _)| layered && *module == top).map(|(_, allowed)| *allowed);
    let mut findings = Vec::new();
    for (line, path) in paths(&code) {
        let first = path.first().map(String::as_str).unwrap_or_default();
        let in_tests = tests_from.is_some_and(|start| line >= start);
        let mut report = |what: String| findings.push(Finding { file: file.to_owned(), line, what });
        if forbidden.contains(&first) {
            report(format!("names the crate {first}, which may not be imported here"));
        }
        if let Some(allowed) = allowed
            && !in_tests
            && let Some(target) = own_module(&path, module)
            && target != top
            && MODULES.iter().any(|(module, _)| *module == target)
            && !allowed.contains(&target.as_str())
        {
            report(format!("{top} may not import {target} (it may import {})", list(allowed)));
        }
        let joined = path.join("::");
        let impure = |name: &&&str| joined == **name || joined.starts_with(&format!("{name}::"));
        if pure
            && !in_tests
            && let Some(name) = IMPURE.iter().find(impure)
        {
            report(format!("{} is pure and may not use {name}", module.join("::")));
        }
    }
    findings.dedup();
    findings
}

fn list(names: &[&str]) -> String {
    if names.is_empty() { "no other module".to_owned() } else { names.join(", ") }
}

/// The top module of edge-ctl a path leads to, if it leads to one.
fn own_module(path: &[String], module: &[String]) -> Option<String> {
    match path.first()?.as_str() {
        "crate" => path.get(1).cloned(),
        "super" => {
            let ups = path.iter().take_while(|part| *part == "super").count();
            let base = module.get(..module.len().checked_sub(ups)?)?;
            base.iter().chain(&path[ups..]).next().cloned()
        }
        _ => None,
    }
}

/// The line where the file's test module begins.
fn test_module_line(code: &str) -> Option<usize> {
    let lines: Vec<&str> = code.lines().collect();
    let at = lines.iter().rposition(|line| line.trim() == "#[cfg(test)]")?;
    lines.get(at + 1)?.trim_start().starts_with("mod ").then_some(at + 1)
}

/// The source with comments, strings and character literals blanked, line by line as it was.
fn blank(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let mut out = String::with_capacity(text.len());
    let mut at = 0;
    while at < chars.len() {
        let rest = &chars[at..];
        let end = match rest {
            ['/', '/', ..] => rest.iter().position(|c| *c == '\n').unwrap_or(rest.len()),
            ['/', '*', ..] => block_comment(rest),
            ['r', '"' | '#', ..] if !is_word(chars.get(at.wrapping_sub(1))) => raw_string(rest).unwrap_or(1),
            ['"', ..] => string(rest),
            ['\'', ..] => character(rest),
            _ => 0,
        };
        if end == 0 {
            out.push(chars[at]);
            at += 1;
        } else {
            out.extend(rest[..end].iter().map(|c| if *c == '\n' { '\n' } else { ' ' }));
            at += end;
        }
    }
    out
}

fn is_word(c: Option<&char>) -> bool {
    c.is_some_and(|c| c.is_alphanumeric() || *c == '_')
}

fn block_comment(text: &[char]) -> usize {
    let (mut depth, mut at) = (0_usize, 0);
    while at < text.len() {
        match &text[at..] {
            ['/', '*', ..] => (depth, at) = (depth + 1, at + 2),
            ['*', '/', ..] => (depth, at) = (depth.saturating_sub(1), at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            break;
        }
    }
    at
}

fn string(text: &[char]) -> usize {
    let mut at = 1;
    while at < text.len() && text[at] != '"' {
        at += if text[at] == '\\' { 2 } else { 1 };
    }
    (at + 1).min(text.len())
}

/// `r"..."`, `r#"..."#`; `None` for a raw identifier.
fn raw_string(text: &[char]) -> Option<usize> {
    let hashes = text[1..].iter().take_while(|c| **c == '#').count();
    if text.get(1 + hashes) != Some(&'"') {
        return None;
    }
    let close: Vec<char> = std::iter::once('"').chain(std::iter::repeat_n('#', hashes)).collect();
    let start = 2 + hashes;
    let found = text[start..].windows(close.len()).position(|window| window == close);
    Some(found.map_or(text.len(), |found| start + found + close.len()))
}

/// A character literal; 0 for a lifetime.
fn character(text: &[char]) -> usize {
    match text {
        ['\'', '\\', ..] => 2 + text[2..].iter().skip(1).position(|c| *c == '\'').map_or(0, |found| found + 2),
        ['\'', _, '\'', ..] => 3,
        _ => 0,
    }
}

/// Every path of the code with its line, `use` trees taken apart: `use a::{b, c::d}` gives `a::b` and `a::c::d`.
fn paths(code: &str) -> Vec<(usize, Vec<String>)> {
    let tokens = tokens(code);
    let mut found = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        if is_path_part(&tokens[at].1) {
            at = path(&tokens, at, &mut Vec::new(), &mut found);
        } else {
            at += 1;
        }
    }
    found
}

type Token = (usize, String);

fn tokens(code: &str) -> Vec<Token> {
    let mut found: Vec<Token> = Vec::new();
    for (number, line) in code.lines().enumerate() {
        let mut rest = line;
        while let Some(c) = rest.chars().next() {
            let length = match rest {
                _ if rest.starts_with("::") => 2,
                _ if is_word(Some(&c)) => rest.find(|c: char| !is_word(Some(&c))).unwrap_or(rest.len()),
                _ => c.len_utf8(),
            };
            let (token, tail) = rest.split_at(length);
            if !token.trim().is_empty() {
                found.push((number + 1, token.to_owned()));
            }
            rest = tail;
        }
    }
    found
}

fn is_path_part(token: &str) -> bool {
    token.chars().next().is_some_and(|c| c.is_alphabetic() || c == '_')
}

/// Reads a path from `at`, with the parts before it in `prefix`; returns where it ends.
fn path(tokens: &[Token], mut at: usize, prefix: &mut Vec<String>, found: &mut Vec<(usize, Vec<String>)>) -> usize {
    let depth = prefix.len();
    let line = tokens[at].0;
    while let Some((_, token)) = tokens.get(at).filter(|(_, token)| is_path_part(token)) {
        prefix.push(token.clone());
        at += 1;
        if tokens.get(at).is_none_or(|(_, token)| token != "::") {
            break;
        }
        at += 1;
        if tokens.get(at).is_some_and(|(_, token)| token == "{") {
            at = tree(tokens, at + 1, prefix, found);
            prefix.truncate(depth);
            return at;
        }
    }
    found.push((line, prefix.clone()));
    prefix.truncate(depth);
    at
}

fn tree(tokens: &[Token], mut at: usize, prefix: &mut Vec<String>, found: &mut Vec<(usize, Vec<String>)>) -> usize {
    while let Some((_, token)) = tokens.get(at) {
        match token.as_str() {
            "}" => return at + 1,
            // `x as y`: the new name is no path.
            "as" => at += 2,
            _ if is_path_part(token) => at = path(tokens, at, prefix, found),
            _ => at += 1,
        }
    }
    at
}

#[cfg(test)]
mod tests {
    use super::*;

    fn findings(module: &str, text: &str) -> Vec<String> {
        let module: Vec<String> = module.split("::").map(str::to_owned).collect();
        let found = check(Path::new("x.rs"), text, &module, &["edge_tests"], true);
        found.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_lower_layer_may_not_import_a_higher_one() {
        let found = findings("model::route", "use std::net::IpAddr;\nuse crate::config::valid::Config;\n");
        assert_eq!(found, ["x.rs:2: model may not import config (it may import no other module)"]);
        assert!(findings("config", "use crate::model::Service;").is_empty());
    }

    #[test]
    fn the_fib_never_imports_bgp_however_it_is_written() {
        for text in [
            "use crate::bgp::rib::Rib;",
            "use crate::{model, bgp};",
            "use crate::{model::{Route, x}, bgp::{self, rib}};",
            "use super::super::bgp;",
            "fn f(r: &crate::bgp::Rib) {}",
            "use crate::{\n    model,\n    bgp as b,\n};",
        ] {
            assert_eq!(findings("fib::netlink", text).len(), 1, "{text}");
        }
        assert!(findings("fib::netlink", "use super::ports; use crate::reconcile::ports::Fib;").is_empty());
    }

    #[test]
    fn the_line_is_that_of_the_name_inside_a_tree() {
        let found = findings("fib", "use crate::{\n    model,\n    bgp,\n};");
        assert!(found[0].starts_with("x.rs:3:"), "{found:?}");
    }

    #[test]
    fn pure_modules_use_no_clock_socket_or_runtime() {
        for text in [
            "use tokio::sync::mpsc;",
            "let now = std::time::Instant::now();",
            "use std::time::Instant; fn f() { Instant::now(); }",
            "use std::net::{IpAddr, TcpStream};",
            "use aya::maps::Array;",
        ] {
            assert_eq!(findings("bgp::fsm", text).len(), 1, "{text}");
            assert!(findings("bgp::session", text).is_empty(), "{text}");
        }
        assert!(findings("bgp::fsm", "use std::time::{Duration, Instant}; use std::net::IpAddr;").is_empty());
        assert_eq!(findings("bgp::wire::open", "use tokio::net;").len(), 1);
    }

    #[test]
    fn comments_strings_and_lifetimes_are_not_code() {
        let text = "// use crate::bgp::x;\n/* crate::bgp /* nested */ crate::bgp */\nlet s = \"crate::bgp\\\" crate::bgp\";\n\
                    let r = r#\"crate::bgp \" crate::bgp\"#; let c = '\"'; fn f<'a>(x: &'a str) { let q = '\\''; }\n";
        assert_eq!(findings("fib", text), Vec::<String>::new());
        assert_eq!(findings("fib", &format!("{text}use crate::bgp;")).len(), 1);
    }

    #[test]
    fn a_test_module_may_use_what_the_module_may_not() {
        let text = "fn f() {}\n\n#[cfg(test)]\nmod tests {\n    use crate::bgp::x;\n}\n";
        assert!(findings("fib", text).is_empty());
    }

    #[test]
    fn product_crates_do_not_import_the_tests() {
        assert_eq!(findings("daemon", "use edge_tests::lab;").len(), 1);
        let own: Vec<String> = Vec::new();
        assert_eq!(check(Path::new("m.rs"), "use edge_ctl::model;", &own, &["edge_ctl"], false).len(), 1);
    }

    #[test]
    fn a_file_gives_its_module_path() {
        assert_eq!(module_path(Path::new("bgp/wire/mod.rs")), ["bgp", "wire"]);
        assert_eq!(module_path(Path::new("bgp/fsm.rs")), ["bgp", "fsm"]);
        assert!(module_path(Path::new("lib.rs")).is_empty());
    }
}
