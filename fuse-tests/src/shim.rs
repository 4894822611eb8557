//! The shim's part, played by the test: it mounts, keeps every descriptor and part, and passes them from agent to agent.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use fuse_secrets::fuse::mount::{Mount, Options};
use fuse_secrets_csi::wire::Message;
use fuse_secrets_csi::wire::link::{Asked, End, Link};
use fuse_secrets_csi::wire::message::{Adopt, Deposit, Done, Drain, Part, Publish, Refused};
use tempfile::TempDir;
use tokio::net::UnixListener;
use tokio::runtime::Runtime;
use tokio::sync::mpsc::Receiver;

use crate::agent::{Agent, BareFile, Command};
use crate::mounted::Mounted;
use crate::stamp::Content;
use crate::sys;

type Parts = Arc<Mutex<HashMap<String, BTreeMap<Part, OwnedFd>>>>;

/// How an agent gets a mount's descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handover {
    /// A duplicate of the one that is kept; a successor has lost requests sent again.
    Resend,
    /// A clone of its own, of which no copy is kept.
    Clone,
}

/// The keeper of mounts.
pub struct Shim {
    runtime: Runtime,
    directory: TempDir,
    listener: UnixListener,
    handover: Handover,
    parts: Parts,
}

/// An agent that serves for it.
pub struct Worker {
    /// The process.
    pub agent: Agent,
    link: Link,
}

/// A mount that is kept.
pub struct Held {
    /// Where.
    pub mounted: Mounted,
    fuse: OwnedFd,
}

impl Held {
    /// The volume's name.
    #[must_use]
    pub fn name(&self) -> String {
        self.mounted.path().display().to_string()
    }
}

impl Shim {
    /// One that nobody has connected to yet.
    ///
    /// # Panics
    /// No socket.
    #[must_use]
    pub fn new(handover: Handover) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let directory = TempDir::new().unwrap();
        let listener = {
            let _inside = runtime.enter();
            UnixListener::bind(directory.path().join("shim.sock")).unwrap()
        };
        Self { runtime, directory, listener, handover, parts: Parts::default() }
    }

    /// Starts an agent and waits until it is connected.
    ///
    /// # Panics
    /// It is not.
    #[must_use]
    pub fn worker(&self, program: &str) -> Worker {
        let socket = self.directory.path().join("shim.sock");
        let word = if self.handover == Handover::Resend { "resend" } else { "clone" };
        let agent = Agent::start_with(program, &[socket.to_str().unwrap(), word]);
        let link = self.runtime.block_on(async {
            let accepted = tokio::time::timeout(Duration::from_secs(30), self.listener.accept()).await;
            let (link, questions) = Link::start(accepted.unwrap().unwrap().0, End::Accepted);
            tokio::spawn(keep(questions, Arc::clone(&self.parts)));
            link
        });
        Worker { agent, link }
    }

    /// Mounts, and has an agent serve a volume without a store there.
    ///
    /// # Panics
    /// It does not.
    pub fn lend(&self, worker: &mut Worker, files: &[BareFile], contents: &[Content]) -> Held {
        let mounted = Mounted::new();
        // It goes with `mounted`.
        let (_mount, fuse) =
            Mount::attach(mounted.path(), Options { allow_other: true, max_read: 128 << 10 }).unwrap();
        let held = Held { mounted, fuse };
        let publish = Publish { volume: held.name(), ..Publish::default() };
        self.ask(worker, Message::Publish(publish), vec![self.descriptor(&held)]);
        let path: PathBuf = held.mounted.path().to_owned();
        let (files, contents) = (files.to_vec(), contents.to_vec());
        worker.agent.ask(&Command::Lend { path, files, contents }).unwrap();
        held
    }

    /// Has an agent adopt a volume that another one served.
    ///
    /// # Panics
    /// It does not.
    pub fn adopt(&self, worker: &Worker, held: &Held) {
        let kept = self.parts.lock().unwrap();
        let (parts, files): (Vec<Part>, Vec<OwnedFd>) =
            kept[&held.name()].iter().map(|(part, file)| (*part, file.try_clone().unwrap())).unzip();
        drop(kept);
        let descriptors = std::iter::once(self.descriptor(held)).chain(files).collect();
        let (volume, target) = (held.name(), held.name());
        let adopt = Adopt { volume, target, parts, ..Adopt::default() };
        self.ask(worker, Message::Adopt(adopt), descriptors);
    }

    /// Has an agent let go of a volume.
    ///
    /// # Panics
    /// It does not.
    pub fn drain(&self, worker: &Worker, held: &Held) {
        self.ask(worker, Message::Drain(Drain { volume: held.name() }), Vec::new());
    }

    fn ask(&self, worker: &Worker, message: Message, descriptors: Vec<OwnedFd>) {
        let deadline = Instant::now() + Duration::from_secs(30);
        match self.runtime.block_on(worker.link.ask(&message, descriptors, deadline)) {
            Ok(Message::Done(_)) => {}
            Ok(Message::Refused(refused)) => panic!("{}", refused.text),
            Ok(_) => panic!("an answer to something else"),
            Err(error) => panic!("{error}"),
        }
    }

    fn descriptor(&self, held: &Held) -> OwnedFd {
        match self.handover {
            Handover::Resend => held.fuse.try_clone().unwrap(),
            Handover::Clone => sys::clone_fuse(held.fuse.as_fd()).unwrap(),
        }
    }
}

/// Keeps what is deposited.
async fn keep(mut questions: Receiver<Asked>, parts: Parts) {
    while let Some(mut asked) = questions.recv().await {
        let answer = match (&asked.message, asked.descriptors.pop()) {
            (Message::Deposit(Deposit { volume, part, gone }), Some(file)) => {
                let mut parts = parts.lock().unwrap();
                let kept = parts.entry(volume.clone()).or_default();
                gone.iter().for_each(|number| drop(kept.remove(&Part::Generation(*number))));
                kept.insert(*part, file);
                Message::Done(Done::default())
            }
            _ => Message::Refused(Refused { code: 3, text: "only deposits".to_owned() }),
        };
        asked.answer(answer);
    }
}
