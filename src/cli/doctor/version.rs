//! Kernel versions.

/// A kernel's version: `6.18.44-generic` is (6, 18, 44).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Version(pub(super) u32, pub(super) u32, pub(super) u32);

impl Version {
    pub(super) fn parse(release: &str) -> Option<Self> {
        let numbers = release.split(|c: char| !c.is_ascii_digit() && c != '.').next()?;
        let mut numbers = numbers.split('.').map(|number| number.parse().ok());
        Some(Self(numbers.next()??, numbers.next()??, numbers.next().flatten().unwrap_or(0)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_is_read_up_to_what_its_vendor_added() {
        assert_eq!(Version::parse("6.12.117+deb13-amd64"), Some(Version(6, 12, 117)));
        assert_eq!(Version::parse("7.2-rc1"), Some(Version(7, 2, 0)));
        assert_eq!(Version::parse("linux"), None);
    }
}
