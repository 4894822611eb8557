use std::fs::Metadata;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;

use fuse_tests::agent::BareFile;
use fuse_tests::stamp::Content;
use fuse_tests::wait::{SOON, until_true};
use rustix::io::Errno;

use super::agent;

fn status(path: impl AsRef<Path>) -> Metadata {
    std::fs::symlink_metadata(path).unwrap()
}

#[test]
fn owner_group_and_mode_are_those_of_the_file_without_execute_bits() {
    let Some(mut agent) = agent() else { return };
    let file = |path: &str, uid, gid, mode| BareFile { path: path.into(), uid, gid, mode };
    let files = [
        file("plain", None, None, None),
        file("grouped", None, Some(2_000), None),
        file("ssh", Some(1_000), Some(1_000), Some(0o600)),
        file("wild", None, None, Some(0o7777)),
    ];
    let mounted = agent.bare(&files, &["1".into(), "1".into(), "1".into(), "1".into()]);
    let owned = |name: &str| {
        let status = status(mounted.join(name));
        (status.uid(), status.gid(), status.mode())
    };
    let regular = libc::S_IFREG;
    assert_eq!(owned("plain"), (0, 0, regular | 0o444));
    assert_eq!(owned("grouped"), (0, 2_000, regular | 0o440));
    assert_eq!(owned("ssh"), (1_000, 1_000, regular | 0o600));
    assert_eq!(owned("wild"), (0, 0, regular | 0o666));
    assert_eq!(owned("..data/ssh"), owned("ssh"));
    assert_eq!(owned(""), (0, 0, libc::S_IFDIR | 0o555));
    let ran = Command::new(mounted.join("wild")).spawn().map(|_| ()).unwrap_err();
    assert_eq!(ran.raw_os_error(), Some(libc::EACCES), "a secret is no program");
}

#[test]
fn links_blocks_and_block_size_are_what_tools_expect() {
    let Some(mut agent) = agent() else { return };
    let mounted = agent.bare(
        &["a".into(), "d/b".into(), "d/e/c".into()],
        &[Content::Pattern(1_025), Content::Pattern(0), Content::Pattern(4_096)],
    );
    let a = status(mounted.join("a"));
    assert_eq!((a.len(), a.blocks(), a.blksize(), a.nlink()), (1_025, 3, 4_096, 1));
    assert_eq!((status(mounted.join("d/b")).blocks(), status(mounted.join("d/e/c")).blocks()), (0, 8));
    assert_eq!((status(mounted.path()).nlink(), status(mounted.join("d")).nlink()), (3, 3));
    let data = status(mounted.join("..data"));
    assert!(data.is_symlink() && data.len() == 3);
}

#[test]
fn mtime_is_the_versions_goes_never_back_and_stays_for_bytes_that_stay() {
    let Some(mut agent) = agent() else { return };
    let mounted = agent.texts(&[("a", "1"), ("b", "1")]);
    let times = |name: &str| {
        let status = status(mounted.join(name));
        let time = (status.mtime(), status.mtime_nsec());
        assert_eq!((status.atime(), status.atime_nsec()), time);
        assert_eq!((status.ctime(), status.ctime_nsec()), time);
        time
    };
    let (mut before, kept) = (times("a"), times("b"));
    for text in ["22", "333", "4444"] {
        agent.install_texts(&mounted, &[text, "1"]);
        until_true("the new size", SOON, || status(mounted.join("a")).len() == text.len() as u64);
        let now = times("a");
        assert!(now > before, "{now:?} after {before:?}");
        before = now;
        assert_eq!(times("..data/a"), now);
    }
    assert_eq!(times("b"), kept);
}

#[test]
fn statfs_tells_of_a_full_read_only_file_system() {
    let Some(mut agent) = agent() else { return };
    let mounted = agent.bare(&["a".into(), "b".into()], &[Content::Pattern(5_000), Content::Pattern(1)]);
    let all = rustix::fs::statvfs(mounted.path()).unwrap();
    assert_eq!((all.f_bsize, all.f_blocks, all.f_bfree, all.f_bavail), (4_096, 2, 0, 0));
    assert_eq!((all.f_files, all.f_ffree, all.f_namemax), (4, 0, 255));
    use rustix::fs::StatVfsMountFlags as Flags;
    assert!(all.f_flag.contains(Flags::RDONLY | Flags::NOSUID | Flags::NODEV | Flags::NOEXEC));
}

#[test]
fn there_are_no_extended_attributes() {
    let Some(mut agent) = agent() else { return };
    let mounted = agent.texts(&[("a", "1")]);
    // Twice: the first answer makes the kernel stop asking.
    for _ in 0..2 {
        for name in ["user.x", "security.capability", "trusted.x", "system.posix_acl_access"] {
            let answer = rustix::fs::getxattr(mounted.join("a"), name, &mut [0u8; 64]).unwrap_err();
            assert!(matches!(answer, Errno::OPNOTSUPP | Errno::NODATA), "{name}: {answer}");
        }
        match rustix::fs::listxattr(mounted.join("a"), &mut [0u8; 64]) {
            Err(Errno::OPNOTSUPP) | Ok(0) => {}
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn the_kernel_keeps_other_users_out_by_the_mode() {
    let Some(mut agent) = agent() else { return };
    let file = BareFile { path: "key".into(), uid: Some(1_000), gid: Some(1_000), mode: Some(0o400) };
    let open = BareFile { path: "open".into(), ..BareFile::default() };
    let mounted = agent.bare(&[file, open], &["secret".into(), "public".into()]);
    let cat = |name: &str, user: u32| {
        let output = Command::new("cat").arg(mounted.join(name)).uid(user).gid(user).output().unwrap();
        (output.status.success(), String::from_utf8(output.stdout).unwrap())
    };
    assert_eq!(cat("key", 1_000), (true, "secret".into()));
    assert_eq!(cat("key", 65_534), (false, String::new()));
    assert_eq!(cat("open", 65_534), (true, "public".into()));
}
