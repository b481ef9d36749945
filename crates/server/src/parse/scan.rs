//! Finding markers in text that comes in pieces.

/// What is at the front of a buffer.
pub(super) enum Found {
    /// `text` comes before marker `which`, both taken out.
    Marker {
        /// Before the marker.
        text: String,
        /// Index of the marker.
        which: usize,
    },
    /// No marker; `text` was taken out, an unfinished marker may remain.
    Text(String),
}

/// Takes text from the front of `buffer` up to the first of `markers`.
pub(super) fn until(buffer: &mut String, markers: &[&str]) -> Found {
    let hits = markers.iter().enumerate();
    let hit = hits.filter_map(|(i, m)| Some((buffer.find(m)?, i))).min();
    if let Some((at, which)) = hit {
        let rest = buffer.split_off(at + markers[which].len());
        let mut text = std::mem::replace(buffer, rest);
        text.truncate(at);
        return Found::Marker { text, which };
    }
    let keep = markers.iter().map(|m| partial(buffer, m)).max();
    let rest = buffer.split_off(buffer.len() - keep.unwrap_or(0));
    Found::Text(std::mem::replace(buffer, rest))
}

/// Bytes of the longest end of `text` that is a true start of `marker`.
fn partial(text: &str, marker: &str) -> usize {
    let starts = marker.char_indices().map(|(i, _)| i).skip(1);
    let fits = starts.filter(|i| text.ends_with(&marker[..*i]));
    fits.max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unfinished_marker_stays() {
        let mut buffer = "abc<to".to_owned();
        assert!(matches!(until(&mut buffer, &["<tool>"]), Found::Text(t) if t == "abc"));
        assert_eq!(buffer, "<to");
        buffer.push_str("ol>d");
        let found = until(&mut buffer, &["<x>", "<tool>"]);
        assert!(matches!(found, Found::Marker { text, which: 1 } if text.is_empty()));
        assert_eq!(buffer, "d");
    }
}
