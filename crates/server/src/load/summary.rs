//! Requests of one load to its figures.
//!
//! Definitions: TTFT is from sending to the first text; TPOT is the time after the first text over the
//! tokens after it, one figure a request, and tokens/s a user its inverse; ICL is the gap between two
//! chunks with text; ITL is that gap over the tokens the later chunk brought, once for each of them.

use std::time::Duration;

use super::request::Sample;

/// Mean and quantiles of a figure.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Spread {
    /// Arithmetic mean.
    pub mean: f64,
    /// Median.
    pub p50: f64,
    /// 90 of 100 are at most this.
    pub p90: f64,
    /// 99 of 100 are at most this.
    pub p99: f64,
    /// The least.
    pub min: f64,
}

impl Spread {
    /// `None` of nothing.
    #[must_use]
    pub fn of(mut values: Vec<f64>) -> Option<Self> {
        if values.is_empty() {
            return None;
        }
        values.sort_by(f64::total_cmp);
        // The least value that has the wanted share at or below it.
        let at = |share: f64| values[((values.len() as f64 * share).ceil() as usize).max(1) - 1];
        Some(Self {
            mean: values.iter().sum::<f64>() / values.len() as f64,
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            min: values[0],
        })
    }
}

/// What one load came to.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// Requests that went through.
    pub completed: usize,
    /// Requests refused with 429.
    pub refused: usize,
    /// Requests that failed otherwise.
    pub failed: usize,
    /// What the first failure said.
    pub first_failure: Option<String>,
    /// From the first request's start to the last one's end, seconds.
    pub wall_s: f64,
    /// Tokens of prompts, all requests together.
    pub prompt_tokens: u64,
    /// Tokens generated, all requests together.
    pub tokens: u64,
    /// Time to first token, milliseconds.
    pub ttft_ms: Option<Spread>,
    /// Time per output token, milliseconds.
    pub tpot_ms: Option<Spread>,
    /// Between tokens, milliseconds; `None` when the server does not say what a chunk holds.
    pub itl_ms: Option<Spread>,
    /// Between chunks, milliseconds.
    pub icl_ms: Option<Spread>,
    /// From sending to the end, milliseconds.
    pub e2e_ms: Option<Spread>,
    /// Tokens a second that one user sees.
    pub user_tokens_per_s: Option<Spread>,
    /// Tokens a step, the bonus token included; `None` without a statistics block.
    pub acceptance_length: Option<f64>,
    /// The server says that its acceptance is simulated.
    pub simulated: bool,
}

impl Summary {
    /// Tokens a second over all users.
    #[must_use]
    pub fn tokens_per_s(&self) -> f64 {
        if self.wall_s > 0.0 {
            self.tokens as f64 / self.wall_s
        } else {
            0.0
        }
    }

    pub(super) fn of(samples: &[Sample], wall: Duration) -> Self {
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        let tpot: Vec<f64> = samples.iter().filter_map(tpot_ms).collect();
        let (mut itl, mut icl) = (Vec::new(), Vec::new());
        samples
            .iter()
            .for_each(|sample| gaps(sample, &mut itl, &mut icl));
        let drafting: Vec<(u64, u64)> = samples.iter().filter_map(|s| s.drafting).collect();
        let steps: u64 = drafting.iter().map(|(steps, _)| steps).sum();
        let accepted: u64 = drafting.iter().map(|(_, accepted)| accepted).sum();
        Self {
            completed: samples.len(),
            wall_s: wall.as_secs_f64(),
            prompt_tokens: samples.iter().map(|s| u64::from(s.prompt_tokens)).sum(),
            tokens: samples.iter().map(|s| u64::from(s.tokens)).sum(),
            ttft_ms: Spread::of(samples.iter().map(|s| ms(s.first)).collect()),
            user_tokens_per_s: Spread::of(tpot.iter().map(|each| 1e3 / each).collect()),
            tpot_ms: Spread::of(tpot),
            itl_ms: Spread::of(itl),
            icl_ms: Spread::of(icl),
            e2e_ms: Spread::of(samples.iter().map(|s| ms(s.whole)).collect()),
            acceptance_length: (steps > 0).then(|| 1.0 + accepted as f64 / steps as f64),
            simulated: samples.iter().any(|s| s.simulated),
            ..Self::default()
        }
    }
}

/// `None` when all came at once.
fn tpot_ms(sample: &Sample) -> Option<f64> {
    let (first, in_first) = sample.chunks.first()?;
    let (last, _) = sample.chunks.last()?;
    let after = sample.tokens.checked_sub(in_first.unwrap_or(1))?;
    let time = last.checked_sub(*first)?.as_secs_f64() * 1e3;
    (after > 0 && time > 0.0).then(|| time / f64::from(after))
}

fn gaps(sample: &Sample, itl: &mut Vec<f64>, icl: &mut Vec<f64>) {
    for pair in sample.chunks.windows(2) {
        let ((before, had), (now, have)) = (pair[0], pair[1]);
        let gap = (now - before).as_secs_f64() * 1e3;
        icl.push(gap);
        if let (Some(had), Some(have)) = (had, have) {
            let count = have.saturating_sub(had);
            itl.extend((0..count).map(|_| gap / f64::from(count)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_of_a_known_stream() {
        let at = Duration::from_millis;
        let sample = Sample {
            first: at(10),
            whole: at(31),
            chunks: vec![(at(10), Some(2)), (at(20), Some(6)), (at(30), Some(7))],
            tokens: 7,
            drafting: Some((3, 4)),
            ..Sample::default()
        };
        let summary = Summary::of(&[sample], at(100));
        assert_eq!(summary.tpot_ms.unwrap().mean, 4.0);
        assert_eq!(summary.user_tokens_per_s.unwrap().p50, 250.0);
        assert_eq!(summary.icl_ms.unwrap().mean, 10.0);
        // Four tokens of 2.5 ms and one of 10 ms.
        assert_eq!(summary.itl_ms.unwrap().mean, 4.0);
        assert_eq!(summary.itl_ms.unwrap().p50, 2.5);
        assert_eq!(summary.acceptance_length, Some(1.0 + 4.0 / 3.0));
        assert_eq!(summary.tokens_per_s(), 70.0);
    }

    #[test]
    fn quantiles_are_values_that_were_seen() {
        let spread = Spread::of((1..=100).map(f64::from).collect()).unwrap();
        assert_eq!(
            (spread.p50, spread.p90, spread.p99, spread.min),
            (50.0, 90.0, 99.0, 1.0)
        );
        assert_eq!(Spread::of(Vec::new()), None);
    }
}
