//! What `darter top` shows, of two looks at the daemon one after the other.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::time::Instant;

use crate::status::{Layer, Status, bytes_words, room};

/// One look.
pub struct Sample {
    pub at: Instant,
    pub status: Status,
    /// Requests of the kernel since the daemon's start, by operation.
    pub fuse: BTreeMap<String, u64>,
}

/// Parents shown; of more, those that give most.
const PARENTS_MAX: usize = 8;

/// Operations of the kernel shown.
const OPERATIONS_MAX: usize = 4;

/// What came since the look before.
struct Change<'a> {
    before: Option<&'a Sample>,
    seconds: f64,
}

impl Change<'_> {
    fn of(&self, now: u64, before: Option<u64>) -> f64 {
        // Without a look before nothing is known, and what was opened since begins at nothing.
        let before = if self.before.is_some() { before.unwrap_or(0) } else { now };
        now.saturating_sub(before) as f64 / self.seconds
    }

    /// Bytes a second of one layer from one parent.
    fn from(&self, layer: &Layer, who: &str, now: u64) -> f64 {
        let layers = self.before.map(|before| &before.status.layers);
        let same = layers.and_then(|layers| layers.iter().find(|other| other.diff_id == layer.diff_id));
        self.of(now, same.map(|same| same.from.get(who).copied().unwrap_or(0)))
    }

    fn layer(&self, layer: &Layer) -> f64 {
        layer.from.iter().map(|(who, bytes)| self.from(layer, who, *bytes)).sum()
    }
}

/// The lines, at most as many as `lines`, each of at most so many `columns`.
pub fn picture(now: &Sample, before: Option<&Sample>, (lines, columns): (usize, usize)) -> Vec<String> {
    let seconds = before.map_or(1.0, |before| (now.at - before.at).as_secs_f64()).max(0.001);
    let change = Change { before, seconds };
    let mut all = head(now, &change);
    if now.status.lazy {
        for table in [parents(now, &change), layers(now, &change)] {
            // A heading without lines says nothing.
            if table.len() > 1 {
                all.push(String::new());
                all.extend(table);
            }
        }
    }
    all.truncate(lines);
    all.into_iter().map(|line| line.chars().take(columns).collect()).collect()
}

fn head(now: &Sample, change: &Change<'_>) -> Vec<String> {
    let Status { version, lazy, store, layers, .. } = &now.status;
    if !lazy {
        return vec![format!("Darter {version} runs without a mesh: every snapshot is plain")];
    }
    let complete = layers.iter().filter(|layer| layer.pieces > 0 && layer.have == layer.pieces).count();
    let rate: f64 = layers.iter().map(|layer| change.layer(layer)).sum();
    let arriving = if rate < 1.0 { "nothing is".to_owned() } else { per_second(rate) };
    let mut head =
        vec![format!("Darter {version}: {} layers, {complete} complete; {arriving} arriving", layers.len())];
    head.extend(store.as_ref().map(room));
    head.push(requests(now, change));
    head
}

/// What the kernel asks for, most frequent first.
fn requests(now: &Sample, change: &Change<'_>) -> String {
    let before = |name| change.before.map(|before| before.fuse.get(name).copied().unwrap_or(0));
    let mut rates: Vec<(&String, f64)> =
        now.fuse.iter().map(|(name, count)| (name, change.of(*count, before(name)))).collect();
    rates.sort_by(|one, other| other.1.total_cmp(&one.1));
    let all: f64 = rates.iter().map(|(_, rate)| rate).sum();
    let most = rates.iter().filter(|(_, rate)| *rate >= 0.5).take(OPERATIONS_MAX);
    let most: Vec<String> = most.map(|(name, rate)| format!("{name} {rate:.0}")).collect();
    let most = if most.is_empty() { String::new() } else { format!(": {}", most.join(", ")) };
    format!("{all:.0} requests/s of the kernel{most}")
}

fn parents(now: &Sample, change: &Change<'_>) -> Vec<String> {
    let mut given: BTreeMap<&str, (f64, u64)> = BTreeMap::new();
    for layer in &now.status.layers {
        for (who, bytes) in &layer.from {
            let (rate, all) = given.entry(who).or_default();
            *rate += change.from(layer, who, *bytes);
            *all += bytes;
        }
    }
    let mut given: Vec<_> = given.into_iter().collect();
    given.sort_by(|(_, one), (_, other)| other.0.total_cmp(&one.0).then(other.1.cmp(&one.1)));
    let mut lines = vec![format!("{:<24} {:>12} {:>12}", "PARENT", "NOW", "ALL")];
    let line = |(who, (rate, all)): &(&str, (f64, u64))| {
        format!("{who:<24} {:>12} {:>12}", per_second(*rate), bytes_words(*all))
    };
    lines.extend(given.iter().take(PARENTS_MAX).map(line));
    lines
}

