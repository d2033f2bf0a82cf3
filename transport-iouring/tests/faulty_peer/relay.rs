//! What stands between the two ends, and behaves badly at a chosen byte: to each end it is a peer
//! that does.

use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use pageferry::testing::Random;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::sockopt::{set_socket_linger, set_socket_recv_buffer_size};

/// Of bytes that the source cannot send: it must be waiting for room, or will with the next batch.
const STUCK_BYTES: u64 = 64 << 10;

/// What happens on the data connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Both connections are closed, as of a process that ends.
    Close,
    /// Both are reset.
    Reset,
    /// Nothing more comes to either end, and all that is sent is taken.
    EndBoth,
    /// Nothing more comes to the destination; the source's bytes are taken.
    EndToDestination,
    /// No acknowledgement comes any more.
    EndToSource,
    GarbageToDestination,
    GarbageToSource,
    /// Nothing is read any more; the links are interrupted when the source waits for room.
    Stall,
    /// Nothing at all: the link is interrupted at one end.
    CancelSource,
    CancelDestination,
}

impl Fault {
    pub(crate) const ALL: [Self; 10] = [
        Self::Close,
        Self::Reset,
        Self::EndBoth,
        Self::EndToDestination,
        Self::EndToSource,
        Self::GarbageToDestination,
        Self::GarbageToSource,
        Self::Stall,
        Self::CancelSource,
        Self::CancelDestination,
    ];
}

/// What is to come of the data connection.
struct Plan {
    fault: Fault,
    /// To the destination, until it happens.
    bytes_left: u64,
    random: Random,
    /// Called when it happens.
    strike: Box<dyn FnOnce() + Send>,
}

/// A relay of one control and one data connection, on a thread.
pub(crate) struct Relay {
    address: SocketAddr,
    plan: Arc<Mutex<Option<Plan>>>,
    go_on: Sender<()>,
    thread: JoinHandle<Vec<u8>>,
}

impl Relay {
    pub(crate) fn start(to: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port of loopback");
        // Of those it accepts. Less than the source's kernel queues, so that some of that is still
        // in guest memory when the relay stalls.
        set_socket_recv_buffer_size(&listener, 64 << 10).expect("a small buffer");
        let address = listener.local_addr().expect("it has an address");
        let plan = Arc::new(Mutex::new(None));
        let (go_on, going_on) = channel();
        let relaying =
            Relaying { listener, to, joints: Vec::new(), plan: Arc::clone(&plan), going_on };
        // Any failure is the end of a connection, and with it of the relay.
        let thread = thread::spawn(move || relaying.run().unwrap_or_default());
        Self { address, plan, go_on, thread }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Decides what happens after so many more bytes to the destination.
    pub(crate) fn plan(
        &self,
        fault: Fault,
        bytes_left: u64,
        random: Random,
        strike: impl FnOnce() + Send + 'static,
    ) {
        let plan = Plan { fault, bytes_left, random, strike: Box::new(strike) };
        *self.plan.lock().expect("no panic") = Some(plan);
    }

    /// Waits for the end of the relay; what the source's kernel sent to one that had stalled.
    pub(crate) fn rest(self) -> Vec<u8> {
        // It only listens for that when it has stalled.
        let _ = self.go_on.send(());
        self.thread.join().expect("no panic")
    }
}

struct Relaying {
    listener: TcpListener,
    to: SocketAddr,
    /// To the source and to the destination. The first is control.
    joints: Vec<[TcpStream; 2]>,
    plan: Arc<Mutex<Option<Plan>>>,
    going_on: Receiver<()>,
}

/// What becomes of bytes to the destination.
enum Mode {
    Pass,
    Discard,
    Garble(Random),
}

impl Relaying {
    fn run(mut self) -> io::Result<Vec<u8>> {
        let mut mode = Mode::Pass;
        let mut bytes = vec![0; 64 << 10];
        loop {
            let (comes, ready) = self.wait()?;
            if comes {
                let (near, far) = (self.listener.accept()?.0, TcpStream::connect(self.to)?);
                for socket in [&near, &far] {
                    socket.set_nodelay(true)?;
                    socket.set_nonblocking(true)?;
                }
                self.joints.push([near, far]);
            }
            for (index, from) in ready {
                let joint = &self.joints[index];
                let (mut source, to) = (&joint[from], &joint[1 - from]);
                let received = source.read(&mut bytes)?;
                if received == 0 {
                    return Err(ErrorKind::UnexpectedEof.into());
                }
                let mut received = &mut bytes[..received];
                if (index, from) == (1, 0) {
                    if let Some((plan, before)) = self.due(received.len()) {
                        let (last, rest) = received.split_at_mut(before);
                        pass(last, to)?;
                        if plan.fault == Fault::Stall {
                            return self.stall(rest, plan.strike);
                        }
                        mode = strike(plan, joint)?;
                        received = rest;
                    }
                    match &mut mode {
                        Mode::Pass => {}
                        Mode::Discard => continue,
                        Mode::Garble(random) => garble(received, random),
                    }
                }
                pass(received, to)?;
            }
        }
    }

