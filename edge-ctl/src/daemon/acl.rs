//! Source ranges that were given at run time, over those of the configuration, until they expire or are taken back.
//!
//! They are kept in `state_dir`, so that a restart neither forgets a block nor makes it last longer: expiry is a time of
//! the wall clock.
//! A range given here decides for its prefix whatever the configuration says about the same prefix. It never changes what
//! becomes of a source in no range: one command must not lock everybody out.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::{
    config::{self, valid::Config},
    desired::DesiredState,
    model::{
        RangeAction,
        query::{AclRow, Query, ViewError},
    },
    state_file::{StateFile, StateFileError},
};

/// Name in `state_dir`.
const FILE: &str = "acl.json";
/// Format of the file.
const VERSION: u32 = 1;
/// Entries of the map.
const MOST: usize = edge_common::maps::SOURCE_RANGES as usize;

/// Seconds of the wall clock since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Ranges given at run time.
#[derive(Debug)]
pub struct Acl {
    file: StateFile,
    entries: BTreeMap<(String, IpNet), Given>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Given {
    action: RangeAction,
    /// Seconds since 1970; `None`: until it is taken back.
    expires: Option<u64>,
}

impl Given {
    fn is_over(self, now: u64) -> bool {
        self.expires.is_some_and(|expires| expires <= now)
    }
}

/// An entry of the file.
#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Line {
    service: String,
    prefix: IpNet,
    action: RangeAction,
    expires: Option<u64>,
}

impl Acl {
    /// What an earlier life left in `state_dir`.
    ///
    /// # Errors
    /// Where the file is there and cannot be read: going on would open what somebody closed.
    pub fn load(state_dir: &Path) -> Result<Self, StateFileError> {
        let file = StateFile::new(state_dir, FILE, VERSION);
        let lines: Vec<Line> = file.read()?.unwrap_or_default();
        let entry = |line: Line| ((line.service, line.prefix), Given { action: line.action, expires: line.expires });
        Ok(Self { entries: lines.into_iter().map(entry).collect(), file })
    }

    /// Gives a range, or gives it anew.
    ///
    /// # Errors
    /// Where the file cannot be written; nothing has changed then.
    pub fn add(
        &mut self,
        service: &str,
        prefix: IpNet,
        action: RangeAction,
        expires: Option<u64>,
    ) -> Result<(), StateFileError> {
        let mut entries = self.entries.clone();
        entries.insert((service.to_owned(), prefix), Given { action, expires });
        self.replace(entries)
    }

    /// Takes a range back; false where none was given.
    ///
    /// # Errors
    /// As [`Acl::add`].
    pub fn remove(&mut self, service: &str, prefix: IpNet) -> Result<bool, StateFileError> {
        let mut entries = self.entries.clone();
        let known = entries.remove(&(service.to_owned(), prefix)).is_some();
        if known {
            self.replace(entries)?;
        }
        Ok(known)
    }

    /// Forgets what has expired; true where something had. That the file still names it does no harm, so a disk that is
    /// full does not keep a range alive.
    pub fn expire(&mut self, now: u64) -> bool {
        let before = self.entries.len();
        self.entries.retain(|_, given| !given.is_over(now));
        let changed = before != self.entries.len();
        if changed && let Err(error) = self.save(&self.entries) {
            tracing::warn!(file = %self.file.path().display(), %error, "expired source ranges could not be taken out of the file");
        }
        changed
    }

    /// Lays the ranges over what the configuration says.
    pub fn overlay(&self, desired: &mut DesiredState, now: u64) {
        if self.entries.is_empty() {
            return;
        }
        for frontend in desired.frontends.values_mut() {
            let name = frontend.service.clone();
            let mine = self.entries.iter().filter(|((service, _), _)| *service == name);
            for ((_, prefix), given) in mine.filter(|(_, given)| !given.is_over(now)) {
                Arc::make_mut(frontend).protection.source_ranges.ranges.insert(*prefix, given.action);
            }
        }
    }

    /// All ranges in force, those of the configuration included; hits are left at 0.
    pub fn rows(&self, config: &Config, now: u64) -> Vec<AclRow> {
        let mut rows = BTreeMap::new();
        for service in config.services.values() {
            for (prefix, action) in &service.protection.source_ranges.ranges {
                let row = row(&service.name, *prefix, *action, "config", None);
                rows.insert((service.name.clone(), *prefix), row);
            }
        }
        for ((service, prefix), given) in self.entries.iter().filter(|(_, given)| !given.is_over(now)) {
            let left = given.expires.map(|expires| expires.saturating_sub(now));
            rows.insert((service.clone(), *prefix), row(service, *prefix, given.action, "runtime", left));
        }
        rows.into_values().collect()
    }

    fn has_room(&self, config: &Config, service: &str, range: IpNet) -> bool {
        let listens = |name: &str| config.services.get(name).map_or(0, |service| service.listen.len());
        let configured = config.services.values().map(|s| s.protection.source_ranges.ranges.len() * s.listen.len());
        let given = self.entries.keys().map(|(name, _)| listens(name));
        let known = self.entries.contains_key(&(service.to_owned(), range));
        known || configured.sum::<usize>() + given.sum::<usize>() + listens(service) <= MOST
    }

    fn replace(&mut self, entries: BTreeMap<(String, IpNet), Given>) -> Result<(), StateFileError> {
        self.save(&entries)?;
        self.entries = entries;
        Ok(())
    }

    fn save(&self, entries: &BTreeMap<(String, IpNet), Given>) -> Result<(), StateFileError> {
        let line = |((service, prefix), given): (&(String, IpNet), &Given)| Line {
            service: service.clone(),
            prefix: *prefix,
            action: given.action,
            expires: given.expires,
        };
        let lines: Vec<Line> = entries.iter().map(line).collect();
        self.file.write(&lines)
    }
}

