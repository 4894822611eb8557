//! The counters of the shim, in one table: a counter that is not here does not exist.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};

/// One number of the table.
#[derive(Default)]
pub(crate) struct Metric(AtomicU64);

impl Metric {
    /// Adds one.
    pub(crate) fn increment(&self) {
        self.add(1);
    }

    /// Adds `n`.
    pub(crate) fn add(&self, n: usize) {
        self.0.fetch_add(n as u64, Ordering::Relaxed);
    }

    /// Sets a gauge.
    pub(crate) fn set(&self, n: usize) {
        self.0.store(n as u64, Ordering::Relaxed);
    }
}

macro_rules! table {
    ($($field:ident: $kind:literal $name:literal = $help:literal;)*) => {
        /// The table. One per shim.
        #[derive(Default)]
        pub(crate) struct Metrics { $(#[doc = $help] pub $field: Metric,)* }

        impl Metrics {
            /// The text format of Prometheus.
            #[must_use]
            pub(crate) fn text(&self) -> String {
                let mut text = String::new();
                $(
                    let value = self.$field.0.load(Ordering::Relaxed);
                    let name = concat!("fuse_secrets_csi_", $name);
                    // Writing to a string does not fail.
                    let _ = writeln!(text, "# HELP {name} {}\n# TYPE {name} {}\n{name} {value}", $help, $kind);
                )*
                text
            }
        }
    };
}

table! {
    publishes: "counter" "publishes_total" = "New volumes that were mounted.";
    refusals: "counter" "refusals_total" = "Publishes that were refused or failed.";
    adoptions: "counter" "adoptions_total" = "Volumes that an agent took over.";
    drains: "counter" "handovers_total" = "Volumes that a living agent let go of for a newer one.";
    deaths: "counter" "worker_deaths_total" = "Agents whose process ended.";
    hung: "counter" "worker_kills_total" = "Agents that hung and were killed.";
    failed: "counter" "eio_answers_total" = "Requests that got EIO because no agent was there.";
    heals: "counter" "heals_total" = "Dead mounts that were replaced in pods.";
    dead: "gauge" "dead_mounts" = "Mounts that were dead when the shim started and were not published since.";
    volumes: "gauge" "volumes" = "Volumes that are kept.";
    agents: "gauge" "agents" = "Agents that are attached.";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_says_what_it_is_and_its_number() {
        let metrics = Metrics::default();
        metrics.publishes.increment();
        metrics.volumes.set(7);
        let text = metrics.text();
        assert!(text.contains(
            "# TYPE fuse_secrets_csi_publishes_total counter\nfuse_secrets_csi_publishes_total 1\n"
        ));
        assert!(text.contains("# TYPE fuse_secrets_csi_volumes gauge\nfuse_secrets_csi_volumes 7\n"));
    }

    #[test]
    fn the_metrics_document_has_every_row_of_the_shims_table() {
        let text = Metrics::default().text();
        let lines: Vec<&str> = text.lines().collect();
        let row = |lines: &[&str]| {
            let (name, help) = lines[0].strip_prefix("# HELP ")?.split_once(' ')?;
            Some(format!("| `{name}` | {} | {help} |", lines[1].rsplit(' ').next()?))
        };
        let rows: Vec<_> = lines.chunks(3).map(|lines| row(lines).unwrap()).collect();
        let document = include_str!("../../docs/metrics.md");
        let listed: Vec<_> =
            document.lines().filter(|line| line.starts_with("| `fuse_secrets_csi_")).collect();
        assert_eq!(listed, rows);
    }
}
