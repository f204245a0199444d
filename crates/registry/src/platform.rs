//! Which of an index's images is for this machine.

use crate::manifest::Descriptor;

/// Operating system, processor and its variant, in Go's words as OCI uses them.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, serde::Deserialize)]
#[serde(default)]
pub struct Platform {
    pub os: String,
    pub architecture: String,
    pub variant: String,
}

impl Platform {
    /// The machine that this program was built for.
    pub fn host() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            "x86" => "386",
            "powerpc64" => "ppc64le",
            other => other,
        };
        Self { os: "linux".to_owned(), architecture: architecture.to_owned(), variant: String::new() }
    }

    /// The variant that is meant where none is written, and the other way round.
    fn normal_variant(&self) -> &str {
        match (self.architecture.as_str(), self.variant.as_str()) {
            ("amd64", "v1") => "",
            ("arm64", "") => "v8",
            ("arm", "") => "v7",
            (_, variant) => variant,
        }
    }

    fn runs(&self, image: &Platform) -> bool {
        self.os == image.os
            && self.architecture == image.architecture
            && self.normal_variant() == image.normal_variant()
    }
}

impl std::fmt::Display for Platform {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{}/{}", self.os, self.architecture)?;
        if self.variant.is_empty() { Ok(()) } else { write!(formatter, "/{}", self.variant) }
    }
}

impl std::str::FromStr for Platform {
    type Err = String;

    /// As people write it: `linux/amd64`, `linux/arm/v7`.
    fn from_str(text: &str) -> Result<Self, String> {
        let parts: Vec<&str> = text.split('/').collect();
        let (os, architecture, variant) = match parts[..] {
            [os, architecture] => (os, architecture, ""),
            [os, architecture, variant] => (os, architecture, variant),
            _ => {
                return Err(format!(
                    "{text:?} is no platform: write os/architecture, for example linux/arm64"
                ));
            }
        };
        let [os, architecture, variant] = [os, architecture, variant].map(str::to_owned);
        Ok(Self { os, architecture, variant })
    }
}

/// The first image for `platform`; one that doesn't say what it is for is taken if there is no better one.
pub fn select<'a>(images: &'a [Descriptor], platform: &Platform) -> Option<&'a Descriptor> {
    let fits = |image: &&Descriptor| image.platform.as_ref().is_some_and(|of| platform.runs(of));
    images.iter().find(fits).or_else(|| images.iter().find(|image| image.platform.is_none()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use darter_types::Digest;

    fn image(text: &str, platform: Option<(&str, &str, &str)>) -> Descriptor {
        let platform = platform.map(|(os, architecture, variant)| Platform {
            os: os.to_owned(),
            architecture: architecture.to_owned(),
            variant: variant.to_owned(),
        });
        Descriptor { platform, ..Descriptor::new("m", Digest::of(text.as_bytes()), 1) }
    }

    #[test]
    fn same_processor_is_chosen_and_attestations_are_not() {
        let amd64 = Platform { os: "linux".into(), architecture: "amd64".into(), variant: String::new() };
        let images = [
            image("attestation", Some(("unknown", "unknown", ""))),
            image("arm", Some(("linux", "arm64", "v8"))),
            image("v3", Some(("linux", "amd64", "v3"))),
            image("plain", Some(("linux", "amd64", "v1"))),
        ];
        assert_eq!(select(&images, &amd64), Some(&images[3]));
        let arm64 = Platform { architecture: "arm64".into(), ..amd64.clone() };
        assert_eq!(select(&images, &arm64), Some(&images[1]));
        assert_eq!(select(&images[..2], &amd64), None);
    }

    #[test]
    fn platforms_are_written_with_slashes() {
        let parse = str::parse::<Platform>;
        assert_eq!(parse("linux/arm/v7").unwrap().variant, "v7");
        assert_eq!(parse("linux/amd64").unwrap().architecture, "amd64");
        assert_eq!(parse("linux/arm/v7").unwrap().to_string(), "linux/arm/v7");
        assert!(parse("linux").is_err());
    }

    #[test]
    fn image_without_platform_is_the_last_resort() {
        let images = [image("silent", None), image("right", Some(("linux", "amd64", "")))];
        let amd64 = Platform { os: "linux".into(), architecture: "amd64".into(), variant: String::new() };
        assert_eq!(select(&images, &amd64), Some(&images[1]));
        assert_eq!(select(&images[..1], &amd64), Some(&images[0]));
    }
}
