//! How questions travel, against a scripted server.

mod reach;
mod tls;

use std::time::{Duration, Instant};

use crate::metrics::Metric;
use crate::reference::Method;
use crate::store::testing::*;
use crate::store::{ErrorKind, Store as _};

/// An address at which nobody listens.
async fn nobody() -> String {
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    format!("http://127.0.0.1:{}", listener.local_addr().unwrap().port())
}

fn values<const N: usize>(metrics: [&Metric; N]) -> [u64; N] {
    metrics.map(Metric::value)
}

#[tokio::test]
async fn a_read_carries_token_namespace_and_query_and_gives_the_answer() {
    let server = Server::start(|_, _| say(200, SECRET)).await;
    let client = Client::new();
    let mut to = connection(&[&server.url()]);
    to.namespace = Some("team/a".to_owned());
    let mut asked = request("secret/data/my app");
    asked.query = Some("version=3".to_owned());
    let answer =
        client.vault.read(&identity(to), &token(), &asked, soon()).await.unwrap_or_else(|e| panic!("{e}"));
    assert_eq!((answer.version, answer.body.expose()), (Some(3), SECRET.as_bytes()));
    let seen = &server.seen()[0];
    assert_eq!((seen.method.as_str(), seen.target.as_str()), ("GET", "/v1/secret/data/my%20app?version=3"));
    assert_eq!(seen.header("x-vault-token"), Some(TOKEN));
    assert_eq!(seen.header("x-vault-request"), Some("true"));
    assert_eq!(seen.header("x-vault-namespace"), Some("team/a"));
    assert_eq!(values([&client.metrics.store_reads, &client.metrics.store_retries]), [1, 0]);
}

#[tokio::test]
async fn an_overloaded_store_is_asked_again() {
    for status in [412, 500, 502, 503, 504] {
        let server =
            Server::start(move |n, _| if n < 2 { say(status, "{}") } else { say(200, SECRET) }).await;
        let client = Client::new();
        client.read(&connection(&[&server.url()]), "secret/data/app").await.unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(values([&client.metrics.store_reads, &client.metrics.store_retries]), [1, 2], "{status}");
    }
}

