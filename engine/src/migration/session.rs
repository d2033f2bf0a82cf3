//! What both drivers do alike: one queue of everything that can happen, fed by the control
//! channel's thread, the data channels' threads and whoever cancels.

mod control;
mod loss;
mod outlet;
mod patience;

use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvError, Sender, bounded, never, select_biased, unbounded};

use crate::control::protocol::{Conversation, Message, Side};
use crate::error::{Blame, Error};
use crate::host::caught;
use crate::progress::Shared;
use crate::threads::{Crew, Spawn, ThreadRole};
use crate::transport::{ControlChannel, ControlReceiver, Interrupt, Link, TransportError};
use control::Control;
pub(crate) use loss::is_of_the_link;
use outlet::Outlet;
pub(crate) use patience::{
    COMMIT, COMPARED, FATE, HEARD, LANDINGS, OVERTIME, PONG, Patience, SOURCE,
};

/// How long a side that lost its link waits for the peer's own account of why: the last words
/// come on the control channel, and data channels break at the same time.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// How often a destination that waits for the commit is told that its source is busy and lives. The
/// source does not know how patient it is, so there is no limit of the source's in it.
pub(crate) const LIFE_SIGNS: Duration = Duration::from_millis(100);

/// So long a silence of who would say that it lives means something.
pub(crate) const MEANT_SILENCE: Duration = Duration::from_secs(2);

/// Longer than any wait, short enough for the clock's arithmetic.
const FAR: Duration = Duration::from_secs(365 * 86_400);

/// Messages that wait for the driver, at most; each has at most half a MiB
/// ([`MAX_STATE_CHUNK_BYTES`](crate::protocol::MAX_STATE_CHUNK_BYTES)). What more a peer says stays
/// with the transport, whose flow control holds it up. Nothing else waits behind messages.
const WAITING_MESSAGES: usize = 8;

/// What the threads of a session feed its queue with. `R` is what data channel threads report.
pub(crate) enum Input<R> {
    Message(Message),
    Report(R),
    /// From the control thread, its last.
    ControlEnded(Error),
    /// From a thread that panicked, or was never run by the host's hook.
    Panicked(Error),
}

/// What the driver must look at: the inputs that are no failure.
pub(crate) enum Item<R> {
    Message(Message),
    Report(R),
}

/// What is the same on every link of a migration.
#[derive(Clone)]
pub(crate) struct SessionSettings {
    pub(crate) side: Side,
    pub(crate) spawn: Arc<dyn Spawn>,
    pub(crate) shared: Arc<Shared>,
    /// How long a link may take to take a message.
    pub(crate) send_timeout: Duration,
    /// How often the control thread gives signs of life while the [driver is busy](Session::be_busy).
    pub(crate) life_signs: Option<Duration>,
}

/// All that goes on over one link.
pub(crate) struct Session<R> {
    outlet: Outlet,
    /// What this side's own threads say; never much.
    inputs: Receiver<Input<R>>,
    feed: Sender<Input<R>>,
    /// What the peer says, from the control thread.
    messages: Receiver<Input<R>>,
    /// Keeps that queue without an end: a thread that panicked is reported in the other.
    _heard: Sender<Input<R>>,
    crew: Crew,
    interrupt: Arc<dyn Interrupt>,
    shared: Arc<Shared>,
    control: Arc<Control>,
    /// How long the link may take to take a message.
    send_timeout: Duration,
}

