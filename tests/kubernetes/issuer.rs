//! Whose tokens are good: an issuer with real keys, tokens that it signed, and tokens that others made.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use aws_lc_rs::encoding::{AsDer as _, PublicKeyX509Der};
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED_SIGNING, ECDSA_P384_SHA384_FIXED_SIGNING, EcdsaKeyPair, EcdsaSigningAlgorithm,
    KeyPair as _,
};
use axum::http::StatusCode;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use fuse_secrets::kubernetes::issuer::{Forged, Issuer, Verdict};
use fuse_secrets::kubernetes::token::Claims;
use fuse_secrets::secret::Token;
use fuse_secrets::volume::Pod;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde_json::{Value, json};

use crate::api::{Server, metrics, until};

const ISSUER: &str = "https://kubernetes.default.svc";

/// A signing key with its name.
struct Key {
    kid: &'static str,
    algorithm: Algorithm,
    private: EncodingKey,
    public: Vec<u8>,
    jwk: Value,
}

impl Key {
    fn new(kid: &'static str) -> Self {
        Self::of(kid, Algorithm::ES256, &ECDSA_P256_SHA256_FIXED_SIGNING, "P-256")
    }

    fn of(kid: &'static str, algorithm: Algorithm, of: &'static EcdsaSigningAlgorithm, curve: &str) -> Self {
        let pair = EcdsaKeyPair::generate(of).unwrap();
        let private = EncodingKey::from_ec_der(pair.to_pkcs8v1().unwrap().as_ref());
        let point = pair.public_key().as_ref();
        let (x, y) = point[1..].split_at(point.len() / 2);
        let [x, y] = [x, y].map(|part| URL_SAFE_NO_PAD.encode(part));
        let jwk = json!({
            "use": "sig", "kty": "EC", "kid": kid, "crv": curve, "alg": format!("{algorithm:?}"), "x": x, "y": y,
        });
        let public: PublicKeyX509Der<'_> = pair.public_key().as_der().unwrap();
        Self { kid, algorithm, private, public: public.as_ref().to_vec(), jwk }
    }

    fn sign(&self, claims: &Value) -> Token {
        self.sign_as(self.kid, claims)
    }

    fn sign_as(&self, kid: &str, claims: &Value) -> Token {
        let header = Header { kid: Some(kid.to_owned()), ..Header::new(self.algorithm) };
        token(jsonwebtoken::encode(&header, claims, &self.private).unwrap())
    }
}

