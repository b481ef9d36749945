//! Limits and usage: a request is counted when it begins, with its prompt, and settled once, with
//! what was generated.

use super::accounts::{KeyOwner, by_id};
use super::{AccountState, Desk};
use crate::error::ServerError;
use rusqlite::{Connection, params};

/// A request that was let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket(pub(super) i64);

/// Why a request is not let in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Outside the access window, in Unix seconds.
    Window {
        /// When access begins, if it is yet to.
        opens_at: Option<i64>,
    },
    /// Over a limit; room comes back after so many seconds.
    Quota {
        /// Which limit.
        limit: &'static str,
        /// How much it allows in a minute.
        allowed: u32,
        /// Seconds until the oldest request leaves the minute.
        retry_after_s: u32,
    },
    /// The account may chat only from a seat.
    NoSeat,
    /// Revoked meanwhile.
    Revoked,
}

/// What an account used.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Usage {
    /// Requests begun.
    pub requests: u64,
    /// Of these, cut off by the end of the process.
    pub interrupted: u64,
    /// Prompt tokens.
    pub prompt_tokens: u64,
    /// Of these, from the cache.
    pub cached_tokens: u64,
    /// Generated tokens.
    pub generated_tokens: u64,
    /// Prompt and generated tokens times the price multiplier of their time.
    pub billed_tokens: f64,
}

const MINUTE_S: i64 = 60;

impl Desk {
    /// Lets a request in and counts it.
    pub(crate) fn begin(
        &self,
        owner: KeyOwner,
        prompt_tokens: u32,
        now: i64,
    ) -> Result<Result<Ticket, Refusal>, ServerError> {
        self.change(|t| {
            let account = by_id(t, owner.account)?;
            let terms = &account.terms;
            if account.state != AccountState::Approved {
                return Ok(Err(Refusal::Revoked));
            }
            if terms.starts_at.is_some_and(|start| now < start) {
                return Ok(Err(Refusal::Window {
                    opens_at: terms.starts_at,
                }));
            }
            if terms.ends_at.is_some_and(|end| now >= end) {
                return Ok(Err(Refusal::Window { opens_at: None }));
            }
            if let Some(refusal) = over(t, &account, prompt_tokens, now)? {
                return Ok(Err(refusal));
            }
            if terms.access == super::Access::Chat && !self.sits(t, owner.account, now)? {
                return Ok(Err(Refusal::NoSeat));
            }
            t.execute(
                "INSERT INTO usage (account, key, begun_at, state, prompt_tokens, price_multiplier)
                 VALUES (?1, ?2, ?3, 'open', ?4, ?5)",
                params![
                    owner.account,
                    owner.key,
                    now,
                    prompt_tokens,
                    terms.price_multiplier
                ],
            )?;
            Ok(Ok(Ticket(t.last_insert_rowid())))
        })
    }

    /// Closes a request's account. A second call changes nothing.
    ///
    /// # Errors
    /// [`ServerError::Database`].
    pub fn settle(&self, ticket: Ticket, generated: u32, cached: u32) -> Result<(), ServerError> {
        self.change(|t| {
            t.execute(
                "UPDATE usage SET state = 'settled', generated_tokens = ?2, cached_tokens = ?3
                 WHERE id = ?1 AND state = 'open'",
                params![ticket.0, generated, cached],
            )?;
            Ok(())
        })
    }

    /// What an account used since `since`.
    ///
    /// # Errors
    /// [`ServerError::Database`].
    pub fn usage(&self, account: i64, since: i64) -> Result<Usage, ServerError> {
        let query = "SELECT count(*), count(*) FILTER (WHERE state = 'interrupted'),
            coalesce(sum(prompt_tokens), 0), coalesce(sum(cached_tokens), 0),
            coalesce(sum(generated_tokens), 0),
            coalesce(sum((prompt_tokens + generated_tokens) * price_multiplier), 0.0)
            FROM usage WHERE account = ?1 AND begun_at >= ?2";
        let database = self.lock();
        let usage = database.query_row(query, params![account, since], |row| {
            Ok(Usage {
                requests: row.get::<_, i64>(0)? as u64,
                interrupted: row.get::<_, i64>(1)? as u64,
                prompt_tokens: row.get::<_, i64>(2)? as u64,
                cached_tokens: row.get::<_, i64>(3)? as u64,
                generated_tokens: row.get::<_, i64>(4)? as u64,
                billed_tokens: row.get(5)?,
            })
        })?;
        Ok(usage)
    }
}

/// The limit that one more request would exceed.
fn over(
    t: &Connection,
    account: &super::Account,
    prompt_tokens: u32,
    now: i64,
) -> rusqlite::Result<Option<Refusal>> {
    let query = "SELECT count(*), coalesce(sum(prompt_tokens + generated_tokens), 0),
                 coalesce(min(begun_at), ?2) FROM usage WHERE account = ?1 AND begun_at > ?2";
    let since = now - MINUTE_S;
    let (requests, tokens, oldest): (i64, i64, i64) = t
        .prepare_cached(query)?
        .query_row(params![account.id, since], |row| {
            Ok((row.get(0)?, row.get(1)?, row.get(2)?))
        })?;
    let retry_after_s = (oldest + MINUTE_S - now).clamp(1, MINUTE_S) as u32;
    let quota = |limit, allowed| Refusal::Quota {
        limit,
        allowed,
        retry_after_s,
    };
    let terms = &account.terms;
    let (most_requests, most_tokens) = (terms.requests_per_minute, terms.tokens_per_minute);
    if most_requests > 0 && requests >= i64::from(most_requests) {
        return Ok(Some(quota("requests", most_requests)));
    }
    let over = most_tokens > 0 && tokens + i64::from(prompt_tokens) > i64::from(most_tokens);
    Ok(over.then(|| quota("tokens", most_tokens)))
}
