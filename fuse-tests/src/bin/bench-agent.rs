//! An agent that mounts as many volumes as it is told to: what `fuse-secrets mount` is for one. Same parts, allocator, runtime
//! and hardening.
//!
//! `bench-agent ADDRESS ROLE_ID SECRET_ID_FILE` reads commands, one a line, and answers each with a line: `done`, or what
//! went wrong.
//!
//! | command | done means |
//! |---|---|
//! | `mount DIR CLASS_FILE` | the volume can be read |
//! | `unmount DIR` | its session has ended and its volume is gone |

// It talks to its parent through pipes.
#![allow(clippy::print_stdout)]

use std::collections::HashMap;
use std::io::BufRead as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use fuse_secrets::agent::{Agent, Served, Setup};
use fuse_secrets::class;
use fuse_secrets::config::Settings;
use fuse_secrets::metrics::Metrics;
use fuse_secrets::reference::{Address, AuthMethod, Subject, VolumeSpec};
use fuse_secrets::secret::harden::harden;
use fuse_secrets::store::Credential;
use fuse_secrets::store::vault::Vault;
use fuse_secrets::sys::alloc::{self, Wiping};

#[global_allocator]
static ALLOCATOR: Wiping = Wiping;

type Error = Box<dyn std::error::Error>;

const DEADLINE: Duration = Duration::from_secs(30);

fn main() -> Result<(), Error> {
    alloc::pin();
    drop(harden());
    // The first call of the process: there is no other provider.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(16)
        .enable_all()
        .build()?;
    let arguments: Vec<String> = std::env::args().collect();
    let [_, address, role, secret] = arguments.as_slice() else {
        return Err("usage: bench-agent ADDRESS ROLE_ID SECRET_ID_FILE".into());
    };
    let mut many = Many {
        agent: {
            let _inside = runtime.enter();
            let metrics = Arc::new(Metrics::default());
            Agent::start(Arc::new(Vault::new(Arc::clone(&metrics))), metrics, Setup::default())?
        },
        over: Settings::default(),
        credential: Arc::new(Credential::SecretIdFile(Some(PathBuf::from(secret)))),
        served: HashMap::new(),
    };
    many.over.connection.addresses = Some(vec![Address::parse(address)?]);
    many.over.login.method = Some(AuthMethod::AppRole);
    many.over.login.role = Some(role.clone());
    // Commands come one at a time, and nothing else is to be done meanwhile on this thread.
    for line in std::io::stdin().lock().lines() {
        match runtime.block_on(many.obey(&line?)) {
            Ok(()) => println!("done"),
            Err(error) => println!("{error}"),
        }
    }
    runtime.block_on(many.agent.shutdown());
    Ok(())
}

struct Many {
    agent: Arc<Agent>,
    over: Settings,
    credential: Arc<Credential>,
    served: HashMap<String, Arc<Served>>,
}

impl Many {
    async fn obey(&mut self, line: &str) -> Result<(), Error> {
        match line.split(' ').collect::<Vec<_>>().as_slice() {
            ["mount", directory, class] => {
                let (path, spec) = (Path::new(directory), self.spec(class)?);
                let credential = Arc::clone(&self.credential);
                let others = rustix::process::geteuid().is_root();
                let deadline = Instant::now() + DEADLINE;
                let served = self.agent.mount(path, spec, None, credential, others, deadline).await?;
                self.served.insert((*directory).to_owned(), served);
            }
            ["unmount", directory] => {
                let served = self.served.remove(*directory).ok_or("not mounted")?;
                served.detach()?;
                tokio::time::timeout(DEADLINE, served.ended()).await?;
            }
            _ => return Err("no such command".into()),
        }
        Ok(())
    }

    fn spec(&self, class: &str) -> Result<VolumeSpec, Error> {
        let class = class::parse(&std::fs::read_to_string(class)?)?.pop().ok_or("no class")?;
        let subject = Subject::Local("bench".to_owned());
        Ok(class.into_spec(&self.over, &Settings::default(), subject)?)
    }
}
