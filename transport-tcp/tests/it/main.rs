//! Tests of both ends over real sockets of this machine.

mod channels;
mod control;
mod endings;
mod failures;
mod greetings;
mod links;
mod measure;
mod strangers;
mod support;
mod zero_copy;
