//! Tests of both ends over real sockets of this machine.

mod channels;
mod control;
mod endings;
mod failures;
mod given;
mod greetings;
mod links;
mod measure;
mod on_the_way;
mod paths;
mod security;
mod strangers;
mod support;
mod ways;
mod zero_copy;
