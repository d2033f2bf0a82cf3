//! What another process writes, tracked from here.

mod other;
mod scan;
mod soft_dirty;
