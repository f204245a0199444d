//! A folder with layers, a mount, the process that serves it, and a watchdog.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::server::SERVE;

/// After this the connection is ended by force, so that a failing test hangs nobody.
const TEST_BOUND: Duration = Duration::from_secs(90);
const COMMAND_BOUND_S: &str = "30";
/// The mount with extended attributes, and the one without.
const MOUNTS: [&str; 2] = ["mnt", "bare"];
const LOOK_AGAIN: Duration = Duration::from_millis(2);

/// Tests measure times, so they run one after the other.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

pub struct World {
    folder: TempDir,
    server: Option<Server>,
    _turn: MutexGuard<'static, ()>,
}

struct Server {
    child: Child,
    control: BufReader<UnixStream>,
    _watchdog: Sender<()>,
}

impl World {
    /// Writes the layers down and mounts a file system that shows nothing yet.
    pub fn new(layers: &[(&str, Vec<u8>)]) -> World {
        let turn = ONE_AT_A_TIME.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let folder = TempDir::with_prefix("darter-mount-").unwrap();
        for (name, tar) in layers {
            std::fs::write(folder.path().join(name).with_extension("tar"), tar).unwrap();
        }
        let mut world = World { folder, server: None, _turn: turn };
        world.start();
        world
    }

    /// Starts the server.
    pub fn start(&mut self) {
        let address = self.path("control");
        let _first_time = std::fs::remove_file(&address);
        let listener = UnixListener::bind(&address).unwrap();
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "server_process", "--nocapture"])
            .env(SERVE, self.folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let mut control = BufReader::new(accept(&listener));
        let numbers = read_line(&mut control);
        let watchdog = watch(child.id(), numbers);
        self.server = Some(Server { child, control, _watchdog: watchdog });
    }

    /// Ends the server as a crash would.
    pub fn crash(&mut self) {
        let mut server = self.server.take().unwrap();
        server.child.kill().unwrap();
        server.child.wait().unwrap();
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A path below the mount.
    pub fn mounted(&self, name: &str) -> PathBuf {
        self.path("mnt").join(name)
    }

    /// Has the server do something, and gives its answer.
    pub fn say(&mut self, command: &str) -> String {
        let server = self.server.as_mut().unwrap();
        writeln!(server.control.get_mut(), "{command}").unwrap();
        read_line(&mut server.control)
    }

    fn counts(&mut self, command: &str) -> HashMap<String, u64> {
        let answer = self.say(command);
        let pairs = answer.split_whitespace().map(|pair| pair.split_once('=').unwrap());
        pairs.map(|(name, count)| (name.to_owned(), count.parse().unwrap())).collect()
    }

    /// How often each operation was asked for.
    pub fn stats(&mut self) -> HashMap<String, u64> {
        self.counts("stats")
    }

    /// How many pieces of a layer were read, and asked for ahead.
    pub fn moved(&mut self, layer: &str) -> (u64, u64) {
        let counts = self.counts(&format!("moved {layer}"));
        (counts["read"], counts["wanted"])
    }

    /// Waits until an operation was asked for so often.
    pub fn wait_for(&mut self, operation: &str, count: u64) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.stats()[operation] < count {
            assert!(Instant::now() < deadline, "{operation} was not asked for {count} times");
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    /// Unpacks a layer as GNU tar does.
    pub fn unpack(&self, layer: &str) -> PathBuf {
        let to = self.path("unpacked");
        std::fs::create_dir(&to).unwrap();
        let tar = self.path(layer).with_extension("tar");
        let flags =
            ["--xattrs", "--xattrs-include=*", "--numeric-owner", "-p", "--delay-directory-restore", "-xf"];
        let (tar, to_text) = (tar.to_str().unwrap(), to.to_str().unwrap());
        let arguments: Vec<&str> = ["tar"].into_iter().chain(flags).chain([tar, "-C", to_text]).collect();
        run(&arguments);
        to
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if let Some(mut server) = self.server.take() {
            let _gone = writeln!(server.control.get_mut(), "quit");
            let ended = wait(&mut server.child, Duration::from_secs(5)).is_some();
            if !ended {
                let _gone = server.child.kill();
                let _status = server.child.wait();
            }
            if !std::thread::panicking() {
                assert!(ended, "the server doesn't end");
                let left = MOUNTS.map(|name| is_mounted(&self.path(name)));
                assert_eq!(left, [false; 2], "a mount is still there");
            }
        }
        for name in MOUNTS {
            let _not_mounted = umount2(&self.path(name), MntFlags::MNT_DETACH);
        }
    }
}

fn is_mounted(place: &Path) -> bool {
    let list = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    list.lines().any(|line| line.split(' ').nth(4) == place.to_str())
}

fn accept(listener: &UnixListener) -> UnixStream {
    // A server that fails at its start never connects; the bound is the reader's.
    let stream = listener.accept().unwrap().0;
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream
}

fn read_line(control: &mut BufReader<UnixStream>) -> String {
    let mut line = String::new();
    control.read_line(&mut line).unwrap();
    assert!(line.ends_with('\n'), "the server has ended");
    line.trim_end().to_owned()
}

/// Ends server and connections if the sender isn't dropped in time.
fn watch(server: u32, connections: String) -> Sender<()> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        if receiver.recv_timeout(TEST_BOUND) == Err(RecvTimeoutError::Timeout) {
            eprintln!("the watchdog ends the connections");
            for connection in connections.split(' ') {
                let _no_control_files =
                    std::fs::write(format!("/sys/fs/fuse/connections/{connection}/abort"), "1");
            }
            let _gone = kill(Pid::from_raw(server as i32), Signal::SIGKILL);
        }
    });
    sender
}

/// How long a child took to end, if it did within `bound`.
pub fn wait(child: &mut Child, bound: Duration) -> Option<Duration> {
    let start = Instant::now();
    while start.elapsed() < bound {
        if child.try_wait().unwrap().is_some() {
            return Some(start.elapsed());
        }
        std::thread::sleep(LOOK_AGAIN);
    }
    None
}

/// Starts a command that may hang.
pub fn spawn(words: &[&str]) -> Child {
    let mut command = Command::new(words[0]);
    command.args(&words[1..]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().unwrap()
}

/// Runs a command to its end, with a bound; gives what it printed. It must succeed.
pub fn run(words: &[&str]) -> String {
    let output = output(words);
    assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs a command to its end, with a bound.
pub fn output(words: &[&str]) -> Output {
    let bounded = ["-k", "1", COMMAND_BOUND_S].into_iter().chain(words.iter().copied());
    Command::new("timeout").args(bounded).stdin(Stdio::null()).output().unwrap()
}
