//! Classes in files: `DIR/<namespace>/*.yaml`, read at each publish as far as they changed. For machines without an API server.
//!
//! Links may lead anywhere inside the directory (a mounted ConfigMap is made of such links) and never out of it.

use std::collections::HashMap;
use std::io::{self, Read as _};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{Dir, FileType, Mode, OFlags, ResolveFlags, Stat, fstat, open, openat2};

use super::{Class, Classes, Faults, FindError, Kind, object_name, parse_each};
use crate::config::fault::broken;
use crate::config::yaml::MAX_BYTES;

/// Files of one namespace that are read.
const MOST_FILES: usize = 1_000;
/// Names of a namespace's directory that are looked at, so that no heap of other files stops a publish.
const MOST_NAMES: usize = 10_000;
/// Namespaces whose files are kept parsed; beyond it all are read anew.
const MOST_NAMESPACES: usize = 1_000;
/// Namespaces in which a class is looked for that a pod's own does not have.
const MOST_ELSEWHERE: usize = 100;

/// A directory of classes.
pub struct Directory {
    path: PathBuf,
    root: OwnedFd,
    /// What was read, by namespace and file.
    read: Mutex<HashMap<String, Files>>,
}

/// Files by name, as they were when they were read.
type Files = HashMap<String, (Stamp, Parsed)>;

/// The documents of one file.
type Parsed = Arc<Vec<Result<Class, Faults>>>;

/// Tells a file that was changed or replaced: device, inode, size, time of change in seconds and nanoseconds.
type Stamp = (u64, u64, i64, i64, u64);

impl Directory {
    /// A directory that is there; it may be empty still.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = open(path, flags, Mode::empty())?;
        Ok(Self { path: path.to_owned(), root, read: Mutex::default() })
    }

    /// Every document of a namespace.
    fn namespace(&self, namespace: &str) -> Result<Vec<Parsed>, FindError> {
        // A name with a slash or dots would be another directory.
        if object_name(namespace).is_err() {
            return Ok(Vec::new());
        }
        let unreadable =
            |error| FindError::Unreadable { place: self.path.join(namespace).display().to_string(), error };
        let directory = match self.enter(namespace, OFlags::DIRECTORY) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            directory => directory.map_err(unreadable)?,
        };
        let mut names = names(&directory).map_err(unreadable)?;
        names.sort();
        let mut known = self.known(namespace);
        let mut now = HashMap::new();
        let mut all = Vec::new();
        for name in names {
            let file = format!("{namespace}/{name}");
            let opened = self.enter(&file, OFlags::NONBLOCK).and_then(|fd| Ok((fstat(&fd)?, fd)));
            let parsed = match opened {
                Ok((stat, fd)) => {
                    let stamp = stamp(&stat);
                    let parsed = match known.remove(&name) {
                        Some((then, parsed)) if then == stamp => parsed,
                        _ => Arc::new(read(fd, &stat, namespace, &file)),
                    };
                    now.insert(name, (stamp, Arc::clone(&parsed)));
                    parsed
                }
                // Taken away since the directory was read.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => Arc::new(vec![Err(fault(&file, &error.to_string()))]),
            };
            all.push(parsed);
        }
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        if read.len() >= MOST_NAMESPACES {
            read.clear();
        }
        read.insert(namespace.to_owned(), now);
        Ok(all)
    }

    fn namespaces(&self) -> io::Result<Vec<String>> {
        let mut namespaces = Vec::new();
        for entry in Dir::read_from(self.enter(".", OFlags::DIRECTORY)?)?.take(MOST_NAMES) {
            let name = entry?.file_name().to_string_lossy().into_owned();
            namespaces.extend(object_name(&name));
        }
        Ok(namespaces)
    }

    fn known(&self, namespace: &str) -> Files {
        let read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        read.get(namespace).cloned().unwrap_or_default()
    }

    /// Opens what lies in the directory.
    fn enter(&self, path: &str, flags: OFlags) -> io::Result<OwnedFd> {
        let flags = flags | OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOCTTY;
        let inside = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        Ok(openat2(&self.root, path, flags, Mode::empty(), inside)?)
    }
}

impl Classes for Directory {
    fn find(&self, kind: Kind, namespace: &str, name: &str) -> Result<Option<Class>, FindError> {
        let files = self.namespace(namespace)?;
        let documents = || files.iter().flat_map(|file| file.iter());
        let faulty = |about: &dyn Fn(&str) -> bool| {
            let faults = documents().filter_map(|document| document.as_ref().err());
            let about = faults.filter(|faults| faults.iter().any(|fault| about(&fault.document)));
            about.cloned().reduce(Faults::and).map_or(Ok(()), Err)
        };
        // What the parser calls the class that is looked for.
        let labels = [format!(": {kind} {name}"), format!(": {kind} {namespace}/{name}")];
        faulty(&|document| labels.iter().any(|label| document.ends_with(label)))?;
        let mut found = documents().flatten().filter(|class| class.kind == kind && class.name == name);
        match (found.next(), found.next()) {
            (Some(class), None) => Ok(Some(class.clone())),
            (Some(class), Some(_)) => {
                let twice = broken("is there in several files", "keep one of them");
                Err(Faults::one(&class.to_string(), twice).into())
            }
            (None, _) => {
                // It may stand in a document that cannot even be told.
                let named =
                    [Kind::SecretProviderClass, Kind::SecretsStoreImport].map(|kind| format!(": {kind} "));
                faulty(&|document| !named.iter().any(|kind| document.contains(kind)))?;
                Ok(None)
            }
        }
    }

