//! The admission desk: who may use a scarce resource, when, and how much. Accounts that apply and
//! are approved, keys, rate and token limits, usage, and seats with a queue.
//!
//! One SQLite file. Invariants: every change is one transaction, synced before it is answered, so a
//! process killed at any moment leaves the desk as it was before or after a change, never between;
//! keys are kept as SHA-256 only; a request is counted when it begins and settled once. All times are
//! Unix seconds and come from the caller.

mod accounts;
mod ledger;
mod seats;

pub use accounts::{Access, Account, AccountState, Terms};
pub(crate) use accounts::{KeyOwner, hash};
pub use ledger::{Refusal, Ticket, Usage};
pub use seats::{Seat, SeatRules};

use crate::error::ServerError;
use rusqlite::{Connection, TransactionBehavior};
use std::fs::File;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS account (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    contact TEXT NOT NULL,
    purpose TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('applied', 'approved', 'revoked')),
    applied_at INTEGER NOT NULL,
    access TEXT NOT NULL DEFAULT 'chat' CHECK (access IN ('api', 'chat')),
    starts_at INTEGER,
    ends_at INTEGER,
    requests_per_minute INTEGER NOT NULL DEFAULT 0,
    tokens_per_minute INTEGER NOT NULL DEFAULT 0,
    price_multiplier REAL NOT NULL DEFAULT 1.0
);
CREATE TABLE IF NOT EXISTS key (
    id INTEGER PRIMARY KEY,
    account INTEGER NOT NULL REFERENCES account(id),
    hash BLOB NOT NULL UNIQUE,
    hint TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    revoked_at INTEGER
);
CREATE TABLE IF NOT EXISTS usage (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    account INTEGER NOT NULL REFERENCES account(id),
    key INTEGER NOT NULL REFERENCES key(id),
    begun_at INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('open', 'settled', 'interrupted')),
    prompt_tokens INTEGER NOT NULL,
    cached_tokens INTEGER NOT NULL DEFAULT 0,
    generated_tokens INTEGER NOT NULL DEFAULT 0,
    price_multiplier REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS usage_recent ON usage(account, begun_at);
CREATE INDEX IF NOT EXISTS usage_open ON usage(state) WHERE state = 'open';
CREATE TABLE IF NOT EXISTS seat (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    account INTEGER NOT NULL REFERENCES account(id),
    day INTEGER NOT NULL,
    entered_at INTEGER NOT NULL,
    granted_at INTEGER,
    seen_at INTEGER NOT NULL,
    ended_at INTEGER,
    end_reason TEXT
);
CREATE UNIQUE INDEX IF NOT EXISTS seat_one_each ON seat(account) WHERE ended_at IS NULL;
CREATE INDEX IF NOT EXISTS seat_day ON seat(account, day);
";

/// See the module.
pub struct Desk {
    database: Mutex<Connection>,
    rules: SeatRules,
    /// Held by the one server of this file.
    _lock: Option<File>,
}

/// Now, in Unix seconds.
#[must_use]
pub fn now_s() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |time| time.as_secs() as i64)
}

impl Desk {
    /// Opens or makes the file, for orders beside a running server.
    ///
    /// # Errors
    /// [`ServerError::Database`].
    pub fn open(path: &Path, rules: SeatRules) -> Result<Self, ServerError> {
        let database = Connection::open(path)?;
        database.busy_timeout(Duration::from_secs(10))?;
        database.pragma_update(None, "journal_mode", "WAL")?;
        database.pragma_update(None, "synchronous", "FULL")?;
        database.pragma_update(None, "foreign_keys", true)?;
        database.execute_batch(SCHEMA)?;
        Ok(Self {
            database: Mutex::new(database),
            rules,
            _lock: None,
        })
    }

    /// Opens the file as its one server and clears up after one that was killed: requests it had
    /// open are closed as interrupted, and whoever sat or waited gets a fresh start of the idle
    /// clock, because nobody could be seen meanwhile.
    ///
    /// # Errors
    /// [`ServerError::Database`]; [`ServerError::File`] when another server has it.
    pub fn open_serving(path: &Path, rules: SeatRules, now: i64) -> Result<Self, ServerError> {
        let lock_path = path.with_extension("lock");
        let refuse = |message: String| ServerError::File {
            path: lock_path.clone(),
            message,
        };
        let lock = File::create(&lock_path).map_err(|error| refuse(error.to_string()))?;
        lock.try_lock()
            .map_err(|_| refuse("another server uses this admission database".to_owned()))?;
        let mut desk = Self::open(path, rules)?;
        desk._lock = Some(lock);
        let close = "UPDATE usage SET state = 'interrupted' WHERE state = 'open'";
        desk.lock().execute(close, [])?;
        let restart = "UPDATE seat SET seen_at = ?1 WHERE ended_at IS NULL";
        desk.lock().execute(restart, [now])?;
        Ok(desk)
    }

    /// The rules of seats.
    #[must_use]
    pub fn rules(&self) -> &SeatRules {
        &self.rules
    }

    fn lock(&self) -> MutexGuard<'_, Connection> {
        // A panic rolls the open transaction back; the connection stays good.
        self.database.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `work` in one transaction that no other process can interleave.
    fn change<T, E: From<rusqlite::Error>>(
        &self,
        work: impl FnOnce(&rusqlite::Transaction<'_>) -> Result<T, E>,
    ) -> Result<T, E> {
        let mut database = self.lock();
        let transaction = database.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let result = work(&transaction)?;
        transaction.commit()?;
        Ok(result)
    }
}

#[cfg(test)]
mod tests;
