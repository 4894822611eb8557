use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::encoding::AsDer;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair};
use base64::Engine as _;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde_json::{Value, json};

use super::{Client, ENVELOPE, Got, has_members};

/// A key pair that signs test tokens.
struct Signer {
    algorithm: Algorithm,
    key: EncodingKey,
    public_pem: String,
}

impl Signer {
    fn es256() -> Self {
        let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap();
        let private = pair.to_pkcs8v1().unwrap();
        Self {
            algorithm: Algorithm::ES256,
            key: EncodingKey::from_ec_der(private.as_ref()),
            public_pem: pem(pair.public_key().as_der().unwrap().as_ref()),
        }
    }

    fn rs256() -> Self {
        let pair = aws_lc_rs::rsa::KeyPair::generate(aws_lc_rs::rsa::KeySize::Rsa2048).unwrap();
        let private: aws_lc_rs::encoding::Pkcs8V1Der<'_> = pair.as_der().unwrap();
        let private = format!(
            "-----BEGIN PRIVATE KEY-----\n{}\n-----END PRIVATE KEY-----\n",
            base64::engine::general_purpose::STANDARD.encode(private.as_ref())
        );
        Self {
            algorithm: Algorithm::RS256,
            key: EncodingKey::from_rsa_pem(private.as_bytes()).unwrap(),
            public_pem: pem(pair.public_key().as_der().unwrap().as_ref()),
        }
    }

    /// A service account's token with some claims changed; null removes one.
    fn token(&self, changed: Value) -> String {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let mut claims = json!({
            "iss": "https://cluster", "aud": ["vault"], "iat": now, "nbf": now, "exp": now + 600,
            "sub": "system:serviceaccount:prod:app",
            "kubernetes.io": {"namespace": "prod", "serviceaccount": {"name": "app", "uid": "u-1"}},
        });
        for (name, value) in changed.as_object().unwrap() {
            claims[name] = value.clone();
        }
        claims.as_object_mut().unwrap().retain(|_, value| !value.is_null());
        jsonwebtoken::encode(&Header::new(self.algorithm), &claims, &self.key).unwrap()
    }
}

fn pem(der: &[u8]) -> String {
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let lines: Vec<&str> =
        text.as_bytes().chunks(64).map(|line| std::str::from_utf8(line).unwrap()).collect();
    format!("-----BEGIN PUBLIC KEY-----\n{}\n-----END PUBLIC KEY-----\n", lines.join("\n"))
}

impl Client {
    async fn login(&self, mount: &str, body: Value) -> Got {
        self.ask_as("", "POST", &format!("auth/{mount}/login"), Some(body)).await
    }

    fn set_up(&self, path: &str, body: Value) {
        self.store.write(path, &body).unwrap();
    }
}

fn token_of(got: Got) -> String {
    got.ok()["auth"]["client_token"].as_str().unwrap().to_owned()
}

const READ_SECRET: &str = "path \"secret/data/app\" { capabilities = [\"read\"] }";

async fn with_approle() -> Client {
    let client = Client::start().await;
    client.store.put("secret/app", &json!({"k": "v"})).unwrap();
    client.set_up("sys/policies/acl/app", json!({"policy": READ_SECRET}));
    client.set_up("sys/auth/approle", json!({"type": "approle"}));
    client.set_up(
        "auth/approle/role/app",
        json!({"token_policies": "app", "token_ttl": "10m", "token_max_ttl": "15m", "role_id": "the-role"}),
    );
    client.set_up("auth/approle/role/app/custom-secret-id", json!({"secret_id": "the-secret-id"}));
    client
}

fn approle() -> Value {
    json!({"role_id": "the-role", "secret_id": "the-secret-id"})
}

