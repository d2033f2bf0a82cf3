//! The words that the command line has for what several commands measure, and what they may be.

use std::net::IpAddr;

use clap::{Args, ValueEnum};
use pageferry::memory::{MAX_REGION_PAGES, PAGE_BYTES};
use pageferry_cli::transport::{self, WITHOUT_RDMA};
use pageferry_cli::units::{size, value_name};
use pageferry_tcp::KernelTls;
use pageferry_vmm::ram::Backing;
use serde::{Deserialize, Serialize};

/// What moves the pages. A measurement is of one that was named: none is up to the kernel, or to options.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Transport {
    /// TCP sockets.
    Tcp,
    /// TCP sockets driven by io_uring.
    #[value(name = "iouring")]
    #[serde(rename = "iouring")]
    IoUring,
    /// TCP sockets, encrypted in the process; against a bare loop that does so too.
    TcpTls,
    /// TCP sockets, encrypted by the kernel.
    TcpKernelTls,
    /// TCP sockets driven by io_uring, encrypted by the kernel.
    #[value(name = "iouring-kernel-tls")]
    #[serde(rename = "iouring-kernel-tls")]
    IoUringKernelTls,
    /// RDMA, in programs that were built with it; against perftest's ib_write_bw.
    Rdma,
}

/// Settings of `--transport rdma`.
#[expect(clippy::struct_field_names, reason = "as the command line has them")]
#[derive(Debug, Clone, Copy, Default, Args, Serialize, Deserialize)]
#[command(next_help_heading = "With --transport rdma")]
pub(crate) struct RdmaArgs {
    /// Address of the RDMA device, where both sides are [default: the first there is].
    #[arg(long, value_name = "ADDR")]
    pub(crate) rdma_address: Option<IpAddr>,
    /// Most bytes of one write, and bytes of each of perftest's [default: the transport's, 1 MiB].
    #[arg(long, value_name = "SIZE", value_parser = slice)]
    pub(crate) rdma_slice: Option<u32>,
    /// When guest memory is registered.
    #[arg(long, value_name = "WHEN", default_value = "at-start")]
    pub(crate) rdma_registration: RdmaRegistration,
}

/// When guest memory is registered.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum RdmaRegistration {
    /// All of it before the first page; that time is not counted.
    #[default]
    AtStart,
    /// Chunk by chunk while pages flow.
    Ahead,
}

impl RdmaArgs {
    /// Where RDMA is among the transports: that this program was built with it.
    pub(crate) fn check(transports: &[Transport]) -> Result<(), String> {
        if !transports.contains(&Transport::Rdma) {
            Ok(())
        } else if !cfg!(feature = "rdma") {
            Err(format!("--transport rdma: {WITHOUT_RDMA}"))
        } else {
            Ok(())
        }
    }
}

impl Transport {
    /// Who encrypts, if anybody does.
    pub(crate) fn kernel_tls(self) -> Option<KernelTls> {
        match self {
            Self::Tcp | Self::IoUring | Self::Rdma => None,
            Self::TcpTls => Some(KernelTls::Off),
            Self::TcpKernelTls | Self::IoUringKernelTls => Some(KernelTls::On),
        }
    }
}

impl From<Transport> for transport::Transport {
    fn from(transport: Transport) -> Self {
        match transport {
            Transport::Tcp | Transport::TcpTls | Transport::TcpKernelTls => Self::Tcp,
            Transport::IoUring | Transport::IoUringKernelTls => Self::IoUring,
            Transport::Rdma => Self::Rdma,
        }
    }
}

impl std::fmt::Display for Transport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&value_name(self))
    }
}

/// Memory of whole pages of its backing, no more than a region can have.
pub(crate) fn whole_pages(memory: u64, backing: Backing) -> Result<(), String> {
    let unit = backing.page_bytes();
    if memory / PAGE_BYTES > MAX_REGION_PAGES {
        let most = MAX_REGION_PAGES * PAGE_BYTES;
        Err(format!("--memory {memory} is too much, at most {most} is possible"))
    } else if !memory.is_multiple_of(unit) {
        Err(format!("--memory {memory} is not a multiple of the page size, {unit} bytes"))
    } else {
        Ok(())
    }
}

/// Memory that has a page for each channel.
pub(crate) fn a_page_each(memory: u64, channels: u16) -> Result<(), String> {
    if memory / PAGE_BYTES < u64::from(channels) {
        return Err(format!(
            "--memory {memory} has less than one page for each of --channels {channels}"
        ));
    }
    Ok(())
}

/// Whole pages, as many as one RDMA write can have.
fn slice(text: &str) -> Result<u32, String> {
    match u32::try_from(size(text)?) {
        Ok(bytes) if u64::from(bytes).is_multiple_of(PAGE_BYTES) && bytes <= 1 << 30 => Ok(bytes),
        _ => Err(format!("a write is of whole pages of {PAGE_BYTES} bytes, at most 1 GiB")),
    }
}

/// "0.25".
pub(crate) fn share(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(share) if (0.0..=1.0).contains(&share) => Ok(share),
        _ => Err("a share is between 0.0 and 1.0".to_owned()),
    }
}
