//! A source, before it is accepted.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use pageferry::transport::reception::{Arrived, Board, Served};
use pageferry::transport::{Greeted, LinkId, Standing};

use crate::channels::Joined;
use crate::connection::LinkState;
use crate::incoming::Incoming;

/// What the acceptor's thread and the links tell each other.
pub(crate) type TcpBoard = Board<Newcomer, Joined>;

#[derive(Debug)]
pub(crate) struct Newcomer {
    pub(crate) id: LinkId,
    pub(crate) incoming: Incoming,
    /// Its first control frame, where one had to come.
    pub(crate) greeting: Option<Vec<u8>>,
    round_trip: Duration,
    /// Of its link, when it has one.
    pub(crate) state: Arc<LinkState>,
}

impl Newcomer {
    /// It has greeted, so long after it was let in.
    pub(crate) fn greeted(
        id: LinkId,
        incoming: Incoming,
        greeting: Vec<u8>,
        round_trip: Duration,
        board: &Arc<TcpBoard>,
    ) -> Self {
        let state = LinkState::new(board.waker());
        state.fate.stands(Standing::greeted(round_trip));
        Self { id, incoming, greeting: Some(greeting), round_trip, state }
    }

    /// It needs no greeting; its preamble is answered when it has its place.
    pub(crate) fn stranger(id: LinkId, incoming: Incoming, board: &Arc<TcpBoard>) -> Self {
        let (round_trip, state) = (Duration::ZERO, LinkState::new(board.waker()));
        Self { id, incoming, greeting: None, round_trip, state }
    }

    /// How it has greeted.
    pub(crate) fn how(&self) -> Greeted {
        let bytes = self.greeting.as_ref().map_or(0, Vec::len);
        Greeted { from: self.incoming.peer, bytes, round_trip: self.round_trip }
    }
}

impl Arrived for Newcomer {
    fn link(&self) -> LinkId {
        self.id
    }

    fn peer(&self) -> SocketAddr {
        self.incoming.peer
    }

    fn greeting(&self) -> Option<&[u8]> {
        self.greeting.as_deref()
    }

    fn has_left(&mut self) -> bool {
        // A source that has greeted keeps its half open; what others say, and how, is their own matter.
        if self.greeting.is_some() { self.incoming.has_hung_up() } else { self.incoming.has_left() }
    }

    fn served(&self) -> Arc<dyn Served> {
        Arc::clone(&self.state) as Arc<dyn Served>
    }

    fn take_place(&mut self) -> io::Result<()> {
        self.incoming.wire.socket().set_nonblocking(false)?;
        if self.incoming.is_answered() { Ok(()) } else { self.incoming.let_in() }
    }
}
