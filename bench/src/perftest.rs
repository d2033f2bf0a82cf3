//! perftest's programs, as something to compare with: both ends on this host, over the device that
//! has an address.

use std::fs;
use std::io::{self, Read};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use pageferry_cli::child::OwnedChild;
use pageferry_cli::outcome::Failure;
use pageferry_cli::say;

use crate::cpus;

/// Nothing of perftest's takes longer than that here.
const PATIENCE: Duration = Duration::from_secs(120);

pub(crate) const WRITE: &str = "ib_write_bw";
pub(crate) const READ: &str = "ib_read_bw";

const DEVICES: &str = "/sys/class/infiniband";

/// Between two looks whether the server listens, or a program has ended.
const GLANCE: Duration = Duration::from_millis(20);

/// Device, port and GID that an address belongs to.
#[derive(Debug, Clone)]
pub(crate) struct Device {
    address: IpAddr,
    name: String,
    port: String,
    gid_index: String,
}

impl Device {
    /// The one that has an address.
    pub(crate) fn of(address: IpAddr) -> Result<Self, Failure> {
        let gid = match address {
            IpAddr::V4(address) => address.to_ipv6_mapped(),
            IpAddr::V6(address) => address,
        };
        let it = Self::entries().find(|(_, entry)| *entry == gid).map(|(device, _)| device);
        it.ok_or_else(|| format!("{address} is no RDMA device's address").into())
    }

