//! What pods' owners are told.

use std::time::{Duration, SystemTime};

use axum::http::StatusCode;
use fuse_secrets::kubernetes::events::refresh::Failing;
use fuse_secrets::kubernetes::events::{Events, Reason};
use fuse_secrets::volume::{Pod, Report};

use crate::api::{Server, metrics, until};

fn pod(name: &str) -> Pod {
    Pod {
        name: name.to_owned(),
        namespace: "app".to_owned(),
        service_account: "web".to_owned(),
        uid: format!("uid-of-{name}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_is_the_pods_and_the_same_is_not_told_twice() {
    let server = Server::start().await;
    let metrics = metrics();
    let events = Events::start(server.api(), metrics.clone());
    for _ in 0..3 {
        events.tell(
            "csi-1",
            &pod("web-0"),
            Reason::VolumeWarning,
            "volumeAttributes.role has no effect; remove it",
        );
    }
    events.tell("csi-1", &pod("web-0"), Reason::DeadMount, &"ü".repeat(2_000));
    events.tell("csi-2", &pod("web-1"), Reason::VolumeWarning, "the same of another volume");
    events.tell("csi-3", &Pod::default(), Reason::VolumeWarning, "of nobody");
    until("three events", || metrics.events_created.value() == 3).await;
    let made = server.world().events.clone();
    assert_eq!(made.len(), 3);
    let first = &made[0];
    assert_eq!(first["posted"], "/api/v1/namespaces/app/events");
    assert_eq!(first["metadata"]["namespace"], "app");
    assert!(first["metadata"]["name"].as_str().unwrap().starts_with("web-0."));
    let object = &first["involvedObject"];
    assert_eq!(
        (&object["kind"], &object["name"], &object["uid"]),
        (&"Pod".into(), &"web-0".into(), &"uid-of-web-0".into())
    );
    assert_eq!((&first["reason"], &first["type"]), (&"SecretVolumeWarning".into(), &"Warning".into()));
    assert_eq!(first["message"], "volumeAttributes.role has no effect; remove it");
    assert_eq!(first["source"]["component"], "fuse-secrets");
    assert!(first["firstTimestamp"].as_str().unwrap().ends_with('Z'));
    assert_eq!(made[1]["reason"], "SecretMountDead");
    assert_eq!(made[1]["message"].as_str().unwrap().len(), 1_024);
    assert_eq!(metrics.events_dropped.value(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_api_server_does_not_take_and_what_is_too_much_is_counted_and_nobody_waits() {
    let server = Server::start().await;
    server.world().broken = Some(StatusCode::FORBIDDEN);
    let metrics = metrics();
    let events = Events::start(server.api(), metrics.clone());
    for number in 0..500 {
        events.tell(&format!("csi-{number}"), &pod("web-0"), Reason::RefreshFailed, "no answer");
    }
    assert!(metrics.events_dropped.value() >= 300, "the queue is bounded");
    server.world().broken = None;
    until("an event that is taken", || metrics.events_created.value() > 0).await;
}

#[test]
fn a_refresh_that_fails_is_told_after_a_while_once_an_hour_and_when_it_recovers() {
    let begun = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
    let at = |seconds| begun + Duration::from_secs(seconds);
    let failing = Report {
        since: begun,
        opens: 0,
        reads: 0,
        refreshed: None,
        stale_since: Some(begun),
        gone: 0,
        last_error: Some("GET https://vault:8200/v1/secret/data/a: connection refused".to_owned()),
    };
    let well = Report { stale_since: None, ..failing.clone() };
    let mut told = Failing::default();
    assert_eq!(told.look("v", &well, at(0)), None);
    assert_eq!(told.look("v", &failing, at(60)), None);
    assert_eq!(told.look("v", &well, at(70)), None, "nobody was told, so nobody need hear of the end");
    let (reason, text) = told.look("v", &failing, at(121)).unwrap();
    assert_eq!(reason, Reason::RefreshFailed);
    assert_eq!(
        text,
        "secrets cannot be refreshed since 2027-01-15T08:00:00Z, the last known values are served: GET \
         https://vault:8200/v1/secret/data/a: connection refused"
    );
    assert_eq!(told.look("v", &failing, at(600)), None);
    let gone = Report { gone: 2, ..failing.clone() };
    let (_, text) = told.look("v", &gone, at(3_800)).unwrap();
    assert!(text.contains("2 files are not served any more, their grace has ended"), "{text}");
    let (reason, text) = told.look("v", &well, at(4_000)).unwrap();
    assert_eq!((reason, text.as_str()), (Reason::RefreshRecovered, "the secrets are refreshed again"));
    assert_eq!(told.look("v", &well, at(4_010)), None);
    told.look("v", &failing, at(5_000)).unwrap();
    told.keep(|_| false);
    assert_eq!(told.look("v", &well, at(5_010)), None, "a volume that went is forgotten");
}
