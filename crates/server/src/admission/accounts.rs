//! Accounts and their keys.

use super::Desk;
use crate::error::ServerError;
use rusqlite::{Connection, OptionalExtension, Row, params};
use sha2::{Digest, Sha256};

/// What an account may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Requests at any time within its limits.
    Api,
    /// Only while it holds a seat.
    Chat,
}

impl Access {
    /// `api` or `chat`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Api => "api",
            Self::Chat => "chat",
        }
    }
}

/// Where an account stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AccountState {
    /// Waits for approval.
    Applied,
    /// May use the service within its terms.
    Approved,
    /// May not any more.
    Revoked,
}

impl AccountState {
    /// `applied`, `approved` or `revoked`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Applied => "applied",
            Self::Approved => "approved",
            Self::Revoked => "revoked",
        }
    }

    fn of(name: &str) -> Self {
        match name {
            "approved" => Self::Approved,
            "revoked" => Self::Revoked,
            _ => Self::Applied,
        }
    }
}

/// What an approval grants.
#[derive(Clone, Debug, PartialEq)]
pub struct Terms {
    /// API or chat.
    pub access: Access,
    /// First second of access; `None` is at once.
    pub starts_at: Option<i64>,
    /// First second without access; `None` is never.
    pub ends_at: Option<i64>,
    /// Requests begun in any 60 seconds; 0 is no limit.
    pub requests_per_minute: u32,
    /// Prompt and generated tokens of requests begun in any 60 seconds; 0 is no limit.
    pub tokens_per_minute: u32,
    /// What a token counts in the bill.
    pub price_multiplier: f64,
}

impl Default for Terms {
    /// MiMo's published limits: 100 requests and 10 million tokens a minute.
    fn default() -> Self {
        Self {
            access: Access::Chat,
            starts_at: None,
            ends_at: None,
            requests_per_minute: 100,
            tokens_per_minute: 10_000_000,
            price_multiplier: 1.0,
        }
    }
}

/// An account as it stands.
#[derive(Clone, Debug, PartialEq)]
pub struct Account {
    /// Its number.
    pub id: i64,
    /// Chosen by the applicant, unique.
    pub name: String,
    /// How to reach them.
    pub contact: String,
    /// What they want it for.
    pub purpose: String,
    /// Where it stands.
    pub state: AccountState,
    /// When it applied.
    pub applied_at: i64,
    /// Meaningful once approved.
    pub terms: Terms,
}

/// Whose key it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct KeyOwner {
    pub(crate) account: i64,
    pub(crate) key: i64,
}

const COLUMNS: &str = "id, name, contact, purpose, state, applied_at, access, starts_at, ends_at, \
                       requests_per_minute, tokens_per_minute, price_multiplier";

fn account(row: &Row<'_>) -> rusqlite::Result<Account> {
    let access: String = row.get(6)?;
    Ok(Account {
        id: row.get(0)?,
        name: row.get(1)?,
        contact: row.get(2)?,
        purpose: row.get(3)?,
        state: AccountState::of(&row.get::<_, String>(4)?),
        applied_at: row.get(5)?,
        terms: Terms {
            access: if access == "api" {
                Access::Api
            } else {
                Access::Chat
            },
            starts_at: row.get(7)?,
            ends_at: row.get(8)?,
            requests_per_minute: row.get(9)?,
            tokens_per_minute: row.get(10)?,
            price_multiplier: row.get(11)?,
        },
    })
}

/// How a key is kept.
pub(crate) fn hash(key: &str) -> [u8; 32] {
    Sha256::digest(key.as_bytes()).into()
}

/// A new key: `sk-` and 192 random bits.
pub(crate) fn random_key() -> Result<String, ServerError> {
    let mut bytes = [0_u8; 24];
    getrandom::fill(&mut bytes).map_err(|error| ServerError::System {
        what: "random numbers",
        source: std::io::Error::other(error.to_string()),
    })?;
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(format!("sk-{hex}"))
}

/// Applications that wait at a time: anybody may apply, and the file must not grow without end.
const APPLICATIONS_MAX: u32 = 10_000;

fn refuse_too_many(t: &Connection) -> Result<(), ServerError> {
    let query = "SELECT count(*) FROM account WHERE state = 'applied'";
    let waiting: u32 = t.query_row(query, [], |row| row.get(0))?;
    if waiting < APPLICATIONS_MAX {
        return Ok(());
    }
    let message = "too many applications wait for an answer; try again later";
    Err(ServerError::Admission(message.to_owned()))
}

fn check_text(what: &str, text: &str, most: usize) -> Result<(), ServerError> {
    let characters = text.trim().chars().count();
    if characters == 0 || characters > most || text.chars().any(char::is_control) {
        let message = format!("{what}: 1 to {most} characters are needed, on one line");
        return Err(ServerError::Admission(message));
    }
    Ok(())
}

