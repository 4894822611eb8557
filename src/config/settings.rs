//! What may be said at several places about one volume: at the mount, in its class, in the configuration. Each place says a
//! part; the narrower wins field by field; what nobody said has a default or is a fault.

use std::ops::RangeInclusive;
use std::time::Duration;

use crate::config::fault::{Sink, broken};
use crate::config::text::spell;
use crate::reference::{Address, Auth, AuthMethod, ClientCertificate, Connection, Freshness, Ownership, Pem};

/// Refresh interval and greatest age: below a second a store is flooded, above a day a rotation is not one.
pub const INTERVAL: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(86_400);
/// How long an `open` may wait: a waiting process cannot be killed, so it is short.
pub const OPEN_DEADLINE: RangeInclusive<Duration> = Duration::ZERO..=Duration::from_secs(5);
/// How long a value may be served that could not be refreshed, where that is limited at all.
pub const STALE_GRACE: RangeInclusive<Duration> = Duration::ZERO..=Duration::from_secs(365 * 86_400);

/// What one place says. `None`: nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// Where the store is and how it is trusted.
    pub connection: ConnectionSettings,
    /// How to log in.
    pub login: LoginSettings,
    /// How fresh.
    pub freshness: FreshnessSettings,
    /// Owner, group and mode of the files.
    pub ownership: Ownership,
}

/// [`Connection`] in parts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConnectionSettings {
    /// Members of one cluster; never empty.
    pub addresses: Option<Vec<Address>>,
    /// The store's namespace.
    pub namespace: Option<String>,
    /// Who may have signed the store's certificate.
    pub ca: Option<Pem>,
    /// Name expected in that certificate.
    pub server_name: Option<String>,
    /// Certificate shown to the store.
    pub client_certificate: Option<ClientCertificate>,
    /// Accept any certificate.
    pub skip_verify: Option<bool>,
    /// Proxy for all requests.
    pub proxy: Option<url::Url>,
}

/// [`Auth`] in parts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LoginSettings {
    /// The method; classes never say one: theirs is a service account's login.
    pub method: Option<AuthMethod>,
    /// Where it is mounted.
    pub mount: Option<String>,
    /// The role, or AppRole's role id.
    pub role: Option<String>,
    /// Audience of the presented token.
    pub audience: Option<String>,
}

/// [`Freshness`] in parts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FreshnessSettings {
    /// Refresh interval, within [`INTERVAL`].
    pub interval: Option<Duration>,
    /// Greatest age at `open`, within [`INTERVAL`].
    pub max_age: Option<Duration>,
    /// Longest wait of an `open`, within [`OPEN_DEADLINE`].
    pub open_deadline: Option<Duration>,
    /// How long last-known-good is served.
    pub stale_grace: Option<Grace>,
}

/// How long a value may be served that could not be refreshed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grace {
    /// As long as the outage lasts.
    Unlimited,
    /// For this long, within [`STALE_GRACE`].
    For(Duration),
}

impl Settings {
    /// These settings, and `wider` where they are silent.
    #[must_use]
    pub fn or(self, wider: Self) -> Self {
        let (a, b) = (self.connection, wider.connection);
        let connection = ConnectionSettings {
            addresses: a.addresses.or(b.addresses),
            namespace: a.namespace.or(b.namespace),
            ca: a.ca.or(b.ca),
            server_name: a.server_name.or(b.server_name),
            client_certificate: a.client_certificate.or(b.client_certificate),
            skip_verify: a.skip_verify.or(b.skip_verify),
            proxy: a.proxy.or(b.proxy),
        };
        let (a, b) = (self.login, wider.login);
        let login = LoginSettings {
            method: a.method.or(b.method),
            mount: a.mount.or(b.mount),
            role: a.role.or(b.role),
            audience: a.audience.or(b.audience),
        };
        let (a, b) = (self.freshness, wider.freshness);
        let freshness = FreshnessSettings {
            interval: a.interval.or(b.interval),
            max_age: a.max_age.or(b.max_age),
            open_deadline: a.open_deadline.or(b.open_deadline),
            stale_grace: a.stale_grace.or(b.stale_grace),
        };
        Self { connection, login, freshness, ownership: self.ownership.or(wider.ownership) }
    }
}

impl ConnectionSettings {
    /// The whole, with defaults.
    pub(crate) fn complete(self, sink: &Sink) -> Option<Connection> {
        let Some(addresses) = self.addresses else {
            let remedy = "give --address, or set the address in the class or the configuration";
            sink.add("address", broken("is not given", remedy));
            return None;
        };
        Some(Connection {
            addresses,
            namespace: self.namespace,
            ca: self.ca,
            server_name: self.server_name,
            client_certificate: self.client_certificate,
            skip_verify: self.skip_verify.unwrap_or(false),
            proxy: self.proxy,
        })
    }
}

impl LoginSettings {
    /// The whole, with defaults: the method `kubernetes`, mounted under its own name.
    pub(crate) fn complete(self, sink: &Sink) -> Option<Auth> {
        let method = self.method.unwrap_or(AuthMethod::Kubernetes);
        if method == AuthMethod::Token {
            return Some(Auth { method, mount: String::new(), role: String::new(), audience: None });
        }
        let Some(role) = self.role else {
            let remedy = if method == AuthMethod::AppRole {
                "give --role-id with --secret-id-file"
            } else {
                "give --role, or set the role in the class or the configuration"
            };
            sink.add("role", broken("is not given", remedy));
            return None;
        };
        let mount = self.mount.unwrap_or_else(|| default_mount(method).to_owned());
        Some(Auth { method, mount, role, audience: self.audience })
    }
}

/// Where a method is mounted if nobody says it; a token needs no mount.
pub(crate) fn default_mount(method: AuthMethod) -> &'static str {
    match method {
        AuthMethod::Token => "",
        AuthMethod::Kubernetes => "kubernetes",
        AuthMethod::Jwt => "jwt",
        AuthMethod::AppRole => "approle",
    }
}

impl FreshnessSettings {
    /// The whole, with defaults; `max_age` must not be below the interval.
    pub(crate) fn complete(self, sink: &Sink) -> Freshness {
        let defaults = Freshness::default();
        let interval = self.interval.unwrap_or(defaults.interval);
        let max_age = self.max_age.unwrap_or(interval);
        if max_age < interval {
            let rule = format!("is {}, below the refresh interval of {}", spell(max_age), spell(interval));
            let remedy = "raise it or lower the refresh interval: else every open waits for the store";
            sink.add("maxAge", broken(rule, remedy));
        }
        Freshness {
            interval,
            max_age,
            open_deadline: self.open_deadline.unwrap_or(defaults.open_deadline),
            stale_grace: match self.stale_grace {
                None => defaults.stale_grace,
                Some(Grace::Unlimited) => None,
                Some(Grace::For(grace)) => Some(grace),
            },
        }
    }
}
