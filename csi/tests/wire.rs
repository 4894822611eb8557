//! The wire as both programs use it: whole frames, foreign frames, recorded frames.

use std::collections::BTreeMap;

use fuse_secrets_csi::wire::message::{
    Adopt, Deposit, Done, Event, Handover, Hello, Message, Part, Poke, Publish, Role, Secret, Unsupported,
};
use fuse_secrets_csi::wire::{Fault, HEADER, Header, LONGEST, MOST_DESCRIPTORS, encode};
use proptest::prelude::*;
use serde_json::Value;

/// Frames of each message, as version 1 of the programs wrote them. Lines are never changed, only added.
const RECORDED: &str = include_str!("wire-v1.hex");

fn decode(frame: &[u8]) -> Result<(Header, Message), Fault> {
    let (header, payload) = frame.split_first_chunk::<HEADER>().ok_or(Fault::Length)?;
    let header = Header::decode(header)?;
    Ok((header, header.open(payload)?))
}

#[test]
fn every_field_recorded_from_version_1_is_still_read() {
    let mut kinds = Vec::new();
    for frame in RECORDED.lines().map(|line| hex::decode(line).unwrap()) {
        let (header, message) = decode(&frame).unwrap();
        kinds.push(header.kind);
        // What was read is written again with all that it held; a later version may add to it.
        let again = encode(header.id, &message, header.descriptors.into()).unwrap();
        let fields = |frame: &[u8]| -> Value { serde_json::from_slice(&frame[HEADER..]).unwrap() };
        let (recorded, again) = (fields(&frame), fields(&again));
        for (name, value) in recorded.as_object().unwrap() {
            assert!(!value.is_null() && again[name] == *value, "{name} of message {}", header.kind);
        }
    }
    kinds.dedup();
    assert_eq!(kinds, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 128, 129, 130]);
}

#[test]
fn the_words_and_numbers_recorded_from_version_1_mean_what_they_meant() {
    let messages = RECORDED.lines().map(|line| decode(&hex::decode(line).unwrap()).unwrap().1);
    let (mut roles, mut handovers, mut deposited, mut adopted) = (vec![], vec![], vec![], vec![]);
    for message in messages {
        match message {
            Message::Hello(Hello { role, handover, .. }) => {
                roles.push(role);
                handovers.push(handover);
            }
            Message::Deposit(Deposit { part, .. }) => deposited.push(part),
            Message::Adopt(Adopt { parts, attempts: 1, .. }) => adopted.extend(parts),
            Message::Publish(publish) => assert!(publish.tokens["vault"].expose() == "not.a.token"),
            _ => {}
        }
    }
    assert_eq!(roles, [Role::Supervisor, Role::Worker, Role::Observer, Role::Shim, Role::Shim]);
    assert_eq!(handovers[3..], [Handover::Resend, Handover::Clone]);
    assert_eq!(deposited, [Part::Record, Part::Opens, Part::Generation(7)]);
    assert_eq!(adopted, [Part::Record, Part::Opens, Part::Generation(6), Part::Generation(7)]);
}

