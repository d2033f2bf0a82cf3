//! Addresses of this host that lead to RDMA devices.
#![expect(unsafe_code, reason = "interfaces are listed by the C library")]

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::ptr;

use crate::cm::{Id, socket_address};
use crate::{Unavailable, available};

/// An address that a destination can listen at, and a source be reached from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceAddress {
    /// The address.
    pub address: IpAddr,
    /// The device that it leads to, by name ("mlx5_0").
    pub device: String,
    /// The port of it, from 1.
    pub port: u8,
}

impl fmt::Display for DeviceAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}, port {})", self.address, self.device, self.port)
    }
}

/// The addresses of this host that lead to an RDMA device, as the connection manager sees it; those of
/// IPv4 first. Without link-local ones, which say nothing without an interface.
pub fn addresses() -> Result<Vec<DeviceAddress>, Unavailable> {
    available()?;
    let mut found = Vec::new();
    for address in interface_addresses().map_err(Unavailable::List)? {
        let id = Id::new().map_err(Unavailable::List)?;
        // Most interfaces are not of RDMA devices.
        if id.bind(SocketAddr::new(address, 0)).is_ok()
            && let Some(context) = id.context()
        {
            found.push(DeviceAddress { address, device: context.name(), port: id.port() });
        }
    }
    found.sort_by_key(|found| found.address.is_ipv6());
    Ok(found)
}

/// Names the addresses that would do, where an address was no RDMA device's.
pub(crate) fn advise(cause: io::Error) -> io::Error {
    let ours = [libc::ENODEV, libc::EADDRNOTAVAIL, libc::EINVAL];
    if !cause.raw_os_error().is_some_and(|errno| ours.contains(&errno)) {
        return cause;
    }
    let Ok(found) = addresses() else { return cause };
    let list = found.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let advice = match found.len() {
        0 => "no RDMA device of this host has an address".to_owned(),
        _ => format!("addresses of RDMA devices here: {list}"),
    };
    io::Error::new(cause.kind(), format!("{cause}; {advice}"))
}

/// All that is not link-local, each once.
fn interface_addresses() -> io::Result<Vec<IpAddr>> {
    let mut list = ptr::null_mut();
    // SAFETY: a place to write to. The list is freed below.
    if unsafe { libc::getifaddrs(&raw mut list) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let mut found = Vec::new();
    let mut next = list;
    // SAFETY: an entry of the list, or its end.
    while let Some(entry) = unsafe { next.as_ref() } {
        next = entry.ifa_next;
        // SAFETY: absent, or an address as long as its family says.
        let address = unsafe { socket_address(entry.ifa_addr) };
        let Some(address) = address.map(|address| address.ip()) else { continue };
        let link_local = match address {
            IpAddr::V4(v4) => v4.is_link_local(),
            IpAddr::V6(v6) => v6.is_unicast_link_local(),
        };
        if !link_local && !found.contains(&address) {
            found.push(address);
        }
    }
    // SAFETY: from `getifaddrs`, and not used from here on.
    unsafe { libc::freeifaddrs(list) };
    Ok(found)
}
