//! The proof of the conformance suite: each of these faults is planted in a transport that passes,
//! and is found, by the case that is for it, and with words that say what is wrong. None is found
//! by a hang: what a fault keeps from ending, its case gives up on by itself.

mod channel;
mod fault;
mod lane;
mod link;
mod plot;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use pageferry::testing::conformance::{CASES, Failure, Pair, What, run_all};
use pageferry::testing::memory_transport;

use crate::fault::Fault;
use crate::plot::Plot;

/// A fault, the case that finds it, and a part of what that says.
type Planted = (Fault, &'static str, &'static str);

use Fault as F;

const PLANTED: &[Planted] = &[
    (F::FramesOf600KbAreCut, "frames_go_both_ways_whole_and_in_order", "came as 600000 bytes"),
    (F::LargestFrameLosesItsLastByte, "frames_go_both_ways_whole_and_in_order", "came as 1048575"),
    (F::FramesReordered, "frames_go_both_ways_whole_and_in_order", "came as"),
    (F::FramesMerged, "frames_go_both_ways_whole_and_in_order", "came as"),
    (F::FrameTwice, "frames_go_both_ways_whole_and_in_order", "came as"),
    (F::FrameEmptied, "frames_go_both_ways_whole_and_in_order", "came as 0 bytes"),
    (F::FramesOneWayOnly, "frames_go_both_ways_whole_and_in_order", "a frame comes in"),
    (F::FrameLostAfterTimeout, "a_waiting_control_receiver_times_out", "a frame comes in"),
    (F::FrameLostAfterShortWaits, "timeouts_lose_no_byte", "came as"),
    (F::TimeoutIsLost, "a_waiting_control_receiver_times_out", "Lost"),
    (F::TimeoutAtOnce, "a_waiting_control_receiver_times_out", "waited"),
    (F::TimeoutLate, "a_waiting_control_receiver_times_out", "instead of 50ms"),
    (F::TimeoutNever, "a_waiting_control_receiver_times_out", "waits for a frame end in time"),
    (F::EmptyFrameTaken, "frames_beyond_the_limit_are_refused", "an empty frame"),
    (F::LargeFrameTaken, "frames_beyond_the_limit_are_refused", "a frame beyond the limit: Ok"),
    (F::LargeFrameIsLost, "frames_beyond_the_limit_are_refused", "Lost"),
    (F::SendOfFrameNeverTimesOut, "a_frame_that_nobody_takes_times_out", "gives up in time"),
    (F::SendOfFrameTimesOutAtOnce, "a_frame_that_nobody_takes_times_out", "gave up after"),
    (F::SendOfFrameTimesOutAsLost, "a_frame_that_nobody_takes_times_out", "Lost"),
    (F::FrameAfterHalfAFrame, "a_frame_that_nobody_takes_times_out", "after half of another"),
    (F::FramesWaitForPages, "frames_pass_while_pages_flow", "while data channels are full"),
    (F::NoRunsPerBatch, "capabilities_make_sense", "max_batch_runs of 0"),
    (F::NoBytesPerBatch, "capabilities_make_sense", "max_batch_bytes of 100"),
    (F::TooManyRunsPerBatch, "capabilities_make_sense", "max_batch_runs of 513"),
    (F::CapabilitiesChange, "capabilities_make_sense", "capabilities changed"),
    (F::TooMuchRegistered, "capabilities_make_sense", "bytes registered of"),
    (F::SendersWithoutRegistration, "stages_cannot_be_skipped", "senders before registration"),
    (F::ReceiversWithoutRegistration, "stages_cannot_be_skipped", "receivers before registration"),
    (F::ControlTwice, "stages_cannot_be_taken_twice", "control channel again"),
    (F::SendersTwice, "stages_cannot_be_taken_twice", "the source's data channels again"),
    (F::ReceiversTwice, "stages_cannot_be_taken_twice", "the destination's data channels again"),
    (F::ReceiversWaitForEver, "a_destination_waits_for_channels_in_time", "gives up waiting"),
    (F::ReceiversGiveUpAtOnce, "a_destination_waits_for_channels_in_time", "gave up on channels"),
    (F::ReceiversGiveUpAsLost, "a_destination_waits_for_channels_in_time", "Lost"),
    (F::OneSenderTooFew, "channels_work_side_by_side", "number of senders"),
    (F::InterrupterKeepsMemory, "memory_is_let_go", "still held"),
    (F::ChannelInterrupterKeepsMemory, "memory_is_let_go", "still held"),
    (F::LinkKeepsMemory, "memory_is_let_go", "still held"),
    (F::BitFlipped, "pages_land_in_place", "that differs"),
    (F::LastWordOfPageMissing, "pages_land_in_place", "that differs"),
    (F::PagesOneTooFar, "pages_land_in_place", "that differs"),
    (F::PageBeyondTheRunTouched, "pages_land_in_place", "a page was touched"),
    (F::LastPageOfRunDropped, "pages_land_in_place", "the receiver counted"),
    (F::LastRegionDropped, "pages_land_in_place", "the receiver counted"),
    (F::LastRegionDropped, "channels_work_side_by_side", "that differs"),
    (F::RunsBeyond400Dropped, "batches_as_large_as_can_be_land", "is not there"),
    (F::LargeBatchesInPart, "batches_as_large_as_can_be_land", "of a batch of 256 pages"),
    (F::ChannelsSwapped, "channels_are_the_same_at_both_ends", "zero pages by channel"),
    (F::BatchesSwappedInMidChannel, "batches_land_in_order", "another order"),
    (F::OldBytesKept, "the_newest_bytes_win", "an older version"),
    (F::ZeroRunsIgnored, "zero_runs_zero_pages", "around zero runs"),
    (F::ZeroRunsAsData, "zero_runs_zero_pages", "around zero runs"),
    (F::ZeroRunsOneTooMany, "long_zero_runs_zero_pages", "or beside it"),
    (F::ZeroRunsBeyond16PagesInPart, "long_zero_runs_zero_pages", "or beside it"),
    (F::ZeroesCountedAsData, "long_zero_runs_zero_pages", "the receiver counted"),
    (F::TooManyRunsTaken, "batches_beyond_the_limits_are_refused", "too many runs: Ok"),
    (F::TooManyBytesTaken, "batches_beyond_the_limits_are_refused", "too many bytes: Ok"),
    (F::TooLargeIsOutOfRange, "batches_beyond_the_limits_are_refused", "Lost"),
    (F::DataOutsideTaken, "runs_outside_guest_memory_are_refused", "a data run outside"),
    (F::ZeroOutsideTaken, "runs_outside_guest_memory_are_refused", "a zero run outside"),
    (F::OutsideIsTooLarge, "runs_outside_guest_memory_are_refused", "TooLarge"),
    (F::GoodRunsSentBeforeRefusal, "runs_outside_guest_memory_are_refused", "went out"),
    (F::CountsOfReceiverWrong, "pages_land_in_place", "the receiver counted"),
    (F::SenderCountsNothing, "counters_count", "the sender's counters"),
    (F::ReceiverCountsNothing, "counters_count", "the receiver counts"),
    (F::CountersGoBack, "counters_count", "the sender's counters"),
    (F::TicketsFromZero, "tickets_count_from_one", "the ticket of a batch"),
    (F::TicketsWithGaps, "tickets_count_from_one", "the ticket of a batch"),
    (F::ZeroRunsWithoutTickets, "tickets_count_from_one", "the ticket of a batch"),
    (F::LandedWhenSent, "landed_means_landed", "before anybody received"),
    (F::AcknowledgedBeforeWritten, "landed_means_landed", "landed and is not there"),
    (F::LandingsUntold, "landings_are_told_before_the_source_knows", "told of others"),
    (F::LandingsToldLate, "landings_are_told_before_the_source_knows", "told of others"),
    (F::LandingsOfZeroesUntold, "landings_are_told_before_the_source_knows", "told of others"),
    (F::LandingsInNameOnly, "landings_are_told_before_the_source_knows", "a watch"),
    (F::ReleasedTooEarly, "released_means_released", "after its batch was released"),
    (F::NeverReleased, "tickets_count_from_one", "landed and not released"),
    (F::WatermarksGoBackEveryFourthCall, "watermarks_only_grow", "went back"),
    (F::WatermarksBeyondWhatWasSent, "watermarks_only_grow", "after"),
    (F::LandedBeforeReleased, "watermarks_only_grow", "landed and not released"),
    (F::LookWaits, "a_look_does_not_wait", "a look at the watermarks took"),
    (F::LookWaitsForEver, "a_look_does_not_wait", "do not wait"),
    (F::WaitsReturnAtOnce, "a_wait_is_as_long_as_asked", "ended after"),
    (F::WaitsForEver, "a_wait_is_as_long_as_asked", "end in time"),
    (F::WaitsMuchTooLong, "a_wait_is_as_long_as_asked", "waits of 50ms took"),
    (F::WaitsTheirTimeOut, "a_wait_ends_when_batches_land", "a wait ends when batches land"),
    (F::WaitsWhenAllHasLanded, "a_wait_ends_when_batches_land", "when all has landed"),
    (F::LastBatchNotAcknowledged, "a_wait_ends_when_batches_land", "a wait ends when"),
    (F::OnlyFirstSenderWoken, "an_interrupt_wakes_every_sender", "the sender of channel 1"),
    (F::InterruptedIsLost, "an_interrupt_wakes_every_sender", "Lost"),
    (F::OnlyFirstReceiverWoken, "an_interrupt_wakes_every_receiver", "the receiver of channel 1"),
    (F::ControlWaitNotWoken, "an_interrupt_wakes_the_control_channel", "a wait for a frame"),
    (F::ControlWaitWithTimeNotWoken, "an_interrupt_wakes_the_control_channel", "wait for a frame"),
    (F::DestinationsControlNotWoken, "an_interrupt_wakes_the_control_channel", "wait for a frame"),
    (F::ControlSendNotWoken, "an_interrupt_wakes_the_control_channel", "a send of a frame"),
    (F::OpeningNotWoken, "an_interrupt_wakes_who_opens_channels", "who waits for channels"),
    (F::SendAfterInterruptSucceeds, "an_interrupt_ends_what_comes_later", "a send after"),
    (F::LookAfterInterruptSucceeds, "an_interrupt_ends_what_comes_later", "a look after"),
    (F::FinishAfterInterruptSucceeds, "an_interrupt_ends_what_comes_later", "end of a channel"),
    (F::FrameAfterInterruptSucceeds, "an_interrupt_ends_what_comes_later", "a frame after"),
    (F::ChannelInterruptWakesAll, "an_interrupted_channel_ends_alone", "Interrupted"),
    (F::ChannelInterruptWakesNone, "an_interrupted_channel_ends_alone", "wakes a sender"),
    (F::ChannelInterruptOfReceiverWakesNone, "an_interrupted_channel_ends_alone", "a receiver"),
    (F::ChannelInterruptIsForgotten, "an_interrupted_channel_ends_alone", "a send on an interr"),
    (F::ZeroesWrittenAfterInterrupt, "an_interrupt_ends_a_batch_of_zeroes", "to their end"),
    (F::EndNeverSeen, "an_orderly_end_is_seen", "the end of a channel is seen"),
    (F::EndBeforeLastBatch, "an_orderly_end_is_seen", "pages before the end"),
    (F::FinishDropsLastBatch, "an_orderly_end_is_seen", "pages before the end"),
    (F::FinishWithoutEnd, "an_orderly_end_is_seen", "the end of a channel is seen"),
    (F::ControlEndIsLost, "an_orderly_end_is_seen", "a control channel that was dropped"),
    (F::LossIsClosed, "a_lost_source_is_noticed", "Closed"),
    (F::LossIsEnd, "a_lost_source_is_noticed", "ended in order"),
    (F::LostSourceNotNoticed, "a_lost_source_is_noticed", "a receiver notices"),
    (F::LostControlNotNoticed, "a_lost_source_is_noticed", "control notices"),
    (F::LostControlNotNoticed, "a_lost_destination_is_noticed", "control notices"),
    (F::LostDestinationIsClosed, "a_lost_destination_is_noticed", "Closed"),
    (F::LostDestinationNotNoticed, "a_lost_destination_is_noticed", "a sender notices"),
    (F::LostDestinationNotNoticed, "a_dropped_channel_is_lost_alone", "is lost"),
    (F::LossIsEnd, "a_dropped_channel_is_lost_alone", "Ok(())"),
    (F::LostChannelTakesAll, "a_dropped_channel_is_lost_alone", "Interrupted"),
    (
        F::FramesAreLostWithTheLink,
        "what_was_said_before_a_link_broke_is_heard",
        "before the link broke: Err",
    ),
    (F::ReadsOnePageTooFar, "pages_are_read_into_place", "of region"),
    (F::ReadsFromZero, "requests_land_in_order", "number of a request"),
    (F::ReadsSwapped, "requests_land_in_order", "has landed"),
    (F::ReadsLandedTooEarly, "requests_land_in_order", "has landed"),
    (F::UrgentReadsWait, "a_lane_waits_for_no_other", "urgent requests took"),
    (F::ReadsLandElsewhere, "pages_land_in_the_memory_that_was_given", "of registered memory"),
    (F::ReadOutsideTaken, "requests_beyond_the_limits_are_refused", "Ok"),
    (F::TooLargeReadTaken, "requests_beyond_the_limits_are_refused", "Ok"),
    (F::OneLaneTooFew, "pages_are_read_into_place", "number of lanes"),
    (F::LanesSwapped, "a_lane_ends_alone", ""),
    (F::LaneNotWoken, "an_interrupt_ends_all_lanes", "an interrupt ends the wait for a read"),
    (F::LostLaneNotNoticed, "a_lane_ends_alone", "nobody serves"),
    (
        F::ControlSendNotWoken,
        "cancelling_ends_a_migration_whose_device_state_nobody_takes",
        "cancelling ends a migration",
    ),
];

