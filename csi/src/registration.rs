//! How kubelet finds the shim: a socket in its directory of plugins, on which it asks for name, kind and CSI socket, and then
//! says whether it took the plugin.
//!
//! kubelet looks for new sockets all the time and for all of them when it starts, so being there is enough to survive its
//! restarts. If the socket vanishes, it is made again. It goes with a shim that leaves in order, so that kubelet does not take the
//! driver of a node for registered that has none any more.
//!
//! The socket is named `reg@DRIVER.sock` because kubelet connects to the bare path: grpc-go then sends the escaped path as
//! `:authority`, whose `%2F` this side's HTTP/2 only takes as the part before an `@`.

use std::convert::Infallible;
use std::io;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use tonic::service::Routes;
use tonic::{Request, Response, async_trait};

use crate::proto::registration;
use crate::proto::registration::registration_server::{Registration, RegistrationServer};
use crate::rpc::{self, Answer};

/// How often the socket is looked at.
const LOOK: Duration = Duration::from_secs(2);

/// The plugin as kubelet is told of it. A clone is the same one.
#[derive(Clone)]
pub struct Plugin {
    driver: Arc<str>,
    endpoint: Arc<str>,
    refusal: Arc<RwLock<Option<String>>>,
}

impl Plugin {
    /// The driver's name, and the path of its CSI socket as kubelet sees it.
    #[must_use]
    pub fn new(driver: &str, endpoint: &str) -> Self {
        Self { driver: driver.into(), endpoint: endpoint.into(), refusal: Arc::default() }
    }

    /// Whether kubelet has not refused the plugin.
    ///
    /// # Errors
    /// Why it has.
    pub fn ready(&self) -> Result<(), String> {
        match &*self.refusal.read().unwrap_or_else(PoisonError::into_inner) {
            Some(why) => Err(format!("kubelet does not register the driver: {why}")),
            None => Ok(()),
        }
    }

    /// Can be found in `directory` until it is dropped.
    ///
    /// # Errors
    /// No socket can be made there: [`rpc::listen`].
    pub async fn register(self, directory: &Path) -> io::Result<Infallible> {
        let path = directory.join(format!("reg@{}.sock", self.driver));
        let services = Routes::new(RegistrationServer::new(self));
        let _left = Left(&path);
        loop {
            let listener = rpc::listen(&path)?;
            tracing::info!(socket = %path.display(), "waiting for kubelet");
            tokio::select! {
                served = rpc::serve(listener, services.clone(), std::future::pending()) => {
                    served.map_err(io::Error::other)?;
                }
                () = gone(&path) => tracing::warn!(socket = %path.display(), "vanished; made again"),
            }
        }
    }
}

/// A socket that goes when nobody listens to it any more.
struct Left<'a>(&'a Path);

impl Drop for Left<'_> {
    fn drop(&mut self) {
        match std::fs::remove_file(self.0) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(socket = %self.0.display(), %error, "stays behind");
            }
            _ => {}
        }
    }
}

#[async_trait]
impl Registration for Plugin {
    async fn get_info(&self, _: Request<registration::InfoRequest>) -> Answer<registration::PluginInfo> {
        Ok(Response::new(registration::PluginInfo {
            r#type: "CSIPlugin".to_owned(),
            name: self.driver.to_string(),
            endpoint: self.endpoint.to_string(),
            supported_versions: vec!["1.0.0".to_owned()],
        }))
    }

    async fn notify_registration_status(
        &self,
        status: Request<registration::RegistrationStatus>,
    ) -> Answer<registration::RegistrationStatusResponse> {
        let registration::RegistrationStatus { plugin_registered, error } = status.into_inner();
        if plugin_registered {
            tracing::info!("registered with kubelet");
        } else {
            tracing::error!(error, "kubelet does not register the driver");
        }
        *self.refusal.write().unwrap_or_else(PoisonError::into_inner) = (!plugin_registered).then_some(error);
        Ok(Response::new(registration::RegistrationStatusResponse {}))
    }
}

/// Returns when nothing stands at `path`.
async fn gone(path: &Path) {
    loop {
        tokio::time::sleep(LOOK).await;
        let path = path.to_owned();
        if let Ok(false) = tokio::task::spawn_blocking(move || path.exists()).await {
            return;
        }
    }
}
