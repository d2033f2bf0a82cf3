use proptest::prelude::*;

use super::*;
use crate::control::protocol::{MAX_HELLO_BYTES, MigrationKey, check_arriving};
use crate::pages::memory::{Layout, PAGE_BYTES, RegionLayout};

fn a_layout() -> impl Strategy<Value = Layout> {
    prop::collection::vec((0_u64..1000, 1_u64..1000), 1..20).prop_map(|regions| {
        let mut guest_addr = 0;
        let regions = regions.into_iter().map(|(gap, pages)| {
            guest_addr += gap * PAGE_BYTES;
            let len_bytes = pages * PAGE_BYTES;
            let region = RegionLayout { guest_addr, len_bytes, backing_page_bytes: PAGE_BYTES };
            guest_addr += len_bytes;
            region
        });
        Layout::new(regions.collect()).unwrap()
    })
}

fn ranges() -> impl Strategy<Value = Vec<PageRange>> {
    prop::collection::vec(any::<(u16, u64, u32)>(), 0..30).prop_map(|ranges| {
        let range = |(region, first_page, pages)| PageRange { region, first_page, pages };
        ranges.into_iter().map(range).collect()
    })
}

fn a_message() -> impl Strategy<Value = Message> {
    let bytes = |max| prop::collection::vec(any::<u8>(), 0..max);
    prop_oneof![
        (1_u16.., any::<(u16, u32, [bool; 4])>(), a_layout(), bytes(100), bytes(100)).prop_map(
            |(newest_version, (channels, page_bytes, flags), layout, d, state_schema)| {
                let [verify, trial, rejoins, page_sums] = flags;
                Message::Hello(Hello {
                    oldest_version: 1,
                    newest_version,
                    page_bytes,
                    channels,
                    verify,
                    trial,
                    rejoins,
                    page_sums,
                    key: MigrationKey::random().unwrap(),
                    layout,
                    description: d,
                    state_schema,
                })
            }
        ),
        any::<(u16, u16, [bool; 3], [u8; 16])>().prop_map(
            |(version, channels, [memory_zeroed, wants_data_ranges, rejoins], greeting)| {
                Message::Welcome(Welcome {
                    version,
                    channels,
                    memory_zeroed,
                    wants_data_ranges,
                    rejoins,
                    greeting: Digest(greeting),
                })
            }
        ),
        any::<[u8; 16]>().prop_map(|greeting| Message::Agreed { greeting: Digest(greeting) }),
        (1_u16.., any::<[u32; 3]>(), any::<bool>()).prop_map(
            |(newest_version, [epoch, rounds, switchovers], committed)| {
                Message::Rejoin(Rejoin {
                    oldest_version: 1,
                    newest_version,
                    key: MigrationKey::random().unwrap(),
                    epoch,
                    rounds,
                    switchovers,
                    committed,
                })
            }
        ),
        (any::<u32>(), ranges())
            .prop_map(|(epoch, written)| Message::Rejoined(Rejoined { epoch, written })),
        Just(Message::Heard),
        Just(Message::Registered),
        Just(Message::Ready),
        ranges().prop_map(Message::DataRanges),
        any::<(u32, u64)>().prop_map(|(round, dirty_pages)| Message::Round { round, dirty_pages }),
        any::<u16>().prop_map(|channel| Message::CloseChannel { channel }),
        any::<u16>().prop_map(|channel| Message::ChannelClosed { channel }),
        bytes(3000).prop_map(Message::StateChunk),
        any::<u32>().prop_map(|number| Message::Ping { number }),
        any::<u32>().prop_map(|number| Message::Pong { number }),
        any::<u32>().prop_map(|attempt| Message::CalledOff { attempt }),
        any::<u32>().prop_map(|attempt| Message::Verify { attempt }),
        any::<(u32, [u8; 16])>().prop_map(|(attempt, digest)| {
            Message::Verified { attempt, digest: Digest(digest) }
        }),
        any::<(u32, [u8; 16])>().prop_map(|(attempt, digest)| {
            Message::Compared { attempt, digest: Digest(digest) }
        }),
        any::<u32>().prop_map(|attempt| Message::Switchover { attempt }),
        (
            any::<(u32, u64, bool)>(),
            prop::collection::vec(any::<u64>(), 0..20),
            prop::collection::vec(any::<(u16, u64, u32)>(), 0..20),
        )
            .prop_map(|((attempt, state_bytes, paused), sums, samples)| {
                let sample = |(region, page, sum)| PageSample { region, page, sum };
                let samples = samples.into_iter().map(sample).collect();
                Message::Prepare(Prepare { attempt, state_bytes, paused, sums, samples })
            }),
        (any::<(u32, u64)>(), ranges(), ranges()).prop_map(
            |((attempt, load_ns), written, damaged)| {
                Message::Prepared(Prepared { attempt, load_ns, written, damaged })
            }
        ),
        Just(Message::Releasing),
        Just(Message::Commit),
        any::<u64>().prop_map(|resume_ns| Message::Resumed { resume_ns }),
        "[a-zäöü ]{0,50}".prop_map(|text| Message::GaveBack { text }),
        (prop::sample::select(FailureReason::ALL.to_vec()), "[a-zäöü ]{0,50}")
            .prop_map(|(reason, text)| Message::Failed { reason, text }),
    ]
}