    fn names(&self, namespace: &str) -> Result<Vec<(Kind, String)>, FindError> {
        let files = self.namespace(namespace)?;
        let classes = files.iter().flat_map(|file| file.iter()).flatten();
        let mut names: Vec<_> = classes.map(|class| (class.kind, class.name.clone())).collect();
        names.sort_by(|a, b| a.1.cmp(&b.1));
        Ok(names)
    }

    fn elsewhere(&self, kind: Kind, namespace: &str, name: &str) -> Vec<String> {
        let has = |other: &String| {
            let files = self.namespace(other).unwrap_or_default();
            let mut classes = files.iter().flat_map(|file| file.iter()).flatten();
            classes.any(|class| class.kind == kind && class.name == name)
        };
        let mut others = self.namespaces().unwrap_or_default();
        others.retain(|other| other != namespace);
        others.sort();
        others.truncate(MOST_ELSEWHERE);
        others.retain(has);
        others
    }
}

/// Files of a directory that end in `.yaml`.
fn names(directory: impl AsFd) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for (seen, entry) in Dir::read_from(directory)?.enumerate() {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy();
        if name.ends_with(".yaml") && !name.starts_with('.') {
            names.push(name.into_owned());
        }
        if names.len() > MOST_FILES || seen > MOST_NAMES {
            let text = format!(
                "more than {MOST_FILES} classes' files or {MOST_NAMES} in all; write several into one"
            );
            return Err(io::Error::other(text));
        }
    }
    Ok(names)
}

fn read(fd: OwnedFd, stat: &Stat, namespace: &str, file: &str) -> Vec<Result<Class, Faults>> {
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return vec![Err(fault(file, "is no regular file"))];
    }
    let mut text = String::new();
    // One byte more than is allowed: the parser says that it is too long.
    let most = u64::try_from(MAX_BYTES).unwrap_or(u64::MAX).saturating_add(1);
    if let Err(error) = std::fs::File::from(fd).take(most).read_to_string(&mut text) {
        return vec![Err(fault(file, &error.to_string()))];
    }
    let settled = parse_each(&text).into_iter().map(|class| class.and_then(|class| settle(class, namespace)));
    settled.map(|class| class.map_err(|faults| faults.of(file))).collect()
}

/// A class belongs to the namespace of its directory.
fn settle(class: Class, namespace: &str) -> Result<Class, Faults> {
    let other = class.namespace.as_deref().is_some_and(|said| said != namespace);
    let class = Class { namespace: Some(namespace.to_owned()), ..class };
    if other {
        let rule = "names another namespace than its directory";
        return Err(Faults::one(
            &class.to_string(),
            broken(rule, "move the file, or correct metadata.namespace"),
        ));
    }
    Ok(class)
}

fn fault(file: &str, rule: &str) -> Faults {
    Faults::one(file, broken(rule.to_owned(), "put a file of classes there that can be read, or remove it"))
}

