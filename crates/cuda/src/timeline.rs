//! A layer over the multiprocessors: what every CTA did when, from the stamps of one step, as SVG.
//!
//! Multiprocessors count cycles for themselves, so their clocks are brought together at instructions
//! for which all CTAs wait for the same counter: what is left of skew is that of seeing it, some 0.1 us.
//! Invariant: bars are work as stamped; what lies between two bars of a CTA is waiting.

use std::fmt::Write;

use crate::layout::{Instr, OPS};

/// Cycles a microsecond: the card's highest clock.
pub const CYCLES_A_US: f64 = 1980.0;
const WIDTH: f64 = 1200.0;
const ROW: f64 = 4.0;
const TOP: f64 = 40.0;
const LEFT: f64 = 40.0;
const COLOURS: [&str; OPS.len()] = [
    "#888888", "#4477aa", "#ee6677", "#66ccee", "#222222", "#aa3377", "#228833", "#ccbb44",
    "#997700", "#228833", "#4477aa", "#bbbbbb", "#888888", "#66ccee", "#bbbbbb", "#222222",
    "#bbbbbb",
];

/// Stamps of a step, `[CTAs][instructions][start, ready, end]` in cycles, and what they are of.
pub struct Timeline<'a> {
    /// Of every CTA.
    pub stamps: &'a [i64],
    /// The program's.
    pub instructions: &'a [Instr],
    /// CTAs.
    pub ctas: usize,
}

/// Work of a CTA on an instruction, microseconds from where the range begins.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bar {
    /// CTA.
    pub cta: usize,
    /// Index of [`OPS`].
    pub op: usize,
    /// Operands are there.
    pub from_us: f64,
    /// Done.
    pub to_us: f64,
}

impl Timeline<'_> {
    fn stamp(&self, cta: usize, n: usize, which: usize) -> i64 {
        self.stamps[(cta * self.instructions.len() + n) * 3 + which]
    }

    /// Cycles by which each CTA's clock is ahead of the first one's.
    fn offsets(&self) -> Vec<i64> {
        let common = |i: &Instr| OPS[i.op as usize] == "QKV";
        let at: Vec<usize> = (0..self.instructions.len())
            .filter(|&n| common(&self.instructions[n]))
            .collect();
        let offset = |cta| {
            let ahead = |&n: &usize| self.stamp(cta, n, 1) - self.stamp(0, n, 1);
            let mut all: Vec<i64> = at.iter().map(ahead).collect();
            all.sort_unstable();
            all.get(all.len() / 2).copied().unwrap_or(0)
        };
        (0..self.ctas).map(offset).collect()
    }

    /// Bars of the instructions in `range`.
    #[must_use]
    pub fn bars(&self, range: std::ops::Range<usize>) -> Vec<Bar> {
        let offsets = self.offsets();
        let at = |cta: usize, n, which| self.stamp(cta, n, which) - offsets[cta];
        let begin = (0..self.ctas).map(|c| at(c, range.start, 0)).min();
        let us = |cycles: i64| (cycles - begin.unwrap_or(0)) as f64 / CYCLES_A_US;
        let bar = |cta, n: usize| Bar {
            cta,
            op: self.instructions[n].op as usize,
            from_us: us(at(cta, n, 1)),
            to_us: us(at(cta, n, 2)),
        };
        (0..self.ctas)
            .flat_map(|cta| range.clone().map(move |n| bar(cta, n)))
            .collect()
    }
}

/// `bars` as a picture: a line a CTA, time to the right, a colour an op.
#[must_use]
pub fn svg(bars: &[Bar], title: &str) -> String {
    let end = bars.iter().map(|b| b.to_us).fold(1.0, f64::max);
    let ctas = bars.iter().map(|b| b.cta + 1).max().unwrap_or(1);
    let (x, height) = (WIDTH / end, TOP + ROW * ctas as f64 + 30.0);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{:.0}\" height=\"{height:.0}\" \
         font-family=\"sans-serif\" font-size=\"11\"><rect width=\"100%\" height=\"100%\" fill=\"white\"/>\
         <text x=\"{LEFT}\" y=\"14\">{title}</text>\n",
        LEFT + WIDTH + 20.0
    );
    let seen = |op: &usize| bars.iter().any(|b| b.op == *op);
    for (n, op) in (0..OPS.len()).filter(seen).enumerate() {
        let (name, colour) = (OPS[op], COLOURS[op]);
        let at = LEFT + 115.0 * n as f64;
        let _ = writeln!(
            out,
            "<rect x=\"{at}\" y=\"20\" width=\"10\" height=\"10\" fill=\"{colour}\"/><text x=\"{}\" y=\"29\">{name}</text>",
            at + 14.0
        );
    }
    for b in bars {
        let (from, y) = (LEFT + b.from_us * x, TOP + ROW * b.cta as f64);
        let (wide, high) = ((b.to_us - b.from_us) * x, ROW - 0.5);
        let colour = COLOURS[b.op];
        let _ = writeln!(
            out,
            "<rect x=\"{from:.1}\" y=\"{y:.1}\" width=\"{wide:.1}\" height=\"{high}\" fill=\"{colour}\"/>"
        );
    }
    for tick in (0..=end as usize).step_by(10) {
        let (at, y) = (LEFT + tick as f64 * x, height - 10.0);
        let _ = writeln!(out, "<text x=\"{at:.0}\" y=\"{y:.0}\">{tick} us</text>");
    }
    out + "</svg>\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_are_brought_together() {
        let op = |name| OPS.iter().position(|o| *o == name).unwrap_or(0) as i32;
        let instr = |name| Instr {
            op: op(name),
            ..Instr::default()
        };
        let instructions = [instr("QKV"), instr("ATTENTION")];
        let ahead = 123_456;
        let first = [0, 1980, 3960, 3960, 5940, 7920];
        let second: Vec<i64> = first.iter().map(|t| t + ahead).collect();
        let stamps = [&first[..], &second[..]].concat();
        let timeline = Timeline {
            stamps: &stamps,
            instructions: &instructions,
            ctas: 2,
        };
        let bars = timeline.bars(0..2);
        assert_eq!((bars[1].from_us, bars[1].to_us), (3.0, 4.0));
        assert_eq!((bars[3].cta, bars[3].from_us), (1, 3.0));
        let picture = svg(&bars, "two CTAs");
        assert_eq!(picture.matches("<rect").count(), 1 + 2 + 4);
        assert!(picture.contains("ATTENTION") && !picture.contains("ROUTER"));
    }
}
