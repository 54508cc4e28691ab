//! Small state that outlives the daemon: one JSON file for each concern under `[edge] state_dir`, written so that a
//! crash at any moment leaves either the old text or the new one, whole.
//!
//! On disk: `{"version": N, "state": ...}`. The way there: a new file beside it, fsync, rename over the old one
//! (rename(2) replaces atomically), fsync of the folder, which makes the rename itself last.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// Readable by the daemon's user only: nobody else needs it.
const MODE: u32 = 0o600;

/// Why state was not read or written.
#[derive(Debug, thiserror::Error)]
pub enum StateFileError {
    /// The file or its folder cannot be read or written.
    #[error("{path}: {source}; `[edge] state_dir` must be a folder that the daemon may write to", path = path.display())]
    Io {
        /// Which one.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// It is not what this version writes.
    #[error("{path}: {why}; move it away to start without that state", path = path.display())]
    Unreadable {
        /// Which one.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
}

/// One file of state of kind `T`, in format `version`.
#[derive(Clone, Debug)]
pub struct StateFile {
    path: PathBuf,
    version: u32,
}

#[derive(Serialize)]
struct Written<'a, T> {
    version: u32,
    state: &'a T,
}

#[derive(Deserialize)]
struct Version {
    version: u32,
}

#[derive(Deserialize)]
struct Read<T> {
    state: T,
}

impl StateFile {
    /// The file `name` in `folder`. `version` is raised whenever an older reader would misunderstand what is written.
    pub fn new(folder: &Path, name: &str, version: u32) -> Self {
        Self { path: folder.join(name), version }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What was last written; `None`: nothing ever was.
    ///
    /// # Errors
    /// Where it cannot be read, is damaged, or is of another version: it is left as it is.
    pub fn read<T: DeserializeOwned>(&self) -> Result<Option<T>, StateFileError> {
        let text = match fs::read_to_string(&self.path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(self.failed(&self.path, source)),
        };
        let unreadable = |why: String| StateFileError::Unreadable { path: self.path.clone(), why };
        // The version first: the state of another one may not even have the same shape.
        let found: Version = serde_json::from_str(&text).map_err(|error| unreadable(error.to_string()))?;
        if found.version != self.version {
            return Err(unreadable(format!(
                "format {} is not {}, which this version reads",
                found.version, self.version
            )));
        }
        let read: Read<T> = serde_json::from_str(&text).map_err(|error| unreadable(error.to_string()))?;
        Ok(Some(read.state))
    }

    /// Replaces what is there. When this returns without an error, the new state survives a power cut.
    ///
    /// # Errors
    /// Where it cannot be written; what was there before is still there then.
    pub fn write<T: Serialize>(&self, state: &T) -> Result<(), StateFileError> {
        let written = Written { version: self.version, state };
        let unreadable =
            |error: serde_json::Error| StateFileError::Unreadable { path: self.path.clone(), why: error.to_string() };
        let text = serde_json::to_string_pretty(&written).map_err(unreadable)? + "\n";
        let new = self.beside();
        let placed = write_through(&new, text.as_bytes())
            .and_then(|()| fs::rename(&new, &self.path))
            .and_then(|()| File::open(self.folder())?.sync_all());
        placed.map_err(|source| {
            // Nothing reads it, and the next write makes it anew.
            let _ = fs::remove_file(&new);
            self.failed(&self.path, source)
        })
    }

    /// On the same file system, so that rename can replace.
    fn beside(&self) -> PathBuf {
        let mut name = self.path.as_os_str().to_owned();
        name.push(".new");
        PathBuf::from(name)
    }

    fn folder(&self) -> &Path {
        match self.path.parent() {
            Some(folder) if folder != Path::new("") => folder,
            _ => Path::new("."),
        }
    }

    fn failed(&self, path: &Path, source: io::Error) -> StateFileError {
        StateFileError::Io { path: path.to_owned(), source }
    }
}

fn write_through(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(MODE).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    type State = BTreeMap<String, u32>;

    fn state(value: u32) -> State {
        BTreeMap::from([("web".to_owned(), value)])
    }

    #[test]
    fn what_was_written_last_is_read_and_nothing_before_the_first_write() {
        let folder = tempfile::tempdir().unwrap();
        let file = StateFile::new(folder.path(), "x.json", 1);
        assert_eq!(file.read::<State>().unwrap(), None);
        file.write(&state(1)).unwrap();
        file.write(&state(2)).unwrap();
        assert_eq!(file.read::<State>().unwrap(), Some(state(2)));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "no half-written file stays");
    }

    #[test]
    fn a_crash_while_the_new_text_is_written_leaves_the_old_state() {
        let folder = tempfile::tempdir().unwrap();
        let file = StateFile::new(folder.path(), "x.json", 1);
        file.write(&state(1)).unwrap();
        fs::write(file.beside(), "{\"version\": 1, \"sta").unwrap();
        assert_eq!(file.read::<State>().unwrap(), Some(state(1)));
        file.write(&state(2)).unwrap();
        assert_eq!(file.read::<State>().unwrap(), Some(state(2)));
    }

    #[test]
    fn damage_and_other_versions_are_refused_and_left_as_they_are() {
        let folder = tempfile::tempdir().unwrap();
        let file = StateFile::new(folder.path(), "x.json", 1);
        for text in
            ["", "{", "[]", "{\"version\": 1}", "{\"version\": 1, \"state\": 5}", "{\"version\": 2, \"state\": {}}"]
        {
            fs::write(file.path(), text).unwrap();
            let error = file.read::<State>().unwrap_err().to_string();
            assert!(error.contains("x.json") && error.contains("move it away"), "{text}: {error}");
            assert_eq!(fs::read_to_string(file.path()).unwrap(), text);
        }
    }

    #[test]
    fn a_write_that_fails_says_where_and_keeps_the_old_state() {
        let folder = tempfile::tempdir().unwrap();
        let file = StateFile::new(folder.path(), "x.json", 1);
        file.write(&state(1)).unwrap();
        // A folder where the new file should be: even root cannot write there.
        fs::create_dir(file.beside()).unwrap();
        let error = file.write(&state(2)).unwrap_err().to_string();
        assert!(error.contains("state_dir"), "{error}");
        assert_eq!(file.read::<State>().unwrap(), Some(state(1)));
    }
}