proptest! {
    #[test]
    fn what_is_encoded_is_decoded(message in a_message()) {
        prop_assert_eq!(Message::decode(&message.encode()).unwrap(), message);
    }

    #[test]
    fn any_bytes_are_a_message_or_an_error(
        kind in 0_u16..31,
        rest in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend(rest);
        // What is accepted is exactly what would be encoded, text aside.
        if let Ok(message) = Message::decode(&bytes)
            && !matches!(message, Message::Failed { .. } | Message::GaveBack { .. })
        {
            prop_assert_eq!(message.encode(), bytes);
        }
    }

    /// However it is cut into pieces; and nothing else is one.
    #[test]
    fn a_greeting_may_become_one_at_every_byte(message in a_message(), at: prop::sample::Index) {
        let bytes = message.encode();
        let at = at.index(bytes.len());
        let arriving = check_arriving(&bytes[..at], bytes.len());
        let arrived = check_arriving(&bytes, bytes.len());
        if matches!(message, Message::Hello(_) | Message::Rejoin(_)) {
            prop_assert_eq!((arriving, arrived), (Ok(()), Ok(())));
        } else {
            let number = message.kind() as u16;
            prop_assert_eq!(arriving.is_err(), at >= 2);
            prop_assert_eq!(arrived, Err(DecodeError::NoGreeting(number)));
        }
    }

    /// At the first byte of its start that shows it, or once all is there.
    #[test]
    fn what_is_no_greeting_is_not_waited_for(at in 0..10_usize, flip in 1_u8..) {
        let region = RegionLayout { guest_addr: 0, len_bytes: 4096, backing_page_bytes: 4096 };
        let layout = Layout::new(vec![region]).unwrap();
        let hello = Hello::new(MigrationKey::of_a_test(), layout, 1, false, vec![7; 100]);
        let mut bytes = Message::Hello(hello).encode();
        bytes[at] ^= flip;
        // The other greeting.
        prop_assume!(at > 0 || u16::from(bytes[0]) != Kind::Rejoin as u16);
        let seen_at = [2, 10].into_iter().find(|end| at < *end).unwrap();
        let judged = |end| check_arriving(&bytes[..end], bytes.len());
        prop_assert_eq!(judged(seen_at - 1), Ok(()));
        prop_assert!(judged(seen_at).is_err() && judged(bytes.len()).is_err());
        prop_assert!(check_arriving(&[], MAX_HELLO_BYTES + 1).is_err());
    }

    #[test]
    fn every_cut_and_every_flip_is_survived(
        message in a_message(),
        at: prop::sample::Index,
        flip in 1_u8..,
    ) {
        let mut bytes = message.encode();
        let at = at.index(bytes.len());
        prop_assert!(Message::decode(&bytes[..at]).is_err());
        bytes[at] ^= flip;
        let _ = Message::decode(&bytes);
        bytes[at] ^= flip;
        bytes.push(0);
        prop_assert!(Message::decode(&bytes).is_err());
    }
}

#[test]
fn long_text_is_cut_at_a_character() {
    let text = "ä".repeat(MAX_TEXT_BYTES);
    let message = Message::Failed { reason: FailureReason::Host, text };
    let Message::Failed { text, .. } = Message::decode(&message.encode()).unwrap() else {
        panic!("another message");
    };
    assert_eq!(text, "ä".repeat(MAX_TEXT_BYTES / 2));
}

#[test]
fn terminal_escapes_are_taken_out_of_text() {
    let message = Message::GaveBack { text: "\x1b[2Jgone".into() };
    assert_eq!(
        Message::decode(&message.encode()),
        Ok(Message::GaveBack { text: " [2Jgone".into() })
    );
}
