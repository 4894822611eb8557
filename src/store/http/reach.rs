//! Whom and what the client may reach on behalf of others. A class, a DNS record or a redirect may lead to where a node's own
//! services listen; so addresses are looked at after names were resolved, at each connection. A file that a class may name is
//! opened beneath the operator's directory, so that no link leads out of it.

use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, fstat, open, openat2};
use url::Host;

use crate::reference::Address;

/// Bounds of a client. The default is that of an agent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reach {
    /// Whether stores at loopback, link-local and metadata addresses are asked. Default false.
    pub local_addresses: bool,
    /// Files below this directory are opened beneath it; those elsewhere are the operator's own. Default: none.
    pub beneath: Option<PathBuf>,
}

/// A name leads to nothing but addresses that are not asked.
#[derive(Debug, thiserror::Error)]
#[error("it is a loopback, link-local or metadata address")]
pub(super) struct Local;

impl Reach {
    /// No bound: for whoever asks with a login of their own.
    #[must_use]
    pub fn anywhere() -> Self {
        Self { local_addresses: true, beneath: None }
    }

    /// Whether an address that needs no resolution is asked; a name is looked at when it is resolved.
    pub(super) fn permits(&self, address: &Address) -> bool {
        match address.url().host() {
            Some(Host::Ipv4(ip)) => self.may(ip.into()),
            Some(Host::Ipv6(ip)) => self.may(ip.into()),
            Some(Host::Domain(_)) | None => true,
        }
    }

    /// Opens a certificate's or key's file.
    pub(super) fn open(&self, path: &Path) -> io::Result<File> {
        let inside = self.beneath.as_deref().and_then(|root| Some((root, path.strip_prefix(root).ok()?)));
        let Some((root, inside)) = inside else { return File::open(path) };
        let root = open(root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        let file = openat2(root, inside, flags, Mode::empty(), resolve)?;
        if FileType::from_raw_mode(fstat(&file)?.st_mode) != FileType::RegularFile {
            return Err(io::Error::other("it is no regular file"));
        }
        Ok(file.into())
    }

    /// Whether an address is asked.
    pub(super) fn may(&self, ip: IpAddr) -> bool {
        self.local_addresses || !is_local(ip)
    }
}

/// Resolves names as the system does and leaves out what may not be asked. With `fixed`, every name leads to that address.
pub(super) struct Names {
    pub(super) fixed: Option<Address>,
    pub(super) reach: Reach,
}

impl Resolve for Names {
    fn resolve(&self, name: Name) -> Resolving {
        let fixed = self.fixed.as_ref().and_then(|address| address.url().host_str());
        let host = fixed.unwrap_or(name.as_str()).trim_matches(['[', ']']).to_owned();
        let reach = self.reach.clone();
        Box::pin(async move {
            let all: Vec<_> = tokio::net::lookup_host((host, 0)).await?.collect();
            let some = !all.is_empty();
            let may: Vec<_> = all.into_iter().filter(|address| reach.may(address.ip())).collect();
            if some && may.is_empty() {
                return Err(Local.into());
            }
            Ok(Box::new(may.into_iter()) as Addrs)
        })
    }
}

/// Addresses at which clouds tell a machine's credentials and that lie in no range for this node alone: of Azure, Alibaba and
/// Oracle, then of AWS and Google.
const METADATA: [IpAddr; 5] = [
    IpAddr::V4(Ipv4Addr::new(168, 63, 129, 16)),
    IpAddr::V4(Ipv4Addr::new(100, 100, 100, 200)),
    IpAddr::V4(Ipv4Addr::new(192, 0, 0, 192)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)),
    IpAddr::V6(Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254)),
];

/// Whether an address leads to this node or to what tells its credentials, in any of its spellings.
fn is_local(ip: IpAddr) -> bool {
    match ip {
        _ if METADATA.contains(&ip) => true,
        // The kernel takes all of 0.0.0.0/8 for this host or refuses it.
        IpAddr::V4(ip) => ip.is_loopback() || ip.is_link_local() || ip.octets()[0] == 0 || ip.is_broadcast(),
        IpAddr::V6(ip) => {
            let link_local = ip.segments()[0] & 0xffc0 == 0xfe80;
            ip.is_loopback()
                || ip.is_unspecified()
                || link_local
                || inner(ip).is_some_and(|ip| is_local(ip.into()))
        }
    }
}

