//! Do the two sides fit? Decided before the first page moves, and before the destination
//! allocates anything.

use thiserror::Error;

use super::{Hello, MigrationKey, OLDEST_PROTOCOL_VERSION, PROTOCOL_VERSION, Welcome, speaks_ours};
use crate::pages::digest::Digest;
use crate::pages::memory::{Layout, PAGE_BYTES};

/// The page size of this engine, as the greeting carries it.
#[expect(clippy::cast_possible_truncation, reason = "4096")]
const PAGE_BYTES_ON_WIRE: u32 = PAGE_BYTES as u32;

/// Why the two sides cannot work together.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Incompatibility {
    /// No common protocol version.
    #[error(
        "protocol versions do not meet: the source speaks {source_oldest} to {source_newest}, \
         the destination {OLDEST_PROTOCOL_VERSION} to {PROTOCOL_VERSION}"
    )]
    Version {
        /// Oldest version of the source.
        source_oldest: u16,
        /// Newest version of the source.
        source_newest: u16,
    },
    /// The destination answered with a version that was not offered.
    #[error("the destination chose protocol version {0}, which was not offered")]
    VersionNotOffered(u16),
    /// Different page sizes.
    #[error(
        "page sizes differ: the source tracks pages of {source_bytes} bytes, the destination of \
         {destination_bytes}"
    )]
    PageSize {
        /// The source's, in bytes.
        source_bytes: u32,
        /// The destination's, in bytes.
        destination_bytes: u32,
    },
    /// No channel, or too many.
    #[error("{wanted} data channels wanted, 1 to {most} are possible")]
    Channels {
        /// What the source wants.
        wanted: u16,
        /// What the destination allows.
        most: u16,
    },
    /// The destination agreed to another number of channels than asked for.
    #[error("{wanted} data channels wanted, {agreed} agreed to")]
    ChannelsChanged {
        /// What the source wanted.
        wanted: u16,
        /// What the answer says.
        agreed: u16,
    },
    /// Different memory maps.
    #[error(
        "memory maps differ: the source has {source_bytes} bytes at {source_map}, the \
         destination {destination_bytes} bytes at {destination_map}"
    )]
    Layout {
        /// All bytes at the source.
        source_bytes: u64,
        /// All bytes at the destination.
        destination_bytes: u64,
        /// The source's regions.
        source_map: String,
        /// The destination's regions.
        destination_map: String,
    },
    /// The machine at the destination would not take the device state of the one at the source
    /// ([`Machine::check_state_schema`](crate::Machine::check_state_schema)).
    #[error("device state of the source cannot be loaded at the destination: {0}")]
    DeviceState(String),
    /// The destination's memory is not zero, and this source relies on it.
    #[error("the destination does not promise zeroed memory")]
    MemoryNotZeroed,
}

/// What both sides hold to after the handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Agreement {
    /// Protocol version.
    pub version: u16,
    /// Number of data channels.
    pub channels: u16,
    /// Whether memory is compared by digest before the commit.
    pub verify: bool,
    /// Whether the source comes back when the link is lost, and the destination waits for it.
    pub rejoins: bool,
    /// Whether both sides keep checksums of pages, which are compared before the commit.
    pub page_sums: bool,
}

/// The destination's side: looks at a greeting and answers.
///
/// It waits for a source whose link is lost, if it can and the source comes back: `rejoins`.
pub fn negotiate(
    hello: &Hello,
    most_channels: u16,
    wants_data_ranges: bool,
    rejoins: bool,
) -> Result<(Agreement, Welcome), Incompatibility> {
    if !speaks_ours(hello.oldest_version, hello.newest_version) {
        return Err(Incompatibility::Version {
            source_oldest: hello.oldest_version,
            source_newest: hello.newest_version,
        });
    }
    if hello.page_bytes != PAGE_BYTES_ON_WIRE {
        return Err(Incompatibility::PageSize {
            source_bytes: hello.page_bytes,
            destination_bytes: PAGE_BYTES_ON_WIRE,
        });
    }
    if hello.channels == 0 || hello.channels > most_channels {
        return Err(Incompatibility::Channels { wanted: hello.channels, most: most_channels });
    }
    let version = hello.newest_version.min(PROTOCOL_VERSION);
    let rejoins = rejoins && hello.rejoins;
    let agreement = Agreement {
        version,
        channels: hello.channels,
        verify: hello.verify,
        rejoins,
        page_sums: hello.page_sums,
    };
    let welcome = Welcome {
        version,
        channels: hello.channels,
        memory_zeroed: true,
        wants_data_ranges,
        rejoins,
        greeting: Digest::default(),
    };
    Ok((agreement, welcome.to(hello)))
}

