use proptest::prelude::*;

use super::super::table::TABLE;
use super::super::{
    FailureReason, Hello, MigrationKey, PROTOCOL_VERSION, Prepare, Rejoin, Rejoined, Welcome,
    negotiate, table,
};
use super::*;
use crate::control::protocol::MAX_STATE_CHUNK_BYTES;
use crate::pages::memory::PAGE_BYTES;

const CHANNELS: u16 = 3;
const PAGES: [u64; 2] = [100, 7];

fn hello(verify: bool) -> Hello {
    let region = |(index, pages): (u64, u64)| RegionLayout {
        guest_addr: index << 32,
        len_bytes: pages * PAGE_BYTES,
        backing_page_bytes: PAGE_BYTES,
    };
    let layout = Layout::new((0..).zip(PAGES).map(region).collect()).unwrap();
    Hello::new(MigrationKey::of_a_test(), layout, CHANNELS, verify, b"a machine".to_vec())
}

fn welcome(hello: &Hello, wants_data_ranges: bool) -> Welcome {
    negotiate(hello, CHANNELS, wants_data_ranges, false).unwrap().1
}

/// On the next link, after a round and a switchover.
fn rejoin(committed: bool) -> Message {
    Message::Rejoin(Rejoin {
        oldest_version: PROTOCOL_VERSION,
        newest_version: PROTOCOL_VERSION,
        key: MigrationKey::of_a_test(),
        epoch: 1,
        rounds: 1,
        switchovers: 1,
        committed,
    })
}

fn rejoined(epoch: u32, written: Vec<PageRange>) -> Message {
    Message::Rejoined(Rejoined { epoch, written })
}

fn range(region: u16, first_page: u64, pages: u32) -> PageRange {
    PageRange { region, first_page, pages }
}

/// Who says what. A script is one conversation, as one who hears both sides at once hears it.
type Script = Vec<(Side, Message)>;

use Side::{Destination as D, Source as S};

fn greeting(verify: bool, ranges: bool) -> Script {
    let hello = hello(verify);
    let welcome = welcome(&hello, ranges);
    let agreed = welcome.agreed(&hello);
    vec![(S, Message::Hello(hello)), (D, Message::Welcome(welcome)), (S, agreed)]
}

fn opening(verify: bool, ranges: bool) -> Script {
    let mut script = greeting(verify, ranges);
    script.extend([(D, Message::Registered), (S, Message::Registered), (D, Message::Ready)]);
    if ranges {
        script.push((S, Message::DataRanges(vec![range(0, 5, 10), range(1, 0, 7)])));
    }
    script.push((S, round(1)));
    script
}

fn round(round: u32) -> Message {
    Message::Round { round, dirty_pages: 107 }
}

fn prepare(attempt: u32, state_bytes: u64) -> Message {
    let (sums, samples) = (Vec::new(), Vec::new());
    Message::Prepare(Prepare { attempt, state_bytes, paused: false, sums, samples })
}

fn prepared(attempt: u32) -> Message {
    let (written, damaged) = (Vec::new(), Vec::new());
    Message::Prepared(Prepared { attempt, load_ns: 1, written, damaged })
}

fn failed() -> Message {
    Message::Failed { reason: FailureReason::Host, text: String::new() }
}

fn verified(attempt: u32) -> Message {
    Message::Verified { attempt, digest: Digest::default() }
}

fn compared(attempt: u32) -> Message {
    Message::Compared { attempt, digest: Digest::default() }
}

fn chunk(bytes: usize) -> Message {
    Message::StateChunk(vec![1; bytes])
}

fn after(script: &[(Side, Message)]) -> Conversation {
    let mut conversation = Conversation::default();
    for (by, message) in script {
        conversation.take(*by, message).unwrap_or_else(|refusal| panic!("{refusal}"));
    }
    conversation
}

