//! System calls that rustix lacks: the only unsafe code of this crate.
#![allow(unsafe_code, reason = "the one module that may; each block lists its invariants")]

/// Descriptors.
pub mod fd;
