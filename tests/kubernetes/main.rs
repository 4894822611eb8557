//! The agent's side of the API server, over HTTP: classes, the issuer, events.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "what fails in here is a test that fails")]

/// An API server for these tests.
mod api;
/// Classes that are watched.
mod classes;
/// What pods' owners are told.
mod events;
/// Whose tokens are good.
mod issuer;
