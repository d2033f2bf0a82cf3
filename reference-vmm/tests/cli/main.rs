//! The `pageferry-vmm` program as its users run it: every test starts real processes and looks at
//! their exit status, their JSON and their messages.

mod broken;
mod by_hand;
mod cancelled;
mod check;
mod command_line;
mod convergence;
mod cpu;
mod damaged;
mod demo;
#[path = "../shared/documented.rs"]
mod documented;
mod events;
mod faults;
mod floods;
mod iouring;
mod memory_use;
mod metrics;
mod onward;
mod refused;
mod rejoining;
mod saved;
mod security;
mod settings;
mod strangers;
mod support;
mod system_calls;
mod uncertain;
mod unread;
mod versions;
