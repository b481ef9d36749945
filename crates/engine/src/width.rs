//! Draft widths: how many rows each sequence verifies in the next step, and how likely a draft must
//! be to be worth a row.
//!
//! Owns the running acceptance of each sequence and the measured cost of a step. Chooses the widths
//! that maximise expected tokens over expected time for the step as a whole. Invariant: what
//! drafting has cost a sequence more than plain decoding would have is kept in a ledger, and
//! drafting stops while that exceeds a small share of the sequence's decoding time plus a
//! small grant to begin with; a plain step now and then keeps its price known. Pure arithmetic: times come in as numbers.

/// Share of a sequence's decoding time that drafting may lose against plain decoding.
const LOSS_SHARE_MAX: f64 = 0.015;
/// Failed drafts a new sequence may pay for before it has decoded anything.
const GRANT_PROBES: f64 = 1.5;
/// Failed drafts a sequence may lose in a row out of what drafting has won before.
const CREDIT_PROBES: f64 = 8.0;
/// Drafting has to promise this much more tokens a second than plain decoding.
const MARGIN: f64 = 1.02;
/// Weight of a new measurement of time at the rows of the step before.
const TIME_WEIGHT: f64 = 0.15;
/// The same at other rows, which are seen less often.
const RARE_TIME_WEIGHT: f64 = 0.4;
/// Drafting steps in a row after which a plain one is due: an old price of plain decoding would hide
/// that drafting no longer pays. At twice plain speed it costs 1 %.
const PLAIN_EVERY: u32 = 24;
/// Drafts more likely than this are always verified.
const CHANCE_MIN_MAX: f64 = 0.9;
/// Acceptance assumed at each position before anything was drafted: high enough to try.
const PRIOR_RATE: f64 = 0.8;
/// The same for how often a draft is verified when the one before it was.
const PRIOR_KEPT: f64 = 0.9;
/// Observations that a prior counts for.
const PRIOR_WEIGHT: f64 = 4.0;

/// Time as a function of a number of rows, from measurements at some of them.
#[derive(Clone, Debug, Default)]
pub struct Curve {
    /// Entry `rows`: microseconds.
    points: Vec<Option<f64>>,
    last: usize,
}

impl Curve {
    /// Takes in a measurement. Repeated at the same rows, a change is one of level (a growing
    /// context, another process) and moves all points; else it corrects this point's place.
    pub fn measure(&mut self, rows: usize, us: f64) {
        if self.points.len() <= rows {
            self.points.resize(rows + 1, None);
        }
        match self.points[rows] {
            None => self.points[rows] = Some(us),
            Some(old) => {
                let ratio = (us / old.max(1e-3)).clamp(0.5, 2.0);
                let same = rows == self.last;
                let weight = if same { TIME_WEIGHT } else { RARE_TIME_WEIGHT };
                let factor = 1.0 + weight * (ratio - 1.0);
                if same {
                    self.points
                        .iter_mut()
                        .flatten()
                        .for_each(|us| *us *= factor);
                } else {
                    self.points[rows] = Some(old * factor);
                }
            }
        }
        self.last = rows;
    }

    /// True when a step of at most `rows` was measured.
    fn reaches(&self, rows: usize) -> bool {
        self.points.iter().take(rows + 1).any(Option::is_some)
    }

    /// [`Curve::estimate`] for a mean number of rows.
    #[must_use]
    fn at(&self, rows: f64) -> f64 {
        let (low, part) = (rows.floor(), rows.fract());
        let low = self.estimate(low as usize);
        match part > 0.0 {
            true => low + part * (self.estimate(rows.ceil() as usize) - low),
            false => low,
        }
    }

    /// Expected microseconds: linear between measured points, 0 when there are none.
    #[must_use]
    pub fn estimate(&self, rows: usize) -> f64 {
        let known = |i: usize| {
            self.points
                .get(i)
                .copied()
                .flatten()
                .map(|us| (i as f64, us))
        };
        if let Some((_, us)) = known(rows) {
            return us;
        }
        let below = (0..rows.min(self.points.len())).rev().find_map(known);
        let above = (rows..self.points.len()).find_map(known);
        let line = |(x0, y0): (f64, f64), (x1, y1): (f64, f64)| {
            y0 + (y1 - y0) / (x1 - x0) * (rows as f64 - x0)
        };
        match (below, above) {
            (Some(a), Some(b)) => line(a, b),
            (Some(b), None) => match (0..b.0 as usize).rev().find_map(known) {
                Some(a) => line(a, b).max(b.1),
                None => b.1,
            },
            (None, Some(b)) => b.1,
            (None, None) => 0.0,
        }
    }
}

