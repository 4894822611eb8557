//! Random and mutated frames for as long as `FUZZ_SECONDS` says (default 1): into the reader, and into a connection.
//! `FUZZ_SEED` repeats a run.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "what fails in here is a test that fails"
)]

use std::io::{IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream as Raw;
use std::time::{Duration, Instant};

use fuse_secrets_csi::wire::link::{AskError, End, Link};
use fuse_secrets_csi::wire::message::{Done, Message};
use fuse_secrets_csi::wire::{Fault, HEADER, Header, LONGEST, MOST_DESCRIPTORS, encode};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tokio::net::UnixStream;

#[path = "fuzz/dice.rs"]
mod dice;

use dice::{Dice, time};

const RECORDED: &str = include_str!("wire-v1.hex");
/// What stands in the recorded `Publish`.
const TOKEN: &str = "not.a.token";
/// Pieces that a parser of JSON may stumble over.
const PIECES: [&str; 12] = [
    "null",
    "-1",
    "1e999",
    "18446744073709551616",
    "\"\\ud800\"",
    "\"\\u0000\"",
    "[[[[[[[[",
    "{\"a\":{\"a\":",
    "}",
    "\"",
    ",\"volume\":\"twice\"",
    "\u{feff}",
];

fn seeds() -> Vec<Vec<u8>> {
    RECORDED.lines().map(|line| hex::decode(line).unwrap()).collect()
}

/// Noise, or a recorded frame with a few changes, whose length is mostly right all the same.
fn input(dice: &mut Dice, seeds: &[Vec<u8>]) -> Vec<u8> {
    let mut frame = seeds[dice.below(seeds.len())].clone();
    if dice.below(16) == 0 {
        frame = dice.bytes(200);
    }
    for _ in 0..dice.below(6) {
        let range = dice.range(frame.len());
        match dice.below(7) {
            0 if !frame.is_empty() => {
                let at = dice.below(frame.len());
                frame[at] ^= 1 << dice.below(8);
            }
            1 => drop(frame.drain(range)),
            2 => frame.truncate(range.end),
            3 => {
                let noise = dice.bytes(20);
                drop(frame.splice(range, noise));
            }
            4 => {
                let other = &seeds[dice.below(seeds.len())];
                let piece = other[dice.range(other.len())].to_vec();
                drop(frame.splice(range, piece));
            }
            5 => {
                drop(frame.splice(
                    range,
                    PIECES[dice.below(PIECES.len())].bytes().cycle().take(1 + dice.below(999)),
                ))
            }
            _ => {
                let again = frame[range.clone()].repeat(1 + dice.below(4));
                drop(frame.splice(range, again));
            }
        }
    }
    if dice.below(8) > 0 && frame.len() >= HEADER {
        frame[..6].copy_from_slice(b"FSCS\x01\0");
        let length = u32::try_from(frame.len() - HEADER).unwrap();
        frame[12..16].copy_from_slice(&length.to_le_bytes());
    }
    frame
}

#[test]
fn whatever_arrives_is_read_or_refused_within_the_limits_and_never_repeated() {
    let (mut dice, seeds, end) = (Dice::new(), seeds(), Instant::now() + time());
    let (mut read, mut refused) = (0u64, 0u64);
    while Instant::now() < end {
        let frame = input(&mut dice, &seeds);
        let result = frame.split_first_chunk::<HEADER>().ok_or(Fault::Length).and_then(|(head, payload)| {
            let header = Header::decode(head)?;
            assert!(header.length <= LONGEST && header.descriptors <= MOST_DESCRIPTORS);
            header.open(payload).map(|message| (header, message))
        });
        match result {
            Ok((header, message)) => {
                read += 1;
                assert_eq!(message.kind(), header.kind);
                // What was read can be written, and means the same to the next reader.
                let once = encode(header.id, &message, header.descriptors.into()).unwrap();
                let (head, payload) = once.split_first_chunk().unwrap();
                let again = Header::decode(head).unwrap().open(payload).unwrap();
                assert!(encode(header.id, &again, header.descriptors.into()).unwrap() == once);
            }
            Err(fault) => {
                refused += 1;
                assert!(!fault.to_string().contains(TOKEN));
            }
        }
    }
    println!("{read} read, {refused} refused");
    assert!(read > 100 && refused > 100, "{read} read, {refused} refused");
}

#[test]
fn a_connection_survives_or_ends_and_keeps_no_descriptor() {
    let (mut dice, seeds) = (Dice::new(), seeds());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let null = std::fs::File::open("/dev/null").unwrap();
    let (before, end, mut connections) = (open(), Instant::now() + time(), 0u64);
    while Instant::now() < end {
        connections += 1;
        let (ours, mut theirs) = Raw::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        // What does not fit into the socket at once is left out: nobody reads meanwhile.
        theirs.set_nonblocking(true).unwrap();
        for _ in 0..dice.below(8) {
            let frame = input(&mut dice, &seeds);
            let announced = frame.get(16).copied().unwrap_or_default();
            let count = if dice.below(4) == 0 { dice.below(70) } else { usize::from(announced.min(64)) };
            let carried = vec![null.as_fd(); count];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(70))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            assert!(carried.is_empty() || control.push(SendAncillaryMessage::ScmRights(&carried)));
            let _ = sendmsg(&theirs, &[IoSlice::new(&frame)], &mut control, SendFlags::NOSIGNAL);
        }
        let _ = theirs.write(&dice.bytes(30));
        theirs.shutdown(std::net::Shutdown::Write).unwrap();
        runtime.block_on(async {
            let accepted = if dice.below(2) == 0 { End::Accepted } else { End::Connected };
            let (link, mut asked) = Link::start(UnixStream::from_std(ours).unwrap(), accepted);
            let answering = async {
                while let Some(asked) = asked.recv().await {
                    asked.answer(Message::Done(Done::default()));
                }
            };
            let question = Message::Done(Done::default());
            let soon = Instant::now() + Duration::from_secs(20);
            let (answer, ()) = tokio::join!(link.ask(&question, Vec::new(), soon), answering);
            assert!(!matches!(answer, Err(AskError::Deadline)));
            link.closed().await;
        });
    }
    println!("{connections} connections");
    assert_eq!(before, open());
    assert!(connections > 10);
}
