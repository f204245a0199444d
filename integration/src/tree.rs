//! What a container sees below its root, written down entry by entry, and two of these compared.
//!
//! The walk runs in a process of its own with a deadline: a file system that hangs must not hang the tests. A program
//! that uses it calls [`serve_walk`] first thing in `main`.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::time::SystemTime;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::command::Run;

const WALK: &str = "--walk";
/// How many differences an error lists.
const DIFFERENCES_MAX: usize = 25;

/// One name and what is behind it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    pub kind: char,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Of files and links only: a directory's depends on the file system below.
    pub size: u64,
    pub mtime: (i64, i64),
    pub nlink: u64,
    pub device: u64,
    /// The first name of the same inode, where there are several.
    pub same_as: Option<String>,
    pub xattrs: Vec<(String, String)>,
    /// SHA-256 of a file, target of a link.
    pub content: String,
}

/// A tree by path; bytes that are not printable ASCII are escaped.
pub type Tree = BTreeMap<String, Node>;

/// Walks `root` from another process.
pub fn walk(root: &Path) -> Result<Tree> {
    let me = std::env::current_exe().context("this program's own file")?;
    let text = Run::new(me).arg(WALK).arg(root.display()).timeout(240).check()?;
    text.lines().map(|line| Ok(serde_json::from_str::<(String, Node)>(line)?)).collect()
}

/// Becomes the walking process when the command line says so.
pub fn serve_walk() {
    let args: Vec<_> = std::env::args_os().collect();
    if args.len() != 3 || args[1] != WALK {
        return;
    }
    let walked = print_tree(Path::new(&args[2]));
    if let Err(error) = &walked {
        eprintln!("{error:#}");
    }
    std::process::exit(i32::from(walked.is_err()));
}

fn print_tree(root: &Path) -> Result<()> {
    let mut seen = BTreeMap::new();
    let mut todo = vec![root.to_path_buf()];
    let mut out = io::BufWriter::new(io::stdout().lock());
    emit(&mut out, root, root, &mut seen)?;
    while let Some(dir) = todo.pop() {
        let mut entries: Vec<_> = fs::read_dir(&dir)
            .and_then(|entries| entries.collect::<io::Result<Vec<_>>>())
            .with_context(|| format!("listing {}", dir.display()))?;
        entries.sort_by_key(|entry| std::cmp::Reverse(entry.file_name()));
        for entry in entries.iter().rev() {
            emit(&mut out, root, &entry.path(), &mut seen)?;
        }
        todo.extend(entries.iter().filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()));
    }
    Ok(())
}

type Seen = BTreeMap<(u64, u64), String>;

fn emit(out: &mut impl io::Write, root: &Path, path: &Path, seen: &mut Seen) -> Result<()> {
    let name = path.strip_prefix(root)?.as_os_str().as_bytes().escape_ascii().to_string();
    let node = node(path, &name, seen).with_context(|| format!("looking at {name}"))?;
    serde_json::to_writer(&mut *out, &(name, node))?;
    Ok(out.write_all(b"\n")?)
}

fn node(path: &Path, name: &str, seen: &mut Seen) -> Result<Node> {
    let meta = match fs::symlink_metadata(path) {
        // overlayfs lists whiteouts in directories that it does not merge, but does not find them.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(GHOST),
        meta => meta?,
    };
    let kind = meta.file_type();
    let mut same_as = None;
    if meta.nlink() > 1 && !meta.is_dir() {
        let first = seen.entry((meta.dev(), meta.ino())).or_insert_with(|| name.to_owned());
        same_as = Some(first.clone());
    }
    let (letter, content) = if kind.is_file() {
        ('f', hash(path)?)
    } else if kind.is_symlink() {
        ('l', fs::read_link(path)?.as_os_str().as_bytes().escape_ascii().to_string())
    } else {
        (letter(kind), String::new())
    };
    Ok(Node {
        kind: letter,
        mode: meta.mode() & 0o7777,
        uid: meta.uid(),
        gid: meta.gid(),
        size: if meta.is_dir() { 0 } else { meta.size() },
        mtime: (meta.mtime(), meta.mtime_nsec()),
        nlink: meta.nlink(),
        device: meta.rdev(),
        same_as,
        xattrs: xattrs(path)?,
        content,
    })
}

/// A name that is listed and not found.
const GHOST: Node = Node {
    kind: '?',
    mode: 0,
    uid: 0,
    gid: 0,
    size: 0,
    mtime: (0, 0),
    nlink: 0,
    device: 0,
    same_as: None,
    xattrs: Vec::new(),
    content: String::new(),
};

fn letter(kind: fs::FileType) -> char {
    match () {
        () if kind.is_dir() => 'd',
        () if kind.is_char_device() => 'c',
        () if kind.is_block_device() => 'b',
        () if kind.is_fifo() => 'p',
        () => 's',
    }
}

