//! Who can reach the driver's socket is root on the node, and may say whatever it likes of a pod: without a token that proves it, it
//! gets nothing, of what the agent has already least of all.

use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use fuse_tests::cluster::csi::Asked;
use fuse_tests::cluster::store::AUDIENCE;
use fuse_tests::cluster::tenant::ACCOUNT;
use fuse_tests::cluster::{Cluster, Tenant, shared};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use rcgen::{KeyPair, PKCS_RSA_SHA256, RsaKeySize};
use serde_json::{Value, json};

const VALUE: &str = "value-of-a-test";

/// What stands in a token's claims, and its key's name.
fn opened(token: &str) -> (Value, String) {
    let claims = token.split('.').nth(1).unwrap();
    let claims = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(claims).unwrap()).unwrap();
    (claims, jsonwebtoken::decode_header(token).unwrap().kid.unwrap())
}

/// A token of the test's own making.
fn signed(claims: &Value, kid: &str, key: &str) -> String {
    let header = Header { kid: Some(kid.to_owned()), ..Header::new(Algorithm::RS256) };
    jsonwebtoken::encode(&header, claims, &EncodingKey::from_rsa_pem(key.as_bytes()).unwrap()).unwrap()
}

/// Logins and reads of a tenant so far.
fn requests(cluster: &Cluster, tenant: &Tenant<'_>) -> (usize, Option<u64>) {
    let store = cluster.store();
    let reads = store.counts().reads.get(&tenant.path("app")).copied();
    (store.logins_at("kubernetes", &tenant.role), reads)
}

#[test]
fn forged_publishes_get_nothing_that_is_cached() {
    let Some(cluster) = shared() else { return };
    let (victim, attacker) = (cluster.tenant("victim"), cluster.tenant("attacker"));
    victim.put("app", &json!({"password": VALUE}));
    // Asked for once, and then held.
    victim.class("app", &[("password", "app", "password")], &json!({"refreshInterval": "1h"}));
    let uid = victim.run(&victim.reader("reads", "app"));
    assert_eq!(victim.sh("reads", "cat /mnt/secrets/password"), VALUE);
    let neighbour = victim.run(&victim.pod("neighbour"));
    let place = attacker.run(&attacker.pod("attacks"));
    let before = requests(&cluster, &victim);
    assert_eq!(before, (1, Some(1)));

    let own = cluster.token_of_pod(&attacker.namespace, ACCOUNT, AUDIENCE, ("attacks", &place));
    let of =
        |audience: &str, pod: (&str, &str)| cluster.token_of_pod(&victim.namespace, ACCOUNT, audience, pod);
    let real = of(AUDIENCE, ("reads", &uid));
    let (claims, kid) = opened(&real);
    let mut expired = claims.clone();
    for claim in ["iat", "nbf", "exp"] {
        expired[claim] = json!(claims[claim].as_u64().unwrap() - 3_600);
    }
    let issuer = cluster.signing_key();
    let stranger = KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, RsaKeySize::_2048).unwrap().serialize_pem();
    let account = format!("{}/{ACCOUNT}", victim.namespace);
    let said = |of: &str| [victim.namespace.as_str(), "reads", of, ACCOUNT].map(ToOwned::to_owned);

    let forged = [
        (
            "another namespace",
            said(&uid),
            own,
            "PermissionDenied",
            format!("is that of another service account than {account}, the pod's; the pod must be created anew"),
        ),
        (
            "another pod",
            said(&uid),
            of(AUDIENCE, ("neighbour", &neighbour)),
            "PermissionDenied",
            format!(
                "is that of another pod than {}/reads (claim kubernetes.io/pod/name); the pod must be created anew",
                victim.namespace
            ),
        ),
        (
            "another pod's uid",
            said(&neighbour),
            real.clone(),
            "PermissionDenied",
            format!(
                "is that of another pod than {}/reads (claim kubernetes.io/pod/uid); the pod must be created anew",
                victim.namespace
            ),
        ),
        (
            "no pod at all",
            said(&uid),
            victim.token(),
            "FailedPrecondition",
            "is bound to no pod; it must carry the claim kubernetes.io/pod, as those have that kubelet gets for the \
             CSIDriver's tokenRequests"
                .to_owned(),
        ),
        (
            "expired",
            said(&uid),
            signed(&expired, &kid, &issuer),
            "FailedPrecondition",
            "has expired (claim exp); kubelet sends a newer one by itself, unless the clocks of this node and the API server \
             differ"
                .to_owned(),
        ),
        (
            "another audience",
            said(&uid),
            of("other", ("reads", &uid)),
            "PermissionDenied",
            "is made for another one (claim aud); correct spec.tokenRequests of the CSIDriver, and create the pod anew"
                .to_owned(),
        ),
        (
            "self-signed",
            said(&uid),
            signed(&claims, &kid, &stranger),
            "PermissionDenied",
            "has a signature that is not the issuer's; the pod must be created anew".to_owned(),
        ),
        (
            "self-signed, with a key of its own",
            said(&uid),
            signed(&claims, "stranger", &stranger),
            "PermissionDenied",
            "is signed with a key that the API server does not publish at /openid/v1/jwks; the pod must be created anew, or ask \
             whoever runs the API server for its --service-account-key-file"
                .to_owned(),
        ),
        (
            "changed after it was signed",
            said(&uid),
            {
                let parts: Vec<&str> = real.split('.').collect();
                let mut changed = claims.clone();
                changed["exp"] = json!(claims["exp"].as_u64().unwrap() + 3_600);
                let changed = URL_SAFE_NO_PAD.encode(changed.to_string());
                format!("{}.{changed}.{}", parts[0], parts[2])
            },
            "PermissionDenied",
            "has a signature that is not the issuer's; the pod must be created anew".to_owned(),
        ),
    ];
    for (index, (what, pod, token, code, text)) in forged.into_iter().enumerate() {
        let volume = format!("forged-{index}-{place}");
        let asked = Asked { volume, place: place.clone(), pod, class: "app".to_owned(), token };
        let refused = cluster.publish(&asked).unwrap_err();
        assert_eq!(
            (format!("{:?}", refused.code()).as_str(), refused.message()),
            (code, format!("the token for audience {AUDIENCE:?} {text}").as_str()),
            "{what}"
        );
        assert!(!cluster.mountinfo().contains(&asked.volume), "{what}");
        assert!(!inside(&cluster, &asked).exists(), "{what}");
        cluster.unpublish(&asked).unwrap();
    }
    assert_eq!(requests(&cluster, &victim), before, "no forged token was shown to the store");

    // The real one is enough, and gets what is held: so nothing but the token was in the way.
    let asked = Asked {
        volume: format!("real-{place}"),
        place: place.clone(),
        pod: said(&uid),
        class: "app".to_owned(),
        token: real,
    };
    cluster.publish(&asked).unwrap();
    assert_eq!(std::fs::read_to_string(inside(&cluster, &asked).join("password")).unwrap(), VALUE);
    assert_eq!(requests(&cluster, &victim), before, "it is shared");
    cluster.unpublish(&asked).unwrap();
    let around = Path::new("kubelet/pods").join(&place).join("volumes/kubernetes.io~csi");
    std::fs::remove_dir(cluster.directory().join(around)).unwrap();
}

/// The target as the node sees it.
fn inside(cluster: &Cluster, asked: &Asked) -> std::path::PathBuf {
    cluster.root().join(asked.target().trim_start_matches('/'))
}