/// A conversation that stands at that stage, with a ping, a verify and a prepare unanswered where
/// they may be.
fn at(stage: Stage) -> Conversation {
    let to_switching = [(S, Message::Switchover { attempt: 1 })];
    let to_comparing = [(S, Message::Verify { attempt: 1 })];
    let to_answered = [(D, verified(1))];
    let to_compared = [(S, compared(1))];
    let to_loading = [(S, chunk(3)), (S, prepare(1, 3))];
    let to_committed = [(D, prepared(1)), (S, Message::Commit)];
    let whole: Script = [
        opening(true, true),
        to_switching.to_vec(),
        to_comparing.to_vec(),
        to_answered.to_vec(),
        to_compared.to_vec(),
        to_loading.to_vec(),
        to_committed.to_vec(),
        vec![(D, Message::Resumed { resume_ns: 1 }), (S, Message::Heard)],
    ]
    .concat();
    let mut conversation = Conversation::default();
    if stage == Stage::SourceRegistered {
        conversation = after(&greeting(true, true));
        conversation.take(S, &Message::Registered).unwrap();
        return conversation;
    }
    if stage == Stage::Returned {
        conversation = after(&greeting(true, true)).on_next_link();
        conversation.take(S, &rejoin(false)).unwrap();
        return conversation;
    }
    for (by, message) in &whole {
        // Right after a round, so that a switchover may follow.
        if conversation.stage() == stage && (stage != Stage::Copying || conversation.rounds == 1) {
            return conversation;
        }
        conversation.take(*by, message).unwrap();
    }
    assert_eq!(conversation.stage(), stage);
    conversation
}

/// A message of that kind whose numbers are right for this conversation, if any are.
fn fitting(kind: Kind, conversation: &Conversation) -> Message {
    let attempt = conversation.switchovers;
    let asked = |of: fn(&Question) -> Option<u32>| {
        conversation.questions.front().and_then(of).unwrap_or(attempt)
    };
    let (hello, wants) = (hello(true), true);
    match kind {
        Kind::Hello => Message::Hello(hello),
        Kind::Welcome => Message::Welcome(welcome(&hello, wants)),
        Kind::Rejoin => rejoin(false),
        Kind::Rejoined => rejoined(conversation.epoch, vec![range(0, 0, 100)]),
        Kind::Heard => Message::Heard,
        Kind::Agreed => welcome(&hello, wants).agreed(&hello),
        Kind::Registered => Message::Registered,
        Kind::Ready => Message::Ready,
        Kind::DataRanges => Message::DataRanges(vec![range(0, 0, 100), range(1, 1, 6)]),
        Kind::Round => round(conversation.rounds + 1),
        Kind::Ping => Message::Ping { number: conversation.pings + 1 },
        Kind::Pong => Message::Pong { number: conversation.pings },
        Kind::CloseChannel => Message::CloseChannel { channel: 0 },
        Kind::ChannelClosed => Message::ChannelClosed { channel: 2 },
        Kind::Switchover => Message::Switchover { attempt: attempt + 1 },
        Kind::Verify => Message::Verify { attempt },
        Kind::Verified => verified(asked(|question| match question {
            Question::Verify(attempt) => Some(*attempt),
            _ => None,
        })),
        Kind::Compared => compared(attempt),
        Kind::StateChunk => chunk(5),
        Kind::Prepare => prepare(attempt, conversation.state_bytes),
        Kind::Prepared => prepared(asked(|question| match question {
            Question::Prepare(attempt) => Some(*attempt),
            _ => None,
        })),
        Kind::CalledOff => Message::CalledOff { attempt },
        Kind::Releasing => Message::Releasing,
        Kind::Commit => Message::Commit,
        Kind::Resumed => Message::Resumed { resume_ns: 1 },
        Kind::GaveBack => Message::GaveBack { text: String::new() },
        Kind::Failed => failed(),
    }
}

/// Every cell of the table: each kind, of each side, at each stage.
#[test]
fn every_cell_is_as_the_table_says() {
    let mut moves = 0;
    for stage in Stage::ALL {
        for kind in Kind::ALL {
            for by in [S, D] {
                let mut conversation = at(stage);
                // An answer needs its question, also a late one of a switchover called off.
                let question = match kind {
                    Kind::Pong => Some(Question::Ping(conversation.pings)),
                    Kind::Verified => Some(Question::Verify(conversation.switchovers)),
                    Kind::Prepared => Some(Question::Prepare(conversation.switchovers)),
                    _ => None,
                };
                if let Some(question) = question {
                    conversation.questions = VecDeque::from([question]);
                }
                let mut expected = follows(kind, by, stage);
                if stage == Stage::Switching && matches!(kind, Kind::StateChunk | Kind::Prepare) {
                    // Verification was agreed on.
                    expected = None;
                }
                if stage == Stage::Silence && kind == Kind::Rejoin {
                    // It is the first link.
                    expected = None;
                }
                let message = fitting(kind, &conversation);
                let before = conversation.clone();
                match (conversation.take(by, &message), expected) {
                    (Ok(()), Some(next)) => {
                        let next = if kind == Kind::Ready { Stage::Mapping } else { next };
                        assert_eq!(conversation.stage(), next, "{kind} of the {by} at {stage}");
                        moves += 1;
                    }
                    (Err(refusal), None) => {
                        assert_eq!((refusal.kind, refusal.by, refusal.stage), (kind, by, stage));
                        assert_eq!(conversation, before, "a refusal changed something");
                    }
                    (taken, expected) => {
                        panic!("{kind} of the {by} at {stage}: {taken:?}, not {expected:?}")
                    }
                }
            }
        }
    }
    let cells: usize = TABLE.iter().map(|row| row.moves.len()).sum();
    // All but the two that verification forbids, and a return to what has not begun.
    assert_eq!(moves, cells - 3);
}