    /// The first with an IPv4 address.
    pub(crate) fn first() -> Result<Self, Failure> {
        let it = Self::entries().find(|(_, entry)| entry.to_ipv4_mapped().is_some());
        it.map(|(device, _)| device).ok_or_else(|| {
            format!("there is no RDMA device in {DEVICES} with an IPv4 address").into()
        })
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The RoCE v2 entries of all ports' tables of GIDs, as sysfs has them.
    fn entries() -> impl Iterator<Item = (Self, Ipv6Addr)> {
        let ports = listed(Path::new(DEVICES)).into_iter().flat_map(|device| {
            let ports = listed(&device.join("ports")).into_iter();
            ports.map(move |port| (name(&device), port))
        });
        ports.flat_map(|(device, port)| {
            listed(&port.join("gids")).into_iter().filter_map(move |entry| {
                let read = |path: &Path| fs::read_to_string(path).ok();
                let gid_index = name(&entry);
                let kind = read(&port.join("gid_attrs/types").join(&gid_index))?;
                let gid = read(&entry)?.trim().parse::<Ipv6Addr>().ok()?;
                let address = gid.to_ipv4_mapped().map_or(IpAddr::V6(gid), IpAddr::V4);
                let it = Self { address, name: device.clone(), port: name(&port), gid_index };
                (kind.trim() == "RoCE v2").then_some((it, gid))
            })
        })
    }

    /// Bits a second in 10⁹ on average, of so many messages on each of so many queue pairs, by
    /// `ib_write_bw` or `ib_read_bw`.
    pub(crate) fn gbps(
        &self,
        program: &str,
        bytes: u32,
        queue_pairs: u16,
        messages: u64,
    ) -> Result<f64, Failure> {
        let options = [
            ("-s", bytes.to_string()),
            ("-q", queue_pairs.to_string()),
            // Fewer it does not do.
            ("-n", messages.max(5).to_string()),
        ];
        // #bytes #iterations peak average rate; in MiB, of which it prints more digits.
        let mib = self.run(program, &options, 3, Placed::Anywhere)?;
        Ok(mib * f64::from(1 << 20) * 8.0 / 1e9)
    }

    /// Half the time there and back, of a write of so many bytes: the median, in microseconds. Each
    /// end has a CPU of its own, where there are two.
    pub(crate) fn write_latency_us(&self, bytes: u32, writes: u32) -> Result<f64, Failure> {
        let options = [("-s", bytes.to_string()), ("-n", writes.to_string())];
        // #bytes #iterations min max typical average deviation percentiles
        self.run("ib_write_lat", &options, 4, Placed::Apart)
    }

    /// Runs both ends; the figure in a column of the only line of results. Where perftest misjudges the
    /// CPU's clock, its figures are no numbers: then once more.
    fn run(
        &self,
        program: &str,
        options: &[(&str, String)],
        column: usize,
        placed: Placed,
    ) -> Result<f64, Failure> {
        const TRIES: u32 = 3;
        let mut text = String::new();
        for _ in 0..TRIES {
            text = self.output(program, options, placed)?;
            if let Some(figure) = figure(&text, column) {
                return Ok(figure);
            }
            say!("{program} printed no figure");
        }
        Err(format!("{program} printed no figure, but: {text}").into())
    }

    /// Runs both ends; what the one that measures prints.
    fn output(
        &self,
        program: &str,
        options: &[(&str, String)],
        placed: Placed,
    ) -> Result<String, Failure> {
        // perftest cannot be told to have the kernel choose one.
        let port = TcpListener::bind(SocketAddr::new(self.address, 0))?.local_addr()?.port();
        let command = || {
            let mut command = Command::new(program);
            command.args(["-F", "-d", &self.name, "-i", &self.port, "-x", &self.gid_index]);
            command.args(["-p", &port.to_string()]);
            command.args(options.iter().flat_map(|(name, value)| [*name, value.as_str()]));
            command.stdin(Stdio::null()).stderr(Stdio::piped());
            command
        };
        // A process begins on the CPUs of the thread that starts it.
        let start = |side, command: &mut Command| match placed {
            Placed::Anywhere => End::start(command, program),
            Placed::Apart => cpus::of_side(side, || End::start(command, program)),
        };
        let mut server = start(1, command().stdout(Stdio::null()))?;
        await_listener(port, &mut server)?;
        let to = self.address.to_string();
        let mut client = start(0, command().stdout(Stdio::piped()).arg(to))?;
        let text = client.output()?;
        server.output()?;
        Ok(text)
    }
}

/// Where the two ends run.
#[derive(Debug, Clone, Copy)]
enum Placed {
    Anywhere,
    /// Each on a CPU of its own, where there are two.
    Apart,
}

/// The number in a column of the line that begins with one.
fn figure(text: &str, column: usize) -> Option<f64> {
    let mut columns = text.lines().map(|line| line.split_ascii_whitespace().collect::<Vec<_>>());
    let results = |columns: &Vec<&str>| columns.first().is_some_and(|it| it.parse::<u64>().is_ok());
    columns.rfind(results)?.get(column)?.parse().ok().filter(|figure: &f64| figure.is_finite())
}

/// Waits until somebody listens at a port, by what the kernel lists: to connect would be to start.
fn await_listener(port: u16, server: &mut End) -> Result<(), Failure> {
    const LISTENS: &str = "0A";
    let began = Instant::now();
    let is_it = |line: &str| {
        let columns: Vec<_> = line.split_ascii_whitespace().collect();
        columns.get(1).is_some_and(|local| local.ends_with(&format!(":{port:04X}")))
            && columns.get(3) == Some(&LISTENS)
    };
    loop {
        let tables = ["/proc/net/tcp", "/proc/net/tcp6"].map(fs::read_to_string);
        if tables.iter().flatten().flat_map(|table| table.lines()).any(is_it) {
            return Ok(());
        }
        if server.child.try_wait()?.is_some() {
            return Err(server.failed("ended before it listened"));
        }
        if began.elapsed() > PATIENCE {
            return Err(server.failed("does not listen"));
        }
        thread::sleep(GLANCE);
    }
}

/// A process of perftest's.
struct End {
    program: String,
    child: OwnedChild,
}

impl End {
    fn start(command: &mut Command, program: &str) -> Result<Self, Failure> {
        let child = OwnedChild::spawn(command).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => {
                format!("{program} is not there; install perftest (Debian: perftest)")
            }
            _ => format!("failed to start {program}: {error}"),
        })?;
        Ok(Self { program: program.to_owned(), child })
    }

    /// What it printed, once it has ended well. Little enough for a pipe.
    fn output(&mut self) -> Result<String, Failure> {
        let began = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            if began.elapsed() > PATIENCE {
                return Err(self.failed(&format!("took more than {PATIENCE:?}")));
            }
            thread::sleep(GLANCE);
        };
        if !status.success() {
            return Err(self.failed(&format!("failed ({status})")));
        }
        let mut text = String::new();
        if let Some(mut stdout) = self.child.stdout.take() {
            stdout.read_to_string(&mut text)?;
        }
        Ok(text)
    }

    fn failed(&mut self, how: &str) -> Failure {
        let _ = self.child.kill();
        let mut text = String::new();
        if let Some(mut stderr) = self.child.stderr.take() {
            // What cannot be read does not help.
            let _ = stderr.read_to_string(&mut text);
        }
        format!("{} {how}: {}", self.program, text.trim()).into()
    }
}

fn listed(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut paths: Vec<_> = entries.map(|entry| entry.path()).collect();
    paths.sort();
    paths
}

fn name(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_results_are_the_last_line_of_figures() {
        let text = "\
 #bytes     #iterations    BW peak[Gb/sec]    BW average[Gb/sec]   MsgRate[Mpps]
 1048576    128              0.20               0.18   \t\t   0.000022
---------------------------------------------------------------------------------------
";
        assert_eq!(figure(text, 3), Some(0.18));
        assert_eq!(figure(" 4096 1000 3.1 9.9 inf 4.0", 4), None);
        assert_eq!(figure("RDMA_Write BW Test\n Link type : Ethernet\n", 3), None);
    }
}
