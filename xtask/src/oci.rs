//! Images of one layer, written as OCI archives: no daemon, no registry. `ctr images import`, `docker load` and `podman load` take
//! them. The same files make the same bytes: owner root, time zero, order as given.
//!
//! ```text
//!   image.tar: oci-layout, index.json ──▶ manifest ──▶ config (entrypoint, user)
//!                                                 └──▶ layer: a tar of directories, files, links
//! ```

use std::fs;
use std::io::{Read as _, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::command::Error;

/// What is in an image. Paths in the image begin with `/`; directories that are not named are made with mode 0755 by who unpacks.
#[derive(Clone, Copy, Default)]
pub(crate) struct Image<'a> {
    /// Its full name: `localhost/tools:1`.
    pub(crate) name: &'a str,
    /// As Go names it: `amd64`, `arm64`.
    pub(crate) architecture: &'a str,
    /// The program and its first arguments; empty: none.
    pub(crate) entrypoint: &'a [&'a str],
    /// `uid:gid` in numbers; empty: root.
    pub(crate) user: &'a str,
    /// Path, mode.
    pub(crate) directories: &'a [(&'a str, u32)],
    /// File of this machine, path, mode.
    pub(crate) files: &'a [(&'a Path, &'a str, u32)],
    /// Path, what the symbolic link says.
    pub(crate) links: &'a [(String, &'a str)],
}

