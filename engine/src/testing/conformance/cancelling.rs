//! Cancelling a whole migration, as an engine does it.

use std::sync::Arc;

use super::fixture::say;
use super::{PROMPT, Trial};
use crate::control::protocol::{Message, negotiate};
use crate::pages::dirty::{DirtyBitmap, DirtyError, DirtySource, DirtySources};
use crate::testing::TestMemory;
use crate::transport::{ControlChannel, OneLink, Received};
use crate::{Error, GuestAtSource, Machine, MachineError, Source, Timeouts};

/// More than any system keeps for a connection.
const STATE_BYTES: usize = 32 << 20;

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
        state.resize(STATE_BYTES, 7);
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

/// The next message. A whole engine works between two of them, on a machine that may be emulated.
fn heard(control: &mut ControlChannel) -> Message {
    let frame = control.receiver.receive(Some(5 * PROMPT)).expect("a message comes in");
    Message::decode(&frame).expect("a message")
}

fn told(control: &mut ControlChannel, message: &Message) {
    say(&mut control.sender, &message.encode());
}

/// A destination reads no more in the middle of the device state: cancelling ends the migration all
/// the same, the guest goes on, and its memory is let go.
pub(super) fn cancelling_ends_a_migration_whose_device_state_nobody_takes(trial: &Trial) {
    let (here, there) = (TestMemory::new(&[64]), TestMemory::new(&[64]));
    let (link, mut theirs) = trial.pair();
    // None of these is to end it.
    let patient = Timeouts {
        stall: 60 * PROMPT,
        load: 60 * PROMPT,
        commit: 60 * PROMPT,
        ..Timeouts::default()
    };
    let source = Source::new().channels(1).downtime_limit(60 * PROMPT).timeouts(patient);
    let handle = source.handle();
    let failure = trial.watch.together(|crew| {
        let memory = Arc::clone(here.memory());
        let migrating = crew.spawn(move || {
            let dirty = DirtySources::new(vec![Box::new(Clean)]);
            source.migrate(Idle { runs: true }, &memory, dirty, OneLink::source(link))
        });
        let mut control = theirs.control().expect("the control channel");
        let Message::Hello(hello) = heard(&mut control) else { panic!("no greeting") };
        let (_, welcome) = negotiate(&hello, 1, false, false).expect("it fits");
        told(&mut control, &Message::Welcome(welcome));
        assert_eq!(heard(&mut control), welcome.agreed(&hello));
        theirs.register(there.memory()).expect("register");
        told(&mut control, &Message::Registered);
        assert_eq!(heard(&mut control), Message::Registered);
        let receivers = theirs.open_receivers(1, PROMPT).expect("a channel");
        told(&mut control, &Message::Ready);
        for mut receiver in receivers {
            crew.spawn(move || while let Ok(Received::Batch(_)) = receiver.receive() {});
        }
        loop {
            match heard(&mut control) {
                Message::Ping { number } => told(&mut control, &Message::Pong { number }),
                // And hears no more of it.
                Message::StateChunk(_) => break,
                Message::Round { .. } | Message::Switchover { .. } => {}
                other => panic!("{other:?}"),
            }
        }
        crew.await_standstill("send of a frame");
        handle.cancel();
        let result = migrating.join_promptly("cancelling ends a migration");
        result.map(drop).expect_err("it was cancelled")
    });
    assert!(matches!(failure.error, Error::Cancelled), "{}", failure.error.chain());
    assert!(matches!(failure.guest, GuestAtSource::Running), "{:?}", failure.guest);
    assert!(failure.machine.runs, "the guest stands still");
    let held = Arc::strong_count(here.memory()) - 1;
    assert_eq!(held, 0, "guest memory is still held, {held} times");
}
