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

type Series = std::collections::BTreeMap<String, Vec<(f64, f64)>>;

/// A panel's cell in px, and what of it the labels take.
const CELL: (f64, f64) = (360.0, 190.0);
const MARGIN: (f64, f64, f64, f64) = (64.0, 24.0, 16.0, 26.0); // left, top, right, bottom
/// From this ratio of largest to smallest on, a positive series is drawn on a logarithmic axis.
const LOGARITHMIC: f64 = 20.0;

fn draw(series: &Series) -> String {
    let (w, h) = (
        CELL.0 * 3.0,
        CELL.1 * series.len().div_ceil(3).max(1) as f64,
    );
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{w}\" height=\"{h}\" font-family=\"sans-serif\" font-size=\"11\">\n<rect width=\"{w}\" height=\"{h}\" fill=\"white\"/>\n"
    );
    for (i, (name, points)) in series.iter().enumerate() {
        let corner = ((i % 3) as f64 * CELL.0, (i / 3) as f64 * CELL.1);
        panel(&mut out, corner, name, points);
    }
    out + "</svg>\n"
}

/// One series with its frame, four values on the left and the steps below.
fn panel(out: &mut String, corner: (f64, f64), name: &str, points: &[(f64, f64)]) {
    let (x0, y0) = (corner.0 + MARGIN.0, corner.1 + MARGIN.1);
    let (w, h) = (CELL.0 - MARGIN.0 - MARGIN.2, CELL.1 - MARGIN.1 - MARGIN.3);
    let (low, high) = range(points.iter().map(|p| p.1));
    let logarithmic = low > 0.0 && high > low * LOGARITHMIC;
    let scale = |y: f64| if logarithmic { y.ln() } else { y };
    let back = |y: f64| if logarithmic { y.exp() } else { y };
    let ((sx, ex), (sy, ey)) = (range(points.iter().map(|p| p.0)), (scale(low), scale(high)));
    let px = |x: f64| x0 + (x - sx) / (ex - sx).max(1e-12) * w;
    let py = |y: f64| y0 + h - (y - sy) / (ey - sy).max(1e-12) * h;
    let last = points.last().map_or(0.0, |p| p.1);
    let axis = if logarithmic { ", logarithmic" } else { "" };
    let _ = writeln!(
        out,
        "<text x=\"{x0}\" y=\"{}\" font-weight=\"bold\">{name}</text><text x=\"{}\" y=\"{}\" text-anchor=\"end\">last {}{axis}</text>\n<rect x=\"{x0}\" y=\"{y0}\" width=\"{w}\" height=\"{h}\" fill=\"none\" stroke=\"#bbb\"/>",
        y0 - 7.0,
        x0 + w,
        y0 - 7.0,
        number(last)
    );
    for part in 0..4 {
        let y = sy + (ey - sy) * f64::from(part) / 3.0;
        let at = py(y);
        let _ = writeln!(
            out,
            "<line x1=\"{x0}\" x2=\"{}\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"#eee\"/><text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\" fill=\"#666\">{}</text>",
            x0 + w,
            x0 - 5.0,
            at + 4.0,
            number(back(y))
        );
    }
    for (x, anchor) in [(sx, "start"), (ex, "end")] {
        let _ = writeln!(
            out,
            "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"{anchor}\" fill=\"#666\">step {x}</text>",
            px(x),
            y0 + h + 14.0
        );
    }
    let path: Vec<String> = points
        .iter()
        .map(|(x, y)| format!("{:.1},{:.1}", px(*x), py(scale(*y))))
        .collect();
    let _ = writeln!(
        out,
        "<polyline fill=\"none\" stroke=\"#1f6f8b\" points=\"{}\"/>",
        path.join(" ")
    );
}

fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    values.fold((f64::MAX, f64::MIN), |(low, high), v| {
        (low.min(v), high.max(v))
    })
}

/// Four digits that count.
fn number(value: f64) -> String {
    match value.abs() {
        v if v >= 1e4 => format!("{:.0}k", value / 1e3),
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}
