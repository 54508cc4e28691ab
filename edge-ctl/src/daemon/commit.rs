//! Configurations that are in force and are not what the files say, or not for good: `config commit`.
//!
//! | | in force | on disk (`state_dir/config.json`) |
//! |---|---|---|
//! | start, `reload` | the files | nothing |
//! | `commit --confirm T` | the new one | the new one, until when, and the one before |
//! | `commit` (confirms) | the new one | nothing where the files say the same, else the new one |
//! | T passes, or `rollback` | the one before | nothing where the files say the same, else the one before |
//!
//! It is on disk before it is in force, so a crash at any moment ends in one of these rows: a daemon that starts with a
//! confirmation pending goes on waiting, or rolls back where the time has passed meanwhile. Times are of the wall clock.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use super::acl;
use crate::state_file::{StateFile, StateFileError};

/// Name in `state_dir`.
const FILE: &str = "config.json";
/// Format of the file.
const VERSION: u32 = 1;

/// Configuration files with their texts, the main file first.
pub type Texts = Vec<(PathBuf, String)>;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Kept {
    /// In force.
    files: Texts,
    pending: Option<Pending>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Pending {
    /// Seconds since 1970.
    until: u64,
    /// Comes back unless confirmed.
    before: Texts,
}

/// See the module.
#[derive(Debug)]
pub struct Commits {
    file: StateFile,
    kept: Option<Kept>,
}

impl Commits {
    /// What the daemon's earlier life left.
    ///
    /// # Errors
    /// Where the file is there and cannot be read.
    pub fn load(state_dir: &Path) -> Result<Self, StateFileError> {
        let file = StateFile::new(state_dir, FILE, VERSION);
        let kept = file.read::<Option<Kept>>()?.flatten();
        Ok(Self { file, kept })
    }

    /// What is to be in force instead of the files, at the start. One that was not confirmed in time is rolled back.
    ///
    /// # Errors
    /// Where that cannot be written.
    pub fn at_start(&mut self, files: &Texts, now: u64) -> Result<Option<Texts>, StateFileError> {
        if self.pending().is_some_and(|pending| pending.until <= now) {
            self.roll_back(files)?;
        }
        Ok(self.kept.as_ref().map(|kept| kept.files.clone()))
    }

    fn pending(&self) -> Option<&Pending> {
        self.kept.as_ref().and_then(|kept| kept.pending.as_ref())
    }

    /// Seconds that are left to confirm; `None`: nothing waits.
    pub fn remaining(&self) -> Option<u64> {
        self.pending().map(|pending| pending.until.saturating_sub(acl::now()))
    }

    /// When to roll back.
    pub fn due(&self) -> Option<Instant> {
        self.remaining().map(|seconds| Instant::now() + Duration::from_secs(seconds))
    }

    /// What comes back at a rollback.
    pub fn before(&self) -> Option<&Texts> {
        self.pending().map(|pending| &pending.before)
    }

    /// Notes that `new` is about to be in force in place of `running`, until `until` unless that is confirmed (`None`: for
    /// good). `files` is what the files say.
    ///
    /// # Errors
    /// Where it cannot be written; nothing has changed then.
    pub fn begin(
        &mut self,
        new: &Texts,
        running: &Texts,
        files: &Texts,
        until: Option<u64>,
    ) -> Result<(), StateFileError> {
        let before = self.before().unwrap_or(running).clone();
        let pending = until.map(|until| Pending { until, before });
        self.keep(Kept { files: new.clone(), pending }, files)
    }

    /// What is in force stays; true where the files say otherwise.
    ///
    /// # Errors
    /// As [`Commits::begin`].
    pub fn confirm(&mut self, files: &Texts) -> Result<bool, StateFileError> {
        let Some(kept) = self.kept.clone() else { return Ok(false) };
        self.keep(Kept { pending: None, ..kept }, files)?;
        Ok(self.kept.is_some())
    }

    /// Notes that the one before is about to come back, and returns it; `None`: nothing waits.
    ///
    /// # Errors
    /// As [`Commits::begin`].
    pub fn roll_back(&mut self, files: &Texts) -> Result<Option<Texts>, StateFileError> {
        let Some(before) = self.before().cloned() else { return Ok(None) };
        self.keep(Kept { files: before.clone(), pending: None }, files)?;
        Ok(Some(before))
    }

    /// The files are in force.
    ///
    /// # Errors
    /// As [`Commits::begin`].
    pub fn clear(&mut self) -> Result<(), StateFileError> {
        self.replace(None)
    }

    /// What users should know, for `status`.
    pub fn problem(&self) -> Option<String> {
        match (self.remaining(), &self.kept) {
            (Some(seconds), _) => Some(format!(
                "the configuration rolls back in {seconds} s; `edge-ctl config commit` keeps it, `edge-ctl config rollback` \
                 does not wait"
            )),
            (None, Some(_)) => Some(
                "the configuration in force (`edge-ctl config show`) is not what the files say; `edge-ctl reload` reads them"
                    .to_owned(),
            ),
            (None, None) => None,
        }
    }

    /// Nothing is kept where the files say the same and nothing waits.
    fn keep(&mut self, kept: Kept, files: &Texts) -> Result<(), StateFileError> {
        let is_plain = kept.pending.is_none() && kept.files == *files;
        self.replace((!is_plain).then_some(kept))
    }

    fn replace(&mut self, kept: Option<Kept>) -> Result<(), StateFileError> {
        if kept != self.kept {
            self.file.write(&kept)?;
            self.kept = kept;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(text: &str) -> Texts {
        vec![("/etc/edge/edge.toml".into(), text.to_owned())]
    }

    #[test]
    fn a_commit_that_nobody_confirmed_is_rolled_back_by_the_next_life_once_its_time_has_passed() {
        let folder = tempfile::tempdir().unwrap();
        let (old, new) = (texts("old"), texts("new"));
        // The operator edited the main file, so that it says what was rolled back.
        Commits::load(folder.path()).unwrap().begin(&new, &old, &new, Some(1000)).unwrap();
        let mut next = Commits::load(folder.path()).unwrap();
        assert_eq!(next.at_start(&new, 999).unwrap(), Some(new.clone()), "it still waits");
        assert_eq!(next.before(), Some(&old));
        let mut late = Commits::load(folder.path()).unwrap();
        assert_eq!(late.at_start(&new, 1000).unwrap(), Some(old.clone()));
        let mut again = Commits::load(folder.path()).unwrap();
        assert_eq!(again.at_start(&new, 0).unwrap(), Some(old), "and stays so until the files are read on purpose");
        again.clear().unwrap();
        assert_eq!(Commits::load(folder.path()).unwrap().at_start(&new, 0).unwrap(), None);
    }

    #[test]
    fn what_was_confirmed_stays_across_a_restart_and_is_forgotten_where_the_files_say_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let (old, new) = (texts("old"), texts("new"));
        let mut commits = Commits::load(folder.path()).unwrap();
        commits.begin(&new, &old, &old, Some(u64::MAX)).unwrap();
        assert!(commits.confirm(&old).unwrap(), "the file still says the old one");
        assert_eq!(Commits::load(folder.path()).unwrap().at_start(&old, 0).unwrap(), Some(new.clone()));
        assert!(!commits.confirm(&new).unwrap());
        assert_eq!(Commits::load(folder.path()).unwrap().at_start(&new, 0).unwrap(), None);
    }

    #[test]
    fn of_two_commits_in_a_row_a_rollback_goes_back_to_before_the_first() {
        let folder = tempfile::tempdir().unwrap();
        let (old, new, newer) = (texts("old"), texts("new"), texts("newer"));
        let mut commits = Commits::load(folder.path()).unwrap();
        commits.begin(&new, &old, &old, Some(u64::MAX)).unwrap();
        commits.begin(&newer, &new, &old, Some(u64::MAX)).unwrap();
        assert_eq!(commits.roll_back(&old).unwrap(), Some(old.clone()));
        assert_eq!(Commits::load(folder.path()).unwrap().at_start(&old, 0).unwrap(), None);
    }
}