/// Larger files are looked at here and there.
const READ_WHOLE_MAX: u64 = 1 << 30;
const SAMPLES: u64 = 64;
const SAMPLE_BYTES: u64 = 256 * 1024;

/// Of a very large file: its size, its beginning, its end, and samples in between.
fn hash_samples(mut file: File, size: u64) -> Result<String> {
    let (mut hash, mut buffer) = (Sha256::new(), Vec::new());
    for sample in 0..=SAMPLES {
        let at = (u128::from(size - SAMPLE_BYTES) * u128::from(sample) / u128::from(SAMPLES)) as u64;
        file.seek(SeekFrom::Start(at))?;
        buffer.clear();
        (&mut file).take(SAMPLE_BYTES).read_to_end(&mut buffer)?;
        hash.update(&buffer);
    }
    let beyond = file.read(&mut [0])?;
    Ok(format!("{size}+{beyond} {}", hex::encode(hash.finalize())))
}

fn hash(path: &Path) -> Result<String> {
    let (mut file, mut hash) = (File::open(path)?, Sha256::new());
    let size = file.metadata()?.len();
    if size > READ_WHOLE_MAX {
        return hash_samples(file, size);
    }
    let mut buffer = vec![0; 1 << 20];
    loop {
        let n = file.read(&mut buffer)?;
        if n == 0 {
            return Ok(hex::encode(hash.finalize()));
        }
        hash.update(&buffer[..n]);
    }
}

fn xattrs(path: &Path) -> Result<Vec<(String, String)>> {
    let mut found = Vec::new();
    for name in xattr::list(path)? {
        let value = xattr::get(path, &name)?.unwrap_or_default();
        found.push((name.as_bytes().escape_ascii().to_string(), hex::encode(value)));
    }
    found.sort();
    Ok(found)
}

/// Fails with the differences, if there are any. Modification times that `expected` took from the clock since `since`
/// may differ: containerd gives them to directories without an entry and to what it makes itself.
pub fn compare(expected: &Tree, found: &Tree, since: SystemTime) -> Result<()> {
    let since = since.duration_since(SystemTime::UNIX_EPOCH)?.as_secs() as i64 - 1;
    let mut differences = Vec::new();
    for (path, want) in expected {
        match found.get(path) {
            None => differences.push(format!("{path}: missing ({want:?})")),
            Some(got) => {
                differences.extend(node_differences(want, got, since).map(|text| format!("{path}: {text}")))
            }
        }
    }
    for (path, got) in found.iter().filter(|(path, _)| !expected.contains_key(*path)) {
        differences.push(format!("{path}: should not be there ({got:?})"));
    }
    if differences.is_empty() {
        return Ok(());
    }
    let count = differences.len();
    differences.truncate(DIFFERENCES_MAX);
    bail!("{count} differences:\n  {}", differences.join("\n  "))
}

fn node_differences(want: &Node, got: &Node, since: i64) -> impl Iterator<Item = String> {
    let mut want = want.clone();
    if want.mtime.0 >= since {
        want.mtime = got.mtime;
    }
    let (want, got) = (fields(&want), fields(got));
    want.into_iter()
        .zip(got)
        .filter(|((_, w), (_, g))| w != g)
        .map(|((name, w), (_, g))| format!("{name} is {g}, not {w}"))
}

fn fields(node: &Node) -> Vec<(String, serde_json::Value)> {
    match serde_json::to_value(node).expect("a node has only plain fields") {
        serde_json::Value::Object(fields) => fields.into_iter().collect(),
        _ => unreachable!("a struct is an object"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(mtime: i64) -> Node {
        Node {
            kind: 'f',
            mode: 0o644,
            uid: 0,
            gid: 0,
            size: 1,
            mtime: (mtime, 0),
            nlink: 1,
            device: 0,
            same_as: None,
            xattrs: vec![],
            content: "x".into(),
        }
    }

    #[test]
    fn a_difference_names_path_and_field() {
        let old = Tree::from([("a".into(), file(1))]);
        let new = Tree::from([("a".into(), Node { mode: 0o600, ..file(1) })]);
        let error = compare(&old, &new, SystemTime::now()).expect_err("modes differ").to_string();
        assert!(error.contains("a: mode is 384, not 420"), "{error}");
        assert!(compare(&old, &Tree::new(), SystemTime::now()).is_err());
        assert!(compare(&Tree::new(), &old, SystemTime::now()).is_err());
    }

    #[test]
    fn only_times_from_the_clock_may_differ() {
        let now = SystemTime::now();
        let clock = now.duration_since(SystemTime::UNIX_EPOCH).expect("after 1970").as_secs() as i64;
        let tree = |mtime| Tree::from([("a".to_owned(), file(mtime))]);
        assert!(compare(&tree(clock), &tree(5), now).is_ok());
        assert!(compare(&tree(4), &tree(5), now).is_err());
    }
}