    /// Whether somebody connects, and which sockets have something: of which joint, which end.
    fn wait(&self) -> io::Result<(bool, Vec<(usize, usize)>)> {
        let mut polled = vec![PollFd::new(&self.listener, PollFlags::IN)];
        polled.extend(self.joints.iter().flatten().map(|end| PollFd::new(end, PollFlags::IN)));
        poll(&mut polled, None)?;
        let ready = |polled: &PollFd<'_>| !polled.revents().is_empty();
        let ends = (0..).zip(&polled[1..]).filter(|(_, polled)| ready(polled));
        Ok((ready(&polled[0]), ends.map(|(at, _): (usize, _)| (at / 2, at % 2)).collect()))
    }

    /// Counts bytes to the destination. The plan, if its time has come, and how many still pass.
    fn due(&self, received: usize) -> Option<(Plan, usize)> {
        let mut plan = self.plan.lock().expect("no panic");
        let left = &mut plan.as_mut()?.bytes_left;
        let before = usize::try_from(*left).unwrap_or(usize::MAX);
        *left = left.saturating_sub(received as u64);
        if before > received { None } else { Some((plan.take()?, before)) }
    }

    /// Reads nothing until it is told to, and then all there is. Strikes when the source's kernel
    /// has a lot that it cannot send, and no more comes.
    fn stall(&self, first: &[u8], strike: Box<dyn FnOnce() + Send>) -> io::Result<Vec<u8>> {
        let mut before = 0;
        loop {
            let queued = queued_bytes(&self.joints[1][0])?;
            if queued >= STUCK_BYTES && queued == before {
                break;
            }
            before = queued;
            thread::yield_now();
        }
        strike();
        // If the test has failed meanwhile, nobody wants it any more.
        let _ = self.going_on.recv();
        let mut near = &self.joints[1][0];
        near.set_nonblocking(false)?;
        near.set_read_timeout(Some(Duration::from_secs(20)))?;
        let mut rest = first.to_vec();
        match near.read_to_end(&mut rest) {
            Err(error) if error.kind() != ErrorKind::ConnectionReset => {
                panic!("a dropped source's connection goes on: {error}")
            }
            _ => Ok(rest),
        }
    }
}

/// What the other end of a connection within this host has not got rid of yet.
fn queued_bytes(end: &TcpStream) -> io::Result<u64> {
    let ports = [end.peer_addr()?.port(), end.local_addr()?.port()];
    let sockets = fs::read_to_string("/proc/self/net/tcp")?;
    let queued = sockets.lines().skip(1).find_map(|line| {
        // "number: address:port address:port state queued-to-send:queued-to-read …", in hex.
        let mut fields = line.split_whitespace().skip(1);
        for port in ports {
            let (_, found) = fields.next()?.split_once(':')?;
            (u16::from_str_radix(found, 16).ok()? == port).then_some(())?;
        }
        let (to_send, _) = fields.nth(1)?.split_once(':')?;
        u64::from_str_radix(to_send, 16).ok()
    });
    queued.ok_or_else(|| ErrorKind::NotConnected.into())
}

/// Makes the trouble, apart from a stall.
fn strike(plan: Plan, [near, far]: &[TcpStream; 2]) -> io::Result<Mode> {
    let Plan { fault, mut random, strike, .. } = plan;
    strike();
    match fault {
        // Returning drops all sockets.
        Fault::Close => return Err(ErrorKind::ConnectionAborted.into()),
        Fault::Reset => {
            set_socket_linger(near, Some(Duration::ZERO))?;
            set_socket_linger(far, Some(Duration::ZERO))?;
            return Err(ErrorKind::ConnectionAborted.into());
        }
        Fault::EndBoth => {
            near.shutdown(Shutdown::Write)?;
            far.shutdown(Shutdown::Write)?;
            return Ok(Mode::Discard);
        }
        Fault::EndToDestination => {
            far.shutdown(Shutdown::Write)?;
            return Ok(Mode::Discard);
        }
        Fault::EndToSource => near.shutdown(Shutdown::Write)?,
        Fault::GarbageToDestination => return Ok(Mode::Garble(random)),
        Fault::GarbageToSource => {
            let mut garbage = [0; 64];
            garble(&mut garbage, &mut random);
            pass(&garbage, near)?;
        }
        Fault::Stall | Fault::CancelSource | Fault::CancelDestination => {}
    }
    Ok(Mode::Pass)
}

fn garble(bytes: &mut [u8], random: &mut Random) {
    for chunk in bytes.chunks_mut(8) {
        chunk.copy_from_slice(&random.next_u64().to_le_bytes()[..chunk.len()]);
    }
}

/// Sends all of it, unless the other side ends the connection.
fn pass(mut bytes: &[u8], mut to: &TcpStream) -> io::Result<()> {
    while !bytes.is_empty() {
        match to.write(bytes) {
            Ok(sent) => bytes = &bytes[sent..],
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                let mut polled = [PollFd::new(to, PollFlags::OUT | PollFlags::RDHUP)];
                poll(&mut polled, None)?;
                if !polled[0].revents().difference(PollFlags::OUT).is_empty() {
                    return Err(ErrorKind::BrokenPipe.into());
                }
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
