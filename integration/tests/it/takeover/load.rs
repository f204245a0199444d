//! Somebody who uses a lazy image without a pause: reads, maps files, looks names up, lists directories, and knows what it
//! must see. A process of its own, since whoever waits for a file system can hang.
//!
//! What is read is dropped from the page cache at once, names that were looked up are never used again, and each directory is
//! listed once, so that all of it reaches the daemon.
//!
//! Mapping takes unsafe code: the file could shrink meanwhile. Those of an image don't.
#![allow(unsafe_code)]

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use darter_integration::command::{Run, Running};
use darter_integration::image::{Blobs, Image, Layer, Packing};
use darter_integration::tar::Entry;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use serde::{Deserialize, Serialize};

use crate::harness::busybox;
use crate::site::{next_random, random_bytes};

const LOAD: &str = "--load";
pub const FOLDERS: u64 = 1_500;
const FILES: u64 = 4;
const FILE_LEN: usize = 9_000;
/// A moment between two operations of one thread: the machine has others to serve.
const PAUSE: Duration = Duration::from_millis(2);

/// An image of many small files that can be told from one another.
pub fn image(blobs: &Blobs) -> Result<Image> {
    let mut entries = vec![Entry::dir("data")];
    for folder in 0..FOLDERS {
        entries.push(Entry::dir(format!("data/{folder:04}")));
        let file = |file| Entry::file(format!("data/{folder:04}/{file}"), content(folder, file));
        entries.extend((0..FILES).map(file));
    }
    let top = blobs.layer(Packing::Gzip, &entries)?;
    let layers: Vec<Layer> = busybox(blobs, &[])?.layers.into_iter().chain([top]).collect();
    blobs.image(&layers, &["true"])
}

fn content(folder: u64, file: u64) -> Vec<u8> {
    random_bytes(folder << 32 | file, FILE_LEN)
}

/// What was seen, all of it right.
#[derive(Debug, Serialize, Deserialize)]
pub struct Seen {
    pub reads: u64,
    pub maps: u64,
    pub look_ups: u64,
    pub lists: u64,
    /// The longest that one operation took.
    pub longest_ms: u64,
}

/// The load, under way on the root of an image.
pub struct Load(Running);

impl Load {
    pub fn start(root: &Path) -> Result<Self> {
        let me = std::env::current_exe().context("this program's own file")?;
        // It goes on as long as its folder has no file `enough`.
        let stop = stop_file(root);
        let _ = fs::remove_file(&stop);
        let mut load = Run::new(me).arg(LOAD).arg(root.display()).arg(stop.display()).timeout(300).start()?;
        ensure!(load.first_line().is_some(), "the load didn't start: {:?}", load.finish());
        Ok(Self(load))
    }

    pub fn is_running(&mut self) -> bool {
        self.0.is_running()
    }

    /// Ends it. An error is one that a container would have met.
    pub fn finish(self, root: &Path) -> Result<Seen> {
        fs::write(stop_file(root), "")?;
        let finished = self.0.finish()?;
        ensure!(finished.success(), "a container would have failed: {}", finished.said());
        let last = finished.stdout.lines().last().unwrap_or_default();
        serde_json::from_str(last).with_context(|| format!("the load said {}", finished.said()))
    }
}

fn stop_file(root: &Path) -> PathBuf {
    root.with_extension("enough")
}

/// Becomes the load when the command line says so.
pub fn serve_load() {
    let args: Vec<_> = std::env::args_os().collect();
    if args.len() != 4 || args[1] != LOAD {
        return;
    }
    let worked = work(Path::new(&args[2]), Path::new(&args[3]));
    if let Err(error) = &worked {
        eprintln!("{error:#}");
    }
    std::process::exit(i32::from(worked.is_err()));
}

#[derive(Default)]
struct Shared {
    over: AtomicBool,
    longest_ms: AtomicU64,
}

impl Shared {
    /// Repeats `act` until the end; how often it was done.
    fn repeat(&self, mut act: impl FnMut(u64) -> Result<()>) -> Result<u64> {
        let mut count = 0;
        while !self.over.load(Ordering::Acquire) {
            let started = Instant::now();
            act(count).inspect_err(|_| self.over.store(true, Ordering::Release))?;
            self.longest_ms.fetch_max(started.elapsed().as_millis() as u64, Ordering::AcqRel);
            count += 1;
            thread::sleep(PAUSE);
        }
        Ok(count)
    }
}

