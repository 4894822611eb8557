use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::OpenOptionsExt as _;

use fuse_tests::stamp::Content;
use fuse_tests::sys::Map;
use rustix::fs::SeekFrom;
use rustix::io::Errno;
use rustix::mm::MapFlags;
use rustix::pipe::SpliceFlags;

use super::agent;

#[test]
fn a_private_map_works_and_a_shared_one_is_refused() {
    let Some(mut agent) = agent() else { return };
    let mounted = agent.bare(&["a".into()], &[Content::Pattern(10_000)]);
    let file = File::open(mounted.join("a")).unwrap();
    let map = Map::new(&file, 10_000, MapFlags::PRIVATE).unwrap();
    assert!(map.to_vec() == mounted.read("a"));
    assert!(map.to_vec() == mounted.read("a"), "also after its pages were thrown away");
    let shared = Map::new(&file, 10_000, MapFlags::SHARED).err().unwrap();
    assert_eq!(shared.raw_os_error(), Some(libc::ENODEV));
}

#[test]
fn sendfile_splice_and_a_copy_give_the_same_bytes() {
    let Some(mut agent) = agent() else { return };
    let mounted = agent.bare(&["a".into()], &[Content::Pattern(200_001)]);
    let expected = mounted.read("a");
    let directory = tempfile::tempdir().unwrap();
    let open = || File::open(mounted.join("a")).unwrap();
    let sent = File::create_new(directory.path().join("sent")).unwrap();
    let file = open();
    while rustix::fs::sendfile(&sent, &file, None, 1 << 20).unwrap() > 0 {}
    assert!(std::fs::read(directory.path().join("sent")).unwrap() == expected);

    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let file = open();
    let mut spliced = Vec::new();
    loop {
        let got = rustix::pipe::splice(&file, None, &writer, None, 1 << 16, SpliceFlags::empty()).unwrap();
        if got == 0 {
            break;
        }
        let mut part = vec![0; got];
        File::from(reader.try_clone().unwrap()).read_exact(&mut part).unwrap();
        spliced.extend(part);
    }
    assert!(spliced == expected);

    std::fs::copy(mounted.join("a"), directory.path().join("copied")).unwrap();
    assert!(std::fs::read(directory.path().join("copied")).unwrap() == expected);
    // The kernel copies between file systems of one kind only; programs fall back, as the copy above did.
    let target = File::create_new(directory.path().join("range")).unwrap();
    let copied = rustix::fs::copy_file_range(open(), None, &target, None, 100);
    assert!(matches!(copied, Ok(100) | Err(Errno::XDEV)), "{copied:?}");
}

#[test]
fn an_unbuffered_open_reads_as_any_other() {
    let Some(mut agent) = agent() else { return };
    let mounted = agent.bare(&["a".into()], &[Content::Pattern(9_999)]);
    let mut file = File::options().read(true).custom_flags(libc::O_DIRECT).open(mounted.join("a")).unwrap();
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).unwrap();
    assert!(bytes == mounted.read("a"));
}

#[test]
fn seeking_finds_all_data_and_one_hole_at_the_end() {
    let Some(mut agent) = agent() else { return };
    let mounted = agent.bare(&["a".into()], &[Content::Pattern(5_000)]);
    let file = File::open(mounted.join("a")).unwrap();
    let seek = |to| rustix::fs::seek(&file, to);
    assert_eq!(seek(SeekFrom::Data(100)), Ok(100));
    assert_eq!(seek(SeekFrom::Hole(100)), Ok(5_000));
    assert_eq!(seek(SeekFrom::Data(5_000)), Err(Errno::NXIO));
    assert_eq!(seek(SeekFrom::End(-1)), Ok(4_999));
}

#[test]
fn locks_are_the_nodes_own() {
    let Some(mut agent) = agent() else { return };
    let mounted = agent.texts(&[("a", "1")]);
    let open = || File::open(mounted.join("a")).unwrap();
    let (one, other) = (open(), open());
    one.lock().unwrap();
    assert!(other.try_lock().is_err(), "flock excludes");
    one.unlock().unwrap();
    other.lock_shared().unwrap();
    rustix::fs::fcntl_lock(&one, rustix::fs::FlockOperation::NonBlockingLockShared).unwrap();
}

#[test]
fn poll_is_ready_and_an_unknown_ioctl_is_refused() {
    let Some(mut agent) = agent() else { return };
    let mounted = agent.texts(&[("a", "12345")]);
    let file = File::open(mounted.join("a")).unwrap();
    let mut polled = [rustix::event::PollFd::new(&file, rustix::event::PollFlags::IN)];
    let none = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    assert_eq!(rustix::event::poll(&mut polled, Some(&none)), Ok(1));
    assert_eq!(rustix::fs::ioctl_getflags(&file), Err(Errno::NOTTY));
    assert_eq!(rustix::io::ioctl_fionread(&file), Ok(5));
}

#[test]
fn syncing_is_no_error() {
    let Some(mut agent) = agent() else { return };
    let mounted = agent.texts(&[("a", "1")]);
    File::open(mounted.join("a")).unwrap().sync_all().unwrap();
    File::open(mounted.path()).unwrap().sync_all().unwrap();
    rustix::fs::syncfs(File::open(mounted.path()).unwrap()).unwrap();
}
