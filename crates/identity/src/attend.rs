//! Attending the manager: telling it that this member lives, and being told who else does.
//!
//! [`attend`] never gives up: while the manager is away it tries again, with growing pauses, and what was last known stays
//! in force. It is also written to the files `members` and `limits` beside the certificate, so that a program that starts
//! while the manager is down knows its schedulers, seeds and limits all the same.

mod fetch;
mod kept;
mod rates;
mod session;
mod standing;
mod view;

use std::fmt;

use darter_daemon::tasks::Tasks;
use darter_types::{BlobDigest, DiffId, NodeName, Repository};
use tokio::sync::{mpsc, watch};

pub use rates::SetRates;
pub use standing::Standing;

use crate::Identity;

pub use fetch::{FETCH_LAYERS_MAX, FetchLayer, FetchOrder};

/// Orders that the program has not taken yet; one that finds no room is answered as failed.
const COMMANDS_MAX: usize = 64;

/// Updates that were not sent yet; whoever reports waits when there is no room.
const UPDATES_MAX: usize = 64;

/// How the manager hears of a member that lives.
pub const HEARTBEAT_SECONDS: u64 = 5;

/// What a member says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// The program's version, for people.
    pub version: String,
    /// `host:port` where other members reach it.
    pub address: String,
    /// Members of the same zone are near each other; may be empty.
    pub zone: String,
}

/// Another member, and where it is.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MemberInfo {
    pub node: NodeName,
    /// `host:port`
    pub address: String,
    pub zone: String,
}

/// Who is alive, as far as the manager knew when it was last heard.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ClusterMembers {
    pub schedulers: Vec<MemberInfo>,
    pub seeds: Vec<MemberInfo>,
}

/// What the manager orders a member to do. One that has the order already goes on with it, and starts it anew only if something
/// else is said now.
#[derive(Clone, PartialEq)]
pub enum PreheatCommand {
    /// To a seed: find the image's layers and have them.
    Start {
        id: String,
        image: String,
        /// `os/architecture`, or `all` that the image has for Linux; `None`: the seed's own.
        platform: Option<String>,
        credential: Option<darter_proto::v1::Credential>,
    },
    /// To a node: fetch what a seed has made.
    Fetch(FetchOrder),
    Cancel {
        id: String,
    },
}

impl PreheatCommand {
    /// Of the order.
    pub fn id(&self) -> &str {
        match self {
            PreheatCommand::Start { id, .. } | PreheatCommand::Cancel { id } => id,
            PreheatCommand::Fetch(order) => &order.id,
        }
    }

    /// For people; empty where only the order is named.
    pub fn image(&self) -> &str {
        match self {
            PreheatCommand::Start { image, .. } => image,
            PreheatCommand::Fetch(order) => &order.image,
            PreheatCommand::Cancel { .. } => "",
        }
    }

    /// Whether both say the same, however long ago: what is left of an order's life is less each time that it is said.
    pub fn is_repeat_of(&self, before: &PreheatCommand) -> bool {
        match (self, before) {
            (PreheatCommand::Fetch(now), PreheatCommand::Fetch(before)) => {
                FetchOrder { life: before.life, ..now.clone() } == *before
            }
            (now, before) => now == before,
        }
    }
}

impl fmt::Debug for PreheatCommand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PreheatCommand::Start { id, image, .. } => {
                write!(f, "Start({id}, {image}, credential not shown)")
            }
            PreheatCommand::Fetch(order) => write!(f, "Fetch({}, {})", order.id, order.image),
            PreheatCommand::Cancel { id } => write!(f, "Cancel({id})"),
        }
    }
}

/// How far an order is: all that is known, not a difference.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PreheatUpdate {
    pub id: String,
    pub layers: Vec<PreheatLayer>,
    pub done: bool,
    /// Why the order failed as a whole.
    pub error: Option<String>,
    /// Where a seed found the layers.
    pub repository: Option<Repository>,
}

impl PreheatUpdate {
    /// The last word on an order that has failed as a whole.
    pub fn failed(id: &str, error: impl fmt::Display) -> Self {
        Self { id: id.to_owned(), done: true, error: Some(error.to_string()), ..Self::default() }
    }
}

/// One layer of an order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PreheatLayer {
    pub diff_id: DiffId,
    pub blob: BlobDigest,
    /// Bytes of the blob, and how many of them were read; at a node the share of its pieces that are there.
    pub size: u64,
    pub read: u64,
    pub done: bool,
    pub error: Option<String>,
}

/// The member's side of the stream.
pub struct Attendance {
    pub members: watch::Receiver<ClusterMembers>,
    /// The limits that the manager sets for this member.
    pub limits: watch::Receiver<SetRates>,
    /// How this member stands with the manager.
    pub standing: watch::Receiver<Standing>,
    /// Only seeds and nodes are sent any; a program that is neither may drop it.
    pub preheats: mpsc::Receiver<PreheatCommand>,
    /// What is sent while the manager is away is dropped: it gives its orders again.
    pub updates: mpsc::Sender<PreheatUpdate>,
}

/// Attends the manager at `manager` (`host:port`) until the tasks stop.
pub fn attend(identity: &Identity, manager: String, hello: Hello, tasks: &Tasks) -> Attendance {
    let folder = identity.inner.folder.as_deref();
    let (file, limits_file) = (folder.map(view::path), folder.map(rates::path));
    let known = file.as_deref().map(view::load).unwrap_or_default();
    let (members_sender, members) = watch::channel(known);
    let (limits_sender, limits) = watch::channel(limits_file.as_deref().map(rates::load).unwrap_or_default());
    let (commands, preheats) = mpsc::channel(COMMANDS_MAX);
    let (updates, reported) = mpsc::channel(UPDATES_MAX);
    let (standing_sender, standing) = watch::channel(Standing::toward(&manager));
    let heard = session::Heard {
        standing: standing_sender,
        file,
        members: members_sender,
        limits_file,
        limits: limits_sender,
    };
    let session = session::Session::new(identity.clone(), manager, hello, heard, commands);
    tasks.spawn_until_stop("attend", session.run(reported));
    Attendance { members, limits, standing, preheats, updates }
}
