//! Time limits, and what the sockets are set to.

use std::net::IpAddr;
use std::time::Duration;

use clap::Args;
use pageferry::Timeouts;
use pageferry_tcp::{Keepalive, LEAST_BUFFER_BYTES, TcpOptions, ZeroCopy};

use super::SecurityArgs;
use crate::units::{options, size, time, time_text};

/// Settings of a link, with the library's defaults.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Time limits and sockets")]
pub struct LinkArgs {
    /// For each step of the handshake, and for opening the data channels [default: 10s].
    #[arg(long, value_name = "TIME", value_parser = limit)]
    pub handshake_timeout: Option<Duration>,
    /// For the other side to register each GiB of guest memory, beside the handshake's [default: 5s].
    #[arg(long, value_name = "TIME", value_parser = limit)]
    pub registration_timeout_per_gib: Option<Duration>,
    /// For any page to land [default: 30s].
    #[arg(long, value_name = "TIME", value_parser = limit)]
    pub stall_timeout: Option<Duration>,
    /// For the destination to load the device state [default: 1m].
    #[arg(long, value_name = "TIME", value_parser = limit)]
    pub load_timeout: Option<Duration>,
    /// At the destination: for the source to release what only one host may hold, as long as it says
    /// that it is at that [default: 5m].
    #[arg(long, value_name = "TIME", value_parser = limit)]
    pub release_timeout: Option<Duration>,
    /// For the commit and its answer, 10ms at least; then it is uncertain who has the guest
    /// [default: 30s].
    #[arg(long, value_name = "TIME", value_parser = round_trip)]
    pub commit_timeout: Option<Duration>,
    /// For a link that is lost to come back, or off to end the migration then [default: 30s].
    #[arg(long, value_name = "TIME|off", value_parser = limit_or_off)]
    pub rejoin_timeout: Option<OrOff<Duration>>,
    /// At the source: for one address to accept a connection and to answer [default: 10s].
    #[arg(long, value_name = "TIME", value_parser = limit)]
    pub connect_timeout: Option<Duration>,
    /// At the destination: for a fresh connection to say what it wants [default: 5s].
    #[arg(long, value_name = "TIME", value_parser = limit)]
    pub preamble_timeout: Option<Duration>,
    /// How long sent bytes may stay unacknowledged by the other kernel until the link is lost, 10ms
    /// at least, or off to leave it to the kernel, which takes many minutes [default: 30s].
    #[arg(long, value_name = "TIME|off", value_parser = round_trip_or_off)]
    pub tcp_user_timeout: Option<OrOff<Duration>>,
    /// When a silent connection is probed: silence before the first probe, time between probes,
    /// and how many are not answered until the connection is lost; or off [default: 10s,5s,4].
    #[arg(long, value_name = "TIME,TIME,N|off", value_parser = keepalive)]
    pub keepalive: Option<OrOff<Keepalive>>,
    /// Send buffer of each connection, 64K to net.core.wmem_max [default: as the kernel tunes it].
    #[arg(long, value_name = "SIZE", value_parser = buffer)]
    pub send_buffer: Option<usize>,
    /// Receive buffer of each connection, 64K to net.core.rmem_max [default: as the kernel tunes it].
    #[arg(long, value_name = "SIZE", value_parser = buffer)]
    pub receive_buffer: Option<usize>,
    /// This host's addresses that connections come from, with commas between them, over which data channels are dealt
    /// out [default: by the kernel's routes]. Over RDMA they choose the devices too.
    #[arg(long, value_name = "IP", value_delimiter = ',')]
    pub source_address: Vec<IpAddr>,
    /// Interface that connections are bound to, at either side: eth1 [default: any].
    #[arg(long, value_name = "NAME")]
    pub interface: Option<String>,
    /// Differentiated services code point of packets that go out, 0 to 63.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(0..=63))]
    pub dscp: Option<u8>,
    /// Congestion control, by the kernel's name of it: bbr [default: net.ipv4.tcp_congestion_control].
    #[arg(long, value_name = "NAME")]
    pub congestion_control: Option<String>,
    /// Who may be at the other end.
    #[command(flatten)]
    pub security: SecurityArgs,
}

/// A value, or the word "off".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OrOff<T> {
    /// The value.
    On(T),
    /// "off".
    Off,
}

impl<T> OrOff<T> {
    fn on(self) -> Option<T> {
        match self {
            Self::On(value) => Some(value),
            Self::Off => None,
        }
    }

    fn parse(text: &str, value: impl Fn(&str) -> Result<T, String>) -> Result<Self, String> {
        if text == "off" { Ok(Self::Off) } else { value(text).map(Self::On) }
    }

    fn to_text(&self, value: impl Fn(&T) -> String) -> String {
        match self {
            Self::On(on) => value(on),
            Self::Off => "off".to_owned(),
        }
    }
}

