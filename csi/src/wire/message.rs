//! The messages. Each is asked by one side and answered by the other: with `Message::Done`, with itself filled in where the
//! table says so, with `Message::Refused` or with `Message::Unsupported`.
//!
//! | message | asked by | descriptors | answered |
//! |---|---|---|---|
//! | `Hello` | agent, observer | | with itself: who the shim is |
//! | `Worker` | supervisor | the worker's pidfd | |
//! | `Publish` | shim | the mount's, unless the volume is served | when every file is there and deposited |
//! | `Unpublish` | shim | | |
//! | `Adopt` | both | the mount's, then those of `parts` in their order | when it is served, or kept |
//! | `Deposit` | worker | the part's | when it is kept |
//! | `Drain` | shim | | when nothing of the volume is read any more |
//! | `Stats` | shim | | with itself |
//! | `Poke` | worker | | when all watchers were told |
//! | `WhoIs` | worker | | with itself |
//! | `Event` | shim | | when it is on its way |
//! | `Volumes` | observer | | with itself |
//! | `Abort` | observer | | when its connection has ended |
//!
//! An observer is a process of root's that only looks: `fuse-secrets mounts --from-shim`.

use std::collections::BTreeMap;
use std::io::Write;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use zeroize::Zeroizing;

use super::Fault;

/// A token on its way: wiped on drop, without `Debug`, `Clone` or `Serialize` of its own.
pub struct Secret(Zeroizing<String>);

impl Secret {
    /// Takes over a text.
    #[must_use]
    pub fn new(text: String) -> Self {
        Self(Zeroizing::new(text))
    }

    /// The text. The name marks each place where it is looked at.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(Self::new)
    }
}

/// The only way for tokens into a frame.
fn expose<S: Serializer>(tokens: &BTreeMap<String, Secret>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(tokens.iter().map(|(audience, token)| (audience, token.expose())))
}