#[test]
fn the_documentation_has_this_table() {
    let document = include_str!("../../../../../docs/protocol.md");
    assert!(document.contains(&table()), "docs/protocol.md lacks\n\n{}", table());
    for kind in Kind::ALL {
        let row = format!("| {} | {kind} |", kind as u16);
        assert!(document.contains(&row), "docs/protocol.md has no row {row}");
    }
}

#[test]
fn what_was_never_sensible_is_refused() {
    let refused = |script: &Script, by, message: Message, why| {
        let refusal = after(script).take(by, &message).expect_err("it makes no sense");
        assert_eq!(refusal.why, why, "{message:?}");
    };
    let number = |number, due| Why::Number { number, due };
    let copying = opening(false, false);
    refused(&copying, S, round(9), number(9, 2));
    refused(&copying, S, round(1), number(1, 2));
    let pages = Message::Round { round: 2, dirty_pages: u64::MAX };
    refused(&copying, S, pages, Why::Pages { pages: u64::MAX, all: 107 });
    refused(&copying, S, Message::CalledOff { attempt: 1 }, Why::Stage);
    refused(&copying, S, prepare(1, 0), Why::Stage);
    refused(&copying, S, Message::Switchover { attempt: 2 }, number(2, 1));
    refused(&copying, D, prepared(1), Why::Unasked);
    refused(
        &copying,
        D,
        Message::ChannelClosed { channel: 3 },
        Why::Channel { channel: 3, channels: 3 },
    );

    let switching = [copying.clone(), vec![(S, Message::Switchover { attempt: 1 })]].concat();
    for attempt in [0, 7] {
        refused(&switching, S, prepare(attempt, 0), number(attempt, 1));
        refused(&switching, S, Message::CalledOff { attempt }, number(attempt, 1));
    }
    refused(&switching, D, prepared(1), Why::Unasked);
    refused(&switching, S, Message::Verify { attempt: 1 }, Why::NotAgreed);
    refused(&switching, S, chunk(0), Why::StateBytes(0));
    refused(&switching, S, prepare(1, 1), Why::StateBytes(1));

    let verifying = [opening(true, false), vec![(S, Message::Switchover { attempt: 1 })]].concat();
    refused(&verifying, S, Message::Verify { attempt: 0 }, number(0, 1));
    refused(&verifying, S, prepare(1, 0), Why::NotCompared);
    refused(&verifying, S, chunk(1), Why::NotCompared);

    let closed = |channel| (D, Message::ChannelClosed { channel });
    let one_left = [copying, vec![closed(2), closed(0)]].concat();
    refused(&one_left, D, closed(0).1, Why::ChannelTwice(0));
    refused(&one_left, D, closed(1).1, Why::LastChannel(1));

    let close = |channel| (S, Message::CloseChannel { channel });
    refused(&opening(false, true)[..6].to_vec(), S, close(0).1, Why::Stage);
    refused(&switching, S, close(3).1, Why::Channel { channel: 3, channels: 3 });
    let one_wanted = [switching, vec![close(2), close(0)]].concat();
    refused(&one_wanted, S, close(2).1, Why::ChannelTwice(2));
    refused(&one_wanted, S, close(1).1, Why::LastChannel(1));
    // They may cross: the destination had closed these by itself.
    after(&[one_left, vec![close(2), close(1)]].concat());

    let failing = [opening(false, false), vec![(S, failed())]].concat();
    refused(&failing, S, round(2), Why::Ended);
}

