//! What daemon and holder say to each other: a verb of one byte, then a name.
//!
//! A daemon of any version meets a holder of any other, so nothing here may change its meaning. A verb that the holder
//! doesn't know it refuses.

use std::io;

/// Keep the descriptor that comes along under this name; one of the same name is closed.
pub(super) const KEEP: u8 = b'K';
/// Send all that is kept: [`HERE`] for each, then [`DONE`].
pub(super) const TAKE: u8 = b'T';
/// Close what has this name.
pub(super) const FORGET: u8 = b'F';
/// Close everything and end.
pub(super) const END: u8 = b'E';

pub(super) const HERE: u8 = b'H';
pub(super) const DONE: u8 = b'.';
pub(super) const REFUSED: u8 = b'!';

pub(super) fn compose(verb: u8, name: &str) -> Vec<u8> {
    [&[verb], name.as_bytes()].concat()
}

pub(super) fn parse(bytes: &[u8]) -> io::Result<(u8, &str)> {
    let strange = || io::Error::new(io::ErrorKind::InvalidData, "it says something strange");
    let (verb, name) = bytes.split_first().ok_or_else(strange)?;
    Ok((*verb, std::str::from_utf8(name).map_err(|_| strange())?))
}
