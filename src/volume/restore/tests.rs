//! Volumes that a predecessor left, on a real cache and a scripted store, under a stopped clock.

use std::sync::atomic::Ordering;

use super::*;
use crate::store::scripted::{Scenario, token};
use crate::volume::lent::testing::Shelf;
use crate::volume::record::Init;
use crate::volume::tests::{Bench, content, now, pass};

const FILES: [(&str, &str); 1] = [("p", "password")];

fn lending(shelf: &Arc<Shelf>) -> Lending {
    let keeper = Arc::clone(shelf) as Arc<dyn Keeper>;
    Lending { keeper, target: "/there".into(), group: None, init: Init::default() }
}

/// A volume whose file is `one`, all of it deposited.
async fn lent(bench: &Bench, freshness: Freshness) -> (Arc<Shelf>, Arc<Volume>) {
    let shelf = Arc::new(Shelf::default());
    bench.store.rotate("app", "one");
    let spec = Bench::spec(&FILES, freshness);
    let id = VolumeId("v".into());
    let volume = Volume::lent(id, spec, Pod::default(), bench.surroundings(), lending(&shelf)).unwrap();
    *shelf.watched.lock().unwrap() = Arc::downgrade(&volume);
    bench.publish(&volume).await.unwrap();
    volume.deposit_all(&Arc::new(Credential::Jwt(token("first")))).await.unwrap();
    (shelf, volume)
}

/// The same, and its agent is gone.
async fn left(freshness: Freshness) -> Arc<Shelf> {
    left_after(&[], freshness).await
}

async fn left_after(values: &[&str], freshness: Freshness) -> Arc<Shelf> {
    let bench = Bench::new();
    let (shelf, volume) = lent(&bench, freshness).await;
    for value in values {
        bench.store.rotate("app", value);
        pass(70).await;
        assert_eq!(content(&volume, 0).unwrap(), *value);
    }
    shelf
}

fn legacy(shelf: &Shelf) -> Legacy {
    Legacy { id: VolumeId("v".into()), target: "/there".into(), parts: shelf.parts(), suspect: false }
}

fn restore(bench: &Bench, shelf: &Arc<Shelf>, legacy: Legacy) -> Arc<Volume> {
    let keeper = Arc::clone(shelf) as Arc<dyn Keeper>;
    Volume::restore(legacy, bench.surroundings(), keeper, &bench.cache, now()).unwrap()
}

fn at(seconds: u64) -> Moment {
    now() + Duration::from_secs(seconds)
}

#[tokio::test(start_paused = true)]
async fn a_restored_volume_is_served_with_the_store_down_fresh_by_the_recorded_time() {
    let shelf = left(Freshness::default()).await;
    let bench = Bench::new();
    bench.store.play(Scenario::Hanging);
    let volume = restore(&bench, &shelf, legacy(&shelf));
    assert_eq!((content(&volume, 0).unwrap(), volume.standing(0, now())), ("one".into(), Standing::Fresh));
    assert_eq!(volume.standing(0, at(61)), Standing::LastKnown, "nobody waits for the store");
    pass(300).await;
    assert_eq!(
        (content(&volume, 0).unwrap(), volume.standing(0, at(300))),
        ("one".into(), Standing::LastKnown)
    );
    assert!(volume.report().refreshed.is_some(), "the predecessor's time is told");
}

#[tokio::test(start_paused = true)]
async fn a_store_that_says_the_same_makes_no_generation_and_another_value_one_above() {
    let shelf = left(Freshness::default()).await;
    let bench = Bench::new();
    bench.store.rotate("app", "one");
    let volume = restore(&bench, &shelf, legacy(&shelf));
    pass(1).await;
    assert_eq!((volume.generations().numbers(), volume.standing(0, now())), (vec![1], Standing::Fresh));
    bench.store.rotate("app", "two");
    pass(70).await;
    assert_eq!((volume.generations().numbers(), content(&volume, 0).unwrap()), (vec![1, 2], "two".into()));
    assert_eq!(shelf.names(), [Part::Record, Part::Opens, Part::Generation(1), Part::Generation(2)]);
}