impl Hello {
    /// The greeting of this engine, without a schema of device state, of a source that does not come back.
    pub fn new(
        key: MigrationKey,
        layout: Layout,
        channels: u16,
        verify: bool,
        description: Vec<u8>,
    ) -> Self {
        Self {
            oldest_version: OLDEST_PROTOCOL_VERSION,
            newest_version: PROTOCOL_VERSION,
            page_bytes: PAGE_BYTES_ON_WIRE,
            channels,
            verify,
            trial: false,
            rejoins: false,
            page_sums: false,
            key,
            layout,
            description,
            state_schema: Vec::new(),
        }
    }

    /// The source's side: looks at the answer to this greeting.
    pub fn check(&self, welcome: &Welcome) -> Result<Agreement, Incompatibility> {
        if !(self.oldest_version..=self.newest_version).contains(&welcome.version) {
            return Err(Incompatibility::VersionNotOffered(welcome.version));
        }
        if welcome.channels != self.channels {
            return Err(Incompatibility::ChannelsChanged {
                wanted: self.channels,
                agreed: welcome.channels,
            });
        }
        if !welcome.memory_zeroed {
            return Err(Incompatibility::MemoryNotZeroed);
        }
        Ok(Agreement {
            version: welcome.version,
            channels: self.channels,
            verify: self.verify,
            rejoins: self.rejoins && welcome.rejoins,
            page_sums: self.page_sums,
        })
    }

    /// The destination's side, later: does the memory its host made fit the source's?
    pub fn check_layout(&self, destination: &Layout) -> Result<(), Incompatibility> {
        if self.layout.same_guest_view(destination) {
            return Ok(());
        }
        Err(Incompatibility::Layout {
            source_bytes: self.layout.len_bytes(),
            destination_bytes: destination.len_bytes(),
            source_map: self.layout.to_string(),
            destination_map: destination.to_string(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pages::memory::RegionLayout;

    fn hello() -> Hello {
        let region =
            RegionLayout { guest_addr: 0, len_bytes: PAGE_BYTES, backing_page_bytes: PAGE_BYTES };
        Hello::new(
            MigrationKey::of_a_test(),
            Layout::new(vec![region]).unwrap(),
            2,
            true,
            Vec::new(),
        )
    }

    #[test]
    fn two_of_this_version_agree() {
        let hello = hello();
        let (agreement, welcome) = negotiate(&hello, 8, false, false).unwrap();
        assert_eq!(hello.check(&welcome), Ok(agreement));
        let expected =
            Agreement { version: 1, channels: 2, verify: true, rejoins: false, page_sums: false };
        assert_eq!(agreement, expected);
    }

    #[test]
    fn a_source_comes_back_only_where_both_want_that() {
        for (here, there) in [(false, false), (false, true), (true, false), (true, true)] {
            let hello = Hello { rejoins: here, ..hello() };
            let (agreement, welcome) = negotiate(&hello, 8, false, there).unwrap();
            assert_eq!((agreement.rejoins, welcome.rejoins), (here && there, here && there));
            assert_eq!(hello.check(&welcome), Ok(agreement));
        }
    }

    #[test]
    fn a_newer_source_that_still_speaks_ours_is_welcome() {
        let newer = Hello { newest_version: 9, ..hello() };
        assert_eq!(negotiate(&newer, 8, false, false).unwrap().0.version, PROTOCOL_VERSION);
    }

    #[test]
    fn each_misfit_is_named() {
        let too_new = Hello { oldest_version: 8, newest_version: 9, ..hello() };
        let refused = Incompatibility::Version { source_oldest: 8, source_newest: 9 };
        assert_eq!(negotiate(&too_new, 8, false, false), Err(refused));
        let pages = Hello { page_bytes: 16384, ..hello() };
        assert!(matches!(
            negotiate(&pages, 8, false, false),
            Err(Incompatibility::PageSize { .. })
        ));
        for channels in [0, 9] {
            let channels = Hello { channels, ..hello() };
            assert!(matches!(
                negotiate(&channels, 8, false, false),
                Err(Incompatibility::Channels { .. })
            ));
        }
        let (_, welcome) = negotiate(&hello(), 8, false, false).unwrap();
        assert!(hello().check(&Welcome { version: 2, ..welcome }).is_err());
        assert!(hello().check(&Welcome { channels: 1, ..welcome }).is_err());
        assert!(hello().check(&Welcome { memory_zeroed: false, ..welcome }).is_err());
    }
}