/// Where too late is uncertain, less can only harm: an answer takes a network, and two hosts that are
/// busy.
const LEAST_ROUND_TRIP: Duration = Duration::from_millis(10);

/// A time within which something can happen.
fn limit(text: &str) -> Result<Duration, String> {
    match time(text)? {
        Duration::ZERO => Err("nothing happens in no time; a time is like 300ms or 2s".to_owned()),
        limit => Ok(limit),
    }
}

/// A time for the other side to answer in where it is uncertain who has the guest if it does not.
fn round_trip(text: &str) -> Result<Duration, String> {
    match time(text)? {
        short if short < LEAST_ROUND_TRIP => Err(format!(
            "less than {}: an answer takes a round trip and some work, and if it comes too late it \
             is uncertain who has the guest",
            time_text(&LEAST_ROUND_TRIP)
        )),
        time => Ok(time),
    }
}

fn limit_or_off(text: &str) -> Result<OrOff<Duration>, String> {
    OrOff::parse(text, limit)
}

fn round_trip_or_off(text: &str) -> Result<OrOff<Duration>, String> {
    OrOff::parse(text, round_trip)
}

fn keepalive(text: &str) -> Result<OrOff<Keepalive>, String> {
    OrOff::parse(text, |text| {
        let parts: Vec<_> = text.split(',').collect();
        let [idle, interval, probes] = parts[..] else {
            return Err("probes are like 10s,5s,4".to_owned());
        };
        let (idle, interval) = (limit(idle)?, limit(interval)?);
        match probes.parse() {
            Ok(probes @ 1..=127) => Ok(Keepalive { idle, interval, probes }),
            _ => Err(format!("{probes} is no number of probes, 1 to 127; they are like 10s,5s,4")),
        }
    })
}

fn buffer(text: &str) -> Result<usize, String> {
    match usize::try_from(size(text)?) {
        Ok(bytes) if bytes < LEAST_BUFFER_BYTES => Err(format!(
            "less than {LEAST_BUFFER_BYTES}, the longest segment: a connection waits 40 ms for the \
             acknowledgement of each where its buffer holds no more"
        )),
        Ok(bytes) => Ok(bytes),
        Err(_) => Err("no buffer is as large".to_owned()),
    }
}

impl LinkArgs {
    /// What the engine waits for, and how long.
    pub fn timeouts(&self) -> Timeouts {
        let defaults = Timeouts::default();
        Timeouts {
            handshake: self.handshake_timeout.unwrap_or(defaults.handshake),
            registration_per_gib: self
                .registration_timeout_per_gib
                .unwrap_or(defaults.registration_per_gib),
            stall: self.stall_timeout.unwrap_or(defaults.stall),
            load: self.load_timeout.unwrap_or(defaults.load),
            release: self.release_timeout.unwrap_or(defaults.release),
            rejoin: self
                .rejoin_timeout
                .map_or(defaults.rejoin, |limit| limit.on().unwrap_or(Duration::ZERO)),
            commit: self.commit_timeout.unwrap_or(defaults.commit),
        }
    }

    /// What sockets are set to.
    pub fn tcp(&self, zero_copy: ZeroCopy) -> TcpOptions {
        let defaults = TcpOptions::default();
        TcpOptions {
            admission: defaults.admission,
            connect_timeout: self.connect_timeout.unwrap_or(defaults.connect_timeout),
            preamble_timeout: self.preamble_timeout.unwrap_or(defaults.preamble_timeout),
            user_timeout: self.tcp_user_timeout.map_or(defaults.user_timeout, OrOff::on),
            keepalive: self.keepalive.map_or(defaults.keepalive, OrOff::on),
            send_buffer_bytes: self.send_buffer.or(defaults.send_buffer_bytes),
            receive_buffer_bytes: self.receive_buffer.or(defaults.receive_buffer_bytes),
            zero_copy,
            source_addresses: self.source_address.clone(),
            interface: self.interface.clone(),
            dscp: self.dscp,
            congestion_control: self.congestion_control.clone(),
            security: self.security.security(),
        }
    }

