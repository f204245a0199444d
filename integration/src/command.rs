//! Child processes: each has a deadline, a process group of its own, and is gone when its owner is.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

/// What a command gets unless it says otherwise.
const TIMEOUT: Duration = Duration::from_secs(60);
/// Between two looks at a child. Shorter than anything that is measured.
const LOOK_AGAIN: Duration = Duration::from_millis(2);

/// What a finished command left.
#[derive(Debug)]
pub struct Finished {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
    pub took: Duration,
    /// When the first line of output came.
    pub first_line_after: Option<Duration>,
}

impl Finished {
    pub fn success(&self) -> bool {
        self.status.success()
    }
    /// What was printed on either stream, for errors.
    pub fn said(&self) -> String {
        format!("{}{}", self.stdout, self.stderr)
    }
}

/// A command to run to its end.
pub struct Run {
    command: Command,
    words: Vec<String>,
    timeout: Duration,
    input: Vec<u8>,
}

impl Run {
    pub fn new(program: impl AsRef<Path>) -> Self {
        let program = program.as_ref();
        Self {
            command: Command::new(program),
            words: vec![program.display().to_string()],
            timeout: TIMEOUT,
            input: Vec::new(),
        }
    }

    /// The same in the network namespace at this path; the mount namespace stays, so cgroups can be seen.
    pub fn in_namespace(namespace: &Path, program: impl AsRef<Path>) -> Self {
        Self::new("nsenter")
            .arg(format!("--net={}", namespace.display()))
            .arg("--")
            .arg(program.as_ref().display())
    }

    pub fn arg(mut self, arg: impl std::fmt::Display) -> Self {
        let arg = arg.to_string();
        self.command.arg(&arg);
        self.words.push(arg);
        self
    }

    pub fn args<A: std::fmt::Display>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        for arg in args {
            self = self.arg(arg);
        }
        self
    }

    pub fn env(mut self, key: &str, value: impl std::fmt::Display) -> Self {
        self.command.env(key, value.to_string());
        self
    }

    pub fn dir(mut self, dir: &Path) -> Self {
        self.command.current_dir(dir);
        self
    }

    pub fn timeout(mut self, seconds: u64) -> Self {
        self.timeout = Duration::from_secs(seconds);
        self
    }

    pub fn input(mut self, input: impl Into<Vec<u8>>) -> Self {
        self.input = input.into();
        self
    }

    /// Runs to the end. An error means that it did not start or did not end in time.
    pub fn output(self) -> Result<Finished> {
        self.start()?.finish()
    }

    /// Runs to the end and wants success; the error has what it printed.
    pub fn check(self) -> Result<String> {
        let words = self.words.join(" ");
        let finished = self.output()?;
        if !finished.success() {
            bail!("`{words}` failed ({}):\n{}", finished.status, finished.said().trim());
        }
        Ok(finished.stdout)
    }

    /// Starts it, to be waited for later.
    pub fn start(mut self) -> Result<Running> {
        let started = Instant::now();
        let mut child = self
            .command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .with_context(|| format!("starting {}", self.words[0]))?;
        let mut stdin = child.stdin.take().expect("a pipe was asked for");
        let input = std::mem::take(&mut self.input);
        thread::spawn(move || stdin.write_all(&input));
        let stdout = Stream::gather(child.stdout.take().expect("a pipe was asked for"), started);
        let stderr = Stream::gather(child.stderr.take().expect("a pipe was asked for"), started);
        let words = self.words.join(" ");
        let deadline = started + self.timeout;
        Ok(Running { child: Group(child), words, started, deadline, stdout, stderr, first_line: None })
    }
}

/// What a stream has brought so far, gathered by a thread.
struct Stream {
    bytes: Arc<Mutex<Vec<u8>>>,
    first_line: mpsc::Receiver<Duration>,
    ended: mpsc::Receiver<()>,
}

impl Stream {
    fn gather(mut from: impl Read + Send + 'static, started: Instant) -> Self {
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let (line, first_line) = mpsc::channel();
        let (end, ended) = mpsc::channel();
        let into = bytes.clone();
        thread::spawn(move || {
            let (mut buffer, mut line) = (vec![0; 64 * 1024], Some(line));
            while let Ok(n @ 1..) = from.read(&mut buffer) {
                if buffer[..n].contains(&b'\n')
                    && let Some(line) = line.take()
                {
                    let _ = line.send(started.elapsed());
                }
                into.lock().expect("no panic while appending").extend_from_slice(&buffer[..n]);
            }
            let _ = end.send(());
        });
        Self { bytes, first_line, ended }
    }

