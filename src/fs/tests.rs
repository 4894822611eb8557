use super::*;
use crate::metrics::Metrics;
use crate::reference::{
    Encoding, FilePath, FileSpec, Freshness, Method, Ownership, Request, VolumeId, VolumeSpec,
};
use crate::secret::SecretBytes;
use crate::secret::pages::SecretMemory;
use crate::store::scripted::identity;
use crate::volume::{NewFile, Surroundings};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::{Duration, SystemTime};

struct Fixture {
    fs: Arc<Fs>,
    volume: Arc<Volume>,
    now: Moment,
}

impl Fixture {
    fn new(paths: &[&str]) -> Self {
        let request =
            Request { method: Method::Get, path: "secret/data/app".into(), query: None, args: None };
        let file = |path: &&str| FileSpec {
            path: FilePath::parse(path).unwrap(),
            request: request.clone(),
            key: None,
            encoding: Encoding::Utf8,
            ownership: Ownership::default(),
        };
        let spec = VolumeSpec {
            class: "test".into(),
            identity: identity(),
            files: paths.iter().map(file).collect(),
            freshness: Freshness::default(),
            ownership: Ownership::default(),
        };
        let surroundings = Surroundings {
            memory: SecretMemory::new().unwrap(),
            metrics: Arc::new(Metrics::default()),
            default_owner: (0, 0),
        };
        let volume = Volume::new(VolumeId("test".into()), spec, None, surroundings);
        Self { fs: Fs::new(Arc::clone(&volume)), volume, now: Moment::now() }
    }

    fn install(&self, contents: &[Option<&str>]) {
        let file = |content: &Option<&str>| NewFile {
            value: content.map(|content| SecretBytes::new(content.as_bytes().to_vec())),
            written: self.now.wall,
            ..NewFile::default()
        };
        let files: Vec<NewFile> = contents.iter().map(file).collect();
        self.volume.install(&files, self.now).unwrap();
    }

    fn wait(&mut self, milliseconds: u64) {
        self.now = self.now + Duration::from_millis(milliseconds);
    }

    fn find(&self, path: &str) -> Result<Attr, Error> {
        let mut inode = Inode::ROOT;
        let mut found = self.fs.attr(inode, self.now)?;
        for part in path.split('/') {
            found = self.fs.lookup(inode, part.as_bytes(), self.now)?;
            inode = found.inode;
            if found.kind == Kind::Link {
                inode = self.fs.lookup(Inode::ROOT, self.fs.readlink(inode)?.as_bytes(), self.now)?.inode;
            }
        }
        Ok(found)
    }

    fn open(&self, path: &str) -> (Inode, Handle) {
        let inode = self.find(path).unwrap().inode;
        let Opening::Opened(handle) = self.fs.open(inode, Access::Read, self.now).unwrap() else {
            panic!("a volume without a cache has nothing to refresh")
        };
        (inode, handle)
    }

    fn read(&self, (inode, handle): (Inode, Handle)) -> Result<String, Error> {
        self.fs.read(inode, handle, 0, u32::MAX, Destination::Caller, |bytes| {
            String::from_utf8(bytes.to_vec()).unwrap()
        })
    }

    fn cat(&self, path: &str) -> String {
        let opened = self.open(path);
        let content = self.read(opened).unwrap();
        self.fs.release(opened.1);
        content
    }

    fn list(&self, inode: Inode) -> Vec<String> {
        let mut names = Vec::new();
        self.fs
            .read_directory(inode, 0, |entry| {
                names.push(entry.name.clone());
                true
            })
            .unwrap();
        names
    }
}

#[test]
fn a_path_keeps_its_inode_through_every_generation() {
    let mut fixture = Fixture::new(&["a", "dir/b"]);
    fixture.install(&[Some("1"), Some("1")]);
    let before = ["a", "dir", "dir/b"].map(|path| fixture.find(path).unwrap().inode);
    fixture.wait(5_000);
    fixture.install(&[Some("2"), Some("22")]);
    assert_eq!(["a", "dir", "dir/b"].map(|path| fixture.find(path).unwrap().inode), before);
}

#[test]
fn an_open_handle_reads_one_version_however_often_the_secret_changes() {
    let mut fixture = Fixture::new(&["a"]);
    fixture.install(&[Some("first")]);
    let opened = fixture.open("a");
    for content in ["second", "third", "fourth"] {
        fixture.wait(5_000);
        fixture.install(&[Some(content)]);
    }
    assert_eq!(fixture.read(opened).unwrap(), "first");
    assert_eq!(fixture.cat("a"), "fourth");
}

