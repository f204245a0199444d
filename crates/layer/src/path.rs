//! Paths as Go's `filepath` and containerd's `RootPath` treat them: as text, cleaned without looking at the file system.

/// What the name of a whiteout starts with.
pub(crate) const WHITEOUT: &[u8] = b".wh.";

/// `filepath.Clean`, without a leading slash where the path is rooted: the empty path is the root itself. A path that is
/// not rooted may keep `..` in front, which `confine` is to be asked to drop.
pub(crate) fn clean(path: &[u8], confine: bool) -> Vec<u8> {
    let mut out = Vec::with_capacity(path.len());
    clean_onto(&mut out, path, confine);
    out
}

/// Goes on from a clean path with the components of another.
pub(crate) fn clean_onto(out: &mut Vec<u8>, path: &[u8], confine: bool) {
    for component in path.split(|byte| *byte == b'/') {
        match component {
            b"" | b"." => {}
            b".." if last(out).is_some_and(|last| last != b"..") => {
                let parent = out.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
                out.truncate(parent);
            }
            b".." if confine => {}
            _ => {
                if !out.is_empty() {
                    out.push(b'/');
                }
                out.extend_from_slice(component);
            }
        }
    }
}

fn last(path: &[u8]) -> Option<&[u8]> {
    path.rsplit(|byte| *byte == b'/').next().filter(|last| !last.is_empty())
}

/// Everything before the last slash, and what is behind it.
pub(crate) fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (&[], path),
    }
}

/// Whether cleaning would change nothing, rooted or not.
pub(crate) fn is_clean(path: &[u8]) -> bool {
    path.is_empty() || components(path).all(|component| !matches!(component, b"" | b"." | b".."))
}

pub(crate) fn components(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    path.split(|byte| *byte == b'/')
}

/// Whether containerd leaves an entry of this name alone, because it is the root or because it says what to hide: then
/// it does not look at the entry's type.
pub(crate) fn has_no_type(name: &[u8]) -> bool {
    let name = clean(name, false);
    let base = split(&name).1;
    matches!(base, b"" | b"..") || base.starts_with(WHITEOUT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_cleaned_as_go_does() {
        let cases = [
            ("a/b/../c", "a/c"),
            ("./a//b/", "a/b"),
            ("a/..", ""),
            (".", ""),
            ("/", ""),
            ("../a", "a"),
            ("/../../a", "a"),
            ("a/../../b", "b"),
            ("..", ""),
        ];
        for (path, expected) in cases {
            assert_eq!(clean(path.as_bytes(), true), expected.as_bytes(), "{path}");
        }
        assert_eq!(clean(b"../../a/../b", false), b"../../b");
    }
}
