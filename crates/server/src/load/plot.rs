//! Figures over loads as one SVG: tokens/s a user, time to first token, tokens/s in all.
//!
//! Invariants: every axis starts at 0; loads stand at equal distances, because they usually double;
//! lines differ by dash as well as by colour; text that came from outside is escaped.

use std::fmt::Write;

use super::{Arrival, Level, Summary};

/// A panel's place for lines, pixels.
const WIDTH: f64 = 300.0;
const HEIGHT: f64 = 200.0;
const LEFT: f64 = 58.0;
const TOP: f64 = 64.0;
/// From one panel's left edge to the next one's.
const PITCH: f64 = WIDTH + LEFT + 24.0;

/// Colour and dashes of a panel's first and second line.
const STROKES: [&str; 2] = [
    "stroke=\"#1b6ca8\"",
    "stroke=\"#b5521b\" stroke-dasharray=\"6 3\"",
];

/// One line: its name, and a value for each load that has one.
struct Line {
    name: &'static str,
    values: Vec<Option<f64>>,
}

/// Draws `levels`; `title` says what was measured.
#[must_use]
pub fn plot(title: &str, levels: &[Level]) -> String {
    let line = |name, value: fn(&Summary) -> Option<f64>| Line {
        name,
        values: levels.iter().map(|level| value(&level.summary)).collect(),
    };
    let panels = [
        (
            "tokens/s a user",
            vec![
                line("median", |s| s.user_tokens_per_s.map(|x| x.p50)),
                line("slowest", |s| s.user_tokens_per_s.map(|x| x.min)),
            ],
        ),
        (
            "time to first token, ms",
            vec![
                line("median", |s| s.ttft_ms.map(|x| x.p50)),
                line("p99", |s| s.ttft_ms.map(|x| x.p99)),
            ],
        ),
        (
            "tokens/s, all users",
            vec![line("sum", |s| Some(s.tokens_per_s()))],
        ),
    ];
    let (width, height) = (PITCH * panels.len() as f64, TOP + HEIGHT + 52.0);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
         viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" font-size=\"12\" fill=\"#222\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
         <text x=\"{LEFT}\" y=\"22\" font-size=\"14\" font-weight=\"bold\">{}</text>\n",
        escape(title)
    );
    for (i, (name, lines)) in panels.iter().enumerate() {
        panel(&mut svg, LEFT + PITCH * i as f64, name, lines, levels);
    }
    svg + "</svg>\n"
}

fn panel(svg: &mut String, left: f64, name: &str, lines: &[Line], levels: &[Level]) {
    let values = lines.iter().flat_map(|line| line.values.iter().flatten());
    let step = tick(values.fold(0.0, |most: f64, value| most.max(*value)));
    let most = step * 4.0;
    let x = |i: usize| left + WIDTH * (i as f64 + 0.5) / levels.len().max(1) as f64;
    let y = |value: f64| TOP + HEIGHT * (1.0 - value / most);
    let _ = writeln!(svg, "<text x=\"{left}\" y=\"{}\">{name}</text>", TOP - 12.0);
    for i in 0..=4 {
        let value = step * f64::from(i);
        let _ = writeln!(
            svg,
            "<path d=\"M{left} {0:.1}h{WIDTH}\" stroke=\"#ddd\"/>\
             <text x=\"{1}\" y=\"{2:.1}\" text-anchor=\"end\">{value}</text>",
            y(value),
            left - 6.0,
            y(value) + 4.0
        );
    }
    for (i, level) in levels.iter().enumerate() {
        let (label, bottom) = (label(level.arrival), TOP + HEIGHT + 18.0);
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{bottom}\" text-anchor=\"middle\">{label}</text>",
            x(i)
        );
    }
    let (middle, bottom) = (left + WIDTH / 2.0, TOP + HEIGHT + 38.0);
    let axis = match levels.first().map(|level| level.arrival) {
        Some(Arrival::PerSecond(_)) => "requests a second",
        _ => "users",
    };
    let _ = writeln!(
        svg,
        "<text x=\"{middle}\" y=\"{bottom}\" text-anchor=\"middle\">{axis}</text>"
    );
    for (i, (line, stroke)) in lines.iter().zip(STROKES).enumerate() {
        draw(svg, line, stroke, x, y);
        let (at, above) = (left + WIDTH - 150.0 + 75.0 * i as f64, TOP - 16.0);
        let _ = writeln!(
            svg,
            "<path d=\"M{at} {above}h20\" {stroke} stroke-width=\"2\"/>\
             <text x=\"{}\" y=\"{}\">{}</text>",
            at + 24.0,
            above + 4.0,
            line.name
        );
    }
}

fn draw(
    svg: &mut String,
    line: &Line,
    stroke: &str,
    x: impl Fn(usize) -> f64,
    y: impl Fn(f64) -> f64,
) {
    let seen = line.values.iter().enumerate();
    let points: Vec<(f64, f64)> = seen.filter_map(|(i, v)| Some((x(i), y((*v)?)))).collect();
    let text: Vec<String> = points
        .iter()
        .map(|(x, y)| format!("{x:.1},{y:.1}"))
        .collect();
    let text = text.join(" ");
    let _ = writeln!(
        svg,
        "<polyline fill=\"none\" {stroke} stroke-width=\"2\" points=\"{text}\"/>"
    );
    for (x, y) in points {
        let _ = writeln!(
            svg,
            "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"2\" fill=\"none\" {stroke} stroke-width=\"4\"/>"
        );
    }
}

/// A quarter of an axis that holds `most`: 1, 2, 2.5 or 5 times a power of ten.
fn tick(most: f64) -> f64 {
    if most <= 0.0 || !most.is_finite() {
        return 0.25;
    }
    let power = 10f64.powf((most / 4.0).log10().floor());
    let fits = |step: &f64| step * power * 4.0 >= most;
    let step = [1.0, 2.0, 2.5, 5.0].into_iter().find(fits).unwrap_or(10.0);
    // Without the tail that binary fractions leave in a label.
    (step * power * 1e9).round() / 1e9
}

fn label(arrival: Arrival) -> String {
    match arrival {
        Arrival::Users(users) => users.to_string(),
        Arrival::PerSecond(rate) => rate.to_string(),
    }
}

fn escape(text: &str) -> String {
    let text = text.replace('&', "&amp;");
    text.replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::Spread;

    #[test]
    fn axes_hold_their_values_in_round_steps() {
        for (most, step) in [
            (4.0, 1.0),
            (4.1, 2.0),
            (1000.0, 250.0),
            (0.3, 0.1),
            (0.0, 0.25),
        ] {
            assert_eq!(tick(most), step, "{most}");
        }
    }

    #[test]
    fn a_plot_names_what_it_shows() {
        let level = |users| Level {
            arrival: Arrival::Users(users),
            summary: Summary {
                wall_s: 1.0,
                tokens: 10,
                ttft_ms: Spread::of(vec![f64::from(users)]),
                ..Summary::default()
            },
        };
        let svg = plot("a <model> & more", &[level(1), level(2)]);
        assert!(svg.contains("a &lt;model&gt; &amp; more"));
        assert_eq!(svg.matches("<polyline").count(), 5);
        assert_eq!(svg.matches("<circle").count(), 2 + 2 + 2);
    }
}
