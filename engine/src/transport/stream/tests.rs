use std::collections::HashSet;

use proptest::prelude::*;

use super::*;
use crate::pages::memory::RegionLayout;
use crate::transport::MAX_FRAME_BYTES;

fn layout() -> Layout {
    let region = |guest_addr, pages| RegionLayout {
        guest_addr,
        len_bytes: pages * PAGE_BYTES,
        backing_page_bytes: PAGE_BYTES,
    };
    Layout::new(vec![region(0, 100), region(1 << 32, 1000)]).unwrap()
}

fn a_run() -> impl Strategy<Value = Run> {
    (any::<bool>(), any::<bool>(), 0..90_u64, 1..10_u32).prop_map(
        |(second, zero, first_page, pages)| Run {
            range: PageRange { region: u16::from(second), first_page, pages },
            kind: if zero { RunKind::Zero } else { RunKind::Data },
        },
    )
}

/// At most one in each ten pages, in any order.
fn disjoint_runs() -> impl Strategy<Value = Vec<Run>> {
    let places = (0..1100_u64).step_by(10).collect::<Vec<_>>();
    let places = prop::sample::subsequence(places, 1..=110).prop_shuffle();
    (places, prop::collection::vec(a_run(), 110)).prop_map(|(places, runs)| {
        let at = |place: u64| if place < 100 { (0, place) } else { (1, place - 100) };
        let moved = places.into_iter().zip(runs).map(|(place, run)| {
            let (region, first_page) = at(place);
            Run { range: PageRange { region, first_page, ..run.range }, ..run }
        });
        moved.collect()
    })
}

fn decode(bytes: &[u8], expected: Ticket) -> Result<(BatchHeader, Vec<Run>), StreamError> {
    let (lead, _) = take::<LEAD_BYTES>(bytes);
    let Header::Batch(header) = decode_header(&lead, expected)? else {
        return Err(StreamError::UnknownType(TYPE_END));
    };
    let mut runs = Vec::new();
    let table = &bytes[HEADER_BYTES..];
    let table = &table[..table.len().min(header.table_bytes())];
    decode_table(&header, table, &layout(), &mut runs)?;
    Ok((header, runs))
}

/// As a server hears it.
fn decode_ask(bytes: &[u8], expected: Ticket) -> Result<Vec<Run>, StreamError> {
    let (lead, _) = take::<LEAD_BYTES>(bytes);
    let Request::Read(header) = decode_request(&lead, expected)? else { return Ok(Vec::new()) };
    let mut runs = Vec::new();
    let table = &bytes[HEADER_BYTES..];
    let table = &table[..table.len().min(header.table_bytes())];
    decode_asked(&header, table, &layout(), 1 << 20, &mut runs)?;
    Ok(runs)
}

