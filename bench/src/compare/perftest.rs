//! perftest's bandwidth tests, over the first RDMA device.

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::iperf::free_port;
use super::process::{Running, find as find_program, output};
use super::{CompareArgs, Mover};
use crate::outcome::Failure;

pub(super) const WRITE: &str = "ib_write_bw";
pub(super) const READ: &str = "ib_read_bw";

const DEVICES: &str = "/sys/class/infiniband";
const MESSAGE_BYTES: u64 = 64 << 10;

struct Perftest {
    name: &'static str,
    program: PathBuf,
    device: Device,
    messages: u64,
    queue_pairs: u16,
}

/// A device with an address of version 4.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Device {
    name: String,
    gid_index: u32,
    address: Ipv4Addr,
}

pub(super) fn find(args: &CompareArgs, name: &'static str) -> Result<Box<dyn Mover>, Failure> {
    let program = find_program(name, "perftest")?;
    let device = device()?;
    let messages = (args.memory / MESSAGE_BYTES).max(5);
    Ok(Box::new(Perftest { name, program, device, messages, queue_pairs: args.channels }))
}

fn device() -> Result<Device, Failure> {
    let none = || format!("there is no RDMA device in {DEVICES} with an IPv4 address");
    let devices = fs::read_dir(DEVICES).map_err(|_| none())?;
    let mut names: Vec<_> = devices.flatten().map(|entry| entry.path()).collect();
    names.sort();
    names.iter().find_map(|path| with_address(path)).ok_or_else(|| none().into())
}

fn with_address(path: &Path) -> Option<Device> {
    let name = path.file_name()?.to_str()?.to_owned();
    (0..16).find_map(|gid_index| {
        let gid = fs::read_to_string(path.join(format!("ports/1/gids/{gid_index}"))).ok()?;
        Some(Device { name: name.clone(), gid_index, address: mapped(gid.trim())? })
    })
}

/// The address in a GID that is an IPv4 one.
fn mapped(gid: &str) -> Option<Ipv4Addr> {
    gid.parse::<std::net::Ipv6Addr>().ok()?.to_ipv4_mapped()
}

impl Mover for Perftest {
    fn name(&self) -> String {
        format!("{} on {}", self.name, self.device.name)
    }

    fn measure(&mut self) -> Result<f64, Failure> {
        let port = free_port()?;
        let mut server = Running::start(&mut self.command(port))?;
        let _output = server.await_line("Waiting for client")?;
        let text = output(self.command(port).arg(self.device.address.to_string()))?;
        average(&text).ok_or_else(|| format!("{} did not say how fast it was", self.name).into())
    }
}

impl Perftest {
    fn command(&self, port: u16) -> Command {
        let mut command = Command::new(&self.program);
        command
            .args(["--report_gbits", "-F", "-d", &self.device.name])
            .args(["-x", &self.device.gid_index.to_string()])
            .args(["-s", &MESSAGE_BYTES.to_string(), "-n", &self.messages.to_string()])
            .args(["-q", &self.queue_pairs.to_string(), "-p", &port.to_string()]);
        command
    }
}

/// The fourth figure of the line that begins with the size.
fn average(text: &str) -> Option<f64> {
    let size = MESSAGE_BYTES.to_string();
    text.lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .find(|columns| columns.first() == Some(&size.as_str()))?
        .get(3)?
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_perftest_prints_is_read() {
        let text = "\
 #bytes     #iterations    BW peak[Gb/sec]    BW average[Gb/sec]   MsgRate[Mpps]
 65536      1000             0.56               0.54               0.001030
---------------------------------------------------------------------------------------
";
        assert_eq!(average(text), Some(0.54));
        assert_eq!(average("Couldn't connect"), None);
    }

    #[test]
    fn addresses_are_found_in_gids() {
        let gid = "0000:0000:0000:0000:0000:ffff:0a4e:0001";
        assert_eq!(mapped(gid), Some(Ipv4Addr::new(10, 78, 0, 1)));
        assert_eq!(mapped("fe80:0000:0000:0000:5054:00ff:fe12:3456"), None);
        assert_eq!(mapped(""), None);
    }
}
