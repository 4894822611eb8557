//! What an agent's client does not reach, whatever leads there.

use crate::store::Reach;
use crate::store::testing::*;
use crate::store::{ErrorKind, StoreError};

const TEXT: &str = "not asked: it is a loopback, link-local or metadata address; correct the address, or have the operator set \
                    allowLocalAddresses: true for the agent";

async fn refused(to: &crate::reference::Connection) -> StoreError {
    Client::within(Reach::default()).refused(to, "secret/data/app").await
}

#[tokio::test]
async fn a_local_address_is_not_asked_whether_it_is_written_or_a_name_leads_to_it() {
    let server = Server::start(|_, _| say(200, SECRET)).await;
    for host in ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "0.0.0.0", "2130706433"] {
        let error = refused(&connection(&[&format!("http://{host}:{}", server.port)])).await;
        assert_eq!(error.kind, ErrorKind::Refused, "{host}: {error}");
        assert!(error.to_string().ends_with(TEXT), "{host}: {error}");
    }
    assert_eq!(server.count(), 0);
    for host in ["127.0.0.1", "localhost"] {
        let reach = Reach { local_addresses: true, ..Reach::default() };
        let to = connection(&[&format!("http://{host}:{}", server.port)]);
        Client::within(reach).read(&to, "secret/data/app").await.unwrap_or_else(|error| panic!("{error}"));
    }
    assert_eq!(server.count(), 2);
}

#[tokio::test]
async fn a_server_name_takes_nobody_to_a_local_address() {
    let authority = Authority::new();
    let server = Server::start_tls(authority.server(&["vault.example"]), |_, _| say(200, SECRET)).await;
    for host in ["127.0.0.1", "localhost"] {
        let mut to = connection(&[&format!("https://{host}:{}", server.port)]);
        to.ca = Some(crate::reference::Pem::Text(authority.pem()));
        to.server_name = Some("vault.example".to_owned());
        let error = refused(&to).await;
        assert!(error.kind == ErrorKind::Refused && error.to_string().ends_with(TEXT), "{error}");
        Client::new().read(&to, "secret/data/app").await.unwrap_or_else(|error| panic!("{error}"));
    }
    assert_eq!(server.count(), 2);
}

#[tokio::test]
async fn no_redirect_leads_to_a_local_address() {
    let leader = Server::start(|_, _| say(200, SECRET)).await;
    let target = leader.url();
    let to = target.clone();
    // The standby is no local address: it is reached through a proxy, which only an operator can set.
    let standby = Server::start(move |_, seen| {
        let path = seen.target.strip_prefix("http://standby.example:8200").unwrap();
        redirect(307, &format!("{to}{path}"))
    })
    .await;
    let mut to = connection(&["http://standby.example:8200", &target]);
    to.proxy = Some(standby.url().parse().unwrap());
    let error = refused(&to).await;
    assert!(error.kind == ErrorKind::Refused && error.to_string().contains("not asked"), "{error}");
    assert_eq!((standby.count(), leader.count()), (1, 0));
}
