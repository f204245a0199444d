//! Whether a command may work on the manager's folder: only as the folder's owner, and only where a manager has been started.
//!
//! What another user writes there the manager can't read, and does not start then. A folder that a command made by itself would
//! be a cluster of its own, whose tokens open nothing.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::unistd::{Uid, User, geteuid};

use crate::ManagerError;

/// What a folder has in which a manager has been started.
const FILES: [&str; 2] = ["ca.pem", "manager.db"];

/// Fails where a command must not work on `root`, and says what to type instead.
pub(crate) fn check_command(root: &Path) -> Result<(), ManagerError> {
    let at = |source| ManagerError::Root { path: root.to_owned(), source };
    let owner = match fs::metadata(root) {
        Ok(folder) => Uid::from_raw(folder.uid()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(never_started(root)),
        Err(error) => return Err(at(error)),
    };
    if owner != geteuid() {
        let given = std::env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned());
        let (owner, command) = (name(owner), as_typed(given));
        return Err(ManagerError::Owner { root: root.to_owned(), owner, command });
    }
    if root.join("manager.db").try_exists().map_err(at)? { Ok(()) } else { Err(never_started(root)) }
}

/// Names the file that this user can't write, where it lies in a folder that is his own.
pub(crate) fn check_files(root: &Path) -> Result<(), ManagerError> {
    for path in FILES.map(|name| root.join(name)) {
        match OpenOptions::new().read(true).write(true).open(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(ManagerError::Root { path, source });
            }
            _ => {}
        }
    }
    Ok(())
}

fn never_started(root: &Path) -> ManagerError {
    ManagerError::NeverStarted { root: root.to_owned() }
}

/// The user's name; its number where it has none.
fn name(user: Uid) -> String {
    User::from_uid(user).ok().flatten().map_or_else(|| user.to_string(), |user| user.name)
}

/// The command with these words behind the program's name, as a shell takes it.
fn as_typed(words: impl Iterator<Item = String>) -> String {
    let is_plain = |word: &str| {
        !word.is_empty()
            && word.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_./,:=@%+".contains(&byte))
    };
    let quoted =
        |word: String| if is_plain(&word) { word } else { format!("'{}'", word.replace('\'', r"'\''")) };
    std::iter::once("darter-manager".to_owned()).chain(words.map(quoted)).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_refuses_a_folder_where_no_manager_was_started_and_leaves_nothing_there() {
        let folder = tempfile::tempdir().unwrap();
        for root in [folder.path().to_owned(), folder.path().join("none")] {
            let error = check_command(&root).unwrap_err();
            assert!(matches!(error, ManagerError::NeverStarted { .. }), "{error}");
            assert!(error.to_string().contains(&root.display().to_string()), "{error}");
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        fs::write(folder.path().join("manager.db"), b"").unwrap();
        check_command(folder.path()).unwrap();
    }

    #[test]
    fn command_refuses_the_folder_of_another_and_says_what_to_type() {
        if geteuid().is_root() {
            let folder = tempfile::tempdir().unwrap();
            std::os::unix::fs::chown(folder.path(), Some(65_534), None).unwrap();
            let error = check_command(folder.path()).unwrap_err().to_string();
            let owner = name(Uid::from_raw(65_534));
            assert!(error.contains(&format!("`runuser -u {owner} -- darter-manager")), "{error}");
        } else {
            let error = check_command(Path::new("/")).unwrap_err().to_string();
            assert!(error.contains("`runuser -u root -- darter-manager"), "{error}");
        }
    }

    #[test]
    fn file_that_can_not_be_opened_is_named() {
        let folder = tempfile::tempdir().unwrap();
        check_files(folder.path()).unwrap();
        // A folder can't be opened for writing by anybody, root included.
        fs::create_dir(folder.path().join("ca.pem")).unwrap();
        let error = check_files(folder.path()).unwrap_err().to_string();
        assert!(error.contains("ca.pem: "), "{error}");
    }

    #[test]
    fn command_is_shown_as_a_shell_takes_it() {
        let words = ["token", "--role", "node", "--config", "/a b/it's"].map(str::to_owned);
        assert_eq!(as_typed(words.into_iter()), r"darter-manager token --role node --config '/a b/it'\''s'");
    }
}