#[test]
fn after_an_open_the_inode_stays_with_its_version_for_a_moment() {
    let mut fixture = Fixture::new(&["a"]);
    fixture.install(&[Some("four")]);
    let opened = fixture.open("a");
    fixture.install(&[Some("longer")]);
    fixture.wait(99);
    let attr = fixture.fs.attr(opened.0, fixture.now).unwrap();
    assert_eq!((attr.size, attr.ttl), (4, Ttl::None), "what is about to change must not be cached");
    fixture.wait(1);
    let attr = fixture.fs.attr(opened.0, fixture.now).unwrap();
    assert_eq!((attr.size, attr.ttl), (6, Ttl::Long));
    assert_eq!(fixture.read(opened).unwrap(), "four");
}

#[test]
fn a_file_that_is_opened_all_the_time_changes_after_a_second() {
    let mut fixture = Fixture::new(&["a"]);
    fixture.install(&[Some("old")]);
    assert_eq!(fixture.cat("a"), "old");
    fixture.install(&[Some("new")]);
    let mut late = 0;
    while fixture.cat("a") == "old" {
        fixture.wait(50);
        late += 50;
    }
    assert_eq!(late, 1_000);
}

#[test]
fn a_generation_with_the_same_bytes_is_taken_over_at_once() {
    let fixture = Fixture::new(&["a", "b"]);
    fixture.install(&[Some("same"), Some("1")]);
    let _held = fixture.open("a");
    fixture.install(&[Some("same"), Some("2")]);
    assert_eq!(fixture.find("a").unwrap().ttl, Ttl::Long);
    assert_eq!(fixture.open("a").1.generation(), 2);
}

#[test]
fn the_same_bytes_make_no_generation() {
    let fixture = Fixture::new(&["a"]);
    fixture.install(&[Some("same")]);
    fixture.install(&[Some("same")]);
    assert_eq!(fixture.volume.generations().numbers(), [1]);
}

#[test]
fn data_names_the_newest_generation_whole() {
    let mut fixture = Fixture::new(&["tls/key", "tls/crt"]);
    fixture.install(&[Some("k1"), Some("c1")]);
    assert_eq!(fixture.fs.readlink(Inode::DATA).unwrap(), "..1");
    let old = fixture.open("..data/tls/key");
    fixture.wait(10);
    fixture.install(&[Some("k2"), Some("c2")]);
    assert_eq!(fixture.fs.readlink(Inode::DATA).unwrap(), "..2");
    assert_eq!(["..data/tls/key", "..data/tls/crt"].map(|path| fixture.cat(path)), ["k2", "c2"]);
    assert_eq!(["..1/tls/key", "..1/tls/crt"].map(|path| fixture.cat(path)), ["k1", "c1"]);
    assert_eq!(fixture.read(old).unwrap(), "k1");
    assert_ne!(fixture.find("..1/tls/key").unwrap().inode, fixture.find("..2/tls/key").unwrap().inode);
}

#[test]
fn a_directory_that_is_open_keeps_its_generation() {
    let fixture = Fixture::new(&["a"]);
    fixture.install(&[Some("1")]);
    let frozen = fixture.find("..1").unwrap().inode;
    let handle = fixture.fs.open_directory(frozen).unwrap();
    for content in ["2", "3", "4"] {
        fixture.install(&[Some(content)]);
    }
    assert_eq!(fixture.cat("..1/a"), "1");
    fixture.fs.release(handle);
    assert_eq!(fixture.find("..1/a"), Err(Error::Stale));
}

#[test]
fn a_generation_that_is_gone_answers_estale() {
    let fixture = Fixture::new(&["a"]);
    fixture.install(&[Some("0")]);
    let opened = fixture.open("..data/a");
    let mut held = Vec::new();
    for number in 1..=10 {
        fixture.install(&[Some(&number.to_string())]);
        held.push(fixture.open("..data/a"));
    }
    assert_eq!(fixture.read(opened), Err(Error::Stale));
    assert_eq!(fixture.volume.metrics().generations_evicted.value(), 1);
    assert_eq!(fixture.volume.metrics().fs_stale_handles.value(), 1);
    assert_eq!(Error::Stale.errno(), libc::ESTALE);
    assert_eq!(fixture.read(held[0]).unwrap(), "1");
}