impl<R: Send + 'static> Session<R> {
    /// On a link whose control channel was not taken yet. Starts the control thread.
    pub(crate) fn on<L: Link + ?Sized>(
        link: &mut L,
        settings: SessionSettings,
        conversation: Conversation,
    ) -> Result<Self, Error> {
        let (control, interrupt) =
            caught("the transport", || Ok::<_, Error>((link.control()?, link.interrupter())))??;
        Self::open(control, interrupt, settings, conversation)
    }

    fn open(
        control: ControlChannel,
        interrupt: Arc<dyn Interrupt>,
        settings: SessionSettings,
        conversation: Conversation,
    ) -> Result<Self, Error> {
        let SessionSettings { side, spawn, shared, send_timeout, life_signs } = settings;
        shared.begin_link();
        let (feed, inputs) = unbounded();
        let (heard, messages) = bounded(WAITING_MESSAGES);
        let talk = Arc::new(Control::new(side, control.sender, conversation, send_timeout));
        let mut session = Self {
            outlet: Outlet::Here,
            inputs,
            feed,
            messages,
            _heard: heard.clone(),
            crew: Crew::new(spawn),
            interrupt,
            shared,
            control: Arc::clone(&talk),
            send_timeout,
        };
        let (receiver, shared) = (control.receiver, Arc::clone(&session.shared));
        session.spawn(ThreadRole::Control, move || {
            listen(receiver, &heard, &shared, &talk, life_signs);
        })?;
        Ok(session)
    }

    pub(crate) fn spawn(
        &mut self,
        role: ThreadRole,
        body: impl FnOnce() + Send + 'static,
    ) -> Result<(), Error> {
        let shared = Arc::clone(&self.shared);
        let witness = Witness { role, shared, feed: Some(self.feed.clone()) };
        let body = move || witness.watch(body);
        caught("the hook that starts threads", || self.crew.spawn(role, body))?
            .map_err(Error::Thread)
    }

    /// Where data channel threads report to.
    pub(crate) fn feed(&self) -> Sender<Input<R>> {
        self.feed.clone()
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// What the next link of the same migration begins with.
    pub(crate) fn conversation_on_next_link(&self) -> Conversation {
        self.control.conversation_on_next_link()
    }

    /// It is agreed that the source comes back: what is lost with the link is no reason for a last word.
    pub(crate) fn outlives_its_link(&self) {
        self.control.outlives_its_link();
    }

    /// Bytes of control messages so far, both ways.
    pub(crate) fn control_bytes(&self) -> u64 {
        self.control.bytes()
    }

    /// Sends a message, behind all that was sent before. Cancelling ends the wait for a link that
    /// does not take it, and then the link.
    pub(crate) fn send(&mut self, message: &Message) -> Result<(), Error> {
        self.take_outlet()?;
        let put = || self.control.put(message, self.send_timeout);
        self.shared.while_sending(&self.interrupt, put)
    }

    /// As [`send`](Self::send), past the point where cancelling means anything.
    pub(crate) fn send_committed(&mut self, message: &Message) -> Result<(), Error> {
        self.outlet_within(self.send_timeout)?;
        self.control.put(message, self.send_timeout)
    }

    /// Tells the peer why it ends here, unless it knows better.
    pub(crate) fn tell(&mut self, error: &Error) {
        if let Some(word) = error.last_word() {
            self.say_last(&word);
        }
    }

    /// Says this side's last word, if the link takes it soon and nobody has said one.
    pub(crate) fn say_last(&mut self, word: &Message) {
        let said =
            self.outlet_within(LAST_WORDS).and_then(|()| self.control.put_last(word, LAST_WORDS));
        if let Err(unheard) = said {
            tracing::debug!(error = %unheard.chain(), "the other side could not be told");
        }
    }

    fn outlet_within(&mut self, timeout: Duration) -> Result<(), Error> {
        self.wait_for_outlet(Patience::now("the transport to send", timeout), &never())?;
        self.outlet()
    }

    /// Sends messages by a thread of their own: the driver goes on, however long the link takes. Why
    /// they could not be sent is known when the next message is.
    pub(crate) fn send_aside(
        &mut self,
        messages: impl Iterator<Item = Message> + Send + 'static,
    ) -> Result<(), Error> {
        self.take_outlet()?;
        let lent = self.outlet.lend();
        let (talk, timeout) = (Arc::clone(&self.control), self.send_timeout);
        self.spawn(ThreadRole::DeviceState, move || {
            lent.send(messages, |message| talk.put(message, timeout));
        })
    }

    /// Waits until a thread has sent what it was to send. Whether that was all of it.
    pub(crate) fn sent_aside(&mut self, patience: Patience) -> Result<bool, Error> {
        let wake = self.shared.wake().clone();
        self.wait_for_outlet(patience, &wake)
    }

    fn wait_for_outlet(&mut self, patience: Patience, wake: &Receiver<()>) -> Result<bool, Error> {
        let shared = &self.shared;
        self.outlet.wait(patience, wake, || shared.check())
    }

    /// Whether a thread still has to send what it was given.
    pub(crate) fn is_sending_aside(&self) -> bool {
        self.outlet.is_lent()
    }

    /// What a thread is to send and has not begun with is sent no more. Whether all of it goes out
    /// nevertheless, which only that thread knows.
    pub(crate) fn recall(&mut self) -> Result<bool, Error> {
        self.outlet.recall();
        self.await_outlet()
    }

    /// Waits until the outlet is here, however long that takes.
    fn await_outlet(&mut self) -> Result<bool, Error> {
        self.shared.check()?;
        // Each of its sends is bounded, and cancelling ends the wait.
        self.sent_aside(Patience::now("the transport to send", FAR))
    }

    fn take_outlet(&mut self) -> Result<(), Error> {
        self.await_outlet()?;
        self.outlet()
    }

    fn outlet(&mut self) -> Result<(), Error> {
        self.control.set_busy(false);
        self.outlet.check()
    }

    /// The driver has something to do that may take long, and has nothing to say until it is through:
    /// until it says the next thing the peer is told now and then that this side lives.
    pub(crate) fn be_busy(&self) {
        self.control.set_busy(true);
    }

    /// Waits for what happens next. Peer failures, a broken control channel, cancelling and the
    /// end of patience are errors.
    pub(crate) fn next(&mut self, patience: Patience) -> Result<Item<R>, Error> {
        self.shared.check()?;
        patience.check()?;
        select_biased! {
            // Raised by whoever ends it now, or long ago and looked at since.
            recv(self.shared.wake()) -> _ => self.next(patience),
            recv(self.inputs) -> input => refuse_failures(input),
            recv(self.messages) -> input => refuse_failures(input),
            default(patience.left()) => Err(patience.error()),
        }
    }

    /// As [`next`](Self::next), past the point where cancelling means anything.
    pub(crate) fn next_committed(&mut self, patience: Patience) -> Result<Item<R>, Error> {
        patience.check()?;
        select_biased! {
            recv(self.inputs) -> input => refuse_failures(input),
            recv(self.messages) -> input => refuse_failures(input),
            default(patience.left()) => Err(patience.error()),
        }
    }

    /// What has come and was not looked at yet; failures are errors.
    pub(crate) fn pending(&mut self) -> Result<Option<Item<R>>, Error> {
        match self.next_committed(Patience::now("nothing", Duration::ZERO)) {
            Err(Error::TimedOut { .. }) => Ok(None),
            item => item.map(Some),
        }
    }

    /// How much has come and was not looked at yet.
    pub(crate) fn waiting(&self) -> usize {
        self.inputs.len() + self.messages.len()
    }

    /// Whether nothing waits for the driver.
    fn is_idle(&self) -> bool {
        self.waiting() == 0
    }

    /// Waits for a message. Reports that come meanwhile are dropped.
    pub(crate) fn next_message(&mut self, patience: Patience) -> Result<Message, Error> {
        loop {
            if let Item::Message(message) = self.next(patience)? {
                return Ok(message);
            }
        }
    }

    /// Runs a call that waits for the peer in the transport's own way. It ends when somebody
    /// cancels, and when the peer fails or leaves: that is the error then, the peer was told, and
    /// the link is of no more use.
    pub(crate) fn wait_in<T>(
        &mut self,
        call: impl FnOnce() -> Result<T, TransportError>,
    ) -> Result<T, Error> {
        let control = Arc::clone(&self.control);
        let say = Box::new(move |word: &Message, timeout| control.put_last(word, timeout));
        let result = self.shared.while_blocked(&self.interrupt, say, call);
        let interrupted = matches!(result, Err(Error::Transport(TransportError::Interrupted)));
        if !(interrupted && self.shared.has_peer_ended()) {
            return result;
        }
        let patience = Patience::now("last words", LAST_WORDS);
        loop {
            self.next_committed(patience)?;
        }
    }

    /// Why a link broke, if that is known soon: by the peer's own account, or because it was ended here for
    /// what the peer said or a thread did. Else the error itself.
    pub(crate) fn explain(&mut self, error: Error) -> Error {
        let lost = matches!(
            &error,
            Error::Transport(
                TransportError::Lost { .. }
                    | TransportError::Closed
                    | TransportError::Refused { .. }
                    | TransportError::Connect { .. }
            )
        );
        if !lost {
            return error;
        }
        let patience = Patience::now("last words", LAST_WORDS);
        loop {
            if self.shared.has_peer_ended() && self.is_idle() {
                // It has said all that it will.
                return error;
            }
            match self.next_committed(patience) {
                Err(Error::TimedOut { .. }) => return error,
                Err(explained) if explained.blame() != Blame::Transport => return explained,
                // The control channel ended too: nothing more will come.
                Err(_) if self.is_idle() => return error,
                Ok(_) | Err(_) => {}
            }
        }
    }

    /// The link is lost: ends all threads that use it. Bytes of control messages on it, once.
    pub(crate) fn end(&mut self) -> u64 {
        self.close();
        self.control.end()
    }

    /// Ends all threads of this migration.
    pub(crate) fn close(&mut self) {
        self.interrupt.interrupt();
        // The control thread may have more than there is room for.
        self.messages = never();
        self.crew.join();
    }
}

