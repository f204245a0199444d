//! k3s and RKE2 write containerd's configuration themselves, from a template that may extend their own. They differ in the
//! names of their folders and units.
//!
//! A template is no TOML until k3s fills it in, so ours is a block of lines between two marks behind their base. Which
//! snapshotter CRI uses is not for the template: k3s writes that table, and takes the name from its own configuration.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

use super::plan::{self, Generation, TRANSFER, Wanted};
use crate::socket::K3S;

const BASE: &str = "{{ template \"base\" . }}\n";
const BEGIN: &str = "# darter: begin (darter setup containerd --k3s --undo takes it away)\n";
const END: &str = "# darter: end\n";
const TEMPLATE: &str = "config.toml.tmpl";
const TEMPLATE_V3: &str = "config-v3.toml.tmpl";

/// Below it each has the folder of its name.
pub const STATE: &str = "/var/lib/rancher";

/// Which of the two is on this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Distribution {
    K3s,
    Rke2,
}

impl Distribution {
    /// The one whose folder is in `state`; k3s where that can't tell.
    pub fn found(state: &Path) -> Self {
        let has = |one: Self| state.join(one.name()).exists();
        if has(Self::Rke2) && !has(Self::K3s) { Self::Rke2 } else { Self::K3s }
    }

    fn name(self) -> &'static str {
        match self {
            Self::K3s => "k3s",
            Self::Rke2 => "rke2",
        }
    }

    fn units(self) -> &'static str {
        if self == Self::K3s { "k3s or k3s-agent" } else { "rke2-server or rke2-agent" }
    }

    /// Where containerd's files are made.
    fn folder(self, state: &Path) -> PathBuf {
        state.join(self.name()).join("agent/etc/containerd")
    }

    /// The template that it takes, by containerd's generation. For containerd 2 it takes the older name where the newer one is
    /// not there: a new file of that name would put an administrator's template out of use.
    pub fn template(self, state: &Path, generation: Generation) -> PathBuf {
        let [old, new] = [TEMPLATE, TEMPLATE_V3].map(|name| self.folder(state).join(name));
        let takes_old = generation == Generation::One || (!new.exists() && old.exists());
        if takes_old { old } else { new }
    }

    /// What is to be done when the template names Darter, or when it no longer does.
    pub fn next_steps(self, snapshotter: &str, applied: bool) -> String {
        let (name, units) = (self.name(), self.units());
        if !applied {
            return format!(
                "Next: take `snapshotter: {snapshotter}` out of /etc/rancher/{name}/config.yaml, then restart {units}."
            );
        }
        format!(
            "Next: have {name} use it with the line `snapshotter: {snapshotter}` in /etc/rancher/{name}/config.yaml, set\n\
             containerd_address = \"{K3S}\" and\n\
             hosts_dir = \"{}\" in /etc/darter/snapshotter.toml, then restart darter-snapshotter, and {units}.",
            self.folder(Path::new(STATE)).join("certs.d").display()
        )
    }
}

/// The template with Darter's lines.
pub fn apply(text: &str, wanted: &Wanted) -> Result<String> {
    let rest = undo(text, "");
    if let Some(table) = twice(&rest, wanted) {
        bail!(
            "the template has `{table}` outside of Darter's lines, and containerd reads no file that defines it twice: take it out and \
             run this again, or add to it by hand what `darter setup containerd --no-cri --config /tmp/new.toml` shows"
        );
    }
    let base = if rest.is_empty() { BASE } else { &rest };
    let newline = if base.ends_with('\n') { "" } else { "\n" };
    Ok(format!("{base}{newline}{BEGIN}{}{END}", lines(wanted)?))
}

/// The template without them. It is empty when there was none `before` (which is empty then), and nobody else wrote any.
pub fn undo(text: &str, before: &str) -> String {
    let Some((start, rest)) = text.split_once(BEGIN) else { return text.to_owned() };
    let after = rest.split_once(END).map_or("", |(_, after)| after);
    let left = format!("{start}{after}");
    if left == BASE && before.is_empty() { String::new() } else { left }
}

/// A table of Darter's lines that these lines define, too.
fn twice(rest: &str, wanted: &Wanted) -> Option<String> {
    let mut ours = vec![format!("proxy_plugins.{}", wanted.name)];
    if wanted.generation == Generation::Two {
        ours.push(format!("plugins.{TRANSFER}"));
    }
    let lies_in = |path: &str, table: &str| {
        path.strip_prefix(table).is_some_and(|below| below.is_empty() || below.starts_with('.'))
    };
    let mut table = String::new();
    for line in rest.lines() {
        // The template's own braces keep it from being parsed: keys are compared without quotes and blanks.
        let bare = line.replace(['"', '\'', ' ', '\t'], "");
        let clash = if bare.starts_with('[') {
            table = bare.trim_start_matches('[').split(']').next().unwrap_or_default().to_owned();
            ours.iter().find(|ours| lies_in(&table, ours))
        } else {
            let key = format!("{table}.{}", bare.split('=').next().unwrap_or_default());
            let key = key.trim_start_matches('.');
            // What is defined in one line takes no tables behind it.
            ours.iter().find(|ours| lies_in(key, ours) || lies_in(ours, key))
        };
        if clash.is_some() {
            return clash.cloned();
        }
    }
    None
}

