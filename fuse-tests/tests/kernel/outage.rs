use std::collections::BTreeMap;
use std::time::Duration;

use fuse_tests::agent::{Agent, Command};
use fuse_tests::backend::{Backend, Kind};
use fuse_tests::mounted::Mounted;
use fuse_tests::wait::{SOON, until, until_true};
use serde_json::json;

use super::agent;
use super::stores::{Files, class};

/// A class with one file, `password`, of a store in this process.
fn mount(agent: &mut Agent, backend: &Backend, files: &Files, more: &[(&str, &str)]) -> Mounted {
    backend.put("app", &json!({"password": "one"}));
    let token = files.write("token", backend.root_token());
    let address = backend.address();
    let settings = [("address", address.as_str()), ("token_file", &token), ("refresh_interval", "1s")];
    let settings = settings.iter().chain(more).map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    let mounted = Mounted::new();
    let class = class("app", &[("password", "secret/data/app", Some("password"))]);
    let settings: BTreeMap<String, String> = settings.collect();
    agent.ask(&Command::Class { path: mounted.path().to_owned(), class, settings }).unwrap();
    mounted
}

#[test]
fn an_open_waits_for_a_store_that_hangs_no_longer_than_its_deadline() {
    let Some(mut agent) = agent() else { return };
    let (backend, files) = (Backend::start(&Kind::Embedded, false), Files::new());
    let mounted = mount(&mut agent, &backend, &files, &[("open_deadline", "300ms")]);
    let _gate = backend.embedded().hold("secret/data/app").unwrap();
    backend.put_beside("app", &json!({"password": "two"}));
    let stale = "cache_stale_serves_total";
    // The gate stays shut: whoever returns did not wait for the store.
    until_true("stale serves", SOON, || {
        assert_eq!(mounted.text("password"), "one");
        agent.metric(stale) >= 5
    });
}

#[test]
fn an_open_of_an_old_value_waits_for_the_store_and_gets_the_new_one() {
    let Some(mut agent) = agent() else { return };
    let (backend, files) = (Backend::start(&Kind::Embedded, false), Files::new());
    let mounted = mount(&mut agent, &backend, &files, &[("open_deadline", "5s")]);
    let gate = backend.embedded().hold("secret/data/app").unwrap();
    backend.put_beside("app", &json!({"password": "two"}));
    backend.block_on(gate.arrived(1, SOON)).unwrap();
    // Its value is older than the max age by then, and the refresh hangs: this open waits.
    let misses = agent.metric("cache_misses_total");
    let path = mounted.join("password");
    let reader = std::thread::spawn(move || {
        until("the new value", SOON, || {
            let text = std::fs::read_to_string(&path).unwrap();
            (text != "one").then_some(text)
        })
    });
    until_true("an open that waits", SOON, || agent.metric("cache_misses_total") > misses);
    gate.open();
    assert_eq!(reader.join().unwrap(), "two");
}

#[test]
fn when_the_grace_is_over_reads_fail_and_when_the_store_is_back_they_work() {
    let Some(mut agent) = agent() else { return };
    let (backend, files) = (Backend::start(&Kind::Embedded, false), Files::new());
    let mounted = mount(&mut agent, &backend, &files, &[("stale_grace", "2s"), ("open_deadline", "0s")]);
    backend.embedded().seal();
    let error = until("the end of the grace", SOON, || {
        std::fs::read(mounted.join("password")).map(|bytes| assert_eq!(bytes, b"one")).err()
    });
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    let frozen =
        until("the end of it, frozen", SOON, || std::fs::read(mounted.join("..data/password")).err());
    assert_eq!(frozen.raw_os_error(), Some(libc::EIO));
    backend.embedded().unseal();
    until_true("the value", Duration::from_secs(20), || {
        std::fs::read(mounted.join("password")).is_ok_and(|bytes| bytes == b"one")
    });
}
