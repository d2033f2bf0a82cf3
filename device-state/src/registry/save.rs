//! Saving.

use std::panic::resume_unwind;
use std::thread;

use super::order::{OrderError, order};
use super::{Entry, Registry};
use crate::error::EncodeError;
use crate::stream::{StreamWriter, append_section};
use crate::wire::Writer;

/// Why a machine could not be saved.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SaveError {
    /// A device could not.
    #[error("failed to save device state")]
    Device(#[from] EncodeError),
    /// There is no order.
    #[error("failed to save device state")]
    Order(#[from] OrderError),
}

impl Registry<'_> {
    /// Saves all devices, and gives the stream.
    pub fn save(&mut self) -> Result<Vec<u8>, SaveError> {
        let mut stream = Vec::new();
        self.save_to(&mut stream)?;
        Ok(stream)
    }

    /// Saves all devices, and appends the stream to what is there. After an error nothing was
    /// appended.
    pub fn save_to(&mut self, stream: &mut Vec<u8>) -> Result<(), SaveError> {
        let order = order(&self.entries)?;
        let begin = stream.len();
        let mut writer = StreamWriter::after(std::mem::take(stream));
        let saved = order.into_iter().try_for_each(|at| {
            let Entry { instance, device } = &mut self.entries[at];
            let about = device.about();
            writer.section(about.name, *instance, about.version, |out| device.save(out))
        });
        *stream = writer.finish();
        if saved.is_err() {
            stream.truncate(begin);
        }
        Ok(saved?)
    }

    /// As [`save`](Self::save), by up to so many threads that each save a part of the devices.
    /// The stream is the same. Worth it where many devices take long: a thread costs some ten
    /// microseconds.
    ///
    /// A panic of a device is passed on.
    pub fn save_by_threads(&mut self, threads: usize) -> Result<Vec<u8>, SaveError> {
        if threads <= 1 {
            return self.save();
        }
        let order = order(&self.entries)?;
        let mut places = vec![0; order.len()];
        for (place, at) in order.into_iter().enumerate() {
            places[at] = place;
        }
        // A share is every so manieth device, since neighbours tend to be alike.
        let mut shares: Vec<Vec<_>> = (0..threads).map(|_| Vec::new()).collect();
        for (at, entry) in self.entries.iter_mut().enumerate() {
            let share = at % shares.len();
            shares[share].push((places[at], entry));
        }
        let own = shares.pop().unwrap_or_default();
        let mut sections = thread::scope(|scope| {
            let others: Vec<_> =
                shares.into_iter().map(|share| scope.spawn(|| save_share(share))).collect();
            let mut sections = save_share(own)?;
            for other in others {
                sections.extend(other.join().unwrap_or_else(|panic| resume_unwind(panic))?);
            }
            Ok::<_, EncodeError>(sections)
        })?;
        sections.sort_by_key(|(place, _)| *place);
        let mut writer = StreamWriter::new();
        for (_, section) in &sections {
            writer.encoded(section);
        }
        Ok(writer.finish())
    }
}

/// Sections and their places in the stream.
fn save_share(share: Vec<(usize, &mut Entry<'_>)>) -> Result<Vec<(usize, Vec<u8>)>, EncodeError> {
    let save = |(place, entry): (usize, &mut Entry<'_>)| {
        let about = entry.device.about();
        let mut out = Writer::default();
        append_section(&mut out, about.name, entry.instance, about.version, |out| {
            entry.device.save(out)
        })?;
        Ok((place, out.into_bytes()))
    };
    share.into_iter().map(save).collect()
}