/// Changes when the file is written to, or another one takes its place.
fn stamp(stat: &Stat) -> Stamp {
    (stat.st_dev, stat.st_ino, stat.st_size, stat.st_ctime, stat.st_ctime_nsec)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use rustix::fs::CWD;

    use super::*;

    fn class(name: &str, role: &str) -> String {
        format!(
            "apiVersion: deckhouse.io/v1alpha1\nkind: SecretsStoreImport\nmetadata: {{name: {name}}}\nspec:\n  type: CSI\n  \
             role: {role}\n  files: [{{name: a, source: {{path: secret/data/a, key: k}}}}]\n"
        )
    }

    fn find(directory: &Directory, name: &str) -> Result<Option<Class>, FindError> {
        directory.find(Kind::SecretsStoreImport, "app", name)
    }

    fn role(directory: &Directory, name: &str) -> Option<String> {
        find(directory, name).unwrap().and_then(|class| class.settings.login.role)
    }

    #[test]
    fn a_class_is_found_by_kind_namespace_and_name_and_seen_again_when_it_changed() {
        let root = tempfile::tempdir().unwrap();
        let directory = Directory::open(root.path()).unwrap();
        assert_eq!(role(&directory, "db"), None);
        fs::create_dir(root.path().join("app")).unwrap();
        fs::write(root.path().join("app/one.yaml"), class("db", "first")).unwrap();
        fs::write(root.path().join("app/notes.txt"), "no class").unwrap();
        assert_eq!(role(&directory, "db").as_deref(), Some("first"));
        assert_eq!(role(&directory, "db").as_deref(), Some("first"));
        let other = directory.find(Kind::SecretProviderClass, "app", "db").unwrap();
        assert!(other.is_none() && directory.find(Kind::SecretsStoreImport, "ap", "db").unwrap().is_none());
        fs::write(root.path().join("app/one.yaml"), class("db", "the-second")).unwrap();
        assert_eq!(role(&directory, "db").as_deref(), Some("the-second"));
        fs::write(root.path().join("app/two.yaml"), class("cache", "r")).unwrap();
        let names: Vec<_> = directory.names("app").unwrap().into_iter().map(|(_, name)| name).collect();
        assert_eq!(names, ["cache", "db"]);
        fs::remove_file(root.path().join("app/one.yaml")).unwrap();
        assert_eq!(role(&directory, "db"), None);
    }

    #[test]
    fn links_may_lead_inside_the_directory_and_not_out_of_it() {
        let (root, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::create_dir_all(root.path().join("app/..data")).unwrap();
        fs::write(root.path().join("app/..data/db.yaml"), class("db", "r")).unwrap();
        symlink("..data/db.yaml", root.path().join("app/db.yaml")).unwrap();
        fs::write(outside.path().join("x.yaml"), class("stolen", "r")).unwrap();
        symlink(outside.path().join("x.yaml"), root.path().join("app/x.yaml")).unwrap();
        symlink(outside.path(), root.path().join("elsewhere")).unwrap();
        let directory = Directory::open(root.path()).unwrap();
        assert_eq!(role(&directory, "db").as_deref(), Some("r"));
        let refused = find(&directory, "stolen").unwrap_err().to_string();
        assert!(refused.starts_with("app/x.yaml: ") && !refused.contains("role"), "{refused}");
        for namespace in ["elsewhere", "..", "app/..data", "/", ""] {
            let found = directory.find(Kind::SecretsStoreImport, namespace, "stolen");
            assert!(!matches!(found, Ok(Some(_))), "{namespace}");
        }
    }

    #[test]
    fn faults_are_told_of_the_class_that_has_them_and_of_what_cannot_be_told() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("app")).unwrap();
        let write = |name: &str, text: &str| fs::write(root.path().join("app").join(name), text).unwrap();
        write("good.yaml", &class("good", "r"));
        write("bad.yaml", &class("bad", "r").replace("type: CSI", "typ: CSI"));
        let directory = Directory::open(root.path()).unwrap();
        assert!(find(&directory, "good").unwrap().is_some());
        assert!(find(&directory, "absent").unwrap().is_none(), "another class's faults are not ours");
        let faults = find(&directory, "bad").unwrap_err().to_string();
        assert!(faults.contains("app/bad.yaml: SecretsStoreImport bad: spec.typ"), "{faults}");
        assert!(faults.lines().count() > 1, "{faults}");

        write("other.yaml", &class("lost, namespace: elsewhere", "r"));
        let faults = find(&directory, "lost").unwrap_err().to_string();
        assert!(faults.contains("names another namespace"), "{faults}");
        write("twice.yaml", &class("good", "r"));
        assert!(find(&directory, "good").unwrap_err().to_string().contains("several files"));

        write("torn.yaml", "a: [");
        rustix::fs::mknodat(CWD, root.path().join("app/pipe.yaml"), FileType::Fifo, 0o600.into(), 0).unwrap();
        let faults = find(&directory, "absent").unwrap_err().to_string();
        assert!(
            faults.contains("app/torn.yaml: ") && faults.contains("app/pipe.yaml: is no regular file"),
            "{faults}"
        );
    }

    #[test]
    fn other_namespaces_with_a_class_of_that_kind_and_name_are_told() {
        let root = tempfile::tempdir().unwrap();
        for namespace in ["app", "billing", "shop", "torn"] {
            fs::create_dir(root.path().join(namespace)).unwrap();
        }
        let write = |at: &str, text: &str| fs::write(root.path().join(at), text).unwrap();
        write("app/db.yaml", &class("db", "r"));
        write("shop/one.yaml", &class("db", "r"));
        write("billing/one.yaml", &class("cache", "r"));
        write("torn/one.yaml", "a: [");
        write("notes.txt", "no namespace");
        let directory = Directory::open(root.path()).unwrap();
        let elsewhere = |kind, namespace| directory.elsewhere(kind, namespace, "db");
        assert_eq!(elsewhere(Kind::SecretsStoreImport, "billing"), ["app", "shop"]);
        assert_eq!(elsewhere(Kind::SecretsStoreImport, "app"), ["shop"]);
        assert!(elsewhere(Kind::SecretProviderClass, "billing").is_empty());
    }

    #[test]
    fn what_is_too_large_is_refused_and_not_read() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("app")).unwrap();
        let file = fs::File::create(root.path().join("app/huge.yaml")).unwrap();
        file.set_len(1 << 40).unwrap();
        let directory = Directory::open(root.path()).unwrap();
        assert!(find(&directory, "a").unwrap_err().to_string().contains("larger than 1 MiB"));
    }
}