impl<R> Drop for Session<R> {
    fn drop(&mut self) {
        self.interrupt.interrupt();
        self.messages = never();
        self.crew.join();
    }
}

fn refuse_failures<R>(input: Result<Input<R>, RecvError>) -> Result<Item<R>, Error> {
    // A session holds a sender of each of its queues.
    let input = input.map_err(|RecvError| Error::Internal("a queue has no sender"))?;
    match input {
        Input::Message(Message::Failed { reason, text }) => Err(Error::PeerFailed { reason, text }),
        Input::ControlEnded(error) | Input::Panicked(error) => Err(error),
        Input::Message(message) => Ok(Item::Message(message)),
        Input::Report(report) => Ok(Item::Report(report)),
    }
}

/// Sees to it that a thread does not end without a word: neither by a panic, nor because the hook that
/// was to run it did not.
struct Witness<R> {
    role: ThreadRole,
    shared: Arc<Shared>,
    /// `None` once there is nothing to report any more.
    feed: Option<Sender<Input<R>>>,
}

impl<R> Witness<R> {
    fn watch(mut self, body: impl FnOnce()) {
        let feed = self.feed.take();
        if let Err(panic) = caught(format!("the thread {}", self.role), body)
            && let Some(feed) = feed
        {
            self.report(&feed, panic);
        }
    }

