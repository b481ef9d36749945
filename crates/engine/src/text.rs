//! Bytes of tokens to text that may be shown: whole UTF-8 characters, and never any part of a stop
//! string.
//!
//! Owns what is held back. Invariant: the text that comes out, and whether it stops, do not depend
//! on how the bytes were cut into tokens and steps. The stop string that is complete first ends the
//! text; of several complete at the same character the one that begins first.

/// Incremental decoder of one answer.
#[derive(Debug, Default)]
pub struct TextStream {
    /// Start of a character whose rest has not come.
    pending: Vec<u8>,
    /// Text that may be the start of a stop string.
    held: String,
    stops: Vec<String>,
    include_stop: bool,
}

impl TextStream {
    /// Ends at any of `stops`, none of them empty; emits it when `include_stop`.
    #[must_use]
    pub fn new(stops: Vec<String>, include_stop: bool) -> Self {
        Self {
            stops,
            include_stop,
            ..Self::default()
        }
    }

    /// Takes the bytes of a token and appends to `out` what is certain. With `watch` off, stop
    /// strings are text like any other. Returns the index of the stop string that ended the text;
    /// nothing may be pushed after that.
    pub fn push(&mut self, bytes: &[u8], watch: bool, out: &mut String) -> Option<usize> {
        self.pending.extend_from_slice(bytes);
        self.decode();
        if !watch || self.stops.is_empty() {
            out.push_str(&self.held);
            self.held.clear();
            return None;
        }
        if let Some((stop, start, end)) = self.find() {
            let shown = if self.include_stop { end } else { start };
            out.push_str(&self.held[..shown]);
            self.held.clear();
            self.pending.clear();
            return Some(stop);
        }
        let certain = self.held.len() - self.partial();
        out.push_str(&self.held[..certain]);
        self.held.drain(..certain);
        None
    }

    /// The text ended for another reason: what was held back comes out, an unfinished character as
    /// U+FFFD.
    pub fn finish(&mut self, out: &mut String) {
        if !self.pending.is_empty() {
            self.held.push(char::REPLACEMENT_CHARACTER);
            self.pending.clear();
        }
        out.push_str(&self.held);
        self.held.clear();
    }

    /// Moves whole characters from `pending` to `held`; what can never become one turns into
    /// U+FFFD, as in `String::from_utf8_lossy`.
    fn decode(&mut self) {
        let mut rest = self.pending.as_slice();
        loop {
            let error = match std::str::from_utf8(rest) {
                Ok(text) => {
                    self.held.push_str(text);
                    rest = &[];
                    break;
                }
                Err(error) => error,
            };
            let (valid, after) = rest.split_at(error.valid_up_to());
            self.held.push_str(&String::from_utf8_lossy(valid));
            rest = after;
            let Some(bad) = error.error_len() else { break };
            self.held.push(char::REPLACEMENT_CHARACTER);
            rest = &rest[bad..];
        }
        let done = self.pending.len() - rest.len();
        self.pending.drain(..done);
    }

    /// `(stop, start, end)` of the match in `held` that ends first.
    fn find(&self) -> Option<(usize, usize, usize)> {
        let matches = self.stops.iter().enumerate().filter_map(|(i, stop)| {
            let start = self.held.find(stop.as_str())?;
            Some((i, start, start + stop.len()))
        });
        matches.min_by_key(|(_, start, end)| (*end, *start))
    }

    /// Bytes of the longest end of `held` that is the start of a stop string.
    fn partial(&self) -> usize {
        let longest = |stop: &String| {
            let starts = stop.char_indices().map(|(i, _)| i).skip(1);
            starts.filter(|i| self.held.ends_with(&stop[..*i])).max()
        };
        self.stops.iter().filter_map(longest).max().unwrap_or(0)
    }
}
