//! `darter trace IMAGE`: what the image's start has read on this node, in order, how long each read waited, and who gave it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Result;
use serde::Deserialize;

#[derive(Debug, clap::Args)]
pub struct Options {
    /// The image: a reference, a repository, or the digest of its manifest
    image: String,
    /// Only reads that waited at least so many milliseconds
    #[arg(long, value_name = "MS", default_value_t = 0.0)]
    waited: f64,
    /// The node daemon's state directory
    #[arg(long, value_name = "DIR", default_value = "/var/lib/darter")]
    root: PathBuf,
    /// Print the daemon's answer as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Deserialize)]
struct Trace {
    reads: Vec<Read>,
}

#[derive(Deserialize)]
struct Read {
    at_ms: f64,
    waited_ms: f64,
    path: String,
    piece: u32,
    local: bool,
    from: String,
}

pub async fn run(options: Options) -> Result<()> {
    let path = format!("/trace?image={}", crate::admin::url_encoded(&options.image));
    let answer: serde_json::Value = crate::admin::get(&options.root, &path).await?;
    if options.json {
        println!("{}", serde_json::to_string_pretty(&answer)?);
        return Ok(());
    }
    let trace: Trace = serde_json::from_value(answer)?;
    println!("{:>9} {:>9}  {:<24} {:>6}  FILE", "AT MS", "WAITED", "FROM", "PIECE");
    for read in trace.reads.iter().filter(|read| read.waited_ms >= options.waited) {
        let Read { at_ms, waited_ms, piece, path, .. } = read;
        println!("{at_ms:>9.1} {waited_ms:>9.2}  {:<24} {piece:>6}  {path}", whence(read));
    }
    println!("{}", summary(&trace.reads));
    Ok(())
}

/// Who gave the piece, and whether it had come before it was read.
fn whence(read: &Read) -> String {
    match (read.local, read.from.as_str()) {
        (true, "") => "here".to_owned(),
        (true, from) => format!("{from}, before"),
        (false, "") => "elsewhere".to_owned(),
        (false, from) => from.to_owned(),
    }
}

fn summary(reads: &[Read]) -> String {
    let mut by: BTreeMap<String, (usize, f64)> = BTreeMap::new();
    for read in reads {
        let (count, waited) = by.entry(whence(read)).or_default();
        *count += 1;
        *waited += read.waited_ms;
    }
    let each = by.iter().map(|(from, (count, waited))| format!("{count} from {from} in {waited:.0} ms"));
    format!("{} pieces, waited for: {}", reads.len(), each.collect::<Vec<_>>().join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(local: bool, from: &str) -> Read {
        Read { at_ms: 1.0, waited_ms: 2.0, path: "/a".to_owned(), piece: 3, local, from: from.to_owned() }
    }

    #[test]
    fn reads_are_summed_by_where_they_came_from() {
        let reads = [read(true, ""), read(true, "seed"), read(false, "seed"), read(false, "seed")];
        let told = summary(&reads);
        assert_eq!(
            told,
            "4 pieces, waited for: 1 from here in 2 ms; 2 from seed in 4 ms; 1 from seed, before in 2 ms"
        );
    }
}
