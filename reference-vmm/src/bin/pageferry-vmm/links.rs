//! Which transport a migration has.

use pageferry::transport::{DestinationLink, SourceLink, TransportError};
use pageferry_iouring::{IoUringOptions, Rings};
use pageferry_tcp::{TcpDestinationLink, TcpOptions, TcpSourceLink, ZeroCopy, connect};

use crate::args::Transport;

/// The transport that was chosen, ready to make links.
#[derive(Debug)]
pub(crate) struct Chosen {
    /// Without: tcp.
    rings: Option<Rings>,
    zero_copy: ZeroCopy,
}

impl Transport {
    /// As the command line has it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Tcp => "tcp",
            Self::IoUring => "iouring",
        }
    }

    /// Decides; if that is up to this kernel and it has no io_uring, says so on stderr.
    pub(crate) fn choose(self, zero_copy: ZeroCopy) -> Result<Chosen, TransportError> {
        let tcp = Chosen { rings: None, zero_copy };
        let asked_for = match self {
            Self::Tcp => return Ok(tcp),
            Self::IoUring => true,
            Self::Auto => false,
        };
        match Rings::new(IoUringOptions { zero_copy, ..IoUringOptions::default() }) {
            Ok(rings) => Ok(Chosen { rings: Some(rings), ..tcp }),
            Err(unavailable) if asked_for => Err(unavailable.into()),
            Err(unavailable) => {
                say!("no io_uring: {unavailable}; tcp instead");
                Ok(tcp)
            }
        }
    }
}

impl Chosen {
    pub(crate) fn name(&self) -> &'static str {
        if self.rings.is_some() { "iouring" } else { "tcp" }
    }

    pub(crate) fn connect(&self, address: &str) -> Result<Box<dyn SourceLink>, TransportError> {
        let options = TcpOptions { zero_copy: self.zero_copy, ..TcpOptions::default() };
        let link: TcpSourceLink = connect(address, options)?;
        Ok(match &self.rings {
            None => Box::new(link),
            Some(rings) => Box::new(rings.source_link(link)),
        })
    }

    pub(crate) fn receive(&self, link: TcpDestinationLink) -> Box<dyn DestinationLink> {
        match &self.rings {
            None => Box::new(link),
            Some(rings) => Box::new(rings.destination_link(link)),
        }
    }
}