/// Faults that are tried at once: most of those that take long wait.
const AT_ONCE: usize = 8;

fn healthy() -> Pair {
    let (source, destination) = memory_transport::pair();
    (Box::new(source), Box::new(destination))
}

fn try_fault((fault, case, _): &Planted) -> Result<(), Failure> {
    let plots = Mutex::new(Vec::new());
    let case = CASES.iter().find(|known| known.name == *case);
    let case = case.expect("the case is one of the suite's");
    let result = case.try_run(&|| {
        let plot = Plot::new(*fault);
        plots.lock().expect("nobody panics").push(Arc::clone(&plot));
        link::plant(&plot, healthy())
    });
    // Threads that hang by the fault end now.
    plots.into_inner().expect("nobody panics").iter().for_each(|plot| plot.end());
    result
}

#[test]
fn each_fault_is_found_and_none_by_a_hang() {
    let faults: BTreeSet<String> =
        PLANTED.iter().map(|planted| format!("{:?}", planted.0)).collect();
    assert!(faults.len() >= 61, "only {} faults are planted", faults.len());
    for case in CASES {
        let finds = PLANTED.iter().any(|planted| planted.1 == case.name);
        assert!(finds, "no fault shows what {} is for", case.name);
    }
    let next = AtomicUsize::new(0);
    let wrong = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let Some(planted) = PLANTED.get(next.fetch_add(1, Ordering::SeqCst)) {
                    let (fault, case, words) = planted;
                    let verdict = match try_fault(planted).map_err(|failure| failure.what) {
                        Ok(()) => format!("{fault:?} passes {case}"),
                        Err(What::Wrong(what)) if what.contains(words) => continue,
                        Err(what) => format!("{fault:?}: {case} says {what:?}, and not {words}"),
                    };
                    wrong.lock().expect("nobody panics").push(verdict);
                }
            });
        }
    });
    let wrong = wrong.into_inner().expect("nobody panics");
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), PLANTED.len(), wrong.join("\n"));
}

/// What is found is the fault, and not the wrapper.
#[test]
fn the_wrapper_without_a_fault_passes() {
    run_all(&|| link::plant(&Plot::new(Fault::None), healthy()));
}
