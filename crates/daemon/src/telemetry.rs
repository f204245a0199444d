//! Logs: events with fields, to standard error, as text or as JSON.
//!
//! SIGUSR1 makes a running program say more: from what was set to `debug`, to `trace`, and back.

use std::io::IsTerminal;
use std::str::FromStr;
use std::sync::OnceLock;

use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry, fmt, reload};

/// The environment variable that overrides the filter of the configuration, for example `info,darter_mesh=debug`.
pub const FILTER_VARIABLE: &str = "DARTER_LOG";

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

impl FromStr for LogFormat {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err(format!("{text:?} is no log format: text or json")),
        }
    }
}

/// Starts to log. `filter` has the form of [`FILTER_VARIABLE`]. A second call changes nothing, so tests may call it.
pub fn init(format: LogFormat, filter: &str) {
    let wanted = std::env::var(FILTER_VARIABLE).ok().filter(|text| !text.is_empty());
    let (filter, mistake) = match EnvFilter::try_new(wanted.as_deref().unwrap_or(filter)) {
        Ok(parsed) => (parsed, None),
        Err(error) => (EnvFilter::new("info"), Some(error)),
    };
    let (filter, handle) = reload::Layer::new(filter);
    let lines = fmt::layer().with_writer(std::io::stderr);
    let lines = match format {
        LogFormat::Text => lines.with_ansi(std::io::stderr().is_terminal()).boxed(),
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    };
    if tracing_subscriber::registry().with(filter).with(lines).try_init().is_ok() {
        // It is set once: with the first start, which is the one that counts.
        let _ = LEVEL.set(handle);
    }
    if let Some(error) = mistake {
        tracing::warn!(%error, "the log filter can't be read; info is used");
    }
}

type Handle = reload::Handle<EnvFilter, Registry>;

static LEVEL: OnceLock<Handle> = OnceLock::new();

/// Changes the level whenever SIGUSR1 comes; never ends.
pub(crate) async fn follow_signals() {
    let Some(handle) = LEVEL.get() else { return };
    let mut asked = signal(SignalKind::user_defined1()).expect("a signal handler can be installed");
    let configured = handle.with_current(ToString::to_string).unwrap_or_else(|_| "info".to_owned());
    for filter in [MORE, MOST, configured.as_str()].iter().cycle() {
        asked.recv().await;
        match handle.reload(EnvFilter::new(filter)) {
            Ok(()) => tracing::info!(filter, "SIGUSR1: the log level is changed"),
            Err(error) => tracing::error!(filter, %error, "SIGUSR1: the log level stays as it was"),
        }
    }
}

/// Our own parts; what is below them (HTTP, TLS) would bury their words.
const MORE: &str = "info,darter=debug";
const MOST: &str = "info,darter=trace";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn second_start_is_harmless() {
        init(LogFormat::Text, "info");
        init(LogFormat::Json, "not=a=filter");
    }

    #[test]
    fn formats_have_names() {
        assert_eq!("json".parse(), Ok(LogFormat::Json));
        assert!("xml".parse::<LogFormat>().is_err());
    }
}
