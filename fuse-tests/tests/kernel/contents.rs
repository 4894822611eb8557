use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::time::Duration;

use fuse_tests::agent::{Agent, BareFile};
use fuse_tests::mounted::Mounted;
use fuse_tests::stamp::{Content, check, stamp};
use fuse_tests::wait::{SOON, pause, until, until_true};
use rustix::fs::{Mode, OFlags};
use rustix::mount::mount_bind;

use super::agent;

fn shows(mounted: &Mounted, name: &str, text: &str) {
    until_true("the new bytes", SOON, || mounted.text(name) == text);
}

/// The bytes at an offset.
fn pread(file: &File, offset: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    let got = file.read_at(&mut bytes, offset).unwrap();
    bytes.truncate(got);
    bytes
}

#[test]
fn a_file_is_read_whole_and_from_any_offset() {
    let Some(mut agent) = agent() else { return };
    let mounted = agent.texts(&[("password", "s3cret"), ("tls/key", "k")]);
    assert_eq!((mounted.text("password"), mounted.text("tls/key")), ("s3cret".into(), "k".into()));
    let file = File::open(mounted.join("password")).unwrap();
    assert_eq!(pread(&file, 2, 2), b"cr");
    assert_eq!(pread(&file, 5, 100), b"t");
    assert_eq!(pread(&file, 6, 100), b"");
    assert_eq!(pread(&file, u64::from(u32::MAX), 100), b"");
}

#[test]
fn an_open_file_keeps_its_version_through_rotations() {
    let Some(mut agent) = agent() else { return };
    let mounted = agent.bare(&["a".into()], &[Content::Stamped { version: 1, length: 300_000 }]);
    let (first, mut streamed) =
        (File::open(mounted.join("a")).unwrap(), File::open(mounted.join("a")).unwrap());
    let mut bytes = vec![0; 1_000];
    streamed.read_exact(&mut bytes).unwrap();
    for version in 2..=6 {
        agent.install(&mounted, &[Content::Stamped { version, length: 200_000 + version as usize }]);
        until_true("the new version", SOON, || check(&mounted.read("a")) == Ok(version));
    }
    let expected = stamp(1, 300_000);
    for offset in [0, 1, 4_095, 131_072, 299_999, 300_000] {
        let rest = &expected[offset..];
        assert_eq!(pread(&first, offset as u64, 50_000), rest[..rest.len().min(50_000)], "at {offset}");
    }
    streamed.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes, expected, "a read that began before goes on with the same bytes");
}

#[test]
fn what_nobody_has_open_is_given_up_after_two_rotations() {
    let Some(mut agent) = agent() else { return };
    let mounted = agent.texts(&[("a", "1")]);
    let held = File::open(mounted.join("a")).unwrap();
    for text in ["2", "3", "4"] {
        agent.install_texts(&mounted, &[text]);
    }
    assert_eq!(agent.generations(&mounted), [1, 3, 4]);
    drop(held);
    // The kernel tells of the close after it.
    until_true("the release", SOON, || agent.generations(&mounted) == [3, 4]);
}

#[test]
fn beyond_eight_old_versions_the_oldest_reader_gets_estale() {
    let Some(mut agent) = agent() else { return };
    let mounted = agent.texts(&[("a", "1")]);
    let mut open = Vec::new();
    for version in 1..=11 {
        if version > 1 {
            agent.install_texts(&mounted, &[&version.to_string()]);
        }
        open.push(File::open(mounted.join("..data/a")).unwrap());
    }
    let read = |file: &File| file.read_at(&mut [0; 8], 0).map_err(|error| error.raw_os_error());
    assert_eq!(read(&open[0]), Err(Some(libc::ESTALE)));
    for (index, file) in open.iter().enumerate().skip(1) {
        assert_eq!(pread(file, 0, 8), (index + 1).to_string().as_bytes());
    }
    assert!(agent.metric("fs_stale_handles_total") >= 1);
}

