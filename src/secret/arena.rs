//! Many small secrets packed into few secret pages. A region of pages is cut into extents; the list of holes stands in
//! ordinary memory, so that the secret pages hold secrets only. First fit: values of one size come and go, holes fit again.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::pages::{MemoryError, Reservation, SecretMemory};
use super::{SecretBytes, wipe};
use crate::sys::mapping::{Extent, OnDrop};
use crate::sys::page_size;

/// Every blob begins at a multiple of this, and so does every hole.
const ALIGNMENT: usize = 16;
/// A region grows with what the arena holds, from one page up to this many: few mappings for many blobs, and no more than
/// one page for the first.
const REGION_PAGES: usize = 16;

/// Packs blobs into pages.
pub struct Arena {
    memory: Arc<SecretMemory>,
    /// By the mapping's id.
    regions: Mutex<BTreeMap<usize, Region>>,
}

/// Some pages and their holes, by offset; two holes never touch.
struct Region {
    holes: Vec<Extent>,
    // Given back after the last extent, and with it the mapping, is gone: fields are dropped in this order.
    reservation: Reservation,
}

impl Arena {
    /// An empty arena; it takes its first page with the first blob and gives the last one back.
    #[must_use]
    pub fn new(memory: Arc<SecretMemory>) -> Arc<Self> {
        Arc::new(Self { memory, regions: Mutex::default() })
    }

    /// Moves a secret in; its source is wiped.
    ///
    /// # Errors
    /// [`MemoryError`]
    pub fn store(self: &Arc<Self>, secret: SecretBytes) -> Result<Blob, MemoryError> {
        let length = secret.len();
        let mut blob = Blob { extent: None, length, arena: Arc::clone(self) };
        if length > 0 {
            let extent = blob.extent.insert(self.take(length.next_multiple_of(ALIGNMENT))?);
            extent[..length].copy_from_slice(secret.expose());
        }
        Ok(blob)
    }

    fn take(&self, wanted: usize) -> Result<Extent, MemoryError> {
        let mut regions = self.regions();
        if let Some(extent) = regions.values_mut().find_map(|region| region.take(wanted)) {
            return Ok(extent);
        }
        let held: usize = regions.values().map(|region| region.reservation.bytes()).sum();
        let size = held.clamp(page_size(), REGION_PAGES * page_size()).max(wanted);
        let map = |size| self.memory.map(size, OnDrop::Wipe);
        let (mapping, reservation, _closed) = match map(size) {
            Err(MemoryError::Full { .. }) if size > wanted => map(wanted)?,
            mapped => mapped?,
        };
        let mut extent = Extent::whole(mapping);
        let rest = extent.split_off(wanted);
        let holes = if rest.is_empty() { Vec::new() } else { vec![rest] };
        regions.insert(extent.mapping_id(), Region { holes, reservation });
        Ok(extent)
    }

    fn give_back(&self, extent: Extent) {
        let id = extent.mapping_id();
        let mut regions = self.regions();
        let empty = regions.get_mut(&id).is_some_and(|region| region.give_back(extent));
        let unmapped = if empty { regions.remove(&id) } else { None };
        // The pages are wiped and unmapped without the lock.
        drop(regions);
        drop(unmapped);
    }

