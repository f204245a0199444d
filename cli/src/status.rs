//! `darter status`: the layers on this node, how complete each is, and who sent it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::SystemTime;

use anyhow::Result;
use serde::Deserialize;

use crate::member::Manager;

#[derive(Debug, clap::Args)]
pub struct Options {
    /// The node daemon's state directory
    #[arg(long, value_name = "DIR", default_value = "/var/lib/darter")]
    root: PathBuf,
    /// Print the daemon's answer as JSON
    #[arg(long)]
    json: bool,
}

/// The daemon's answer; [`crate::top`] asks for it, too.
#[derive(Deserialize)]
pub struct Status {
    pub version: String,
    pub lazy: bool,
    pub store: Option<Store>,
    pub traffic: Option<Traffic>,
    /// `None` without a cluster.
    pub manager: Option<Manager>,
    pub layers: Vec<Layer>,
}

#[derive(Deserialize)]
pub struct Store {
    dir: PathBuf,
    used: u64,
    quota: Option<u64>,
    evicted: u64,
    total: u64,
    available: u64,
    /// In percent.
    #[serde(default)]
    high_percent: u8,
    #[serde(default)]
    beyond_mark: bool,
    tight: bool,
}

impl Store {
    /// `store_high_percent`, if the disk is fuller than that.
    pub fn mark_passed(&self) -> Option<u8> {
        self.beyond_mark.then_some(self.high_percent)
    }
}

#[derive(Deserialize)]
pub struct Traffic {
    limits: Vec<Limit>,
    yields_to: Vec<String>,
}

#[derive(Deserialize)]
struct Limit {
    kind: String,
    rate: u64,
    set_by: String,
}

#[derive(Deserialize)]
pub struct Layer {
    pub diff_id: String,
    #[serde(default)]
    pub images: Vec<String>,
    /// 0 as long as there is no map.
    pub pieces: u64,
    pub have: u64,
    /// Bytes, by who gave them.
    #[serde(default)]
    pub from: BTreeMap<String, u64>,
    pub state: String,
}

impl Layer {
    /// The first characters of its digest.
    pub fn short(&self) -> String {
        self.diff_id.trim_start_matches("sha256:").chars().take(12).collect()
    }

    /// How many pieces are here, and the same in percent.
    pub fn share(&self) -> (String, String) {
        match self.pieces {
            0 => ("-".to_owned(), String::new()),
            total => (format!("{}/{total}", self.have), format!("{}%", self.have * 100 / total)),
        }
    }
}

/// Bytes for people: GB from one on, below that MB.
pub fn bytes_words(bytes: u64) -> String {
    let (size, unit) = if bytes < 1_000_000_000 { (1e6, "MB") } else { (1e9, "GB") };
    format!("{:.1} {unit}", bytes as f64 / size)
}

pub async fn run(options: Options) -> Result<()> {
    let answer: serde_json::Value = crate::admin::get(&options.root, "/status").await?;
    if options.json {
        println!("{}", serde_json::to_string_pretty(&answer)?);
        return Ok(());
    }
    let status: Status = serde_json::from_value(answer)?;
    if !status.lazy {
        println!("{}", plain(&status));
        return Ok(());
    }
    status.store.iter().for_each(|store| println!("{}", room(store)));
    let trouble =
        status.manager.as_ref().and_then(|manager| manager.trouble(&options.root, SystemTime::now()));
    trouble.iter().for_each(|trouble| println!("{}; `darter doctor` has the cure", trouble.what));
    status.traffic.iter().for_each(traffic);
    if status.layers.is_empty() {
        println!("no lazy layers on this node yet; `darter pull IMAGE` makes some");
        return Ok(());
    }
    println!("{:<14} {:>15} {:>5}  {:<24} FROM", "LAYER", "PIECES", "", "STATE");
    status.layers.iter().for_each(show);
    Ok(())
}

/// Why nothing is lazy.
fn plain(status: &Status) -> String {
    let without = format!("Darter {} runs without a mesh: every snapshot is plain", status.version);
    match status.manager.as_ref().filter(|manager| !manager.joined) {
        Some(Manager { address, trouble, .. }) => {
            format!("{without}; it has not joined at {address}: {trouble}")
        }
        None => without,
    }
}

/// One line on the disk: what pieces take, what may be, what had to go.
pub fn room(store: &Store) -> String {
    let quota = store.quota.map_or(String::new(), |quota| format!(" of {}", bytes_words(quota)));
    let full = (store.total - store.available.min(store.total)) * 100 / store.total.max(1);
    let went = |bytes| format!(", {} evicted", bytes_words(bytes));
    let evicted = if store.evicted > 0 { went(store.evicted) } else { String::new() };
    let tight = match store.mark_passed() {
        Some(mark) => {
            format!(", above store_high_percent ({mark}%): nothing is fetched that nobody waits for")
        }
        None if store.tight => "; no room for what nobody waits for".to_owned(),
        None => String::new(),
    };
    let (dir, used, free) = (store.dir.display(), bytes_words(store.used), bytes_words(store.available));
    format!("{dir}: {used}{quota} of pieces{evicted}; the disk is {full}% full, {free} free{tight}")
}

/// What is said of limits that aren't the node's own.
const SET_BY: [(&str, &str); 2] =
    [("member", " (set on the manager for this node)"), ("cluster", " (set on the manager for all)")];

/// A line with the limits in force and who set them, and one if the background stands back.
fn traffic(traffic: &Traffic) {
    let shown = |limit: &Limit| {
        let by = SET_BY.iter().find(|(set_by, _)| limit.set_by == *set_by).map_or("", |(_, by)| by);
        format!("{} {}{by}", limit.kind, crate::limits::rate_words(limit.rate))
    };
    let limits: Vec<String> = traffic.limits.iter().map(shown).collect();
    if !limits.is_empty() {
        println!("limits: {}", limits.join(", "));
    }
    if !traffic.yields_to.is_empty() {
        println!("the background stands back: others keep busy: {}", traffic.yields_to.join(", "));
    }
}

fn show(layer: &Layer) {
    let (short, (pieces, percent)) = (layer.short(), layer.share());
    let from: Vec<String> =
        layer.from.iter().map(|(who, bytes)| format!("{who} {}", bytes_words(*bytes))).collect();
    println!("{short:<14} {pieces:>15} {percent:>5}  {:<24} {}", layer.state, from.join(", "));
    for image in &layer.images {
        println!("{:14} {image}", "");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store(available: u64, beyond_mark: bool, tight: bool) -> Store {
        let store = serde_json::json!({
            "dir": "/d", "used": 0, "quota": null, "evicted": 0, "total": 100, "available": available, "high_percent": 80,
            "beyond_mark": beyond_mark, "tight": tight
        });
        serde_json::from_value(store).unwrap()
    }

    #[test]
    fn a_disk_above_the_mark_is_told_before_anything_was_refused() {
        let said = room(&store(12, true, false));
        assert!(
            said.contains("88% full") && said.contains("above store_high_percent (80%): nothing is"),
            "{said}"
        );
        assert!(!room(&store(30, false, false)).contains("nothing is fetched"));
        assert!(room(&store(30, false, true)).contains("no room for what nobody waits for"));
    }

    #[test]
    fn bytes_are_told_in_gigabytes_from_one_on() {
        let told = [0, 999_900_000, 1_000_000_000, 30_726_500_000].map(bytes_words);
        assert_eq!(told, ["0.0 MB", "999.9 MB", "1.0 GB", "30.7 GB"]);
    }
}
