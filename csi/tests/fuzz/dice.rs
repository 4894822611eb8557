//! What fuzz tests share, of the shim as of the agent: random numbers, and how long to go on.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::ops::Range;
use std::time::Duration;

/// As long as `FUZZ_SECONDS` says; default 1.
pub(crate) fn time() -> Duration {
    let seconds =
        std::env::var("FUZZ_SECONDS").map(|seconds| seconds.parse().expect("seconds in FUZZ_SECONDS"));
    Duration::from_secs(seconds.unwrap_or(1))
}

/// Numbers that a seed repeats (SplitMix64): `FUZZ_SEED`, else a new one.
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new() -> Self {
        let seed = std::env::var("FUZZ_SEED").map(|seed| seed.parse().expect("a number in FUZZ_SEED"));
        let seed = seed.unwrap_or_else(|_| RandomState::new().hash_one(0));
        // Shown when the test fails.
        println!("FUZZ_SEED={seed}");
        Self(seed)
    }

    pub(crate) fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub(crate) fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.number() % u64::try_from(limit.max(1)).unwrap()).unwrap()
    }

    pub(crate) fn bytes(&mut self, most: usize) -> Vec<u8> {
        (0..self.below(most)).map(|_| self.number().to_le_bytes()[0]).collect()
    }

    pub(crate) fn range(&mut self, within: usize) -> Range<usize> {
        let (one, other) = (self.below(within + 1), self.below(within + 1));
        one.min(other)..one.max(other)
    }
}