#[tokio::test]
async fn an_approle_login_gives_a_token_with_the_roles_policies() {
    let client = with_approle().await;
    let login = client.login("approle", approle()).await.ok();
    has_members(&login, ENVELOPE);
    has_members(
        &login["auth"],
        "client_token accessor policies token_policies metadata lease_duration renewable entity_id token_type orphan \
         mfa_requirement num_uses",
    );
    assert_eq!(login["auth"]["policies"], json!(["app", "default"]));
    assert_eq!((&login["auth"]["lease_duration"], &login["mount_type"]), (&json!(600), &json!("")));
    let token = login["auth"]["client_token"].as_str().unwrap();
    client.ask_as(token, "GET", "secret/data/app", None).await.ok();
    let denied = client.ask_as(token, "GET", "secret/data/other", None).await;
    denied.refused(403, "1 error occurred:\n\t* permission denied\n\n");
}

#[tokio::test]
async fn a_wrong_role_or_secret_id_is_refused_alike() {
    let client = with_approle().await;
    for body in [
        json!({"role_id": "the-role", "secret_id": "x"}),
        json!({"role_id": "x", "secret_id": "the-secret-id"}),
    ] {
        client.login("approle", body).await.refused(400, "invalid role or secret ID");
    }
    client.login("approle", json!({"role_id": "the-role"})).await.refused(400, "missing secret_id");
    client.login("nope", approle()).await.refused(403, "permission denied");
}

#[tokio::test]
async fn a_generated_secret_id_expires_with_its_role() {
    let client = with_approle().await;
    client.set_up("auth/approle/role/app", json!({"secret_id_ttl": "1m"}));
    let made = client.post("auth/approle/role/app/secret-id", json!({})).await.ok();
    has_members(&made["data"], "secret_id secret_id_accessor secret_id_num_uses secret_id_ttl");
    let body = json!({"role_id": "the-role", "secret_id": made["data"]["secret_id"]});
    client.login("approle", body.clone()).await.ok();
    client.store.advance(Duration::from_secs(60));
    client.login("approle", body).await.refused(400, "invalid role or secret ID");
    client.login("approle", approle()).await.ok();
}

#[tokio::test]
async fn a_role_that_binds_no_secret_id_needs_none() {
    let client = with_approle().await;
    client.set_up("auth/approle/role/app", json!({"bind_secret_id": false}));
    client.login("approle", json!({"role_id": "the-role"})).await.ok();
}

#[tokio::test]
async fn a_token_is_renewed_up_to_its_maximum_and_then_ends() {
    let client = with_approle().await;
    let token = token_of(client.login("approle", approle()).await);
    let renew = async |body| client.ask_as(&token, "POST", "auth/token/renew-self", Some(body)).await;
    client.store.advance(Duration::from_secs(240));
    assert_eq!(renew(json!({})).await.ok()["auth"]["lease_duration"], 600);
    assert_eq!(renew(json!({"increment": "30s"})).await.ok()["auth"]["lease_duration"], 30);
    let capped = renew(json!({"increment": 3600})).await.ok();
    let lease = capped["auth"]["lease_duration"].as_u64().unwrap();
    // A quarter of an hour less the four minutes, and less what this test took.
    assert!((601..=660).contains(&lease), "{lease}");
    assert!(capped["warnings"][0].as_str().unwrap().contains("TTL value is capped accordingly"));
    client.store.advance(Duration::from_secs(660));
    let ended = client.ask_as(&token, "GET", "secret/data/app", None).await;
    ended.refused(403, "2 errors occurred:\n\t* permission denied\n\t* invalid token\n\n");
    assert_eq!(renew(json!({})).await.status, 403);
}

#[tokio::test]
async fn a_revoked_token_is_unknown() {
    let client = with_approle().await;
    let token = token_of(client.login("approle", approle()).await);
    client.ask_as(&token, "POST", "auth/token/revoke-self", None).await.ok();
    assert_eq!(client.ask_as(&token, "GET", "auth/token/lookup-self", None).await.status, 403);
    client.ask_as("", "GET", "secret/data/app", None).await.refused(403, "permission denied");
}

