//! Panics. A panic message may hold whatever its writer put there, so only its place is logged. One inside a file system's
//! handler is that caller's EIO; any other means that a part of the agent is gone, so it ends in order: unmounted.

use tokio::sync::watch;

/// Tells of the first panic that nobody contains.
#[derive(Clone)]
pub struct Panicked(watch::Receiver<bool>);

impl Panicked {
    /// Returns when one happened.
    pub async fn happened(&mut self) {
        if self.0.wait_for(|panicked| *panicked).await.is_err() {
            // The hook owns the sender for ever.
            std::future::pending::<()>().await;
        }
    }
}

/// Replaces the process's panic hook.
#[must_use]
pub fn watch() -> Panicked {
    let (tell, hear) = watch::channel(false);
    std::panic::set_hook(Box::new(move |info| {
        let place = info.location().map(ToString::to_string).unwrap_or_default();
        let contained = crate::fuse::in_handler();
        tracing::error!(place, contained, "a fault of this program (panic); its message is not logged");
        if !contained {
            tell.send_replace(true);
        }
    }));
    Panicked(hear)
}
