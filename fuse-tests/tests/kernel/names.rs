use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::DirEntryExt as _;
use std::path::Path;

use fuse_tests::agent::BareFile;
use fuse_tests::stamp::Content;

use super::agent;

fn names(path: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(path).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// Names in which every byte occurs that a UTF-8 name may have: all of ASCII but `/` and NUL, every first and every following
/// byte of longer characters.
fn every_legal_byte() -> Vec<String> {
    let ascii = (1..128u8).map(char::from).filter(|c| *c != '/').map(|c| format!("x{c}"));
    let two_bytes: Vec<char> = (0x80..0x800).filter_map(char::from_u32).collect();
    let two_bytes: Vec<String> = two_bytes.chunks(100).map(|part| part.iter().collect()).collect();
    let longer = (0x800..0x11_0000u32).step_by(0x800).filter_map(char::from_u32).map(String::from);
    let alone = ["-rf", "*", " ", "\n", "~", "$(id)", ".hidden", "a..", "...x".trim_start_matches('.')];
    let alone = alone.into_iter().map(str::to_owned);
    let longest = ["n".repeat(255), format!("{}x", "é".repeat(127))];
    ascii.chain(two_bytes).chain(longer).chain(alone).chain(longest).collect()
}

#[test]
fn names_may_have_every_legal_byte() {
    let Some(mut agent) = agent() else { return };
    let names: BTreeSet<String> = every_legal_byte().into_iter().collect();
    let bytes: BTreeSet<u8> = names.iter().flat_map(|name| name.bytes()).collect();
    let legal = (1..=0xf4u8).filter(|byte| !matches!(byte, b'/' | 0xc0 | 0xc1)).collect();
    assert_eq!(bytes, legal, "of this test");
    let files: Vec<BareFile> = names.iter().map(|name| name.as_str().into()).collect();
    let contents: Vec<Content> = names.iter().map(|name| name.as_str().into()).collect();
    let mounted = agent.bare(&files, &contents);
    for name in &names {
        assert_eq!(mounted.text(name), *name);
        assert_eq!(mounted.text(&format!("..data/{name}")), *name);
    }
    let listed: BTreeSet<String> = self::names(mounted.path()).into_iter().collect();
    assert!(names.is_subset(&listed));
    assert_eq!(listed.len(), names.len() + 2, "and ..data with its directory");
}

#[test]
fn a_name_that_is_too_long_or_absent_is_told_apart() {
    let Some(mut agent) = agent() else { return };
    let mounted = agent.texts(&[("a", "1"), ("d/b", "1")]);
    let errno = |name: &str| std::fs::read(mounted.join(name)).unwrap_err().raw_os_error().unwrap();
    assert_eq!(errno("b"), libc::ENOENT);
    assert_eq!(errno("A"), libc::ENOENT);
    assert_eq!(errno(&"n".repeat(256)), libc::ENAMETOOLONG);
    assert_eq!(errno("a/b"), libc::ENOTDIR);
    assert_eq!(errno("d"), libc::EISDIR);
    // A name that was absent may appear: absence is never remembered.
    assert_eq!(errno("b"), libc::ENOENT);
}

#[test]
fn a_thousand_files_in_nested_directories_are_listed_once_and_read() {
    let Some(mut agent) = agent() else { return };
    let paths: Vec<String> =
        (0..1_000).map(|n| format!("team-{}/app-{}/secret-{n:04}", n % 10, n % 50)).collect();
    let files: Vec<BareFile> = paths.iter().map(|path| path.as_str().into()).collect();
    let contents: Vec<Content> = paths.iter().map(|path| path.as_str().into()).collect();
    let mounted = agent.bare(&files, &contents);
    let mut found = Vec::new();
    let mut directories = vec![mounted.path().to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(&directory).unwrap().map(Result::unwrap) {
            let kind = entry.file_type().unwrap();
            if kind.is_file() {
                let path = entry.path();
                found.push(path.strip_prefix(mounted.path()).unwrap().to_str().unwrap().to_owned());
            } else if kind.is_dir() && !entry.file_name().to_str().unwrap().starts_with("..") {
                directories.push(entry.path());
            }
        }
    }
    found.sort();
    let mut expected = paths.clone();
    expected.sort();
    assert_eq!(found, expected);
    assert!(paths.iter().all(|path| mounted.text(path) == *path));
}

#[test]
fn a_listing_that_is_under_way_is_whole_and_stable_over_rotations() {
    let Some(mut agent) = agent() else { return };
    let paths: Vec<String> = (0..1_000).map(|n| format!("{n:04}-{}", "long".repeat(20))).collect();
    let files: Vec<BareFile> = paths.iter().map(|path| path.as_str().into()).collect();
    let contents = |round: usize| -> Vec<Content> { paths.iter().map(|_| Content::Pattern(round)).collect() };
    let mounted = agent.bare(&files, &contents(1));
    let mut listed = Vec::new();
    let mut entries = std::fs::read_dir(mounted.path()).unwrap();
    for round in 2..8 {
        listed.extend(entries.by_ref().take(170).map(|entry| entry.unwrap().file_name()));
        agent.install(&mounted, &contents(round));
    }
    listed.extend(entries.map(|entry| entry.unwrap().file_name()));
    let listed: Vec<&str> = listed.iter().filter_map(|name| name.to_str()).collect();
    let plain: Vec<&str> = listed.iter().copied().filter(|name| !name.starts_with("..")).collect();
    assert_eq!(plain, paths);
}

#[test]
fn a_directory_that_stays_open_finds_what_is_newest() {
    let Some(mut agent) = agent() else { return };
    let mounted = agent.texts(&[("d/a", "1")]);
    let directory = std::fs::File::open(mounted.join("d")).unwrap();
    let link = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&directory));
    for text in ["22", "333", "4444"] {
        agent.install_texts(&mounted, &[text]);
        fuse_tests::wait::until_true("the new bytes", fuse_tests::wait::SOON, || {
            std::fs::read_to_string(Path::new(&link).join("a")).unwrap() == text
        });
        assert_eq!(names(Path::new(&link)), ["a"]);
    }
}

#[test]
fn a_listing_and_a_look_up_agree_on_inodes() {
    let Some(mut agent) = agent() else { return };
    let mounted = agent.texts(&[("a", "1"), ("d/b", "1")]);
    for directory in ["", "d", "..data", "..data/d"] {
        let path = mounted.join(directory);
        let listed: BTreeMap<_, _> = std::fs::read_dir(&path)
            .unwrap()
            .map(|entry| entry.map(|entry| (entry.file_name(), entry.ino())).unwrap())
            .collect();
        for (name, inode) in listed {
            let found = std::fs::symlink_metadata(path.join(&name)).unwrap();
            assert_eq!(std::os::unix::fs::MetadataExt::ino(&found), inode, "{directory}/{}", name.display());
        }
    }
}
