//! The source's end of a link: it connects.

use std::net::SocketAddr;
use std::sync::Arc;

use pageferry::memory::GuestMemory;
use pageferry::transport::ways::Way;
use pageferry::transport::{
    Capabilities, ControlChannel, Interrupt, Link, LinkId, PageSender, PageServer, Registration,
    SourceLink, TransportError,
};

use crate::connection::{Connection, LinkState};
use crate::data_socket::DataSocket;
use crate::dial::Dialled;
use crate::end::End;
use crate::hearing::{Given, enough};
use crate::inbox::{Inbox, Side};
use crate::lanes::TcpPageServer;
use crate::options::{TcpOptions, ZeroCopy};
use crate::preamble::{Kind, Preamble};
use crate::sender::TcpPageSender;
use crate::trust::Trust;
use crate::{CAPABILITIES, NAME};

/// The source's end of a link over TCP. Made by [`connect()`](crate::connect()).
///
/// # Resource cleanup
///
/// Dropping it closes all connections, and ends zero-copy sends that are still under way. If data
/// channels were finished and dropped before all their batches were acknowledged, it first waits for the
/// other side to take them, at most two seconds in all.
#[derive(Debug)]
pub struct TcpSourceLink {
    end: End,
    options: TcpOptions,
    trust: Trust,
    inbox: Arc<Inbox>,
    /// How the destination is reached, by the control connection first.
    ways: Vec<Way>,
    /// Where the data channels' connections are there already.
    given: Option<Vec<Given>>,
}

impl TcpSourceLink {
    pub(crate) fn new(
        id: LinkId,
        options: TcpOptions,
        trust: Trust,
        state: Arc<LinkState>,
        control: &Arc<Connection>,
        ways: Vec<Way>,
    ) -> Self {
        let inbox = Arc::new(Inbox::new(control, Side::Source, None));
        Self { end: End::new(id, state, &inbox), options, trust, inbox, ways, given: None }
    }

    pub(crate) fn given(
        id: LinkId,
        options: TcpOptions,
        trust: Trust,
        state: Arc<LinkState>,
        control: &Arc<Connection>,
        data: Vec<Given>,
    ) -> Self {
        Self { given: Some(data), ..Self::new(id, options, trust, state, control, Vec::new()) }
    }

    /// The migration, as the destination's logs call it.
    pub fn link_id(&self) -> LinkId {
        self.end.link_id()
    }

    /// The destination's address.
    pub fn peer_addr(&self) -> SocketAddr {
        self.end.peer_addr()
    }

    /// Whether what passes is encrypted, by whomever.
    pub fn is_encrypted(&self) -> bool {
        self.end.is_encrypted()
    }

    /// Whether data channels are encrypted in this process, and not by the kernel: there are no
    /// [`DataSocket`]s then, since only this transport can move bytes.
    pub fn encrypts_in_process(&self) -> bool {
        self.end.encrypts_in_process()
    }

    /// Fails once the link was interrupted, or it is known why it is over.
    pub fn check(&self) -> Result<(), TransportError> {
        self.end.check()
    }

    /// Opens the connections of `channels` data channels for a transport that moves bytes in a
    /// way of its own. In place of [`SourceLink::open_senders`], and with the destination's
    /// counterpart meanwhile.
    pub fn open_sockets(&mut self, channels: u16) -> Result<Vec<DataSocket>, TransportError> {
        End::sockets(self.open(channels)?)
    }

    fn open(&mut self, channels: u16) -> Result<Vec<Arc<Connection>>, TransportError> {
        let Self { end, options, trust, inbox, ways, given } = self;
        end.open(channels, |end| {
            let kind = |channel| Kind::Data { channel };
            connect(end, options, trust, inbox, ways, given, (kind, channels))
        })
    }
}

/// Connects so many of a kind.
fn connect(
    end: &End,
    options: &TcpOptions,
    trust: &Trust,
    inbox: &Inbox,
    ways: &[Way],
    given: &mut Option<Vec<Given>>,
    wanted: (impl Fn(u16) -> Kind, u16),
) -> Result<Vec<Arc<Connection>>, TransportError> {
    let connected = match given {
        None => dial(end, ways.to_vec(), wanted, options, trust),
        Some(sockets) => enough(sockets, wanted.1).and_then(|()| {
            let sockets = sockets.drain(..usize::from(wanted.1)).collect();
            greet(end, sockets, wanted.0, options, trust)
        }),
    };
    connected.map_err(|error| {
        // Whoever is turned away meanwhile has no migration there, and is told that for each of them.
        inbox.look_for_the_end();
        end.check().err().unwrap_or(error)
    })
}

