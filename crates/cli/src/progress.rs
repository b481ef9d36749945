//! Progress of work that takes over a second: a bar on a terminal, plain lines otherwise.
//!
//! `NO_COLOR` is honoured: a bar has no colour at all.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Shorter work shows nothing.
const QUIET: Duration = Duration::from_secs(1);
/// Time between plain lines.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Work with a known amount.
pub(crate) struct Progress {
    what: String,
    total: u64,
    began: Instant,
    last_line: Instant,
    bar: Option<ProgressBar>,
}

impl Progress {
    /// Begins work of `total` units; nothing is shown yet.
    pub(crate) fn new(what: &str, total: u64) -> Self {
        let now = Instant::now();
        Self {
            what: what.to_owned(),
            total,
            began: now,
            last_line: now,
            bar: None,
        }
    }

    /// Shows that `done` units are done.
    pub(crate) fn set(&mut self, done: u64) {
        if self.began.elapsed() < QUIET {
            return;
        }
        if std::io::stderr().is_terminal() {
            self.bar().set_position(done);
        } else if self.last_line.elapsed() >= LINE_EVERY {
            self.last_line = Instant::now();
            let percent = done * 100 / self.total.max(1);
            eprintln!(
                "{}: {percent} % after {:.0} s",
                self.what,
                self.began.elapsed().as_secs_f64()
            );
        }
    }

    fn bar(&mut self) -> &ProgressBar {
        let (what, total) = (&self.what, self.total);
        self.bar.get_or_insert_with(|| {
            let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
            if let Ok(style) = ProgressStyle::with_template("{msg} [{bar:30}] {percent} % {eta}") {
                bar.set_style(style.progress_chars("=> "));
            }
            bar.with_message(what.clone())
        })
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
