use std::collections::BTreeMap;
use std::time::Duration;

use fuse_tests::agent::Command;
use fuse_tests::backend::{Backend, Kind};
use fuse_tests::mounted::Mounted;
use fuse_tests::wait::until_true;
use serde_json::json;

use super::agent;
use super::stores::{Files, approle, class};

#[test]
fn a_hundred_volumes_of_one_identity_are_one_login_and_one_read_per_path() {
    for (store, kind) in Kind::all() {
        let Some(mut agent) = agent() else { return };
        let backend = Backend::start(&kind, false);
        backend.put("db", &json!({"user": "u1", "password": "p1"}));
        backend.put("api", &json!({"key": "k1"}));
        let policy = "path \"secret/data/*\" { capabilities = [\"read\"] }";
        backend.write("sys/policies/acl/app", &json!({ "policy": policy }));
        approle(&backend, "1h", "2h");
        let files = Files::new();
        let settings: BTreeMap<String, String> = [
            ("address", backend.address()),
            ("role_id", "the-role".into()),
            ("secret_id_file", files.write("secret-id", "the-secret-id")),
            ("refresh_interval", "15s".into()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into();
        let class = class(
            "app",
            &[
                ("user", "secret/data/db", Some("user")),
                ("password", "secret/data/db", Some("password")),
                ("key", "secret/data/api", Some("key")),
            ],
        );
        let paths = ["secret/data/db", "secret/data/api"];
        let reads = || paths.map(|path| backend.counts().reads.get(path).copied().unwrap_or_default());
        let volumes: Vec<Mounted> = (0..100)
            .map(|_| {
                let mounted = Mounted::new();
                let (path, class) = (mounted.path().to_owned(), class.clone());
                agent.ask(&Command::Class { path, class, settings: settings.clone() }).unwrap();
                mounted
            })
            .collect();
        assert_eq!((backend.counts().logins, reads()), (1, [1, 1]), "{store}: for {} volumes", volumes.len());

        backend.put("db", &json!({"user": "u2", "password": "p2"}));
        backend.put("api", &json!({"key": "k2"}));
        let shows = |mounted: &Mounted| {
            mounted.text("user") == "u2" && mounted.text("password") == "p2" && mounted.text("key") == "k2"
        };
        until_true("the rotation in all", Duration::from_secs(40), || volumes.iter().all(shows));
        assert_eq!((backend.counts().logins, reads()), (1, [2, 2]), "{store}: a rotation");
        assert_eq!(agent.metric("volumes"), 100);
        for mounted in &volumes {
            agent.unmount(mounted);
        }
        until_true("nothing held", Duration::from_secs(10), || {
            agent.metric("volumes") == 0 && agent.metric("cache_entries") == 0
        });
    }
}