proptest! {
    /// A request is heard as it was meant, is no batch, and no batch is a request; what is no data, or too much, is refused.
    #[test]
    fn what_is_asked_for_is_heard(runs in disjoint_runs(), ticket: u64) {
        let mut bytes = Vec::new();
        encode_read(ticket, &runs, &mut bytes);
        decode(&bytes, ticket).unwrap_err();
        let bytes_asked: u64 = runs.iter().map(Run::payload_bytes).sum();
        match decode_ask(&bytes, ticket) {
            Ok(heard) => {
                prop_assert_eq!(&heard, &runs);
                prop_assert!(runs.iter().all(|run| run.kind == RunKind::Data));
                prop_assert!(bytes_asked <= 1 << 20);
            }
            Err(StreamError::ZeroPages(_)) => {
                prop_assert!(runs.iter().any(|run| run.kind == RunKind::Zero));
            }
            Err(StreamError::Payload { .. }) => prop_assert!(bytes_asked > 1 << 20),
            Err(other) => prop_assert!(false, "{}", other),
        }
        encode_batch(ticket, &runs, false, &mut bytes);
        decode_ask(&bytes, ticket).unwrap_err();
    }

    #[test]
    fn what_is_encoded_is_decoded(
        runs in disjoint_runs(),
        ticket: u64,
        ack: bool,
    ) {
        let mut bytes = Vec::new();
        encode_batch(ticket, &runs, ack, &mut bytes);
        let (header, decoded) = decode(&bytes, ticket).unwrap();
        prop_assert_eq!(header.ack, ack);
        prop_assert_eq!(bytes.len(), HEADER_BYTES + header.table_bytes());
        prop_assert_eq!(decoded, runs);
    }

    /// In whatever order they are.
    #[test]
    fn a_page_is_in_one_run_or_the_batch_is_refused(runs in prop::collection::vec(a_run(), 1..8)) {
        let mut bytes = Vec::new();
        encode_batch(1, &runs, false, &mut bytes);
        let mut seen = HashSet::new();
        let once = runs.iter().all(|Run { range, .. }| {
            let mut pages = range.first_page..range.first_page + u64::from(range.pages);
            pages.all(|page| seen.insert((range.region, page)))
        });
        match decode(&bytes, 1) {
            Ok((_, decoded)) => prop_assert!(once && decoded == runs),
            Err(StreamError::Twice(_)) => prop_assert!(!once),
            Err(other) => prop_assert!(false, "{}", other),
        }
    }

    #[test]
    fn any_bytes_are_decoded_or_refused(
        mut bytes in prop::collection::vec(any::<u8>(), LEAD_BYTES..400),
        like_a_batch: bool,
        like_a_request: bool,
    ) {
        if like_a_batch {
            bytes[..4].copy_from_slice(b"PFB1");
            bytes[4] = if like_a_request { TYPE_READ } else { TYPE_BATCH };
            bytes[5] &= FLAG_ACK;
            bytes[7] = 0;
            // As far as its table would go.
            let runs = usize::from(u16::from_le_bytes([bytes[6], 0]));
            let end = (HEADER_BYTES + runs.max(LEAD_RUNS) * RUN_BYTES).next_multiple_of(LEAD_BYTES);
            let end = end.min(bytes.len());
            seal(&mut bytes[..end]);
        }
        let (head, _) = take::<HEADER_BYTES>(&bytes);
        let ticket = u64::from_le_bytes(take::<8>(&head[16..]).0);
        // An answer, not a panic; what is accepted lies inside the layout.
        let batch = decode(&bytes, ticket).map(|(_, runs)| runs);
        for runs in [batch, decode_ask(&bytes, ticket)].into_iter().flatten() {
            for Run { range, .. } in runs {
                let region = layout().regions()[usize::from(range.region)];
                prop_assert!(range.first_page + u64::from(range.pages) <= region.pages());
            }
        }
    }
}

/// Whichever bit of a batch's head is changed on the way: nobody takes it for what was sent.
#[test]
fn a_head_that_was_changed_on_the_way_is_known() {
    let mut whole = Vec::new();
    encode_batch(3, &[pages(1)[0]; 9], true, &mut whole);
    for bit in 0..whole.len() * 8 {
        let mut changed = whole.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        let error = decode(&changed, 3).unwrap_err();
        assert!(matches!(error, StreamError::Damaged(_)), "bit {bit}: {error}");
    }
}

proptest! {
    #[test]
    fn a_frame_is_found_behind_its_header(frame in prop::collection::vec(any::<u8>(), 1..300)) {
        let header = FrameHeader::decode(&FrameHeader::of(&frame).encode()).unwrap();
        prop_assert_eq!(header.frame_bytes(), Ok(frame.len()));
        prop_assert_eq!(header.check(&frame), Ok(()));
    }

    #[test]
    fn any_bytes_are_a_frame_header_or_an_error(bytes: [u8; FRAME_HEADER_BYTES], length: u32) {
        // By chance alone it is none.
        let _ = FrameHeader::decode(&bytes).map(|header| header.frame_bytes());
        let header = FrameHeader::with_length(length, &bytes).encode();
        let allowed = (1..=MAX_FRAME_BYTES).contains(&usize::try_from(length).unwrap());
        let decoded = FrameHeader::decode(&header).unwrap();
        prop_assert_eq!(decoded.frame_bytes().is_ok(), allowed);
    }
}

