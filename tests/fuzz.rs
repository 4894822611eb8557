//! What others wrote and this program reads: snapshots and records of another version, classes. Random and mutated, for as long
//! as `FUZZ_SECONDS` says (default 1). `FUZZ_SEED` repeats a run.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "what fails in here is a test that fails, and says with which seed"
)]

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use fuse_secrets::class::parse_each;
use fuse_secrets::config::Settings;
use fuse_secrets::reference::{Address, AuthMethod, Subject};
use fuse_secrets::secret::pages::{Pages, SecretMemory, Sharing};
use fuse_secrets::volume::record::Record;
use fuse_secrets::volume::snapshot::Snapshot;

#[path = "../csi/tests/fuzz/dice.rs"]
mod dice;

use dice::{Dice, time};

const SNAPSHOT: &str = include_str!("snapshot-v1.hex");
const RECORD: &str = include_str!("record-v1.hex");
/// What stands in the recorded record.
const TOKEN: &str = "header.body.signature";
const CLASSES: [&str; 5] = [
    include_str!("../examples/classes/app.yaml"),
    include_str!("../examples/classes/secret-provider-class.yaml"),
    include_str!("../examples/classes/secret-provider-class-openbao.yaml"),
    include_str!("../examples/classes/secrets-store-import.yaml"),
    include_str!("../examples/classes/secrets-store-import-made.yaml"),
];
/// Pieces that parsers may stumble over.
const PIECES: [&str; 16] = [
    "null",
    "-1",
    "1e999",
    "18446744073709551616",
    "\"\\ud800\"",
    "\"\\u0000\"",
    "[[[[[[[[",
    "{\"a\":{\"a\":",
    "../",
    "\n---\n",
    "&a [*a, *a]",
    "*a",
    "<<: ",
    "!!binary ",
    "|\n",
    "\u{feff}",
];

/// A place of this length or less, mostly a short one: what is left should often be read.
fn piece(dice: &mut Dice, within: usize) -> Range<usize> {
    let range = dice.range(within);
    if dice.below(4) == 0 { range } else { range.start..range.end.min(range.start + 8) }
}

/// A few changes.
fn mutate(dice: &mut Dice, bytes: &mut Vec<u8>) {
    for _ in 0..dice.below(5) {
        let range = piece(dice, bytes.len());
        match dice.below(7) {
            0 if !bytes.is_empty() => {
                let at = dice.below(bytes.len());
                bytes[at] ^= 1 << dice.below(8);
            }
            1 => drop(bytes.drain(range)),
            2 if dice.below(4) == 0 => bytes.truncate(range.end),
            3 => {
                let noise = dice.bytes(20);
                drop(bytes.splice(range, noise));
            }
            4 => {
                let times = if dice.below(16) == 0 { dice.below(999) } else { 0 };
                let piece = PIECES[dice.below(PIECES.len())].bytes().cycle();
                drop(bytes.splice(range, piece.take(1 + times)));
            }
            5 => {
                let piece = PIECES[dice.below(PIECES.len())].bytes();
                drop(bytes.splice(range, piece));
            }
            _ => {
                let again = bytes[range.clone()].repeat(1 + dice.below(4));
                drop(bytes.splice(range, again));
            }
        }
    }
}

/// Runs `once` until the time is over; it tells whether its input was read.
fn run(mut once: impl FnMut(&mut Dice) -> bool) {
    let end = Instant::now() + time();
    let (mut dice, mut read, mut refused) = (Dice::new(), 0u64, 0u64);
    while Instant::now() < end {
        if once(&mut dice) { read += 1 } else { refused += 1 }
    }
    println!("{read} read, {refused} refused");
    assert!(read > 10 && refused > 10, "{read} read, {refused} refused");
}

fn decoded(text: &str) -> Vec<u8> {
    hex::decode(text.split_whitespace().collect::<String>()).unwrap()
}

