//! The driver's two images, each one static program in an empty file system, as OCI archives. The same as the Dockerfile makes, without
//! a container engine.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use crate::command::{self, Error};
use crate::oci::Image;
use crate::tools;

/// Builds the images of agent and shim into target/images, without a container engine
///
/// `ctr -n k8s.io images import`, `docker load`, `podman load` and `skopeo copy oci-archive:` take them.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// For which machines
    #[arg(long, value_enum, default_value_t = Architecture::HOST)]
    architecture: Architecture,
    /// What stands before their names
    #[arg(long, default_value = "localhost")]
    registry: String,
}

/// As images name it.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Architecture {
    /// x86_64
    Amd64,
    /// aarch64; needs `rustup target add aarch64-unknown-linux-gnu` and the Debian package gcc-aarch64-linux-gnu
    Arm64,
}

impl Architecture {
    /// This machine's.
    pub(crate) const HOST: Self = if cfg!(target_arch = "aarch64") { Self::Arm64 } else { Self::Amd64 };

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Amd64 => "amd64",
            Self::Arm64 => "arm64",
        }
    }

    fn triple(self) -> &'static str {
        match self {
            Self::Amd64 => "x86_64-unknown-linux-gnu",
            Self::Arm64 => "aarch64-unknown-linux-gnu",
        }
    }
}

/// The archives.
pub(crate) struct Images {
    pub(crate) agent: PathBuf,
    pub(crate) shim: PathBuf,
}

/// The public CAs of this machine, for stores without a CA of their own.
const PUBLIC_CAS: &str = "/etc/ssl/certs/ca-certificates.crt";

/// The command.
pub(crate) fn run(args: &Args) -> Result<ExitCode, Error> {
    let images = build(args.architecture, &args.registry)?;
    for archive in [&images.agent, &images.shim] {
        println!("{}: {:.1} MiB", archive.display(), mebibytes(archive)?);
    }
    Ok(ExitCode::SUCCESS)
}

/// Both images; cargo builds what has changed.
pub(crate) fn build(architecture: Architecture, registry: &str) -> Result<Images, Error> {
    let compile = |arguments: &[&str]| {
        let mut cargo = command::cargo();
        cargo
            .args(["build", "--profile", "image", "--locked", "--target", architecture.triple()])
            .args(arguments);
        // Static, so that the image needs nothing else. This libc still resolves names then.
        cargo.env("RUSTFLAGS", "-C target-feature=+crt-static");
        // Built apart from programs with other flags, which would otherwise be built anew each time.
        cargo.env("CARGO_TARGET_DIR", tools::images().join("build"));
        if architecture == Architecture::Arm64 && architecture != Architecture::HOST {
            cargo.env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER", "aarch64-linux-gnu-gcc");
        }
        command::run(&mut cargo)
    };
    compile(&["--no-default-features", "--package", "fuse-secrets", "--bin", "fuse-secrets"])?;
    compile(&["--package", "fuse-secrets-csi"])?;
    let programs = tools::images().join("build").join(architecture.triple()).join("image");
    let version = env!("CARGO_PKG_VERSION");
    // Those for this machine are for its tests, too, which put every archive in that directory on their node.
    let directory = tools::images();
    let directory =
        if architecture == Architecture::HOST { directory } else { directory.join(architecture.name()) };
    fs::create_dir_all(&directory)?;
    let archive = |name: &str| directory.join(format!("{name}.tar"));
    let [agent, shim] = ["fuse-secrets", "fuse-secrets-csi"].map(|program| programs.join(program));
    let mut files = vec![(agent.as_path(), "/fuse-secrets", 0o755)];
    let cas = Path::new(PUBLIC_CAS);
    if cas.exists() {
        files.push((cas, PUBLIC_CAS, 0o644));
    } else {
        println!("{PUBLIC_CAS} is not there: the agent's image will trust configured CAs alone");
    }
    let images = Images { agent: archive("fuse-secrets-agent"), shim: archive("fuse-secrets-csi") };
    let image = Image { architecture: architecture.name(), ..Image::default() };
    Image {
        name: &format!("{registry}/fuse-secrets-agent:{version}"),
        entrypoint: &["/fuse-secrets"],
        user: "65532:65532",
        directories: &[("/tmp", 0o1777)],
        files: &files,
        ..image
    }
    .write(&images.agent)?;
    Image {
        name: &format!("{registry}/fuse-secrets-csi:{version}"),
        entrypoint: &["/fuse-secrets-csi"],
        files: &[(&shim, "/fuse-secrets-csi", 0o755)],
        ..image
    }
    .write(&images.shim)?;
    Ok(images)
}

#[expect(clippy::cast_precision_loss, reason = "shown with one digit behind the point")]
fn mebibytes(file: &Path) -> Result<f64, Error> {
    Ok(fs::metadata(file)?.len() as f64 / f64::from(1 << 20))
}
