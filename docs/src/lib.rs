//! The documents whose examples are compiled and run.