/// The IPv4 address inside of an IPv6 one: mapped, compatible, NAT64 (RFC 6052) and 6to4.
fn inner(ip: Ipv6Addr) -> Option<Ipv4Addr> {
    let [a, b, c, d, e, f, g, h] = ip.segments();
    let (high, low) = match [a, b, c, d, e, f] {
        [0, 0, 0, 0, 0, 0 | 0xffff] | [0x64, 0xff9b, 0, 0, 0, 0] => (g, h),
        [0x2002, high, low, ..] => (high, low),
        _ => return None,
    };
    Some(Ipv4Addr::from_bits(u32::from(high) << 16 | u32::from(low)))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Read as _;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn loopback_link_local_and_metadata_addresses_are_local_in_every_spelling() {
        for local in [
            "127.0.0.1",
            "127.9.8.7",
            "169.254.169.254",
            "0.0.0.0",
            "0.1.2.3",
            "255.255.255.255",
            "168.63.129.16",
            "100.100.100.200",
            "::1",
            "::",
            "fe80::1",
            "febf::1",
            "::ffff:127.0.0.1",
            "::ffff:169.254.169.254",
            "::127.0.0.1",
            "64:ff9b::169.254.169.254",
            "2002:a9fe:a9fe::1",
            "fd00:ec2::254",
            "fd20:ce::254",
        ] {
            assert!(is_local(local.parse().unwrap()), "{local}");
        }
        for other in [
            "10.0.0.1",
            "192.168.0.1",
            "172.16.0.1",
            "100.64.0.1",
            "8.8.8.8",
            "1.0.0.1",
            "169.253.1.1",
            "fec0::1",
            "fd00::1",
            "2001:db8::1",
            "::ffff:10.0.0.1",
            "64:ff9b::10.0.0.1",
            "2002:a00:1::1",
        ] {
            assert!(!is_local(other.parse().unwrap()), "{other}");
        }
    }

    #[test]
    fn an_address_is_looked_at_as_it_is_meant_and_not_as_it_is_written() {
        let permits = |reach: &Reach, text: &str| reach.permits(&Address::parse(text).unwrap());
        for local in
            ["http://127.1", "http://2130706433", "http://0x7f.0.0.1:8200", "https://[::1]", "http://0"]
        {
            assert!(!permits(&Reach::default(), local), "{local}");
            assert!(permits(&Reach::anywhere(), local), "{local}");
        }
        assert!(permits(&Reach::default(), "https://10.0.0.1:8200"));
    }

    #[test]
    fn a_file_below_the_directory_is_opened_and_no_link_leads_out_of_it() {
        let (root, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::create_dir_all(root.path().join("shop/..data")).unwrap();
        fs::write(root.path().join("shop/..data/ca.pem"), "inside").unwrap();
        symlink("..data/ca.pem", root.path().join("shop/ca.pem")).unwrap();
        fs::write(outside.path().join("key.pem"), "outside").unwrap();
        symlink(outside.path().join("key.pem"), root.path().join("shop/key.pem")).unwrap();
        symlink(outside.path(), root.path().join("elsewhere")).unwrap();
        let fifo = root.path().join("pipe");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, FileType::Fifo, 0o600.into(), 0).unwrap();
        let reach = Reach { beneath: Some(root.path().to_owned()), ..Reach::default() };
        let read = |path: &Path| {
            let mut text = String::new();
            reach.open(path).map(|mut file| file.read_to_string(&mut text).map(|_| text).unwrap())
        };
        assert_eq!(read(&root.path().join("shop/ca.pem")).unwrap(), "inside");
        for bad in ["shop/key.pem", "elsewhere/key.pem", "../key.pem", "pipe"] {
            assert!(read(&root.path().join(bad)).is_err(), "{bad}");
        }
        assert_eq!(read(&outside.path().join("key.pem")).unwrap(), "outside", "the operator's own file");
    }
}
