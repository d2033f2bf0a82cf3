//! What is done to both ends of the link: the guest writes at every step of a sender, and one channel is
//! late at the destination.

use std::sync::Arc;
use std::time::Duration;

use pageferry::testing::{ChannelCall, WrappedChannel, WrappedDestination, WrappedSource};
use pageferry::transport::{DestinationLink, SourceLink};

use crate::guest::{Guest, Stall};

/// The guest writes whenever a sender does something. Batches have so many pages at most.
pub(crate) fn stepping(
    link: Box<dyn SourceLink>,
    guest: &Arc<Guest>,
    batch_pages: u64,
) -> WrappedSource {
    let guest = Arc::clone(guest);
    WrappedSource::new(link).max_batch_bytes(batch_pages * 4096).channels(move |_, inner| {
        let (before, after) = (Arc::clone(&guest), Arc::clone(&guest));
        let sender = WrappedChannel::new(inner).before(move |call| {
            match call {
                ChannelCall::Send => {
                    before.step();
                    before.stall(Stall::Pages);
                }
                // Waiting goes on for as long as it takes, and would use up the script.
                ChannelCall::Watermarks { waits: false } => before.step(),
                _ => {}
            }
            Ok(())
        });
        Box::new(sender.after(move |call| {
            if call == ChannelCall::Send {
                after.step();
            }
        }))
    })
}

/// No batch for so long: they wait for this one.
const QUIET: Duration = Duration::from_millis(50);

/// A destination that leaves one channel's batches lying until the others bring no more.
pub(crate) fn late(link: Box<dyn DestinationLink>, late: u16) -> WrappedDestination {
    let (batch, batches) = crossbeam_channel::unbounded();
    WrappedDestination::new(link).channels(move |channel, inner| {
        // Batches of the others, until this channel has let them go first.
        let mut others = (channel == late).then(|| batches.clone());
        let batch = batch.clone();
        let receiver = WrappedChannel::new(inner).before(move |_| {
            if let Some(batches) = others.take() {
                while batches.recv_timeout(QUIET).is_ok() {}
            }
            Ok(())
        });
        Box::new(receiver.after(move |_| {
            batch.send(()).ok();
        }))
    })
}
