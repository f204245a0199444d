//! What `darter standalone` prints: the lines for containerd's configuration, and what to type next.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use containerd_client::services::v1::version_client::VersionClient;

const ANSWER_MAX: Duration = Duration::from_secs(2);

/// The generations of containerd's configuration that differ in what Darter needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Generation {
    /// 1.6 and 1.7: configuration version 2, no transfer service by default.
    One,
    /// From 2.0 on.
    Two,
}

pub async fn print(containerd: &Path, address: &Path, root: &Path, rest: SocketAddr) {
    let version = version(containerd).await;
    let generation = match &version {
        Some(version) if version.trim_start_matches('v').starts_with("1.") => Generation::One,
        _ => Generation::Two,
    };
    match &version {
        Some(version) => println!("Darter is ready for containerd {version} at {}.\n", containerd.display()),
        None => {
            println!("Darter is ready. No containerd answers at {} yet; for 2.x:\n", containerd.display())
        }
    }
    println!(
        "Add to containerd's config.toml, and restart containerd:\n\n{}",
        lines(generation, address, root)
    );
    println!("Then:\n\n{}", next(containerd, root, rest));
}

async fn version(containerd: &Path) -> Option<String> {
    let ask = async {
        let channel = containerd_client::connect(containerd).await.ok()?;
        let answer = VersionClient::new(channel).version(()).await.ok()?;
        Some(answer.into_inner().version)
    };
    tokio::time::timeout(ANSWER_MAX, ask).await.ok().flatten()
}

fn lines(generation: Generation, address: &Path, root: &Path) -> String {
    let proxy = format!(
        "[proxy_plugins.darter]\n  type = \"snapshot\"\n  address = \"{}\"\n  [proxy_plugins.darter.exports]\n    root = \"{}\"\n    \
         enable_remote_snapshot_annotations = \"true\"\n",
        address.display(),
        root.display()
    );
    let version = match generation {
        Generation::One => "version = 2\n",
        Generation::Two => "version = 3\n",
    };
    // From 2.0 on ctr, nerdctl and CRI unpack through the transfer service, which must know each snapshotter by name.
    let transfer = ["overlayfs", "darter"].map(|snapshotter| {
        format!(
            "[[plugins.\"io.containerd.transfer.v1.local\".unpack_config]]\n  platform = \"linux\"\n  snapshotter = \"{snapshotter}\"\n"
        )
    });
    match generation {
        Generation::One => format!("{version}{proxy}"),
        Generation::Two => format!("{version}{proxy}{}", transfer.concat()),
    }
}

fn next(containerd: &Path, root: &Path, rest: SocketAddr) -> String {
    let socket = if containerd == Path::new("/run/containerd/containerd.sock") {
        String::new()
    } else {
        format!(" --containerd-address {}", containerd.display())
    };
    let state = if root == Path::new("/var/lib/darter") {
        String::new()
    } else {
        format!(" --root {}", root.display())
    };
    let manager = if rest.port() == 7480 { String::new() } else { format!(" --manager http://{rest}") };
    format!(
        "  darter pull{socket} IMAGE\n  ctr run --snapshotter darter --rm IMAGE NAME\n  darter status{state}\n  darter why{state} IMAGE\n  \
         darter preheat{manager} --token-file {}/manager/api-token --wait IMAGE\n",
        root.display()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transfer_service_is_named_for_two_and_not_for_one() {
        let (address, root) = (Path::new("/run/d.sock"), Path::new("/var/lib/d"));
        assert!(!lines(Generation::One, address, root).contains("transfer"));
        let two = lines(Generation::Two, address, root);
        assert!(two.contains("snapshotter = \"overlayfs\"") && two.contains("snapshotter = \"darter\""));
    }
}
