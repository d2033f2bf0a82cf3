//! Switchovers that take too long, guests that do not converge, and limits that change on the way.

mod calling_off;
mod naming;
mod releasing;
mod scene;
mod settings;
#[path = "../support/mod.rs"]
mod support;
mod too_fast;
