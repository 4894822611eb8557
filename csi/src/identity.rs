//! CSI Identity: which plugin this is, and whether it can work.

use tonic::{Request, Response, async_trait};

use crate::node::Volumes;
use crate::proto::csi;
use crate::proto::csi::identity_server::IdentityServer;
use crate::rpc::Answer;

/// The service.
pub struct Identity<V> {
    driver: String,
    volumes: V,
}

impl<V: Volumes> Identity<V> {
    /// Of the driver with this name, as the CSIDriver object has it.
    pub fn server(driver: String, volumes: V) -> IdentityServer<Self> {
        IdentityServer::new(Self { driver, volumes })
    }
}

#[async_trait]
impl<V: Volumes> csi::identity_server::Identity for Identity<V> {
    async fn get_plugin_info(
        &self,
        _: Request<csi::GetPluginInfoRequest>,
    ) -> Answer<csi::GetPluginInfoResponse> {
        let vendor_version = env!("CARGO_PKG_VERSION").to_owned();
        Ok(Response::new(csi::GetPluginInfoResponse { name: self.driver.clone(), vendor_version }))
    }

    async fn get_plugin_capabilities(
        &self,
        _: Request<csi::GetPluginCapabilitiesRequest>,
    ) -> Answer<csi::GetPluginCapabilitiesResponse> {
        Ok(Response::new(csi::GetPluginCapabilitiesResponse {}))
    }

    /// Ready while an agent is attached.
    async fn probe(&self, _: Request<csi::ProbeRequest>) -> Answer<csi::ProbeResponse> {
        Ok(Response::new(csi::ProbeResponse { ready: Some(self.volumes.ready().is_ok()) }))
    }
}
