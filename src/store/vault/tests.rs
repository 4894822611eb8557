//! What is asked of a store, and what people read when it says no.

use super::*;
use crate::reference::{AuthMethod, Subject};
use crate::store::testing::*;

const KV2: &str = r#"{"data":{"path":"secret/","type":"kv","options":{"version":"2"}}}"#;
const KV1: &str = r#"{"data":{"path":"secret/","type":"kv","options":{"version":"1"}}}"#;

/// A server that answers reads with `status` and `body`, and the question for the mount with `mount`.
async fn with_mount(status: u16, body: &'static str, mount: Option<&'static str>) -> Server {
    Server::start(move |_, seen| match (seen.target.strip_prefix("/v1/sys/internal/ui/mounts/"), mount) {
        (None, _) => say(status, body),
        (Some(_), Some(mount)) => say(200, mount),
        (Some(_), None) => say(403, r#"{"errors":["preflight capability check returned 403"]}"#),
    })
    .await
}

async fn words(server: &Server, path: &str) -> String {
    let error = Client::new().refused(&connection(&[&server.url()]), path).await;
    assert_eq!(error.kind, ErrorKind::Missing);
    error.to_string().replace(&server.url(), "URL")
}

fn local(server: &Server, method: AuthMethod) -> Identity {
    let mut identity = identity(connection(&[&server.url()]));
    identity.auth.method = method;
    identity.subject = Subject::Local("token-file:/run/token".to_owned());
    identity
}

async fn logged_in(
    server: &Server,
    method: AuthMethod,
    credential: &Credential,
) -> Result<Login, StoreError> {
    Client::new().vault.login(&local(server, method), credential, soon()).await.map_err(decent)
}

fn secret_file(text: &str) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    file
}

