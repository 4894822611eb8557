//! Bodies both ways without copies that outlive them.

use bytes::Bytes;
use zeroize::{Zeroize as _, Zeroizing};

use crate::secret::SecretBytes;

/// Largest answer that is taken. Vault's own limit for a request is 32 MiB, but a KV value is at most 1 MiB with the
/// integrated storage, and a file of secrets beyond 4 MiB never worked with the existing drivers either.
pub(super) const LARGEST_ANSWER: usize = 4 << 20;

/// Room for an answer whose length is not announced; most fit.
const USUAL_ANSWER: usize = 4 << 10;

/// Why a body could not be read.
pub(super) enum BodyError {
    /// It is longer than [`LARGEST_ANSWER`].
    TooLarge,
    /// The connection broke.
    Broken(reqwest::Error),
}

/// A request's body that is wiped when the last user of it is done.
pub(super) fn outgoing(secret: SecretBytes) -> Bytes {
    struct Owner(SecretBytes);
    impl AsRef<[u8]> for Owner {
        fn as_ref(&self) -> &[u8] {
            self.0.expose()
        }
    }
    Bytes::from_owner(Owner(secret))
}

/// Reads an answer's body. A buffer that turns out too small is wiped when its content has moved.
pub(super) async fn incoming(response: &mut reqwest::Response) -> Result<SecretBytes, BodyError> {
    let announced = response
        .content_length()
        .map_or(USUAL_ANSWER, |length| usize::try_from(length).unwrap_or(usize::MAX));
    if announced > LARGEST_ANSWER {
        return Err(BodyError::TooLarge);
    }
    let mut body = Zeroizing::new(Vec::with_capacity(announced));
    while let Some(chunk) = response.chunk().await.map_err(BodyError::Broken)? {
        let length = body.len() + chunk.len();
        if length > LARGEST_ANSWER {
            return Err(BodyError::TooLarge);
        }
        if length > body.capacity() {
            let mut larger = Vec::with_capacity(length.max(body.capacity() * 2));
            larger.extend_from_slice(&body);
            std::mem::replace(&mut *body, larger).zeroize();
        }
        body.extend_from_slice(&chunk);
    }
    Ok(SecretBytes::new(std::mem::take(&mut *body)))
}
