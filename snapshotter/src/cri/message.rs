//! The few fields of CRI's messages (`runtime.v1`, api.proto) that are looked at. What is passed on is never written
//! from these, so fields that this program doesn't know are kept.

use std::fmt;

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct PullImageRequest {
    #[prost(message, optional, tag = "1")]
    pub image: Option<ImageSpec>,
    #[prost(message, optional, tag = "2")]
    pub auth: Option<Auth>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct ImageSpec {
    #[prost(string, tag = "1")]
    pub image: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct PullImageResponse {
    /// containerd answers with the digest of the image's configuration.
    #[prost(string, tag = "1")]
    pub image_ref: String,
}

/// `AuthConfig`. Its `Debug` text says nothing.
#[derive(Clone, PartialEq, prost::Message)]
#[prost(skip_debug)]
pub struct Auth {
    #[prost(string, tag = "1")]
    pub username: String,
    #[prost(string, tag = "2")]
    pub password: String,
    /// Base64 of `user:password`, instead of the two.
    #[prost(string, tag = "3")]
    pub auth: String,
    /// The host that alone is to be shown it, as a URL; empty: whoever the image is read from.
    #[prost(string, tag = "4")]
    pub server_address: String,
    #[prost(string, tag = "5")]
    pub identity_token: String,
    #[prost(string, tag = "6")]
    pub registry_token: String,
}

impl fmt::Debug for Auth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Auth(…)")
    }
}