#[test]
fn size_after_open_is_the_size_of_what_is_read() {
    let Some(mut agent) = agent() else { return };
    let mounted = agent.bare(&["a".into()], &[Content::Pattern(100)]);
    for round in 1..6usize {
        agent.install(&mounted, &[Content::Pattern(100 + round * 7)]);
        // Opened without pause: the switch falls between two of these, after a second at most.
        until_true("the new version", SOON, || {
            let mut file = File::open(mounted.join("a")).unwrap();
            let size = file.metadata().unwrap().len();
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes).unwrap();
            assert_eq!(bytes.len() as u64, size);
            bytes.len() == 100 + round * 7
        });
    }
}

#[test]
fn size_after_open_is_right_however_fast_versions_follow_each_other() {
    let Some(mut agent) = agent() else { return };
    let mounted = agent.bare(&["a".into()], &[Content::Pattern(100)]);
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let (path, ended) = (mounted.join("a"), std::sync::Arc::clone(&stop));
    let reader = std::thread::spawn(move || {
        let mut opens = 0u32;
        while !ended.load(std::sync::atomic::Ordering::Relaxed) {
            let mut file = File::open(&path).unwrap();
            let size = file.metadata().unwrap().len();
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes).unwrap();
            assert_eq!(bytes.len() as u64, size, "after {opens} opens");
            drop(file);
            opens += 1;
        }
        opens
    });
    // Bursts: what the reader was shown last is not kept any more when it opens next.
    for round in 1..900usize {
        agent.install(&mounted, &[Content::Pattern(100 + round % 97)]);
        pause(Duration::from_millis(if round % 3 == 0 { 8 } else { 0 }));
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    assert!(reader.join().unwrap() > 50);
}

#[test]
fn a_file_that_is_opened_without_pause_shows_a_new_version_all_the_same() {
    let Some(mut agent) = agent() else { return };
    let mounted = agent.texts(&[("a", "old")]);
    assert_eq!(mounted.text("a"), "old");
    agent.install_texts(&mounted, &["new!"]);
    // Each of these is an open that asks for another moment with the old version.
    let end = std::time::Instant::now() + SOON;
    while mounted.text("a") == "old" {
        assert!(std::time::Instant::now() < end, "the old version for ever");
    }
    assert_eq!(mounted.text("a"), "new!");
}

#[test]
fn the_inode_of_a_path_never_changes() {
    let Some(mut agent) = agent() else { return };
    let mounted = agent.texts(&[("a", "1"), ("d/b", "1")]);
    let inode = |name: &str| std::fs::metadata(mounted.join(name)).unwrap().ino();
    let before = ["", "a", "d", "d/b"].map(inode);
    agent.install_texts(&mounted, &["22", "22"]);
    shows(&mounted, "a", "22");
    assert_eq!(["", "a", "d", "d/b"].map(inode), before);
    assert_ne!(inode("..data/a"), inode("a"), "a frozen file is another one");
}

#[test]
fn the_link_data_names_the_newest_version_at_once() {
    let Some(mut agent) = agent() else { return };
    let mounted = agent.texts(&[("a", "1"), ("b", "1")]);
    for round in 2..10 {
        assert_eq!(mounted.text("..data/a"), (round - 1).to_string());
        let text = round.to_string();
        agent.install_texts(&mounted, &[&text, &text]);
        assert_eq!(
            std::fs::read_link(mounted.join("..data")).unwrap().to_str().unwrap(),
            format!("..{round}")
        );
    }
}

#[test]
fn two_files_through_one_open_data_directory_are_of_one_instant() {
    let Some(mut agent) = agent() else { return };
    let mounted = agent.texts(&[("tls/crt", "1"), ("tls/key", "1")]);
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::open(mounted.join("..data"), flags, Mode::empty()).unwrap();
    let read = |name: &str| {
        let file = rustix::fs::openat(&directory, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
        let mut text = String::new();
        File::from(file.unwrap()).read_to_string(&mut text).unwrap();
        text
    };
    let crt = read("tls/crt");
    for text in ["2", "3", "4", "5"] {
        agent.install_texts(&mounted, &[text, text]);
    }
    assert_eq!((crt, read("tls/key")), ("1".into(), "1".into()));
    assert_eq!(mounted.text("..data/tls/key"), "5");
}

#[test]
fn a_generation_that_is_gone_is_no_longer_found_by_its_name() {
    let Some(mut agent) = agent() else { return };
    let mounted = agent.texts(&[("a", "1")]);
    let old = mounted.join(std::fs::read_link(mounted.join("..data")).unwrap().to_str().unwrap());
    assert!(old.join("a").exists());
    for text in ["2", "3"] {
        agent.install_texts(&mounted, &[text]);
    }
    let error = until("the end of the name", SOON, || std::fs::read(old.join("a")).err());
    assert!(matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESTALE)), "{error}");
}