fn token(text: String) -> Token {
    Token::new(text).unwrap()
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

/// Those of a good token, as kubelet gets one.
fn claims() -> Value {
    json!({
        "iss": ISSUER, "aud": ["vault"], "sub": "system:serviceaccount:app:web",
        "iat": now(), "nbf": now(), "exp": now() + 3600, "jti": "1",
        "kubernetes.io": {
            "namespace": "app", "serviceaccount": {"name": "web", "uid": "account-1"}, "pod": {"name": "web-0", "uid": "pod-1"},
        },
    })
}

fn with(claim: &str, value: Value) -> Value {
    let mut claims = claims();
    claims[claim] = value;
    claims
}

fn publish(server: &Server, keys: &[&Key]) {
    let keys: Vec<&Value> = keys.iter().map(|key| &key.jwk).collect();
    let configuration = json!({"issuer": ISSUER, "jwks_uri": "https://elsewhere/openid/v1/jwks"});
    server.world().issuer = Some((configuration, json!({ "keys": keys })));
}

/// An issuer with one key, known.
async fn issuer() -> (Server, Key, Arc<Issuer>) {
    let (server, key) = (Server::start().await, Key::new("first"));
    publish(&server, &[&key]);
    let metrics = metrics();
    let issuer = Issuer::start(server.api(), metrics.clone());
    until("the keys", || metrics.issuer_keys.value() == 1).await;
    (server, key, issuer)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_the_issuer_signed_for_this_audience_is_good_and_nobody_is_asked() {
    let (server, key, issuer) = issuer().await;
    let asked = server.world().asked.len();
    assert_eq!(issuer.verify(&key.sign(&claims()), "vault").await, Ok(Verdict::Signed));
    // The issuer's own audience, whatever it is called.
    assert_eq!(issuer.verify(&key.sign(&claims()), "").await, Ok(Verdict::Signed));
    let without_nbf = {
        let mut claims = claims();
        claims.as_object_mut().unwrap().remove("nbf");
        claims
    };
    assert_eq!(issuer.verify(&key.sign(&without_nbf), "vault").await, Ok(Verdict::Signed));
    assert_eq!(issuer.verify(&key.sign(&with("exp", json!(now() - 30))), "vault").await, Ok(Verdict::Signed));
    assert_eq!(server.world().asked.len(), asked);
}

#[tokio::test(flavor = "multi_thread")]
async fn forged_tokens_are_refused_each_with_the_claim_that_is_wrong() {
    let (server, key, issuer) = issuer().await;
    let other = Key::new("first");
    let signed = key.sign(&claims());
    let parts: Vec<&str> = signed.expose().split('.').collect();
    let encode = |value: Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let unsigned = |algorithm: &str| {
        let header = encode(json!({"alg": algorithm, "typ": "JWT", "kid": "first"}));
        token(format!("{header}.{}.", parts[1]))
    };
    // Signed with what everybody knows.
    let hmac = |secret: &[u8]| {
        let header = Header { kid: Some("first".to_owned()), ..Header::new(Algorithm::HS256) };
        token(jsonwebtoken::encode(&header, &claims(), &EncodingKey::from_secret(secret)).unwrap())
    };
    let changed = encode(with("kubernetes.io", json!({"namespace": "other"})));
    let without_kid =
        token(jsonwebtoken::encode(&Header::new(Algorithm::ES256), &claims(), &key.private).unwrap());
    let pem = format!(
        "-----BEGIN PUBLIC KEY-----\n{}\n-----END PUBLIC KEY-----\n",
        base64::engine::general_purpose::STANDARD.encode(&key.public)
    );
    for (what, token, forged) in [
        ("self-signed under the issuer's kid", other.sign(&claims()), Forged::Signature),
        (
            "other claims under the same signature",
            token(format!("{}.{changed}.{}", parts[0], parts[2])),
            Forged::Signature,
        ),
        ("no signature", token(format!("{}.{}.", parts[0], parts[1])), Forged::Signature),
        ("alg none", unsigned("none"), Forged::Header),
        ("alg None", unsigned("None"), Forged::Header),
        ("alg HS256 without a signature", unsigned("HS256"), Forged::Header),
        ("HS256 with the public key's DER", hmac(&key.public), Forged::Header),
        ("HS256 with the public key's PEM", hmac(pem.as_bytes()), Forged::Header),
        ("another family under an EC key", unsigned("RS256"), Forged::Header),
        ("another size under an EC key", unsigned("ES384"), Forged::Header),
        ("no kid", without_kid, Forged::Header),
        ("no JWT", token("no-jwt".to_owned()), Forged::Header),
        ("another issuer", key.sign(&with("iss", json!("https://evil"))), Forged::Issuer),
        ("no issuer", key.sign(&with("iss", Value::Null)), Forged::Claim("iss".to_owned())),
        ("another audience", key.sign(&with("aud", json!(["other"]))), Forged::Audience),
        ("no audience", key.sign(&with("aud", Value::Null)), Forged::Claim("aud".to_owned())),
        ("expired", key.sign(&with("exp", json!(now() - 120))), Forged::Expired),
        ("without end", key.sign(&with("exp", Value::Null)), Forged::Claim("exp".to_owned())),
        ("not yet valid", key.sign(&with("nbf", json!(now() + 120))), Forged::Early),
    ] {
        let refused = issuer.verify(&token, "vault").await;
        assert_eq!(refused, Err(forged), "{what}");
        let text = refused.unwrap_err().to_string();
        let quoted = token.expose().split('.').any(|part| part.len() > 8 && text.contains(part));
        assert!(!quoted && text.contains("; "), "{what}: {text}");
    }
    // None of them had the keys asked for again.
    assert_eq!(server.count("GET /openid/v1/jwks"), 1);
    assert_eq!(issuer.verify(&signed, "vault").await, Ok(Verdict::Signed));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_key_is_asked_for_when_a_token_names_it_and_a_stranger_stays_refused() {
    let (server, first, issuer) = issuer().await;
    let second = Key::of("second", Algorithm::ES384, &ECDSA_P384_SHA384_FIXED_SIGNING, "P-384");
    publish(&server, &[&first, &second]);
    assert_eq!(issuer.verify(&second.sign(&claims()), "vault").await, Ok(Verdict::Signed));
    assert_eq!(
        issuer.verify(&first.sign(&claims()), "vault").await,
        Ok(Verdict::Signed),
        "its tokens live on"
    );
    let asked = server.count("GET /openid/v1/jwks");
    let strangers: Vec<_> = (0..20).map(|_| first.sign_as("third", &claims())).collect();
    let checks = strangers.iter().map(|stranger| issuer.verify(stranger, "vault"));
    for refused in futures_util::future::join_all(checks).await {
        assert_eq!(refused, Err(Forged::UnknownKey));
    }
    assert!(server.count("GET /openid/v1/jwks") <= asked + 2, "however many ask, they are fetched once");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_keys_nobody_can_say_and_what_is_held_goes_on_without_the_api_server() {
    let (mut server, key, issuer) = issuer().await;
    server.stop().await;
    assert_eq!(issuer.verify(&key.sign(&claims()), "vault").await, Ok(Verdict::Signed));
    let stranger = Key::new("second");
    assert_eq!(issuer.verify(&stranger.sign(&claims()), "vault").await, Ok(Verdict::Unknown));
    assert_eq!(issuer.verify(&stranger.sign_as("first", &claims()), "vault").await, Err(Forged::Signature));

    let broken = Server::start().await;
    broken.world().broken = Some(StatusCode::FORBIDDEN);
    let never = Issuer::start(broken.api(), metrics());
    assert_eq!(never.verify(&key.sign(&claims()), "vault").await, Ok(Verdict::Unknown));
    broken.world().broken = None;
    let nonsense = json!({"keys": [{"kty": "oct", "kid": "first", "k": "AAAA", "alg": "HS256"}]});
    broken.world().issuer = Some((json!({"issuer": ISSUER}), nonsense));
    assert_eq!(
        never.verify(&key.sign(&claims()), "vault").await,
        Ok(Verdict::Unknown),
        "a shared secret is no key"
    );
}

#[test]
fn a_token_is_its_pods_and_no_other_ones() {
    let key = Key::new("any");
    let pod = Pod {
        name: "web-0".to_owned(),
        namespace: "app".to_owned(),
        service_account: "web".to_owned(),
        uid: "pod-1".to_owned(),
    };
    let claims = Claims::read(&key.sign(&claims())).unwrap();
    assert_eq!(claims.stranger_to(&pod), None);
    // An earlier version of the agent did not note it.
    assert_eq!(claims.stranger_to(&Pod { uid: String::new(), ..pod.clone() }), None);
    for (what, other) in [
        ("another service account", Pod { namespace: "billing".to_owned(), ..pod.clone() }),
        ("another service account", Pod { service_account: "admin".to_owned(), ..pod.clone() }),
        (
            "another pod than app/web-1 (claim kubernetes.io/pod/name)",
            Pod { name: "web-1".to_owned(), ..pod.clone() },
        ),
        (
            "another pod than app/web-0 (claim kubernetes.io/pod/uid)",
            Pod { uid: "pod-2".to_owned(), ..pod.clone() },
        ),
    ] {
        let why = claims.stranger_to(&other).unwrap();
        assert!(why.contains(what) && why.ends_with("; the pod must be created anew"), "{why}");
    }
    for (unbound, why) in [
        (with("kubernetes.io", json!({"namespace": "app"})), "is not a service account's"),
        (with("kubernetes.io", Value::Null), "is not a service account's"),
    ] {
        assert!(Claims::read(&key.sign(&unbound)).unwrap_err().starts_with(why));
    }
}
