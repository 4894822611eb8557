//! One message is one frame: a header of fixed length, then a payload of JSON.
//!
//! ```text
//!    0  magic        4  "FSCS"
//!    4  version      u16  1: of this framing, not of the programs
//!    6  kind         u16  which message (the table in `message`)
//!    8  id           u32  chosen by who asks; its answer carries the same
//!   12  length       u32  bytes of payload, at most 1 MiB
//!   16  descriptors  u16  how many come along as SCM_RIGHTS, at most 64
//!   18  reserved     u16  0; ignored by a reader
//! ```
//! All numbers little endian.
//!
//! Shim and agent are updated apart, so each meets older and newer ones of the other. Hence JSON, with two rules: a field
//! that a reader does not know is ignored, and one that a writer did not send has its default. A message that a reader does not
//! know is answered with `Message::Unsupported`, and the connection lives on. Only another framing ends it. A compact
//! encoding would save nothing that counts: a volume costs a handful of messages in its life.
//!
//! Reading never panics and takes nothing that is too long. No error repeats what was read: it may be a token.

/// Which kernels may be asked to send requests again.
pub mod handover;
/// A connection that speaks them.
pub mod link;
/// The messages, by kind.
pub mod message;

pub use message::{Message, Secret};

use std::io::{self, Write};

use zeroize::Zeroizing;

/// Bytes of a header.
pub const HEADER: usize = 20;
/// The framing that is spoken.
pub const VERSION: u16 = 1;
/// Longest payload in bytes: a class and a pod's tokens are a hundredth of it, and what Kubernetes stores is not larger.
pub const LONGEST: usize = 1 << 20;
/// Most descriptors of one message: the kernel takes 253, and a volume has a dozen (one mount, at most ten generations).
pub const MOST_DESCRIPTORS: u16 = 64;

const MAGIC: [u8; 4] = *b"FSCS";

/// Why a frame was not taken. Says nothing of its content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The other side speaks something else: close the connection.
    #[error("not a frame of fuse-secrets")]
    Magic,
    /// Another framing: close the connection.
    #[error(
        "frames of version {0}, this program reads version {VERSION}: update the older of shim and agent"
    )]
    Version(u16),
    /// More than is allowed: close the connection.
    #[error("a payload of {0} bytes, at most {LONGEST} are taken")]
    TooLong(usize),
    /// More than is allowed: close the connection.
    #[error("{0} descriptors, at most {MOST_DESCRIPTORS} are taken")]
    Descriptors(usize),
    /// The payload is not as long as its header says.
    #[error("a payload that is not as long as announced")]
    Length,
    /// A message of a newer program: answer with [`Header::unsupported`].
    #[error("a message of kind {0}, which this program does not know")]
    Unsupported(u16),
    /// The payload is not what its kind asks for.
    #[error("a message of kind {0} whose payload cannot be read")]
    Payload(u16),
}

/// What stands before a payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Which message.
    pub kind: u16,
    /// Ties an answer to its question.
    pub id: u32,
    /// Bytes of payload that follow.
    pub length: usize,
    /// Descriptors that come along.
    pub descriptors: u16,
}

impl Header {
    /// Reads a header, and so tells how much is still to come.
    ///
    /// # Errors
    /// [`Fault::Magic`], [`Fault::Version`], [`Fault::TooLong`], [`Fault::Descriptors`]
    pub fn decode(bytes: &[u8; HEADER]) -> Result<Self, Fault> {
        let [a, b, c, d, v0, v1, k0, k1, i0, i1, i2, i3, l0, l1, l2, l3, d0, d1, _, _] = *bytes;
        if [a, b, c, d] != MAGIC {
            return Err(Fault::Magic);
        }
        let version = u16::from_le_bytes([v0, v1]);
        if version != VERSION {
            return Err(Fault::Version(version));
        }
        let length = usize::try_from(u32::from_le_bytes([l0, l1, l2, l3])).unwrap_or(usize::MAX);
        let descriptors = u16::from_le_bytes([d0, d1]);
        if length > LONGEST {
            return Err(Fault::TooLong(length));
        }
        if descriptors > MOST_DESCRIPTORS {
            return Err(Fault::Descriptors(descriptors.into()));
        }
        let (kind, id) = (u16::from_le_bytes([k0, k1]), u32::from_le_bytes([i0, i1, i2, i3]));
        Ok(Self { kind, id, length, descriptors })
    }

    /// Reads the payload that follows this header.
    ///
    /// # Errors
    /// [`Fault::Length`], [`Fault::Unsupported`], [`Fault::Payload`]
    pub fn open(&self, payload: &[u8]) -> Result<Message, Fault> {
        if payload.len() != self.length {
            return Err(Fault::Length);
        }
        Message::read(self.kind, payload)
    }

    /// The answer to a message that this program does not know.
    #[must_use]
    pub fn unsupported(&self) -> Message {
        Message::Unsupported(message::Unsupported { kind: self.kind })
    }
}

/// Writes a frame. The buffer is as long as the frame from the start, so that no copy of a token stays behind as it grows, and is
/// wiped when it is dropped.
///
/// # Errors
/// [`Fault::TooLong`], [`Fault::Descriptors`]
pub fn encode(id: u32, message: &Message, descriptors: usize) -> Result<Zeroizing<Vec<u8>>, Fault> {
    let carried = u16::try_from(descriptors).ok().filter(|count| *count <= MOST_DESCRIPTORS);
    let carried = carried.ok_or(Fault::Descriptors(descriptors))?;
    let kind = message.kind();
    let mut count = Count::default();
    message.write(&mut count).map_err(|_| Fault::Payload(kind))?;
    let length = u32::try_from(count.0).ok().filter(|_| count.0 <= LONGEST);
    let length = length.ok_or(Fault::TooLong(count.0))?;
    let mut frame = Zeroizing::new(Vec::with_capacity(HEADER + count.0));
    frame.extend(MAGIC);
    frame.extend(VERSION.to_le_bytes());
    frame.extend(kind.to_le_bytes());
    frame.extend(id.to_le_bytes());
    frame.extend(length.to_le_bytes());
    frame.extend(carried.to_le_bytes());
    frame.extend([0, 0]);
    message.write(&mut *frame).map_err(|_| Fault::Payload(kind))?;
    Ok(frame)
}

/// Counts the bytes that are written to it: what is to hold a secret is made as long as it must be, and never grows.
#[derive(Debug, Default)]
pub struct Count(pub usize);

impl Write for Count {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
