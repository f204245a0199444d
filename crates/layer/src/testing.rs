//! What the tests of this crate and its fuzz targets share: tar streams and maps made by hand, and a sink that keeps the
//! pieces.

use std::io;

use darter_types::{PieceHash, PieceIndex};

use crate::{Made, PieceSink};

/// Keeps all pieces in memory.
#[derive(Default)]
pub(crate) struct Pieces(pub(crate) Vec<Vec<u8>>);

impl PieceSink for Pieces {
    fn piece(&mut self, index: PieceIndex, hash: PieceHash, plain: &[u8]) -> io::Result<()> {
        assert_eq!(index.0 as usize, self.0.len());
        assert_eq!(hash.as_bytes(), blake3::hash(plain).as_bytes());
        self.0.push(plain.to_vec());
        Ok(())
    }
}

pub(crate) fn made(tar: &[u8]) -> (Made, Pieces) {
    let mut pieces = Pieces::default();
    (crate::make(tar, &mut pieces).unwrap(), pieces)
}

/// Writes a tar stream, entry by entry.
#[derive(Default, Clone)]
pub(crate) struct Tar(pub(crate) Vec<u8>);

/// The fields of an entry; the defaults are those of an ordinary file.
#[derive(Clone)]
pub(crate) struct Item<'a> {
    pub(crate) type_flag: u8,
    pub(crate) name: &'a [u8],
    pub(crate) link: &'a [u8],
    pub(crate) data: &'a [u8],
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: u64,
    pub(crate) device: (u32, u32),
    pub(crate) pax: &'a [(&'a str, &'a [u8])],
}

impl Default for Item<'_> {
    fn default() -> Self {
        Self {
            type_flag: b'0',
            name: b"",
            link: b"",
            data: b"",
            mode: 0o644,
            uid: 0,
            gid: 0,
            mtime: 1_700_000_000,
            device: (0, 0),
            pax: &[],
        }
    }
}

impl Tar {
    pub(crate) fn item(mut self, item: &Item) -> Self {
        if !item.pax.is_empty() {
            let body: Vec<u8> = item.pax.iter().flat_map(|(key, value)| record(key, value)).collect();
            self.0.extend(header(&Item {
                type_flag: b'x',
                name: b"pax",
                pax: &[],
                data: &body,
                ..item.clone()
            }));
            self.data(&body);
        }
        self.0.extend(header(item));
        self.data(item.data);
        self
    }

    pub(crate) fn file(self, name: &str, data: &[u8]) -> Self {
        self.item(&Item { name: name.as_bytes(), data, ..Item::default() })
    }

    pub(crate) fn dir(self, name: &str) -> Self {
        self.item(&Item { type_flag: b'5', name: name.as_bytes(), mode: 0o755, ..Item::default() })
    }

    pub(crate) fn symlink(self, name: &str, target: &str) -> Self {
        self.item(&Item {
            type_flag: b'2',
            name: name.as_bytes(),
            link: target.as_bytes(),
            ..Item::default()
        })
    }

    pub(crate) fn link(self, name: &str, target: &str) -> Self {
        self.item(&Item {
            type_flag: b'1',
            name: name.as_bytes(),
            link: target.as_bytes(),
            ..Item::default()
        })
    }

    pub(crate) fn end(mut self) -> Vec<u8> {
        self.0.extend([0; 1024]);
        self.0
    }

    fn data(&mut self, data: &[u8]) {
        self.0.extend(data);
        self.0.extend(vec![0; data.len().wrapping_neg() % 512]);
    }
}

fn record(key: &str, value: &[u8]) -> Vec<u8> {
    let body = [b" ", key.as_bytes(), b"=", value, b"\n"].concat();
    let len =
        (1..=8).map(|digits| body.len() + digits).find(|len| len.to_string().len() + body.len() == *len);
    [len.unwrap().to_string().as_bytes(), &body].concat()
}

pub(crate) fn header(item: &Item) -> [u8; 512] {
    let mut block = [0; 512];
    let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &item.name[..item.name.len().min(100)]);
    put(100, format!("{:07o}\0", item.mode).as_bytes());
    put(108, format!("{:07o}\0", item.uid).as_bytes());
    put(116, format!("{:07o}\0", item.gid).as_bytes());
    put(124, format!("{:011o}\0", item.data.len()).as_bytes());
    put(136, format!("{:011o}\0", item.mtime).as_bytes());
    put(148, b"        ");
    put(156, &[item.type_flag]);
    put(157, item.link);
    put(257, b"ustar\x0000");
    put(329, format!("{:07o}\0", item.device.0).as_bytes());
    put(337, format!("{:07o}\0", item.device.1).as_bytes());
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    block
}

/// The core of a map with these plain sections (summary, entries, extended attributes, pieces), all hashes right.
pub(crate) fn forged(sections: [&[u8]; 4], recipe: &[u8]) -> Vec<u8> {
    let mut core = b"DARTERLM".to_vec();
    core.extend([1, 0, 0, 0, 5, 0, 0, 0]);
    let (mut payload, mut lengths) = (Vec::new(), Vec::new());
    for (id, plain) in (1u16..).zip(sections) {
        core.extend(section_row(id, 0, plain));
        let stored = zstd::bulk::compress(plain, 1).unwrap();
        lengths.extend((stored.len() as u64).to_le_bytes());
        payload.extend(stored);
    }
    core.extend(section_row(5, 3, recipe));
    [core, lengths, vec![0; 8], payload].concat()
}

fn section_row(id: u16, flags: u16, plain: &[u8]) -> Vec<u8> {
    let len = (plain.len() as u64).to_le_bytes();
    [&id.to_le_bytes()[..], &flags.to_le_bytes(), &[0; 4], &len, blake3::hash(plain).as_bytes()].concat()
}
