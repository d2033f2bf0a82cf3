//! Whether there is a device, and where.

/// The address of this host's RDMA device; `None` and why, loudly, where there is none.
pub(crate) fn address() -> Option<String> {
    if let Err(unavailable) = pageferry_rdma::available() {
        eprintln!("tests over RDMA skipped, because {unavailable}");
        return None;
    }
    let address = std::env::var("PAGEFERRY_RDMA_ADDRESS").ok();
    if address.is_none() {
        eprintln!("tests over RDMA skipped, because PAGEFERRY_RDMA_ADDRESS names no device");
    }
    address
}
