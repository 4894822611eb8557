//! From the text of one value to its type: durations and sizes with a unit, modes in octal, ids, switches. Each refuses with
//! the rule and an example, and never repeats the text.

use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use crate::config::fault::{Broken, broken};
use crate::config::settings::{Grace, STALE_GRACE};
use crate::reference::{Address, Pem};

const UNITS: [(&str, u64); 5] = [("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000), ("d", 86_400_000)];
const SIZES: [(&str, usize); 4] = [("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("B", 1)];

/// `30s`, `5m`, `1h30m`: whole numbers with a unit out of ms, s, m, h, d, in `range`.
pub(crate) fn duration(text: &str, range: RangeInclusive<Duration>) -> Result<Duration, Broken> {
    const REMEDY: &str = "write a whole number with a unit out of ms, s, m, h, d, such as 30s or 1h30m";
    let bare = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
    if bare(text) {
        return Err(broken("has no unit", REMEDY));
    }
    let mut rest = text;
    let mut total = Some(0_u64);
    while !rest.is_empty() {
        let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (number, tail) = rest.split_at(digits);
        let letters = tail.len() - tail.trim_start_matches(|c: char| c.is_ascii_alphabetic()).len();
        let (unit, tail) = tail.split_at(letters);
        let factor = UNITS.iter().find(|(name, _)| *name == unit).map(|(_, factor)| *factor);
        let (true, Some(factor)) = (bare(number), factor) else {
            return Err(broken("is not a duration", REMEDY));
        };
        total = number
            .parse::<u64>()
            .ok()
            .and_then(|n| n.checked_mul(factor))
            .zip(total)
            .and_then(|(a, b)| a.checked_add(b));
        rest = tail;
    }
    let outside = || {
        let (low, high) = (spell(*range.start()), spell(*range.end()));
        broken(format!("is outside {low} to {high}"), format!("choose a duration from {low} to {high}"))
    };
    if text.is_empty() {
        return Err(broken("is empty", REMEDY));
    }
    total.map(Duration::from_millis).filter(|d| range.contains(d)).ok_or_else(outside)
}

/// How long last-known-good is served: `unlimited` or a duration.
pub(crate) fn grace(text: &str) -> Result<Grace, Broken> {
    if text == "unlimited" {
        return Ok(Grace::Unlimited);
    }
    duration(text, STALE_GRACE).map(Grace::For)
}

/// A duration as people write it: `90s`, `5m`, `250ms`.
pub(crate) fn spell(duration: Duration) -> String {
    let ms = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    // The largest unit that leaves no rest; 90s rather than 1m30s.
    let (unit, factor) =
        UNITS.iter().rev().find(|(_, factor)| ms > 0 && ms.is_multiple_of(*factor)).unwrap_or(&UNITS[1]);
    format!("{}{unit}", ms / factor)
}

/// `64MiB`: a whole number with B, KiB, MiB or GiB, in `range` (bytes).
pub(crate) fn size(text: &str, range: RangeInclusive<usize>) -> Result<usize, Broken> {
    const REMEDY: &str = "write a whole number with a unit out of B, KiB, MiB, GiB, such as 64MiB";
    if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) {
        return Err(broken("has no unit", REMEDY));
    }
    let parsed = SIZES.iter().find_map(|(unit, factor)| Some((text.strip_suffix(unit)?, *factor)));
    let Some((number, factor)) =
        parsed.filter(|(n, _)| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
    else {
        return Err(broken("is not a size", REMEDY));
    };
    let bytes = number.parse::<usize>().ok().and_then(|n| n.checked_mul(factor));
    bytes.filter(|bytes| range.contains(bytes)).ok_or_else(|| {
        let (low, high) = (spell_size(*range.start()), spell_size(*range.end()));
        broken(format!("is outside {low} to {high}"), format!("choose a size from {low} to {high}"))
    })
}

fn spell_size(bytes: usize) -> String {
    let (unit, factor) =
        SIZES[..3].iter().rev().find(|(_, factor)| bytes.is_multiple_of(*factor)).unwrap_or(&SIZES[3]);
    format!("{}{unit}", bytes / factor)
}

/// A whole number in `range`.
pub(crate) fn count(text: &str, range: RangeInclusive<usize>) -> Result<usize, Broken> {
    text.parse::<usize>().ok().filter(|n| range.contains(n)).ok_or_else(|| {
        let (low, high) = range.into_inner();
        broken(
            format!("is not a whole number from {low} to {high}"),
            format!("write a number such as {high}"),
        )
    })
}

/// A user or group id. The largest number means "nobody said" to the kernel and is refused.
pub(crate) fn id(text: &str) -> Result<u32, Broken> {
    text.parse::<u32>().ok().filter(|id| *id != u32::MAX).ok_or_else(|| {
        broken("is not a numeric id from 0 to 4294967294", "write the number; names are not looked up")
    })
}

/// Permission bits as octal text: `0440`, `440`, `0o440`.
pub(crate) fn mode(text: &str) -> Result<u16, Broken> {
    let digits = text.strip_prefix("0o").unwrap_or(text);
    let octal = (1..=5).contains(&digits.len()) && digits.bytes().all(|b| matches!(b, b'0'..=b'7'));
    let bits = octal.then(|| u32::from_str_radix(digits, 8).ok()).flatten();
    bits.ok_or_else(|| broken("is not an octal number", "write permission bits in octal, such as 0440"))
        .and_then(permission)
}

/// Permission bits as a number: read and write only.
pub(crate) fn permission(bits: u32) -> Result<u16, Broken> {
    u16::try_from(bits).ok().filter(|bits| bits & !0o666 == 0).ok_or_else(|| {
        broken(
            "has bits other than read and write",
            "secrets are never executable or set-id: choose from 0000 to 0666 in octal, with the leading 0, such as 0440",
        )
    })
}

/// A switch: `true` or `false`, and Go's spellings of them, which the reference providers take.
pub(crate) fn switch(text: &str) -> Result<bool, Broken> {
    match text {
        "true" | "True" | "TRUE" | "t" | "T" | "1" => Ok(true),
        "false" | "False" | "FALSE" | "f" | "F" | "0" => Ok(false),
        _ => Err(broken("is neither true nor false", "write true or false")),
    }
}

/// A store's address.
pub(crate) fn address(text: &str) -> Result<Address, Broken> {
    Address::parse(text).map_err(|e| broken(e.reason(), "write it like https://vault.example:8200"))
}

/// Certificates as PEM text; at least one, each of which decodes.
pub(crate) fn certificates(text: &str) -> Result<Pem, Broken> {
    use rustls::pki_types::{CertificateDer, pem::PemObject};
    let mut found = 0;
    for certificate in CertificateDer::pem_slice_iter(text.as_bytes()) {
        if certificate.is_err() {
            return Err(broken(
                "has a PEM block that does not decode",
                "paste the whole certificate, unchanged",
            ));
        }
        found += 1;
    }
    if found == 0 {
        let remedy = "paste the certificate with its BEGIN CERTIFICATE and END CERTIFICATE lines, not a path";
        return Err(broken("has no PEM certificate", remedy));
    }
    Ok(Pem::Text(text.to_owned()))
}

/// A path that means the same from every working directory.
pub(crate) fn absolute(text: &str) -> Result<PathBuf, Broken> {
    let path = any_path(text)?;
    if path.is_absolute() {
        return Ok(path);
    }
    Err(broken("is not an absolute path", "begin it with /: a relative path depends on who reads it"))
}

/// Any path.
pub(crate) fn any_path(text: &str) -> Result<PathBuf, Broken> {
    if text.is_empty() || text.contains('\0') {
        return Err(broken("is not a path", "write the path of a file, such as /etc/ssl/store-ca.pem"));
    }
    Ok(PathBuf::from(text))
}

/// A value that travels in a header or a login: visible ASCII, 1 to 512 bytes.
pub(crate) fn word(text: &str) -> Result<String, Broken> {
    if (1..=512).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic()) {
        return Ok(text.to_owned());
    }
    let rule =
        if text.is_empty() { "is empty" } else { "is not one word of 1 to 512 visible ASCII characters" };
    Err(broken(rule, "write the name as the store knows it, without blanks"))
}

/// Where a login method is mounted: `kubernetes`, `team/jwt`; slashes around it are cut.
pub(crate) fn mount(text: &str) -> Result<String, Broken> {
    const REMEDY: &str = "write the mount's own path, such as kubernetes or team-a/jwt";
    let mount = text.trim_matches('/');
    if mount.starts_with("auth/") {
        return Err(broken("begins with auth/, which the API adds by itself", REMEDY));
    }
    let legal = |part: &str| {
        !matches!(part, "" | "." | "..")
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
    };
    if mount.len() > 512 || !mount.split('/').all(legal) {
        return Err(broken("is not a path of letters, digits, - _ . and /", REMEDY));
    }
    Ok(mount.to_owned())
}

/// What an unknown name was probably meant to be.
pub(crate) fn closest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let name = name.to_ascii_lowercase();
    known
        .into_iter()
        .map(|candidate| (strsim::jaro_winkler(&name, &candidate.to_ascii_lowercase()), candidate))
        .filter(|(likeness, _)| *likeness >= 0.85)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate)
}

/// The fault of an unknown name.
pub(crate) fn unknown<'a>(name: &str, known: impl IntoIterator<Item = &'a str> + Clone) -> Broken {
    const MOST: usize = 12;
    if let Some(meant) = closest(name, known.clone()) {
        return broken("is unknown", format!("did you mean {meant}?"));
    }
    let known: Vec<_> = known.into_iter().collect();
    if known.len() > MOST {
        return broken("is unknown", "remove it; the documentation lists what there is");
    }
    broken("is unknown", format!("remove it; known are {}", known.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn any() -> RangeInclusive<Duration> {
        Duration::ZERO..=Duration::from_secs(86_400)
    }

    #[test]
    fn durations_need_a_unit_and_may_be_composed() {
        assert_eq!(duration("90s", any()), Ok(Duration::from_secs(90)));
        assert_eq!(duration("1h30m", any()), Ok(Duration::from_secs(5_400)));
        assert_eq!(duration("2m0s", any()), Ok(Duration::from_secs(120)));
        assert_eq!(duration("250ms", any()), Ok(Duration::from_millis(250)));
        assert_eq!(duration("30", any()).unwrap_err().rule, "has no unit");
        for bad in ["", "s", "1.5h", "-1s", "1 s", "1S", "s1", "1w", "99999999999999999999s", "1s2"] {
            assert!(duration(bad, any()).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_duration_out_of_range_names_both_bounds() {
        let fault = duration("2d", any()).unwrap_err();
        assert_eq!(fault.rule, "is outside 0s to 1d");
    }

    #[test]
    fn sizes_need_a_unit() {
        assert_eq!(size("64MiB", 0..=usize::MAX), Ok(64 << 20));
        assert_eq!(size("512B", 0..=usize::MAX), Ok(512));
        assert_eq!(size("512", 0..=usize::MAX).unwrap_err().rule, "has no unit");
        assert_eq!(size("1KiB", 4096..=8192).unwrap_err().rule, "is outside 4KiB to 8KiB");
        for bad in ["", "MiB", "1MB", "-1MiB", "1.5MiB", "99999999999999999999GiB"] {
            assert!(size(bad, 0..=usize::MAX).is_err(), "{bad}");
        }
    }

    #[test]
    fn modes_are_octal_and_carry_no_execute_or_set_id_bits() {
        assert_eq!(mode("0440"), Ok(0o440));
        assert_eq!(mode("440"), Ok(0o440));
        assert_eq!(mode("0o440"), Ok(0o440));
        for bad in ["", "0480", "0o", "0755", "4440", "0x120", "777777777", "-444"] {
            assert!(mode(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_misspelt_name_is_answered_with_the_likely_one() {
        assert_eq!(closest("vaultAdress", ["vaultAddress", "roleName"]), Some("vaultAddress"));
        assert_eq!(closest("colour", ["vaultAddress", "roleName"]), None);
    }

    #[test]
    fn a_login_mount_is_the_path_below_auth() {
        assert_eq!(mount("/team/jwt/").as_deref(), Ok("team/jwt"));
        for bad in ["", "/", "auth/kubernetes", "a//b", "a/../b", "a b", "a?b"] {
            assert!(mount(bad).is_err(), "{bad}");
        }
    }
}