#[tokio::test]
async fn a_store_that_stays_down_is_given_up_with_its_own_words() {
    let server = Server::start(|_, _| say(503, r#"{"errors":["Vault is sealed"]}"#)).await;
    let client = Client::new();
    let error = client.refused(&connection(&[&server.url()]), "secret/data/app").await;
    assert_eq!(error.kind, ErrorKind::Unavailable);
    assert_eq!(
        error.to_string(),
        format!(
            "GET {}/v1/secret/data/app: 503 (Vault is sealed); the store is sealed: its operators must unseal it",
            server.url()
        )
    );
    assert_eq!(server.count(), 4);
}

#[tokio::test]
async fn a_store_that_is_silent_for_longer_is_told_with_the_moment_until_it_answers() {
    let server = Server::start(|n, _| if n == 8 { say(200, SECRET) } else { say(503, "{}") }).await;
    let (client, to) = (Client::new(), connection(&[&server.url()]));
    let first = client.refused(&to, "secret/data/app").await;
    assert_eq!(first.answered, "503");
    let second = client.refused(&to, "secret/data/app").await;
    let since = second.answered.strip_prefix("503, since ").unwrap_or_else(|| panic!("{second}"));
    let age = humantime::parse_rfc3339(since).unwrap().elapsed().unwrap();
    assert!(age < Duration::from_secs(60), "{age:?}");
    client.read(&to, "secret/data/app").await.unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(client.refused(&to, "secret/data/app").await.answered, "503");
}

#[tokio::test]
async fn a_rate_limit_is_waited_out_if_the_deadline_allows_it() {
    let limited = |seconds: &str| Say::Answer(429, format!("Retry-After: {seconds}\r\n"), String::new());
    let server = Server::start(move |n, _| if n == 0 { limited("1") } else { say(200, SECRET) }).await;
    let client = Client::new();
    let begin = Instant::now();
    client.read(&connection(&[&server.url()]), "secret/data/app").await.unwrap_or_else(|e| panic!("{e}"));
    assert!(begin.elapsed() >= Duration::from_secs(1));

    let server = Server::start(move |_, _| limited("3600")).await;
    let error = client.refused(&connection(&[&server.url()]), "secret/data/app").await;
    assert_eq!((error.kind, error.retry_after), (ErrorKind::RateLimited, Some(Duration::from_secs(3600))));
    assert_eq!(server.count(), 1);
}

#[tokio::test]
async fn a_write_is_not_repeated_once_the_store_may_have_acted() {
    for (method, verb) in [(Method::Post, "POST"), (Method::Put, "PUT")] {
        let broken = Server::start(|_, _| Say::HangUp).await;
        let failing = Server::start(|_, _| say(500, "{}")).await;
        for server in [&broken, &failing] {
            let client = Client::new();
            let mut asked = request("pki/issue/web");
            asked.method = method;
            asked.args = Some(r#"{"common_name":"a"}"#.to_owned());
            let who = identity(connection(&[&server.url()]));
            let error = client.vault.read(&who, &token(), &asked, soon()).await.err().map(decent).unwrap();
            assert_eq!(error.kind, ErrorKind::Unavailable);
            assert_eq!(server.count(), 1);
            let seen = &server.seen()[0];
            assert_eq!((seen.method.as_str(), seen.body.as_str()), (verb, r#"{"common_name":"a"}"#));
        }
    }
}

#[tokio::test]
async fn a_write_goes_to_the_next_member_if_the_first_surely_did_not_act() {
    let sealed = Server::start(|_, _| say(503, r#"{"errors":["Vault is sealed"]}"#)).await;
    let good = Server::start(|_, _| say(200, SECRET)).await;
    let client = Client::new();
    let mut asked = request("pki/issue/web");
    asked.method = Method::Post;
    let who = identity(connection(&[&nobody().await, &sealed.url(), &good.url()]));
    client.vault.read(&who, &token(), &asked, soon()).await.unwrap_or_else(|e| panic!("{e}"));
    assert_eq!((sealed.count(), good.count(), good.seen()[0].body.as_str()), (1, 1, "{}"));
}

#[tokio::test]
async fn the_member_that_answered_is_asked_first_the_next_time() {
    let sealed = Server::start(|_, _| say(503, r#"{"errors":["Vault is sealed"]}"#)).await;
    let good = Server::start(|_, _| say(200, SECRET)).await;
    let client = Client::new();
    let to = connection(&[&nobody().await, &sealed.url(), &good.url()]);
    for _ in 0..3 {
        client.read(&to, "secret/data/app").await.unwrap_or_else(|e| panic!("{e}"));
    }
    assert_eq!((sealed.count(), good.count()), (1, 3));
}

#[tokio::test]
async fn when_all_members_fail_the_error_tells_of_each() {
    let sealed = Server::start(|_, _| say(503, r#"{"errors":["Vault is sealed"]}"#)).await;
    let gone = nobody().await;
    let error = Client::new().refused(&connection(&[&gone, &sealed.url()]), "secret/data/app").await;
    assert_eq!(
        error.to_string(),
        format!(
            "GET {gone}/v1/secret/data/app: connection refused; also GET {}/v1/secret/data/app: 503 (Vault is sealed); \
             check that the store is running and listens at this address",
            sealed.url()
        )
    );
}

#[tokio::test]
async fn a_redirect_to_a_known_member_is_followed_once_with_the_body() {
    for status in [307, 308] {
        let leader = Server::start(|_, _| say(200, SECRET)).await;
        let to = leader.url();
        let standby = Server::start(move |_, seen| redirect(status, &format!("{to}{}", seen.target))).await;
        let client = Client::new();
        let mut asked = request("pki/issue/web");
        asked.method = Method::Put;
        asked.query = Some("a=1&b=2".to_owned());
        asked.args = Some(r#"{"x":1}"#.to_owned());
        let who = identity(connection(&[&standby.url(), &leader.url()]));
        client.vault.read(&who, &token(), &asked, soon()).await.unwrap_or_else(|e| panic!("{e}"));
        let seen = &leader.seen()[0];
        assert_eq!((seen.target.as_str(), seen.body.as_str()), ("/v1/pki/issue/web?a=1&b=2", r#"{"x":1}"#));
        assert_eq!(seen.header("x-vault-token"), Some(TOKEN));
    }
}

#[tokio::test]
async fn no_token_follows_a_redirect_to_a_stranger_or_to_another_path() {
    let stranger = Server::start(|_, _| say(200, SECRET)).await;
    let (to, client) = (stranger.url(), Client::new());
    let server = Server::start(move |_, seen| redirect(307, &format!("{to}{}", seen.target))).await;
    let error = client.refused(&connection(&[&server.url()]), "secret/data/app").await;
    assert_eq!(error.kind, ErrorKind::Refused);
    assert!(error.answered.contains("not among the configured addresses"), "{error}");

    let to = stranger.url();
    let server = Server::start(move |_, _| redirect(307, &format!("{to}/v1/secret/data/other"))).await;
    let error = client.refused(&connection(&[&server.url(), &stranger.url()]), "secret/data/app").await;
    assert!(error.answered.contains("to another path"), "{error}");
    assert_eq!((server.count(), stranger.count()), (1, 0));
}

#[tokio::test]
async fn two_redirects_in_a_row_are_one_too_many() {
    let server = Server::start(|_, seen| redirect(307, &seen.target)).await;
    let error = Client::new().refused(&connection(&[&server.url()]), "secret/data/app").await;
    assert_eq!(error.kind, ErrorKind::Unavailable);
    assert!(error.answered.contains("307 again"), "{error}");
}

#[tokio::test]
async fn an_answer_beyond_the_cap_is_refused_whether_announced_or_not() {
    let announced =
        Server::start(|_, _| Say::Raw(b"HTTP/1.1 200 X\r\nContent-Length: 9000000\r\n\r\n".to_vec())).await;
    let streamed = Server::start(|_, _| {
        let mut bytes = b"HTTP/1.1 200 X\r\nConnection: close\r\n\r\n".to_vec();
        bytes.resize((4 << 20) + 200, b' ');
        Say::Raw(bytes)
    })
    .await;
    for server in [announced, streamed] {
        let error = Client::new().refused(&connection(&[&server.url()]), "secret/data/app").await;
        assert_eq!((error.kind, server.count()), (ErrorKind::Malformed, 1));
        assert!(error.to_string().contains("more than 4 MiB"), "{error}");
    }
}

#[tokio::test]
async fn an_answer_whose_length_is_not_announced_arrives_whole() {
    let value = "x".repeat(100_000);
    let body = format!(r#"{{"data":{{"k":"{value}"}}}}"#);
    let (head, tail) = body.split_at(50_000);
    let chunked = format!(
        "HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\n{:x}\r\n{head}\r\n{:x}\r\n{tail}\r\n0\r\n\r\n",
        head.len(),
        tail.len()
    );
    let server = Server::start(move |_, _| Say::Raw(chunked.clone().into_bytes())).await;
    let answer =
        Client::new().read(&connection(&[&server.url()]), "kv/app").await.unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(answer.body.expose(), body.as_bytes());
}

#[tokio::test]
async fn a_call_ends_with_its_deadline() {
    let server = Server::start(|_, _| Say::Nothing).await;
    let client = Client::new();
    let who = identity(connection(&[&server.url()]));
    let deadline = Instant::now() + Duration::from_millis(200);
    let error = client.vault.read(&who, &token(), &request("secret/data/app"), deadline).await.err().unwrap();
    assert_eq!(error.kind, ErrorKind::Deadline);
    assert_eq!(server.count(), 1);
}

#[tokio::test]
async fn a_path_that_climbs_out_is_never_asked() {
    let server = Server::start(|_, _| say(200, SECRET)).await;
    for path in ["secret/../../sys/seal-status", "../x", "secret/%2e%2e/x", "secret\\data", "a/./b"] {
        let error = Client::new().refused(&connection(&[&server.url()]), path).await;
        assert_eq!(error.kind, ErrorKind::Refused, "{path}");
    }
    assert_eq!(server.count(), 0);
}

#[tokio::test]
async fn a_question_mark_in_a_path_is_no_query() {
    let server = Server::start(|_, _| say(200, SECRET)).await;
    let client = Client::new();
    client
        .read(&connection(&[&server.url()]), "secret/data/a?list=true#x")
        .await
        .unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(server.seen()[0].target, "/v1/secret/data/a%3Flist=true%23x");
}

#[tokio::test]
async fn requests_go_through_a_configured_proxy() {
    let proxy = Server::start(|_, _| say(200, SECRET)).await;
    let mut to = connection(&["http://vault.example:8200"]);
    to.proxy = Some(proxy.url().parse().unwrap());
    Client::new().read(&to, "secret/data/app").await.unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(proxy.seen()[0].target, "http://vault.example:8200/v1/secret/data/app");
}

#[tokio::test]
async fn a_host_that_does_not_exist_is_named() {
    let error =
        Client::new().refused(&connection(&["http://no-such-host.invalid:8200"]), "secret/data/app").await;
    assert_eq!(error.kind, ErrorKind::Unreachable);
    assert!(error.answered.contains("no-such-host.invalid does not resolve"), "{error}");
}

#[tokio::test]
async fn an_idle_connection_is_closed() {
    let server = Server::start(|_, _| say(200, SECRET)).await;
    let client = Client::new();
    client.read(&connection(&[&server.url()]), "secret/data/app").await.unwrap_or_else(|e| panic!("{e}"));
    server.closed().await;
}

#[tokio::test]
async fn a_connection_without_an_address_is_an_error() {
    let error = Client::new().refused(&connection(&[]), "secret/data/app").await;
    assert_eq!(
        (error.kind, error.to_string().as_str()),
        (ErrorKind::Local, "GET secret/data/app: the store has no address")
    );
}

#[tokio::test]
async fn many_connections_do_not_pile_up() {
    let server = Server::start(|_, _| say(200, SECRET)).await;
    let http = super::Http::new(std::sync::Arc::default(), super::Reach::anywhere());
    for n in 0..super::MOST_POOLS + 10 {
        let mut to = connection(&[&server.url()]);
        to.namespace = Some(format!("n{n}"));
        let ask = super::Ask {
            connection: &to,
            method: reqwest::Method::GET,
            path: "secret/data/app",
            query: None,
            token: None,
            body: None,
            hidden: &[],
            repeatable: true,
            rounds: 1,
            deadline: soon(),
        };
        http.ask(ask).await.unwrap_or_else(|e| panic!("{e}"));
    }
    assert_eq!(http.pools.len(), super::MOST_POOLS);
}