/// Measured costs, and the acceptance of all sequences as the expectation for new ones.
#[derive(Clone, Debug, Default)]
pub struct Costs {
    verify: Curve,
    draft: Curve,
    prior: Rates,
    prior_kept: Rates,
    /// The Decoder leaves unlikely drafts out, so that a wide plan costs little.
    leaves_out: bool,
    /// Drafting steps since the last plain one.
    since_plain: u32,
}

/// A frequency for each draft of a block: `rates`, entry `i` is how often draft `i + 1` is verified and
/// accepted when those before it were; `kept`, how often it is verified at all.
#[derive(Clone, Debug, Default)]
struct Rates(Vec<(f64, f64)>);

impl Rates {
    fn get(&self, slot: usize) -> Option<f64> {
        self.0.get(slot).map(|(rate, _)| *rate)
    }

    /// Of `slots`, the first `hits` hit. `weight_min`: how slowly old observations are forgotten.
    fn add(&mut self, slots: u32, hits: u32, weight_min: f64, prior: impl Fn(usize) -> f64) {
        for slot in 0..slots as usize {
            if self.0.len() == slot {
                self.0.push((prior(slot), PRIOR_WEIGHT));
            }
            let (rate, seen) = &mut self.0[slot];
            *seen += 1.0;
            let weight = (1.0 / *seen).max(weight_min);
            let hit = f64::from(u8::from((slot as u32) < hits));
            *rate += weight * (hit - *rate);
        }
    }
}

/// What one sequence knows of its drafts.
#[derive(Clone, Debug, Default)]
pub struct Acceptance {
    rates: Rates,
    kept: Rates,
    decoded_us: f64,
    loss_us: f64,
}

/// One sequence of a step, as the planner sees it.
pub struct Candidate<'a> {
    /// Its history.
    pub acceptance: &'a Acceptance,
    /// Widest allowed, 1 or more.
    pub width_max: u32,
    /// Width asked for; `None` lets the planner choose.
    pub fixed: Option<u32>,
    /// The result.
    pub width: u32,
    /// With it: the least chance that makes a draft worth its row.
    pub chance_min: f32,
}

/// What one more row of a candidate brings on average.
struct Gain {
    tokens: f64,
    rows: f64,
    candidate: usize,
}

impl Costs {
    /// Takes in a step of `step_us`: `rows` verified in all, `draft_rows` planned in sequences that
    /// drafted, for which `draft_us` of the time was needed. Without drafts all of the time is the
    /// price of plain decoding, also what a drafter needs to keep up.
    pub fn measure(&mut self, rows: usize, step_us: f64, draft_rows: usize, draft_us: f64) {
        self.since_plain = if draft_rows > 0 {
            self.since_plain + 1
        } else {
            0
        };
        if draft_rows > 0 {
            self.verify.measure(rows, (step_us - draft_us).max(1.0));
            self.draft.measure(draft_rows, draft_us);
        } else {
            self.verify.measure(rows, step_us);
        }
    }

    fn step_us(&self, rows: f64, draft_rows: usize) -> f64 {
        let draft = if draft_rows > 0 {
            self.draft.estimate(draft_rows)
        } else {
            0.0
        };
        // The floor keeps ratios finite before anything was measured.
        (self.verify.at(rows) + draft).max(1.0)
    }

    /// Takes in what one sequence got from a step of `step_us` with `sequences` sequences: of the
    /// drafts planned for it, some were verified, some of these accepted.
    pub fn learn(
        &mut self,
        acceptance: &mut Acceptance,
        [planned, verified, accepted]: [u32; 3],
        step_us: f64,
        sequences: usize,
    ) {
        acceptance.decoded_us += step_us;
        if planned == 0 {
            return;
        }
        let plain_us = self.step_us(sequences as f64, 0);
        let share = step_us - f64::from(accepted + 1) * plain_us;
        let probe = self.probe_us(sequences, planned + 1, acceptance);
        acceptance.loss_us = (acceptance.loss_us + share).max(-CREDIT_PROBES * probe);
        self.leaves_out |= verified < planned;
        // A draft that was left out was not accepted.
        let judged = planned.min(verified + 1).min(accepted + 1);
        let (prior, kept) = (&self.prior, &self.prior_kept);
        let expected = |slot| prior.get(slot).unwrap_or(PRIOR_RATE);
        acceptance.rates.add(judged, accepted, 1.0 / 16.0, expected);
        let expected = |slot| kept.get(slot).unwrap_or_else(|| prior_kept(slot));
        acceptance.kept.add(planned, verified, 1.0 / 16.0, expected);
        self.prior
            .add(judged, accepted, 1.0 / 256.0, |_| PRIOR_RATE);
        self.prior_kept
            .add(planned, verified, 1.0 / 256.0, prior_kept);
    }

