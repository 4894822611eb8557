//! The command line: thin commands that print tables.

/// What this node gives, and what is lost without it.
pub mod doctor;
