//! To be built.

use crate::reference::Encoding;
use crate::secret::SecretBytes;

/// Why not.
#[derive(Debug, thiserror::Error)]
#[error("x")]
pub struct ExtractError;

/// Cuts.
pub fn extract(_: &[u8], _: Option<&str>, _: Encoding) -> Result<SecretBytes, ExtractError> {
    Err(ExtractError)
}
