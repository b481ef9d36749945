//! The account of one request of a client who has an account: opened before the request is given to
//! the engine, settled when it ends or its reader goes away.

use crate::admission::{Desk, Ticket};
use std::sync::Arc;

/// See the module. Dropping it settles.
pub(crate) struct Meter {
    desk: Arc<Desk>,
    ticket: Ticket,
    generated_tokens: u32,
    cached_tokens: u32,
}

impl Meter {
    pub(crate) fn new(desk: Arc<Desk>, ticket: Ticket) -> Self {
        Self {
            desk,
            ticket,
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
}

impl Drop for Meter {
    fn drop(&mut self) {
        let (ticket, desk) = (self.ticket, Arc::clone(&self.desk));
        let (generated, cached) = (self.generated_tokens, self.cached_tokens);
        // A row in SQLite with a synced write: off the threads that serve.
        let settle = move || {
            if let Err(error) = desk.settle(ticket, generated, cached) {
                tracing::error!(%error, "usage not recorded");
            }
        };
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(settle)),
            Err(_) => settle(),
        }
    }
}
