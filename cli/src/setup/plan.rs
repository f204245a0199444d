//! The change to containerd's config.toml as a pure function of its text, and the way back.
//!
//! Comments, order and everything that isn't ours stay as they are. Which tables are meant depends on two numbers that
//! are not the same: containerd's own version, and the version of the file's format, which a newer containerd still reads.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use toml_edit::{Array, ArrayOfTables, DocumentMut, InlineTable, Item, Table, TableLike, Value, value};

/// From 2.0 on ctr, nerdctl and CRI unpack through this plug-in, which must know each snapshotter by name.
pub const TRANSFER: &str = "io.containerd.transfer.v1.local";
const NEWEST_FORMAT: i64 = 4;

/// The generations of containerd that differ in what Darter needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Generation {
    /// 1.6 and 1.7: no transfer service by default.
    One,
    /// From 2.0 on.
    Two,
}

impl Generation {
    /// Of a version as containerd says it: `1.6.20~ds1`, `v2.4.2`.
    pub fn of(version: &str) -> Result<Self> {
        let major = version.trim_start_matches('v').split('.').next().unwrap_or_default();
        match major.parse::<u32>() {
            Ok(1) => Ok(Generation::One),
            Ok(2..) => Ok(Generation::Two),
            _ => bail!("{version:?} is no version of containerd; it looks like 1.7.24 or 2.1.0"),
        }
    }
}

/// What the file shall say.
#[derive(Debug, Clone)]
pub struct Wanted {
    pub generation: Generation,
    /// What containerd calls Darter.
    pub name: String,
    /// Darter's socket.
    pub address: PathBuf,
    /// Darter's state directory; kubelet measures the file system on which it lies.
    pub root: PathBuf,
    /// Whether kubelet's and crictl's containers use Darter, too.
    pub cri: bool,
}

/// The text with what is wanted; the same text if it says so already.
pub fn apply(text: &str, wanted: &Wanted) -> Result<String> {
    let mut document = parse(text)?;
    let format = format(&mut document, wanted.generation)?;
    let proxy = table(document.as_table_mut(), &["proxy_plugins", &wanted.name])?;
    set(proxy, "type", "snapshot");
    set(proxy, "address", &wanted.address.display().to_string());
    let exports = table(proxy, &["exports"])?;
    set(exports, "root", &wanted.root.display().to_string());
    set(exports, "enable_remote_snapshot_annotations", "true");
    if wanted.cri {
        set(table(document.as_table_mut(), cri(format))?, "snapshotter", &wanted.name);
    }
    if wanted.generation == Generation::Two {
        if format == 1 {
            bail!(
                "the file is of format 1, in which the transfer service can't be set up: have containerd rewrite it \
                 (`containerd config migrate`) and run this again"
            );
        }
        unpack_into(table(document.as_table_mut(), &["plugins", TRANSFER])?, &wanted.name)?;
    }
    Ok(document.to_string())
}

/// The text without what [`apply`] has added; what was there `before` comes back, what others changed since then stays.
pub fn undo(text: &str, before: &str, wanted: &Wanted) -> Result<String> {
    let (mut document, mut old) = (parse(text)?, parse(before)?);
    // Of a copy: an empty file gets no version here.
    let format = format(&mut document.clone(), wanted.generation)?;
    if apply(before, &as_applied(&mut document, format, wanted)).is_ok_and(|applied| applied == text) {
        return Ok(before.to_owned());
    }
    remove(document.as_table_mut(), &["proxy_plugins", &wanted.name]);
    if let Some(parent) = find(document.as_table_mut(), cri(format))
        && text_at(parent, "snapshotter") == Some(&wanted.name)
    {
        let earlier = find(old.as_table_mut(), cri(format)).and_then(|old| old.get("snapshotter").cloned());
        match earlier {
            Some(earlier) => drop(parent.insert("snapshotter", earlier)),
            None => remove(document.as_table_mut(), &[cri(format), &["snapshotter"]].concat()),
        }
    }
    let had_list =
        find(old.as_table_mut(), &["plugins", TRANSFER]).is_some_and(|it| it.contains_key("unpack_config"));
    if let Some(transfer) = find(document.as_table_mut(), &["plugins", TRANSFER]) {
        let others = forget_unpacking(transfer, &wanted.name);
        if !had_list && others.iter().all(|name| name == "overlayfs") {
            remove(document.as_table_mut(), &["plugins", TRANSFER, "unpack_config"]);
        }
    }
    Ok(document.to_string())
}

/// What was wanted when the file became as it is: whoever undoes it need not say it again.
fn as_applied(document: &mut DocumentMut, format: i64, wanted: &Wanted) -> Wanted {
    let name = &wanted.name;
    let has_cri = find(document.as_table_mut(), cri(format))
        .is_some_and(|table| text_at(table, "snapshotter") == Some(name));
    let mut applied = Wanted { cri: has_cri, ..wanted.clone() };
    if let Some(proxy) = find(document.as_table_mut(), &["proxy_plugins", name]) {
        if let Some(address) = text_at(proxy, "address") {
            applied.address = address.into();
        }
        if let Some(root) = find(proxy, &["exports"]).and_then(|exports| text_at(exports, "root")) {
            applied.root = root.into();
        }
    }
    applied
}