impl Desk {
    /// Takes an application.
    ///
    /// # Errors
    /// [`ServerError::Admission`]: a text of the wrong length, the name is taken, or too many wait.
    pub fn apply(
        &self,
        name: &str,
        contact: &str,
        purpose: &str,
        now: i64,
    ) -> Result<i64, ServerError> {
        check_text("name", name, 64)?;
        check_text("contact", contact, 200)?;
        check_text("purpose", purpose, 1000)?;
        self.change(|t| {
            let find = "SELECT 1 FROM account WHERE name = ?1";
            let taken = t.query_row(find, [name.trim()], |_| Ok(())).optional()?;
            if taken.is_some() {
                let message = format!("the name `{}` is taken", name.trim());
                return Err(ServerError::Admission(message));
            }
            refuse_too_many(t)?;
            t.execute(
                "INSERT INTO account (name, contact, purpose, state, applied_at)
                 VALUES (?1, ?2, ?3, 'applied', ?4)",
                params![name.trim(), contact.trim(), purpose.trim(), now],
            )?;
            Ok(t.last_insert_rowid())
        })
    }

    /// Approves an account and issues its first key, or a further one. The key is returned once and
    /// kept as a hash.
    ///
    /// # Errors
    /// [`ServerError::Admission`]: no such account, or terms that make no sense.
    pub fn approve(&self, name: &str, terms: &Terms, now: i64) -> Result<String, ServerError> {
        if terms.price_multiplier.is_nan() || terms.price_multiplier < 0.0 {
            let message = "price multiplier: 0 or more is needed".to_owned();
            return Err(ServerError::Admission(message));
        }
        if terms
            .ends_at
            .is_some_and(|end| end <= terms.starts_at.unwrap_or(i64::MIN))
        {
            let message = "the access ends before it starts".to_owned();
            return Err(ServerError::Admission(message));
        }
        let key = random_key()?;
        self.change(|t| {
            let changed = t.execute(
                "UPDATE account SET state = 'approved', access = ?2, starts_at = ?3, ends_at = ?4,
                 requests_per_minute = ?5, tokens_per_minute = ?6, price_multiplier = ?7
                 WHERE name = ?1",
                params![
                    name,
                    terms.access.name(),
                    terms.starts_at,
                    terms.ends_at,
                    terms.requests_per_minute,
                    terms.tokens_per_minute,
                    terms.price_multiplier
                ],
            )?;
            if changed == 0 {
                return Err(unknown(name));
            }
            t.execute(
                "INSERT INTO key (account, hash, hint, created_at)
                 SELECT id, ?2, ?3, ?4 FROM account WHERE name = ?1",
                params![name, hash(&key), &key[..7], now],
            )?;
            Ok(())
        })?;
        Ok(key)
    }

    /// Ends an account's access, its keys' and its seat.
    ///
    /// # Errors
    /// [`ServerError::Admission`]: no such account.
    pub fn revoke(&self, name: &str, now: i64) -> Result<(), ServerError> {
        self.change(|t| {
            let set = "UPDATE account SET state = 'revoked' WHERE name = ?1";
            if t.execute(set, [name])? == 0 {
                return Err(unknown(name));
            }
            let of = "account = (SELECT id FROM account WHERE name = ?1)";
            let keys = format!("UPDATE key SET revoked_at = ?2 WHERE revoked_at IS NULL AND {of}");
            t.execute(&keys, params![name, now])?;
            let seats = format!(
                "UPDATE seat SET ended_at = ?2, end_reason = 'revoked' WHERE ended_at IS NULL AND {of}"
            );
            t.execute(&seats, params![name, now])?;
            Ok(())
        })
    }

    /// All accounts, newest application first.
    ///
    /// # Errors
    /// [`ServerError::Database`].
    pub fn accounts(&self) -> Result<Vec<Account>, ServerError> {
        let database = self.lock();
        let query = format!("SELECT {COLUMNS} FROM account ORDER BY id DESC");
        let mut statement = database.prepare(&query)?;
        let rows = statement.query_map([], account)?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// Whose key it is: unrevoked, of an account that is not revoked.
    pub(crate) fn owner(&self, key: &str) -> Result<Option<KeyOwner>, ServerError> {
        let query = "SELECT key.account, key.id FROM key JOIN account ON account.id = key.account
                     WHERE hash = ?1 AND revoked_at IS NULL AND state = 'approved'";
        let database = self.lock();
        let mut statement = database.prepare_cached(query)?;
        let owner = statement.query_row([hash(key)], |row| {
            Ok(KeyOwner {
                account: row.get(0)?,
                key: row.get(1)?,
            })
        });
        Ok(owner.optional()?)
    }
}

pub(super) fn by_id(t: &rusqlite::Connection, id: i64) -> rusqlite::Result<Account> {
    let query = format!("SELECT {COLUMNS} FROM account WHERE id = ?1");
    t.prepare_cached(&query)?.query_row([id], account)
}

fn unknown(name: &str) -> ServerError {
    ServerError::Admission(format!("no account is named `{name}`"))
}
