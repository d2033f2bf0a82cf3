//! A receiver thread: lets its data channel place batches into guest memory until it ends.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crossbeam_channel::Sender;
use crossbeam_utils::CachePadded;

use crate::error::Error;
use crate::migration::session::Input;
use crate::pages::memory::PAGE_BYTES;
use crate::stats::ChannelGauge;
use crate::transport::{PageReceiver, Received};

/// What a receiver tells the driver, once.
pub(crate) enum ReceiverReport {
    /// The source ended the channel in order.
    Ended,
    /// The channel broke.
    Failed { channel: u16, error: Error },
}

/// The body of a receiver thread.
pub(crate) fn run(
    channel: u16,
    mut pages: Box<dyn PageReceiver>,
    gauges: &Arc<Vec<CachePadded<ChannelGauge>>>,
    feed: &Sender<Input<ReceiverReport>>,
) {
    let gauge = &gauges[usize::from(channel)];
    let report = loop {
        match pages.receive() {
            Ok(Received::Batch(counts)) => {
                gauge.data_pages.fetch_add(counts.data, Ordering::Relaxed);
                gauge.zero_pages.fetch_add(counts.zero, Ordering::Relaxed);
                gauge.landed_bytes.fetch_add(counts.data * PAGE_BYTES, Ordering::Relaxed);
                gauge.publish_counters(&pages.counters());
            }
            Ok(Received::End) => break ReceiverReport::Ended,
            Err(error) => break ReceiverReport::Failed { channel, error: error.into() },
        }
    };
    gauge.publish_counters(&pages.counters());
    // Gone before the report: nothing of the channel lands after it.
    drop(pages);
    // Without a driver nobody wants to know.
    let _ = feed.send(Input::Report(report));
}
