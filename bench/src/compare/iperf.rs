//! iperf3.

use std::net::{Ipv4Addr, TcpListener};
use std::path::PathBuf;
use std::process::Command;

use pageferry_cli::outcome::Failure;
use serde_json::Value;

use super::process::{Running, find as find_program, output};
use super::{CompareArgs, Mover};

pub(super) const NAME: &str = "iperf3";

struct Iperf {
    program: PathBuf,
    bytes: u64,
    streams: u16,
}

pub(super) fn find(args: &CompareArgs) -> Result<Box<dyn Mover>, Failure> {
    let program = find_program("iperf3", "iperf3")?;
    Ok(Box::new(Iperf { program, bytes: args.memory, streams: args.channels }))
}

impl Mover for Iperf {
    fn name(&self) -> String {
        NAME.to_owned()
    }

    fn measure(&mut self) -> Result<f64, Failure> {
        let port = free_port()?.to_string();
        let mut server = Command::new(&self.program);
        server.args(["--server", "--one-off", "--forceflush", "--bind", "127.0.0.1"]);
        let mut server = Running::start(server.args(["--port", &port]))?;
        let _output = server.await_line("Server listening")?;
        let mut client = Command::new(&self.program);
        client.args(["--client", "127.0.0.1", "--port", &port, "--json"]);
        client.args(["--bytes", &self.bytes.to_string()]);
        let text = output(client.args(["--parallel", &self.streams.to_string()]))?;
        let report: Value = serde_json::from_str(&text)?;
        let received = report.pointer("/end/sum_received/bits_per_second").and_then(Value::as_f64);
        let bits = received.ok_or("iperf3 did not say how much was received")?;
        Ok(bits / 1e9)
    }
}

/// A port that nobody has now.
pub(super) fn free_port() -> Result<u16, Failure> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    Ok(listener.local_addr()?.port())
}
