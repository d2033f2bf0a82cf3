//! Links that are lost and come back, over the in-memory transport: the guest writes all the time, and arrives whole.

mod given_up;
mod lost;
mod reopened;
#[path = "../migration/scene.rs"]
#[expect(dead_code, reason = "shared with the tests of migrations over one link")]
mod scene;
mod strangers;
#[path = "../support/mod.rs"]
mod support;
mod told;
mod trouble;
