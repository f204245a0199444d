//! The demo.
fn main() -> anyhow::Result<()> {
    let cache = std::path::PathBuf::from(std::env::var("DARTER_CACHE").unwrap_or("/var/cache/darter".into()));
    let (_, image) = darter_integration::sci::image(&cache)?;
    println!("{image:#?}");
    Ok(())
}
