//! The `pageferry-bench` program as its users run it. Nothing here looks at how fast it was.

mod bitmap;
mod command_line;
mod runs;
mod simulate;
mod support;
mod throughput;
