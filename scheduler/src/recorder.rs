//! Writes every event to a file. A log with a hole can't be replayed, so it ends at the first event that it can't keep.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use darter_daemon::tasks::Tasks;
use darter_scheduler_core::{Event, Millis, Options, record};
use tokio::sync::mpsc;

/// Lines that were not written yet; when a slow disk lets it fill up, the log ends.
const LINES_MAX: usize = 65_536;

/// The log ends when the file is as large as this.
const BYTES_MAX: u64 = 1 << 30;

pub(crate) struct Recorder {
    /// `None` once the log has ended.
    lines: Option<mpsc::Sender<String>>,
    left: u64,
}

impl Recorder {
    pub(crate) fn create(path: &Path, tasks: &Tasks) -> io::Result<Self> {
        let file = File::create(path)?;
        let (lines, received) = mpsc::channel(LINES_MAX);
        tasks.spawn_blocking("record", move || {
            if let Err(error) = write(received, BufWriter::new(file)) {
                tracing::warn!(%error, "the log of events ends");
            }
        });
        Ok(Self { lines: Some(lines), left: BYTES_MAX })
    }

    pub(crate) fn head(&mut self, now: Millis, options: Options) {
        self.keep(record::encode_head(now, options));
    }

    pub(crate) fn event(&mut self, now: Millis, event: &Event) {
        if self.lines.is_some() {
            self.keep(record::encode(now, event));
        }
    }

    fn keep(&mut self, line: String) {
        let Some(lines) = &self.lines else { return };
        let left = self.left.checked_sub(line.len() as u64 + 1);
        if left.is_none() || lines.try_send(line).is_err() {
            tracing::warn!("the log of events ends: the file is full, or the disk too slow");
            self.lines = None;
        }
        self.left = left.unwrap_or(0);
    }
}

/// Flushes whenever there is nothing more to write.
fn write(mut lines: mpsc::Receiver<String>, mut file: BufWriter<File>) -> io::Result<()> {
    while let Some(line) = lines.blocking_recv() {
        writeln!(file, "{line}")?;
        if lines.is_empty() {
            file.flush()?;
        }
    }
    file.flush()
}
