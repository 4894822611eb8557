//! What a bench found: as a table, as JSON, as a picture.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "benches print tables")]

use std::fmt::Write as _;
use std::path::Path;
use std::process::ExitCode;

use serde_json::{Value, json};

/// Why a bench cannot go on, in words for the person in front of it.
pub type Error = Box<dyn std::error::Error + Send + Sync>;

/// The start of a bench of several sections: what its arguments say, and what is said when it fails. `bench` gets the long or the short
/// plan, the sections that are wanted (none: all), and the directory of the results.
pub fn main<P>(
    name: &str,
    [full, quick]: [&P; 2],
    bench: impl FnOnce(&P, &[&str], &Path) -> Result<(), Error>,
) -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match arguments.as_slice() {
        ["--quick", only @ .., to] => bench(quick, only, Path::new(to)),
        [only @ .., to] => bench(full, only, Path::new(to)),
        [] => Err(format!(
            "usage: bench-{name} [--quick] [SECTION...] DIR_OF_RESULTS (call it by `cargo xtask bench {name}`)"
        )
        .into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench {name}: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Rows that belong together.
pub type Section = Vec<Row>;

/// One measure.
pub struct Row {
    /// What was measured.
    pub name: String,
    /// What docs/measures.md promises.
    pub promised: &'static str,
    /// What was found, in words.
    pub found: String,
    /// What was found, as a number against the promise.
    pub limit: Option<Limit>,
    /// The rounds, where there were any.
    pub series: Vec<Series>,
}

impl Row {
    /// A number that may be so large.
    #[must_use]
    pub fn counted(name: &str, promised: &'static str, found: u64, most: u64) -> Self {
        Self {
            name: name.to_owned(),
            promised,
            found: found.to_string(),
            limit: Some(Limit { found: found as f64, most: most as f64 }),
            series: Vec::new(),
        }
    }
}

/// A ratio and the most that it may be.
pub struct Limit {
    /// The ratio.
    pub found: f64,
    /// The most.
    pub most: f64,
}

impl Limit {
    fn is_met(&self) -> bool {
        self.found <= self.most
    }
}

/// One peer's rounds.
pub struct Series {
    /// Who was measured.
    pub peer: &'static str,
    /// Nanoseconds per operation, one number per round.
    pub times: Vec<f64>,
    /// Nanoseconds of the server's CPU per operation.
    pub cpu: Vec<f64>,
}

impl Series {
    /// Without rounds yet.
    #[must_use]
    pub fn new(peer: &'static str) -> Self {
        Self { peer, times: Vec::new(), cpu: Vec::new() }
    }

    /// The round in the middle.
    #[must_use]
    pub fn median(&self) -> f64 {
        middle(&self.times)
    }

    /// The round below which 99 of 100 are. Of few rounds: the longest.
    #[must_use]
    pub fn p99(&self) -> f64 {
        at(&self.times, 0.99)
    }

    /// The longest round.
    #[must_use]
    pub fn longest(&self) -> f64 {
        self.times.iter().copied().fold(0.0, f64::max)
    }

    fn minimum(&self) -> f64 {
        self.times.iter().copied().fold(f64::INFINITY, f64::min)
    }
}

fn middle(numbers: &[f64]) -> f64 {
    at(numbers, 0.5)
}

/// The number at this part of the way from the smallest to the largest.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a part of a small length")]
fn at(numbers: &[f64], part: f64) -> f64 {
    let mut sorted = numbers.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get((sorted.len() as f64 * part) as usize).copied().unwrap_or(f64::NAN)
}

/// Everything so far.
pub struct Report {
    bench: &'static str,
    rounds: usize,
    rows: Section,
}

impl Report {
    /// Nothing yet, of `cargo xtask bench BENCH`.
    #[must_use]
    pub fn new(bench: &'static str, rounds: usize) -> Self {
        Self { bench, rounds, rows: Vec::new() }
    }

    /// Prints a section and keeps it.
    pub fn show(&mut self, headline: &str, section: Section) {
        // Figures of a busy machine are not comparable.
        let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
        println!("\n{headline} (load average {})", load.split(' ').next().unwrap_or_default());
        for row in section {
            let word = row.limit.as_ref().map_or("", |limit| if limit.is_met() { "met" } else { "MISSED" });
            println!("  {:<58} {:<6} {}\n    promised: {}", row.name, word, row.found, row.promised);
            for series in &row.series {
                let cpu = match series.cpu.as_slice() {
                    [] => String::new(),
                    cpu => format!("  agent CPU {}", time(middle(cpu))),
                };
                let (minimum, median) = (time(series.minimum()), time(series.median()));
                let p99 = time(series.p99());
                println!(
                    "    {:<36} min {minimum:>10}  median {median:>10}  p99 {p99:>10}{cpu}",
                    series.peer
                );
            }
            self.rows.push(row);
        }
    }

    /// Writes `BENCH.json` and `BENCH.svg`.
    ///
    /// # Errors
    /// They cannot be written.
    pub fn save(&self, to: &Path) -> Result<(), Error> {
        std::fs::create_dir_all(to)?;
        let [json, svg] = ["json", "svg"].map(|kind| to.join(format!("{}.{kind}", self.bench)));
        std::fs::write(&json, format!("{:#}\n", self.json()))?;
        std::fs::write(&svg, self.svg()?)?;
        println!("\nwritten: {}, {}", json.display(), svg.display());
        Ok(())
    }

    fn json(&self) -> Value {
        let rows = self.rows.iter().map(|row| {
            let series = row.series.iter().map(|series| {
                json!({
                    "peer": series.peer,
                    "minimum_ns": series.minimum(),
                    "median_ns": series.median(),
                    "p99_ns": series.p99(),
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
                    r#"<text x="10" y="{middle}">{}</text><rect x="300" y="{top}" width="{median:.1}" height="{height}" fill="{colour}"/><rect x="{:.1}" y="{top}" width="1.5" height="{height}"/><text x="{:.1}" y="{middle}">{label}</text>"#,
                    series.peer,
                    300.0 + minimum,
                    306.0 + median,
                )?;
                y += BAR;
            }
            y += 10;
        }
        let height = y + 20;
        Ok(format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"840\" height=\"{height}\" font-family=\"sans-serif\" \
             font-size=\"12\">\n<rect width=\"840\" height=\"{height}\" fill=\"white\"/>\n{body}\
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