/// Carries out an [`Query::AclAdd`] or [`Query::AclRemove`]; the name of the service.
///
/// # Errors
/// [`ViewError::NotFound`] for a service or a given range that there is not, [`ViewError::Invalid`] for what cannot be
/// read or does not fit, [`ViewError::Internal`] where the file cannot be written.
pub fn change(acl: &mut Acl, config: &Config, change: &Query, now: u64) -> Result<String, ViewError> {
    let (Query::AclAdd { service, prefix, .. } | Query::AclRemove { service, prefix }) = change else {
        return Err(ViewError::Internal("that is no change of source ranges".to_owned()));
    };
    if !config.services.contains_key(service) {
        return Err(ViewError::NotFound(format!("there is no service `{service}`")));
    }
    let invalid = |text: String| ViewError::Invalid(vec![text]);
    let range = config::source_range(prefix).map_err(|why| invalid(format!("`{prefix}`: {why}")))?;
    let unwritten = |error: StateFileError| ViewError::Internal(format!("nothing was changed: {error}"));
    if let Query::AclAdd { deny, lifetime, .. } = change {
        let lifetime = lifetime.as_ref().map(|text| match config::duration(text) {
            Ok(time) if time.as_secs() > 0 => Ok(now.saturating_add(time.as_secs())),
            Ok(_) => Err(invalid(format!("`--for {text}`: at least 1s"))),
            Err(why) => Err(invalid(format!("`--for {text}`: {why}; expected a duration such as 10m or 2h"))),
        });
        if !acl.has_room(config, service, range) {
            return Err(invalid(format!("there are {MOST} source ranges already, counted for each listen address")));
        }
        let action = if *deny { RangeAction::Deny } else { RangeAction::Allow };
        acl.add(service, range, action, lifetime.transpose()?).map_err(unwritten)?;
    } else if !acl.remove(service, range).map_err(unwritten)? {
        let configured =
            config.services.get(service).is_some_and(|s| s.protection.source_ranges.ranges.contains_key(&range));
        let hint = if configured { "; it is in the configuration" } else { "" };
        return Err(ViewError::NotFound(format!("`acl add` gave no {range} to {service}{hint}")));
    }
    Ok(service.clone())
}

fn row(service: &str, prefix: IpNet, action: RangeAction, source: &str, expires: Option<u64>) -> AclRow {
    AclRow {
        service: service.to_owned(),
        prefix: prefix.to_string(),
        action: action.to_string(),
        source: source.to_owned(),
        expires,
        hits: 0,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn prefix(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn shown(acl: &Acl, now: u64) -> Vec<String> {
        let config = crate::config::parse(
            "[edge]\ninterfaces = [\"ens33\"]\npod_networks = [\"10.1.0.0/16\"]\n[service.web]\nlisten = \
             [\"172.16.1.88:80/tcp\"]\nbackends = { static = [\"10.1.0.4:80\"] }\nsource_ranges = [\"192.0.2.0/24\"]\n",
            Path::new("edge.toml"),
        );
        let rows = acl.rows(&config.unwrap(), now).into_iter();
        rows.map(|row| format!("{} {} {} {:?}", row.prefix, row.action, row.source, row.expires)).collect()
    }

    #[test]
    fn a_range_survives_a_restart_with_the_lifetime_it_has_left_and_ends_by_itself() {
        let folder = tempfile::tempdir().unwrap();
        let mut acl = Acl::load(folder.path()).unwrap();
        acl.add("web", prefix("198.51.100.0/24"), RangeAction::Deny, Some(1600)).unwrap();
        acl.add("web", prefix("203.0.113.0/24"), RangeAction::Allow, None).unwrap();
        let mut acl = Acl::load(folder.path()).unwrap();
        let stays = ["192.0.2.0/24 allow config None", "203.0.113.0/24 allow runtime None"];
        assert_eq!(shown(&acl, 1000), [stays[0], "198.51.100.0/24 deny runtime Some(600)", stays[1]]);
        assert!(!acl.expire(1599));
        assert_eq!(shown(&acl, 1600), stays, "over, whether anybody has looked or not");
        assert!(acl.expire(1600) && !acl.expire(1600));
        assert_eq!(shown(&Acl::load(folder.path()).unwrap(), 1000), stays);
    }

    #[test]
    fn a_given_range_wins_over_the_configuration_s_until_it_is_taken_back() {
        let folder = tempfile::tempdir().unwrap();
        let mut acl = Acl::load(folder.path()).unwrap();
        acl.add("web", prefix("192.0.2.0/24"), RangeAction::Deny, None).unwrap();
        assert_eq!(shown(&acl, 0), ["192.0.2.0/24 deny runtime None"]);
        assert!(acl.remove("web", prefix("192.0.2.0/24")).unwrap());
        assert!(!acl.remove("web", prefix("192.0.2.0/24")).unwrap());
        assert_eq!(shown(&Acl::load(folder.path()).unwrap(), 0), ["192.0.2.0/24 allow config None"]);
    }

    #[test]
    fn a_file_that_cannot_be_read_stops_the_start_and_one_that_cannot_be_written_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(FILE), "[{").unwrap();
        assert!(Acl::load(folder.path()).unwrap_err().to_string().contains("acl.json"));
        fs::remove_file(folder.path().join(FILE)).unwrap();
        let mut acl = Acl::load(folder.path()).unwrap();
        fs::create_dir(folder.path().join("acl.json.new")).unwrap();
        assert!(acl.add("web", prefix("198.51.100.0/24"), RangeAction::Deny, None).is_err());
        assert_eq!(shown(&acl, 0), ["192.0.2.0/24 allow config None"]);
    }
}