/// Those that come just now before those that wait, and the complete ones last.
fn layers(now: &Sample, change: &Change<'_>) -> Vec<String> {
    let mut layers: Vec<(&Layer, f64)> =
        now.status.layers.iter().map(|layer| (layer, change.layer(layer))).collect();
    let is_complete = |layer: &Layer| layer.pieces > 0 && layer.have == layer.pieces;
    layers.sort_by_key(|(layer, rate)| (Reverse(*rate as u64), is_complete(layer), &layer.diff_id));
    let mut lines =
        vec![format!("{:<14} {:>15} {:>5} {:>12}  {:<24} IMAGE", "LAYER", "PIECES", "", "NOW", "STATE")];
    let line = |(layer, rate): &(&Layer, f64)| {
        let (pieces, percent) = layer.share();
        let (state, image) = (&layer.state, layer.images.first().map_or("", String::as_str));
        let short = layer.short();
        format!("{short:<14} {pieces:>15} {percent:>5} {:>12}  {state:<24} {image}", per_second(*rate))
    };
    lines.extend(layers.iter().map(line));
    lines
}

fn per_second(rate: f64) -> String {
    if rate < 1.0 { "-".to_owned() } else { format!("{:.1} MB/s", rate / 1e6) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn layer(diff_id: &str, have: u64, from: &[(&str, u64)]) -> Layer {
        Layer {
            diff_id: format!("sha256:{diff_id}"),
            images: vec!["r.example/app@sha256:00".to_owned()],
            pieces: 10,
            have,
            from: from.iter().map(|(who, bytes)| ((*who).to_owned(), *bytes)).collect(),
            state: "ready".to_owned(),
        }
    }

    fn sample(at: Instant, layers: Vec<Layer>, reads: u64) -> Sample {
        let status =
            Status { version: "1".to_owned(), lazy: true, store: None, traffic: None, manager: None, layers };
        Sample { at, status, fuse: [("read".to_owned(), reads)].into() }
    }

    fn whole(now: &Sample, before: Option<&Sample>) -> String {
        picture(now, before, (usize::MAX, usize::MAX)).join("\n")
    }

    #[test]
    fn rates_are_of_the_time_between_two_looks() {
        let begun = Instant::now();
        let before = sample(begun, vec![layer("aa", 5, &[("seed", 1_000_000)])], 100);
        let layers =
            vec![layer("aa", 9, &[("seed", 5_000_000), ("node-2", 3_000_000)]), layer("bb", 10, &[])];
        let now = sample(begun + Duration::from_secs(2), layers, 300);
        let shown = whole(&now, Some(&before));
        let line = |word: &str| shown.lines().find(|line| line.starts_with(word)).unwrap().to_owned();
        assert!(line("Darter").contains("2 layers, 1 complete; 3.5 MB/s arriving"), "{shown}");
        assert!(line("seed").contains("2.0 MB/s") && line("seed").contains("5.0 MB"), "{shown}");
        assert!(line("node-2").contains("1.5 MB/s"), "{shown}");
        assert!(line("100 requests/s of the kernel").ends_with(": read 100"), "{shown}");
        assert!(line("aa").contains("9/10") && line("aa").contains("3.5 MB/s"), "{shown}");
        assert!(shown.find("\naa") < shown.find("\nbb"), "what comes is not first:\n{shown}");
    }

    #[test]
    fn first_look_and_layers_that_were_closed_show_no_rate() {
        let begun = Instant::now();
        let before = sample(begun, vec![layer("aa", 5, &[("seed", 9_000_000)])], 100);
        assert!(!whole(&before, None).contains("MB/s"));
        let now = sample(begun + Duration::from_secs(1), vec![layer("aa", 1, &[("seed", 10)])], 0);
        assert!(!whole(&now, Some(&before)).contains("MB/s"));
    }

    #[test]
    fn node_without_layers_shows_no_empty_tables() {
        let shown = whole(&sample(Instant::now(), Vec::new(), 0), None);
        assert!(shown.contains("0 layers, 0 complete; nothing is arriving"), "{shown}");
        assert!(!shown.contains("PARENT") && !shown.contains("PIECES"), "{shown}");
    }

    #[test]
    fn picture_fits_the_terminal() {
        let layers = (0..50).map(|number| layer(&format!("{number:02}"), 1, &[("seed", 1)])).collect();
        let shown = picture(&sample(Instant::now(), layers, 0), None, (10, 30));
        assert_eq!(shown.len(), 10);
        assert!(shown.iter().all(|line| line.chars().count() <= 30));
    }
}
