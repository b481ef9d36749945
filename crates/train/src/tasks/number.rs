//! GSM8K: the number of an answer against the number expected.

use serde_json::Value;

/// Right when the number after the last `####`, or else the last number of the text, is the expected one.
pub fn check(item: &Value, text: &str) -> Result<(), String> {
    let expected = item["answer"].as_str().unwrap_or_default();
    let wanted = last(expected).ok_or_else(|| format!("item without a number: `{expected}`"))?;
    let part = text.rsplit_once("####").map_or(text, |(_, after)| after);
    let line = part.trim_start().lines().next().unwrap_or_default();
    let found = if part.len() < text.len() {
        first(line)
    } else {
        last(text)
    };
    match found {
        Some(found) if (found - wanted).abs() < 1e-6 => Ok(()),
        Some(found) => Err(format!("expected {wanted}, found {found}")),
        None => Err(format!("expected {wanted}, found no number")),
    }
}

fn numbers(text: &str) -> Vec<f64> {
    let mut out = Vec::new();
    let bytes = text.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        if !bytes[at].is_ascii_digit() {
            at += 1;
            continue;
        }
        let minus =
            at > 0 && bytes[at - 1] == b'-' && (at < 2 || !bytes[at - 2].is_ascii_alphanumeric());
        let start = at;
        while at < bytes.len() && (bytes[at].is_ascii_digit() || inside(bytes, at)) {
            at += 1;
        }
        let plain = text[start..at].replace(',', "");
        if let Ok(value) = plain.parse::<f64>() {
            out.push(if minus { -value } else { value });
        }
    }
    out
}

/// A comma before three digits, or a point before a digit.
fn inside(bytes: &[u8], at: usize) -> bool {
    let digit = |i: usize| bytes.get(i).is_some_and(u8::is_ascii_digit);
    match bytes[at] {
        b',' => digit(at + 1) && digit(at + 2) && digit(at + 3) && !digit(at + 4),
        b'.' => digit(at + 1),
        _ => false,
    }
}

fn first(text: &str) -> Option<f64> {
    numbers(text).first().copied()
}

fn last(text: &str) -> Option<f64> {
    numbers(text).last().copied()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn finds_the_number_that_counts() {
        let item = json!({"answer": "1200"});
        for right in [
            "So 3 x 400.\n#### 1,200",
            "#### $1200.00 (12 boxes)",
            "It is 1200.",
            "#### 7\nno:\n#### 1200",
        ] {
            assert_eq!(check(&item, right), Ok(()), "{right}");
        }
        for wrong in [
            "#### 120",
            "1200 and then 5",
            "none",
            "#### -1200",
            "####\n",
        ] {
            assert!(check(&item, wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn signs_points_and_lists() {
        assert_eq!(
            numbers("-3, 2.5; 10-4; 1,2"),
            [-3.0, 2.5, 10.0, 4.0, 1.0, 2.0]
        );
        assert_eq!(numbers("1,234,567.5"), [1_234_567.5]);
    }
}
