//! Extended attributes while a layer is unpacked. A map has each set once, however many entries name it, so inodes share
//! what is made of a set; a set of its own has only an inode whose attributes are set a second time.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::apply::show;
use super::attributes::{self, CAPABILITY, Verdict};
use super::budget::Budget;
use super::entry::Unpacking;
use super::upper::Upper;
use super::{FileKind, XattrSet};

type Pairs<'a> = BTreeMap<&'a [u8], &'a [u8]>;

/// Gives an inode the attributes of its entry, besides those that it has.
pub(super) fn set(upper: &mut Upper, inode: u32, unpacking: &Unpacking) -> Result<(), String> {
    let kind = upper.inode(inode).kind;
    let plain = matches!(kind, FileKind::File | FileKind::Directory);
    let given = match unpacking.row.xattrs {
        Some(set) => given(upper, unpacking, set, plain)?,
        None => None,
    };
    let old = upper.inode_mut(inode).xattrs.take();
    // A change of owner takes a file's capabilities away.
    let stays = |name: &[u8]| kind == FileKind::Directory || name != CAPABILITY;
    upper.inode_mut(inode).xattrs = joined(&upper.budget, old, given, stays)?;
    Ok(())
}

/// What containerd and the kernel would keep of a set of the map.
fn given(
    upper: &mut Upper,
    unpacking: &Unpacking,
    set: u32,
    plain: bool,
) -> Result<Option<Arc<XattrSet>>, String> {
    if let Some(known) = upper.xattrs.get(&(set, plain)) {
        return Ok(known.clone());
    }
    let mut pairs = Pairs::new();
    for (key, value) in unpacking.map.xattr_set(set) {
        match attributes::judge(key, value, plain) {
            Verdict::Set => drop(pairs.insert(key, value)),
            Verdict::Ignore => {}
            Verdict::Refuse(why) => {
                let (name, key) = (show(unpacking.name), show(key));
                return Err(format!("failed to setxattr {name:?} for key {key:?}: {why}"));
            }
        }
    }
    let made = share(&upper.budget, &pairs)?;
    upper.xattrs.insert((set, plain), made.clone());
    Ok(made)
}

/// What is given goes before what was there.
fn joined(
    budget: &Budget,
    old: Option<Arc<XattrSet>>,
    given: Option<Arc<XattrSet>>,
    stays: impl Fn(&[u8]) -> bool,
) -> Result<Option<Arc<XattrSet>>, &'static str> {
    let Some(old) = old else { return Ok(given) };
    if given.as_ref().is_some_and(|given| Arc::ptr_eq(given, &old)) {
        return Ok(given);
    }
    if given.is_none() && old.iter().all(|(name, _)| stays(name)) {
        return Ok(Some(old));
    }
    let old = old.iter().filter(|(name, _)| stays(name));
    let pairs: Pairs =
        old.chain(given.iter().flat_map(|set| set.iter())).map(|(name, value)| (&**name, &**value)).collect();
    share(budget, &pairs)
}

/// `None` for no attributes.
fn share(budget: &Budget, pairs: &Pairs) -> Result<Option<Arc<XattrSet>>, &'static str> {
    // Also an empty set takes a place among those that are known.
    budget.xattr(&[], &[])?;
    let mut set = XattrSet::with_capacity(pairs.len());
    for (name, value) in pairs {
        budget.xattr(name, value)?;
        set.push(((*name).into(), (*value).into()));
    }
    Ok((!set.is_empty()).then(|| Arc::new(set)))
}
