//! Which request a login is, per credential, and what its answer gives.
//!
//! | credential | request | answer read from |
//! |---|---|---|
//! | JWT (kubernetes, jwt) | `POST auth/<mount>/login {role, jwt}` | `auth` |
//! | secret id (approle) | `POST auth/<mount>/login {role_id, secret_id}` | `auth` |
//! | token, token file | `GET auth/token/lookup-self`, to learn how long it lives | `data` |
//! | (renewal) | `POST auth/token/renew-self {}` | `auth` |

/// Credential files.
mod file;

use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use serde_json::value::RawValue;
use zeroize::Zeroizing;

use super::answer::json::bytes_of;
use super::error::Unusable;
use super::{Credential, Login};
use crate::reference::Auth;
use crate::secret::{SecretBytes, Token};

/// What a login asks of the store.
pub(super) enum Question {
    /// The login request, and the credential, so that no error quotes it.
    Login { path: String, body: SecretBytes, credential: Option<Token> },
    /// A token that is held already: how long does it live?
    Lookup { token: Token },
}

/// Builds the question; reads credential files off the async threads.
pub(super) async fn question(auth: &Auth, credential: &Credential) -> Result<Question, Unusable> {
    let path = format!("auth/{}/login", auth.mount.trim_matches('/'));
    let login = |first: (&str, &str), second: Option<(&str, Token)>| {
        let body = body(first, second.as_ref().map(|(name, token)| (*name, token)));
        Question::Login { path, body, credential: second.map(|(_, token)| token) }
    };
    Ok(match credential {
        Credential::Jwt(jwt) => login(("role", &auth.role), Some(("jwt", copy(jwt)?))),
        // Projected service-account tokens are made readable for the pod's users: nothing to warn of.
        Credential::JwtFile(path) => login(("role", &auth.role), Some(("jwt", read(path, false).await?))),
        Credential::SecretIdFile(None) => login(("role_id", &auth.role), None),
        Credential::SecretIdFile(Some(path)) => {
            login(("role_id", &auth.role), Some(("secret_id", read(path, true).await?)))
        }
        Credential::Token(token) => Question::Lookup { token: copy(token)? },
        Credential::TokenFile(path) => Question::Lookup { token: read(path, true).await? },
    })
}

/// Takes a token and its life out of the answer to a login or a renewal; `None`: there is none.
pub(super) fn granted(body: &[u8]) -> Option<Login> {
    #[derive(Deserialize)]
    struct Envelope<'a> {
        #[serde(borrow)]
        auth: Grant<'a>,
    }
    #[derive(Deserialize)]
    struct Grant<'a> {
        #[serde(borrow)]
        client_token: &'a RawValue,
        lease_duration: u64,
        #[serde(default)]
        renewable: bool,
    }
    let grant = serde_json::from_str::<Envelope<'_>>(std::str::from_utf8(body).ok()?).ok()?.auth;
    let token = token_of(&bytes_of(grant.client_token))?;
    Some(Login { token, renewable: grant.renewable, ttl: life(grant.lease_duration) })
}

/// Takes the life of a token that is held already out of the answer to `lookup-self`.
pub(super) fn looked_up(body: &[u8], token: Token) -> Option<Login> {
    #[derive(Deserialize)]
    struct Envelope {
        data: Data,
    }
    #[derive(Deserialize)]
    struct Data {
        ttl: u64,
        #[serde(default)]
        renewable: bool,
    }
    let data = serde_json::from_slice::<Envelope>(body).ok()?.data;
    Some(Login { token, renewable: data.renewable, ttl: life(data.ttl) })
}

/// A root token says 0 and lives for ever.
fn life(seconds: u64) -> Option<Duration> {
    (seconds > 0).then(|| Duration::from_secs(seconds))
}

/// `{"role": …, "jwt": …}` in a buffer that does not grow and is wiped. A token is visible ASCII, so that only quotes and
/// backslashes need an escape.
fn body(first: (&str, &str), second: Option<(&str, &Token)>) -> SecretBytes {
    let room = 32 + first.1.len() * 6 + second.map_or(0, |(_, token)| token.expose().len() * 2);
    let mut text = Zeroizing::new(String::with_capacity(room));
    text.push_str(&serde_json::json!({ first.0: first.1 }).to_string());
    if let Some((name, token)) = second {
        text.pop();
        text.extend([",\"", name, "\":\""]);
        for letter in token.expose().chars() {
            if matches!(letter, '"' | '\\') {
                text.push('\\');
            }
            text.push(letter);
        }
        text.push_str("\"}");
    }
    SecretBytes::new(std::mem::take(&mut *text).into_bytes())
}

fn copy(token: &Token) -> Result<Token, Unusable> {
    Token::new(token.expose().to_owned())
        .map_err(|error| Unusable { what: error.to_string(), remedy: "give the token again" })
}

fn token_of(bytes: &SecretBytes) -> Option<Token> {
    Token::new(std::str::from_utf8(bytes.expose()).ok()?.to_owned()).ok()
}

async fn read(path: &std::path::Path, private: bool) -> Result<Token, Unusable> {
    let path: PathBuf = path.to_owned();
    let name = path.display().to_string();
    tokio::task::spawn_blocking(move || file::read(&path, private)).await.unwrap_or_else(|_| {
        Err(Unusable { what: format!("cannot use {name}: the agent is ending"), remedy: "start it again" })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_login_body_is_json_whatever_the_role_and_the_token_hold() {
        let token = Token::new(r#"a"b\c.d"#.to_owned()).unwrap();
        let built = body(("role", "r\"ö\n"), Some(("jwt", &token)));
        let value: serde_json::Value = serde_json::from_slice(built.expose()).unwrap();
        assert_eq!(value, serde_json::json!({"role": "r\"ö\n", "jwt": r#"a"b\c.d"#}));
        let alone: serde_json::Value = serde_json::from_slice(body(("role_id", "x"), None).expose()).unwrap();
        assert_eq!(alone, serde_json::json!({"role_id": "x"}));
    }

    #[test]
    fn a_grant_without_a_token_is_none() {
        for body in [r#"{"auth":null}"#, r#"{"auth":{"client_token":"","lease_duration":1}}"#, "", "[]"] {
            assert!(granted(body.as_bytes()).is_none(), "{body}");
        }
        let login = granted(br#"{"auth":{"client_token":"hvs.x","lease_duration":0}}"#).unwrap();
        assert_eq!((login.token.expose(), login.ttl, login.renewable), ("hvs.x", None, false));
    }
}
