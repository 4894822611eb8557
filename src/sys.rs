//! System calls that rustix lacks: the only unsafe code of this crate.
