use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

use fuse_tests::readers::Readers;
use fuse_tests::stamp::Content;
use fuse_tests::wait::{SOON, pause, until_true};

use super::agent;

#[test]
fn eight_readers_never_see_a_torn_or_an_older_value_while_it_rotates() {
    let Some(mut agent) = agent() else { return };
    // Of sizes that take one, two and three requests to read.
    let content =
        |version: u32| Content::Stamped { version, length: 1_000 + (version as usize * 37_123) % 300_000 };
    let mounted = agent.bare(&["a".into(), "other".into()], &[content(1), "same".into()]);
    let paths = ["a", "..data/a"].into_iter().cycle().take(8);
    let readers = Readers::start(paths.map(|name| mounted.join(name)));
    let (end, mut version) = (Instant::now() + Duration::from_secs(10), 1);
    while Instant::now() < end {
        version += 1;
        agent.install(&mounted, &[content(version), "same".into()]);
        pause(Duration::from_millis(50));
    }
    assert!(version > 50, "only {version} versions in 10 s");
    for seen in readers.finish() {
        let seen = seen.unwrap();
        assert!(seen.newer >= 3 && seen.reads > seen.newer, "{seen:?} of {version} versions");
        assert!(seen.failed.is_empty(), "{seen:?}");
    }
    assert_eq!(agent.metric("fs_panics_total"), 0);
}

#[test]
fn an_unmount_under_readers_ends_the_mount_and_lets_open_files_finish() {
    let Some(mut agent) = agent() else { return };
    let content = Content::Stamped { version: 1, length: 300_000 };
    let mounted = agent.bare(&["a".into()], std::slice::from_ref(&content));
    let held = File::open(mounted.join("a")).unwrap();
    let readers = Readers::start(["a", "..data/a", "a", "a"].map(|name| mounted.join(name)));
    pause(Duration::from_millis(100));
    mounted.unmount();
    for seen in readers.finish() {
        // Told that the path is no more, if not stopped in time. Nobody hangs, nobody gets half a value.
        let failed = seen.unwrap().failed;
        assert!(failed.keys().all(|error| *error == libc::ENOENT), "{failed:?}");
    }
    let mut bytes = vec![0; 300_000];
    held.read_exact_at(&mut bytes, 0).unwrap();
    assert!(Some(bytes) == content.bytes(), "who has it open reads on");
    drop(held);
    agent.unmount(&mounted);
    assert_eq!(std::fs::read_dir(mounted.path()).unwrap().count(), 0);
    until_true("no volume held", SOON, || agent.metric("volumes") == 0);
}