#[test]
fn each_link_begins_as_it_should_and_goes_on_from_where_the_source_is() {
    let first = after(&opening(true, true));
    let refusal = first.on_next_link().take(S, &Message::Hello(hello(true))).unwrap_err();
    assert_eq!(refusal.why, Why::NotFirst);
    let refusal = Conversation::default().take(S, &rejoin(false)).unwrap_err();
    assert_eq!(refusal.why, Why::Unknown);

    let mut again = first.on_next_link();
    again.take(S, &rejoin(false)).unwrap();
    for epoch in [0, 2, u32::MAX] {
        let refusal = again.take(D, &rejoined(epoch, Vec::new())).unwrap_err();
        assert_eq!(refusal.why, Why::Epoch { epoch, asked: 1 });
    }
    let outside = vec![range(2, 0, 1)];
    assert_eq!(again.take(D, &rejoined(1, outside)).unwrap_err().why, Why::Ranges);
    for (by, message) in [
        (D, rejoined(1, vec![range(1, 0, 7)])),
        (S, Message::Registered),
        (D, Message::Registered),
        (D, Message::Ready),
        // No data ranges, which were said or do without; and numbers go on.
        (S, round(2)),
        (S, Message::Switchover { attempt: 2 }),
        (S, Message::Verify { attempt: 2 }),
    ] {
        again.take(by, &message).unwrap_or_else(|refusal| panic!("{refusal}"));
    }

    let mut committed = first.on_next_link();
    for (by, message) in [
        (S, rejoin(true)),
        (D, rejoined(1, Vec::new())),
        (D, Message::GaveBack { text: String::new() }),
        (S, Message::Heard),
    ] {
        committed.take(by, &message).unwrap_or_else(|refusal| panic!("{refusal}"));
    }
    assert_eq!(committed.stage(), Stage::Over);
}

#[test]
fn data_ranges_ascend_and_are_disjoint() {
    let before = opening(false, true);
    let mapping = &before[..before.len() - 2];
    assert_eq!(after(mapping).stage(), Stage::Mapping);
    let data = |ranges: Vec<PageRange>| after(mapping).take(S, &Message::DataRanges(ranges));
    let switchover = [(S, Message::Switchover { attempt: 1 }), (S, prepare(1, 0))];
    let loading = [opening(false, false), switchover.to_vec()].concat();
    let written = |written: Vec<PageRange>| {
        let prepared = Prepared { attempt: 1, load_ns: 1, written, damaged: Vec::new() };
        after(&loading).take(D, &Message::Prepared(prepared))
    };
    for right in [vec![], vec![range(0, 0, 1), range(0, 1, 99), range(1, 0, 7)]] {
        assert!(data(right.clone()).is_ok() && written(right).is_ok());
    }
    for bad in [
        vec![range(0, 0, 100); 512],
        vec![range(0, 10, 5), range(0, 14, 5)],
        vec![range(0, 10, 5), range(0, 5, 5)],
        vec![range(1, 0, 1), range(0, 0, 1)],
        vec![range(0, 0, 0)],
        vec![range(0, 99, 2)],
        vec![range(2, 0, 1)],
        vec![range(0, u64::MAX, 2)],
    ] {
        assert_eq!(data(bad.clone()).unwrap_err().why, Why::Ranges, "{bad:?}");
        assert_eq!(written(bad.clone()).unwrap_err().why, Why::Ranges, "{bad:?}");
    }
}

