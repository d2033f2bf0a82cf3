//! Which events of a device end a link.

use std::time::{Duration, Instant};

/// What a device says of itself, as far as a link is concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DeviceEvent {
    /// Nothing goes through a port any more.
    PortDown { port: u8 },
    /// A port works again.
    PortUp { port: u8 },
    /// The device is of no more use.
    Fatal,
}

/// Follows the one port that a link goes through. A port that is down for a moment is left to the
/// queue pairs, which send again; one that stays down for as long as they would ends the link, also for
/// who only waits.
#[derive(Debug)]
pub(crate) struct PortHealth {
    port: u8,
    patience: Duration,
    /// Until when it has to be up again.
    deadline: Option<Instant>,
}

impl PortHealth {
    /// Of a port that works.
    pub(crate) fn new(port: u8, patience: Duration) -> Self {
        Self { port, patience, deadline: None }
    }

    /// Takes an event in; why the link ends, if it does.
    pub(crate) fn note(&mut self, event: DeviceEvent, now: Instant) -> Option<&'static str> {
        match event {
            DeviceEvent::Fatal => return Some("the device failed"),
            DeviceEvent::PortDown { port } if port == self.port => {
                // Another one of the same outage gives no new time.
                self.deadline.get_or_insert(now + self.patience);
            }
            DeviceEvent::PortUp { port } if port == self.port => self.deadline = None,
            DeviceEvent::PortDown { .. } | DeviceEvent::PortUp { .. } => {}
        }
        None
    }

    /// When to call [`Self::check`].
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Why the link ends, if it is time and the port is not `up`: its event may have got lost.
    pub(crate) fn check(
        &mut self,
        now: Instant,
        up: impl FnOnce(u8) -> bool,
    ) -> Option<&'static str> {
        self.deadline.filter(|deadline| now >= *deadline)?;
        if up(self.port) {
            self.deadline = None;
            return None;
        }
        Some("the port went down, and stayed so")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(2);

    fn down(port: u8) -> DeviceEvent {
        DeviceEvent::PortDown { port }
    }

    #[test]
    fn another_port_is_none_of_its_business() {
        let (mut health, now) = (PortHealth::new(2, PATIENCE), Instant::now());
        assert_eq!(health.note(down(1), now), None);
        assert_eq!(health.deadline(), None);
        assert_eq!(health.note(down(2), now), None);
        health.note(DeviceEvent::PortUp { port: 1 }, now);
        assert_eq!(health.deadline(), Some(now + PATIENCE), "it is port 1 that is up again");
    }

    #[test]
    fn a_flap_ends_nothing_and_an_outage_does() {
        let (mut health, now) = (PortHealth::new(1, PATIENCE), Instant::now());
        assert_eq!(health.note(down(1), now), None);
        let later = now + PATIENCE / 2;
        assert_eq!(health.note(DeviceEvent::PortUp { port: 1 }, later), None);
        assert_eq!(health.check(now + PATIENCE, |_| panic!("it is up")), None);

        assert_eq!(health.note(down(1), now), None);
        assert_eq!(health.note(down(1), later), None);
        assert_eq!(health.check(later, |_| panic!("it is not time")), None);
        assert!(health.check(now + PATIENCE, |port| port != 1).is_some());
    }

    #[test]
    fn a_port_that_came_up_unheard_is_up() {
        let (mut health, now) = (PortHealth::new(1, PATIENCE), Instant::now());
        health.note(down(1), now);
        assert_eq!(health.check(now + PATIENCE, |_| true), None);
        assert_eq!(health.deadline(), None);
    }

    #[test]
    fn a_device_that_fails_ends_it_at_once() {
        let mut health = PortHealth::new(1, PATIENCE);
        assert!(health.note(DeviceEvent::Fatal, Instant::now()).is_some());
    }
}