#[test]
fn a_value_that_was_given_up_is_not_served_from_anywhere() {
    let fixture = Fixture::new(&["a", "b"]);
    fixture.install(&[Some("a"), Some("b")]);
    let opened = fixture.open("a");
    fixture.install(&[None, Some("b")]);
    assert_eq!(fixture.read(opened), Err(Error::Stale));
    let inode = fixture.find("a").unwrap().inode;
    assert_eq!(fixture.fs.open(inode, Access::Read, fixture.now), Err(Error::Gone));
    assert_eq!(fixture.cat("b"), "b");
    assert_eq!(Error::Gone.errno(), libc::EIO);
}

#[test]
fn nothing_can_be_opened_for_writing() {
    let fixture = Fixture::new(&["a"]);
    fixture.install(&[Some("a")]);
    let inode = fixture.find("a").unwrap().inode;
    assert_eq!(fixture.fs.open(inode, Access::Write, fixture.now), Err(Error::ReadOnly));
    assert_eq!(fixture.volume.metrics().fs_writes_refused.value(), 1);
    assert_eq!(Error::ReadOnly.errno(), libc::EROFS);
}

#[test]
fn modes_owners_and_groups_follow_file_then_class_then_driver() {
    let mut fixture = Fixture::new(&["plain", "special"]);
    fixture.install(&[Some("1"), Some("2")]);
    let plain = fixture.find("plain").unwrap();
    assert_eq!((plain.mode, plain.uid, plain.gid), (0o444, 0, 0));
    let mut spec = fixture.volume.spec().clone();
    spec.ownership = Ownership { uid: None, gid: Some(7), mode: None };
    spec.files[1].ownership = Ownership { uid: Some(5), gid: None, mode: Some(0o777) };
    let surroundings = Surroundings {
        memory: SecretMemory::new().unwrap(),
        metrics: Arc::new(Metrics::default()),
        default_owner: (3, 3),
    };
    let volume = Volume::new(VolumeId("two".into()), spec, None, surroundings);
    fixture = Fixture { fs: Fs::new(Arc::clone(&volume)), volume, now: fixture.now };
    fixture.install(&[Some("1"), Some("2")]);
    let (plain, special) = (fixture.find("plain").unwrap(), fixture.find("special").unwrap());
    assert_eq!((plain.mode, plain.uid, plain.gid), (0o440, 3, 7));
    assert_eq!((special.mode, special.uid, special.gid), (0o666, 5, 7), "never an execute bit");
}

#[test]
fn mtime_never_goes_backwards_and_stays_for_bytes_that_stay() {
    let mut fixture = Fixture::new(&["a", "b"]);
    fixture.install(&[Some("1"), Some("1")]);
    let (a, b) = (fixture.find("a").unwrap().mtime, fixture.find("b").unwrap().mtime);
    fixture.wait(5_000);
    let back = NewFile {
        value: Some(SecretBytes::new(b"2".to_vec())),
        written: SystemTime::UNIX_EPOCH,
        ..NewFile::default()
    };
    let same = NewFile {
        value: Some(SecretBytes::new(b"1".to_vec())),
        written: fixture.now.wall,
        ..NewFile::default()
    };
    fixture.volume.install(&[back, same], fixture.now).unwrap();
    assert!(fixture.find("a").unwrap().mtime > a);
    assert_eq!(fixture.find("b").unwrap().mtime, b);
}

#[test]
fn a_directory_lists_the_same_names_at_the_same_places_from_any_offset() {
    let fixture = Fixture::new(&["z", "a", "dir/b", "dir/c"]);
    fixture.install(&[Some("1"), Some("2"), Some("3"), Some("4")]);
    let all = fixture.list(Inode::ROOT);
    assert_eq!(all, [".", "..", "..data", "..1", "a", "dir", "z"]);
    for offset in 0..=all.len() + 1 {
        let mut rest = Vec::new();
        fixture
            .fs
            .read_directory(Inode::ROOT, offset as u64, |entry| {
                assert_eq!(entry.next, offset as u64 + rest.len() as u64 + 1);
                rest.push(entry.name.clone());
                true
            })
            .unwrap();
        assert_eq!(rest, all[offset.min(all.len())..]);
    }
    assert_eq!(fixture.list(fixture.find("..1/dir").unwrap().inode), [".", "..", "b", "c"]);
}

