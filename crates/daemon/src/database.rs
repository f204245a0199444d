//! What an SQLite file of ours says of itself in its header, and what SQLite's words tell of it. SQLite is not known here.
//!
//! Two things must not happen over a flipped bit: that a file is taken for a later program's, and refused for ever; and that it keeps a
//! program from starting in any other way. So the version stands in the header twice, and says nothing where the two don't agree.
//! Builds that wrote it once left the second place 0; their files are good, and they don't mind the second number in ours.

/// "DRT"; the version is in the byte behind it.
const MARK: u32 = 0x4452_5400;
const VERSION_MAX: u32 = 0xff;

/// What SQLite says of a file whose tables are not those of its version, or whose header can't be.
const DAMAGED: [&str; 4] = ["no such", "already exists", "duplicate column", "unsupported file format"];

/// What a header says to a program that knows some versions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// One of those; 0 for a new file.
    Known(u32),
    /// One that came later.
    Later(u32),
    Damaged,
}

/// The `application_id` of a file whose `user_version` is this, which is at most 255.
pub fn mark(version: u32) -> i32 {
    assert!(version <= VERSION_MAX, "there are few versions");
    i32::try_from(MARK | version).expect("its first bit is not set")
}

/// What the two numbers of a header say to a program that knows all versions up to `known`.
pub fn version(user_version: i64, application_id: i64, known: u32) -> Version {
    let found = match u32::try_from(user_version) {
        Ok(found) if found <= VERSION_MAX => found,
        _ => return Version::Damaged,
    };
    if found > 0 && application_id == i64::from(mark(found)) {
        return if found <= known { Version::Known(found) } else { Version::Later(found) };
    }
    // A mark that is none of ours says nothing: it is an earlier build's 0, or is damaged itself.
    let says_nothing = application_id >> 8 != i64::from(MARK >> 8);
    let is_new = found == 0 && application_id == 0;
    match says_nothing && (is_new || (1..=known).contains(&found)) {
        true => Version::Known(found),
        false => Version::Damaged,
    }
}

/// Whether an error of SQLite, with these words and when a file is opened, means that the file itself is at fault.
pub fn tells_damage(words: &str) -> bool {
    DAMAGED.iter().any(|known| words.contains(known))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KNOWN: u32 = 7;

    #[test]
    fn a_file_is_of_its_version_whichever_build_wrote_it() {
        assert_eq!(version(0, 0, KNOWN), Version::Known(0));
        for found in 1..=KNOWN {
            assert_eq!(version(found.into(), 0, KNOWN), Version::Known(found));
            assert_eq!(version(found.into(), mark(found).into(), KNOWN), Version::Known(found));
        }
        assert_eq!(version(8, mark(8).into(), KNOWN), Version::Later(8));
    }

    #[test]
    fn a_flipped_bit_is_never_a_later_version() {
        for bit in 0..32 {
            let user_version = i64::from((KNOWN ^ (1 << bit)).cast_signed());
            let marked = version(user_version, mark(KNOWN).into(), KNOWN);
            assert_eq!(marked, Version::Damaged, "bit {bit} of the version");
            let unmarked = version(user_version, 0, KNOWN);
            assert!(!matches!(unmarked, Version::Later(_)), "bit {bit} of an earlier build's version");
            let application_id = i64::from(mark(KNOWN) ^ (1 << bit));
            let kept = if bit < 8 { Version::Damaged } else { Version::Known(KNOWN) };
            assert_eq!(version(KNOWN.into(), application_id, KNOWN), kept, "bit {bit} of the mark");
        }
    }
}
