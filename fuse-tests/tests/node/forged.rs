//! Tokens that are not the pod's, where no API server says so: what one pod's token has brought into the cache is not another one's.

use fuse_tests::needs;
use fuse_tests::node::Node;
use serde_json::{Value, json};
use tonic::Code;

use crate::SIBLING;

/// The token in what kubelet writes.
fn token(tokens: &str) -> String {
    let issued: Value = serde_json::from_str(tokens).unwrap();
    issued["vault"]["token"].as_str().unwrap().to_owned()
}

fn issued(token: &str) -> String {
    json!({"vault": {"token": token}}).to_string()
}

#[test]
fn a_forged_token_gets_no_value_that_is_cached() {
    if !needs::kernel() {
        return;
    }
    let mut node = Node::start_with(SIBLING, &[], &["--publish-deadline", "5s"]);
    node.cluster.store.put("app", &json!({"password": "p"}));
    node.cluster.class("app", &[("password", "secret/data/app", Some("password"))], &[]);
    let first = node.volume("web-0", "app");
    node.publish(&first).unwrap();
    assert_eq!(node.cluster.store.counts().logins, 1, "the proof is the identity's login");

    // Everything that it claims is right, but somebody else signed it.
    let good = node.volume("web-1", "app");
    let (mut forged, mine, other) = (good.clone(), token(&good.tokens), token(&first.tokens));
    let (claims, signature) = (mine.rsplit_once('.').unwrap().0, other.rsplit_once('.').unwrap().1);
    forged.tokens = issued(&format!("{claims}.{signature}"));
    let no = node.publish(&forged).unwrap_err();
    assert_eq!(no.code(), Code::FailedPrecondition, "{}", no.message());
    assert!(
        no.message().contains("/v1/auth/jwt/login: 400") && !no.message().contains(claims),
        "{}",
        no.message()
    );
    assert!(!forged.target.exists());
    // A good one, of another pod.
    forged.tokens.clone_from(&first.tokens);
    let no = node.publish(&forged).unwrap_err();
    assert_eq!(no.code(), Code::PermissionDenied);
    let text =
        "is that of another pod than shop/web-1 (claim kubernetes.io/pod/name); the pod must be created anew";
    assert!(no.message().contains(text), "{}", no.message());
    // A good one of this pod's name, before it was made anew.
    let former = node.volume("web-1", "app");
    forged.tokens.clone_from(&former.tokens);
    let no = node.publish(&forged).unwrap_err();
    assert!(no.message().contains("(claim kubernetes.io/pod/uid)"), "{}", no.message());
    assert!(!forged.target.exists());

    node.publish(&good).unwrap();
    assert_eq!(std::fs::read_to_string(good.join("password")).unwrap(), "p");
    // A republish with a stranger's token is no error, and changes nothing.
    let mut republished = good.clone();
    republished.tokens.clone_from(&first.tokens);
    node.publish(&republished).unwrap();
    assert!(node.logs().contains("a newer token is not taken, the volume keeps its own"));

    // With the store away nobody can prove anything, whatever lies in the cache.
    let late = node.volume("web-2", "app");
    node.cluster.store.stop();
    let no = node.publish(&late).unwrap_err();
    assert!(matches!(no.code(), Code::Unavailable | Code::DeadlineExceeded), "{no:?}");
    assert!(!late.target.exists());
    for volume in [&first, &good] {
        assert_eq!(std::fs::read_to_string(volume.join("password")).unwrap(), "p");
        node.unpublish(volume).unwrap();
    }
    let logs = node.logs();
    assert!(!logs.contains(claims) && !logs.contains(signature), "a token is in the logs");
}