/// Checksums come as agreed on; damage ends in *called off*, and is forgotten by the next switchover.
#[test]
fn checksums_of_pages_come_as_agreed_and_damage_is_not_committed_to() {
    let loading = |page_sums: bool, sums: usize, samples: Vec<PageSample>| {
        let mut conversation = Conversation::default();
        let hello = Hello { page_sums, ..hello(false) };
        let answer = welcome(&hello, false);
        let agreed = answer.agreed(&hello);
        for (by, message) in [
            (S, Message::Hello(hello)),
            (D, Message::Welcome(answer)),
            (S, agreed),
            (D, Message::Registered),
            (S, Message::Registered),
            (D, Message::Ready),
            (S, round(1)),
            (S, Message::Switchover { attempt: 1 }),
        ] {
            conversation.take(by, &message).unwrap_or_else(|refusal| panic!("{refusal}"));
        }
        let sums = vec![7; sums];
        let prepare = Prepare { attempt: 1, state_bytes: 0, paused: false, sums, samples };
        conversation.take(S, &Message::Prepare(prepare)).map(|()| conversation)
    };
    let sample = |region, page| PageSample { region, page, sum: 1 };
    // 107 pages.
    for (page_sums, sums) in [(true, 0), (true, 1), (true, 3), (false, 2)] {
        let refusal = loading(page_sums, sums, Vec::new()).unwrap_err();
        assert_eq!(refusal.why, Why::Sums(sums));
    }
    for outside in [sample(0, 100), sample(1, 7), sample(2, 0)] {
        let refusal = loading(false, 0, vec![outside]).unwrap_err();
        assert_eq!(refusal.why, Why::Ranges, "{outside:?}");
    }
    loading(false, 0, vec![sample(1, 6), sample(0, 99)]).unwrap();
    assert_eq!(loading(true, 2, vec![sample(0, 0)]).unwrap_err().why, Why::Sums(2));

    let damaged = |attempt, written: Vec<PageRange>| {
        let damaged = vec![range(0, 0, 64)];
        Message::Prepared(Prepared { attempt, load_ns: 0, written, damaged })
    };
    let mut unchecked = loading(false, 0, vec![sample(0, 0)]).unwrap();
    assert_eq!(unchecked.take(D, &damaged(1, Vec::new())).unwrap_err().why, Why::Damaged);
    let mut checked = loading(true, 2, Vec::new()).unwrap();
    let loaded = damaged(1, vec![range(0, 0, 1)]);
    assert_eq!(checked.take(D, &loaded).unwrap_err().why, Why::Damaged);
    checked.take(D, &damaged(1, Vec::new())).unwrap();
    for unfit in [Message::Releasing, Message::Commit] {
        assert_eq!(checked.take(S, &unfit).unwrap_err().why, Why::Stage);
    }
    assert_eq!(checked.take(D, &prepared(1)).unwrap_err().why, Why::Unasked);
    // Pages may be lost meanwhile.
    checked.take(D, &Message::ChannelClosed { channel: 0 }).unwrap();
    checked.take(S, &Message::CalledOff { attempt: 1 }).unwrap();
    // And late, in the midst of the next one.
    let mut late = loading(true, 2, Vec::new()).unwrap();
    let (sums, samples) = (vec![7; 2], Vec::new());
    let next = Prepare { attempt: 2, state_bytes: 0, paused: false, sums, samples };
    for (by, message) in [
        (S, Message::CalledOff { attempt: 1 }),
        (S, Message::Switchover { attempt: 2 }),
        (D, damaged(1, Vec::new())),
        (S, Message::Prepare(next)),
        (D, prepared(2)),
        (S, Message::Commit),
    ] {
        late.take(by, &message).unwrap_or_else(|refusal| panic!("{refusal}"));
    }
}

#[test]
fn a_greeting_that_was_changed_on_its_way_is_noticed_by_whoever_hears_it() {
    let hello = hello(false);
    let changed = Hello { verify: true, ..hello.clone() };
    let answer = welcome(&changed, false);
    // The source hears the answer to a greeting that it did not say.
    let mut source = Conversation::default();
    source.take(S, &Message::Hello(hello.clone())).unwrap();
    assert_eq!(source.take(D, &Message::Welcome(answer)).unwrap_err().why, Why::Greeting);
    // Or another answer than was said.
    let answer = welcome(&hello, false);
    let otherwise = Welcome { wants_data_ranges: true, ..answer };
    assert_eq!(source.take(D, &Message::Welcome(otherwise)).unwrap_err().why, Why::Greeting);
    // The destination hears what confirms another greeting than the one it knows.
    for (knows, confirmed) in
        [(&changed, answer.agreed(&hello)), (&hello, otherwise.agreed(&hello))]
    {
        let mut destination = Conversation::default();
        destination.take(S, &Message::Hello(knows.clone())).unwrap();
        destination.take(D, &Message::Welcome(welcome(knows, false))).unwrap();
        assert_eq!(destination.take(S, &confirmed).unwrap_err().why, Why::Greeting);
    }
}

#[test]
fn device_state_is_bounded_over_all_its_chunks() {
    let mut conversation =
        after(&[opening(false, false), vec![(S, Message::Switchover { attempt: 1 })]].concat());
    let whole = chunk(MAX_STATE_CHUNK_BYTES);
    for _ in 0..MAX_DEVICE_STATE_BYTES / MAX_STATE_CHUNK_BYTES as u64 {
        conversation.take(S, &whole).unwrap();
    }
    let why = conversation.take(S, &chunk(1)).unwrap_err().why;
    assert_eq!(why, Why::StateBytes(MAX_DEVICE_STATE_BYTES + 1));
}

mod honest;
