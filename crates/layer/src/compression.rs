//! From a blob as the registry has it to the tar stream, told by its first bytes, never by a media type.
//!
//! Accepted is what containerd accepts: gzip of any number of members, zstd of any number of frames (skippable ones
//! too), else the bytes as they are. Zeros after the last gzip member are padding, as gzip and pigz see it; anything
//! else there is an error.

use std::io::{self, BufRead, Cursor, Read};

use flate2::bufread::GzDecoder;

const GZIP: [u8; 3] = [0x1f, 0x8b, 0x08];
const ZSTD: u32 = 0xfd2f_b528;
/// The low four bits of a skippable frame's magic number are free.
const ZSTD_SKIPPABLE: u32 = 0x184d_2a50;
/// Larger windows are refused: what a hostile frame may make us allocate.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;

/// The uncompressed stream of `r`.
pub fn decompress(mut r: impl BufRead + Send + 'static) -> io::Result<Box<dyn Read + Send>> {
    let start = first_bytes(&mut r)?;
    let whole = Cursor::new(start.clone()).chain(r);
    if start.starts_with(&GZIP) {
        return Ok(Box::new(Gunzip { member: Some(GzDecoder::new(whole)) }));
    }
    if is_zstd(&start) {
        let mut decoder = zstd::stream::read::Decoder::with_buffer(whole)?;
        decoder.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
        return Ok(Box::new(decoder));
    }
    Ok(Box::new(whole))
}

fn first_bytes(r: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut start = Vec::with_capacity(4);
    r.take(4).read_to_end(&mut start)?;
    Ok(start)
}

fn is_zstd(start: &[u8]) -> bool {
    let Some(magic) = start.first_chunk::<4>().map(|bytes| u32::from_le_bytes(*bytes)) else { return false };
    magic == ZSTD || magic & !0xf == ZSTD_SKIPPABLE
}

/// Member after member; `None` once the last one has ended.
struct Gunzip<R> {
    member: Option<GzDecoder<R>>,
}

impl<R: BufRead> Read for Gunzip<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while let Some(member) = &mut self.member {
            let n = member.read(buf)?;
            if n > 0 || buf.is_empty() {
                return Ok(n);
            }
            self.member =
                next_member(self.member.take().expect("there is a member in this loop").into_inner())?;
        }
        Ok(0)
    }
}

fn next_member<R: BufRead>(mut r: R) -> io::Result<Option<GzDecoder<R>>> {
    match r.fill_buf()?.first() {
        None => Ok(None),
        Some(0) => only_zeros(r).map(|()| None),
        Some(_) => Ok(Some(GzDecoder::new(r))),
    }
}

fn only_zeros(mut r: impl BufRead) -> io::Result<()> {
    loop {
        let buf = r.fill_buf()?;
        if buf.is_empty() {
            return Ok(());
        }
        if buf.iter().any(|byte| *byte != 0) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "gzip: invalid header"));
        }
        let len = buf.len();
        r.consume(len);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn plain(blob: Vec<u8>) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        decompress(io::BufReader::with_capacity(7, Cursor::new(blob)))?.read_to_end(&mut out)?;
        Ok(out)
    }

    fn gzip(data: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn gzip_members_follow_each_other() {
        let blob = [gzip(b"one "), gzip(b""), gzip(b"two")].concat();
        assert_eq!(plain(blob).unwrap(), b"one two");
    }

    #[test]
    fn zeros_after_gzip_are_padding_and_other_bytes_are_not() {
        assert_eq!(plain([gzip(b"x"), vec![0; 600]].concat()).unwrap(), b"x");
        assert!(plain([gzip(b"x"), vec![0; 600], vec![1]].concat()).is_err());
        assert!(plain([gzip(b"x"), b"garbage".to_vec()].concat()).is_err());
    }

    #[test]
    fn zstd_frames_and_skippable_frames_follow_each_other() {
        let frame = |data: &[u8]| zstd::bulk::compress(data, 3).unwrap();
        let skippable = [&0x184d_2a5au32.to_le_bytes()[..], &3u32.to_le_bytes(), b"toc"].concat();
        let blob = [skippable.clone(), frame(b"one "), skippable.clone(), frame(b"two"), skippable].concat();
        assert_eq!(plain(blob).unwrap(), b"one two");
    }

    #[test]
    fn anything_else_is_plain() {
        for blob in [&b""[..], b"a", b"abc", b"\x1f\x8b", b"plain text"] {
            assert_eq!(plain(blob.to_vec()).unwrap(), blob);
        }
    }

    #[test]
    fn truncated_gzip_is_an_error() {
        let mut blob = gzip(b"hello");
        blob.truncate(blob.len() - 3);
        assert!(plain(blob).is_err());
    }
}
