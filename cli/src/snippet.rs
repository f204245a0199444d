//! What `darter standalone` prints: the lines for containerd's configuration, and what to type next.

use std::net::SocketAddr;
use std::path::Path;

use crate::setup;
use crate::setup::plan::{self, Generation, Wanted};

pub async fn print(containerd: &Path, address: &Path, root: &Path, rest: SocketAddr) {
    let version = setup::version_of(containerd).await;
    match &version {
        Some(version) => println!("Darter is ready for containerd {version} at {}.\n", containerd.display()),
        None => {
            println!("Darter is ready. No containerd answers at {} yet; for 2.x:\n", containerd.display())
        }
    }
    let wanted = Wanted {
        generation: version.as_deref().and_then(|it| Generation::of(it).ok()).unwrap_or(Generation::Two),
        name: "darter".to_owned(),
        address: address.to_owned(),
        root: root.to_owned(),
        cri: false,
    };
    let lines = plan::apply("", &wanted).expect("an empty file takes everything");
    println!(
        "Add to containerd's config.toml (`darter setup containerd` does it), and restart containerd:\n\n{lines}"
    );
    println!("Then:\n\n{}", next(containerd, root, rest));
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
