//! What was found: as a table, as JSON, as a picture.

use std::fmt::Write as _;
use std::path::Path;

use serde_json::{Value, json};

use crate::Error;

/// Rows that belong together.
pub(crate) type Section = Vec<Row>;

/// One measure.
pub(crate) struct Row {
    pub(crate) name: String,
    /// What docs/measures.md promises.
    pub(crate) promised: &'static str,
    /// What was found, in words.
    pub(crate) found: String,
    /// What was found, as a number against the promise.
    pub(crate) limit: Option<Limit>,
    /// The rounds, where there were any.
    pub(crate) series: Vec<Series>,
}

/// A ratio and the most that it may be.
pub(crate) struct Limit {
    pub(crate) found: f64,
    pub(crate) most: f64,
}

impl Limit {
    fn is_met(&self) -> bool {
        self.found <= self.most
    }
}

/// One peer's rounds.
pub(crate) struct Series {
    pub(crate) peer: &'static str,
    /// Nanoseconds per operation, one number per round.
    pub(crate) times: Vec<f64>,
    /// Nanoseconds of the server's CPU per operation.
    pub(crate) cpu: Vec<f64>,
}

impl Series {
    pub(crate) fn new(peer: &'static str) -> Self {
        Self { peer, times: Vec::new(), cpu: Vec::new() }
    }

    /// The round in the middle.
    pub(crate) fn median(&self) -> f64 {
        middle(&self.times)
    }

    fn minimum(&self) -> f64 {
        self.times.iter().copied().fold(f64::INFINITY, f64::min)
    }
}

fn middle(numbers: &[f64]) -> f64 {
    let mut sorted = numbers.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Everything so far.
pub(crate) struct Report {
    rounds: usize,
    rows: Section,
}

impl Report {
    pub(crate) fn new(rounds: usize) -> Self {
        Self { rounds, rows: Vec::new() }
    }

    /// Prints a section and keeps it.
    pub(crate) fn show(&mut self, headline: &str, section: Section) {
        println!("\n{headline}");
        for row in section {
            let word = row.limit.as_ref().map_or("", |limit| if limit.is_met() { "met" } else { "MISSED" });
            println!("  {:<58} {:<6} {}\n    promised: {}", row.name, word, row.found, row.promised);
            for series in &row.series {
                let cpu = match series.cpu.as_slice() {
                    [] => String::new(),
                    cpu => format!("  agent CPU {}", time(middle(cpu))),
                };
                let (minimum, median) = (time(series.minimum()), time(series.median()));
                println!("    {:<36} min {minimum:>10}  median {median:>10}{cpu}", series.peer);
            }
            self.rows.push(row);
        }
    }

    /// Writes `read.json` and `read.svg`.
    pub(crate) fn save(&self, to: &Path) -> Result<(), Error> {
        std::fs::create_dir_all(to)?;
        std::fs::write(to.join("read.json"), format!("{:#}\n", self.json()))?;
        std::fs::write(to.join("read.svg"), self.svg()?)?;
        println!("\nwritten: {0}/read.json, {0}/read.svg", to.display());
        Ok(())
    }

    fn json(&self) -> Value {
        let rows = self.rows.iter().map(|row| {
            let series = row.series.iter().map(|series| {
                json!({
                    "peer": series.peer,
                    "minimum_ns": series.minimum(),
                    "median_ns": series.median(),
                    "rounds_ns": series.times,
                    "agent_cpu_median_ns": (!series.cpu.is_empty()).then(|| middle(&series.cpu)),
                })
            });
            json!({
                "measure": row.name,
                "promised": row.promised,
                "found": row.found,
                "ratio": row.limit.as_ref().map(|limit| limit.found),
                "ratio_at_most": row.limit.as_ref().map(|limit| limit.most),
                "met": row.limit.as_ref().map(Limit::is_met),
                "peers": series.collect::<Vec<_>>(),
            })
        });
        json!({ "rounds": self.rounds, "measures": rows.collect::<Vec<_>>() })
    }

    /// One bar per peer and row, as long as its median against the longest of its row; the minimum is a line in it.
    fn svg(&self) -> Result<String, Error> {
        const BAR: usize = 18;
        const WIDTH: f64 = 420.0;
        let mut body = String::new();
        let mut y = 10;
        for row in self.rows.iter().filter(|row| row.series.len() > 1) {
            y += 20;
            writeln!(body, r#"<text x="10" y="{y}" font-weight="bold">{}</text>"#, row.name)?;
            let longest = row.series.iter().map(Series::median).fold(0.0, f64::max);
            for series in &row.series {
                let (median, minimum) =
                    (series.median() / longest * WIDTH, series.minimum() / longest * WIDTH);
                let colour = if series.peer == "fuse-secrets" { "#2a6f97" } else { "#a9b4bd" };
                let (top, middle, height) = (y + 6, y + 20, BAR - 2);
                let label = time(series.median());
                writeln!(
                    body,
                    r#"<text x="10" y="{middle}">{}</text><rect x="120" y="{top}" width="{median:.1}" height="{height}" fill="{colour}"/><rect x="{:.1}" y="{top}" width="1.5" height="{height}"/><text x="{:.1}" y="{middle}">{label}</text>"#,
                    series.peer,
                    120.0 + minimum,
                    126.0 + median,
                )?;
                y += BAR;
            }
            y += 10;
        }
        let height = y + 20;
        Ok(format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"660\" height=\"{height}\" font-family=\"sans-serif\" \
             font-size=\"12\">\n<rect width=\"660\" height=\"{height}\" fill=\"white\"/>\n{body}\
             <text x=\"10\" y=\"{}\" fill=\"#666\">time per operation: bar = median, line = minimum</text>\n</svg>\n",
            height - 8
        ))
    }
}

fn time(nanoseconds: f64) -> String {
    if nanoseconds < 1e6 {
        format!("{:.2} µs", nanoseconds / 1e3)
    } else {
        format!("{:.2} ms", nanoseconds / 1e6)
    }
}