/// On connections that there are.
fn greet(
    end: &End,
    sockets: Vec<Given>,
    kind: impl Fn(u16) -> Kind,
    options: &TcpOptions,
    trust: &Trust,
) -> Result<Vec<Arc<Connection>>, TransportError> {
    let begun = (0..).zip(sockets).map(|(number, socket)| {
        let preamble = Preamble { id: end.link_id(), kind: kind(number) };
        Dialled::over(socket, &preamble, options, trust, end.state())
    });
    let begun = begun.collect::<Result<Vec<_>, _>>()?;
    begun.into_iter().map(Dialled::await_answer).collect()
}

/// Where the control connection went, and by other ways in turn.
fn dial(
    end: &End,
    mut ways: Vec<Way>,
    (kind, channels): (impl Fn(u16) -> Kind, u16),
    options: &TcpOptions,
    trust: &Trust,
) -> Result<Vec<Arc<Connection>>, TransportError> {
    let brief = options.for_one_of_several();
    let begin = |way, channel, options| {
        let preamble = Preamble { id: end.link_id(), kind: kind(channel) };
        Dialled::begin(way, &preamble, options, trust, end.state())
    };
    let done_without = |way: Way, error: &TransportError| {
        let why = pageferry::Chain::of(error).to_string();
        tracing::warn!(peer = %way.to, from = ?way.from, "data channels go by other ways: {why}");
    };
    let mut dialled = Vec::with_capacity(channels.into());
    // All preambles go out before the first answer is waited for.
    for channel in 0..channels {
        loop {
            let at = usize::from(channel) % ways.len();
            let options = if at == 0 { options } else { &brief };
            match begin(ways[at], channel, options) {
                Err(error @ TransportError::Connect { .. }) if at > 0 => {
                    done_without(ways.remove(at), &error);
                }
                connected => {
                    dialled.push((channel, ways[at], connected?));
                    break;
                }
            }
        }
    }
    let answered = dialled.into_iter().map(|(channel, way, dialled)| {
        match dialled.await_answer() {
            // It was reached, and says nothing.
            Err(error @ TransportError::Connect { .. }) if way != ways[0] => {
                done_without(way, &error);
                begin(ways[0], channel, options)?.await_answer()
            }
            answered => answered,
        }
    });
    answered.collect()
}

impl Link for TcpSourceLink {
    fn name(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            zero_copy: self.options.zero_copy != ZeroCopy::Off,
            protects_pages: self.end.protects_pages(),
            ..CAPABILITIES
        }
    }

    fn control(&mut self) -> Result<ControlChannel, TransportError> {
        self.end.control()
    }

    fn register(&mut self, memory: &Arc<GuestMemory>) -> Result<Registration, TransportError> {
        self.end.register(memory)?;
        Ok(Registration::default())
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        self.end.interrupter()
    }
}

impl SourceLink for TcpSourceLink {
    fn open_senders(&mut self, channels: u16) -> Result<Vec<Box<dyn PageSender>>, TransportError> {
        let memory = self.end.registered()?;
        let connections = self.open(channels)?;
        connections
            .into_iter()
            .map(|connection| {
                let memory = Arc::clone(&memory);
                let sender = TcpPageSender::new(connection, memory, &self.options)?;
                Ok(Box::new(sender) as Box<dyn PageSender>)
            })
            .collect()
    }

    fn serve_reads(&mut self, lanes: u16) -> Result<Vec<Box<dyn PageServer>>, TransportError> {
        let Self { end, options, trust, inbox, ways, given } = self;
        let (memory, connections) = end.open_reads(lanes, |end| {
            let kind = |lane| Kind::Lane { lane };
            connect(end, options, trust, inbox, ways, given, (kind, lanes))
        })?;
        let serve = |connection| -> Result<Box<dyn PageServer>, TransportError> {
            Ok(Box::new(TcpPageServer::new(connection, &memory, &self.options)?))
        };
        connections.into_iter().map(serve).collect()
    }
}
