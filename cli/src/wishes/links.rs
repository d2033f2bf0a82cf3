//! Links that are made while wishes are heard.

use std::time::Duration;

use crossbeam_channel::Receiver;
use pageferry::MigrationHandle;
use pageferry::transport::{Connector, LinkPurpose, TransportError};

use super::{Wish, cancels, hearing, steer, unless_given_up};
use crate::transport::{Acceptor, Begun, Caller, Chosen};

/// Connects, on a thread of its own so that wishes are heard meanwhile. What makes further links has the first one.
pub(crate) fn connect(
    address: &str,
    chosen: &Chosen,
    handle: &MigrationHandle,
    wishes: &Receiver<Wish>,
) -> Result<Box<dyn Connector>, pageferry::Error> {
    let mut dialler = chosen.dialler(address);
    let interrupter = dialler.interrupter();
    // It is not waited for after a cancellation: it may be looking up a name.
    let connect = move || {
        let first = dialler.connect(LinkPurpose::Begin)?;
        Ok::<Box<dyn Connector>, TransportError>(Box::new(Begun::with(first, dialler)))
    };
    let connected = unless_given_up(wishes, Duration::ZERO, connect, |wish| {
        steer(handle, &wish);
        cancels(&wish)
    });
    if let (Some(connector), false) = connected.map_err(|_| TransportError::Closed)? {
        return Ok(connector?);
    }
    interrupter.interrupt();
    Err(pageferry::Error::Cancelled)
}

/// Waits for somebody who connects; `None` if somebody wants this to end first.
pub(crate) fn accept(
    chosen: &Chosen,
    acceptor: &Acceptor,
    wishes: &Receiver<Wish>,
) -> Result<Option<Caller>, TransportError> {
    let interrupt = acceptor.interrupter();
    let accept = || chosen.accept(acceptor);
    let mut ended = false;
    let accepted = hearing(wishes, accept, |wish| match wish {
        Wish::Interrupt | Wish::Quit => {
            ended = true;
            interrupt.interrupt();
        }
        _ => say!("there is no guest here yet: it is waited for"),
    });
    let accepted = accepted.map_err(|_| TransportError::Closed)?;
    if ended { Ok(None) } else { Ok(Some(accepted?)) }
}
