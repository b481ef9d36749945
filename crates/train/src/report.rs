//! What a run tells: a progress line with tokens/s and time left, metrics as JSON lines, curves as SVG.

use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::path::Path;
use std::time::Instant;

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;

use crate::error::{Error, Result, io};
use crate::files;

/// The reporter of one phase.
#[derive(Debug)]
pub struct Report {
    bar: ProgressBar,
    log: File,
    path: std::path::PathBuf,
    start: Instant,
    tokens: u64,
}

impl Report {
    /// Appends to `path` (JSON lines).
    pub fn open(path: &Path, steps: u64, done: u64) -> Result<Self> {
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(io(parent))?;
        }
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .map_err(io(path))?;
        let bar = ProgressBar::new(steps).with_position(done);
        if let Ok(style) = ProgressStyle::with_template("{pos}/{len} {wide_bar} {eta} {msg}") {
            bar.set_style(style);
        }
        Ok(Self {
            bar,
            log,
            path: path.to_owned(),
            start: Instant::now(),
            tokens: 0,
        })
    }

    /// Counts a step.
    pub fn step(&mut self, tokens: u64, loss: f64) {
        self.tokens += tokens;
        let rate = self.tokens as f64 / self.start.elapsed().as_secs_f64();
        self.bar
            .set_message(format!("{rate:.0} tok/s loss {loss:.4}"));
        self.bar.inc(1);
    }

    /// Tokens a second since the start.
    #[must_use]
    pub fn rate(&self) -> f64 {
        self.tokens as f64 / self.start.elapsed().as_secs_f64()
    }

    /// Writes one line of metrics.
    pub fn line(&mut self, mut value: Value) -> Result<()> {
        value["seconds"] = (self.start.elapsed().as_secs_f64() * 10.0).round().into();
        value["seconds"] = (value["seconds"].as_f64().unwrap_or(0.0) / 10.0).into();
        value["tokens_per_s"] = self.rate().round().into();
        writeln!(self.log, "{value}").map_err(io(&self.path))?;
        if self.bar.is_hidden() {
            println!("{value}");
        }
        Ok(())
    }

    /// Draws the curves of the log beside it.
    pub fn finish(self) -> Result<()> {
        self.bar.finish();
        plot(&self.path)
    }
}

/// Draws every number of the JSON lines in `log` over `step` into `log` with the ending `.svg`.
pub fn plot(log: &Path) -> Result<()> {
    let text = String::from_utf8(files::read(log)?).map_err(|e| Error::Invalid(e.to_string()))?;
    let lines: Vec<Value> = text
        .lines()
        .filter_map(|l| serde_json::from_str(l).ok())
        .collect();
    let mut series: std::collections::BTreeMap<String, Vec<(f64, f64)>> = Default::default();
    for line in &lines {
        let Some(step) = line["step"].as_f64() else {
            continue;
        };
        for (key, value) in line.as_object().into_iter().flatten() {
            if key != "step" && key != "seconds" {
                numbers(key, value, &mut |key, y| {
                    series.entry(key).or_default().push((step, y))
                });
            }
        }
    }
    files::write(&log.with_extension("svg"), draw(&series).as_bytes())
}

fn numbers(key: &str, value: &Value, each: &mut impl FnMut(String, f64)) {
    match value {
        Value::Object(map) => map
            .iter()
            .for_each(|(k, v)| numbers(&format!("{key}.{k}"), v, each)),
        _ => {
            if let Some(y) = value.as_f64().filter(|y| y.is_finite()) {
                each(key.to_owned(), y);
            }
        }
    }
}

const WIDTH: f64 = 360.0;
const HEIGHT: f64 = 140.0;

fn draw(series: &std::collections::BTreeMap<String, Vec<(f64, f64)>>) -> String {
    let rows = series.len().div_ceil(3).max(1);
    let (w, h) = (WIDTH * 3.0, (HEIGHT + 30.0) * rows as f64);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{w}\" height=\"{h}\" font-family=\"sans-serif\" font-size=\"11\">\n<rect width=\"{w}\" height=\"{h}\" fill=\"white\"/>\n"
    );
    for (i, (name, points)) in series.iter().enumerate() {
        let (x0, y0) = (
            (i % 3) as f64 * WIDTH + 10.0,
            (i / 3) as f64 * (HEIGHT + 30.0) + 20.0,
        );
        let range = |f: fn(&(f64, f64)) -> f64| {
            let low = points.iter().map(f).fold(f64::MAX, f64::min);
            let high = points.iter().map(f).fold(f64::MIN, f64::max);
            (low, (high - low).max(1e-12))
        };
        let ((sx, wx), (sy, wy)) = (range(|p| p.0), range(|p| p.1));
        let path: Vec<String> = points
            .iter()
            .map(|(x, y)| {
                let px = x0 + (x - sx) / wx * (WIDTH - 30.0);
                let py = y0 + HEIGHT - (y - sy) / wy * HEIGHT;
                format!("{px:.1},{py:.1}")
            })
            .collect();
        let last = points.last().map_or(0.0, |p| p.1);
        let _ = writeln!(
            out,
            "<text x=\"{x0}\" y=\"{}\">{name}: {:.4} to {:.4}, last {last:.4}</text>\n<polyline fill=\"none\" stroke=\"#1f6f8b\" points=\"{}\"/>",
            y0 - 6.0,
            sy,
            sy + wy,
            path.join(" ")
        );
    }
    out + "</svg>\n"
}
