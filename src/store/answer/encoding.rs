//! From the text of a value to the bytes of a file.

use base64::Engine as _;
use base64::alphabet::STANDARD;
use base64::engine::{GeneralPurpose, GeneralPurposeConfig};
use zeroize::Zeroizing;

use super::ExtractError;
use crate::reference::Encoding;
use crate::secret::SecretBytes;

/// Standard alphabet, padding required. Loose bits behind the last byte are let through, as the existing providers do.
const BASE64: GeneralPurpose =
    GeneralPurpose::new(&STANDARD, GeneralPurposeConfig::new().with_decode_allow_trailing_bits(true));

/// Decodes a value's text.
pub(super) fn decode(text: SecretBytes, encoding: Encoding) -> Result<SecretBytes, ExtractError> {
    match encoding {
        Encoding::Utf8 => Ok(text),
        Encoding::Base64 => base64(text.expose()),
        Encoding::Hex => hex(text.expose()),
    }
}

fn base64(text: &[u8]) -> Result<SecretBytes, ExtractError> {
    let is_break = |byte: u8| matches!(byte, b'\r' | b'\n');
    let mut digits = Zeroizing::new(Vec::with_capacity(text.len()));
    digits.extend(text.iter().copied().filter(|byte| !is_break(*byte)));
    let mut bytes = Zeroizing::new(vec![0; base64::decoded_len_estimate(digits.len())]);
    match BASE64.decode_slice(&*digits, &mut bytes) {
        Ok(length) => {
            bytes.truncate(length);
            Ok(SecretBytes::new(std::mem::take(&mut *bytes)))
        }
        Err(error) => {
            use base64::DecodeError::{InvalidByte, InvalidLastSymbol};
            let base64::DecodeSliceError::DecodeError(error) = error else {
                return Err(not("base64", "its length is impossible", None));
            };
            // The decoder counts without line breaks; people count with them.
            let position = |digit: usize| {
                text.iter().enumerate().filter(|(_, byte)| !is_break(**byte)).nth(digit).map(|(at, _)| at)
            };
            Err(match error {
                InvalidByte(at, _) => not("base64", "a byte is outside the standard alphabet", position(at)),
                InvalidLastSymbol { .. } => not("base64", "it does not end on a whole byte", None),
                _ => not("base64", "its length or padding is wrong (padding with = is required)", None),
            })
        }
    }
}

fn hex(text: &[u8]) -> Result<SecretBytes, ExtractError> {
    let mut bytes = Zeroizing::new(vec![0; text.len() / 2]);
    match hex::decode_to_slice(text, &mut bytes) {
        Ok(()) => Ok(SecretBytes::new(std::mem::take(&mut *bytes))),
        Err(hex::FromHexError::InvalidHexCharacter { index, .. }) => {
            Err(not("hex", "a byte is not a hexadecimal digit", Some(index)))
        }
        Err(_) => Err(not("hex", "the number of digits is odd", None)),
    }
}

fn not(encoding: &'static str, problem: &'static str, position: Option<usize>) -> ExtractError {
    ExtractError::Encoding { encoding, problem, position }
}
