//! The record: what a volume asked for, and its token, for whoever serves it next. In secret pages of its own, so that a fresh
//! token rewrites nothing else.
//!
//! ```text
//!   0  magic     8  "fuserec\0"
//!   8  version   u32  1: of this frame
//!  12  checksum  u32  CRC-32 of the text
//!  16  length    u64  of the text
//!  24  the text: JSON. A field that a reader does not know is ignored, one that a writer did not have takes its default
//! ```
//! Numbers little endian. No error repeats what was read: it may be the token.

use std::sync::Arc;

use fuse_secrets_csi::wire::Count;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::Pod;
use crate::reference::VolumeSpec;
use crate::secret::Token;
use crate::secret::pages::{MemoryError, Pages, SecretMemory, Sharing};

const MAGIC: &[u8; 8] = b"fuserec\0";
const VERSION: u32 = 1;
const HEADER: usize = 24;

/// What was negotiated when the mount was made, and holds for as long as it lives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Init {
    /// The kernel's minor version of the FUSE protocol.
    pub minor: u32,
    /// The flags in force.
    pub flags: u64,
}

/// A record to be written.
#[derive(Clone, Copy, Serialize)]
pub struct Draft<'a> {
    /// What was asked for.
    pub spec: &'a VolumeSpec,
    /// Whose it is.
    pub pod: Option<&'a Pod>,
    /// The pod's group.
    pub group: Option<u32>,
    /// Where it is mounted, for people.
    pub target: &'a str,
    /// What was negotiated.
    pub init: Init,
    /// The pod's token.
    #[serde(serialize_with = "expose")]
    pub token: &'a Token,
}

/// A record that was read.
#[derive(Deserialize)]
pub struct Record {
    /// What was asked for.
    pub spec: VolumeSpec,
    /// Whose it is.
    pub pod: Option<Pod>,
    /// The pod's group.
    pub group: Option<u32>,
    /// Where it is mounted.
    #[serde(default)]
    pub target: String,
    /// What was negotiated.
    #[serde(default)]
    pub init: Init,
    /// The pod's token.
    #[serde(deserialize_with = "token")]
    pub token: Token,
}

/// A record that cannot be read. Says nothing of its content.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum RecordError {
    /// Not a record, or damaged.
    #[error("broken record: {0}")]
    Broken(&'static str),
    /// A later frame.
    #[error("record of format {0}, this program reads up to {VERSION}")]
    Version(u32),
}

impl Draft<'_> {
    /// Writes it into lent pages.
    ///
    /// # Errors
    /// [`MemoryError`]
    pub fn write(&self, memory: &Arc<SecretMemory>) -> Result<Pages, MemoryError> {
        let unwritable = |error: serde_json::Error| MemoryError::Kernel(error.into());
        let mut count = Count::default();
        serde_json::to_writer(&mut count, self).map_err(unwritable)?;
        let mut pages = memory.allocate(HEADER + count.0, Sharing::Lent)?;
        let (header, mut text) = pages.expose_mut().split_at_mut(HEADER);
        serde_json::to_writer(&mut text, self).map_err(unwritable)?;
        header[..8].copy_from_slice(MAGIC);
        header[8..12].copy_from_slice(&VERSION.to_le_bytes());
        header[16..24].copy_from_slice(&(count.0 as u64).to_le_bytes());
        let checksum = crc32fast::hash(&pages.expose()[HEADER..]);
        pages.expose_mut()[12..16].copy_from_slice(&checksum.to_le_bytes());
        pages.seal();
        Ok(pages)
    }
}

impl Record {
    /// Reads pages that hold a record, whoever wrote it.
    ///
    /// # Errors
    /// [`RecordError`]
    pub fn read(pages: &Pages) -> Result<Self, RecordError> {
        use RecordError::Broken;
        let (header, rest) = pages.expose().split_first_chunk::<HEADER>().ok_or(Broken("its header"))?;
        let [v0, v1, v2, v3, c0, c1, c2, c3] = *header[8..].first_chunk().ok_or(Broken("its header"))?;
        if &header[..8] != MAGIC {
            return Err(Broken("wrong magic"));
        }
        let version = u32::from_le_bytes([v0, v1, v2, v3]);
        if version != VERSION {
            return Err(RecordError::Version(version));
        }
        let length = header.last_chunk().map_or(0, |length| u64::from_le_bytes(*length));
        let text =
            usize::try_from(length).ok().and_then(|length| rest.get(..length)).ok_or(Broken("its length"))?;
        if crc32fast::hash(text) != u32::from_le_bytes([c0, c1, c2, c3]) {
            return Err(Broken("wrong checksum"));
        }
        // The parser's own errors quote what they read.
        let record: Self = serde_json::from_slice(text).map_err(|_| Broken("its text"))?;
        if record.spec.files.is_empty() || record.spec.identity.connection.addresses.is_empty() {
            return Err(Broken("it asks for nothing"));
        }
        Ok(record)
    }
}

/// The only way for a token into a record.
fn expose<S: Serializer>(token: &&Token, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(token.expose())
}

