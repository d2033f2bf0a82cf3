//! Which of a name's addresses answers (RFC 8305, "Happy Eyeballs").

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::TransportError;

/// How long an address may be silent before the next one is tried too: the connection attempt delay of
/// RFC 8305.
const STAGGER: Duration = Duration::from_millis(250);

/// An address that is tried.
pub trait Attempt: Sized {
    /// What comes of it.
    type Connected;

    /// When it is given up.
    fn deadline(&self) -> Option<Instant>;

    /// Takes in what has happened, without waiting. Where this address is of no use
    /// ([`TransportError::Connect`]) another one may be; other errors end the race.
    fn go_on(self) -> Result<Progress<Self>, TransportError>;
}

/// How far an attempt is.
#[derive(Debug)]
pub enum Progress<A: Attempt> {
    /// Its address is silent.
    NotYet(A),
    /// It has won.
    Connected(A::Connected),
}

/// The attempts to connect to the addresses of one name: one after another, and the next one too when one is
/// silent for a quarter of a second.
#[derive(Debug)]
pub struct Race<A> {
    waiting: VecDeque<SocketAddr>,
    attempts: Vec<A>,
    next_start: Instant,
    last_error: TransportError,
}

impl<A: Attempt> Race<A> {
    /// To these addresses; `nobody` is the error where there are none.
    pub fn new(addresses: Vec<SocketAddr>, nobody: TransportError) -> Self {
        let (attempts, next_start) = (Vec::new(), Instant::now());
        Self { waiting: addresses.into(), attempts, next_start, last_error: nobody }
    }

    /// Waits for the first attempt that is connected. `wait` sleeps until something may have happened to the
    /// attempts, at most until that time. If what is connected is of no use after all ([`Self::note`]) this
    /// may be called again.
    pub fn winner(
        &mut self,
        begin: impl Fn(SocketAddr) -> Result<A, TransportError>,
        wait: impl Fn(&[A], Option<Instant>) -> Result<(), TransportError>,
    ) -> Result<A::Connected, TransportError> {
        loop {
            self.start_next(&begin)?;
            let mut attempts = std::mem::take(&mut self.attempts).into_iter();
            while let Some(attempt) = attempts.next() {
                match self.note(attempt.go_on())? {
                    Some(Progress::NotYet(attempt)) => self.attempts.push(attempt),
                    Some(Progress::Connected(connected)) => {
                        self.attempts.extend(attempts);
                        return Ok(connected);
                    }
                    None => {}
                }
            }
            if !self.attempts.is_empty() {
                let next_start = (!self.waiting.is_empty()).then_some(self.next_start);
                let deadlines = self.attempts.iter().filter_map(A::deadline);
                wait(&self.attempts, deadlines.chain(next_start).min())?;
            } else if self.waiting.is_empty() {
                let nobody = TransportError::OutOfOrder("no address is left");
                return Err(std::mem::replace(&mut self.last_error, nobody));
            }
        }
    }

    /// Starts the next attempt, if it is time or nothing else is under way.
    fn start_next(
        &mut self,
        begin: impl Fn(SocketAddr) -> Result<A, TransportError>,
    ) -> Result<(), TransportError> {
        if !self.attempts.is_empty() && Instant::now() < self.next_start {
            return Ok(());
        }
        let Some(address) = self.waiting.pop_front() else { return Ok(()) };
        self.next_start = Instant::now() + STAGGER;
        let attempt = self.note(begin(address))?;
        self.attempts.extend(attempt);
        Ok(())
    }

