//! Two honest sides, written down a second time and without a table, that say whatever they may in
//! any order. Whatever they say is accepted, however it crosses on its way; anything else is not.

use super::*;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Doing {
    Greeting,
    Returning,
    AwaitingRejoined,
    AwaitingWelcome,
    Agreeing,
    Registering,
    AwaitingReady,
    Mapping,
    Copying,
    LastPages,
    AwaitingDigest,
    Comparing,
    Saving,
    AwaitingLoad,
    Deciding,
    Committed,
    Told,
    Done,
}

#[derive(Debug, Clone)]
#[expect(clippy::struct_excessive_bools, reason = "what it wants and has said")]
struct Source {
    verify: bool,
    ranges: bool,
    doing: Doing,
    registered: (bool, bool),
    rounds: u32,
    pings: u32,
    unanswered: bool,
    attempt: u32,
    state_bytes: u64,
    /// Channels it wants closed.
    unwanted: Vec<u16>,
    /// When it came back.
    committed: bool,
    failed: bool,
}

impl Source {
    fn could_say(&self) -> Vec<Message> {
        if self.failed {
            return Vec::new();
        }
        let attempt = self.attempt;
        let mut may = Vec::new();
        let hello = hello(self.verify);
        match self.doing {
            Doing::Greeting => may.push(Message::Hello(hello)),
            Doing::Returning => may.extend([rejoin(false), rejoin(true)]),
            Doing::Told => may.push(Message::Heard),
            Doing::Agreeing => may.push(welcome(&hello, self.ranges).agreed(&hello)),
            Doing::Registering if !self.registered.0 => may.push(Message::Registered),
            Doing::Mapping => may.push(Message::DataRanges(vec![range(0, 5, 10)])),
            _ => {}
        }
        if matches!(self.doing, Doing::Copying | Doing::LastPages) {
            may.push(round(self.rounds + 1));
            if !self.unanswered {
                may.push(Message::Ping { number: self.pings + 1 });
            }
            if self.unwanted.len() < 2 {
                let wanted = (0..CHANNELS).filter(|channel| !self.unwanted.contains(channel));
                may.extend(wanted.map(|channel| Message::CloseChannel { channel }));
            }
        }
        if self.doing == Doing::Copying && self.rounds > 0 {
            may.push(Message::Switchover { attempt: attempt + 1 });
        }
        if self.doing == Doing::LastPages && self.verify {
            may.push(Message::Verify { attempt });
        }
        if self.doing == Doing::Comparing {
            may.push(compared(attempt));
        }
        if self.doing == Doing::Saving || self.doing == Doing::LastPages && !self.verify {
            may.push(chunk(3));
            may.push(prepare(attempt, self.state_bytes));
        }
        if self.doing == Doing::Deciding {
            may.extend([Message::Releasing, Message::Commit]);
        }
        let is_over = matches!(self.doing, Doing::Committed | Doing::Told | Doing::Done);
        let switches = !is_over && self.doing as u8 >= Doing::LastPages as u8;
        if switches {
            may.push(Message::CalledOff { attempt });
        }
        let has_committed = self.committed && self.doing == Doing::AwaitingRejoined;
        if !is_over && !has_committed {
            may.push(failed());
        }
        may
    }

    fn say(&mut self, message: &Message) {
        match message {
            Message::Hello(_) => self.doing = Doing::AwaitingWelcome,
            Message::Rejoin(rejoin) => {
                (self.rounds, self.attempt) = (rejoin.rounds, rejoin.switchovers);
                self.committed = rejoin.committed;
                self.doing = Doing::AwaitingRejoined;
            }
            Message::Heard => self.doing = Doing::Done,
            Message::Agreed { .. } => self.doing = Doing::Registering,
            Message::Registered => self.registered.0 = true,
            Message::DataRanges(_) => self.doing = Doing::Copying,
            Message::Round { .. } => self.rounds += 1,
            Message::Ping { .. } => {
                self.pings += 1;
                self.unanswered = true;
            }
            Message::Switchover { attempt } => {
                (self.attempt, self.state_bytes) = (*attempt, 0);
                self.doing = Doing::LastPages;
            }
            Message::CloseChannel { channel } => self.unwanted.push(*channel),
            Message::Verify { .. } => self.doing = Doing::AwaitingDigest,
            Message::Compared { .. } => self.doing = Doing::Saving,
            Message::StateChunk(chunk) => {
                self.state_bytes += chunk.len() as u64;
                self.doing = Doing::Saving;
            }
            Message::Prepare(_) => self.doing = Doing::AwaitingLoad,
            Message::CalledOff { .. } => self.doing = Doing::Copying,
            Message::Releasing => {}
            Message::Commit => self.doing = Doing::Committed,
            Message::Failed { .. } => self.failed = true,
            other => panic!("{other:?}"),
        }
        self.await_registration();
    }