    /// All of it. Somebody who inherited the stream may keep it open: that is not waited for.
    fn finish(&self) -> String {
        let _ = self.ended.recv_timeout(Duration::from_secs(2));
        let bytes = self.bytes.lock().expect("no panic while appending");
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// A command under way. Dropped, it and its group are killed.
pub struct Running {
    child: Group,
    words: String,
    started: Instant,
    deadline: Instant,
    stdout: Stream,
    stderr: Stream,
    first_line: Option<Duration>,
}

impl Running {
    pub fn pid(&self) -> u32 {
        self.child.0.id()
    }

    pub fn is_running(&mut self) -> bool {
        matches!(self.child.0.try_wait(), Ok(None))
    }

    pub fn kill(&mut self) {
        self.child.kill();
    }

    /// Waits for the first line of output and says when it was there; `None` when it ended without one.
    pub fn first_line(&mut self) -> Option<Duration> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        self.first_line = self.first_line.or_else(|| self.stdout.first_line.recv_timeout(left).ok());
        self.first_line
    }

    pub fn finish(mut self) -> Result<Finished> {
        let status = wait_until(&mut self.child.0, self.deadline)?;
        let took = self.started.elapsed();
        let Some(status) = status else {
            self.child.kill();
            bail!("`{}` did not end within {:?}", self.words, self.deadline - self.started);
        };
        let (stdout, stderr) = (self.stdout.finish(), self.stderr.finish());
        let first_line_after = self.first_line.or_else(|| self.stdout.first_line.try_recv().ok());
        Ok(Finished { status, stdout, stderr, took, first_line_after })
    }
}

fn wait_until(child: &mut Child, deadline: Instant) -> Result<Option<ExitStatus>> {
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= deadline {
            return Ok(None);
        }
        thread::sleep(LOOK_AGAIN);
    }
}

/// A child that leads a process group; the group dies with this value.
struct Group(Child);

impl Group {
    fn signal(&self, signal: Signal) {
        let _ = killpg(Pid::from_raw(self.0.id() as i32), signal);
    }

    fn kill(&mut self) {
        self.signal(Signal::SIGKILL);
        let _ = wait_until(&mut self.0, Instant::now() + Duration::from_secs(5));
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if matches!(self.0.try_wait(), Ok(None)) {
            self.kill();
        }
    }
}

/// A long-running program whose output goes to a file.
pub struct Daemon {
    name: String,
    child: Group,
    log: PathBuf,
}

impl Daemon {
    /// Starts `command` (made by [`Run`], its deadline does not count) with its output appended to `log`.
    pub fn start(name: &str, mut run: Run, log: &Path) -> Result<Self> {
        let file = File::options().create(true).append(true).open(log)?;
        writeln!(&file, "--- {}", run.words.join(" "))?;
        let child = run
            .command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .process_group(0)
            .spawn()
            .with_context(|| format!("starting {name}"))?;
        Ok(Self { name: name.into(), child: Group(child), log: log.into() })
    }

    pub fn pid(&self) -> u32 {
        self.child.0.id()
    }

    pub fn log(&self) -> &Path {
        &self.log
    }

    pub fn log_text(&self) -> String {
        let bytes = std::fs::read(&self.log).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Fails with the end of its log when it is no longer running.
    pub fn must_run(&mut self) -> Result<()> {
        match self.child.0.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("{} ended ({status}):\n{}", self.name, tail(&self.log_text(), 15)),
        }
    }

    /// Waits until `ready` says so; the program must keep running meanwhile.
    pub fn wait_ready(&mut self, seconds: u64, mut ready: impl FnMut() -> bool) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(seconds);
        while !ready() {
            self.must_run()?;
            if Instant::now() > deadline {
                bail!("{} was not ready within {seconds} s:\n{}", self.name, tail(&self.log_text(), 15));
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    pub fn kill(&mut self) {
        self.child.kill();
    }

    /// SIGTERM, and how it ended; SIGKILL and an error when that takes longer.
    pub fn stop(&mut self, seconds: u64) -> Result<ExitStatus> {
        if let Some(status) = self.child.0.try_wait()? {
            return Ok(status);
        }
        let pid = Pid::from_raw(self.child.0.id() as i32);
        let _ = nix::sys::signal::kill(pid, Signal::SIGTERM);
        let deadline = Instant::now() + Duration::from_secs(seconds);
        match wait_until(&mut self.child.0, deadline)? {
            Some(status) => Ok(status),
            None => {
                self.child.kill();
                bail!("{} did not stop within {seconds} s:\n{}", self.name, tail(&self.log_text(), 15))
            }
        }
    }
}

/// The last lines of a text.
pub fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// Polls `done` until it says yes; the error names `what`.
pub fn eventually(what: &str, seconds: u64, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(seconds);
    loop {
        if done().with_context(|| what.to_owned())? {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("not within {seconds} s: {what}");
        }
        thread::sleep(Duration::from_millis(20));
    }
}
