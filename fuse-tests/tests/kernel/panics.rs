use std::fs::File;

use fuse_tests::agent::Command;
use fuse_tests::wait::{SOON, until};

use super::agent;

#[test]
fn a_handler_that_panics_answers_eio_once_and_the_mount_lives_on() {
    let Some(mut agent) = agent() else { return };
    let mounted = agent.texts(&[("a", "canary-in-a-panic"), ("b", "1")]);
    assert_eq!(mounted.text("a"), "canary-in-a-panic");
    agent.ask(&Command::Panic { path: mounted.path().to_owned() }).unwrap();
    agent.install_texts(&mounted, &["new", "2"]);
    // Some look-up, open or `fstat` takes the new version over, and announces it.
    let path = mounted.join("a");
    let touch = || File::open(&path).and_then(|file| file.metadata());
    let error = until("the panic", SOON, || touch().err());
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    assert_eq!((mounted.text("a"), mounted.text("..data/b")), ("new".into(), "2".into()));
    assert_eq!(agent.metric("fs_panics_total"), 1);
    let log = agent.log();
    assert!(log.contains("panicked") && !log.contains("canary-in-a-panic"));
}
