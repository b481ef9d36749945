//! The account of one request of a client who has an account: opened before the request is given to
//! the engine, settled before its client hears that it is complete, or when its reader goes away.

use crate::admission::{Desk, Ticket};
use std::sync::Arc;

/// See the module. Dropping it settles what is not settled.
pub(crate) struct Meter {
    desk: Arc<Desk>,
    /// `None` once settled.
    ticket: Option<Ticket>,
    generated_tokens: u32,
    cached_tokens: u32,
}

impl Meter {
    pub(crate) fn new(desk: Arc<Desk>, ticket: Ticket) -> Self {
        Self {
            desk,
            ticket: Some(ticket),
            generated_tokens: 0,
            cached_tokens: 0,
        }
    }

    /// Tokens were generated.
    pub(crate) fn generated(&mut self, tokens: u32) {
        self.generated_tokens += tokens;
    }

    /// So much of the prompt came from the cache.
    pub(crate) fn cached(&mut self, tokens: u32) {
        self.cached_tokens = self.cached_tokens.max(tokens);
    }

    /// Settles, and waits until that is on disk.
    pub(crate) async fn settle(mut self) {
        if let Some(work) = self.work() {
            // A task that cannot be joined has logged why.
            let _ = tokio::task::spawn_blocking(work).await;
        }
    }

    /// The row in SQLite with a synced write: not for the threads that serve.
    fn work(&mut self) -> Option<impl FnOnce() + Send + use<>> {
        let (ticket, desk) = (self.ticket.take()?, Arc::clone(&self.desk));
        let (generated, cached) = (self.generated_tokens, self.cached_tokens);
        Some(move || {
            if let Err(error) = desk.settle(ticket, generated, cached) {
                tracing::error!(%error, "usage not recorded");
            }
        })
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        let Some(settle) = self.work() else { return };
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(settle)),
            Err(_) => settle(),
        }
    }
}
