//! The `pageferry-bench` program as its users run it. Nothing here looks at how fast it was.

mod bitmap;
mod command_line;
mod compare;
mod compare_guests;
mod device_state;
mod hot;
mod latency;
mod migrate;
mod rearm;
mod runs;
mod shapes;
mod simulate;
mod support;
mod throughput;