    fn hear(&mut self, message: &Message) {
        let current = |attempt: u32, doing| attempt == self.attempt && self.doing == doing;
        match message {
            Message::Welcome(_) => self.doing = Doing::Agreeing,
            Message::Rejoined(_) => {
                self.doing = if self.committed { Doing::Committed } else { Doing::Registering };
            }
            Message::Registered => self.registered.1 = true,
            Message::Ready => {
                self.doing = if self.ranges { Doing::Mapping } else { Doing::Copying };
            }
            Message::Pong { .. } => self.unanswered = false,
            Message::Verified { attempt, .. } if current(*attempt, Doing::AwaitingDigest) => {
                self.doing = Doing::Comparing;
            }
            Message::Prepared(prepared) if current(prepared.attempt, Doing::AwaitingLoad) => {
                self.doing = Doing::Deciding;
            }
            Message::Resumed { .. } | Message::GaveBack { .. } => self.doing = Doing::Told,
            _ => {}
        }
        self.await_registration();
    }

    fn await_registration(&mut self) {
        if self.doing == Doing::Registering && self.registered == (true, true) {
            self.doing = Doing::AwaitingReady;
        }
    }
}

#[derive(Debug, Clone, Default)]
#[expect(clippy::struct_excessive_bools, reason = "what it has heard and said")]
struct Destination {
    verify: bool,
    ranges: bool,
    /// What came and was not dealt with: begins with what wants an answer.
    inbox: VecDeque<Message>,
    greeted: bool,
    /// On a later link, and whether the source had committed.
    returned: Option<bool>,
    welcomed: bool,
    agreed: bool,
    registered: (bool, bool),
    ready: bool,
    prepared: bool,
    committed: bool,
    done: bool,
    closed: Vec<u16>,
    failed: bool,
}

impl Destination {
    fn could_say(&self) -> Vec<Message> {
        if self.failed {
            return Vec::new();
        }
        let mut may = Vec::new();
        match self.inbox.front() {
            Some(Message::Ping { number }) => may.push(Message::Pong { number: *number }),
            Some(Message::Verify { attempt }) => may.push(verified(*attempt)),
            Some(Message::Prepare(prepare)) => may.push(prepared(prepare.attempt)),
            _ => {}
        }
        if self.returned.is_some() && !self.welcomed {
            may.push(rejoined(1, Vec::new()));
        }
        if self.greeted && !self.welcomed {
            may.push(Message::Welcome(welcome(&hello(self.verify), self.ranges)));
        }
        if self.agreed && !self.registered.0 {
            may.push(Message::Registered);
        }
        if self.registered == (true, true) && !self.ready {
            may.push(Message::Ready);
        }
        if self.ready && !self.prepared && !self.committed && self.closed.len() < 2 {
            let open = (0..CHANNELS).filter(|channel| !self.closed.contains(channel));
            may.extend(open.map(|channel| Message::ChannelClosed { channel }));
        }
        if self.committed && !self.done {
            may.push(Message::Resumed { resume_ns: 1 });
            may.push(Message::GaveBack { text: String::new() });
        }
        if !self.done {
            may.push(failed());
        }
        may
    }

