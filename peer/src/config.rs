//! The peer's settings: `packaging/etc/peer.toml` shows them all.

/// Its settings are those of any peer.
pub type Config = darter_mesh::assemble::PeerConfig;

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    const KEYS: [&str; 25] = [
        "root",
        "manager",
        "join_token",
        "join_token_file",
        "node_name",
        "listen",
        "advertise",
        "zone",
        "hosts_dir",
        "docker_config",
        "registries",
        "upload_slots",
        "download_rate_bytes",
        "upload_rate_bytes",
        "registry_rate_bytes",
        "background_rate_bytes",
        "background_idle_ms",
        "background_yields",
        "link_rate_bytes",
        "prefetch",
        "metrics_listen",
        "store_quota_bytes",
        "store_high_percent",
        "store_low_percent",
        "store_keep_seconds",
    ];

    #[test]
    fn sample_file_equals_the_defaults_and_shows_every_key() {
        let sample = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/etc/peer.toml");
        assert_eq!(darter_daemon::config::load::<Config>(&sample).unwrap(), Config::default());
        let text = std::fs::read_to_string(sample).unwrap();
        for key in KEYS {
            assert!(text.lines().any(|line| line.starts_with(&format!("{key} = "))), "{key} is not shown");
        }
    }

    #[test]
    fn sample_file_shows_what_can_be_set_about_traces() {
        let sample = include_str!("../../packaging/etc/peer.toml");
        for key in ["endpoint", "protocol", "share", "share_of_pulls"] {
            assert!(sample.contains(&format!("\ntraces.{key} = ")), "{key} is not shown");
        }
    }
}
