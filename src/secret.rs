//! Secret types. None of them has `Debug`, `Display`, `Clone` or `Serialize`; each is wiped when it is dropped.
//!
//! | where a secret is | type | memory |
//! |---|---|---|
//! | on its way (an HTTP answer, a token) | `SecretBytes`, `Token` | heap, wiped by the type and again by `sys::alloc::Wiping` |
//! | at rest, shared | `arena::Blob` | packed into secret pages |
//! | at rest, in a volume | a generation's snapshot | `pages::Pages` of its own |
//! | on its way into the kernel | a buffer of `bounce::Pool` | locked ordinary pages, wiped after each reply |

/// Many small secrets packed into few secret pages.
pub mod arena;
/// Locked ordinary memory for replies: the kernel cannot read from secret pages.
pub mod bounce;
#[cfg(test)]
pub(crate) mod child;
/// The process closed to dumps, tracers and swap.
pub mod harden;
/// How much memory this process may lock.
pub mod locked;
/// Pages of `memfd_secret(2)`, or of locked memory where the kernel has none; counted against a limit.
pub mod pages;

use zeroize::{Zeroize, Zeroizing};

/// Overwrites with zeros, in a way that the compiler must not leave out.
pub fn wipe(bytes: &mut [u8]) {
    zeroize::zeroize_bytes(bytes);
}

/// Bytes that are wiped on drop. Made by moving a buffer in, never by copying from a longer-lived one.
pub struct SecretBytes(Zeroizing<Vec<u8>>);

impl SecretBytes {
    /// Takes over a buffer. Its whole capacity is wiped on drop.
    #[must_use]
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// The bytes. The name marks each place where secret bytes are looked at.
    #[must_use]
    pub fn expose(&self) -> &[u8] {
        &self.0
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is no byte; an empty secret is a legal one.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// A token of a store or of a service account: visible ASCII, so that it can stand in an HTTP header.
pub struct Token(Zeroizing<String>);

/// A token that cannot be one: empty, or with bytes that no header can carry. Says nothing of the bytes.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("not a token: it must be one line of visible ASCII and not empty")]
pub struct NotAToken;

impl Token {
    /// Checks and takes over the text; blanks and newlines around it are cut, as token files end with one.
    ///
    /// # Errors
    /// [`NotAToken`]: empty, or a byte outside visible ASCII.
    pub fn new(mut text: String) -> Result<Self, NotAToken> {
        let trimmed = Zeroizing::new(text.trim().to_owned());
        text.zeroize();
        if trimmed.is_empty() || !trimmed.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(NotAToken);
        }
        Ok(Self(trimmed))
    }

    /// The token's text. The name marks each place where it is looked at.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}
