//! Removing a directory that a container has filled, however deep it is.
//!
//! The standard library goes down by recursion, with a descriptor a level: a container that nests a hundred thousand
//! directories would take the daemon's stack. Here a directory's subdirectories are moved up beside it before it is removed, so nothing
//! is deeper than two levels. Everything goes by descriptors that follow no link: a container that is still running can't have
//! something else removed.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, open, openat, renameat};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, unlinkat};

/// Names that are read before they are removed; a directory may have any number.
const BATCH: usize = 4096;

/// Removes the directory and all that is in it; fine if it isn't there.
pub(super) fn tree(path: &Path) -> io::Result<()> {
    match Removal::open(path) {
        Ok(mut removal) => removal.empty_top()?,
        Err(Errno::ENOENT) => return Ok(()),
        Err(error) => return Err(error.into()),
    }
    match unlinkat(AT_FDCWD, path, UnlinkatFlags::RemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

struct Removal {
    top: OwnedFd,
    /// Numbers the directories that were moved up.
    moved: u64,
}

fn directory() -> OFlag {
    OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC
}

/// Some names of the directory, itself and its parent left out.
fn names(directory: &OwnedFd) -> nix::Result<Vec<CString>> {
    // A descriptor of its own, whose position begins at the start.
    let mut entries = Dir::from_fd(openat(directory, ".", self::directory(), Mode::empty())?)?;
    let mut names = Vec::new();
    for entry in entries.iter() {
        let entry = entry?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            names.push(entry.file_name().to_owned());
        }
        if names.len() >= BATCH {
            break;
        }
    }
    Ok(names)
}

impl Removal {
    fn open(path: &Path) -> nix::Result<Removal> {
        Ok(Removal { top: open(path, directory(), Mode::empty())?, moved: 0 })
    }

    fn empty_top(&mut self) -> nix::Result<()> {
        loop {
            let names = names(&self.top)?;
            if names.is_empty() {
                return Ok(());
            }
            for name in names {
                if !gone(&self.top, &name)? {
                    self.empty(&name)?;
                    unlinkat(&self.top, name.as_c_str(), UnlinkatFlags::RemoveDir)?;
                }
            }
        }
    }

    /// Empties a directory of the top: what is a directory with something in it moves up.
    fn empty(&mut self, name: &CString) -> nix::Result<()> {
        let here = openat(&self.top, name.as_c_str(), directory(), Mode::empty())?;
        loop {
            let names = names(&here)?;
            if names.is_empty() {
                return Ok(());
            }
            for name in names {
                if !gone(&here, &name)? {
                    self.move_up(&here, &name)?;
                }
            }
        }
    }

    fn move_up(&mut self, from: &OwnedFd, name: &CString) -> nix::Result<()> {
        loop {
            self.moved += 1;
            let fresh = CString::new(format!("darter-moved-{}", self.moved)).expect("it has no NUL");
            match renameat(from.as_fd(), name.as_c_str(), self.top.as_fd(), fresh.as_c_str()) {
                // Somebody has called a file or a full directory so.
                Err(Errno::EEXIST | Errno::ENOTEMPTY | Errno::ENOTDIR) => {}
                other => return other,
            }
        }
    }
}

/// Removes what isn't a directory, or is an empty one; false for a directory with something in it.
fn gone(directory: &OwnedFd, name: &CString) -> nix::Result<bool> {
    match unlinkat(directory, name.as_c_str(), UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => return Ok(true),
        Err(Errno::EISDIR) => {}
        Err(error) => return Err(error),
    }
    match unlinkat(directory, name.as_c_str(), UnlinkatFlags::RemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => Ok(true),
        Err(Errno::ENOTEMPTY | Errno::EEXIST) => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use nix::sys::stat::mkdirat;

    use super::*;

    /// On a thread with little stack, as the daemon's are.
    fn on_a_small_stack(work: impl FnOnce() + Send + 'static) {
        std::thread::Builder::new().stack_size(256 << 10).spawn(work).unwrap().join().unwrap();
    }

    #[test]
    fn thirty_thousand_levels_are_removed() {
        let folder = tempfile::tempdir().unwrap();
        let top = folder.path().join("top");
        fs::create_dir(&top).unwrap();
        let mut here = open(&top, directory(), Mode::empty()).unwrap();
        for _ in 0..30_000 {
            mkdirat(&here, "d", Mode::S_IRWXU).unwrap();
            here = openat(&here, "d", directory(), Mode::empty()).unwrap();
        }
        drop(here);
        on_a_small_stack(move || tree(&top).unwrap());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn links_are_not_followed_and_many_names_go() {
        let folder = tempfile::tempdir().unwrap();
        let (top, kept) = (folder.path().join("top"), folder.path().join("kept"));
        fs::create_dir_all(top.join("a/b/darter-moved-1/c")).unwrap();
        fs::create_dir_all(top.join("darter-moved-2")).unwrap();
        fs::write(top.join("darter-moved-3"), "a file of that name").unwrap();
        fs::create_dir(&kept).unwrap();
        fs::write(kept.join("file"), "kept").unwrap();
        std::os::unix::fs::symlink(&kept, top.join("a/link")).unwrap();
        for number in 0..BATCH + 10 {
            fs::write(top.join(format!("a/{number}")), "").unwrap();
        }
        tree(&top).unwrap();
        assert!(!top.exists() && kept.join("file").exists());
        tree(&top).unwrap();
    }
}
