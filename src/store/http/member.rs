//! One member of a cluster: a base address, the client that reaches it, and where its redirects may lead.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use reqwest::header::{HOST, HeaderMap, HeaderValue, LOCATION};
use reqwest::{Client, Response, StatusCode};
use tokio::time::timeout_at;
use url::Url;

use super::body::{self, BodyError};
use super::reach::{Names, Reach};
use super::{Ask, CONNECT_TIMEOUT, IDLE_TIMEOUT, REQUEST_TIMEOUT, Reply, asked, failure, tls, verdict};
use crate::reference::{Address, Connection};
use crate::secret::SecretBytes;
use crate::store::error::Unusable;
use crate::store::retry::Failure;
use crate::store::{ErrorKind, StoreError};

/// One member.
pub(super) struct Member {
    address: Address,
    client: Client,
    reach: Reach,
}

/// What one request gave.
struct Exchange {
    status: StatusCode,
    headers: HeaderMap,
    body: SecretBytes,
}

impl Member {
    /// All members of a cluster. They share one client, unless a server name asks for one each. Blocks.
    pub(super) fn all(connection: &Connection, reach: &Reach) -> Result<Vec<Self>, Unusable> {
        let mut members: Vec<Self> = Vec::with_capacity(connection.addresses.len());
        for address in &connection.addresses {
            let client = match members.first() {
                Some(first) if connection.server_name.is_none() => first.client.clone(),
                _ => client(connection, address, reach)?,
            };
            members.push(Self { address: address.clone(), client, reach: reach.clone() });
        }
        Ok(members)
    }

    /// Asks this member, and the one it redirects to, once.
    pub(super) async fn exchange(
        &self,
        ask: &Ask<'_>,
        headers: &HeaderMap,
        body: Option<&Bytes>,
    ) -> Result<Reply, Failure> {
        let limit = ask.deadline.min(Instant::now() + REQUEST_TIMEOUT);
        let exchange = match timeout_at(limit.into(), self.follow(ask, headers, body)).await {
            Ok(done) => done?,
            Err(_) if limit == ask.deadline => {
                return Err(failed(
                    ask,
                    &self.address,
                    ErrorKind::Deadline,
                    "no answer by the deadline",
                    None,
                ));
            }
            Err(_) => {
                let answered = format!("no answer within {REQUEST_TIMEOUT:?}");
                return Err(failed(ask, &self.address, ErrorKind::Unavailable, &answered, None));
            }
        };
        let asked = asked(ask, &self.address);
        match verdict(exchange.status, &exchange.headers, &exchange.body, ask, &asked) {
            Some(failure) => Err(failure),
            None => Ok(Reply { status: exchange.status, body: exchange.body, asked }),
        }
    }

    async fn follow(
        &self,
        ask: &Ask<'_>,
        headers: &HeaderMap,
        body: Option<&Bytes>,
    ) -> Result<Exchange, Failure> {
        let exchange = self.send(&self.client, &self.address, ask, headers, body).await?;
        if !is_redirect(exchange.status) {
            return Ok(exchange);
        }
        let target = target(&self.address, &exchange.headers, ask).map_err(|refusal| {
            let remedy = "name the members of the cluster as addresses, and let them advertise these";
            let answered = format!("{} {refusal}", exchange.status.as_u16());
            unsent(failed(ask, &self.address, ErrorKind::Refused, &answered, Some(remedy)))
        })?;
        let client = if ask.connection.server_name.is_some() {
            let (connection, to, reach) = (ask.connection.clone(), target.clone(), self.reach.clone());
            let made = tokio::task::spawn_blocking(move || client(&connection, &to, &reach)).await;
            let Ok(Ok(client)) = made else {
                let answered = format!("no client for the redirect to {target} could be made");
                return Err(unsent(failed(ask, &self.address, ErrorKind::Local, &answered, None)));
            };
            client
        } else {
            self.client.clone()
        };
        let exchange = self.send(&client, &target, ask, headers, body).await?;
        if is_redirect(exchange.status) {
            let answered = format!("{} again, from {target} to which it redirects", exchange.status.as_u16());
            return Err(unsent(failed(ask, &self.address, ErrorKind::Unavailable, &answered, None)));
        }
        Ok(exchange)
    }

    /// One request to one address and its whole answer.
    async fn send(
        &self,
        client: &Client,
        address: &Address,
        ask: &Ask<'_>,
        headers: &HeaderMap,
        body: Option<&Bytes>,
    ) -> Result<Exchange, Failure> {
        let mut url = url(address, ask).map_err(|rule| {
            let answered = format!("not asked: {rule}");
            unsent(failed(ask, address, ErrorKind::Refused, &answered, Some("correct the path")))
        })?;
        if !self.reach.permits(address) {
            let words = failure::local();
            return Err(unsent(failed(ask, address, words.kind, &words.answered, words.remedy.as_deref())));
        }
        let mut request = client.request(ask.method.clone(), url.clone()).headers(headers.clone());
        if let Some(name) = certified_name(ask.connection, address) {
            // TLS goes by the URL's name, the client's resolver takes it to the address, the store sees the address.
            let host = HeaderValue::from_str(&url[url::Position::BeforeHost..url::Position::AfterPort]);
            if url.set_host(Some(name)).is_ok() {
                request = client.request(ask.method.clone(), url).headers(headers.clone());
                request = host.into_iter().fold(request, |request, host| request.header(HOST, host));
            }
        }
        if let Some(body) = body {
            request = request.body(body.clone());
        }
        let in_words = async |error: reqwest::Error| {
            let words = failure::words(&error, address, ask.connection, &self.reach).await;
            let failure = failed(ask, address, words.kind, &words.answered, words.remedy.as_deref());
            Failure { may_have_acted: !error.is_connect(), ..failure }
        };
        let mut response: Response = match request.send().await {
            Ok(response) => response,
            Err(error) => return Err(in_words(error).await),
        };
        let body = match body::incoming(&mut response).await {
            Ok(body) => body,
            Err(BodyError::Broken(error)) => return Err(in_words(error).await),
            Err(BodyError::TooLarge) => {
                let answered = format!("an answer of more than {} MiB", body::LARGEST_ANSWER >> 20);
                let remedy = Some("split the secret into smaller ones");
                return Err(failed(ask, address, ErrorKind::Malformed, &answered, remedy));
            }
        };
        Ok(Exchange { status: response.status(), headers: std::mem::take(response.headers_mut()), body })
    }
}