impl Image<'_> {
    /// Writes the archive. Renamed into place when it is whole.
    pub(crate) fn write(&self, archive: &Path) -> Result<(), Error> {
        let mut layer = Tar::default();
        for (path, mode) in self.directories {
            layer.add(path, Kind::Directory, *mode)?;
        }
        for (source, path, mode) in self.files {
            let content = fs::read(source).map_err(|error| format!("{}: {error}", source.display()))?;
            layer.add(path, Kind::File(&content), *mode)?;
        }
        for (path, target) in self.links {
            layer.add(path, Kind::Link(target), 0o777)?;
        }
        let mut image = Tar::default();
        let layer = image.blob("layer.v1.tar", &layer.close())?;
        let config = json!({
            "architecture": self.architecture, "os": "linux",
            "config": {
                "Entrypoint": self.entrypoint, "User": self.user, "Env": ["PATH=/bin:/sbin"], "WorkingDir": "/",
            },
            "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]},
        });
        let config = image.blob("config.v1+json", config.to_string().as_bytes())?;
        let manifest = json!({
            "schemaVersion": 2, "mediaType": media_type("manifest.v1+json"), "config": config, "layers": [layer],
        });
        let mut manifest = image.blob("manifest.v1+json", manifest.to_string().as_bytes())?;
        let tag = self.name.rsplit_once(':').map_or("latest", |(_, tag)| tag);
        manifest["annotations"] = json!({
            "io.containerd.image.name": self.name, "org.opencontainers.image.ref.name": tag,
        });
        manifest["platform"] = json!({"architecture": self.architecture, "os": "linux"});
        let index = json!({"schemaVersion": 2, "manifests": [manifest]});
        image.add("oci-layout", Kind::File(br#"{"imageLayoutVersion":"1.0.0"}"#), 0o644)?;
        image.add("index.json", Kind::File(index.to_string().as_bytes()), 0o644)?;
        let partial = archive.with_extension("partial");
        fs::write(&partial, image.close())?;
        fs::rename(&partial, archive)?;
        Ok(())
    }
}

/// A tar archive in the making, in the format of POSIX.1-1988 (`ustar`).
#[derive(Default)]
struct Tar(Vec<u8>);

enum Kind<'a> {
    File(&'a [u8]),
    Directory,
    Link(&'a str),
}

/// Everything in a tar is padded to this.
const BLOCK: usize = 512;

impl Tar {
    fn add(&mut self, path: &str, kind: Kind<'_>, mode: u32) -> Result<(), Error> {
        let (flag, content, link) = match kind {
            Kind::File(content) => (b'0', content, ""),
            Kind::Directory => (b'5', &[][..], ""),
            Kind::Link(target) => (b'2', &[][..], target),
        };
        let name = path.trim_start_matches('/');
        if name.is_empty() || name.len() > 100 || link.len() > 100 {
            return Err(format!("{path}: a path in an image has 1 to 100 bytes").into());
        }
        let mut header = [0; BLOCK];
        let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, name.as_bytes());
        put(100, format!("{mode:07o}").as_bytes());
        put(108, b"0000000"); // uid
        put(116, b"0000000"); // gid
        put(124, format!("{:011o}", content.len()).as_bytes());
        put(136, b"00000000000"); // time of last change
        put(148, b"        "); // the sum is made with blanks in its place
        put(156, &[flag]);
        put(157, link.as_bytes());
        put(257, b"ustar\x0000");
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        self.0.extend(header);
        self.0.extend(content);
        self.pad();
        Ok(())
    }

    /// Adds what is named by its digest; returns what an index says of it.
    fn blob(&mut self, media: &str, content: &[u8]) -> Result<Value, Error> {
        let digest = sha256(content)?;
        self.add(&format!("blobs/sha256/{digest}"), Kind::File(content), 0o644)?;
        Ok(
            json!({"mediaType": media_type(media), "digest": format!("sha256:{digest}"), "size": content.len()}),
        )
    }

    fn pad(&mut self) {
        self.0.resize(self.0.len().next_multiple_of(BLOCK), 0);
    }

    /// Two empty blocks are the end.
    fn close(mut self) -> Vec<u8> {
        self.0.extend([0; 2 * BLOCK]);
        self.0
    }
}

fn media_type(of: &str) -> String {
    format!("application/vnd.oci.image.{of}")
}

/// By the system's own program: a hash function of this crate's own would be its heaviest part.
fn sha256(bytes: &[u8]) -> Result<String, Error> {
    let mut command = Command::new("sha256sum");
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let child = child.as_mut().map_err(|error| format!("cannot run sha256sum: {error}"))?;
    let input = child.stdin.take();
    input.ok_or("sha256sum reads nothing")?.write_all(bytes)?;
    let mut text = String::new();
    child.stdout.take().ok_or("sha256sum prints nothing")?.read_to_string(&mut text)?;
    let ended = child.wait()?;
    match text.split_whitespace().next() {
        Some(digest) if ended.success() && digest.len() == 64 => Ok(digest.to_owned()),
        _ => Err(format!("sha256sum ended with {ended}").into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command;

    fn written(directory: &Path) -> std::path::PathBuf {
        let program = directory.join("program");
        fs::write(&program, "content").unwrap();
        let archive = directory.join("image.tar");
        let image = Image {
            name: "localhost/x:7",
            architecture: "amd64",
            entrypoint: &["/bin/program"],
            user: "65532:65532",
            directories: &[("/tmp", 0o1777)],
            files: &[(&program, "/bin/program", 0o755)],
            links: &[("/bin/other".to_owned(), "program")],
        };
        image.write(&archive).unwrap();
        archive
    }

    fn scratch(name: &str) -> std::path::PathBuf {
        let directory = std::env::temp_dir().join(format!("xtask-oci-{name}-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        directory
    }

    #[test]
    fn the_archive_leads_from_its_index_to_the_files_as_tar_unpacks_them() {
        let directory = scratch("unpack");
        let archive = written(&directory);
        let tar = |arguments: &[&str], archive: &Path| {
            let mut tar = Command::new("tar");
            command::output(tar.current_dir(&directory).arg("-xf").arg(archive).args(arguments)).unwrap()
        };
        tar(&[], &archive);
        let read = |path: &str| -> Value {
            serde_json::from_slice(&fs::read(directory.join(path)).unwrap()).unwrap()
        };
        let blob = |of: &Value| of["digest"].as_str().unwrap().replace("sha256:", "blobs/sha256/");
        let index = read("index.json");
        assert_eq!(index["manifests"][0]["annotations"]["io.containerd.image.name"], "localhost/x:7");
        let manifest = read(&blob(&index["manifests"][0]));
        assert_eq!(manifest["mediaType"], "application/vnd.oci.image.manifest.v1+json");
        let config = read(&blob(&manifest["config"]));
        assert_eq!(config["config"]["User"], "65532:65532");
        assert_eq!(config["rootfs"]["diff_ids"][0], manifest["layers"][0]["digest"]);
        let layer = directory.join(blob(&manifest["layers"][0]));
        assert_eq!(fs::metadata(&layer).unwrap().len(), manifest["layers"][0]["size"].as_u64().unwrap());
        let mut list = Command::new("tar");
        let list = command::output(list.arg("--full-time").arg("-tvf").arg(&layer).env("TZ", "UTC")).unwrap();
        let lines: Vec<String> =
            list.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
        assert_eq!(
            lines,
            [
                "drwxrwxrwt 0/0 0 1970-01-01 00:00:00 tmp",
                "-rwxr-xr-x 0/0 7 1970-01-01 00:00:00 bin/program",
                "lrwxrwxrwx 0/0 0 1970-01-01 00:00:00 bin/other -> program",
            ]
        );
        fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn the_same_files_make_the_same_archive() {
        let (one, other) = (scratch("one"), scratch("other"));
        assert_eq!(fs::read(written(&one)).unwrap(), fs::read(written(&other)).unwrap());
        fs::remove_dir_all(&one).unwrap();
        fs::remove_dir_all(&other).unwrap();
    }

    #[test]
    fn a_path_that_the_format_cannot_hold_is_refused() {
        let image = Image { directories: &[("/", 0o755)], ..Image::default() };
        let error = image.write(Path::new("/nowhere/x.tar")).unwrap_err().to_string();
        assert!(error.contains("1 to 100 bytes"), "{error}");
    }
}
