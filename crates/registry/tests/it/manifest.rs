//! From an image's name to its configuration.

use darter_registry::{Descriptor, ImageRef, Platform, Reference, RegistryError, manifest};
use darter_types::{DiffId, Digest};

use crate::server::{Reply, Request, Server};
use crate::{client, repository};

struct Content {
    config: String,
    image: String,
    index: String,
}

fn content() -> Content {
    let diff_id = DiffId(Digest::of(b"tar"));
    let config = format!(r#"{{"os":"linux","architecture":"amd64","rootfs":{{"diff_ids":["{diff_id}"]}}}}"#);
    let image = format!(
        r#"{{"schemaVersion":2,"mediaType":"{}","config":{{"digest":"{}","size":{}}},
        "layers":[{{"mediaType":"l","digest":"{}","size":3}}]}}"#,
        manifest::DOCKER_MANIFEST,
        Digest::of(config.as_bytes()),
        config.len(),
        Digest::of(b"gz"),
    );
    let entry = |architecture: &str, digest: Digest| {
        format!(
            r#"{{"digest":"{digest}","size":1,"platform":{{"os":"linux","architecture":"{architecture}"}}}}"#
        )
    };
    let index = format!(
        r#"{{"schemaVersion":2,"manifests":[{},{}]}}"#,
        entry("arm64", Digest::of(b"elsewhere")),
        entry("amd64", Digest::of(image.as_bytes()))
    );
    Content { config, image, index }
}

async fn registry() -> Server {
    let content = content();
    Server::start(move |request: &Request| {
        let name = request.path.rsplit('/').next().unwrap();
        let is = |text: &str| name == Digest::of(text.as_bytes()).to_string();
        if name == "v1" || is(&content.index) {
            Reply::new(200, content.index.clone()).with("content-type", manifest::OCI_INDEX)
        } else if is(&content.image) {
            Reply::new(200, content.image.clone()).with("content-type", "application/json")
        } else if is(&content.config) {
            Reply::new(200, content.config.clone())
        } else if name == "lie" {
            Reply::new(200, "{}").with("docker-content-digest", Digest::of(b"x").to_string())
        } else {
            Reply::new(404, r#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"unknown"}]}"#)
        }
    })
    .await
}

fn amd64() -> Platform {
    Platform { os: "linux".into(), architecture: "amd64".into(), variant: String::new() }
}

#[tokio::test]
async fn index_leads_to_the_platforms_image() {
    let server = registry().await;
    let image: ImageRef = format!("{}/team/app:v1", server.authority).parse().unwrap();
    let resolved = client().resolve(&image, false, None).await.unwrap();
    assert_eq!(resolved.repository, repository(&server));
    assert_eq!(resolved.manifest.media_type, manifest::OCI_INDEX);
    let found = client().image(&resolved.repository, resolved.manifest, &amd64(), None).await.unwrap();
    assert_eq!(found.indexes.len(), 1);
    assert_eq!(found.manifest.media_type, manifest::DOCKER_MANIFEST);
    assert_eq!(found.document.layers, [Descriptor::new("l", Digest::of(b"gz"), 3)]);
    assert_eq!(found.config.diff_ids, [DiffId(Digest::of(b"tar"))]);
    assert_eq!(found.config_bytes, content().config);
}

#[tokio::test]
async fn missing_platform_is_said() {
    let server = registry().await;
    let index = Reference::Tag("v1".to_owned());
    let index = client().manifest(&repository(&server), &index, None).await.unwrap();
    let sparc = Platform { architecture: "sparc".into(), ..amd64() };
    let error = client().image(&repository(&server), index, &sparc, None).await.unwrap_err();
    assert_eq!(error.to_string(), "no match for platform in manifest: not found");
}

#[tokio::test]
async fn missing_image_is_said_in_containerds_words() {
    let server = registry().await;
    let name = format!("{}/team/app:none", server.authority);
    let image: ImageRef = name.parse().unwrap();
    let error = client().resolve(&image, false, None).await.unwrap_err();
    assert_eq!(error.to_string(), format!("failed to resolve reference \"{name}\": {name}: not found"));
    assert!(matches!(error.root(), RegistryError::NotFound { .. }));
}

#[tokio::test]
async fn manifest_that_is_not_what_it_is_called_is_refused() {
    let server = registry().await;
    let lie = Reference::Tag("lie".to_owned());
    let error = client().manifest(&repository(&server), &lie, None).await.unwrap_err();
    assert!(matches!(error, RegistryError::Digest { .. }), "{error:?}");
    let other = Server::start(|_: &Request| Reply::new(200, "{}")).await;
    let digest = Reference::Digest(Digest::of(b"x"));
    let error = client().manifest(&repository(&other), &digest, None).await.unwrap_err();
    assert!(matches!(error, RegistryError::Digest { .. }), "{error:?}");
}

#[tokio::test]
async fn huge_manifest_is_refused() {
    let server = Server::start(|_: &Request| Reply::new(200, vec![b' '; 9 << 20])).await;
    let tag = Reference::Tag("t".to_owned());
    let error = client().manifest(&repository(&server), &tag, None).await.unwrap_err();
    assert!(matches!(error, RegistryError::TooLarge { .. }), "{error:?}");
}
