//! The API's unix socket: mode 0660, group `edge` where there is one, never taken from a daemon that still answers.

use std::{
    fs, io,
    os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown},
    path::{Path, PathBuf},
};

use tokio::net::{UnixListener, UnixStream};

use super::BindError;

const GROUP: &str = "edge";
const MODE: u32 = 0o660;

pub(super) async fn bind(path: &Path) -> Result<UnixListener, BindError> {
    let failed = |source| BindError::Socket { path: path.to_owned(), source };
    if is_answered(path).await.map_err(failed)? {
        return Err(BindError::Taken(path.to_owned()));
    }
    // Made under another name, so that nobody connects before the mode is right and a stale one is replaced in one step.
    let fresh = beside(path);
    let _ = fs::remove_file(&fresh);
    let listener = UnixListener::bind(&fresh).map_err(failed)?;
    let placed = protect(&fresh).and_then(|()| fs::rename(&fresh, path));
    if let Err(source) = placed {
        let _ = fs::remove_file(&fresh);
        return Err(failed(source));
    }
    Ok(listener)
}

/// Device and inode of what stands at `path`.
pub(super) fn identity(path: &Path) -> Option<(u64, u64)> {
    fs::symlink_metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

/// True where a daemon accepts connections at `path`.
async fn is_answered(path: &Path) -> io::Result<bool> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "something that is no socket stands there"));
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path).await {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(false),
        Err(error) => Err(error),
    }
}

fn beside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}", std::process::id()));
    PathBuf::from(name)
}

fn protect(path: &Path) -> io::Result<()> {
    if let Some(group) = group_id(&fs::read_to_string("/etc/group").unwrap_or_default(), GROUP) {
        // Not a member and not root: the socket stays with our own group, which `ls -l` shows.
        if let Err(error) = chown(path, None, Some(group)) {
            tracing::warn!(%error, "the API socket cannot be given to group `{GROUP}`; members of it cannot use it");
        }
    }
    fs::set_permissions(path, fs::Permissions::from_mode(MODE))
}

/// The number of a group in the text of group(5).
fn group_id(text: &str, name: &str) -> Option<u32> {
    text.lines().find_map(|line| {
        let mut fields = line.split(':');
        if fields.next() != Some(name) {
            return None;
        }
        fields.nth(1)?.parse().ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_group_is_found_by_its_whole_name() {
        let text = "root:x:0:\nedgex:x:7:\nedge:x:981:alice,bob\n";
        assert_eq!(group_id(text, "edge"), Some(981));
        assert_eq!(group_id("edges:x:1:\n", "edge"), None);
        assert_eq!(group_id("edge:x\n", "edge"), None);
    }
}