    /// Where one address is of no use another may be.
    pub fn note<T>(
        &mut self,
        result: Result<T, TransportError>,
    ) -> Result<Option<T>, TransportError> {
        match result {
            Err(error @ (TransportError::Connect { .. } | TransportError::Security { .. })) => {
                // Who does not answer somewhere else says less than who was not trusted.
                if !matches!(self.last_error, TransportError::Security { .. }) {
                    self.last_error = error;
                }
                Ok(None)
            }
            result => result.map(Some),
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::cell::RefCell;
    use std::io;

    use super::*;

    /// What an address does: its port says.
    #[derive(Debug)]
    struct Tried(SocketAddr);

    const SILENT: u16 = 1;
    const CLOSED: u16 = 2;
    const REFUSES: u16 = 3;
    const ANSWERS: u16 = 4;

    fn at(host: u8, port: u16) -> SocketAddr {
        ([10, 0, 0, host], port).into()
    }

    fn of_no_use(address: SocketAddr) -> TransportError {
        let cause = io::ErrorKind::ConnectionRefused.into();
        TransportError::Connect { address: address.to_string(), cause }
    }

    impl Attempt for Tried {
        type Connected = SocketAddr;

        fn deadline(&self) -> Option<Instant> {
            None
        }

        fn go_on(self) -> Result<Progress<Self>, TransportError> {
            match self.0.port() {
                SILENT => Ok(Progress::NotYet(self)),
                CLOSED => Err(of_no_use(self.0)),
                REFUSES => Err(TransportError::Refused {
                    address: self.0.to_string(),
                    reason: "busy".to_owned(),
                }),
                _ => Ok(Progress::Connected(self.0)),
            }
        }
    }

    fn race(addresses: &[SocketAddr]) -> Race<Tried> {
        Race::new(addresses.to_vec(), of_no_use(at(0, 0)))
    }

    /// Who wins, and how many were under way in each wait.
    fn run(race: &mut Race<Tried>) -> (Result<SocketAddr, TransportError>, Vec<usize>) {
        let waits = RefCell::new(Vec::new());
        let winner = race.winner(
            |address| Ok(Tried(address)),
            |attempts, until| {
                waits.borrow_mut().push(attempts.len());
                let until = until.ok_or(TransportError::Interrupted)?;
                std::thread::sleep(until.saturating_duration_since(Instant::now()));
                Ok(())
            },
        );
        (winner, waits.into_inner())
    }

    #[test]
    fn the_next_address_is_tried_at_once_where_one_is_of_no_use() {
        let (winner, waits) = run(&mut race(&[at(1, CLOSED), at(2, CLOSED), at(3, ANSWERS)]));
        assert_eq!((winner.unwrap(), waits), (at(3, ANSWERS), vec![]));
    }

    #[test]
    fn the_next_address_is_tried_too_where_one_is_silent() {
        let began = Instant::now();
        let (winner, waits) = run(&mut race(&[at(1, SILENT), at(2, SILENT), at(3, ANSWERS)]));
        assert_eq!((winner.unwrap(), waits), (at(3, ANSWERS), vec![1, 2]));
        assert!(began.elapsed() >= 2 * STAGGER);
    }

    #[test]
    fn a_name_of_no_use_says_why_its_last_address_was_not() {
        let (nobody, _) = run(&mut race(&[at(1, CLOSED), at(2, CLOSED)]));
        assert_eq!(nobody.unwrap_err().to_string(), "failed to connect to 10.0.0.2:2");
        let (nowhere, _) = run(&mut race(&[]));
        assert_eq!(nowhere.unwrap_err().to_string(), "failed to connect to 10.0.0.0:0");
    }

    /// With nothing left to start, the wait has no end of its own.
    #[test]
    fn a_refusal_is_an_answer_and_an_interrupt_ends_the_wait() {
        let (refused, _) = run(&mut race(&[at(1, SILENT), at(2, REFUSES), at(3, ANSWERS)]));
        assert!(matches!(refused, Err(TransportError::Refused { .. })), "{refused:?}");
        let (interrupted, waits) = run(&mut race(&[at(1, SILENT)]));
        assert!(matches!(interrupted, Err(TransportError::Interrupted)), "{interrupted:?}");
        assert_eq!(waits, [1]);
    }

    #[test]
    fn the_race_goes_on_where_its_winner_comes_to_nothing() {
        let mut race = race(&[at(1, ANSWERS), at(2, ANSWERS)]);
        let winner = run(&mut race).0.unwrap();
        assert_eq!(race.note::<()>(Err(of_no_use(winner))).unwrap(), None);
        assert_eq!(run(&mut race).0.unwrap(), at(2, ANSWERS));
        assert_eq!(race.note::<()>(Err(of_no_use(at(2, ANSWERS)))).unwrap(), None);
        assert_eq!(run(&mut race).0.unwrap_err().to_string(), "failed to connect to 10.0.0.2:4");
    }
}