#[test]
fn words_of_a_newer_program_are_read_as_the_one_that_promises_least() {
    let read = |kind: u16, payload: &str| {
        Header { kind, id: 1, length: payload.len(), descriptors: 0 }.open(payload.as_bytes()).unwrap()
    };
    let Message::Hello(hello) = read(1, r#"{"role":"janitor","handover":"telepathy"}"#) else {
        panic!("another message")
    };
    assert_eq!((hello.role, hello.handover), (Role::Unknown, Handover::Clone));
    let parts = r#"{"parts":["record","lease","opens","7","4294967296","-1",""]}"#;
    let Message::Adopt(adopt) = read(4, parts) else { panic!("another message") };
    let other = Part::Other;
    assert_eq!(adopt.parts, [Part::Record, other, Part::Opens, Part::Generation(7), other, other, other]);
    let Message::Deposit(deposit) = read(5, r#"{"part":"lease"}"#) else { panic!("another message") };
    assert_eq!(deposit.part, Part::Other);
}

#[test]
fn unknown_fields_are_ignored_and_missing_ones_have_their_defaults() {
    let payload = br#"{"volume":"v","flavour":{"of":["a","newer","program"]}}"#;
    let header = Header { kind: 2, id: 1, length: payload.len(), descriptors: 0 };
    let Ok(Message::Publish(publish)) = header.open(payload) else { panic!("not read") };
    assert_eq!((publish.volume.as_str(), publish.group, publish.tokens.len()), ("v", None, 0));
}

#[test]
fn an_unknown_message_is_answered_and_not_the_end() {
    let header = Header { kind: 77, id: 5, length: 2, descriptors: 0 };
    assert_eq!(header.open(b"{}").err(), Some(Fault::Unsupported(77)));
    let Message::Unsupported(Unsupported { kind: 77 }) = header.unsupported() else {
        panic!("another answer")
    };
}

#[test]
fn what_is_too_much_is_refused_by_reader_and_writer() {
    let mut frame = encode(1, &Message::Done(Done::default()), 0).unwrap();
    frame[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
    assert_eq!(decode(&frame).err(), Some(Fault::TooLong(u32::MAX as usize)));
    frame[12..16].copy_from_slice(&2u32.to_le_bytes());
    frame[16..18].copy_from_slice(&(MOST_DESCRIPTORS + 1).to_le_bytes());
    assert_eq!(decode(&frame).err(), Some(Fault::Descriptors(65)));
    let long = Message::Hello(Hello { program: "x".repeat(LONGEST), ..Hello::default() });
    assert!(matches!(encode(1, &long, 0), Err(Fault::TooLong(_))));
    assert_eq!(encode(1, &Message::Done(Done::default()), 65).err(), Some(Fault::Descriptors(65)));
}

#[test]
fn another_framing_ends_the_conversation() {
    let frame = encode(1, &Message::Done(Done::default()), 0).unwrap();
    let with = |at: usize, byte: u8| {
        let mut frame = frame.to_vec();
        frame[at] = byte;
        decode(&frame).err()
    };
    assert_eq!((with(0, b'X'), with(4, 2)), (Some(Fault::Magic), Some(Fault::Version(2))));
}

#[test]
fn a_frame_with_a_token_never_moved_and_no_fault_repeats_it() {
    let token = Secret::new("s3cret\"\\".to_owned());
    let publish = Publish { tokens: BTreeMap::from([(String::new(), token)]), ..Publish::default() };
    let frame = encode(1, &Message::Publish(publish), 1).unwrap();
    assert_eq!(frame.len(), frame.capacity());
    let (_, Message::Publish(publish)) = decode(&frame).unwrap() else { panic!("another message") };
    assert!(publish.tokens[""].expose() == "s3cret\"\\");
    let wrong = br#"{"tokens":"s3cret"}"#;
    let fault = Header { kind: 2, id: 1, length: wrong.len(), descriptors: 0 }.open(wrong).err().unwrap();
    assert!(!fault.to_string().contains("s3cret"), "{fault}");
}

proptest! {
    #[test]
    fn whatever_arrives_is_read_or_refused(
        mut head: [u8; HEADER], real in any::<bool>(), kind in 0u16..300, payload: Vec<u8>,
    ) {
        if real {
            head[..8].copy_from_slice(&[b'F', b'S', b'C', b'S', 1, 0, kind.to_le_bytes()[0], kind.to_le_bytes()[1]]);
            head[12..16].copy_from_slice(&u32::try_from(payload.len()).unwrap().to_le_bytes());
        }
        let read = Header::decode(&head).and_then(|header| header.open(&payload));
        prop_assert!(read.is_ok() || !read.err().unwrap().to_string().is_empty());
    }

    #[test]
    fn what_is_written_is_read_again(id: u32, volume: String, text: String, files: Vec<String>, numbers: Vec<u32>) {
        for message in [
            Message::Event(Event { volume: volume.clone(), text, ..Event::default() }),
            Message::Poke(Poke { volume: volume.clone(), files, ..Poke::default() }),
            Message::Deposit(Deposit { volume, part: Part::Generation(id), gone: numbers }),
        ] {
            let frame = encode(id, &message, 0).unwrap();
            let (header, again) = decode(&frame).unwrap();
            prop_assert_eq!(header.id, id);
            prop_assert!(encode(id, &again, 0).unwrap() == frame);
        }
    }
}