    fn say(&mut self, message: &Message) {
        match message {
            Message::Welcome(_) => self.welcomed = true,
            Message::Rejoined(_) => {
                self.welcomed = true;
                self.committed = self.returned == Some(true);
                self.agreed = !self.committed;
            }
            Message::Registered => self.registered.0 = true,
            Message::Ready => self.ready = true,
            Message::ChannelClosed { channel } => self.closed.push(*channel),
            Message::Resumed { .. } | Message::GaveBack { .. } => self.done = true,
            Message::Failed { .. } => self.failed = true,
            Message::Pong { .. } | Message::Verified { .. } => drop(self.inbox.pop_front()),
            Message::Prepared(_) => {
                self.inbox.pop_front();
                self.prepared = true;
            }
            other => panic!("{other:?}"),
        }
        self.settle();
    }

    fn hear(&mut self, message: &Message) {
        self.inbox.push_back(message.clone());
        self.settle();
    }

    /// Deals with what wants no answer.
    fn settle(&mut self) {
        let asks =
            |message: &Message| matches!(message.kind(), Kind::Ping | Kind::Verify | Kind::Prepare);
        while self.inbox.front().is_some_and(|message| !asks(message)) {
            let Some(message) = self.inbox.pop_front() else { return };
            match message {
                Message::Hello(_) => self.greeted = true,
                Message::Rejoin(rejoin) => self.returned = Some(rejoin.committed),
                Message::Agreed { .. } => self.agreed = true,
                Message::Registered => self.registered.1 = true,
                Message::CalledOff { .. } => self.prepared = false,
                Message::Commit => self.committed = true,
                _ => {}
            }
        }
    }
}

/// Two sides, and what each has noted: on the first link, or on a later one.
fn sides(verify: bool, ranges: bool, returns: bool) -> (Source, Destination, Conversation) {
    let (doing, noted) = if returns {
        (Doing::Returning, after(&greeting(verify, ranges)).on_next_link())
    } else {
        (Doing::Greeting, Conversation::default())
    };
    let ranges = ranges && !returns;
    let source = Source {
        verify,
        ranges,
        doing,
        registered: (false, false),
        rounds: 0,
        pings: 0,
        unanswered: false,
        attempt: 0,
        state_bytes: 0,
        unwanted: Vec::new(),
        committed: false,
        failed: false,
    };
    (source, Destination { verify, ranges, ..Destination::default() }, noted)
}

/// One of them, by a number that came from outside; a failure, which ends it all, only rarely.
fn choose(mut may: Vec<Message>, by: u16) -> Option<Message> {
    if !by.is_multiple_of(37) {
        may.retain(|message| message.kind() != Kind::Failed);
    }
    (!may.is_empty()).then(|| may.swap_remove(usize::from(by / 5) % may.len()))
}

/// Of each kind a few, sensible or not at any given moment.
fn universe(verify: bool, ranges: bool) -> Vec<(Side, Message)> {
    let mut all = Vec::new();
    let other = Hello { channels: 2, ..hello(verify) };
    all.push(Message::Hello(hello(verify)));
    all.extend([rejoin(false), rejoin(true), Message::Heard]);
    all.extend([0, 1, 2].map(|epoch| rejoined(epoch, Vec::new())));
    for hello in [hello(verify), other] {
        let answer = welcome(&hello, ranges);
        all.extend([Message::Welcome(answer), answer.agreed(&hello)]);
    }
    all.extend([
        Message::Registered,
        Message::Ready,
        Message::Releasing,
        Message::Commit,
        failed(),
    ]);
    all.extend([Message::Resumed { resume_ns: 1 }, Message::GaveBack { text: String::new() }]);
    all.push(Message::DataRanges(vec![range(0, 5, 10)]));
    all.push(Message::DataRanges(vec![range(0, 5, 10), range(0, 5, 10)]));
    all.extend([chunk(0), chunk(3)]);
    for number in (0..12).chain([u32::MAX]) {
        all.extend([round(number), Message::Round { round: number, dirty_pages: 108 }]);
        all.extend([Message::Ping { number }, Message::Pong { number }]);
    }
    for attempt in (0..7).chain([u32::MAX]) {
        all.extend([Message::Switchover { attempt }, Message::CalledOff { attempt }]);
        all.extend([Message::Verify { attempt }, verified(attempt), compared(attempt)]);
        all.extend((0..4).map(|chunks| prepare(attempt, 3 * chunks)));
        all.push(prepared(attempt));
    }
    for channel in 0..=CHANNELS {
        all.extend([Message::CloseChannel { channel }, Message::ChannelClosed { channel }]);
    }
    all.into_iter().flat_map(|message| [(S, message.clone()), (D, message)]).collect()
}