#[tokio::test]
async fn a_token_knows_itself() {
    let client = with_approle().await;
    let token = token_of(client.login("approle", approle()).await);
    let data = client.ask_as(&token, "GET", "auth/token/lookup-self", None).await.ok()["data"].take();
    has_members(
        &data,
        "accessor creation_time creation_ttl display_name entity_id expire_time explicit_max_ttl id issue_time meta \
         num_uses orphan path policies renewable ttl type",
    );
    assert_eq!((&data["id"], &data["path"]), (&json!(token), &json!("auth/approle/login")));
    assert_eq!((&data["creation_ttl"], &data["meta"]), (&json!(600), &json!({"role_name": "app"})));
    let root = client.get("auth/token/lookup-self").await.ok();
    assert_eq!((&root["data"]["ttl"], &root["data"]["expire_time"]), (&json!(0), &json!(null)));
    client.post("auth/token/renew-self", json!({})).await.refused(400, "lease is not renewable");
}

#[tokio::test]
async fn a_created_token_has_what_was_asked_for() {
    let client = with_approle().await;
    let body = json!({"policies": ["app"], "ttl": "1h", "explicit_max_ttl": "30m", "no_default_policy": true, "renewable": false});
    let made = client.post("auth/token/create", body).await.ok();
    assert_eq!(made["auth"]["policies"], json!(["app"]));
    assert_eq!((&made["auth"]["lease_duration"], &made["auth"]["renewable"]), (&json!(1800), &json!(false)));
    let token = made["auth"]["client_token"].as_str().unwrap();
    client.ask_as(token, "GET", "secret/data/app", None).await.ok();
    // Without the default policy it may not even look at itself.
    assert_eq!(client.ask_as(token, "GET", "auth/token/lookup-self", None).await.status, 403);
}

async fn with_kubernetes(signer: &Signer) -> Client {
    let client = Client::start().await;
    client.set_up("sys/auth/k8s", json!({"type": "kubernetes"}));
    client
        .set_up("auth/k8s/config", json!({"kubernetes_host": "https://x", "pem_keys": [signer.public_pem]}));
    client.set_up(
        "auth/k8s/role/app",
        json!({"bound_service_account_names": "app", "bound_service_account_namespaces": ["prod"],
            "audience": "vault", "token_policies": ["app"], "token_ttl": "1h"}),
    );
    client
}

#[tokio::test]
async fn a_service_account_logs_in_with_its_token() {
    for signer in [Signer::es256(), Signer::rs256()] {
        let client = with_kubernetes(&signer).await;
        let login = client.login("k8s", json!({"role": "app", "jwt": signer.token(json!({}))})).await.ok();
        assert_eq!(
            login["auth"]["metadata"],
            json!({"role": "app", "service_account_name": "app", "service_account_namespace": "prod",
                "service_account_secret_name": "", "service_account_uid": "u-1"})
        );
    }
}

#[tokio::test]
async fn a_service_accounts_token_that_does_not_fit_its_role_is_refused() {
    let signer = Signer::es256();
    let client = with_kubernetes(&signer).await;
    let login = async |jwt: String| client.login("k8s", json!({"role": "app", "jwt": jwt})).await;
    let audience = "invalid audience (aud) claim: audience claim does not match any expected audience";
    login(signer.token(json!({"aud": "other"}))).await.refused(403, audience);
    login(signer.token(json!({"aud": null}))).await.refused(403, audience);
    let expired = login(signer.token(json!({"exp": 1, "nbf": 0, "iat": 0}))).await;
    expired.refused(403, "invalid expiration time (exp) claim: token is expired");
    let other = login(signer.token(json!({"sub": "system:serviceaccount:prod:other"}))).await;
    other.refused(403, "service account name not authorized");
    let other = login(signer.token(json!({"sub": "system:serviceaccount:test:app"}))).await;
    other.refused(403, "namespace not authorized");
    login(Signer::es256().token(json!({}))).await.refused(403, "permission denied");
    login("junk".into()).await.refused(403, "permission denied");
    let nobody = client.login("k8s", json!({"role": "no", "jwt": "x"})).await;
    nobody.refused(400, "invalid role name \"no\"");
}

#[tokio::test]
async fn a_kubernetes_role_without_an_audience_is_warned_of() {
    let client = with_kubernetes(&Signer::es256()).await;
    let body = json!({"bound_service_account_names": "*", "bound_service_account_namespaces": "a,b"});
    let warned = client.post("auth/k8s/role/any", body).await.ok();
    assert!(
        warned["warnings"][0].as_str().unwrap().starts_with("Role any does not have an audience configured.")
    );
    let role = client.get("auth/k8s/role/any").await.ok();
    assert_eq!(role["data"]["bound_service_account_namespaces"], json!(["a", "b"]));
}

