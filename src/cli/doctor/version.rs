//! Kernel versions, and what is known of them.

/// A kernel's version: `6.18.44-generic` is (6, 18, 44).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Version(pub(super) u32, pub(super) u32, pub(super) u32);

impl Version {
    pub(super) fn parse(release: &str) -> Option<Self> {
        let numbers = release.split(|c: char| !c.is_ascii_digit() && c != '.').next()?;
        let mut numbers = numbers.split('.').map(|number| number.parse().ok());
        Some(Self(numbers.next()??, numbers.next()??, numbers.next().flatten().unwrap_or(0)))
    }

    /// Whether `FUSE_NOTIFY_RESEND` is free of CVE-2026-64265 (a use after free). An allow-list: only what is known good.
    pub(super) fn resends_safely(self) -> bool {
        let Self(major, minor, patch) = self;
        match (major, minor) {
            (6, 12) => patch >= 96,
            (6, 18) => patch >= 39,
            _ => self >= Self(7, 1, 4),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resend_is_used_only_on_kernels_known_to_be_safe() {
        for (release, safe) in [
            ("6.1.0-40-amd64", false),
            ("6.12.95", false),
            ("6.12.96", true),
            ("6.12.117+deb13-amd64", true),
            ("6.13.99", false),
            ("6.17.200", false),
            ("6.18.38", false),
            ("6.18.39", true),
            ("6.19.50", false),
            ("7.0.99", false),
            ("7.1.3", false),
            ("7.1.4", true),
            ("7.2.0-rc1", true),
            ("8.0", true),
        ] {
            assert_eq!(Version::parse(release).unwrap().resends_safely(), safe, "{release}");
        }
    }
}