#[test]
fn a_single_file_mounted_elsewhere_shows_new_versions_at_the_next_open() {
    let Some(mut agent) = agent() else { return };
    let mounted = agent.texts(&[("password", "old")]);
    // What a subPath is: a bind mount of one file, onto a file.
    let elsewhere = Mounted::new();
    let target = elsewhere.join("file");
    std::fs::write(&target, "").unwrap();
    mount_bind(mounted.join("password"), &target).unwrap();
    let _unmount = Unmount(&target);
    assert_eq!(std::fs::read_to_string(&target).unwrap(), "old");
    agent.install_texts(&mounted, &["new!"]);
    until_true("the new bytes", SOON, || std::fs::read_to_string(&target).unwrap() == "new!");
    assert_eq!(std::fs::metadata(&target).unwrap().len(), 4);
}

struct Unmount<'a>(&'a std::path::Path);

impl Drop for Unmount<'_> {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.0, rustix::mount::UnmountFlags::DETACH);
    }
}

fn sizes(agent: &mut Agent, sizes: &[usize]) {
    let files: Vec<BareFile> = sizes.iter().map(|size| format!("f{size}").as_str().into()).collect();
    let contents: Vec<Content> = sizes.iter().map(|size| Content::Pattern(*size)).collect();
    let mounted = agent.bare(&files, &contents);
    for (file, content) in files.iter().zip(&contents) {
        let expected = content.bytes().unwrap();
        let status = std::fs::metadata(mounted.join(&file.path)).unwrap();
        assert_eq!(status.len(), expected.len() as u64, "{}", file.path);
        assert!(mounted.read(&file.path) == expected, "{}", file.path);
        // One byte at a time around the end, and in one call that is larger than the file.
        let open = File::open(mounted.join(&file.path)).unwrap();
        for offset in expected.len().saturating_sub(2)..expected.len() + 2 {
            let rest = expected.get(offset..).unwrap_or_default();
            assert_eq!(pread(&open, offset as u64, 1), rest[..rest.len().min(1)]);
        }
        assert!(pread(&open, 0, expected.len() + 100_000) == expected);
    }
}

#[test]
fn secrets_of_every_size_are_whole() {
    let Some(mut agent) = agent() else { return };
    sizes(
        &mut agent,
        &[
            0, 1, 511, 512, 513, 4_095, 4_096, 4_097, 65_535, 65_536, 65_537, 131_071, 131_072, 131_073,
            262_145,
        ],
    );
}

#[test]
fn a_secret_of_one_mebibyte_and_one_of_no_byte_are_whole() {
    let Some(mut agent) = agent() else { return };
    sizes(&mut agent, &[1 << 20, 0, (1 << 20) + 1]);
}

#[test]
fn a_value_that_was_given_up_is_an_input_output_error_until_it_is_back() {
    let Some(mut agent) = agent() else { return };
    let mounted = agent.texts(&[("a", "1"), ("b", "1")]);
    let held = File::open(mounted.join("a")).unwrap();
    agent.install(&mounted, &[Content::Gone, "2".into()]);
    let error = until("the end of the value", SOON, || std::fs::read(mounted.join("a")).err());
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    assert!(held.read_at(&mut [0; 8], 0).is_err(), "nor is it served to who has it open");
    assert!(mounted.join("a").exists(), "the name stays");
    shows(&mounted, "b", "2");
    agent.install_texts(&mounted, &["3", "3"]);
    until_true("the value", SOON, || std::fs::read(mounted.join("a")).is_ok_and(|bytes| bytes == b"3"));
}