    fn report(&self, feed: &Sender<Input<R>>, panic: Error) {
        let word = panic.last_word();
        // Without a driver nobody wants to know.
        let _ = feed.send(Input::Panicked(panic));
        // Nobody waits in a call for what that thread was to do.
        self.shared.end_peer(word.as_ref());
    }
}

impl<R> Drop for Witness<R> {
    fn drop(&mut self) {
        if let Some(feed) = self.feed.take() {
            let (place, message) =
                (format!("the thread {}", self.role), "it was never run".to_owned());
            self.report(&feed, Error::Panicked { place, message });
        }
    }
}

/// The control thread: takes what comes, until the channel ends or the peer breaks the protocol.
fn listen<R>(
    mut receiver: Box<dyn ControlReceiver>,
    feed: &Sender<Input<R>>,
    shared: &Shared,
    talk: &Control,
    life_signs: Option<Duration>,
) {
    loop {
        let input = match receiver.receive(life_signs) {
            Err(TransportError::TimedOut { .. }) if life_signs.is_some() => {
                match talk.show_life() {
                    Ok(()) => continue,
                    Err(error) => Input::ControlEnded(error),
                }
            }
            Ok(frame) => talk.hear(&frame).map_or_else(Input::ControlEnded, Input::Message),
            Err(error) => Input::ControlEnded(Error::Transport(error)),
        };
        let word = match &input {
            Input::ControlEnded(error) if !talk.is_survived(error) => error.last_word(),
            _ => None,
        };
        let ended = matches!(input, Input::ControlEnded(_));
        let failed = matches!(input, Input::Message(Message::Failed { .. }));
        let heard = feed.send(input).is_ok();
        if ended || failed {
            // Who is in a call finds the reason in the queue.
            shared.end_peer(word.as_ref());
        }
        if ended || !heard {
            return;
        }
    }
}

/// The error for a message that the protocol allows and the driver has no place for.
pub(crate) fn unexpected(message: &Message, state: &'static str) -> Error {
    tracing::error!(message = %message.kind(), state, "no place for a message that is allowed");
    Error::Internal("a message that is allowed has no place")
}

#[cfg(all(test, feature = "test-support"))]
mod tests;
