//! What every gRPC server of the shim has in common: a socket of root's, callers of root's, and bounds.

use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;
use std::time::Duration;

use rustix::fs::Mode;
use tokio::net::{UnixListener, UnixStream};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::service::Routes;
use tonic::transport::{Error, Server};
use tonic::{Code, Response, Status};
use tower::limit::GlobalConcurrencyLimitLayer;

/// Calls that are worked on at once; others wait. A node has no more volumes.
const MOST_CALLS: usize = 1024;
/// Longest text of a refusal, in characters: an event of Kubernetes holds 1024 bytes.
const LONGEST_TEXT: usize = 2048;
/// After a failed accept, which mostly means that there are no more descriptors.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// A caller that stays is told to connect anew after this; kubelet connects for each call. A connection's buffers hold the last
/// token that came through them until it ends.
const LONGEST_CONNECTION: Duration = Duration::from_secs(300);

/// What a call answers.
pub(crate) type Answer<T> = Result<Response<T>, Status>;

/// Listens at `path`, for root only. What a dead predecessor left there is replaced, in one step: nobody ever finds a socket
/// with another mode, or none. A directory that is missing is made, for root only: kubelet makes none for a plugin's socket.
///
/// # Errors
/// The directory cannot be made or written, or the path is too long for a socket (107 bytes).
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    std::fs::DirBuilder::new().mode(0o700).recursive(true).create(directory)?;
    // kubelet looks at every name in its directory that does not begin with a dot.
    let hidden = path.with_file_name(format!(".{}", name.display()));
    match std::fs::remove_file(&hidden) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&hidden)?;
    rustix::fs::chmod(&hidden, Mode::RUSR | Mode::WUSR)?;
    std::fs::rename(&hidden, path)?;
    Ok(listener)
}

/// Serves root's processes until `shutdown`, then finishes the calls that it has. Requests are at most 4 MiB long, tonic's
/// default.
///
/// # Errors
/// None is known: a connection that fails ends alone.
pub async fn serve(
    listener: UnixListener,
    services: Routes,
    shutdown: impl Future<Output = ()>,
) -> Result<(), Error> {
    let callers = UnixListenerStream::new(listener).then(|accepted| async {
        if let Err(error) = &accepted {
            tracing::warn!(%error, "cannot accept a caller");
            tokio::time::sleep(ACCEPT_AGAIN).await;
        }
        accepted
    });
    let callers = callers.filter(|accepted| accepted.as_ref().map_or(true, is_root));
    let server = Server::builder().max_connection_age(LONGEST_CONNECTION);
    let mut server = server.layer(GlobalConcurrencyLimitLayer::new(MOST_CALLS));
    server.add_routes(services).serve_with_incoming_shutdown(callers, shutdown).await
}

/// A refusal as gRPC says it. A code that is none, or says that all is well, becomes `UNKNOWN`.
pub(crate) fn refused(code: u32, text: &str) -> Status {
    let code = match i32::try_from(code).map_or(Code::Unknown, Code::from_i32) {
        Code::Ok => Code::Unknown,
        code => code,
    };
    Status::new(code, text.chars().take(LONGEST_TEXT).collect::<String>())
}

fn is_root(caller: &UnixStream) -> bool {
    let uid = caller.peer_cred().map(|credentials| credentials.uid());
    let root = matches!(uid, Ok(0));
    if !root {
        tracing::warn!(?uid, "refused a caller that is not root");
    }
    root
}
