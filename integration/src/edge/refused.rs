//! What containerd refuses to unpack.

use anyhow::Result;

use super::gzip;
use crate::image::{Blobs, Layer, Packing};
use crate::tar::{Data, Entry, Writer, checksum};

pub(super) fn link_to_a_lower_layer(blobs: &Blobs) -> Result<Vec<Layer>> {
    gzip(blobs, &[&[Entry::file("low", "x")], &[Entry::hard_link("high", "low")]])
}

pub(super) fn link_to_nothing(blobs: &Blobs) -> Result<Vec<Layer>> {
    gzip(blobs, &[&[Entry::hard_link("high", "nothing")]])
}

pub(super) fn late_whiteout(blobs: &Blobs) -> Result<Vec<Layer>> {
    gzip(blobs, &[&[Entry::file("f", "x")], &[Entry::file("f", "y"), Entry::whiteout("f")]])
}

pub(super) fn entry_below_a_file(blobs: &Blobs) -> Result<Vec<Layer>> {
    gzip(blobs, &[&[Entry::file("f", "x"), Entry::file("f/below", "y")]])
}

pub(super) fn name_of_256_bytes(blobs: &Blobs) -> Result<Vec<Layer>> {
    gzip(blobs, &[&[Entry::file("n".repeat(256), "x")]])
}

pub(super) fn whiteout_of_the_directory(blobs: &Blobs) -> Result<Vec<Layer>> {
    gzip(blobs, &[&[Entry::dir("d")], &[Entry::file("d/.wh...", "")]])
}

/// One segment of data in a header of GNU's own sparse type.
pub(super) fn old_gnu_sparse(blobs: &Blobs) -> Result<Vec<Layer>> {
    let layer = blobs.layer_with(Packing::Gzip, |out| {
        let mut bytes = Vec::new();
        Writer::new(&mut bytes).entry(&Entry::new(b'S', "sparse").data(Data::Bytes(vec![b'A'; 512])))?;
        let mut block: [u8; 512] = bytes[..512].try_into().expect("a header is one block");
        block[257..265].copy_from_slice(b"ustar  \0");
        block[345..512].fill(0);
        block[386..398].copy_from_slice(b"00000001000\0");
        block[398..410].copy_from_slice(b"00000001000\0");
        block[483..495].copy_from_slice(b"00000002000\0");
        checksum(&mut block);
        out.write_all(&block)?;
        out.write_all(&bytes[512..])?;
        out.write_all(&[0; 1024])
    })?;
    Ok(vec![layer])
}

pub(super) fn cut_off_in_a_file(blobs: &Blobs) -> Result<Vec<Layer>> {
    let layer = blobs.layer_with(Packing::Gzip, |out| {
        let mut bytes = Vec::new();
        Writer::new(&mut bytes).entry(&Entry::file("f", vec![b'x'; 5000]))?;
        out.write_all(&bytes[..2048])
    })?;
    Ok(vec![layer])
}
