//! How the targets get their seeds. What they do stands in the crates that they fuzz, in `fuzzing.rs`, where ordinary tests
//! run it too.

use std::path::PathBuf;

/// Writes the seeds into the first folder that libFuzzer was given, which it reads after this.
///
/// Panics if that fails: a fuzzer without seeds would find nothing and look content.
pub fn plant(seeds: Vec<Vec<u8>>) {
    let Some(corpus) = std::env::args_os().skip(1).map(PathBuf::from).find(|path| path.is_dir()) else {
        return;
    };
    for (at, seed) in seeds.iter().enumerate() {
        std::fs::write(corpus.join(format!("seed-{at}")), seed)
            .expect("the folder of the corpus takes seeds");
    }
}
