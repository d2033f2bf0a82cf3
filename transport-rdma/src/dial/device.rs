//! The device and port that were asked for must be there.

use std::io;

use pageferry::transport::TransportError;

use crate::options::RdmaOptions;
use crate::verbs::{Context, Limits, device_names};

/// The device of this name must be there, if one is asked for.
pub(crate) fn check_device(options: &RdmaOptions, address: &str) -> Result<(), TransportError> {
    let failed = |cause| TransportError::Connect { address: address.to_owned(), cause };
    let names = device_names().map_err(failed)?;
    let missing = match &options.device {
        _ if names.is_empty() => String::from("this host has no RDMA device"),
        Some(wanted) if !names.contains(wanted) => {
            format!("there is no RDMA device {wanted}; there are: {}", names.join(", "))
        }
        _ => return Ok(()),
    };
    Err(failed(io::Error::new(io::ErrorKind::NotFound, missing)))
}

/// The device and port must be those asked for. Returns what they can do, and the largest path MTU.
pub(super) fn check_port(
    options: &RdmaOptions,
    context: Context,
    port: u8,
) -> io::Result<(Limits, u32)> {
    let wrong = |what| Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    if let Some(wanted) = &options.device
        && *wanted != context.name()
    {
        return wrong(format!(
            "the address belongs to the RDMA device {}, not {wanted}",
            context.name()
        ));
    }
    if let Some(wanted) = options.port
        && wanted != port
    {
        return wrong(format!("the address belongs to port {port}, not {wanted}"));
    }
    let limits = context.limits(port)?;
    let most = limits.active_mtu_bytes.max(256).ilog2() - 7;
    if let Some(wanted) = options.mtu
        && wanted.encoded() > most
    {
        tracing::warn!(
            "a path MTU of {} was asked for, and the port of {} has {}; a larger MTU of its network \
             interface gives it more",
            wanted.bytes(),
            context.name(),
            limits.active_mtu_bytes
        );
    }
    Ok((limits, options.mtu.map_or(most, |wanted| wanted.encoded().min(most))))
}
