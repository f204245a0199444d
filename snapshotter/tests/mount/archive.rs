//! Tar streams, written entry by entry: what the tests mount.

const BLOCK: usize = 512;

/// A tar stream that is being written.
#[derive(Default)]
pub struct Archive(Vec<u8>);

/// What stands in a header beside the name.
#[derive(Clone, Copy)]
pub struct Meta {
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: u64,
}

pub const PLAIN: Meta = Meta { mode: 0o644, uid: 0, gid: 0, mtime: 1_600_000_000 };
pub const OPEN: Meta = Meta { mode: 0o755, ..PLAIN };

impl Archive {
    pub fn file(&mut self, name: &str, meta: Meta, content: &[u8]) -> &mut Self {
        self.entry(name, meta, b'0', "", (0, 0), content)
    }

    pub fn directory(&mut self, name: &str, meta: Meta) -> &mut Self {
        self.entry(&format!("{name}/"), meta, b'5', "", (0, 0), b"")
    }

    pub fn symlink(&mut self, name: &str, target: &str) -> &mut Self {
        self.entry(name, Meta { mode: 0o777, ..PLAIN }, b'2', target, (0, 0), b"")
    }

    pub fn hardlink(&mut self, name: &str, target: &str, meta: Meta) -> &mut Self {
        self.entry(name, meta, b'1', target, (0, 0), b"")
    }

    pub fn fifo(&mut self, name: &str) -> &mut Self {
        self.entry(name, PLAIN, b'6', "", (0, 0), b"")
    }

    pub fn character_device(&mut self, name: &str, major: u32, minor: u32) -> &mut Self {
        self.entry(name, PLAIN, b'3', "", (major, minor), b"")
    }

    pub fn block_device(&mut self, name: &str, major: u32, minor: u32) -> &mut Self {
        self.entry(name, PLAIN, b'4', "", (major, minor), b"")
    }

    /// Extended records (PAX) for the entry that follows.
    pub fn pax(&mut self, records: &[(&str, &[u8])]) -> &mut Self {
        let mut body = Vec::new();
        for (key, value) in records {
            // The length counts its own digits.
            let rest = key.len() + value.len() + 3;
            let length = (1..).map(|digits| rest + digits).find(|all| all.to_string().len() + rest == *all);
            body.extend(format!("{} {key}=", length.unwrap()).bytes());
            body.extend_from_slice(value);
            body.push(b'\n');
        }
        self.entry("pax", PLAIN, b'x', "", (0, 0), &body)
    }

    fn entry(
        &mut self,
        name: &str,
        meta: Meta,
        kind: u8,
        link: &str,
        device: (u32, u32),
        content: &[u8],
    ) -> &mut Self {
        let mut header = [0; BLOCK];
        let mut put = |at: usize, text: &[u8]| header[at..at + text.len()].copy_from_slice(text);
        put(0, name.as_bytes());
        put(100, format!("{:07o}", meta.mode).as_bytes());
        put(108, format!("{:07o}", meta.uid).as_bytes());
        put(116, format!("{:07o}", meta.gid).as_bytes());
        put(124, format!("{:011o}", content.len()).as_bytes());
        put(136, format!("{:011o}", meta.mtime).as_bytes());
        put(148, b"        ");
        put(156, &[kind]);
        put(157, link.as_bytes());
        put(257, b"ustar\x0000");
        put(329, format!("{:07o}", device.0).as_bytes());
        put(337, format!("{:07o}", device.1).as_bytes());
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.0.extend_from_slice(&header);
        self.0.extend_from_slice(content);
        self.0.resize(self.0.len().next_multiple_of(BLOCK), 0);
        self
    }

    pub fn finish(&mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 2 * BLOCK, 0);
        std::mem::take(&mut self.0)
    }
}

/// Bytes that don't repeat and can't be compressed, the same for the same seed.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// A layer with every kind of entry that an image can have.
pub fn every_kind() -> Vec<u8> {
    let mut archive = Archive::default();
    let owned = Meta { uid: 1000, gid: 2000, mtime: 1_500_000_001, ..PLAIN };
    archive.directory("etc", OPEN).file("etc/empty", PLAIN, b"").file(
        "etc/hosts",
        owned,
        b"127.0.0.1 localhost\n",
    );
    archive.directory("bin", OPEN).file("bin/su", Meta { mode: 0o4755, ..PLAIN }, b"set-user-ID");
    archive.file("bin/group", Meta { mode: 0o2755, ..PLAIN }, &noise(1, 5000));
    archive.directory("tmp", Meta { mode: 0o1777, ..PLAIN }).directory("tmp/empty", OPEN);
    archive.symlink("bin/sh", "su").symlink("dangling", "/no/such/file").symlink("etc/up", "../bin");
    archive.hardlink("bin/su-again", "bin/su", Meta { mode: 0o4755, ..PLAIN });
    archive.directory("dev", OPEN).character_device("dev/null", 1, 3).block_device("dev/sda", 8, 300);
    archive.character_device("dev/big", 300, 70_000).fifo("dev/pipe");
    archive.directory("lib", OPEN).file("lib/large", PLAIN, &noise(2, 3_000_001));
    archive.file("lib/piece", PLAIN, &noise(3, 256 * 1024)).file("lib/zeros", PLAIN, &vec![0; 700_000]);
    archive.pax(&[("SCHILY.xattr.user.note", b"a\0b"), ("mtime", b"1500000000.123456789")]);
    archive.file("lib/attributes", PLAIN, b"with extended attributes");
    let capability: &[u8] =
        b"\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00";
    archive.pax(&[("SCHILY.xattr.security.capability", capability)]).file("bin/ping", OPEN, b"capable");
    archive.pax(&[("SCHILY.xattr.user.dir", b"directory")]).directory("lib/noted", OPEN);
    let long = format!("lib/noted/{}", "n".repeat(200));
    archive.pax(&[("path", long.as_bytes())]).file("short", PLAIN, b"a long name");
    archive.pax(&[("path", b"lib/noted/not-\xff-utf8")]).file("short", PLAIN, b"strange");
    archive.directory("many", OPEN);
    for index in 0..1500 {
        archive.file(&format!("many/file-{index}"), PLAIN, format!("content {index}").as_bytes());
    }
    let deep = vec!["d"; 40].join("/");
    for depth in (1..deep.len() + 1).step_by(2) {
        archive.directory(&deep[..depth], OPEN);
    }
    archive.file(&format!("{deep}/bottom"), PLAIN, b"deep");
    archive.finish()
}
