//! Links that are made while wishes are heard.

use std::time::Duration;

use crossbeam_channel::Receiver;
use pageferry::MigrationHandle;
use pageferry::transport::{SourceLink, TransportError};

use super::{Wish, cancels, hearing, steer, unless_given_up};
use crate::transport::{Acceptor, Caller, Chosen};

/// Connects, on a thread of its own so that wishes are heard meanwhile.
pub(crate) fn connect(
    address: &str,
    chosen: Chosen,
    handle: &MigrationHandle,
    wishes: &Receiver<Wish>,
) -> Result<Box<dyn SourceLink>, pageferry::Error> {
    let connector = chosen.connector()?;
    let interrupter = connector.interrupter();
    let address = address.to_owned();
    // It is not waited for after a cancellation: it may be looking up a name.
    let connect = move || connector.connect(&address);
    let connected = unless_given_up(wishes, Duration::ZERO, connect, |wish| {
        steer(handle, &wish);
        cancels(&wish)
    });
    if let (Some(link), false) = connected.map_err(|_| TransportError::Closed)? {
        return Ok(link?);
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
