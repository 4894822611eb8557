//! The agent, as the protocol asks it.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use super::worker::{Holder, Volumes};
use crate::agent::lent::{Estate, Order};
use crate::agent::{Agent, ServeError};
use crate::reference::{Subject, VolumeId};
use crate::secret::Token;
use crate::volume::snapshot::FileRecord;

impl Volumes for Arc<Agent> {
    async fn lend(&self, order: Order, deadline: Instant) -> Result<(), ServeError> {
        Agent::lend(self, order, deadline).await.map(|_| ())
    }

    async fn adopt(&self, estate: Estate) -> Result<(), ServeError> {
        Agent::adopt(self, estate).await.map(|_| ())
    }

    async fn drain(&self, id: &VolumeId) -> io::Result<()> {
        Agent::drain(self, id).await
    }

    async fn end(&self, id: &VolumeId) {
        Agent::end(self, id).await;
    }

    async fn renew(&self, id: &VolumeId, token: Token) -> bool {
        Agent::renew(self, id, token).await
    }

    fn blank(&self, id: &VolumeId) -> Option<OwnedFd> {
        let served = self.find(id).filter(|served| served.volume().is_blank())?;
        served.fuse().inspect_err(|error| tracing::error!(volume = id.0, %error, "no descriptor left")).ok()
    }

    fn estates(&self) -> Vec<Estate> {
        Agent::estates(self)
    }

    fn served(&self) -> Vec<VolumeId> {
        self.names()
    }

    fn holder(&self, id: &VolumeId) -> Option<Holder> {
        let served = self.find(id)?;
        let (volume, identity) = (served.volume(), &served.volume().spec().identity);
        let account_uid = match &identity.subject {
            Subject::ServiceAccount { uid, .. } => uid.clone(),
            Subject::Local(_) => String::new(),
        };
        let (audience, pod) = (identity.auth.audience.clone(), volume.pod().cloned().unwrap_or_default());
        Some(Holder { audience, pod, account_uid })
    }

    fn size(&self, id: &VolumeId) -> Option<(u64, u64)> {
        let current = self.find(id)?.volume().generations().current()?;
        let files = current.snapshot.files();
        Some((files.iter().filter_map(FileRecord::size).sum::<usize>() as u64, files.len() as u64))
    }

    async fn alive(&self) -> bool {
        Agent::alive(self).await
    }
}
