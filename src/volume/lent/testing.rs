//! A keeper for tests.

use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, Weak};

use fuse_secrets_csi::wire::message::Part;

use super::Keeper;
use crate::reference::VolumeId;
use crate::secret::pages::SecretMemory;
use crate::volume::Volume;

/// Keeps what it is given, unless it refuses.
#[derive(Default)]
pub(crate) struct Shelf {
    parts: Mutex<BTreeMap<Part, OwnedFd>>,
    pub(crate) refuses: AtomicBool,
    /// The volume, and what it served as each part came.
    pub(crate) watched: Mutex<Weak<Volume>>,
    pub(crate) served: Mutex<Vec<(Part, Vec<u32>)>>,
}

impl Keeper for Shelf {
    fn deposit(
        &self,
        _: &VolumeId,
        part: Part,
        file: OwnedFd,
        gone: Vec<u32>,
    ) -> Pin<Box<dyn Future<Output = io::Result<()>> + Send + '_>> {
        Box::pin(async move {
            if self.refuses.load(Ordering::Acquire) {
                return Err(io::ErrorKind::NotConnected.into());
            }
            let numbers = self.watched.lock().unwrap().upgrade().map(|volume| volume.generations().numbers());
            self.served.lock().unwrap().push((part, numbers.unwrap_or_default()));
            let mut parts = self.parts.lock().unwrap();
            gone.into_iter().for_each(|number| drop(parts.remove(&Part::Generation(number))));
            parts.insert(part, file);
            Ok(())
        })
    }
}

impl Shelf {
    pub(crate) fn parts(&self) -> Vec<(Part, OwnedFd)> {
        self.parts.lock().unwrap().iter().map(|(part, file)| (*part, file.try_clone().unwrap())).collect()
    }

    pub(crate) fn names(&self) -> Vec<Part> {
        self.parts.lock().unwrap().keys().copied().collect()
    }

    /// As a fault or a half-written page would.
    pub(crate) fn spoil(&self, part: Part) {
        let file = self.parts.lock().unwrap()[&part].try_clone().unwrap();
        SecretMemory::new().unwrap().adopt(file).unwrap().wipe_on_drop();
    }
}
