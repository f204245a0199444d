//! Where containerd listens: at the address that is given, at containerd's own, or at that of k3s and RKE2.

use std::path::{Path, PathBuf};

const OWN: &str = "/run/containerd/containerd.sock";
/// RKE2's, too.
pub const K3S: &str = "/run/k3s/containerd/containerd.sock";

#[derive(Debug, Clone, clap::Args)]
pub struct Socket {
    /// containerd's socket; default: /run/containerd/containerd.sock, or that of k3s and RKE2 where only theirs is there
    #[arg(long, value_name = "SOCKET")]
    containerd_address: Option<PathBuf>,
}

impl Socket {
    pub fn path(&self) -> PathBuf {
        choose(self.containerd_address.as_deref(), |path| path.exists())
    }

    /// Whether nobody has named it, and only that of k3s and RKE2 is there.
    pub fn is_k3s_by_default(&self) -> bool {
        self.containerd_address.is_none() && self.path() == Path::new(K3S)
    }
}

fn choose(given: Option<&Path>, is_there: impl Fn(&Path) -> bool) -> PathBuf {
    let (own, k3s) = (Path::new(OWN), Path::new(K3S));
    let default = if !is_there(own) && is_there(k3s) { k3s } else { own };
    given.unwrap_or(default).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(given: Option<&str>, there: &[&str]) -> String {
        let path = choose(given.map(Path::new), |path| there.iter().any(|one| path == Path::new(one)));
        path.to_str().unwrap().to_owned()
    }

    #[test]
    fn k3s_socket_is_taken_where_it_is_the_only_one_and_none_is_named() {
        assert_eq!(chosen(None, &[K3S]), K3S);
        assert_eq!(chosen(None, &[OWN, K3S]), OWN);
        assert_eq!(chosen(None, &[OWN]), OWN);
        assert_eq!(chosen(None, &[]), OWN);
        assert_eq!(chosen(Some("/x.sock"), &[K3S]), "/x.sock");
        assert_eq!(chosen(Some(OWN), &[K3S]), OWN);
    }
}