fn parse(text: &str) -> Result<DocumentMut> {
    text.parse()
        .context("containerd's configuration is no valid TOML, containerd itself can't read it either")
}

/// The version of the file's format; a file that says nothing is of the first, an empty one gets what fits.
fn format(document: &mut DocumentMut, generation: Generation) -> Result<i64> {
    let suits = match generation {
        Generation::One => 2,
        Generation::Two => 3,
    };
    if document.is_empty() {
        document["version"] = value(suits);
    }
    let format = match document.get("version") {
        None => 1,
        Some(version) => {
            version.as_integer().context("`version` in containerd's configuration is no number")?
        }
    };
    if !(1..=NEWEST_FORMAT).contains(&format) {
        bail!("the file is of format {format}, which this darter doesn't know: update darter");
    }
    Ok(format)
}

fn cri(format: i64) -> &'static [&'static str] {
    match format {
        1 => &["plugins", "cri", "containerd"],
        2 => &["plugins", "io.containerd.grpc.v1.cri", "containerd"],
        _ => &["plugins", "io.containerd.cri.v1.images"],
    }
}

/// The table at `path`, made where it isn't there.
fn table<'a>(root: &'a mut dyn TableLike, path: &[&str]) -> Result<&'a mut dyn TableLike> {
    let mut here = root;
    for (depth, key) in path.iter().enumerate() {
        // Parents get no header of their own: nobody needs to read them.
        let fresh = || {
            let mut table = Table::new();
            table.set_implicit(depth + 1 < path.len());
            Item::Table(table)
        };
        let item = here.entry(key).or_insert_with(fresh);
        here = item.as_table_like_mut().with_context(|| {
            format!("`{}` in containerd's configuration is not a table", path[..=depth].join("."))
        })?;
    }
    Ok(here)
}

fn find<'a>(root: &'a mut dyn TableLike, path: &[&str]) -> Option<&'a mut dyn TableLike> {
    let mut here = root;
    for key in path {
        here = here.get_mut(key)?.as_table_like_mut()?;
    }
    Some(here)
}

/// Takes away what is at `path`, and what is empty then.
fn remove(root: &mut dyn TableLike, path: &[&str]) {
    let [parents @ .., last] = path else { return };
    if let Some(parent) = find(root, parents) {
        parent.remove(last);
        if parent.is_empty() {
            remove(root, parents);
        }
    }
}

fn text_at<'a>(table: &'a dyn TableLike, key: &str) -> Option<&'a str> {
    table.get(key).and_then(Item::as_str)
}

/// Sets a value and leaves its line's comment alone.
fn set(table: &mut dyn TableLike, key: &str, text: &str) {
    if text_at(table, key) == Some(text) {
        return;
    }
    let decor = table.get(key).and_then(Item::as_value).map(|old| old.decor().clone());
    let mut new = Value::from(text);
    if let Some(decor) = decor {
        *new.decor_mut() = decor;
    }
    table.insert(key, Item::Value(new));
}

/// Lists the snapshotter for unpacking. A list replaces containerd's own, which has overlayfs: a new one names both.
fn unpack_into(transfer: &mut dyn TableLike, name: &str) -> Result<()> {
    let item = transfer.entry("unpack_config").or_insert_with(|| Item::ArrayOfTables(ArrayOfTables::new()));
    match item {
        Item::ArrayOfTables(list) => {
            let missing =
                |wanted: &&str| list.iter().all(|table| text_at(table, "snapshotter") != Some(*wanted));
            let names = if list.is_empty() { vec!["overlayfs", name] } else { vec![name] };
            let names: Vec<&str> = names.into_iter().filter(missing).collect();
            for name in names {
                let mut table = Table::new();
                table["platform"] = value("linux");
                table["snapshotter"] = value(name);
                list.push(table);
            }
        }
        Item::Value(Value::Array(list)) => add_inline(list, name),
        _ => bail!("`plugins.\"{TRANSFER}\".unpack_config` in containerd's configuration is not a list"),
    }
    Ok(())
}

fn inline_name(entry: &Value) -> Option<&str> {
    entry.as_inline_table()?.get("snapshotter")?.as_str()
}

fn add_inline(list: &mut Array, name: &str) {
    if list.iter().any(|entry| inline_name(entry) == Some(name)) {
        return;
    }
    let mut entry = InlineTable::new();
    entry.insert("platform", "linux".into());
    entry.insert("snapshotter", name.into());
    list.push(entry);
}

