//! The client against Debian's `docker-registry` with a password, where that is installed.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use bytes::Bytes;
use darter_registry::{Credential, ImageRef, Platform, Reference, RegistryError, manifest};
use darter_types::{DiffId, Digest};

use crate::{client, user};

const BINARY: &str = "/usr/bin/docker-registry";
/// bcrypt of `hunter2`, as htpasswd wants it.
const HTPASSWD: &str = "me:$2y$05$qM1a3Zz6/8PIP5v.muPFrONxo.TD3T94R78WEoVYaA3XB7spExfUK\n";

struct Registry {
    process: Child,
    authority: String,
}

impl Drop for Registry {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

async fn start(dir: &Path) -> Registry {
    let authority = format!("127.0.0.1:{}", free_port());
    std::fs::write(dir.join("htpasswd"), HTPASSWD).unwrap();
    let config = format!(
        "version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: {}/data\nhttp:\n  addr: {authority}\n\
         auth:\n  htpasswd:\n    realm: test\n    path: {}/htpasswd\n",
        dir.display(),
        dir.display()
    );
    std::fs::write(dir.join("config.yml"), config).unwrap();
    let process = Command::new(BINARY)
        .arg("serve")
        .arg(dir.join("config.yml"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let registry = Registry { process, authority };
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while tokio::net::TcpStream::connect(&registry.authority).await.is_err() {
        assert!(std::time::Instant::now() < deadline, "the registry did not start");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    registry
}

#[tokio::test]
async fn image_is_pushed_and_pulled_with_a_password() {
    if !Path::new(BINARY).exists() {
        eprintln!("skipped: {BINARY} is not installed");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let registry = start(dir.path()).await;
    let image: ImageRef = format!("{}/team/app:v1", registry.authority).parse().unwrap();
    let (client, user) = (client(), user());
    let repository = client.repository(&image, false).unwrap();
    let layer: Vec<u8> = (0..3_000_000u32).map(|n| (n ^ (n >> 9)) as u8).collect();
    let layer = Bytes::from(layer);
    let layer_digest = client.push_blob(&repository, layer.clone(), Some(&user)).await.unwrap();
    let diff_id = DiffId(Digest::of(b"tar"));
    let config = format!(
        r#"{{"os":"linux","architecture":"amd64","rootfs":{{"type":"layers","diff_ids":["{diff_id}"]}}}}"#
    );
    let config_digest = client.push_blob(&repository, config.clone().into(), Some(&user)).await.unwrap();
    let text = format!(
        r#"{{"schemaVersion":2,"mediaType":"{}","config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{config_digest}","size":{}}},"layers":[{{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","digest":"{layer_digest}","size":{}}}]}}"#,
        manifest::OCI_MANIFEST,
        config.len(),
        layer.len()
    );
    let tag = Reference::Tag("v1".to_owned());
    let pushed = client
        .push_manifest(&repository, &tag, manifest::OCI_MANIFEST, text.into(), Some(&user))
        .await
        .unwrap();

    let resolved = client.resolve(&image, false, Some(&user)).await.unwrap();
    assert_eq!(resolved.manifest.digest, pushed);
    let platform = Platform::host();
    let found = client.image(&repository, resolved.manifest, &platform, Some(&user)).await.unwrap();
    assert_eq!(found.config.diff_ids, [diff_id]);
    let size = client.head_blob(&repository, layer_digest, Some(&user)).await.unwrap();
    assert_eq!(size, Some(layer.len() as u64));
    let blob = client.blob(&repository, layer_digest, Some(&user), 1_234_567).await.unwrap();
    assert_eq!(blob.collect(u64::MAX).await.unwrap(), layer.slice(1_234_567..));

    let wrong = Credential::from_user("me:wrong").unwrap();
    for credential in [None, Some(&wrong)] {
        let error = client.resolve(&image, false, credential).await.unwrap_err();
        assert!(matches!(error.root(), RegistryError::Unauthorized { .. }), "{error:?}");
    }
    let none = format!("{}/team/app:none", registry.authority).parse().unwrap();
    let error = client.resolve(&none, false, Some(&user)).await.unwrap_err();
    assert!(matches!(error.root(), RegistryError::NotFound { .. }), "{error:?}");
}
