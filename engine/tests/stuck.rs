//! A destination that stops reading in the middle of the device state: cancelling ends the migration,
//! and the guest goes on.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use pageferry::dirty::{DirtyBitmap, DirtyError, DirtySource, DirtySources};
use pageferry::protocol::{Message, negotiate};
use pageferry::testing::TestMemory;
use pageferry::transport::byte_stream::{ByteStream, ByteStreamLink};
use pageferry::transport::{ControlChannel, DestinationLink, Link, Received};
use pageferry::{Error, GuestAtSource, Machine, MachineError, Source, Timeouts};

const PATIENCE: Duration = Duration::from_secs(60);

struct Unix(UnixStream);

impl ByteStream for Unix {
    fn read(&self, into: &mut [u8], timeout: Option<Duration>) -> io::Result<usize> {
        self.0.set_read_timeout(timeout)?;
        (&self.0).read(into)
    }

    fn write(&self, bytes: &[u8], timeout: Option<Duration>) -> io::Result<usize> {
        self.0.set_write_timeout(timeout)?;
        (&self.0).write(bytes)
    }

    fn shut_down(&self) {
        // Already shut down is as good.
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

/// A guest that writes nothing, and has much device state.
struct Idle {
    runs: bool,
}

impl Machine for Idle {
    fn pause(&mut self) -> Result<(), MachineError> {
        self.runs = false;
        Ok(())
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        self.runs = true;
        Ok(())
    }

    fn save(&mut self, state: &mut Vec<u8>) -> Result<(), MachineError> {
        state.resize(32 << 20, 7);
        Ok(())
    }

    fn load(&mut self, _: &[u8]) -> Result<(), MachineError> {
        Err("nobody loads this".into())
    }
}

struct Clean;

impl DirtySource for Clean {
    fn name(&self) -> &'static str {
        "a guest that writes nothing"
    }

    fn start(&self) -> Result<(), DirtyError> {
        Ok(())
    }

    fn harvest(&self, _: &mut DirtyBitmap) -> Result<(), DirtyError> {
        Ok(())
    }

    fn rearm(&self, _: u16, _: u64, _: &[u64]) -> Result<(), DirtyError> {
        Ok(())
    }

    fn put_back(&self, _: &DirtyBitmap) -> Result<(), DirtyError> {
        Ok(())
    }

    fn stop(&self) -> Result<(), DirtyError> {
        Ok(())
    }
}

fn hear(control: &mut ControlChannel) -> Message {
    let frame = control.receiver.receive(Some(PATIENCE)).expect("a frame");
    Message::decode(&frame).expect("a message")
}

fn say(control: &mut ControlChannel, message: &Message) {
    control.sender.send(&message.encode(), PATIENCE).expect("the source listens");
}

#[test]
fn cancelling_ends_a_migration_whose_device_state_nobody_takes() {
    let (here, there) = (TestMemory::new(&[64]), TestMemory::new(&[64]));
    let pair = || UnixStream::pair().expect("a pair of sockets");
    let ((control, their_control), (data, their_data)) = (pair(), pair());
    let link = ByteStreamLink::new("unix", Unix(control), vec![Unix(data)]);
    let mut theirs = ByteStreamLink::new("unix", Unix(their_control), vec![Unix(their_data)]);
    let patient = Timeouts {
        stall: 10 * PATIENCE,
        load: 10 * PATIENCE,
        commit: 10 * PATIENCE,
        ..Timeouts::default()
    };
    let source = Source::new().channels(1).downtime_limit(10 * PATIENCE).timeouts(patient);
    let handle = source.handle();
    let (failure, took) = thread::scope(|scope| {
        let migrating = scope.spawn(|| {
            let dirty = DirtySources::new(vec![Box::new(Clean)]);
            source.migrate(Idle { runs: true }, here.memory(), dirty, Box::new(link))
        });
        let mut control = theirs.control().expect("the control channel");
        let Message::Hello(hello) = hear(&mut control) else { panic!("no greeting") };
        let (_, welcome) = negotiate(&hello, 1, false).expect("it fits");
        say(&mut control, &Message::Welcome(welcome));
        assert_eq!(hear(&mut control), welcome.agreed(&hello));
        theirs.register(there.memory()).expect("register");
        say(&mut control, &Message::Registered);
        assert_eq!(hear(&mut control), Message::Registered);
        let channels = theirs.open_receivers(1, PATIENCE).expect("a channel");
        say(&mut control, &Message::Ready);
        for mut channel in channels {
            scope.spawn(move || while let Ok(Received::Batch(_)) = channel.receive() {});
        }
        loop {
            match hear(&mut control) {
                Message::Ping { number } => say(&mut control, &Message::Pong { number }),
                // And reads no more of it.
                Message::StateChunk(_) => break,
                Message::Round { .. } | Message::Switchover { .. } => {}
                other => panic!("{other:?}"),
            }
        }
        let began = Instant::now();
        handle.cancel();
        let result = migrating.join().expect("no panic");
        (result.map(drop).expect_err("it was cancelled"), began.elapsed())
    });
    assert!(matches!(failure.error, Error::Cancelled), "{}", failure.error.chain());
    assert!(matches!(failure.guest, GuestAtSource::Running) && failure.machine.runs);
    assert!(took < PATIENCE, "{took:?}");
    assert_eq!(Arc::strong_count(here.memory()), 1);
}