    fn regions(&self) -> MutexGuard<'_, BTreeMap<usize, Region>> {
        self.regions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Region {
    fn take(&mut self, wanted: usize) -> Option<Extent> {
        let at = self.holes.iter().position(|hole| hole.len() >= wanted)?;
        let rest = self.holes[at].split_off(wanted);
        Some(if rest.is_empty() {
            self.holes.remove(at)
        } else {
            std::mem::replace(&mut self.holes[at], rest)
        })
    }

    /// Whether the region is now one hole.
    fn give_back(&mut self, extent: Extent) -> bool {
        let at = self.holes.partition_point(|hole| hole.offset() < extent.offset());
        self.holes.insert(at, extent);
        // Behind first, so that the place of the one before does not move.
        self.merge(at);
        if let Some(before) = at.checked_sub(1) {
            self.merge(before);
        }
        self.holes.first().is_some_and(|hole| hole.len() == self.reservation.bytes())
    }

    /// Merges the hole at `at` with the next one if they touch.
    fn merge(&mut self, at: usize) {
        if at + 1 < self.holes.len() {
            let next = self.holes.remove(at + 1);
            if let Err(apart) = self.holes[at].join(next) {
                self.holes.insert(at + 1, apart);
            }
        }
    }
}

/// One secret in an arena; wiped on drop, and its room given back.
pub struct Blob {
    /// `None`: an empty secret takes no room.
    extent: Option<Extent>,
    length: usize,
    arena: Arc<Arena>,
}

impl Blob {
    /// The bytes.
    #[must_use]
    pub fn expose(&self) -> &[u8] {
        self.extent.as_deref().map_or(&[], |extent| &extent[..self.length])
    }
}

impl Drop for Blob {
    fn drop(&mut self) {
        if let Some(mut extent) = self.extent.take() {
            wipe(&mut extent);
            self.arena.give_back(extent);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn memory(pages: usize) -> Arc<SecretMemory> {
        SecretMemory::with_limit(pages * page_size()).unwrap()
    }

    #[test]
    fn many_small_secrets_share_one_page() {
        let memory = memory(4);
        let arena = Arena::new(Arc::clone(&memory));
        let blobs: Vec<_> =
            (0..page_size() / 32).map(|_| arena.store(SecretBytes::new(vec![7; 20])).unwrap()).collect();
        assert_eq!(memory.used(), page_size());
        drop(blobs);
        assert_eq!(memory.used(), 0, "the last page is given back");
    }

    #[test]
    fn an_empty_secret_takes_no_room() {
        let memory = memory(4);
        let blob = Arena::new(Arc::clone(&memory)).store(SecretBytes::new(Vec::new())).unwrap();
        assert!(blob.expose().is_empty());
        assert_eq!(memory.used(), 0);
    }

    #[test]
    fn the_last_pages_are_used_even_where_a_larger_region_would_not_fit() {
        let memory = memory(5);
        let arena = Arena::new(Arc::clone(&memory));
        let blobs: Vec<_> =
            (0..5).map(|_| arena.store(SecretBytes::new(vec![7; page_size()])).unwrap()).collect();
        assert_eq!(memory.used(), 5 * page_size());
        assert!(arena.store(SecretBytes::new(vec![7])).is_err());
        drop(blobs);
    }

    #[test]
    fn a_dropped_secret_is_wiped_in_place() {
        let memory = memory(4);
        let arena = Arena::new(Arc::clone(&memory));
        let _keeps_the_region = arena.store(SecretBytes::new(vec![1; 16])).unwrap();
        drop(arena.store(SecretBytes::new(vec![7; 64])).unwrap());
        let regions = arena.regions();
        assert!(
            regions.values().flat_map(|region| &region.holes).all(|hole| hole.iter().all(|byte| *byte == 0))
        );
    }

    proptest! {
        #[test]
        fn stored_secrets_keep_their_bytes_whatever_comes_and_goes_around_them(
            steps in prop::collection::vec((any::<bool>(), 0..3_usize * 4096, any::<usize>()), 1..120)
        ) {
            let memory = SecretMemory::with_limit(2 << 20).unwrap();
            let arena = Arena::new(Arc::clone(&memory));
            let mut held: Vec<(u8, usize, Blob)> = Vec::new();
            for (number, (store, length, pick)) in steps.into_iter().enumerate() {
                if store || held.is_empty() {
                    // Small ones are the rule.
                    let length = if pick % 4 == 0 { length } else { length % 100 };
                    let byte = u8::try_from(number + 1).unwrap();
                    held.push((byte, length, arena.store(SecretBytes::new(vec![byte; length])).unwrap()));
                } else {
                    held.swap_remove(pick % held.len());
                }
                let mut spans: Vec<_> = Vec::new();
                for (byte, length, blob) in &held {
                    prop_assert_eq!(blob.expose().len(), *length);
                    prop_assert!(blob.expose().iter().all(|found| found == byte));
                    let start = blob.expose().as_ptr().addr();
                    if *length > 0 {
                        prop_assert_eq!(start % ALIGNMENT, 0);
                        spans.push((start, start + length));
                    }
                }
                spans.sort_unstable();
                prop_assert!(spans.windows(2).all(|pair| pair[0].1 <= pair[1].0), "two secrets overlap");
            }
            held.clear();
            prop_assert_eq!(memory.used(), 0);
            prop_assert!(arena.regions().is_empty());
        }
    }
}
