//! Device state as its users have it: derived types, streams, schemas and machines.

mod generate;
mod golden;
mod inspected;
mod mutate;
mod registry;
mod round_trip;
mod schemas;
mod strict;
mod versions;
mod zoo;
