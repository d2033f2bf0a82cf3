//! Settings of connections, registration and queues.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use pageferry::transport::Admission;
use pageferry::transport::ways::Way;
use pageferry_identity::Security;

/// Most bytes of a packet's payload on the path (path MTU).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mtu {
    /// 256 bytes.
    Bytes256,
    /// 512 bytes.
    Bytes512,
    /// 1024 bytes.
    Bytes1024,
    /// 2048 bytes.
    Bytes2048,
    /// 4096 bytes.
    Bytes4096,
}

impl Mtu {
    /// Those there are, ascending.
    pub const ALL: [Self; 5] =
        [Self::Bytes256, Self::Bytes512, Self::Bytes1024, Self::Bytes2048, Self::Bytes4096];

    /// In bytes.
    pub fn bytes(self) -> u32 {
        128 << self.encoded()
    }

    /// From how verbs and the wire encode it; the smallest where that is no MTU.
    pub(crate) fn decoded(encoded: u32) -> Self {
        Self::ALL.into_iter().find(|mtu| mtu.encoded() == encoded).unwrap_or(Self::Bytes256)
    }

    /// As verbs and the wire encode it.
    pub(crate) fn encoded(self) -> u32 {
        self as u32 + 1
    }
}

/// When guest memory is registered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RegistrationMode {
    /// All of it before the first page, by two threads. Pages never wait for it.
    #[default]
    AtStart,
    /// Chunk by chunk, while pages flow. The destination's data threads go ahead in order and tell
    /// the source of each chunk; a page that is sent before it was told of waits, and nobody asks.
    /// The source's register a chunk when its first page is sent, and the one after it while the
    /// NIC is busy. The first page goes out at once, and what the source never sends anything of it
    /// does not pin.
    Ahead,
}

/// Settings of a link; both sides choose theirs freely.
///
/// ```
/// use pageferry_rdma::{Mtu, RdmaOptions};
///
/// let options = RdmaOptions { mtu: Some(Mtu::Bytes4096), ..RdmaOptions::default() };
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RdmaOptions {
    /// The device that the address must lead to, by name ("mlx5_0"); `None`: whichever it does.
    pub device: Option<String>,
    /// The port of it that the address must lead to, from 1.
    pub port: Option<u8>,
    /// At the source: addresses here that connections come from, and with them which device and port; paired with the
    /// destination's in turn, where either has several. Empty: as the routes to the destination say.
    pub source_addresses: Vec<IpAddr>,
    /// Index in the port's table of GIDs that this side is to have, on RoCE. At the source it decides
    /// which of the port's addresses is connected from; at the destination the address that is listened
    /// at has to lead to it. `None`: the one of the address.
    pub gid_index: Option<u8>,
    /// Largest path MTU. Connections have the smallest of both sides', their ports', and what the
    /// connection manager says of the way between them. `None`: the largest of the port.
    pub mtu: Option<Mtu>,
    /// Traffic class of all packets (DSCP and ECN bits), for networks that treat RDMA apart.
    pub traffic_class: Option<u8>,
    /// At the source: how long each step of connecting may take. At the destination: how long a
    /// connection that was accepted may take to be there, and a source may say nothing more before it has
    /// greeted.
    pub connect_timeout: Duration,
    /// Who may be at the other end; both sides need the same. With [`Security::Tls`] both prove who they are before
    /// either says anything of the guest, control frames are encrypted, and nobody else can join the link. Pages never are
    /// encrypted: [`Self::plain_text_pages`]. [`KernelTls`](crate::KernelTls) is of no meaning.
    pub security: Security,
    /// Whether pages may go to and come from another host, where [`Self::security`] is TLS: NICs encrypt nothing, so
    /// whoever is on the way reads the guest's memory, and can change it.
    pub plain_text_pages: bool,
    /// At the destination: what a source must have said to be served.
    pub admission: Admission,
    /// Time without acknowledgement after which a packet is sent again; rounded up to 4.096 µs
    /// times a power of two, and NICs may take up to four times as long (InfiniBand
    /// specification, "Local ACK Timeout").
    pub ack_timeout: Duration,
    /// How often, 0 to 7. Then the link is lost.
    pub retries: u8,
    /// When guest memory is registered. Each side chooses for its own.
    pub registration: RegistrationMode,
    /// Guest memory is registered in chunks of so many bytes, in whole MiB: as far as the device
    /// can, and more where it has too few memory regions. With [`RegistrationMode::Ahead`] a zero
    /// page or a mark waits for one chunk at most.
    pub chunk_bytes: u64,
    /// Most bytes of one write.
    pub slice_bytes: u32,
    /// Every so many writes are acknowledged by a completion.
    pub signal_every: u32,
    /// Writes under way at most on a channel.
    pub send_queue_depth: u32,
}

impl Default for RdmaOptions {
    fn default() -> Self {
        Self {
            device: None,
            port: None,
            source_addresses: Vec::new(),
            gid_index: None,
            mtu: None,
            traffic_class: None,
            connect_timeout: Duration::from_secs(10),
            security: Security::default(),
            plain_text_pages: false,
            admission: Admission::default(),
            ack_timeout: Duration::from_millis(250),
            retries: 7,
            registration: RegistrationMode::AtStart,
            chunk_bytes: 64 << 20,
            slice_bytes: 1 << 20,
            signal_every: 16,
            send_queue_depth: 256,
        }
    }
}

impl RdmaOptions {
    /// The way to an address, from one address here after the other.
    pub(crate) fn way(&self, to: SocketAddr, turn: usize) -> Way {
        Way::by_turns(to, &self.source_addresses, turn)
    }

    /// For a way that others can make up for. A network that is gone does not say so.
    pub(crate) fn for_one_of_several(&self) -> Self {
        const PATIENCE: Duration = Duration::from_secs(2);
        Self { connect_timeout: self.connect_timeout.min(PATIENCE), ..self.clone() }
    }

    /// [`Self::ack_timeout`] as the wire encodes it: n for 4.096 µs × 2ⁿ, 1 to 31.
    pub(crate) fn ack_timeout_exponent(&self) -> u8 {
        let wanted = self.ack_timeout.as_nanos();
        (1..31).find(|exponent| (4096_u128 << exponent) >= wanted).unwrap_or(31)
    }

    /// How long nothing may go through before the link is given up: the first time that a packet is
    /// sent and all others.
    pub(crate) fn patience(&self) -> Duration {
        let timeout = Duration::from_nanos(4096 << self.ack_timeout_exponent());
        timeout * (u32::from(self.retries.min(7)) + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_sizes_are_encoded_as_the_specification_says() {
        let with = |ack_timeout| RdmaOptions { ack_timeout, ..RdmaOptions::default() };
        assert_eq!(with(Duration::ZERO).ack_timeout_exponent(), 1);
        assert_eq!(with(Duration::from_millis(67)).ack_timeout_exponent(), 14);
        assert_eq!(with(Duration::from_millis(250)).ack_timeout_exponent(), 16);
        assert_eq!(with(Duration::MAX).ack_timeout_exponent(), 31);
        assert_eq!(Mtu::ALL.map(Mtu::bytes), [256, 512, 1024, 2048, 4096]);
        assert_eq!(Mtu::ALL.map(Mtu::encoded), [1, 2, 3, 4, 5]);
        assert_eq!(Mtu::ALL.map(|mtu| Mtu::decoded(mtu.encoded())), Mtu::ALL);
    }
}
