use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use fuse_tests::agent::BareFile;
use fuse_tests::stamp::Content;
use fuse_tests::sys::{Map, cached_pages};
use fuse_tests::wait::{SOON, until_true};
use rustix::mm::MapFlags;
use rustix::pipe::SpliceFlags;

use super::agent;

/// Throwing pages away is asked for after the read that filled them, so it may take a moment.
fn no_pages(file: &File, what: &str) {
    until_true(what, SOON, || cached_pages(file).unwrap() == 0);
}

/// Every way to read a file that may fill the page cache.
fn read_all_ways(path: &Path, mut check: impl FnMut(&str)) {
    let open = || File::open(path).unwrap();
    let length = usize::try_from(open().metadata().unwrap().len()).unwrap();
    let mut bytes = Vec::new();
    open().read_to_end(&mut bytes).unwrap();
    check("read");
    if length > 0 {
        let map = Map::new(&open(), length, MapFlags::PRIVATE).unwrap();
        assert!(map.to_vec() == bytes);
        drop(map);
        check("mmap");
    }
    let scratch = tempfile::tempfile().unwrap();
    let file = open();
    while rustix::fs::sendfile(&scratch, &file, None, 1 << 20).unwrap() > 0 {}
    check("sendfile");
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let (file, mut reader) = (open(), File::from(reader));
    loop {
        let got = rustix::pipe::splice(&file, None, &writer, None, 1 << 16, SpliceFlags::empty()).unwrap();
        if got == 0 {
            break;
        }
        reader.read_exact(&mut bytes[..got]).unwrap();
    }
    check("splice");
    let _ = rustix::fs::fadvise(open(), 0, None, rustix::fs::Advice::WillNeed);
    check("readahead");
}

#[test]
fn no_page_stays_in_the_page_cache_whichever_way_a_file_is_read() {
    let Some(mut agent) = agent() else { return };
    let sizes = [0, 1, 4_096, 100_000, 1 << 20];
    let files: Vec<BareFile> = sizes.iter().map(|size| format!("d/{size}").as_str().into()).collect();
    let mounted = agent.bare(&files, &sizes.map(Content::Pattern));
    for directory in ["", "..data/"] {
        for file in &files {
            let path = mounted.join(&format!("{directory}{}", file.path));
            let watched = File::open(&path).unwrap();
            read_all_ways(&path, |way| {
                no_pages(&watched, &format!("no page of {} after {way}", path.display()))
            });
        }
    }
    // That pages were there at all is seen by what the kernel was told to throw away.
    assert!(agent.metric("fs_invalidations_total") > 0);
}

#[test]
fn the_count_of_pages_is_not_always_zero() {
    let Some(_agent) = agent() else { return };
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("plain");
    std::fs::write(&path, vec![7; 100_000]).unwrap();
    assert!(cached_pages(&File::open(&path).unwrap()).unwrap() >= 24);
}
