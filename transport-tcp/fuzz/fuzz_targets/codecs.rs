//! Any bytes are what they claim to be or a typed error; what is accepted says the same when it is encoded again; and
//! what is said in any order has a place in the table or is refused.
#![no_main]

#[path = "../../../device-state/fuzz/src/allocator.rs"]
mod allocator;

use allocator::bounded;
use libfuzzer_sys::fuzz_target;
use pageferry::memory::{Layout, PAGE_BYTES, RegionLayout};
use pageferry::protocol::{Conversation, Message, Side};
use pageferry::transport::MAX_BATCH_RUNS;
use pageferry::transport::stream::{self, FrameHeader, Header, LEAD_BYTES};
use pageferry_tcp::preamble::{Answer, Preamble, check_start};
use pageferry_tcp_fuzz::input::Input;
use pageferry_tcp_fuzz::peer::some_message;

fuzz_target!(|bytes: &[u8]| {
    bounded((256 << 10) + 64 * bytes.len(), || {
        messages(bytes);
        records(bytes);
        firsts(bytes);
    });
    converse(Input::new(bytes));
});

fn messages(bytes: &[u8]) {
    if let Ok(message) = Message::decode(bytes) {
        // Texts are cut, and are shown in one line: after that they stay.
        let again = Message::decode(&message.encode()).expect("what was encoded is decoded");
        assert_eq!(again.encode(), message.encode());
    }
    let header = FrameHeader::of(bytes);
    assert_eq!(FrameHeader::decode(&header.encode()), Ok(header));
    if let Some(header) = bytes.first_chunk() {
        let _ = FrameHeader::decode(header).map(|header| header.frame_bytes());
    }
}

fn records(bytes: &[u8]) {
    let region = |guest_addr, pages| RegionLayout {
        guest_addr,
        len_bytes: pages * PAGE_BYTES,
        backing_page_bytes: PAGE_BYTES,
    };
    let layout = Layout::new(vec![region(0, 100), region(1 << 32, 1000)]).expect("a layout");
    let Some(lead) = bytes.first_chunk::<LEAD_BYTES>() else { return };
    // As it came, and with checksums that fit, so that what is behind them gets to see it.
    for sealed in [false, true] {
        let (mut lead, mut record) = (*lead, bytes.to_vec());
        // More than are allowed, and no more than it takes to see that.
        let runs = usize::from(u16::from_le_bytes([lead[6], lead[7]])).min(MAX_BATCH_RUNS + 1);
        let table = stream::HEADER_BYTES + runs.max(stream::LEAD_RUNS) * stream::RUN_BYTES;
        record.resize(record.len().max(table.next_multiple_of(LEAD_BYTES)), 0);
        if sealed {
            stream::seal(&mut record[..table.next_multiple_of(LEAD_BYTES)]);
            lead.copy_from_slice(&record[..LEAD_BYTES]);
        }
        let due = lead[16..].first_chunk().copied().map_or(0, u64::from_le_bytes);
        let Ok(Header::Batch(header)) = stream::decode_header(&lead, due) else { continue };
        let table = &record[stream::HEADER_BYTES..][..header.table_bytes()];
        let mut runs = Vec::new();
        if stream::decode_table(&header, table, &layout, &mut runs).is_ok() {
            let mut again = Vec::new();
            stream::encode_batch(header.ticket, &runs, header.ack, &mut again);
            assert_eq!(again[stream::HEADER_BYTES..], *table);
        }
    }
    if let Some(ack) = bytes.first_chunk() {
        let _ = stream::decode_ack(*ack, 5, 2);
    }
}

fn firsts(bytes: &[u8]) {
    let _ = check_start(bytes);
    if let Some(preamble) = bytes.first_chunk()
        && let Ok(decoded) = Preamble::decode(preamble)
    {
        assert_eq!(decoded.encode(), *preamble);
    }
    if let Some(answer) = bytes.first_chunk()
        && let Ok(decoded) = Answer::decode(answer)
    {
        assert_eq!(decoded.encode()[10..], answer[10..]);
    }
}

/// Both sides say what the input wants, in any order.
fn converse(mut input: Input<'_>) {
    let mut conversation = Conversation::default();
    for _ in 0..200 {
        if input.is_empty() {
            return;
        }
        let by = if input.byte() % 2 == 0 { Side::Source } else { Side::Destination };
        let message = match input.byte() {
            0xff => Message::decode(input.bytes(64)),
            _ => Ok(some_message(&mut input)),
        };
        if let Ok(message) = message {
            let before = conversation.stage();
            if conversation.take(by, &message).is_err() {
                assert_eq!(conversation.stage(), before, "what is refused changes nothing");
            }
        }
    }
}