#[test]
fn numbers_that_nobody_gave_out_are_no_such_file() {
    let fixture = Fixture::new(&["a"]);
    fixture.install(&[Some("1")]);
    assert_eq!(fixture.fs.attr(Inode(99), fixture.now), Err(Error::NotFound));
    assert_eq!(fixture.fs.attr(Inode(0), fixture.now), Err(Error::NotFound));
    for name in ["..0", "..01", "..+1", "..2 ", "...", "..data2"] {
        assert_eq!(
            fixture.fs.lookup(Inode::ROOT, name.as_bytes(), fixture.now),
            Err(Error::NotFound),
            "{name}"
        );
    }
    assert_eq!(fixture.fs.lookup(Inode::ROOT, b"..7", fixture.now), Err(Error::Stale));
    assert_eq!(fixture.fs.lookup(Inode::ROOT, b"\xff", fixture.now), Err(Error::NotFound));
}

#[test]
fn a_name_longer_than_statfs_allows_is_refused_as_such() {
    let fixture = Fixture::new(&["a"]);
    fixture.install(&[Some("1")]);
    let lookup =
        |length: usize| fixture.fs.lookup(Inode::ROOT, &vec![b'n'; length], fixture.now).unwrap_err();
    assert_eq!((lookup(255), lookup(256)), (Error::NotFound, Error::NameTooLong));
    assert_eq!(Error::NameTooLong.errno(), libc::ENAMETOOLONG);
}

#[test]
fn changes_are_announced_with_the_inodes_and_names_they_touch() {
    #[derive(Default)]
    struct Heard(Mutex<Vec<Notice>>);
    impl Notify for Heard {
        fn notify(&self, notice: &Notice) {
            self.0.lock().unwrap().push(notice.clone());
        }
    }
    let fixture = Fixture::new(&["a", "b"]);
    let heard = Arc::new(Heard::default());
    fixture.fs.notify_through(Arc::clone(&heard) as Arc<dyn Notify>);
    fixture.install(&[Some("1"), Some("1")]);
    let b = fixture.find("b").unwrap().inode;
    let changed = |generation| Notice::Changed { generation, inodes: vec![b, Inode::DATA, Inode::ROOT] };
    heard.0.lock().unwrap().clear();
    fixture.install(&[Some("1"), Some("2")]);
    assert_eq!(*heard.0.lock().unwrap(), [changed(2)]);
    heard.0.lock().unwrap().clear();
    fixture.install(&[Some("1"), Some("3")]);
    let gone = Notice::Removed("..1".into());
    assert_eq!(*heard.0.lock().unwrap(), [changed(3), gone]);
}

#[test]
fn new_bytes_are_shown_only_when_the_kernel_has_given_up_the_old_size() {
    struct Kernel;
    impl Notify for Kernel {
        fn notify(&self, _: &Notice) {}
    }
    let mut fixture = Fixture::new(&["a"]);
    fixture.fs.notify_through(Arc::new(Kernel));
    fixture.install(&[Some("old")]);
    fixture.fs.acknowledge(1);
    assert_eq!(fixture.cat("a"), "old");
    fixture.wait(500);
    fixture.install(&[Some("longer")]);
    let inode = fixture.find("a").unwrap().inode;
    let open = || fixture.fs.open(inode, Access::Read, fixture.now);
    assert_eq!(open(), Ok(Opening::Settle), "fstat may still be answered from the kernel's memory");
    let settled = Arc::new(Mutex::new(false));
    let tell = Arc::clone(&settled);
    fixture.fs.when_settled(Box::new(move || *tell.lock().unwrap() = true));
    assert!(!*settled.lock().unwrap());
    fixture.fs.acknowledge(2);
    assert!(*settled.lock().unwrap(), "an open that waits for the new value goes on now");
    assert!(matches!(open(), Ok(Opening::Opened(_))));
    assert_eq!(fixture.cat("a"), "longer");
}

/// One step of the model test.
#[derive(Clone, Debug)]
enum Step {
    Rotate { file: usize, length: usize },
    Wait(u64),
    Open { file: usize, frozen: bool },
    Read { handle: usize, offset: usize, size: u32 },
    Release { handle: usize },
    Stat { file: usize },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (0..3usize, 0..40usize).prop_map(|(file, length)| Step::Rotate { file, length }),
        3 => prop_oneof![Just(1u64), Just(40), Just(100), Just(700)].prop_map(Step::Wait),
        5 => (0..3usize, any::<bool>()).prop_map(|(file, frozen)| Step::Open { file, frozen }),
        6 => (any::<usize>(), 0..50usize, 0..50u32).prop_map(|(handle, offset, size)| Step::Read { handle, offset, size }),
        3 => any::<usize>().prop_map(|handle| Step::Release { handle }),
        3 => (0..3usize).prop_map(|file| Step::Stat { file }),
    ]
}