#[tokio::test(start_paused = true)]
async fn the_grace_of_a_restored_value_counts_from_the_recorded_time() {
    let freshness = Freshness { stale_grace: Some(Duration::from_secs(30)), ..Freshness::default() };
    let shelf = left(freshness).await;
    let bench = Bench::new();
    bench.store.play(Scenario::Sealed);
    let volume = restore(&bench, &shelf, legacy(&shelf));
    assert_eq!(volume.standing(0, at(80)), Standing::LastKnown);
    assert_eq!(volume.standing(0, at(100)), Standing::Gone);
    volume.sweep(at(100)).await;
    assert_eq!(
        (content(&volume, 0), volume.generations().numbers()),
        (None, vec![2]),
        "and none is left of it"
    );
    bench.store.play(Scenario::Healthy);
    bench.store.rotate("app", "one");
    pass(130).await;
    assert_eq!((content(&volume, 0).unwrap(), volume.standing(0, now())), ("one".into(), Standing::Fresh));
}

#[tokio::test(start_paused = true)]
async fn a_broken_generation_is_passed_over_and_its_number_is_not_used_again() {
    let shelf = left_after(&["two"], Freshness::default()).await;
    shelf.spoil(Part::Generation(2));
    let bench = Bench::new();
    bench.store.play(Scenario::Hanging);
    let volume = restore(&bench, &shelf, legacy(&shelf));
    assert_eq!((volume.generations().numbers(), content(&volume, 0).unwrap()), (vec![1], "one".into()));
    assert_eq!(volume.generations().next_number(), 3);
}

#[tokio::test(start_paused = true)]
async fn without_a_readable_generation_nothing_is_served_until_the_store_answers() {
    for suspect in [true, false] {
        let shelf = left_after(&["two"], Freshness::default()).await;
        if !suspect {
            shelf.spoil(Part::Generation(1));
            shelf.spoil(Part::Generation(2));
        }
        let bench = Bench::new();
        bench.store.play(Scenario::Sealed);
        let volume = restore(&bench, &shelf, Legacy { suspect, ..legacy(&shelf) });
        pass(10).await;
        assert!(volume.generations().current().is_none() && !volume.is_blank());
        assert_eq!(volume.standing(0, now()), Standing::Gone);
        bench.store.play(Scenario::Healthy);
        bench.store.rotate("app", "three");
        pass(130).await;
        assert_eq!((volume.generations().numbers(), content(&volume, 0).unwrap()), (vec![3], "three".into()));
    }
}

#[tokio::test(start_paused = true)]
async fn a_volume_whose_record_cannot_be_read_is_blank() {
    let shelf = left(Freshness::default()).await;
    shelf.spoil(Part::Record);
    let volume = restore(&Bench::new(), &shelf, legacy(&shelf));
    assert!(volume.is_blank() && volume.generations().current().is_none());
    assert_eq!(volume.generations().next_number(), 2);
    let nothing = Legacy { parts: Vec::new(), ..legacy(&shelf) };
    assert!(restore(&Bench::new(), &shelf, nothing).is_blank());
}

#[tokio::test(start_paused = true)]
async fn open_handles_are_counted_on_and_keep_their_generation() {
    let bench = Bench::new();
    let (shelf, volume) = lent(&bench, Freshness::default()).await;
    let _ = volume.generations().open(1).unwrap();
    for value in ["two", "three", "four"] {
        bench.store.rotate("app", value);
        pass(70).await;
    }
    assert_eq!(volume.generations().numbers(), [1, 3, 4]);
    volume.retire().await;
    drop(volume);
    let next = Bench::new();
    next.store.play(Scenario::Hanging);
    let volume = restore(&next, &shelf, legacy(&shelf));
    assert_eq!(volume.generations().numbers(), [1, 3, 4]);
    assert_eq!(volume.generations().find(1).unwrap().open_handles(), 1);
    assert_eq!(volume.generations().release(1), [1]);
    volume.sweep(now()).await;
    let kept = [Part::Record, Part::Opens, Part::Generation(3), Part::Generation(4)];
    assert_eq!(shelf.names(), kept, "the keeper is told what is gone");
}

