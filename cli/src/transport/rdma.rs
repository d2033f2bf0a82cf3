//! Options of RDMA.

use std::time::Duration;

use super::Transport;
use crate::units::{options, time, time_text, value_name};
use clap::{Args, ValueEnum};

/// What a program says that was built without it.
pub const WITHOUT_RDMA: &str = "this program was built without RDMA; build it with --features rdma (which needs \
                                cmake and libclang)";

/// Settings of `--transport rdma`.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "With --transport rdma")]
pub struct RdmaArgs {
    /// The device that the address must belong to [default: whichever it does].
    #[arg(long, value_name = "NAME")]
    pub rdma_device: Option<String>,
    /// The port of it [default: whichever it is].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..))]
    pub rdma_port: Option<u8>,
    /// Index in the port's table of GIDs, on RoCE: of the address that is connected from, or listened
    /// at [default: the one of the address].
    #[arg(long, value_name = "N")]
    pub rdma_gid_index: Option<u8>,
    /// Largest path MTU [default: the largest that both ports and the way between them have].
    #[arg(long, value_name = "BYTES", value_parser = ["256", "512", "1024", "2048", "4096"])]
    pub rdma_mtu: Option<String>,
    /// Traffic class of all packets, for networks that treat RDMA apart.
    #[arg(long, value_name = "N")]
    pub rdma_traffic_class: Option<u8>,
    /// When guest memory is registered [default: at-start].
    #[arg(long, value_name = "WHEN")]
    pub rdma_registration: Option<RdmaRegistration>,
    /// Time without acknowledgement after which a packet is sent again [default: 250ms].
    #[arg(long, value_name = "TIME", value_parser = time)]
    pub rdma_ack_timeout: Option<Duration>,
    /// How often it is sent again before the link is lost [default: 7].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(0..=7))]
    pub rdma_retries: Option<u8>,
    /// Pages may go in plain text to or from another host, where a shared key or certificates keep the rest: NICs
    /// encrypt nothing, so whoever is on the way can read the guest's memory, and change it.
    #[arg(long)]
    pub plaintext_data: bool,
}

/// When guest memory is registered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RdmaRegistration {
    /// All of it before the first page.
    AtStart,
    /// Chunk by chunk, while pages flow.
    Ahead,
}

impl RdmaArgs {
    /// Whether any was given: such options choose RDMA.
    pub fn is_given(&self) -> bool {
        !self.to_command_line().is_empty()
    }

    /// Whether they are for this transport.
    pub fn check(&self, transport: Transport) -> Result<(), String> {
        match (transport, self.to_command_line().first()) {
            (Transport::Tcp | Transport::IoUring, Some(option)) => {
                Err(format!("{option} is for --transport rdma"))
            }
            _ => Ok(()),
        }
    }

    /// As options of a command line.
    pub fn to_command_line(&self) -> Vec<String> {
        let mut list = options([
            ("rdma-device", self.rdma_device.clone()),
            ("rdma-port", self.rdma_port.map(|port| port.to_string())),
            ("rdma-gid-index", self.rdma_gid_index.map(|index| index.to_string())),
            ("rdma-mtu", self.rdma_mtu.clone()),
            ("rdma-traffic-class", self.rdma_traffic_class.map(|class| class.to_string())),
            ("rdma-registration", self.rdma_registration.as_ref().map(value_name)),
            ("rdma-ack-timeout", self.rdma_ack_timeout.as_ref().map(time_text)),
            ("rdma-retries", self.rdma_retries.map(|retries| retries.to_string())),
        ]);
        list.extend(self.plaintext_data.then(|| "--plaintext-data".to_owned()));
        list
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Command {
        #[arg(long, default_value = "auto")]
        transport: Transport,
        #[command(flatten)]
        rdma: RdmaArgs,
    }

    #[test]
    fn options_of_rdma_choose_it() {
        let args = Command::try_parse_from(["program", "--rdma-mtu=4096"]).unwrap();
        assert_eq!(args.transport.meant(&args.rdma), Transport::Rdma);
        args.rdma.check(args.transport).unwrap();
        assert_eq!(Transport::Auto.meant(&RdmaArgs::default()), Transport::Auto);
        let refused = args.rdma.check(Transport::Tcp).unwrap_err();
        assert_eq!(refused, "--rdma-mtu is for --transport rdma");
        let args = Command::try_parse_from(["program", "--plaintext-data"]).unwrap();
        let refused = args.rdma.check(Transport::Tcp).unwrap_err();
        assert_eq!(refused, "--plaintext-data is for --transport rdma");
    }
}
