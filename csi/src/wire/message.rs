//! The messages. Each is asked by one side and answered by the other: with `Message::Done`, with itself filled in where the
//! table says so, with `Message::Refused` or with `Message::Unsupported`.
//!
//! | message | asked by | descriptors | answered |
//! |---|---|---|---|
//! | `Hello` | agent | | with itself |
//! | `Publish` | shim | the mount's, unless the volume is served | when every file is there |
//! | `Unpublish` | shim | | |
//! | `Adopt` | shim | the mount's, then its generations', oldest first | |
//! | `Deposit` | agent | one generation's | |
//! | `Drain` | shim | | when nothing is read any more |
//! | `Stats` | shim | | with itself |
//! | `Poke` | agent | | when all watchers were told |
//! | `WhoIs` | agent | | with itself |
//! | `Event` | agent | | |

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

messages! {
    /// Who speaks; an agent that says it can serve.
    1 Hello {
        /// Program and version, for people.
        program: String,
    }
    /// A volume is to be served, or a served one has newer tokens.
    2 Publish {
        /// The volume's name on this node.
        volume: String,
        /// Name, uid, namespace, service account: what kubelet says of the pod (`csi.storage.k8s.io/...`).
        pod: BTreeMap<String, String>,
        /// `volumeAttributes` of the pod's spec.
        attributes: BTreeMap<String, String>,
        /// The pod's group, if it has one.
        group: Option<u32>,
        /// Service-account tokens by audience.
        #[serde(serialize_with = "expose")]
        tokens: BTreeMap<String, Secret>,
    }
    /// A volume is gone: wipe it and give back what was leased for it.
    3 Unpublish {
        /// The volume.
        volume: String,
    }
    /// A volume that an earlier agent served is yours.
    4 Adopt {
        /// The volume.
        volume: String,
    }
    /// Keep this generation for my successor.
    5 Deposit {
        /// The volume.
        volume: String,
        /// The generation's number.
        generation: u32,
        /// Generations that need not be kept any more.
        gone: Vec<u32>,
    }
    /// Read no more requests, finish those that were read, and leave: a successor is ready.
    6 Drain {}
    /// How are you? An agent that does not answer in time is taken for hung.
    7 Stats {
        /// Counters by name.
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
