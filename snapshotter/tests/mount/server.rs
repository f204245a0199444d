//! The process that serves the mount: this test binary, started again.
//!
//! It takes commands, one a line, from a socket, and answers each with a line.

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use darter_layer::{LayerMap, PieceSink};
use darter_snapshotter::fs::{ContentError, FileSystem, LayerContent, Limits, NumberKey, Numbers};
use darter_snapshotter::fuse::{Mountpoint, Options, Session};
use darter_types::{PieceHash, PieceIndex};
use parking_lot::Mutex;
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// The variable that names the world's folder, and so makes a process a server.
pub const SERVE: &str = "DARTER_TEST_SERVE";

/// Where a layer's map and pieces are.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Whereabouts {
    /// On this machine.
    Here,
    /// Elsewhere, but they come at once.
    Far,
    /// The map is here; pieces come only when all is given.
    Mute,
    /// The map comes only when all is given.
    Hidden,
    /// The map is here, pieces are impossible.
    Lost,
}

struct Layer {
    map: Arc<LayerMap>,
    pieces: Vec<Bytes>,
    whereabouts: Whereabouts,
    given: watch::Sender<bool>,
    read: AtomicU64,
    wanted: AtomicU64,
}

/// All pieces of a layer, in memory.
#[derive(Default)]
pub struct Pieces(pub Vec<Bytes>);

impl PieceSink for Pieces {
    fn piece(&mut self, _index: PieceIndex, _hash: PieceHash, plain: &[u8]) -> io::Result<()> {
        self.0.push(Bytes::copy_from_slice(plain));
        Ok(())
    }
}

impl Layer {
    fn new(tar: &Path, whereabouts: Whereabouts) -> Self {
        let mut pieces = Pieces::default();
        let made = darter_layer::make(std::fs::File::open(tar).unwrap(), &mut pieces).unwrap();
        Self {
            map: Arc::new(made.map),
            pieces: pieces.0,
            whereabouts,
            given: watch::Sender::new(false),
            read: AtomicU64::new(0),
            wanted: AtomicU64::new(0),
        }
    }

    async fn wait(&self) {
        self.given.subscribe().wait_for(|given| *given).await.unwrap();
    }
}

#[async_trait]
impl LayerContent for Layer {
    fn map_now(&self) -> Option<Arc<LayerMap>> {
        (self.whereabouts != Whereabouts::Hidden || *self.given.borrow()).then(|| self.map.clone())
    }

    async fn map(&self) -> Result<Arc<LayerMap>, ContentError> {
        if self.whereabouts == Whereabouts::Hidden {
            self.wait().await;
        }
        Ok(self.map.clone())
    }

    fn read_local(&self, piece: PieceIndex) -> Option<Bytes> {
        (self.whereabouts == Whereabouts::Here).then(|| self.pieces[piece.0 as usize].clone())
    }

    async fn read(&self, piece: PieceIndex) -> Result<Bytes, ContentError> {
        self.read.fetch_add(1, Ordering::Relaxed);
        match self.whereabouts {
            Whereabouts::Mute => self.wait().await,
            Whereabouts::Lost => return Err(ContentError::Impossible("it is a test".to_owned())),
            Whereabouts::Here | Whereabouts::Far | Whereabouts::Hidden => {}
        }
        Ok(self.pieces[piece.0 as usize].clone())
    }

    fn want(&self, _first: PieceIndex, count: u32) {
        self.wanted.fetch_add(u64::from(count), Ordering::Relaxed);
    }
}

/// Numbers in a file, a line for each key in the order of asking.
struct FileNumbers(Mutex<PathBuf>);

impl Numbers for FileNumbers {
    fn number(&self, key: &NumberKey) -> io::Result<u32> {
        let (file, line) = (self.0.lock(), format!("{key:?}"));
        let mut text = std::fs::read_to_string(&*file).unwrap_or_default();
        if let Some(position) = text.lines().position(|known| known == line) {
            return Ok(position as u32 + 1);
        }
        text += &line;
        text.push('\n');
        std::fs::write(&*file, &text)?;
        Ok(text.lines().count() as u32)
    }
}

struct Server {
    folder: PathBuf,
    fs: Arc<FileSystem>,
    layers: HashMap<String, Arc<Layer>>,
    runtime: Runtime,
    ended: JoinHandle<()>,
}

impl Server {
    /// A layer is written `name` or `name:whereabouts`; each word stands for one layer, whatever shows it.
    fn layer(&mut self, word: &str) -> Arc<dyn LayerContent> {
        let (name, whereabouts) = word.split_once(':').unwrap_or((word, "here"));
        let whereabouts = match whereabouts {
            "here" => Whereabouts::Here,
            "far" => Whereabouts::Far,
            "mute" => Whereabouts::Mute,
            "hidden" => Whereabouts::Hidden,
            "lost" => Whereabouts::Lost,
            other => panic!("{other}?"),
        };
        let tar = self.folder.join(name).with_extension("tar");
        let make = || Arc::new(Layer::new(&tar, whereabouts));
        self.layers.entry(word.to_owned()).or_insert_with(make).clone()
    }

    fn obey(&mut self, words: &[&str]) -> String {
        match words {
            ["add", dir, layers @ ..] => {
                let layers = layers.iter().map(|word| self.layer(word)).collect();
                self.fs.add(dir.parse().unwrap(), layers);
                "ok".to_owned()
            }
            ["remove", dir] => {
                self.fs.remove(dir.parse().unwrap());
                "ok".to_owned()
            }
            ["stats"] => {
                let counts = self.fs.stats().all();
                counts.iter().map(|(name, count)| format!("{name}={count} ")).collect()
            }
            ["moved", word] => {
                let layer = &self.layers[*word];
                let count = |count: &AtomicU64| count.load(Ordering::Relaxed);
                format!("read={} wanted={}", count(&layer.read), count(&layer.wanted))
            }
            ["ended"] => self.ended.is_finished().to_string(),
            ["end"] => {
                let bound = async { tokio::time::timeout(Duration::from_secs(5), &mut self.ended).await };
                self.runtime.block_on(bound).unwrap().unwrap();
                "ended".to_owned()
            }
            ["give"] => {
                for layer in self.layers.values() {
                    layer.given.send_replace(true);
                }
                "ok".to_owned()
            }
            other => panic!("{other:?}?"),
        }
    }
}

/// Serves until the other end of the socket is closed, or says `quit`.
pub fn serve(folder: &Path) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let numbers = Arc::new(FileNumbers(Mutex::new(folder.join("numbers"))));
    let fs = FileSystem::new(numbers, runtime.handle().clone(), Limits::default());
    let points = [("mnt", true), ("bare", false)];
    let points = points.map(|(name, xattrs)| Mountpoint { path: folder.join(name), xattrs });
    let session = Session::mount(&fs, &points, &Options::default()).unwrap();
    let mut control = UnixStream::connect(folder.join("control")).unwrap();
    let commands = BufReader::new(control.try_clone().unwrap());
    let (layers, ended) = (HashMap::new(), runtime.spawn(session.ended()));
    let mut server = Server { folder: folder.to_owned(), fs, layers, runtime, ended };
    let numbers: Vec<String> = session.numbers().iter().map(u32::to_string).collect();
    writeln!(control, "{}", numbers.join(" ")).unwrap();
    for line in commands.lines() {
        let line = line.unwrap();
        if line == "quit" {
            session.stop();
            writeln!(control, "bye").unwrap();
            return;
        }
        let answer = server.obey(&line.split_whitespace().collect::<Vec<_>>());
        writeln!(control, "{answer}").unwrap();
    }
}
