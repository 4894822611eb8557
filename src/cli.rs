//! The command line: thin commands that print tables.

/// `check`: reads class documents and says what they ask for, or everything that is wrong with them.
pub mod check;
