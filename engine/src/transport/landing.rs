//! Who is told of what has landed.

use std::fmt;

use super::Run;

/// Is told of each batch once its bytes are in guest memory, and before the source can know that; nobody, by default.
#[derive(Default)]
pub struct LandingWatch(Option<Box<Watch>>);

type Watch = dyn FnMut(&[Run]) + Send;

impl LandingWatch {
    /// Calls this on the thread that receives, with the runs of the batch.
    pub fn new(watch: impl FnMut(&[Run]) + Send + 'static) -> Self {
        Self(Some(Box::new(watch)))
    }

    /// Whether anybody is told.
    pub fn is_set(&self) -> bool {
        self.0.is_some()
    }

    /// These have landed.
    pub fn landed(&mut self, runs: &[Run]) {
        if let Some(watch) = &mut self.0 {
            watch(runs);
        }
    }
}

impl fmt::Debug for LandingWatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("LandingWatch").field(&self.is_set()).finish()
    }
}