/// What the file system is compared with: every content there ever was, by generation, and the rules in their plainest form.
#[derive(Default)]
struct Model {
    contents: Vec<[String; 3]>,
    handles: Vec<(usize, Inode, Handle)>,
    /// Per file: when it was opened last, and the newest generation it has been seen at.
    opened: [Option<Moment>; 3],
    seen: [u32; 3],
}

impl Model {
    fn newest(&self) -> u32 {
        u32::try_from(self.contents.len()).unwrap()
    }

    fn content(&self, generation: u32, file: usize) -> &str {
        &self.contents[generation as usize - 1][file]
    }

    /// What is kept: the newest two, and the newest eight of the older ones with a handle.
    fn kept(&self, generation: u32) -> bool {
        let mut older: BTreeMap<u32, usize> = BTreeMap::new();
        for (_, _, handle) in &self.handles {
            *older.entry(handle.generation()).or_default() += 1;
        }
        generation + 1 >= self.newest() || older.contains_key(&generation)
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 10_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_file_system_behaves_as_its_model(steps in proptest::collection::vec(step(), 1..60)) {
        let mut fixture = Fixture::new(&["a", "b", "dir/c"]);
        let paths = ["a", "b", "dir/c"];
        let mut model = Model::default();
        model.contents.push(Default::default());
        fixture.install(&[Some(""), Some(""), Some("")]);
        let mut serial = 0;
        for step in steps {
            match step {
                Step::Rotate { file, length } => {
                    // Never more older generations than are kept, so that every handle must stay readable.
                    if model.handles.len() >= crate::volume::generation::OLDER { continue }
                    serial += 1;
                    let mut next = model.contents.last().unwrap().clone();
                    next[file] = format!("{serial}:{}", "x".repeat(length));
                    fixture.install(&[Some(&next[0]), Some(&next[1]), Some(&next[2])]);
                    model.contents.push(next);
                }
                Step::Wait(milliseconds) => fixture.wait(milliseconds),
                Step::Open { file, frozen } => {
                    let path = if frozen { format!("..data/{}", paths[file]) } else { paths[file].to_owned() };
                    let (inode, handle) = fixture.open(&path);
                    let generation = handle.generation();
                    let newest = model.newest();
                    if frozen {
                        prop_assert_eq!(generation, newest);
                    } else {
                        prop_assert!(generation >= model.seen[file], "a reader went back in time");
                        let quiet = model.opened[file].is_none_or(|at| fixture.now.since(at) >= shown::QUIET);
                        if quiet {
                            prop_assert_eq!(model.content(generation, file), model.content(newest, file));
                        }
                        let size = fixture.fs.attr(inode, fixture.now).unwrap().size;
                        prop_assert_eq!(size, model.content(generation, file).len() as u64, "fstat after open");
                        model.seen[file] = generation;
                        model.opened[file] = Some(fixture.now);
                    }
                    model.handles.push((file, inode, handle));
                }
                Step::Read { handle, offset, size } => {
                    if model.handles.is_empty() { continue }
                    let (file, inode, handle) = model.handles[handle % model.handles.len()];
                    let expected = model.content(handle.generation(), file).as_bytes();
                    let start = offset.min(expected.len());
                    let end = (offset + size as usize).min(expected.len());
                    let got = fixture.fs
                        .read(inode, handle, offset as u64, size, Destination::Caller, <[u8]>::to_vec);
                    prop_assert_eq!(got.unwrap(), &expected[start..end]);
                }
                Step::Release { handle } => {
                    if model.handles.is_empty() { continue }
                    let (_, _, handle) = model.handles.swap_remove(handle % model.handles.len());
                    fixture.fs.release(handle);
                }
                Step::Stat { file } => {
                    let attr = fixture.find(paths[file]).unwrap();
                    let newest = model.content(model.newest(), file);
                    if attr.ttl == Ttl::Long {
                        prop_assert_eq!(attr.size, newest.len() as u64, "only the newest may be cached");
                    }
                }
            }
            for generation in fixture.volume.generations().numbers() {
                prop_assert!(model.kept(generation), "generation {generation} is kept for nobody");
            }
        }
        for (_, _, handle) in model.handles {
            fixture.fs.release(handle);
        }
        prop_assert!(fixture.volume.generations().numbers().len() <= 2);
        prop_assert_eq!(fixture.volume.metrics().fs_stale_handles.value(), 0);
    }
}