fn lines(wanted: &Wanted) -> Result<String> {
    let alone = plan::apply("", &Wanted { cri: false, ..wanted.clone() })?;
    // The base has said the version.
    Ok(alone.lines().filter(|line| !line.starts_with("version")).map(|line| format!("{line}\n")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted() -> Wanted {
        Wanted {
            generation: Generation::Two,
            name: "darter".into(),
            address: "/run/darter/darter.sock".into(),
            root: "/var/lib/darter".into(),
            cri: true,
        }
    }

    #[test]
    fn rke2_is_told_from_k3s_by_its_folder_and_named_in_all_that_follows() {
        let state = tempfile::tempdir().unwrap();
        assert_eq!(Distribution::found(state.path()), Distribution::K3s);
        std::fs::create_dir(state.path().join("rke2")).unwrap();
        let found = Distribution::found(state.path());
        assert_eq!(found, Distribution::Rke2);
        let template = found.template(Path::new(STATE), Generation::Two);
        assert_eq!(template, Path::new("/var/lib/rancher/rke2/agent/etc/containerd/config-v3.toml.tmpl"));
        let next = found.next_steps("darter", true);
        assert!(next.contains("/etc/rancher/rke2/config.yaml") && next.contains("rke2-agent"), "{next}");
        assert!(next.contains("/var/lib/rancher/rke2/agent/etc/containerd/certs.d"), "{next}");
        std::fs::create_dir(state.path().join("k3s")).unwrap();
        assert_eq!(Distribution::found(state.path()), Distribution::K3s);
    }

    #[test]
    fn lines_follow_the_base_and_go_again() {
        for before in ["", "{{ template \"base\" . }}\n\n[debug]\n  level = \"warn\""] {
            let applied = apply(before, &wanted()).unwrap();
            assert!(applied.starts_with("{{ template \"base\" . }}\n"), "{applied}");
            assert_eq!(apply(&applied, &wanted()).unwrap(), applied);
            assert_eq!(undo(&applied, before).trim_end(), before);
        }
        assert_eq!(undo(&apply(BASE, &wanted()).unwrap(), BASE), BASE, "it was there before");
    }

    #[test]
    fn a_template_of_the_older_name_is_not_put_out_of_use() {
        let state = tempfile::tempdir().unwrap();
        let folder = state.path().join("k3s/agent/etc/containerd");
        std::fs::create_dir_all(&folder).unwrap();
        let takes = |generation| Distribution::K3s.template(state.path(), generation);
        assert_eq!(takes(Generation::One), folder.join("config.toml.tmpl"));
        assert_eq!(takes(Generation::Two), folder.join("config-v3.toml.tmpl"));
        std::fs::write(folder.join("config.toml.tmpl"), "mine").unwrap();
        assert_eq!(takes(Generation::Two), folder.join("config.toml.tmpl"));
        std::fs::write(folder.join("config-v3.toml.tmpl"), "mine").unwrap();
        assert_eq!(takes(Generation::Two), folder.join("config-v3.toml.tmpl"));
        assert_eq!(takes(Generation::One), folder.join("config.toml.tmpl"));
    }

    #[test]
    fn what_the_template_defines_itself_is_not_defined_twice() {
        for (own, table) in [
            ("[proxy_plugins.darter]\n  type = \"snapshot\"", "proxy_plugins.darter"),
            ("[proxy_plugins . \"darter\" . exports]", "proxy_plugins.darter"),
            ("[proxy_plugins]\n  darter = { type = \"snapshot\" }", "proxy_plugins.darter"),
            ("proxy_plugins = { other = { type = \"snapshot\" } }", "proxy_plugins.darter"),
            ("{{ if .X }}\n[plugins.'io.containerd.transfer.v1.local']\n{{ end }}", "transfer.v1.local"),
            ("[[plugins.\"io.containerd.transfer.v1.local\".unpack_config]]", "transfer.v1.local"),
            ("[plugins]\n\"io.containerd.transfer.v1.local\".unpack_config = []", "transfer.v1.local"),
        ] {
            let refused = apply(&format!("{BASE}{own}\n"), &wanted()).unwrap_err().to_string();
            assert!(refused.contains(table) && refused.contains("take it out"), "{own}: {refused}");
        }
        for others in [
            "# [proxy_plugins.darter]",
            "[proxy_plugins]\n[proxy_plugins.darter2]\n  type = \"snapshot\"",
            "[plugins]\n[plugins.'io.containerd.cri.v1.images']\n  snapshotter = \"darter\"",
        ] {
            let applied = apply(&format!("{BASE}{others}\n"), &wanted()).unwrap();
            applied.replace(BASE, "version = 3\n").parse::<toml_edit::DocumentMut>().unwrap();
        }
        let one = Wanted { generation: Generation::One, ..wanted() };
        apply("[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]", &one).unwrap();
    }

    #[test]
    fn behind_a_base_that_sets_cri_up_it_is_valid_toml() {
        // Of both formats: k3s gives containerd 2 the older one where the template has the older name.
        for base in [
            "version = 3\nroot = \"/x\"\n[plugins.'io.containerd.cri.v1.images']\n  snapshotter = \"darter\"\n",
            "version = 2\nroot = \"/x\"\n[plugins.\"io.containerd.grpc.v1.cri\".containerd]\n  snapshotter = \"darter\"\n",
        ] {
            let rendered = apply("", &wanted()).unwrap().replace(BASE, base);
            let document: toml_edit::DocumentMut = rendered.parse().unwrap();
            assert_eq!(
                document["proxy_plugins"]["darter"]["exports"]["root"].as_str(),
                Some("/var/lib/darter")
            );
            let unpacked = document["plugins"][TRANSFER]["unpack_config"].as_array_of_tables().unwrap();
            assert_eq!(unpacked.len(), 2, "overlayfs and darter");
        }
    }
}