async fn with_jwt(signer: &Signer, role: Value) -> Client {
    let client = Client::start().await;
    client.set_up("sys/auth/jwt", json!({"type": "jwt"}));
    client.set_up(
        "auth/jwt/config",
        json!({"jwt_validation_pubkeys": [signer.public_pem], "bound_issuer": "https://cluster"}),
    );
    client.set_up("auth/jwt/role/app", role);
    client
}

#[tokio::test]
async fn a_jwt_that_fits_its_role_gives_a_token() {
    let signer = Signer::es256();
    let role = json!({"role_type": "jwt", "user_claim": "sub", "bound_audiences": "vault",
        "bound_claims": {"/kubernetes.io/namespace": ["test", "prod"]}, "token_policies": "app", "token_ttl": 60});
    let client = with_jwt(&signer, role).await;
    let login = client.login("jwt", json!({"role": "app", "jwt": signer.token(json!({}))})).await.ok();
    assert_eq!(
        (&login["auth"]["lease_duration"], &login["auth"]["metadata"]),
        (&json!(60), &json!({"role": "app"}))
    );
    let login = async |changed: Value| {
        client.login("jwt", json!({"role": "app", "jwt": signer.token(changed)})).await
    };
    let text = "error validating token: invalid audience (aud) claim: audience claim does not match any expected audience";
    login(json!({"aud": ["a", "b"]})).await.refused(400, text);
    login(json!({"iss": "x"})).await.refused(400, "error validating token: invalid issuer (iss) claim");
    let text = "error validating token: invalid expiration time (exp) claim: token is expired";
    login(json!({"exp": 1})).await.refused(400, text);
    let text = "error validating claims: claim \"/kubernetes.io/namespace\" does not match any associated bound claim values";
    login(json!({"kubernetes.io": {"namespace": "dev"}})).await.refused(400, text);
    let text = "error validating token: error verifying token signature: no known key successfully validated the token signature";
    let forged = Signer::es256().token(json!({}));
    client.login("jwt", json!({"role": "app", "jwt": forged})).await.refused(400, text);
    client
        .login("jwt", json!({"role": "no", "jwt": "x"}))
        .await
        .refused(400, "role \"no\" could not be found");
    client.login("jwt", json!({"role": "app"})).await.refused(400, "missing token");
}

#[tokio::test]
async fn an_audience_that_no_role_binds_is_refused() {
    let signer = Signer::es256();
    let role =
        json!({"role_type": "jwt", "user_claim": "sub", "bound_subject": "system:serviceaccount:prod:app"});
    let client = with_jwt(&signer, role).await;
    let refused = client.login("jwt", json!({"role": "app", "jwt": signer.token(json!({}))})).await;
    refused.refused(400, "audience claim found in JWT but no audiences bound to the role");
    client.login("jwt", json!({"role": "app", "jwt": signer.token(json!({"aud": null}))})).await.ok();
    let refused = client
        .login("jwt", json!({"role": "app", "jwt": signer.token(json!({"aud": null, "sub": "x"}))}))
        .await;
    refused.refused(400, "error validating token: invalid subject (sub) claim");
}

#[tokio::test]
async fn a_jwt_role_must_bind_something() {
    let client = with_jwt(&Signer::es256(), json!({"user_claim": "sub", "bound_audiences": "a"})).await;
    let refused = client.post("auth/jwt/role/x", json!({"role_type": "jwt", "user_claim": "sub"})).await;
    refused.refused(400, "must have at least one bound constraint when creating/updating a role");
    let refused = client.post("auth/jwt/role/x", json!({"role_type": "jwt", "bound_audiences": "a"})).await;
    refused.refused(400, "a user claim must be defined on the role");
    assert_eq!(client.get("auth/jwt/role/x").await.status, 404);
    let refused = client.post("auth/jwt/config", json!({"jwt_validation_pubkeys": ["junk"]})).await;
    refused.refused(400, "error parsing public key: data does not contain any valid public keys");
}