    /// Cost of one sequence's draft that fails, beyond plain decoding.
    fn probe_us(&self, sequences: usize, width: u32, acceptance: &Acceptance) -> f64 {
        let rows = sequences as f64 + self.kept_rows(acceptance, width);
        (self.step_us(rows, width as usize) - self.step_us(sequences as f64, 0)).max(0.0)
    }

    /// Rows that a step of `width` verifies beyond the first, on average.
    fn kept_rows(&self, acceptance: &Acceptance, width: u32) -> f64 {
        (0..width as usize - 1)
            .map(|slot| self.kept(acceptance, slot))
            .sum()
    }

    fn kept(&self, acceptance: &Acceptance, slot: usize) -> f64 {
        let own = acceptance.kept.get(slot);
        own.or(self.prior_kept.get(slot))
            .unwrap_or_else(|| prior_kept(slot))
    }

    /// Sets the width of every candidate.
    pub fn plan(&self, candidates: &mut [Candidate<'_>]) {
        let sequences = candidates.len();
        let (mut rows, mut draft_rows) = (0.0, 0);
        let mut gains = Vec::new();
        let plain_is_possible = candidates.iter().all(|c| c.fixed.is_none_or(|w| w < 2));
        let plain_is_due = plain_is_possible && self.since_plain >= PLAIN_EVERY;
        for (i, candidate) in candidates.iter_mut().enumerate() {
            let limit = candidate.width_max.max(1);
            candidate.width = candidate.fixed.unwrap_or(1).clamp(1, limit);
            candidate.chance_min = 0.0;
            rows += f64::from(candidate.width);
            if candidate.width > 1 {
                draft_rows += candidate.width as usize;
            }
            let free = candidate.fixed.is_none() && limit > 1 && !plain_is_due;
            if free && self.may_draft(candidate, sequences) {
                self.add_gains(i, candidate, &mut gains);
            }
        }
        // Within a sequence the gains fall, so a prefix of this order is a set of widths.
        gains.sort_by(|a, b| b.tokens.total_cmp(&a.tokens));
        let fixed: f64 = candidates.iter().map(|c| self.expected(c)).sum();
        let keep = self.best_prefix(&gains, candidates.len(), fixed, rows, draft_rows);
        for gain in &gains[..keep] {
            candidates[gain.candidate].width += 1;
        }
        if self.leaves_out {
            let drafting = |c: &&mut Candidate<'_>| c.fixed.is_none() && c.width > 1;
            for candidate in candidates.iter_mut().filter(drafting) {
                candidate.width = candidate.width_max;
            }
        }
        if keep == 0 && !plain_is_due {
            self.probe(candidates);
        }
        self.set_chance_min(candidates);
    }

    /// A row is worth its time when its chance to give a token is at least the tokens that the step
    /// as a whole makes in that time.
    fn set_chance_min(&self, candidates: &mut [Candidate<'_>]) {
        let (mut tokens, mut rows, mut most, mut draft_rows) = (0.0, 0.0, 0, 0);
        for candidate in &*candidates {
            tokens += self.expected(candidate);
            rows += 1.0 + self.kept_rows(candidate.acceptance, candidate.width);
            most += candidate.width as usize;
            if candidate.width > 1 {
                draft_rows += candidate.width as usize;
            }
        }
        let sequences = candidates.len();
        if most == sequences {
            return;
        }
        let plain = sequences as f64 / self.step_us(sequences as f64, 0);
        let speed = (tokens / self.step_us(rows, draft_rows)).max(plain);
        let row_us = (self.verify.estimate(most) - self.verify.estimate(sequences))
            / (most - sequences) as f64;
        let least = (row_us * speed).clamp(0.0, CHANCE_MIN_MAX) as f32;
        let free = candidates.iter_mut();
        for candidate in free.filter(|c| c.fixed.is_none() && c.width > 1) {
            candidate.chance_min = least;
        }
    }

    /// How many of `gains` give most tokens a microsecond.
    fn best_prefix(
        &self,
        gains: &[Gain],
        sequences: usize,
        mut tokens: f64,
        mut rows: f64,
        mut draft_rows: usize,
    ) -> usize {
        let mut drafting = vec![false; sequences];
        let plain = tokens / self.step_us(rows, draft_rows);
        let (mut best, mut keep) = (plain * MARGIN, 0);
        for (n, gain) in gains.iter().enumerate() {
            draft_rows += if drafting[gain.candidate] { 1 } else { 2 };
            drafting[gain.candidate] = true;
            rows += gain.rows;
            tokens += gain.tokens;
            let speed = tokens / self.step_us(rows, draft_rows);
            if speed > best {
                (best, keep) = (speed, n + 1);
            }
        }
        keep
    }

    /// Expected tokens at the candidate's width.
    fn expected(&self, candidate: &Candidate<'_>) -> f64 {
        let (mut sum, mut reach) = (1.0, 1.0);
        for slot in 0..candidate.width as usize - 1 {
            reach *= self.rate(candidate.acceptance, slot);
            sum += reach;
        }
        sum
    }

    fn rate(&self, acceptance: &Acceptance, slot: usize) -> f64 {
        let own = acceptance.rates.get(slot);
        own.or(self.prior.get(slot)).unwrap_or(PRIOR_RATE)
    }

    fn add_gains(&self, i: usize, candidate: &Candidate<'_>, gains: &mut Vec<Gain>) {
        let mut reach = 1.0;
        for slot in 0..candidate.width_max as usize - 1 {
            reach *= self.rate(candidate.acceptance, slot);
            gains.push(Gain {
                tokens: reach,
                rows: self.kept(candidate.acceptance, slot),
                candidate: i,
            });
        }
    }

    /// The cost of plain decoding is known, and the ledger has room for a failed draft.
    fn may_draft(&self, candidate: &Candidate<'_>, sequences: usize) -> bool {
        if !self.verify.reaches(sequences) {
            return false;
        }
        let acceptance = candidate.acceptance;
        let probe = self.probe_us(sequences, candidate.width_max, acceptance);
        let limit = LOSS_SHARE_MAX * acceptance.decoded_us + GRANT_PROBES * probe;
        acceptance.loss_us <= limit
    }

    /// Nobody drafts: lets the sequence that has waited longest relative to the cost try once, if
    /// its ledger allows it without the grant.
    fn probe(&self, candidates: &mut [Candidate<'_>]) {
        let sequences = candidates.len();
        let room = |candidate: &Candidate<'_>| {
            let acceptance = candidate.acceptance;
            let probe = self.probe_us(sequences, candidate.width_max, acceptance);
            LOSS_SHARE_MAX * acceptance.decoded_us - acceptance.loss_us.max(0.0) - probe
        };
        let free = candidates.iter_mut();
        let free = free.filter(|c| c.fixed.is_none() && c.width_max > 1 && room(c) > 0.0);
        if let Some(candidate) = free.max_by(|a, b| room(a).total_cmp(&room(b))) {
            candidate.width = candidate.width_max;
        }
    }
}

fn prior_kept(slot: usize) -> f64 {
    PRIOR_KEPT.powi(slot as i32 + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::random::{Purpose, uniform};

    /// Decodes `goal` tokens with the given acceptance and step costs; returns the time over that
    /// of plain decoding.
    fn relative_time_of(
        goal: usize,
        rate: impl Fn(usize) -> f64,
        cost: impl Fn(u32) -> f64,
        costs: &mut Costs,
    ) -> f64 {
        let mut acceptance = Acceptance::default();
        let (mut tokens, mut us, mut draw) = (0, 0.0, 0);
        while tokens < goal {
            let mut candidates = [Candidate {
                acceptance: &acceptance,
                width_max: 8,
                fixed: None,
                width: 0,
                chance_min: 0.0,
            }];
            costs.plan(&mut candidates);
            let width = candidates[0].width;
            draw += 8;
            let hit = |slot: &u32| uniform(1, draw + slot, Purpose::Accept) < rate(tokens);
            let accepted = (0..width - 1).take_while(hit).count() as u32;
            let noise = 0.97 + 0.06 * uniform(2, draw, Purpose::Accept);
            let draft_rows = if width > 1 { width as usize } else { 0 };
            let (verify, draft) = (
                cost(width) * noise,
                cost(1) * 0.2 * f64::from(draft_rows.min(1) as u32),
            );
            costs.measure(width as usize, verify + draft, draft_rows, draft);
            costs.learn(
                &mut acceptance,
                [width - 1, width - 1, accepted],
                verify + draft,
                1,
            );
            us += verify + draft;
            tokens += accepted as usize + 1;
        }
        us / (tokens as f64 * cost(1))
    }

    fn relative_time(
        rate: impl Fn(usize) -> f64,
        cost: impl Fn(u32) -> f64,
        costs: &mut Costs,
    ) -> f64 {
        relative_time_of(2000, rate, cost, costs)
    }

    /// Calibrated, as an engine is when it starts.
    fn calibrated(cost: impl Fn(u32) -> f64) -> Costs {
        let mut costs = Costs::default();
        for width in [1, 2, 4, 8] {
            let draft_rows = if width > 1 { width as usize } else { 0 };
            let draft = if draft_rows > 0 { 0.2 * cost(1) } else { 0.0 };
            costs.measure(width as usize, cost(width) + draft, draft_rows, draft);
        }
        costs
    }

    #[test]
    fn short_answers_do_not_pay_for_learning() {
        for per_row in [0.05, 0.2, 0.5] {
            let cost = |w: u32| 1000.0 * (1.0 + per_row * f64::from(w - 1));
            let mut costs = calibrated(cost);
            let times = (0..30).map(|_| relative_time_of(100, |_| 0.05, cost, &mut costs));
            let mean = times.sum::<f64>() / 30.0;
            assert!(mean < 1.03, "{per_row}: {mean}");
        }
    }

    #[test]
    fn useless_drafts_cost_less_than_three_percent() {
        for per_row in [0.02, 0.15, 0.5, 1.0] {
            let mut costs = Costs::default();
            for request in 0..3 {
                let time = relative_time(
                    |_| 0.0,
                    |w| 1000.0 * (1.0 + per_row * f64::from(w - 1)),
                    &mut costs,
                );
                assert!(time < 1.03, "{per_row} request {request}: {time}");
            }
        }
    }

    #[test]
    fn a_wrong_price_of_plain_decoding_is_noticed() {
        let cost = |w: u32| 1000.0 * (1.0 + 0.4 * f64::from(w - 1));
        let mut costs = calibrated(cost);
        costs.verify.points[1] = Some(2500.0); // another process ran during calibration
        let time = relative_time(|_| 0.3, cost, &mut costs);
        assert!(time < 1.05, "{time}");
    }

    #[test]
    fn good_drafts_are_used_to_the_full() {
        let time = relative_time(
            |_| 0.97,
            |w| 1000.0 + 20.0 * f64::from(w - 1),
            &mut Costs::default(),
        );
        assert!(time < 0.23, "{time}"); // ideal: (1.14 + 0.2) / 7.1 tokens
    }

    #[test]
    fn any_acceptance_and_cost_is_never_much_slower_than_plain() {
        for rate in [0.1, 0.2, 0.3, 0.5, 0.7] {
            for per_row in [0.05, 0.2, 0.4, 0.8] {
                let cost = |w: u32| 500.0 * (1.0 + per_row * f64::from(w - 1));
                let time = relative_time(|_| rate, cost, &mut Costs::default());
                assert!(time < 1.03, "rate {rate}, cost of a row {per_row}: {time}");
            }
        }
    }

    #[test]
    fn a_text_that_becomes_predictable_is_noticed() {
        let rate = |token: usize| if token < 600 { 0.0 } else { 0.95 };
        let time = relative_time(
            rate,
            |w| 1000.0 + 30.0 * f64::from(w - 1),
            &mut Costs::default(),
        );
        assert!(time < 0.62, "{time}");
    }

    #[test]
    fn a_batch_gives_rows_to_those_who_use_them() {
        let mut costs = Costs::default();
        for rows in [2, 4, 8, 16] {
            costs.measure(rows, 1100.0 + 100.0 * rows as f64, rows, 100.0);
        }
        let (mut good, mut bad) = (Acceptance::default(), Acceptance::default());
        for _ in 0..40 {
            costs.learn(&mut good, [7, 7, 7], 1500.0, 2);
            costs.learn(&mut bad, [7, 7, 0], 1500.0, 2);
        }
        let of = |acceptance| Candidate {
            acceptance,
            width_max: 8,
            fixed: None,
            width: 0,
            chance_min: 0.0,
        };
        let mut candidates = [of(&good), of(&bad)];
        costs.plan(&mut candidates);
        assert_eq!((candidates[0].width, candidates[1].width), (8, 1));
    }

    #[test]
    fn curves_interpolate() {
        let mut curve = Curve::default();
        assert_eq!(curve.estimate(3), 0.0);
        curve.measure(1, 100.0);
        assert_eq!(curve.estimate(8), 100.0);
        curve.measure(5, 140.0);
        assert_eq!(curve.estimate(3), 120.0);
        assert_eq!(curve.estimate(9), 180.0);
    }
}
