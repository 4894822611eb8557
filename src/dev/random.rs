//! Names that nobody can guess: from the system's generator, reseeded by `rand`.

use rand::RngExt as _;
use rand::distr::Alphanumeric;

use crate::secret::Token;

/// A random version 4 UUID.
pub(super) fn uuid() -> String {
    let mut bytes: [u8; 16] = rand::rng().random();
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let text = hex::encode(bytes);
    format!("{}-{}-{}-{}-{}", &text[..8], &text[8..12], &text[12..16], &text[16..20], &text[20..])
}

/// 24 random letters and digits: 142 bits.
pub(super) fn name() -> String {
    rand::rng().sample_iter(Alphanumeric).take(24).map(char::from).collect()
}

/// A token in the form of the API's service tokens.
pub(super) fn token() -> Result<Token, crate::secret::NotAToken> {
    Token::new(format!("hvs.{}", name()))
}
