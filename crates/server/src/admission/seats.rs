//! Seats for chat: a queue in order of entry, sessions of limited length, and the release of seats
//! that nobody uses.

use super::Desk;
use super::accounts::by_id;
use crate::error::ServerError;
use rusqlite::{Connection, OptionalExtension, params};

const DAY_S: i64 = 86_400;

/// How seats are shared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SeatRules {
    /// Seats in all; 0 lets everyone approved chat without one.
    pub seats: u32,
    /// Times an account may enter the queue in a day (UTC).
    pub entries_per_day: u32,
    /// Length of a session, seconds.
    pub session_s: i64,
    /// A seat unused this long is released, seconds.
    pub idle_s: i64,
    /// Somebody who waits and is not heard of this long has left, seconds.
    pub absent_s: i64,
}

impl Default for SeatRules {
    fn default() -> Self {
        Self {
            seats: 0,
            entries_per_day: 10,
            session_s: 30 * 60,
            idle_s: 5 * 60,
            absent_s: 60,
        }
    }
}

/// Where an account stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seat {
    /// No seats are kept: everyone approved may chat.
    Open,
    /// Neither sits nor waits.
    None {
        /// Entries left today.
        entries_left: u32,
        /// Why the last seat or wait ended: `expired`, `idle`, `absent`, `left`, `revoked`.
        last_end: Option<String>,
    },
    /// In the queue.
    Waiting {
        /// 1 is next.
        position: u32,
        /// In all.
        waiting: u32,
    },
    /// Has a seat.
    Seated {
        /// Seconds of the session left.
        left_s: i64,
        /// Seconds until it counts as unused.
        idle_left_s: i64,
    },
}

impl Desk {
    /// Enters the queue, unless the account sits or waits already.
    ///
    /// # Errors
    /// [`ServerError::Admission`]: no entries left today, or not approved.
    pub fn enter(&self, account: i64, now: i64) -> Result<Seat, ServerError> {
        self.change(|t| {
            self.advance(t, now)?;
            if open_entry(t, account)?.is_none() && self.rules.seats > 0 {
                let known = by_id(t, account)?;
                if known.state != super::AccountState::Approved {
                    return Err(ServerError::Admission(
                        "the account is not approved".to_owned(),
                    ));
                }
                if self.entries_left(t, account, now)? == 0 {
                    let most = self.rules.entries_per_day;
                    let message =
                        format!("{most} entries a day are allowed; come back tomorrow (UTC)");
                    return Err(ServerError::Admission(message));
                }
                t.execute(
                    "INSERT INTO seat (account, day, entered_at, seen_at) VALUES (?1, ?2, ?3, ?3)",
                    params![account, now / DAY_S, now],
                )?;
                self.advance(t, now)?;
            }
            self.stand(t, account, now)
        })
    }

    /// Where the account stands. Counts as a sign of life of one who waits, not of one who sits.
    ///
    /// # Errors
    /// [`ServerError::Database`].
    pub fn seat(&self, account: i64, now: i64) -> Result<Seat, ServerError> {
        self.change(|t| {
            let seen = "UPDATE seat SET seen_at = ?2
                WHERE account = ?1 AND ended_at IS NULL AND granted_at IS NULL";
            self.advance(t, now)?;
            t.execute(seen, params![account, now])?;
            self.stand(t, account, now)
        })
    }

    /// Gives the seat or the place in the queue back.
    ///
    /// # Errors
    /// [`ServerError::Database`].
    pub fn leave(&self, account: i64, now: i64) -> Result<Seat, ServerError> {
        self.change(|t| {
            let end = "UPDATE seat SET ended_at = ?2, end_reason = 'left'
                WHERE account = ?1 AND ended_at IS NULL";
            t.execute(end, params![account, now])?;
            self.advance(t, now)?;
            self.stand(t, account, now)
        })
    }

    /// True when the account may chat now; a seat counts as used.
    pub(super) fn sits(&self, t: &Connection, account: i64, now: i64) -> Result<bool, ServerError> {
        if self.rules.seats == 0 {
            return Ok(true);
        }
        self.advance(t, now)?;
        let used = "UPDATE seat SET seen_at = ?2
            WHERE account = ?1 AND ended_at IS NULL AND granted_at IS NOT NULL";
        Ok(t.execute(used, params![account, now])? == 1)
    }

    /// Ends what is over and gives free seats to those who wait longest.
    fn advance(&self, t: &Connection, now: i64) -> Result<(), ServerError> {
        let rules = &self.rules;
        let end = "UPDATE seat SET ended_at = ?1, end_reason = ?2
            WHERE ended_at IS NULL AND (granted_at IS NOT NULL) = ?3 AND ";
        let rows: [(&str, bool, &str, i64); 3] = [
            ("expired", true, "granted_at <= ?4", now - rules.session_s),
            ("idle", true, "seen_at <= ?4", now - rules.idle_s),
            ("absent", false, "seen_at <= ?4", now - rules.absent_s),
        ];
        for (reason, granted, condition, limit) in rows {
            let query = format!("{end}{condition}");
            t.prepare_cached(&query)?
                .execute(params![now, reason, granted, limit])?;
        }
        t.prepare_cached(
            "UPDATE seat SET granted_at = ?1, seen_at = ?1 WHERE id IN (
                SELECT id FROM seat WHERE ended_at IS NULL AND granted_at IS NULL ORDER BY id
                LIMIT max(0, ?2 - (SELECT count(*) FROM seat
                    WHERE ended_at IS NULL AND granted_at IS NOT NULL)))",
        )?
        .execute(params![now, rules.seats])?;
        Ok(())
    }

    fn entries_left(&self, t: &Connection, account: i64, now: i64) -> rusqlite::Result<u32> {
        let query = "SELECT count(*) FROM seat WHERE account = ?1 AND day = ?2";
        let used: u32 = t.query_row(query, params![account, now / DAY_S], |row| row.get(0))?;
        Ok(self.rules.entries_per_day.saturating_sub(used))
    }

    fn stand(&self, t: &Connection, account: i64, now: i64) -> Result<Seat, ServerError> {
        if self.rules.seats == 0 {
            return Ok(Seat::Open);
        }
        let Some((id, granted_at, seen_at)) = open_entry(t, account)? else {
            let query = "SELECT end_reason FROM seat WHERE account = ?1 ORDER BY id DESC LIMIT 1";
            return Ok(Seat::None {
                entries_left: self.entries_left(t, account, now)?,
                last_end: t.query_row(query, [account], |row| row.get(0)).optional()?,
            });
        };
        if let Some(granted_at) = granted_at {
            return Ok(Seat::Seated {
                left_s: granted_at + self.rules.session_s - now,
                idle_left_s: seen_at + self.rules.idle_s - now,
            });
        }
        let query = "SELECT count(*) FILTER (WHERE id <= ?1), count(*) FROM seat
            WHERE ended_at IS NULL AND granted_at IS NULL";
        let (position, waiting) = t.query_row(query, [id], |row| Ok((row.get(0)?, row.get(1)?)))?;
        Ok(Seat::Waiting { position, waiting })
    }
}

/// `(id, granted_at, seen_at)` of the entry that has not ended.
fn open_entry(t: &Connection, account: i64) -> rusqlite::Result<Option<(i64, Option<i64>, i64)>> {
    let query = "SELECT id, granted_at, seen_at FROM seat WHERE account = ?1 AND ended_at IS NULL";
    let row = t.query_row(query, [account], |row| {
        Ok((row.get(0)?, row.get(1)?, row.get(2)?))
    });
    row.optional()
}
