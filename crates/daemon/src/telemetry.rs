//! Logs: events with fields, to standard error, as text or as JSON.

use std::io::IsTerminal;
use std::str::FromStr;

use tracing_subscriber::EnvFilter;

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
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let started = match format {
        LogFormat::Text => builder.with_ansi(std::io::stderr().is_terminal()).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    if let (Ok(()), Some(error)) = (started, mistake) {
        tracing::warn!(%error, "the log filter can't be read; info is used");
    }
}

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