    /// As options of a command line.
    pub fn to_command_line(&self) -> Vec<String> {
        let sources: Vec<_> = self.source_address.iter().map(ToString::to_string).collect();
        let probes = |Keepalive { idle, interval, probes }: &Keepalive| {
            format!("{},{},{probes}", time_text(idle), time_text(interval))
        };
        let mut list = options([
            ("handshake-timeout", self.handshake_timeout.as_ref().map(time_text)),
            (
                "registration-timeout-per-gib",
                self.registration_timeout_per_gib.as_ref().map(time_text),
            ),
            ("stall-timeout", self.stall_timeout.as_ref().map(time_text)),
            ("load-timeout", self.load_timeout.as_ref().map(time_text)),
            ("release-timeout", self.release_timeout.as_ref().map(time_text)),
            ("commit-timeout", self.commit_timeout.as_ref().map(time_text)),
            ("rejoin-timeout", self.rejoin_timeout.map(|limit| limit.to_text(time_text))),
            ("connect-timeout", self.connect_timeout.as_ref().map(time_text)),
            ("preamble-timeout", self.preamble_timeout.as_ref().map(time_text)),
            ("tcp-user-timeout", self.tcp_user_timeout.map(|limit| limit.to_text(time_text))),
            ("keepalive", self.keepalive.map(|keepalive| keepalive.to_text(probes))),
            ("send-buffer", self.send_buffer.map(|bytes| bytes.to_string())),
            ("receive-buffer", self.receive_buffer.map(|bytes| bytes.to_string())),
            ("source-address", (!sources.is_empty()).then(|| sources.join(","))),
            ("interface", self.interface.clone()),
            ("dscp", self.dscp.map(|code_point| code_point.to_string())),
            ("congestion-control", self.congestion_control.clone()),
        ]);
        list.extend(self.security.to_command_line());
        list
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use pageferry::transport::Admission;
    use pageferry_tcp::{Certificates, Identity, KernelTls, Material, Security, Tls};

    use super::*;

    #[derive(Debug, Parser)]
    struct Command {
        #[command(flatten)]
        link: LinkArgs,
    }

    fn parsed(args: &[String]) -> LinkArgs {
        let args = std::iter::once("program".to_owned()).chain(args.iter().cloned());
        Command::try_parse_from(args).expect("a command line").link
    }

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    /// Each setting differs from its default, so that one which is not passed on would show: the
    /// structs are written out, so that one which is new does not compile.
    #[test]
    fn every_setting_arrives_also_by_way_of_a_demo() {
        let given = "--handshake-timeout 1s --registration-timeout-per-gib 11s --stall-timeout 2s --load-timeout 3s --release-timeout 12s --commit-timeout \
                     4s500ms --rejoin-timeout 13s --connect-timeout 5s --preamble-timeout 6s --tcp-user-timeout 7s \
                     --keepalive 8s,9s,10 --send-buffer 1M --receive-buffer 2M \
                     --source-address 192.0.2.7,192.0.2.8 --interface eth1 --dscp 10 --congestion-control bbr \
                     --tls-cert /c --tls-key /k --tls-ca /a --tls-crl /r --tls-crl /s --tls-peer-name there \
                     --kernel-tls off";
        let given: Vec<_> = given.split_whitespace().map(str::to_owned).collect();
        for args in [parsed(&given), parsed(&parsed(&given).to_command_line())] {
            let commit = Duration::from_millis(4500);
            let (handshake, stall, load) = (seconds(1), seconds(2), seconds(3));
            let (registration_per_gib, release) = (seconds(11), seconds(12));
            let rejoin = seconds(13);
            assert_eq!(
                args.timeouts(),
                Timeouts { handshake, registration_per_gib, stall, load, release, rejoin, commit }
            );
            let (idle, interval, probes) = (seconds(8), seconds(9), 10);
            let tcp = TcpOptions {
                admission: Admission::Greeted,
                connect_timeout: seconds(5),
                preamble_timeout: seconds(6),
                user_timeout: Some(seconds(7)),
                keepalive: Some(Keepalive { idle, interval, probes }),
                send_buffer_bytes: Some(1 << 20),
                receive_buffer_bytes: Some(2 << 20),
                zero_copy: ZeroCopy::Off,
                source_addresses: [7, 8].map(|host| IpAddr::from([192, 0, 2, host])).to_vec(),
                interface: Some("eth1".to_owned()),
                dscp: Some(10),
                congestion_control: Some("bbr".to_owned()),
                security: Security::Tls(Tls {
                    identity: Identity::Certificates(Certificates {
                        certificate: Material::File("/c".into()),
                        key: Material::File("/k".into()),
                        authority: Material::File("/a".into()),
                        revoked: vec![Material::File("/r".into()), Material::File("/s".into())],
                    }),
                    peer_name: Some("there".to_owned()),
                    kernel: KernelTls::Off,
                }),
            };
            assert_eq!(args.tcp(ZeroCopy::Off), tcp);
        }
        let off = parsed(&["--tcp-user-timeout=off", "--keepalive=off"].map(str::to_owned));
        let off = parsed(&off.to_command_line()).tcp(ZeroCopy::Auto);
        assert_eq!((off.user_timeout, off.keepalive), (None, None));
        for (given, security) in [
            ("--insecure", Security::PlainText),
            (
                "--shared-key=/key",
                Security::Tls(Tls::new(Identity::SharedKey(Material::File("/key".into())))),
            ),
        ] {
            let given = parsed(&[given.to_owned()]);
            assert_eq!(parsed(&given.to_command_line()).tcp(ZeroCopy::Auto).security, security);
        }
        let defaults = parsed(&[]);
        assert_eq!(defaults.timeouts(), Timeouts::default());
        assert_eq!(defaults.tcp(ZeroCopy::default()), TcpOptions::default());
    }
}
