//! JSON text taken apart without building values: a member stays a slice of the body until it is wanted.

use std::borrow::Cow;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use crate::secret::SecretBytes;

/// The members of one JSON object in their order; a name that stands twice is here twice (readers take the last).
pub(crate) struct Members<'a>(pub(crate) Vec<(Cow<'a, str>, &'a RawValue)>);

impl<'de: 'a, 'a> Deserialize<'de> for Members<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Vec<(Cow<'de, str>, &'de RawValue)>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(members)
            }
        }
        deserializer.deserialize_map(Object).map(Members)
    }
}

/// Whether the text is an object; raw values carry no blanks in front.
pub(crate) fn is_object(value: &RawValue) -> bool {
    value.get().starts_with('{')
}

/// The bytes of a JSON value: a string without its quotes and escapes, anything else as its JSON text. They are written
/// once, into a buffer that never grows: no escape is shorter than what it stands for. A lone surrogate becomes U+FFFD,
/// as in the stores' own JSON library.
pub(crate) fn bytes_of(value: &RawValue) -> SecretBytes {
    let text = value.get();
    let Some(inner) = text.strip_prefix('"').and_then(|text| text.strip_suffix('"')) else {
        return SecretBytes::new(text.as_bytes().to_vec());
    };
    let mut bytes = Vec::with_capacity(inner.len());
    let mut rest = inner;
    while let Some(at) = rest.find('\\') {
        bytes.extend_from_slice(&rest.as_bytes()[..at]);
        let escape = &rest.as_bytes()[at..];
        let mut length = 2;
        match escape.get(1) {
            Some(b'b') => bytes.push(0x08),
            Some(b'f') => bytes.push(0x0c),
            Some(b'n') => bytes.push(b'\n'),
            Some(b'r') => bytes.push(b'\r'),
            Some(b't') => bytes.push(b'\t'),
            Some(b'u') => {
                let (letter, taken) = code_point(escape);
                length = taken;
                bytes.extend_from_slice(letter.encode_utf8(&mut [0; 4]).as_bytes());
            }
            // `"`, `\` and `/` stand for themselves; nothing else gets through the parser.
            other => bytes.extend(other),
        }
        rest = rest.get(at + length..).unwrap_or_default();
    }
    bytes.extend_from_slice(rest.as_bytes());
    SecretBytes::new(bytes)
}

/// The character of `\uXXXX` or of a surrogate pair, and how many bytes of text it took.
fn code_point(escape: &[u8]) -> (char, usize) {
    let unit = |at: usize| {
        (escape.get(at..at + 2)? == b"\\u").then_some(())?;
        let digits = std::str::from_utf8(escape.get(at + 2..at + 6)?).ok()?;
        u32::from_str_radix(digits, 16).ok()
    };
    let high = unit(0).unwrap_or(0xFFFD);
    if let (0xD800..0xDC00, Some(low @ 0xDC00..0xE000)) = (high, unit(6)) {
        let pair = 0x1_0000 + ((high - 0xD800) << 10) + (low - 0xDC00);
        return (char::from_u32(pair).unwrap_or(char::REPLACEMENT_CHARACTER), 12);
    }
    (char::from_u32(high).unwrap_or(char::REPLACEMENT_CHARACTER), 6)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bytes(json: &str) -> Vec<u8> {
        bytes_of(serde_json::from_str(json).unwrap()).expose().to_vec()
    }

    #[test]
    fn escapes_become_what_they_stand_for() {
        assert_eq!(bytes(r#""a\"b\\c\/d\b\f\n\r\té€""#), "a\"b\\c/d\u{8}\u{c}\n\r\té€".as_bytes());
        assert_eq!(bytes(r#""\ud83d\ude00.""#), "😀.".as_bytes());
    }

    #[test]
    fn a_lone_surrogate_becomes_the_replacement_character() {
        assert_eq!(bytes(r#""x\ud83d""#), "x\u{FFFD}".as_bytes());
        assert_eq!(bytes(r#""\ud83dA\ude00""#), "\u{FFFD}A\u{FFFD}".as_bytes());
    }

    #[test]
    fn other_values_stay_json_text() {
        for text in ["5432", "true", "null", r#"{"a": 1}"#, "[1,2]", "-1.5e3"] {
            assert_eq!(bytes(text), text.as_bytes());
        }
    }

    proptest! {
        #[test]
        fn any_text_survives_the_way_through_json(text in any::<String>()) {
            prop_assert_eq!(bytes(&serde_json::to_string(&text).unwrap()), text.as_bytes());
            let escaped: String =
                std::iter::once('"').map(String::from)
                    .chain(text.encode_utf16().map(|unit| format!("\\u{unit:04x}")))
                    .chain(["\"".to_owned()]).collect();
            prop_assert_eq!(bytes(&escaped), text.as_bytes());
        }
    }
}
