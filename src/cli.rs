//! The command line: thin commands that print tables.

/// What this node gives, and what is lost without it.
pub mod doctor;
/// `check`: reads class documents and says what they ask for, or everything that is wrong with them.
pub mod check;