#[tokio::test(start_paused = true)]
async fn without_its_table_every_generation_counts_as_open() {
    let bench = Bench::new();
    let (shelf, volume) = lent(&bench, Freshness::default()).await;
    let _ = volume.generations().open(1).unwrap();
    for value in ["two", "three"] {
        bench.store.rotate("app", value);
        pass(70).await;
    }
    volume.retire().await;
    drop(volume);
    let next = Bench::new();
    next.store.play(Scenario::Hanging);
    let mut legacy = legacy(&shelf);
    legacy.parts.retain(|(part, _)| *part != Part::Opens);
    let volume = restore(&next, &shelf, legacy);
    assert_eq!(volume.generations().release(1), [] as [u32; 0], "there may be other handles on it");
    assert_eq!(volume.generations().numbers(), [1, 2, 3]);
}

#[tokio::test(start_paused = true)]
async fn a_generation_is_deposited_before_it_is_served() {
    let bench = Bench::new();
    let (shelf, volume) = lent(&bench, Freshness::default()).await;
    bench.store.rotate("app", "two");
    pass(70).await;
    assert_eq!(volume.generations().numbers(), [1, 2]);
    let served = shelf.served.lock().unwrap();
    let generations: Vec<_> = served.iter().filter(|(part, _)| matches!(part, Part::Generation(_))).collect();
    assert_eq!(generations, [&(Part::Generation(1), vec![]), &(Part::Generation(2), vec![1])]);
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_deposited_is_served_and_deposited_later() {
    let bench = Bench::new();
    let (shelf, volume) = lent(&bench, Freshness::default()).await;
    shelf.refuses.store(true, Ordering::Release);
    bench.store.rotate("app", "two");
    volume.renew(token("second")).await.unwrap();
    pass(70).await;
    assert_eq!(content(&volume, 0).unwrap(), "two");
    volume.sweep(now()).await;
    assert_eq!(shelf.names(), [Part::Record, Part::Opens, Part::Generation(1)]);
    shelf.refuses.store(false, Ordering::Release);
    volume.sweep(now()).await;
    assert_eq!(shelf.names(), [Part::Record, Part::Opens, Part::Generation(1), Part::Generation(2)]);
    let pages = bench.memory.adopt(shelf.parts().remove(0).1).unwrap();
    assert!(Record::read(&pages).unwrap().token.expose() == "second");
}

#[tokio::test(start_paused = true)]
async fn a_retired_volume_builds_nothing_any_more() {
    let bench = Bench::new();
    let (shelf, volume) = lent(&bench, Freshness::default()).await;
    volume.retire().await;
    bench.store.rotate("app", "two");
    pass(70).await;
    assert_eq!(volume.generations().numbers(), [1]);
    assert_eq!(shelf.names(), [Part::Record, Part::Opens, Part::Generation(1)]);
}

#[tokio::test(start_paused = true)]
async fn what_is_given_up_is_wiped_for_whoever_keeps_it() {
    let bench = Bench::new();
    let (shelf, volume) = lent(&bench, Freshness::default()).await;
    volume.give_up().await;
    drop(volume);
    pass(1).await;
    for (part, file) in shelf.parts() {
        if part != Part::Opens {
            let pages = bench.memory.adopt(file).unwrap();
            assert!(pages.expose().iter().all(|byte| *byte == 0), "{part:?}");
        }
    }
    assert_eq!(bench.memory.used(), 0);
}

#[tokio::test(start_paused = true)]
async fn all_parts_are_there_for_a_keeper_that_was_started_anew() {
    let bench = Bench::new();
    let (_shelf, volume) = lent(&bench, Freshness::default()).await;
    bench.store.rotate("app", "two");
    pass(70).await;
    let names: Vec<Part> = volume.parts().unwrap().into_iter().map(|(part, _)| part).collect();
    assert_eq!(names, [Part::Record, Part::Opens, Part::Generation(1), Part::Generation(2)]);
}
