//! What can be set about traces: in a program's configuration, and by the variables of OpenTelemetry.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The part `traces` of a configuration.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Where a collector takes OTLP, for example `http://collector:4317`. Empty: nothing is followed. Default: empty.
    pub endpoint: String,
    /// What it speaks: `grpc` or `http/protobuf`. Default: `grpc`.
    pub protocol: Protocol,
    /// Which share of the reads that memory can't answer is followed, from 0 to 1. Default: 0.001.
    pub share: Share,
    /// Which share of the pulls is followed. Default: 1.
    pub share_of_pulls: Share,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            endpoint: String::new(),
            protocol: Protocol::default(),
            share: Share(1_000),
            share_of_pulls: Share(Share::ALL),
        }
    }
}

/// How OTLP travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
pub enum Protocol {
    #[default]
    #[serde(rename = "grpc")]
    Grpc,
    #[serde(rename = "http/protobuf")]
    Http,
}

/// A part of a whole, in millionths.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share(u32);

impl Share {
    const ALL: u32 = 1_000_000;

    /// Whether this one is of the share; `fraction` is something random in 0..1.
    pub(super) fn has(self, fraction: f64) -> bool {
        fraction * f64::from(Self::ALL) < f64::from(self.0)
    }
}

impl<'de> Deserialize<'de> for Share {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = f64::deserialize(deserializer)?;
        if !(0.0..=1.0).contains(&value) {
            return Err(serde::de::Error::custom(format!("{value} is no share from 0 to 1")));
        }
        Ok(Self((value * f64::from(Self::ALL)).round() as u32))
    }
}

impl Serialize for Share {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(f64::from(self.0) / f64::from(Self::ALL))
    }
}

impl Settings {
    /// What the variables of OpenTelemetry say goes before the file. `OTEL_SERVICE_NAME`, `OTEL_RESOURCE_ATTRIBUTES`, headers and
    /// time-outs are read where the exporter is made.
    pub(super) fn with_environment(mut self, variable: impl Fn(&str) -> Option<String>) -> Self {
        let said = |name: &str| variable(name).filter(|text| !text.is_empty());
        let of_traces = |name: &str| {
            said(&format!("OTEL_EXPORTER_OTLP_TRACES_{name}"))
                .map(|text| (text, true))
                .or_else(|| said(&format!("OTEL_EXPORTER_OTLP_{name}")).map(|text| (text, false)))
        };
        match of_traces("PROTOCOL").as_ref().map(|(text, _)| text.as_str()) {
            Some("grpc") => self.protocol = Protocol::Grpc,
            Some("http/protobuf") => self.protocol = Protocol::Http,
            Some(other) => {
                tracing::warn!(other, "OTEL_EXPORTER_OTLP_PROTOCOL: grpc or http/protobuf is spoken")
            }
            None => {}
        }
        if let Some((endpoint, is_whole)) = of_traces("ENDPOINT") {
            // The standard says so: the general one is a base, that of traces is taken as it is.
            self.endpoint = if is_whole { endpoint } else { self.protocol.below(&endpoint) };
        } else if !self.endpoint.is_empty() {
            self.endpoint = self.protocol.below(&self.endpoint);
        }
        let is_off = said("OTEL_SDK_DISABLED").is_some_and(|text| text.eq_ignore_ascii_case("true"))
            || said("OTEL_TRACES_EXPORTER").is_some_and(|text| text == "none");
        if is_off {
            self.endpoint.clear();
        }
        self
    }
}

impl Protocol {
    /// Where traces go at a collector.
    fn below(self, base: &str) -> String {
        match self {
            Protocol::Grpc => base.to_owned(),
            Protocol::Http => format!("{}/v1/traces", base.trim_end_matches('/')),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(settings: &Settings, variables: &[(&str, &str)]) -> Settings {
        let all: Vec<_> =
            variables.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect();
        let find = |name: &str| all.iter().find(|(known, _)| known == name).map(|(_, text)| text.clone());
        settings.clone().with_environment(find)
    }

    #[test]
    fn the_environment_goes_before_the_file() {
        let file = Settings { endpoint: "http://file:4317".to_owned(), ..Settings::default() };
        assert_eq!(with(&file, &[]).endpoint, "http://file:4317");
        let general = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://all:4317");
        assert_eq!(with(&file, &[general]).endpoint, "http://all:4317");
        let own = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://own:4317");
        assert_eq!(with(&file, &[general, own]).endpoint, "http://own:4317");
        assert_eq!(with(&file, &[("OTEL_SDK_DISABLED", "true")]).endpoint, "");
        assert_eq!(with(&file, &[general, ("OTEL_TRACES_EXPORTER", "none")]).endpoint, "");
    }

    #[test]
    fn over_http_the_path_is_added_to_what_is_a_base() {
        let http = ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf");
        let general = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://all:4318/");
        let set = with(&Settings::default(), &[http, general]);
        assert_eq!((set.protocol, set.endpoint.as_str()), (Protocol::Http, "http://all:4318/v1/traces"));
        let own = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://own:4318/x");
        assert_eq!(with(&Settings::default(), &[http, own]).endpoint, "http://own:4318/x");
    }

    #[test]
    fn shares_go_from_nothing_to_all() {
        let parse = |text: &str| toml::from_str::<Settings>(&format!("share = {text}"));
        assert_eq!(parse("0.25").unwrap().share, Share(250_000));
        let (nothing, all) = (parse("0").unwrap().share, parse("1").unwrap().share);
        assert!(!nothing.has(0.0) && all.has(0.999_999_9));
        assert!(parse("1.5").unwrap_err().to_string().contains("no share from 0 to 1"));
        assert!(parse("-0.1").is_err());
    }
}