/// Takes the snapshotter off the list, and says who is left on it.
fn forget_unpacking(transfer: &mut dyn TableLike, name: &str) -> Vec<String> {
    match transfer.get_mut("unpack_config") {
        Some(Item::ArrayOfTables(list)) => {
            list.retain(|table| text_at(table, "snapshotter") != Some(name));
            list.iter().filter_map(|table| text_at(table, "snapshotter")).map(str::to_owned).collect()
        }
        Some(Item::Value(Value::Array(list))) => {
            list.retain(|entry| inline_name(entry) != Some(name));
            list.iter().filter_map(inline_name).map(str::to_owned).collect()
        }
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(generation: Generation) -> Wanted {
        Wanted {
            generation,
            name: "darter".into(),
            address: "/run/darter/darter.sock".into(),
            root: "/var/lib/darter".into(),
            cri: true,
        }
    }

    /// Files as they are met: Debian's for 1.6, one of the first format, 2.x with lists of both kinds, inline tables.
    const FILES: [(Generation, &str); 7] = [
        (Generation::One, ""),
        (Generation::Two, ""),
        (
            Generation::One,
            "version = 2\n\n[plugins]\n  [plugins.\"io.containerd.grpc.v1.cri\"]\n    [plugins.\"io.containerd.grpc.v1.cri\".cni]\n      bin_dir = \"/usr/lib/cni\" # Debian's\n",
        ),
        (Generation::One, "[plugins.cri.containerd]\nsnapshotter = \"native\" # mine\n"),
        (
            Generation::Two,
            "version = 3\n[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\nplatform = 'linux'\nsnapshotter = 'overlayfs'\n[plugins.'io.containerd.cri.v1.images']\nsnapshotter = 'overlayfs'\n",
        ),
        (
            Generation::Two,
            "version = 2\nproxy_plugins = { other = { type = \"snapshot\", address = \"/x\" } }\n",
        ),
        (
            Generation::Two,
            "version = 3\n[plugins.\"io.containerd.transfer.v1.local\"]\nunpack_config = [{ platform = \"linux\", snapshotter = \"native\" }]\n",
        ),
    ];

    #[test]
    fn what_was_applied_is_there_once_and_undone_to_the_byte() {
        for (generation, file) in FILES {
            let wanted = wanted(generation);
            let applied = apply(file, &wanted).unwrap();
            assert!(applied.contains("/run/darter/darter.sock"), "{applied}");
            assert_eq!(apply(&applied, &wanted).unwrap(), applied, "a second time changes nothing");
            let forgetful = Wanted { address: "/another.sock".into(), root: "/else".into(), ..wanted };
            assert_eq!(undo(&applied, file, &forgetful).unwrap(), file);
        }
    }

    #[test]
    fn what_others_changed_meanwhile_stays() {
        for (generation, file) in FILES {
            let wanted = wanted(generation);
            let applied = apply(file, &wanted).unwrap();
            let changed = format!("oom_score = 7\n{applied}");
            let undone = undo(&changed, file, &wanted).unwrap();
            let (undone, mut before) = (parse(&undone).unwrap(), parse(file).unwrap());
            assert_eq!(undone["oom_score"].as_integer(), Some(7));
            format(&mut before, generation).unwrap();
            for (key, item) in before.iter() {
                assert_eq!(undone[key].to_string().trim(), item.to_string().trim(), "{file}");
            }
            assert!(!undone.to_string().contains("darter"), "{undone}");
        }
    }

    #[test]
    fn comments_stay_where_they_are() {
        let applied = apply(FILES[2].1, &wanted(Generation::One)).unwrap();
        assert!(applied.contains("bin_dir = \"/usr/lib/cni\" # Debian's"), "{applied}");
        let applied = apply(FILES[3].1, &wanted(Generation::One)).unwrap();
        assert!(applied.contains("snapshotter = \"darter\" # mine"), "{applied}");
    }

    #[test]
    fn overlayfs_stays_on_a_new_list_and_lists_are_for_two_only() {
        let two = apply("", &wanted(Generation::Two)).unwrap();
        assert!(two.contains("snapshotter = \"overlayfs\"") && two.contains("version = 3"), "{two}");
        assert!(!apply("", &wanted(Generation::One)).unwrap().contains("transfer"));
    }

    #[test]
    fn cri_is_left_alone_on_request() {
        let wanted = Wanted { cri: false, ..wanted(Generation::Two) };
        assert!(!apply("", &wanted).unwrap().contains("cri"));
    }

    #[test]
    fn what_cannot_be_set_up_is_refused_with_a_way_on() {
        let two = wanted(Generation::Two);
        for (file, word) in [
            ("version = 9\n", "update darter"),
            ("proxy_plugins = 3\n", "not a table"),
            ("[plugins.cri]\n", "containerd config migrate"),
            ("= nothing", "no valid TOML"),
            ("version = 3\n[plugins.'io.containerd.transfer.v1.local']\nunpack_config = 1\n", "not a list"),
        ] {
            let error = format!("{:#}", apply(file, &two).unwrap_err());
            assert!(error.contains(word), "{file}: {error}");
        }
        assert!(Generation::of("latest").is_err());
        assert_eq!(Generation::of("1.6.20~ds1").unwrap(), Generation::One);
        assert_eq!(Generation::of("v2.4.2").unwrap(), Generation::Two);
    }
}
