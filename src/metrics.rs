//! The counters of the agent, in one table. A counter that is not here does not exist; docs/metrics.md lists the same rows,
//! and a test compares the two.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};

/// What a number means to a scraper.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only grows.
    Counter,
    /// Goes up and down.
    Gauge,
}

/// One number of the table.
pub struct Metric {
    /// Full name, with its unit, and its labels if it has any.
    pub name: &'static str,
    /// Counter or gauge.
    pub kind: Kind,
    /// One line for people.
    pub help: &'static str,
    value: AtomicU64,
}

impl Metric {
    /// Adds `n`.
    pub fn add(&self, n: u64) {
        self.value.fetch_add(n, Ordering::Relaxed);
    }

    /// Adds one.
    pub fn increment(&self) {
        self.add(1);
    }

    /// Takes `n` off a gauge; not below zero.
    pub fn subtract(&self, n: u64) {
        let _ =
            self.value.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |now| Some(now.saturating_sub(n)));
    }

    /// Sets a gauge.
    pub fn set(&self, n: u64) {
        self.value.store(n, Ordering::Relaxed);
    }

    /// The present number.
    #[must_use]
    pub fn value(&self) -> u64 {
        self.value.load(Ordering::Relaxed)
    }
}

macro_rules! table {
    ($($(#[doc = $help:literal])+ $field:ident: $kind:ident = $name:literal;)*) => {
        /// The table. One per agent.
        pub struct Metrics { $($(#[doc = $help])+ pub $field: Metric,)* }

        impl Default for Metrics {
            fn default() -> Self {
                Self { $($field: Metric {
                    name: $name,
                    kind: Kind::$kind,
                    help: concat!($($help),+).trim_ascii(),
                    value: AtomicU64::new(0),
                },)* }
            }
        }

        impl Metrics {
            /// Every row, in the order of the table.
            pub fn rows(&self) -> impl Iterator<Item = &Metric> {
                [$(&self.$field),*].into_iter()
            }
        }
    };
}

table! {
    /// Opens answered from a value within its max age.
    cache_hits: Counter = "fuse_secrets_cache_hits_total";
    /// Opens and publishes that had to wait for the store.
    cache_misses: Counter = "fuse_secrets_cache_misses_total";
    /// Opens answered from a last known value that is older than its max age.
    cache_stale_serves: Counter = "fuse_secrets_cache_stale_serves_total";
    /// Reads of a held value that the store answered.
    cache_refreshes: Counter = "fuse_secrets_cache_refreshes_total";
    /// Reads of a held value that failed.
    cache_refresh_failures: Counter = "fuse_secrets_cache_refresh_failures_total";
    /// Answers held.
    cache_entries: Gauge = "fuse_secrets_cache_entries";
    /// Bytes of the answers held.
    cache_bytes: Gauge = "fuse_secrets_cache_bytes";
    /// Logins at a store.
    store_logins: Counter = "fuse_secrets_store_logins_total";
    /// Renewals of a store's token.
    store_renewals: Counter = "fuse_secrets_store_renewals_total";
    /// Reads asked of a store, retries apart.
    store_reads: Counter = "fuse_secrets_store_reads_total";
    /// HTTP requests sent again by the store client.
    store_retries: Counter = "fuse_secrets_store_retries_total";
    /// Volumes served.
    volumes: Gauge = "fuse_secrets_volumes";
    /// Generations built since the start.
    generations_built: Counter = "fuse_secrets_generations_built_total";
    /// Generations given up while a handle was still open on them.
    generations_evicted: Counter = "fuse_secrets_generations_evicted_total";
    /// Changed answers from which no new generation could be built.
    generations_failed: Counter = "fuse_secrets_generations_failed_total";
    /// Opens of files.
    fs_opens: Counter = "fuse_secrets_fs_opens_total";
    /// Read requests.
    fs_reads: Counter = "fuse_secrets_fs_reads_total";
    /// Reads through a handle whose generation is gone.
    fs_stale_handles: Counter = "fuse_secrets_fs_stale_handles_total";
    /// Calls refused because the file system is read-only.
    fs_writes_refused: Counter = "fuse_secrets_fs_writes_refused_total";
    /// Handlers that panicked; each answered EIO.
    fs_panics: Counter = "fuse_secrets_fs_panics_total";
    /// Invalidations sent to the kernel.
    fs_invalidations: Counter = "fuse_secrets_fs_invalidations_total";
    /// Bytes of secret memory in use.
    memory_used: Gauge = "fuse_secrets_memory_used_bytes";
    /// Requests for secret memory that did not fit.
    memory_refused: Counter = "fuse_secrets_memory_refused_total";
    /// Classes of the cluster that are known.
    classes_provider: Gauge = "fuse_secrets_classes{kind=\"SecretProviderClass\"}";
    /// Classes of the cluster that are known.
    classes_import: Gauge = "fuse_secrets_classes{kind=\"SecretsStoreImport\"}";
    /// Since when the API server does not tell of changed classes, in Unix time; 0 while it does.
    classes_behind_provider: Gauge = "fuse_secrets_classes_behind_since_seconds{kind=\"SecretProviderClass\"}";
    /// Since when the API server does not tell of changed classes, in Unix time; 0 while it does.
    classes_behind_import: Gauge = "fuse_secrets_classes_behind_since_seconds{kind=\"SecretsStoreImport\"}";
    /// Keys of the service-account issuer that are held.
    issuer_keys: Gauge = "fuse_secrets_issuer_keys";
    /// Volumes whose token proved whose it is, by how.
    tokens_signed: Counter = "fuse_secrets_tokens_proved_total{by=\"signature\"}";
    /// Volumes whose token proved whose it is, by how.
    tokens_login: Counter = "fuse_secrets_tokens_proved_total{by=\"login\"}";
    /// Tokens of pods that were not taken: of a volume that was refused for it, or newer ones of a served volume.
    tokens_refused_publish: Counter = "fuse_secrets_tokens_refused_total{at=\"publish\"}";
    /// Tokens of pods that were not taken: of a volume that was refused for it, or newer ones of a served volume.
    tokens_refused_renewal: Counter = "fuse_secrets_tokens_refused_total{at=\"renewal\"}";
    /// Events of pods that the API server took.
    events_created: Counter = "fuse_secrets_events_created_total";
    /// Events of pods that it did not, or that were too many.
    events_dropped: Counter = "fuse_secrets_events_dropped_total";
    /// Whether the shim is attached: 1 or 0.
    node_attached: Gauge = "fuse_secrets_node_attached";
    /// Volumes published, newer tokens apart.
    node_publishes: Counter = "fuse_secrets_node_publishes_total";
    /// Volumes taken over from an earlier agent.
    node_adoptions: Counter = "fuse_secrets_node_adoptions_total";
    /// Volumes let go of for another agent.
    node_hand_overs: Counter = "fuse_secrets_node_hand_overs_total";
    /// Parts of a volume that the shim did not take to keep.
    node_deposits_failed: Counter = "fuse_secrets_node_deposits_failed_total";
    /// Publishes refused, by gRPC code.
    node_refused_invalid_argument: Counter = "fuse_secrets_node_refusals_total{code=\"invalid_argument\"}";
    /// Publishes refused, by gRPC code.
    node_refused_deadline_exceeded: Counter = "fuse_secrets_node_refusals_total{code=\"deadline_exceeded\"}";
    /// Publishes refused, by gRPC code.
    node_refused_not_found: Counter = "fuse_secrets_node_refusals_total{code=\"not_found\"}";
    /// Publishes refused, by gRPC code.
    node_refused_permission_denied: Counter = "fuse_secrets_node_refusals_total{code=\"permission_denied\"}";
    /// Publishes refused, by gRPC code.
    node_refused_resource_exhausted: Counter = "fuse_secrets_node_refusals_total{code=\"resource_exhausted\"}";
    /// Publishes refused, by gRPC code.
    node_refused_failed_precondition: Counter = "fuse_secrets_node_refusals_total{code=\"failed_precondition\"}";
    /// Publishes refused, by gRPC code.
    node_refused_internal: Counter = "fuse_secrets_node_refusals_total{code=\"internal\"}";
    /// Publishes refused, by gRPC code.
    node_refused_unavailable: Counter = "fuse_secrets_node_refusals_total{code=\"unavailable\"}";
}

impl Metrics {
    /// The table in the text format of Prometheus.
    #[must_use]
    pub fn render(&self) -> String {
        let mut text = String::new();
        let mut described = "";
        for row in self.rows() {
            // Rows of one name with different labels stand together, and are described once.
            let name = row.name.split('{').next().unwrap_or_default();
            if name != described {
                let kind = if row.kind == Kind::Counter { "counter" } else { "gauge" };
                let _ = writeln!(text, "# HELP {name} {}\n# TYPE {name} {kind}", row.help);
                described = name;
            }
            let _ = writeln!(text, "{} {}", row.name, row.value());
        }
        text
    }
}
