//! Values that can be checked: each carries its version, its length and a checksum, so that a torn or foreign one is known.

use serde::{Deserialize, Serialize};

const HEADER: usize = 16;

/// What a file is to hold.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Content {
    /// This text.
    Text(String),
    /// A value with this version and length, at least 16 bytes.
    Stamped {
        /// Its version.
        version: u32,
        /// Bytes in all.
        length: usize,
    },
    /// So many bytes in which every place differs.
    Pattern(usize),
    /// Nothing: the value was given up.
    Gone,
}

impl Content {
    /// The bytes; `None` if given up.
    #[must_use]
    pub fn bytes(&self) -> Option<Vec<u8>> {
        match self {
            Self::Text(text) => Some(text.clone().into_bytes()),
            Self::Stamped { version, length } => Some(stamp(*version, *length)),
            Self::Pattern(length) => Some(pattern(0, *length)),
            Self::Gone => None,
        }
    }
}

impl From<&str> for Content {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

/// A value with version, length, checksum.
#[must_use]
pub fn stamp(version: u32, length: usize) -> Vec<u8> {
    let body = pattern(version, length.max(HEADER) - HEADER);
    let mut value = b"stmp".to_vec();
    value.extend(version.to_le_bytes());
    value.extend(u32::try_from(body.len()).unwrap().to_le_bytes());
    value.extend(crc32fast::hash(&body).to_le_bytes());
    value.extend(body);
    value
}

/// The version of an intact value.
///
/// # Errors
/// What is wrong with it.
pub fn check(value: &[u8]) -> Result<u32, String> {
    let word = |at: usize| -> Result<u32, String> {
        let bytes = value.get(at..at + 4).ok_or_else(|| format!("only {} bytes", value.len()))?;
        Ok(u32::from_le_bytes(bytes.try_into().unwrap()))
    };
    if !value.starts_with(b"stmp") {
        return Err("begins with something else".to_owned());
    }
    let (version, length, sum) = (word(4)?, word(8)? as usize, word(12)?);
    let body = &value[HEADER..];
    if body.len() != length {
        return Err(format!("version {version} says {length} bytes, {} came", body.len()));
    }
    if crc32fast::hash(body) != sum {
        return Err(format!("version {version} has bytes of another"));
    }
    Ok(version)
}

fn pattern(seed: u32, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12_345);
    let mut bytes = Vec::with_capacity(length + 4);
    while bytes.len() < length {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        bytes.extend((state ^ state >> 15).to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_mixed_from_two_versions_is_known() {
        let (old, new) = (stamp(1, 5_000), stamp(2, 5_000));
        assert_eq!((check(&old), check(&new)), (Ok(1), Ok(2)));
        let torn: Vec<u8> = old[..4_096].iter().chain(&new[4_096..]).copied().collect();
        assert!(check(&torn).is_err());
        assert!(check(&old[..4_999]).is_err());
        assert!(check(b"").is_err());
    }
}