#[test]
fn records_without_runs_are_a_lead_of_zeroes_after_the_type() {
    type Encode = fn(&mut Vec<u8>);
    let cases: [(Encode, Header); 2] =
        [(encode_end, Header::End), (encode_ack_request, Header::AckRequest)];
    for (encode, expected) in cases {
        let mut bytes = vec![0xff; 3];
        encode(&mut bytes);
        let lead: [u8; LEAD_BYTES] = bytes.try_into().unwrap();
        assert_eq!(decode_header(&lead, 7), Ok(expected));
        for byte in 5..LEAD_BYTES {
            let mut wrong = lead;
            wrong[byte] ^= 1;
            let error = decode_header(&wrong, 7).unwrap_err();
            assert!(matches!(error, StreamError::Damaged(_)), "byte {byte}: {error}");
            if !(TABLE_SUM_AT..HEADER_BYTES).contains(&byte) {
                seal(&mut wrong);
                let error = decode_header(&wrong, 7).unwrap_err();
                assert!(matches!(error, StreamError::Reserved(_)), "byte {byte}: {error}");
            }
        }
    }
    let mut lead = [0; LEAD_BYTES];
    lead[..5].copy_from_slice(b"PFB1\x04");
    seal(&mut lead);
    assert_eq!(decode_header(&lead, 1), Err(StreamError::UnknownType(4)));
}

fn pages(pages: u32) -> [Run; 1] {
    [Run { range: PageRange { region: 0, first_page: 0, pages }, kind: RunKind::Data }]
}

#[test]
fn acknowledgements_are_asked_for_by_bytes_and_by_batches() {
    let flags = |count: u32, batches: u64| -> Vec<Ticket> {
        let mut schedule = AckSchedule::default();
        (1..=batches).filter(|ticket| schedule.flag_next(*ticket, &pages(count))).collect()
    };
    assert_eq!(flags(1024, 6), [2, 4, 6]);
    assert_eq!(flags(4096, 2), [1, 2]);
    assert_eq!(flags(1, 130), [64, 128]);
}

/// An answer to a flag may wait for the lead of the next record.
#[test]
fn the_last_batch_is_never_promised_without_a_request() {
    let mut schedule = AckSchedule::default();
    assert!(!schedule.expects_more(0));
    assert!(schedule.flag_next(1, &pages(4096)));
    assert!(!schedule.expects_more(0));
    assert!(!schedule.flag_next(2, &pages(1)));
    assert!(schedule.expects_more(0) && !schedule.expects_more(1));
    schedule.requested(2);
    assert!(schedule.expects_more(1) && !schedule.expects_more(2));
    // A flag from before the request does not take back what the request promised.
    assert!(!schedule.flag_next(3, &pages(1)));
    assert!(schedule.expects_more(1) && !schedule.expects_more(2));
}

#[test]
fn runs_outside_the_layout_are_refused() {
    for (region, first_page, pages) in [(0, 99, 2), (2, 0, 1), (0, u64::MAX, 1), (0, 0, 0)] {
        let range = PageRange { region, first_page, pages };
        let mut bytes = Vec::new();
        encode_batch(1, &[Run { range, kind: RunKind::Data }], false, &mut bytes);
        assert_eq!(decode(&bytes, 1), Err(StreamError::OutOfRange(range)));
    }
}

