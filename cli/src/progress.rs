//! What `darter pull` shows while it works: one line a layer on a terminal, nothing but changes elsewhere.

use std::io::IsTerminal;

use darter_types::BlobDigest;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerState {
    Preparing,
    Downloading,
    Unpacking,
    /// Served by Darter: nothing was downloaded.
    Lazy,
    /// Downloaded and unpacked, as overlayfs does it.
    Plain,
    /// It was there before this pull.
    Present,
}

impl LayerState {
    fn words(self) -> &'static str {
        match self {
            LayerState::Preparing => "preparing",
            LayerState::Downloading => "downloading (plain)",
            LayerState::Unpacking => "unpacking (plain)",
            LayerState::Lazy => "lazy",
            LayerState::Plain => "plain: downloaded and unpacked",
            LayerState::Present => "already there",
        }
    }

    fn is_final(self) -> bool {
        matches!(self, LayerState::Lazy | LayerState::Plain | LayerState::Present)
    }
}

pub struct Progress {
    bars: Vec<ProgressBar>,
    plain: bool,
    // Keeps the bars in one block of the terminal.
    _block: MultiProgress,
}

impl Progress {
    pub fn new(layers: usize, quiet: bool) -> Self {
        let terminal = std::io::stderr().is_terminal() && !quiet;
        let block = MultiProgress::new();
        let style = ProgressStyle::with_template("{spinner} {msg}").expect("the template is valid");
        let bars = if terminal { layers } else { 0 };
        let bars = (0..bars)
            .map(|_| {
                let bar = block.add(ProgressBar::new_spinner().with_style(style.clone()));
                bar.enable_steady_tick(std::time::Duration::from_millis(120));
                bar
            })
            .collect();
        Self { bars, plain: !terminal && !quiet, _block: block }
    }

    pub fn layer(&self, index: usize, blob: &BlobDigest, state: LayerState) {
        let short: String = blob.0.hex().chars().take(12).collect();
        if let Some(bar) = self.bars.get(index) {
            bar.set_message(format!("{short}  {}", state.words()));
            if state.is_final() {
                bar.finish();
            }
        } else if self.plain && state.is_final() {
            eprintln!("{short}  {}", state.words());
        }
    }

    pub fn finish(&self) {
        self.bars.iter().for_each(ProgressBar::finish);
    }
}