/// Whom a redirect names, if the question may be repeated there: same path and query, not from https to http, and a host
/// that is either one of the connection's addresses or has to prove itself by the same TLS rules.
fn target(from: &Address, headers: &HeaderMap, ask: &Ask<'_>) -> Result<Address, String> {
    let here = url(from, ask)?;
    let there = headers
        .get(LOCATION)
        .and_then(|location| here.join(location.to_str().ok()?).ok())
        .ok_or("without a usable Location")?;
    let target = Address::parse(&there.origin().ascii_serialization())
        .map_err(|_| "to something that is neither https nor http")?;
    if there.path() != here.path() || there.query() != here.query() {
        return Err(format!("to another path at {target}"));
    }
    if from.is_https() && !target.is_https() {
        return Err(format!("from https to {target}, which would show the token to the network"));
    }
    let proves_itself = target.is_https() && !ask.connection.skip_verify;
    if !ask.connection.addresses.contains(&target) && !proves_itself {
        return Err(format!("to {target}, which is not among the configured addresses"));
    }
    Ok(target)
}

fn is_redirect(status: StatusCode) -> bool {
    matches!(status, StatusCode::TEMPORARY_REDIRECT | StatusCode::PERMANENT_REDIRECT)
}

/// The URL of a question. A path that leaves `/v1/` is refused: it comes from whoever wrote the class.
fn url(address: &Address, ask: &Ask<'_>) -> Result<Url, &'static str> {
    let mut url = address.url().clone();
    let path = format!("/v1/{}", ask.path);
    url.set_path(&path);
    let slashes = |text: &str| text.bytes().filter(|byte| *byte == b'/').count();
    if slashes(url.path()) != slashes(&path) {
        return Err("the path has a part that is . or .. or a backslash");
    }
    url.set_query(ask.query);
    Ok(url)
}

/// The name that TLS asks for, if it is another than the address's.
fn certified_name<'a>(connection: &'a Connection, address: &Address) -> Option<&'a str> {
    connection
        .server_name
        .as_deref()
        .filter(|name| address.is_https() && address.url().host_str() != Some(name))
}

/// A client for one address, or for all if no server name is set. Blocks.
fn client(connection: &Connection, address: &Address, reach: &Reach) -> Result<Client, Unusable> {
    let mut builder = Client::builder()
        .connect_timeout(CONNECT_TIMEOUT)
        .pool_idle_timeout(IDLE_TIMEOUT)
        .redirect(reqwest::redirect::Policy::none())
        .retry(reqwest::retry::never())
        .referer(false)
        .user_agent(concat!("fuse-secrets/", env!("CARGO_PKG_VERSION")))
        .no_proxy();
    builder = tls::configure(builder, connection, reach)?;
    if let Some(name) = certified_name(connection, address) {
        if url::Host::parse(name).map_or(true, |host| !matches!(host, url::Host::Domain(_))) {
            return Err(Unusable {
                what: format!("the server name {name:?} is not a DNS name"),
                remedy: "write a DNS name of the certificate, or an IP address into the store's address",
            });
        }
        if connection.proxy.is_some() {
            return Err(Unusable {
                what: "a server name and a proxy are both set, and the proxy would look the name up itself"
                    .to_owned(),
                remedy: "write the name into the store's address",
            });
        }
        let names = Names { fixed: Some(address.clone()), reach: reach.clone() };
        builder = builder.dns_resolver(Arc::new(names));
    } else if !reach.local_addresses && connection.proxy.is_none() {
        // Beside a proxy the only name that is resolved here is the proxy's, which only an operator can set.
        builder = builder.dns_resolver(Arc::new(Names { fixed: None, reach: reach.clone() }));
    }
    if let Some(proxy) = &connection.proxy {
        let proxy = reqwest::Proxy::all(proxy.clone()).map_err(|_| Unusable {
            what: "the configured proxy is not a URL that can be used".to_owned(),
            remedy: "write http://host:port",
        })?;
        builder = builder.proxy(proxy);
    }
    builder.build().map_err(|error| Unusable {
        what: format!("no TLS client could be made ({})", failure::root(&error)),
        remedy: "name the CA that signed the store's certificate; this system may have none",
    })
}

/// A failure after which it is unknown whether the store acted.
fn failed(
    ask: &Ask<'_>,
    address: &Address,
    kind: ErrorKind,
    answered: &str,
    remedy: Option<&str>,
) -> Failure {
    let error = StoreError {
        kind,
        asked: asked(ask, address),
        answered: answered.to_owned(),
        remedy: remedy.map(str::to_owned),
        retry_after: None,
    };
    Failure { error, may_have_acted: true }
}

/// The same when the store surely did not act.
fn unsent(failure: Failure) -> Failure {
    Failure { may_have_acted: false, ..failure }
}