fn token<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Token, D::Error> {
    Token::new(String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::{Encoding, FilePath, FileSpec, Freshness, Method, Ownership, Request};
    use crate::store::scripted::identity;
    use proptest::prelude::*;
    use std::time::Duration;

    /// What version 1 of the program writes. Later versions must read it: this file is never changed.
    const RECORDED: &str = include_str!("../../tests/record-v1.hex");

    fn spec() -> VolumeSpec {
        let file = |path: &str, method, key: Option<&str>| FileSpec {
            path: FilePath::parse(path).unwrap(),
            request: Request {
                method,
                path: "secret/data/app".into(),
                query: Some("version=3".into()),
                args: None,
            },
            key: key.map(str::to_owned),
            encoding: Encoding::Base64,
            ownership: Ownership { uid: Some(999), gid: None, mode: Some(0o400) },
        };
        VolumeSpec {
            class: "shop/database".into(),
            identity: identity(),
            files: vec![file("a", Method::Get, Some("k")), file("d/b", Method::Post, None)],
            freshness: Freshness { stale_grace: Some(Duration::from_secs(90)), ..Freshness::default() },
            ownership: Ownership::default(),
        }
    }

    fn sample(memory: &Arc<SecretMemory>) -> Pages {
        let (name, namespace, account) = ("web-1".into(), "shop".into(), "web".into());
        let pod = Pod { name, namespace, service_account: account, uid: String::new() };
        let token = Token::new("header.body.signature".into()).unwrap();
        let (spec, init) = (spec(), Init { minor: 45, flags: 1 << 40 });
        let (pod, group, target) = (Some(&pod), Some(2000), "/var/lib/kubelet/pods/u/volumes/mount");
        Draft { spec: &spec, pod, group, target, init, token: &token }.write(memory).unwrap()
    }

    fn is_the_sample(record: &Record) {
        assert_eq!(record.spec, spec());
        assert_eq!(record.pod.as_ref().unwrap().namespace, "shop");
        assert_eq!((record.group, record.init), (Some(2000), Init { minor: 45, flags: 1 << 40 }));
        assert_eq!(record.target, "/var/lib/kubelet/pods/u/volumes/mount");
        assert!(record.token.expose() == "header.body.signature");
    }

    fn pages(memory: &Arc<SecretMemory>, bytes: &[u8]) -> Pages {
        let mut pages = memory.allocate(bytes.len(), Sharing::Own).unwrap();
        pages.expose_mut().copy_from_slice(bytes);
        pages
    }

    fn framed(text: &str) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(crc32fast::hash(text.as_bytes()).to_le_bytes());
        bytes.extend((text.len() as u64).to_le_bytes());
        bytes.extend(text.as_bytes());
        bytes
    }

    #[test]
    fn a_record_is_read_back_from_its_file() {
        let memory = SecretMemory::new().unwrap();
        let file = sample(&memory).file().unwrap().try_clone_to_owned().unwrap();
        is_the_sample(&Record::read(&memory.adopt(file).unwrap()).unwrap());
    }

    #[test]
    fn a_record_of_version_1_is_read_by_this_and_every_later_version() {
        let memory = SecretMemory::new().unwrap();
        let bytes = hex::decode(RECORDED.split_whitespace().collect::<String>()).unwrap();
        is_the_sample(&Record::read(&pages(&memory, &bytes)).unwrap());
    }

    #[test]
    fn what_a_newer_program_added_is_ignored_and_what_an_older_one_lacked_has_its_default() {
        let memory = SecretMemory::new().unwrap();
        let text = r#"{"spec":{"class":"c","identity":{"connection":{"addresses":["https://s:8200"]},
            "auth":{"method":"jwt","mount":"jwt","role":"r"},"subject":{"local":"x"},"new":1},
            "files":[{"path":"a","request":{"path":"p"},"new":{}}],"freshness":{}},"token":"t","new":[1]}"#;
        let record = Record::read(&pages(&memory, &framed(text))).unwrap();
        assert_eq!(record.spec.freshness, Freshness::default());
        assert_eq!((record.group, record.target.as_str(), record.pod), (None, "", None));
    }

    #[test]
    fn a_path_that_leads_out_of_the_volume_is_no_record() {
        let memory = SecretMemory::new().unwrap();
        let good = String::from_utf8(sample(&memory).expose()[HEADER..].to_vec()).unwrap();
        assert!(Record::read(&pages(&memory, &framed(&good))).is_ok());
        let bad = good.replace(r#""path":"d/b""#, r#""path":"../b""#);
        assert!(bad != good && Record::read(&pages(&memory, &framed(&bad))).is_err());
    }

    proptest! {
        #[test]
        fn no_damaged_record_is_read_and_no_error_tells_of_the_token(at in 0usize..600, flip in 1u8..) {
            let memory = SecretMemory::new().unwrap();
            let mut bytes = sample(&memory).expose().to_vec();
            let at = at % bytes.len();
            bytes[at] ^= flip;
            let error = Record::read(&pages(&memory, &bytes)).err().unwrap();
            prop_assert!(!error.to_string().contains("body"));
        }

        #[test]
        fn any_text_is_refused_or_read_without_a_panic(text in ".{0,200}") {
            let memory = SecretMemory::new().unwrap();
            let _ = Record::read(&pages(&memory, &framed(&text)));
        }
    }
}