#[test]
fn what_a_batch_has_zeroed_is_bounded() {
    let large = RegionLayout {
        guest_addr: 0,
        len_bytes: 4 * MAX_BATCH_ZERO_PAGES * PAGE_BYTES,
        backing_page_bytes: PAGE_BYTES,
    };
    let large = Layout::new(vec![large]).unwrap();
    let most = u32::try_from(MAX_BATCH_ZERO_PAGES).unwrap();
    let zero = |first_page, pages| Run {
        range: PageRange { region: 0, first_page, pages },
        kind: RunKind::Zero,
    };
    let decode = |runs: &[Run]| {
        let mut bytes = Vec::new();
        encode_batch(1, runs, false, &mut bytes);
        let Header::Batch(header) = decode_header(&take(&bytes).0, 1)? else { unreachable!() };
        decode_table(&header, &bytes[HEADER_BYTES..], &large, &mut Vec::new())
    };
    let counts = PageCounts { zero: MAX_BATCH_ZERO_PAGES, ..PageCounts::default() };
    assert_eq!(decode(&[zero(7, most)]), Ok(counts));
    assert_eq!(decode(&[zero(7, most / 2), zero(most.into(), most - most / 2)]), Ok(counts));
    let too_many = Err(StreamError::ZeroPages(MAX_BATCH_ZERO_PAGES + 1));
    assert_eq!(decode(&[zero(7, most + 1)]), too_many);
    assert_eq!(decode(&[zero(0, most), zero(most.into(), 1)]), too_many);
    let same = [zero(9, 1); MAX_BATCH_RUNS];
    assert_eq!(decode(&same), Err(StreamError::Twice(same[0].range)));
}

#[test]
fn what_a_table_does_not_use_is_zero() {
    let mut bytes = Vec::new();
    encode_batch(1, &pages(1), false, &mut bytes);
    assert_eq!(bytes.len(), LEAD_BYTES);
    for byte in HEADER_BYTES + RUN_BYTES..LEAD_BYTES {
        let mut wrong = bytes.clone();
        wrong[byte] = 1;
        seal(&mut wrong);
        assert_eq!(decode(&wrong, 1), Err(StreamError::Unused), "byte {byte}");
    }
}

#[test]
fn acknowledgements_only_grow_and_never_pass_what_was_sent() {
    assert_eq!(decode_ack(encode_ack(5), 5, 5), Ok(5));
    assert!(decode_ack(encode_ack(6), 5, 0).is_err());
    assert!(decode_ack(encode_ack(1), 5, 2).is_err());
}

/// Sends what is due, of which so many bytes fit at a time.
fn write(acks: &mut AckWriter, landed: Ticket, mut room: usize, out: &mut Vec<u8>) {
    while acks.is_due(landed) {
        if room == 0 {
            return acks.no_room();
        }
        let next = acks.next(landed);
        let fits = next.len().min(room);
        out.extend_from_slice(&next[..fits]);
        room -= fits;
        acks.sent(fits);
    }
}

#[test]
fn the_newest_acknowledgement_replaces_what_did_not_fit() {
    let (mut acks, mut out) = (AckWriter::default(), Vec::new());
    assert!(!acks.is_due(0) && acks.is_between());
    write(&mut acks, 3, 5, &mut out);
    assert!(acks.is_stuck() && acks.is_due(3) && !acks.is_between());
    // Others land meanwhile; what is half out has to go first.
    for landed in 4..9 {
        write(&mut acks, landed, 0, &mut out);
    }
    write(&mut acks, 9, 100, &mut out);
    assert!(!acks.is_stuck() && !acks.is_due(9) && acks.is_between());
    assert_eq!(out, [encode_ack(3), encode_ack(9)].concat());
}

#[test]
fn an_acknowledgement_that_did_not_begin_is_due_again_and_none_where_nobody_is() {
    let (mut acks, mut out) = (AckWriter::default(), Vec::new());
    write(&mut acks, 3, 100, &mut out);
    assert_eq!(acks.next(5), encode_ack(5));
    acks.withdraw();
    assert!(!acks.is_due(3) && acks.is_due(4) && acks.is_between());
    acks.nobody();
    assert!(!acks.is_due(9) && !acks.is_stuck() && !acks.is_between());
}
