//! Which kernels may be asked to send requests again.

use super::message::Handover;

/// As `uname` counts: three numbers.
type Version = (u32, u32, u32);

/// Releases whose `FUSE_NOTIFY_RESEND` has no known bug: from the first, below the second (CVE-2026-64265, CVE-2024-38626).
const SAFE: [(Version, Version); 3] =
    [((6, 12, 96), (6, 13, 0)), ((6, 18, 39), (6, 19, 0)), ((7, 1, 4), (u32::MAX, 0, 0))];

/// What suits a kernel, by its release as `uname` tells it. One that is not known to be safe gets [`Handover::Clone`].
#[must_use]
pub fn suits(release: &str) -> Handover {
    // `7.2-rc1` and `7.2` have no third number; what follows a dash is the vendor's.
    let dotted = release.split(|c: char| !c.is_ascii_digit() && c != '.').next().unwrap_or_default();
    let mut numbers = dotted.split('.').map_while(|number| number.parse().ok());
    let (Some(major), Some(minor)) = (numbers.next(), numbers.next()) else { return Handover::Clone };
    let version = (major, minor, numbers.next().unwrap_or(0));
    let safe = SAFE.iter().any(|(from, below)| (*from..*below).contains(&version));
    if safe { Handover::Resend } else { Handover::Clone }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_fixed_kernels_send_requests_again() {
        for release in [
            "6.12.96",
            "6.12.117+deb13-amd64",
            "6.18.39",
            "6.18.44-fc-v657",
            "7.1.4",
            "7.2",
            "7.2-rc1",
            "8.0.0",
        ] {
            assert_eq!(suits(release), Handover::Resend, "{release}");
        }
        for release in [
            "5.15.0-100-generic",
            "6.8.0-31-generic",
            "6.12.95",
            "6.12",
            "6.13.1",
            "6.17.200",
            "6.18.38",
            "6.18-rc44",
            "6.19.0",
            "6.19.99",
            "7.0.9",
            "7.1.3",
            "7.1",
            "",
            "linux",
            "7",
            "99999999999.1.1",
        ] {
            assert_eq!(suits(release), Handover::Clone, "{release}");
        }
    }
}