/// Sets length and checksum as the format has them, or the magic and version at least, so that what follows is looked at.
fn frame(dice: &mut Dice, recorded: &[u8], bytes: &mut [u8], length: Range<usize>, checked: usize) {
    let header = length.end.max(checked);
    if bytes.len() < header || dice.below(8) == 0 {
        return;
    }
    bytes[..12].copy_from_slice(&recorded[..12]);
    // Of a snapshot the length is that of the whole, of a record that of the text.
    let whole = bytes.len() - if length.start < checked { header } else { 0 };
    bytes[length].copy_from_slice(&u64::try_from(whole).unwrap().to_le_bytes());
    let checksum = crc32fast::hash(&bytes[checked..]);
    bytes[12..16].copy_from_slice(&checksum.to_le_bytes());
}

fn pages(memory: &Arc<SecretMemory>, bytes: &[u8]) -> Pages {
    let mut pages = memory.allocate(bytes.len(), Sharing::Own).unwrap();
    pages.expose_mut()[..bytes.len()].copy_from_slice(bytes);
    pages
}

#[test]
fn whatever_a_snapshot_holds_is_served_within_its_bounds_or_refused() {
    let (memory, recorded) = (SecretMemory::new().unwrap(), decoded(SNAPSHOT));
    run(|dice| {
        let mut bytes = if dice.below(32) == 0 { dice.bytes(400) } else { recorded.clone() };
        mutate(dice, &mut bytes);
        bytes.push(0);
        frame(dice, &recorded, &mut bytes, 16..24, 16);
        let Ok(snapshot) = Snapshot::open(pages(&memory, &bytes)) else { return false };
        let within = snapshot.pages().expose().as_ptr_range();
        for (index, file) in snapshot.files().iter().enumerate() {
            let value = snapshot.value(index);
            assert_eq!(value.map(<[u8]>::len), file.size());
            let range = value.map(<[u8]>::as_ptr_range);
            assert!(range.is_none_or(|range| within.start <= range.start && range.end <= within.end));
        }
        assert_eq!(snapshot.value(snapshot.files().len()), None);
        true
    });
}

#[test]
fn whatever_a_record_holds_is_read_or_refused_and_no_error_repeats_it() {
    let (memory, recorded) = (SecretMemory::new().unwrap(), decoded(RECORD));
    run(|dice| {
        let mut bytes = if dice.below(32) == 0 { dice.bytes(400) } else { recorded.clone() };
        mutate(dice, &mut bytes);
        bytes.push(b' ');
        frame(dice, &recorded, &mut bytes, 16..24, 24);
        match Record::read(&pages(&memory, &bytes)) {
            Ok(record) => {
                assert!(!record.spec.files.is_empty());
                true
            }
            Err(error) => {
                assert!(!error.to_string().contains(TOKEN));
                false
            }
        }
    });
}

#[test]
fn whatever_a_class_says_is_understood_or_its_faults_are_told() {
    let mut over = Settings::default();
    over.connection.addresses = Some(vec![Address::parse("https://store:8200").unwrap()]);
    over.login.method = Some(AuthMethod::Jwt);
    run(|dice| {
        let mut text = CLASSES[dice.below(CLASSES.len())].as_bytes().to_vec();
        if dice.below(8) == 0 {
            text.extend(b"\n---\n");
            text.extend(CLASSES[dice.below(CLASSES.len())].bytes());
        }
        mutate(dice, &mut text);
        let text = String::from_utf8_lossy(&text);
        let documents = parse_each(&text);
        assert!(!documents.is_empty());
        let mut all = true;
        for document in documents {
            let spec = document.and_then(|class| {
                assert!(!class.full_name().is_empty());
                class.into_spec(&over, &Settings::default(), Subject::Local("fuzz".to_owned()))
            });
            match spec {
                Ok(spec) => assert!(!spec.files.is_empty()),
                Err(faults) => {
                    assert!(faults.iter().count() > 0);
                    all = false;
                }
            }
        }
        all
    });
}
