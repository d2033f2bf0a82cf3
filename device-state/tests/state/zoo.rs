//! State of every kind.

use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, RwLock};

use pageferry_device_state::codec::Adapter;
use pageferry_device_state::{DeviceState, HookError};
use proptest::prelude::*;

/// A type of somebody else's: a range that is never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) begin: u32,
    pub(crate) end: u32,
}

/// Stores it as a pair.
pub(crate) struct Pair;

impl Adapter<Span> for Pair {
    type Stored = [u32; 2];

    fn blank() -> Span {
        Span { begin: 0, end: 1 }
    }

    fn store(span: &Span) -> Result<[u32; 2], HookError> {
        Ok([span.begin, span.end])
    }

    fn restore([begin, end]: [u32; 2]) -> Result<Span, HookError> {
        if begin < end { Ok(Span { begin, end }) } else { Err("a span is never empty".into()) }
    }
}

#[derive(DeviceState, Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Entry {
    #[device_state(tag = 1)]
    pub(crate) address: u64,
    #[device_state(tag = 2, max_len = 16)]
    pub(crate) payload: Vec<u8>,
}

#[derive(DeviceState, Debug, Clone, PartialEq, Eq)]
pub(crate) enum Mode {
    #[device_state(tag = 1)]
    Off,
    #[device_state(tag = 2, rename = "counting")]
    Count(#[device_state(tag = 1)] u16, #[device_state(tag = 2)] bool),
    #[device_state(tag = 5)]
    Scripted {
        #[device_state(tag = 1, max_len = 4)]
        steps: Vec<Entry>,
        #[device_state(skip)]
        cached: Option<u8>,
    },
}

#[derive(DeviceState, Debug, Clone, Default, PartialEq, Eq)]
#[device_state(version = 3)]
pub(crate) struct Fifo {
    #[device_state(tag = 1, max_len = 64)]
    pub(crate) data: Vec<u8>,
    #[device_state(tag = 2, since = 3, default = 14)]
    pub(crate) trigger_level: u8,
}

/// Everything that a device can have.
#[derive(DeviceState, Debug)]
#[device_state(name = "zoo", version = 2, pre_save = Zoo::count_saves, post_load = Zoo::check)]
pub(crate) struct Zoo {
    // Not in the order of their tags.
    #[device_state(tag = 16)]
    pub(crate) narrow: i8,
    #[device_state(tag = 9)]
    pub(crate) signed: i128,
    #[device_state(tag = 1)]
    pub(crate) flag: bool,
    #[device_state(tag = 2)]
    pub(crate) wide: u128,
    #[device_state(tag = 3, max_len = 12)]
    pub(crate) label: String,
    #[device_state(tag = 4)]
    pub(crate) words: [u16; 40],
    #[device_state(tag = 5, max_len = 8)]
    pub(crate) entries: Vec<Entry>,
    #[device_state(tag = 6)]
    pub(crate) mode: Mode,
    #[device_state(tag = 7, max_len = 3)]
    pub(crate) names: Option<Box<[String]>>,
    #[device_state(tag = 8, with = Pair)]
    pub(crate) span: Span,
    #[device_state(tag = 10, with = Pair, max_len = 5)]
    pub(crate) spans: Option<Vec<Span>>,
    #[device_state(tag = 11)]
    pub(crate) shared: Arc<Mutex<[i32; 2]>>,
    #[device_state(tag = 12)]
    pub(crate) counter: Arc<AtomicU64>,
    #[device_state(tag = 13)]
    pub(crate) flags: [AtomicBool; 3],
    #[device_state(tag = 14, max_len = 4)]
    pub(crate) locked: RwLock<Vec<u32>>,
    #[device_state(tag = 15, since = 2, default)]
    pub(crate) saves: u32,
    #[device_state(skip)]
    pub(crate) handle: Option<&'static str>,
    #[device_state(subsection = "zoo/fifo", needed = Zoo::has_fifo)]
    pub(crate) fifo: Fifo,
}

impl Zoo {
    fn count_saves(&mut self) -> Result<(), String> {
        self.saves = self.saves.wrapping_add(1);
        if self.label == "unsaved" { Err("not this one".to_owned()) } else { Ok(()) }
    }

    fn check(&mut self) -> Result<(), String> {
        if self.label == "bad" { Err("a label cannot be bad".to_owned()) } else { Ok(()) }
    }

    fn has_fifo(&self) -> bool {
        self.fifo != Fifo::default()
    }

    /// All that is saved, to be compared.
    pub(crate) fn contents(&self) -> String {
        let Self { narrow, signed, flag, wide, label, words, entries, mode, .. } = self;
        let Self { names, span, spans, shared, counter, flags, locked, saves, fifo, .. } = self;
        format!(
            "{narrow} {signed} {flag} {wide} {label} {words:?} {entries:?} {mode:?} {names:?} {span:?} \
             {spans:?} {shared:?} {counter:?} {flags:?} {locked:?} {saves} {fifo:?}"
        )
    }
}

pub(crate) fn entry() -> impl Strategy<Value = Entry> {
    (any::<u64>(), prop::collection::vec(any::<u8>(), 0..=16))
        .prop_map(|(address, payload)| Entry { address, payload })
}

fn mode() -> impl Strategy<Value = Mode> {
    prop_oneof![
        Just(Mode::Off),
        any::<(u16, bool)>().prop_map(|(count, up)| Mode::Count(count, up)),
        prop::collection::vec(entry(), 0..=4)
            .prop_map(|steps| Mode::Scripted { steps, cached: None }),
    ]
}

fn span() -> impl Strategy<Value = Span> {
    (0..u32::MAX)
        .prop_flat_map(|begin| (begin + 1..=u32::MAX).prop_map(move |end| Span { begin, end }))
}

fn fifo() -> impl Strategy<Value = Fifo> {
    prop_oneof![
        Just(Fifo::default()),
        (prop::collection::vec(any::<u8>(), 0..=64), any::<u8>())
            .prop_map(|(data, trigger_level)| Fifo { data, trigger_level }),
    ]
}

/// Any state.
pub(crate) fn zoo() -> impl Strategy<Value = Zoo> {
    let scalars = (any::<i8>(), any::<i128>(), any::<bool>(), any::<u128>(), "[a-zé]{0,6}");
    let lists = (
        prop::collection::vec(any::<u16>(), 40),
        prop::collection::vec(entry(), 0..=8),
        prop::option::of(prop::collection::vec("[a-z]{0,3}", 0..=3)),
        prop::option::of(prop::collection::vec(span(), 0..=5)),
        prop::collection::vec(any::<u32>(), 0..=4),
    );
    let shared = (any::<[i32; 2]>(), any::<u64>(), any::<[bool; 3]>());
    (scalars, lists, shared, mode(), span(), fifo(), any::<u32>()).prop_map(
        |(scalars, lists, shared, mode, span, fifo, saves)| {
            let (narrow, signed, flag, wide, label) = scalars;
            let (words, entries, names, spans, locked) = lists;
            let (pair, counter, flags) = shared;
            Zoo {
                narrow,
                signed,
                flag,
                wide,
                label,
                words: words.try_into().expect("40 words"),
                entries,
                mode,
                names: names.map(Vec::into_boxed_slice),
                span,
                spans,
                shared: Arc::new(Mutex::new(pair)),
                counter: Arc::new(AtomicU64::new(counter)),
                flags: flags.map(AtomicBool::new),
                locked: RwLock::new(locked),
                saves,
                handle: Some("kept"),
                fifo,
            }
        },
    )
}
