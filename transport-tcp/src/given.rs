//! Links over sockets that are connected already: the host has dialled them itself, or was handed them.

use std::os::fd::OwnedFd;

use pageferry::transport::{LinkId, TransportError};

use crate::connection::LinkState;
use crate::destination::TcpDestinationLink;
use crate::dial::Dialled;
use crate::hearing::{Given, GivenChannels, Hearing, TAKING};
use crate::options::TcpOptions;
use crate::preamble::{Kind, Preamble};
use crate::source::TcpSourceLink;
use crate::trust::Trust;
use crate::waiting::deadline_after;

/// The sockets of one link, connected: one for control, and one for each data channel, in the same order at both ends.
///
/// For a host that makes its connections itself: over unix or vsock, through a proxy or a tunnel, or by a process that
/// may open sockets where this one may not. Nobody is waited for and nobody else can come in, so who is at the other
/// end is the host's to know, or [`TcpOptions::security`] proves it: the name of its certificate is
/// [`Tls::peer_name`](crate::Tls::peer_name) then. Pages go from and to guest memory as over [`connect()`](crate::connect()); the link says
/// that it is 0.0.0.0:0 whose sockets have no IP address.
///
/// ```
/// use std::os::unix::net::UnixStream;
/// use std::thread;
///
/// use pageferry::transport::TransportError;
/// use pageferry_tcp::{GivenSockets, TcpOptions};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let (control, their_control) = UnixStream::pair()?;
/// let (data, their_data) = UnixStream::pair()?;
/// let here = GivenSockets::new(control.into(), vec![data.into()], TcpOptions::default())?;
/// let there = GivenSockets::new(their_control.into(), vec![their_data.into()], TcpOptions::default())?;
/// let destination = thread::spawn(|| there.destination());
/// let _source = here.source()?;
/// let _destination = destination.join().expect("no panic")?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct GivenSockets {
    control: Given,
    data: Vec<Given>,
    options: TcpOptions,
}

impl GivenSockets {
    /// Takes them: stream sockets that are connected, and on which nothing was said yet. At least as many for data as
    /// the migration has channels; those that are left over are closed. Of the options all count but those for
    /// connecting and accepting: [`TcpOptions::connect_timeout`] and [`TcpOptions::preamble_timeout`] are how long the
    /// other end may take to say what it says first.
    pub fn new(
        control: OwnedFd,
        data: Vec<OwnedFd>,
        options: TcpOptions,
    ) -> Result<Self, TransportError> {
        let given = |socket| {
            Given::new(socket, &options)
                .map_err(|cause| TransportError::Io { operation: TAKING, cause })
        };
        let control = given(control)?;
        let data = data.into_iter().map(given).collect::<Result<_, _>>()?;
        Ok(Self { control, data, options })
    }

    /// The source's end. Waits for the destination's.
    pub fn source(self) -> Result<TcpSourceLink, TransportError> {
        let Self { control, data, options } = self;
        let id = LinkId::random()
            .map_err(|cause| TransportError::Io { operation: "make an id for a link", cause })?;
        let state = LinkState::new(|| {});
        let preamble = Preamble { id, kind: Kind::Control };
        let trust = Trust::new(&options, &control.peer.to_string())?;
        let control =
            Dialled::over(control, &preamble, &options, &trust, &state)?.await_answer()?;
        Ok(TcpSourceLink::given(id, options, trust, state, &control, data))
    }

    /// The destination's end. Waits for the source's.
    pub fn destination(self) -> Result<TcpDestinationLink, TransportError> {
        let Self { control, data, options } = self;
        let state = LinkState::new(|| {});
        let mut control = Hearing::new(control, &options, &state)?;
        let after = options.preamble_timeout;
        let preamble = control.hear(deadline_after(Some(after)), after)?;
        let Preamble { id, kind: Kind::Control } = preamble else {
            return Err(
                control.refuse("the preamble of a data channel where the control channel is due")
            );
        };
        control.answer()?;
        let data = data.into_iter().map(|given| Hearing::new(given, &options, &state));
        let data = GivenChannels(data.collect::<Result<_, _>>()?);
        Ok(TcpDestinationLink::given(id, state, &control.connection, data))
    }
}
