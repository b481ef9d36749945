//! The accept rule, one row at a time: distributions and uniforms in, a token out.
//!
//! Owns the definition that every backend's verification is tested against. Exact: whatever the
//! drafter proposes, the tokens have the target's distribution (Leviathan et al., 2023).
//!
//! One-hot q (greedy drafts): the target's token is drawn as without a drafter, and the draft is
//! accepted when it is that token. Probability of acceptance and distribution after a rejection are
//! those of rejection sampling with one-hot q, and the text is the same at every draft width.

use super::sample::Distribution;
use crate::TokenId;
use crate::random::Purpose;

/// What a row decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The token that comes next.
    pub token: TokenId,
    /// It is the drafted one, accepted.
    pub accepted: bool,
}

/// Greedy: length of the longest prefix of `drafted` that equals `best`, the target's argmax of the
/// rows, of which there is at least one more.
#[must_use]
pub fn greedy(best: &[TokenId], drafted: &[TokenId]) -> usize {
    best.iter().zip(drafted).take_while(|(a, b)| a == b).count()
}

/// One row with the target's distribution `p`, the drafted token (none on the last row) and the
/// distribution `q` it was drawn from (none when it was the drafter's best). `uniform` gives a number
/// in `[0, 1)` for each purpose: a draw from the target, the acceptance, a draw from the residual.
#[must_use]
pub fn row(
    p: &Distribution,
    drafted: Option<TokenId>,
    q: Option<&Distribution>,
    uniform: impl Fn(Purpose) -> f64,
) -> Choice {
    let (Some(draft), Some(q)) = (drafted, q) else {
        let token = p.draw(uniform(Purpose::Target));
        return Choice {
            token,
            accepted: drafted == Some(token),
        };
    };
    if uniform(Purpose::Accept) * q.probability(draft) < p.probability(draft) {
        return Choice {
            token: draft,
            accepted: true,
        };
    }
    Choice {
        token: p.draw_residual(q, uniform(Purpose::Residual)),
        accepted: false,
    }
}