fn work(root: &Path, stop: &Path) -> Result<()> {
    let data = root.join("data");
    let shared = Shared::default();
    println!("at work");
    io::stdout().flush()?;
    let (reads, maps, look_ups, lists) = thread::scope(|scope| {
        let reads = scope.spawn(|| shared.repeat(|_| read(&data, &mut fresh_random())));
        let maps = scope.spawn(|| shared.repeat(|_| map(&data, &mut fresh_random())));
        let look_ups = scope.spawn(|| shared.repeat(|count| look_up(&data, count)));
        let lists = scope.spawn(|| shared.repeat(|count| list(&data, count)));
        while !stop.exists() && !shared.over.load(Ordering::Acquire) {
            thread::sleep(Duration::from_millis(20));
        }
        shared.over.store(true, Ordering::Release);
        [reads, maps, look_ups, lists].map(|thread| thread.join().expect("no panic")).into()
    });
    let longest_ms = shared.longest_ms.load(Ordering::Acquire);
    let seen = Seen { reads: reads?, maps: maps?, look_ups: look_ups?, lists: lists?, longest_ms };
    println!("{}", serde_json::to_string(&seen)?);
    Ok(())
}

/// Where to start is of no matter, as long as it is somewhere else each time.
fn fresh_random() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |now| now.as_nanos() as u64)
}

fn any_file(data: &Path, random: &mut u64) -> (PathBuf, Vec<u8>) {
    let (folder, file) = (next_random(random) % FOLDERS, next_random(random) % FILES);
    (data.join(format!("{folder:04}/{file}")), content(folder, file))
}

fn read(data: &Path, random: &mut u64) -> Result<()> {
    let (path, wanted) = any_file(data, random);
    let file = File::open(&path).with_context(|| path.display().to_string())?;
    let mut bytes = vec![0; FILE_LEN];
    file.read_exact_at(&mut bytes, 0).with_context(|| path.display().to_string())?;
    ensure!(bytes == wanted, "{} has other bytes", path.display());
    forget(&file)
}

fn map(data: &Path, random: &mut u64) -> Result<()> {
    let (path, wanted) = any_file(data, random);
    let file = File::open(&path).with_context(|| path.display().to_string())?;
    // SAFETY: nobody else knows the mapping, and it ends below. A page that can't be read ends this process, which is an error.
    let same = unsafe {
        let (number, shared) = (file.as_raw_fd(), libc::MAP_PRIVATE);
        let place = libc::mmap(std::ptr::null_mut(), FILE_LEN, libc::PROT_READ, shared, number, 0);
        ensure!(
            place != libc::MAP_FAILED,
            "{} can't be mapped: {}",
            path.display(),
            io::Error::last_os_error()
        );
        let bytes = std::slice::from_raw_parts(place.cast::<u8>(), FILE_LEN);
        let same = bytes == wanted;
        libc::munmap(place, FILE_LEN);
        same
    };
    ensure!(same, "{} has other bytes when it is mapped", path.display());
    forget(&file)
}

/// So that the next one has to be asked for.
fn forget(file: &File) -> Result<()> {
    Ok(posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?)
}

fn look_up(data: &Path, count: u64) -> Result<()> {
    let path = data.join(format!("{:04}/absent-{count}", count % FOLDERS));
    match fs::symlink_metadata(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => anyhow::bail!("{}: {other:?}", path.display()),
    }
}

fn list(data: &Path, count: u64) -> Result<()> {
    let folder = data.join(format!("{:04}", count % FOLDERS));
    let names = fs::read_dir(&folder).and_then(Iterator::collect::<io::Result<Vec<_>>>);
    let names = names.with_context(|| folder.display().to_string())?;
    ensure!(names.len() as u64 == FILES, "{} has {} names", folder.display(), names.len());
    let size = fs::symlink_metadata(folder.join("0"))?.len();
    ensure!(size == FILE_LEN as u64, "{} has a file of {size} bytes", folder.display());
    Ok(())
}