#[tokio::test]
async fn a_missing_data_in_a_kv_v2_path_is_pointed_out() {
    let server = with_mount(404, r#"{"errors":[]}"#, Some(KV2)).await;
    assert_eq!(
        words(&server, "secret/team/app").await,
        "GET URL/v1/secret/team/app: 404; secret/ is a KV v2 mount, did you mean secret/data/team/app?"
    );
    assert_eq!(server.seen()[1].header("x-vault-token"), Some(TOKEN));
    assert_eq!(
        words(&server, "secret/data/app").await,
        "GET URL/v1/secret/data/app: 404; secret/ is a KV v2 mount, but \"app\" does not exist in it: write it, or correct \
         the name"
    );
}

#[tokio::test]
async fn a_data_too_many_in_a_kv_v1_path_is_pointed_out() {
    let server = with_mount(404, r#"{"errors":[]}"#, Some(KV1)).await;
    assert_eq!(
        words(&server, "secret/data/app").await,
        "GET URL/v1/secret/data/app: 404; secret/ is a KV v1 mount, did you mean secret/app?"
    );
}

#[tokio::test]
async fn a_404_whose_mount_is_hidden_says_that_a_policy_may_hide_it() {
    let server = with_mount(404, r#"{"errors":[]}"#, None).await;
    assert_eq!(
        words(&server, "nowhere/app").await,
        "GET URL/v1/nowhere/app: 404; nothing is there, or the policy hides it: check the path, mount first"
    );
}

#[tokio::test]
async fn a_deleted_version_is_named_with_its_time() {
    let body = r#"{"data":{"data":null,"metadata":{"version":2,"deletion_time":"2026-11-23T12:17:51.8Z","destroyed":false}}}"#;
    let server = with_mount(404, body, Some(KV2)).await;
    assert!(
        words(&server, "secret/data/app").await.starts_with(
            "GET URL/v1/secret/data/app: 404 (version 2 was deleted at 2026-11-23T12:17:51.8Z); "
        )
    );
    assert_eq!(server.count(), 1);
}

#[tokio::test]
async fn the_question_for_the_mount_cannot_outlast_the_deadline() {
    let server = Server::start(|n, _| if n == 0 { say(404, "{}") } else { Say::Nothing }).await;
    let deadline = Instant::now() + Duration::from_millis(300);
    let who = identity(connection(&[&server.url()]));
    let result = Client::new().vault.read(&who, &token(), &request("secret/data/app"), deadline).await;
    assert_eq!(result.err().map(|error| error.kind), Some(ErrorKind::Missing));
}

#[tokio::test]
async fn a_denied_read_names_role_subject_path_and_namespace() {
    let server =
        Server::start(|_, _| say(403, r#"{"errors":["1 error occurred:\n\t* permission denied\n\n"]}"#))
            .await;
    let mut to = connection(&[&server.url()]);
    to.namespace = Some("team-a".to_owned());
    let error = Client::new().refused(&to, "secret/app").await;
    assert!(error.is_denied());
    assert_eq!(
        error.to_string().replace(&server.url(), "URL"),
        "GET URL/v1/secret/app: 403 (permission denied); a policy of role \"web\" at auth/kubernetes (service account \
         shop/web) needs read on \"secret/app\" in namespace \"team-a\"; if secret/ is a KV v2 mount, the path is \
         secret/data/app"
    );
    assert_eq!(server.count(), 1);
}

#[tokio::test]
async fn what_is_denied_at_a_login_or_a_read_names_account_role_audience_and_path() {
    let jwt = || Credential::Jwt(Token::new("canary-jwt".into()).unwrap());
    for status in [400, 403] {
        let server = Server::start(move |_, _| say(status, r#"{"errors":["permission denied"]}"#)).await;
        let mut who = identity(connection(&[&server.url()]));
        who.auth.audience = Some("vault".to_owned());
        who.connection.namespace = Some("team-a".to_owned());
        let vault = Client::new().vault;
        let login = vault.login(&who, &jwt(), soon()).await.err().map(decent).unwrap();
        assert_eq!(
            login.to_string().replace(&server.url(), "URL"),
            format!(
                "POST URL/v1/auth/kubernetes/login: {status} (permission denied); check that auth/kubernetes in namespace \
                 \"team-a\" is mounted, and that its role \"web\" exists and is bound to service account shop/web and audience \
                 \"vault\""
            )
        );
        if status == 403 {
            let read = vault.read(&who, &token(), &request("secret/data/app"), soon()).await;
            assert_eq!(
                read.err().map(decent).unwrap().to_string().replace(&server.url(), "URL"),
                "GET URL/v1/secret/data/app: 403 (permission denied); a policy of role \"web\" at auth/kubernetes (service account \
                 shop/web, audience \"vault\") needs read on \"secret/data/app\" in namespace \"team-a\""
            );
        }
    }
}

#[tokio::test]
async fn answers_without_a_secret_are_explained() {
    for (status, body, kind, text) in [
        (204, "", ErrorKind::Missing, "204 with an empty answer"),
        (200, "", ErrorKind::Missing, "200 with an empty answer"),
        (200, r#"{"data":null,"warnings":["w"]}"#, ErrorKind::Missing, r#"(the store warns: "w")"#),
        (200, "<html>", ErrorKind::Malformed, "not the API's JSON"),
        (400, r#"{"errors":["bad hvs.canary-token"]}"#, ErrorKind::Refused, "400 (bad [hidden])"),
        (400, "Client sent an HTTP request to an HTTPS server.\n", ErrorKind::Refused, "write https://"),
    ] {
        let server = Server::start(move |_, _| say(status, body)).await;
        let error = Client::new().refused(&connection(&[&server.url()]), "secret/data/app").await;
        assert!(error.kind == kind && error.to_string().contains(text), "{error}");
    }
}

#[tokio::test]
async fn each_credential_asks_what_its_method_promises() {
    let granted = r#"{"auth":{"client_token":"hvs.new","lease_duration":3600,"renewable":true}}"#;
    let jwt = secret_file("canary-jwt\n");
    let cases = [
        (Credential::Jwt(Token::new("canary-jwt".into()).unwrap()), r#"{"role":"web","jwt":"canary-jwt"}"#),
        (Credential::JwtFile(jwt.path().to_owned()), r#"{"role":"web","jwt":"canary-jwt"}"#),
        (
            Credential::SecretIdFile(Some(jwt.path().to_owned())),
            r#"{"role_id":"web","secret_id":"canary-jwt"}"#,
        ),
        (Credential::SecretIdFile(None), r#"{"role_id":"web"}"#),
    ];
    for (credential, body) in cases {
        let server = Server::start(move |_, _| say(200, granted)).await;
        let login =
            logged_in(&server, AuthMethod::Jwt, &credential).await.unwrap_or_else(|error| panic!("{error}"));
        assert_eq!((login.token.expose(), login.renewable), ("hvs.new", true));
        assert_eq!(login.ttl, Some(Duration::from_secs(3600)));
        let seen = &server.seen()[0];
        assert_eq!((seen.method.as_str(), seen.target.as_str()), ("POST", "/v1/auth/kubernetes/login"));
        assert_eq!((seen.body.as_str(), seen.header("x-vault-token")), (body, None));
    }
}

#[tokio::test]
async fn a_given_token_is_looked_up_and_a_root_token_lives_for_ever() {
    let file = secret_file("hvs.canary-token\n");
    for (ttl, lives) in [(0, None), (60, Some(Duration::from_secs(60)))] {
        let body = format!(r#"{{"data":{{"ttl":{ttl},"renewable":true,"id":"hvs.canary-token"}}}}"#);
        let server = Server::start(move |_, _| say(200, &body)).await;
        for credential in [Credential::Token(token()), Credential::TokenFile(file.path().to_owned())] {
            let login =
                logged_in(&server, AuthMethod::Token, &credential).await.unwrap_or_else(|e| panic!("{e}"));
            assert_eq!((login.token.expose(), login.ttl), (TOKEN, lives));
        }
        let seen = &server.seen()[1];
        assert_eq!((seen.method.as_str(), seen.target.as_str()), ("GET", "/v1/auth/token/lookup-self"));
        assert_eq!(seen.header("x-vault-token"), Some(TOKEN));
    }
}

#[tokio::test]
async fn a_refused_login_says_what_to_check_and_never_the_credential() {
    let jwt = || Credential::Jwt(Token::new("canary-jwt".into()).unwrap());
    for (status, said, kind, text) in [
        (400, r#"invalid role name \"web\" canary-jwt"#, ErrorKind::Refused, "that its role \"web\" exists"),
        (403, "permission denied", ErrorKind::Denied, "is bound to token-file:/run/token"),
        (404, "no handler", ErrorKind::Missing, "no auth method is mounted at auth/kubernetes"),
    ] {
        let server = Server::start(move |_, _| say(status, &format!(r#"{{"errors":["{said}"]}}"#))).await;
        let error = logged_in(&server, AuthMethod::Kubernetes, &jwt()).await.err().unwrap();
        assert!(error.kind == kind && error.to_string().contains(text), "{error}");
        assert_eq!(server.count(), 1);
    }
    let server = Server::start(|_, _| say(403, r#"{"errors":["bad token hvs.canary-token"]}"#)).await;
    let error = logged_in(&server, AuthMethod::Token, &Credential::Token(token())).await.err().unwrap();
    assert!(error.is_denied() && error.to_string().contains("lookup-self"), "{error}");
    let server = Server::start(|_, _| say(200, r#"{"auth":{"client_token":"","mfa_requirement":{}}}"#)).await;
    let error = logged_in(&server, AuthMethod::Jwt, &jwt()).await.err().unwrap();
    assert!(error.kind == ErrorKind::Malformed && error.to_string().contains("second factor"), "{error}");
}

#[tokio::test]
async fn a_login_is_repeated_after_a_broken_connection() {
    let granted = r#"{"auth":{"client_token":"hvs.new","lease_duration":60}}"#;
    let server = Server::start(move |n, _| if n == 0 { Say::HangUp } else { say(200, granted) }).await;
    let credential = Credential::SecretIdFile(None);
    logged_in(&server, AuthMethod::AppRole, &credential).await.unwrap_or_else(|error| panic!("{error}"));
    assert_eq!((server.count(), server.seen()[1].body.as_str()), (2, r#"{"role_id":"web"}"#));
}

#[tokio::test]
async fn a_credential_file_that_is_missing_is_named_and_nothing_is_asked() {
    let server = Server::start(|_, _| say(200, "{}")).await;
    let credential = Credential::TokenFile("/nonexistent/token".into());
    let error = logged_in(&server, AuthMethod::Token, &credential).await.err().unwrap();
    assert!(error.kind == ErrorKind::Local && error.answered.contains("/nonexistent/token"), "{error}");
    assert_eq!(server.count(), 0);
}

#[tokio::test]
async fn renewing_and_revoking_ask_for_the_token_itself() {
    let granted = r#"{"auth":{"client_token":"hvs.canary-token","lease_duration":120,"renewable":false}}"#;
    let server = Server::start(move |n, _| if n == 0 { say(200, granted) } else { say(204, "") }).await;
    let (client, who) = (Client::new(), identity(connection(&[&server.url()])));
    let login = client.vault.renew(&who, &token(), soon()).await.unwrap_or_else(|error| panic!("{error}"));
    assert_eq!((login.ttl, login.renewable), (Some(Duration::from_secs(120)), false));
    client.vault.revoke(&who, &token(), soon()).await.unwrap_or_else(|error| panic!("{error}"));
    let seen: Vec<_> = server.seen().into_iter().map(|seen| (seen.method, seen.target)).collect();
    let post = |path: &str| ("POST".to_owned(), path.to_owned());
    assert_eq!(seen, [post("/v1/auth/token/renew-self"), post("/v1/auth/token/revoke-self")]);
    assert_eq!((client.metrics.store_logins.value(), client.metrics.store_renewals.value()), (0, 1));
}