proptest! {
    /// Each side hears the other late, and speaks meanwhile.
    #[test]
    fn whatever_honest_sides_say_is_accepted(
        verify: bool,
        ranges: bool,
        returns: bool,
        steps in prop::collection::vec(any::<(u8, u16)>(), 0..200),
    ) {
        let (mut source, mut destination, mut here) = sides(verify, ranges, returns);
        let mut there = here.clone();
        let (mut to_there, mut to_here) = (VecDeque::new(), VecDeque::new());
        for (what, by) in steps {
            match what % 4 {
                0 => if let Some(message) = choose(source.could_say(), by) {
                    prop_assert_eq!(here.take(S, &message), Ok(()));
                    source.say(&message);
                    to_there.push_back(message);
                },
                1 => if let Some(message) = choose(destination.could_say(), by) {
                    prop_assert_eq!(there.take(D, &message), Ok(()));
                    destination.say(&message);
                    to_here.push_back(message);
                },
                2 => if let Some(message) = to_there.pop_front() {
                    prop_assert_eq!(there.take(S, &message), Ok(()));
                    destination.hear(&message);
                },
                _ => if let Some(message) = to_here.pop_front() {
                    prop_assert_eq!(here.take(D, &message), Ok(()));
                    source.hear(&message);
                },
            }
        }
    }

    /// At any moment of a conversation: what an honest side could say is accepted, and nothing else.
    #[test]
    fn any_one_message_out_of_place_is_refused(
        verify: bool,
        ranges: bool,
        returns: bool,
        steps in prop::collection::vec(any::<(bool, u16)>(), 0..60),
    ) {
        let universe = universe(verify, ranges);
        let (mut source, mut destination, mut conversation) = sides(verify, ranges, returns);
        for (destination_speaks, by) in steps {
            let (s_may, d_may) = (source.could_say(), destination.could_say());
            for (side, message) in &universe {
                let may = if *side == S { &s_may } else { &d_may };
                let taken = conversation.clone().take(*side, message);
                prop_assert_eq!(
                    taken.is_ok(), may.contains(message),
                    "{:?} of the {} at {}: {:?}", message, side, conversation.stage(), taken
                );
            }
            let may = if destination_speaks { d_may } else { s_may };
            let Some(message) = choose(may, by) else { continue };
            if destination_speaks {
                prop_assert_eq!(conversation.take(D, &message), Ok(()));
                destination.say(&message);
                source.hear(&message);
            } else {
                prop_assert_eq!(conversation.take(S, &message), Ok(()));
                source.say(&message);
                destination.hear(&message);
            }
        }
    }
}

/// The walks above get to the end, or they would show nothing.
#[test]
fn honest_sides_get_to_the_end() {
    let mut random = crate::testing::Random::new(7);
    let mut seen = std::collections::HashSet::new();
    for _ in 0..300 {
        let [verify, ranges, returns] = std::array::from_fn(|_| random.below(2) == 0);
        let (mut source, mut destination, mut conversation) = sides(verify, ranges, returns);
        for _ in 0..60 {
            let by = u16::try_from(random.below(1 << 16)).unwrap();
            if random.below(2) == 0 {
                let Some(message) = choose(source.could_say(), by) else { continue };
                conversation.take(S, &message).unwrap();
                source.say(&message);
                destination.hear(&message);
            } else {
                let Some(message) = choose(destination.could_say(), by) else { continue };
                conversation.take(D, &message).unwrap();
                destination.say(&message);
                source.hear(&message);
            }
            seen.insert(conversation.stage());
        }
    }
    for stage in &Stage::ALL[1..] {
        assert!(seen.contains(stage), "never got to {stage}");
    }
}