macro_rules! messages {
    ($($(#[$doc:meta])+ $number:literal $name:ident { $($(#[$of:meta])+ $field:ident: $type:ty,)* })+) => {
        /// Any message.
        pub enum Message { $($(#[$doc])+ $name($name),)+ }

        $(
            $(#[$doc])+
            #[derive(Default, Serialize, Deserialize)]
            #[serde(default)]
            pub struct $name { $($(#[$of])+ pub $field: $type,)* }
        )+

        impl Message {
            /// Its number in the header: never used for another message.
            #[must_use]
            pub fn kind(&self) -> u16 {
                match self { $(Self::$name(_) => $number,)+ }
            }

            pub(super) fn read(kind: u16, payload: &[u8]) -> Result<Self, Fault> {
                // The parser's own errors quote what they read: none of them leaves this function.
                match kind {
                    $($number => serde_json::from_slice(payload).map(Self::$name),)+
                    other => return Err(Fault::Unsupported(other)),
                }
                .map_err(|_| Fault::Payload(kind))
            }

            pub(super) fn write(&self, to: impl Write) -> serde_json::Result<()> {
                match self { $(Self::$name(body) => serde_json::to_writer(to, body),)+ }
            }
        }
    };
}

/// Who says Hello.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The agent's first process, which starts workers and announces them.
    Supervisor,
    /// The agent's second process, which serves.
    Worker,
    /// The shim, in its answer.
    Shim,
    /// Root, looking.
    Observer,
    /// Whoever a newer program means: gets nothing.
    #[default]
    #[serde(other)]
    Unknown,
}

/// How requests survive the death of the agent that had read them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Handover {
    /// The successor has them sent again (`FUSE_NOTIFY_RESEND`). Kernels without its bugs.
    Resend,
    /// They end with ECONNABORTED: each agent reads a clone of its own. Any kernel.
    #[default]
    #[serde(other)]
    Clone,
}

/// A piece of a volume's state: what lies in a memory file. In a frame it is a word: `record`, `opens`, or a generation's number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum Part {
    /// Of a newer program: kept and passed on, not read.
    #[default]
    Other,
    /// What the volume asked for, and its token.
    Record,
    /// What is open and shown, shared by whoever serves. No secrets.
    Opens,
    /// One generation's files with this number.
    Generation(u32),
}

impl From<String> for Part {
    fn from(word: String) -> Self {
        match word.as_str() {
            "record" => Self::Record,
            "opens" => Self::Opens,
            number => number.parse().map_or(Self::Other, Self::Generation),
        }
    }
}

impl From<Part> for String {
    fn from(part: Part) -> Self {
        match part {
            Part::Other => "other".to_owned(),
            Part::Record => "record".to_owned(),
            Part::Opens => "opens".to_owned(),
            Part::Generation(number) => number.to_string(),
        }
    }
}

/// What an observer sees of a volume; times in milliseconds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct VolumeStatus {
    /// The volume.
    pub volume: String,
    /// Where it is mounted.
    pub target: String,
    /// `namespace/name` of the pod.
    pub pod: String,
    /// `publishing`, `serving`, `handing_over`, `waiting` (for an agent), `failing` (readers get EIO), `unclaimed` (the agent that
    /// served it has not given it back to a restarted shim), `dead`.
    pub state: String,
    /// Which agent serves it, by its number; 0: none.
    pub agent: u64,
    /// Whether readers wait and nobody reads their requests.
    pub waiting: bool,
    /// Newest generation deposited; 0: none.
    pub generation: u32,
    /// Parts that are kept.
    pub parts: usize,
}

/// What an observer sees of an agent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct AgentStatus {
    /// Its number: greater than that of all that attached before since the shim started.
    pub agent: u64,
    /// Its process id; 0: it is gone.
    pub pid: u32,
    /// Its program and version.
    pub program: String,
    /// `serving`, `standby`, `leaving`, or how it ended: `killed by signal 9`, `exited with 0`, `hung and was killed`, `ended`.
    pub state: String,
    /// When it attached, RFC 3339.
    pub since: String,
}

messages! {
    /// Who speaks; a worker that says it can serve.
    1 Hello {
        /// Program and version, for people.
        program: String,
        /// As what.
        role: Role,
        /// Of the shim: how requests survive.
        handover: Handover,
        /// Of the shim: the number of this agent, greater than that of all that attached before since the shim started.
        agent: u64,
    }
    /// A volume is to be served, or a served one has newer tokens.
    2 Publish {
        /// The volume's name on this node.
        volume: String,
        /// Where it will be mounted, for people.
        target: String,
        /// Name, uid, namespace, service account: what kubelet says of the pod (`csi.storage.k8s.io/...`).
        pod: BTreeMap<String, String>,
        /// `volumeAttributes` of the pod's spec.
        attributes: BTreeMap<String, String>,
        /// The pod's group, if it has one.
        group: Option<u32>,
        /// Service-account tokens by audience.
        #[serde(serialize_with = "expose")]
        tokens: BTreeMap<String, Secret>,
        /// Whether `nodePublishSecretRef` of the pod's spec named anything, all of which the shim drops.
        secret_ref: bool,
    }
    /// A volume is gone: wipe it and give back what was leased for it.
    3 Unpublish {
        /// The volume.
        volume: String,
    }
    /// A volume that an earlier agent served is yours to serve; or, asked by a worker after the shim restarted, yours to keep.
    4 Adopt {
        /// The volume.
        volume: String,
        /// Where it is mounted.
        target: String,
        /// `namespace/name` of the pod.
        pod: String,
        /// What the descriptors after the first one are.
        parts: Vec<Part>,
        /// How often an agent died while it adopted this volume and no other: from 1 on, do not trust its state. An agent that died while
        /// it adopted several counts for none of them.
        attempts: u32,
    }
    /// Keep this part for my successor; it takes the place of an earlier one of the same kind and number.
    5 Deposit {
        /// The volume.
        volume: String,
        /// Which part comes along.
        part: Part,
        /// Generations that need not be kept any more.
        gone: Vec<u32>,
    }
    /// Read no more requests of this volume, finish those that were read, let go of it, and be ready to get it back.
    6 Drain {
        /// The volume.
        volume: String,
    }
    /// How are you? An agent that does not answer in time is taken for hung.
    7 Stats {
        /// One volume's numbers instead of the agent's own; empty: the agent's.
        volume: String,
        /// Counters by name; of a volume: `bytes`, `files`.
        counters: BTreeMap<String, u64>,
    }
    /// Tell who watches these files that they changed.
    8 Poke {
        /// The volume.
        volume: String,
        /// The generation that is served now.
        generation: u32,
        /// Paths of the changed files in the volume.
        files: Vec<String>,
    }
    /// Whose thread is this? Empty where nothing is known.
    9 WhoIs {
        /// The thread's number in the node's process table.
        pid: u32,
        /// The pod's uid.
        pod: String,
        /// The container's name.
        container: String,
        /// The process's command.
        command: String,
    }
    /// Something that the pod's owner should see.
    10 Event {
        /// The volume.
        volume: String,
        /// One word, as Kubernetes wants it.
        reason: String,
        /// What happened and what to change.
        text: String,
    }
    /// The process whose pidfd comes along is my worker.
    11 Worker {
        /// How the one before it ended (`killed by signal 9`, `exited with 0`), as only its parent learns; empty: there was none.
        ended: String,
    }
    /// What is kept, and who serves it.
    12 Volumes {
        /// The volumes.
        volumes: Vec<VolumeStatus>,
        /// The agents that are attached, and the last that ended.
        agents: Vec<AgentStatus>,
    }
    /// End a volume: its readers get an error until it is published again.
    13 Abort {
        /// The volume.
        volume: String,
    }
    /// Done.
    128 Done {
        /// What the pod's owner should know all the same.
        warnings: Vec<String>,
    }
    /// No, and why.
    129 Refused {
        /// The gRPC code that says it best.
        code: u32,
        /// What to change.
        text: String,
    }
    /// The message is of a newer program than this one.
    130 Unsupported {
        /// Its number.
        kind: u16,
    }
}
