//! Two ends of a connection, and one end with a peer that does not keep to the protocol. Each test compares the process's
//! descriptors before and after, so they run one at a time.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::cast_possible_truncation,
    reason = "what fails in here is a test that fails"
)]

use std::future::Future;
use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream as Raw;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use fuse_secrets_csi::wire::link::{AT_ONCE, AskError, Asked, End, Link};
use fuse_secrets_csi::wire::message::{Deposit, Done, Hello, Message, Poke, Stats, Unpublish};
use fuse_secrets_csi::wire::{Fault, HEADER, Header, LONGEST, encode};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tokio::net::UnixStream;
use tokio::sync::mpsc::Receiver;
use tokio::task::JoinSet;

/// For what comes at once.
const SOON: Duration = Duration::from_secs(20);

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn descriptors() -> Vec<String> {
    let mut open: Vec<String> = std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok())
        .map(|path| path.display().to_string())
        .filter(|path| !path.starts_with("/proc/"))
        .collect();
    open.sort();
    open
}

/// Runs a test, and then nothing is open that was not open before.
fn alone<F: Future<Output = ()>>(test: impl FnOnce() -> F) {
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let runtime =
        || tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    // The first one leaves a pair of sockets for signals.
    drop(runtime());
    let (before, runtime) = (descriptors(), runtime());
    runtime.block_on(async { tokio::time::timeout(3 * SOON, test()).await.expect("a test that ends") });
    drop(runtime);
    assert_eq!(before, descriptors());
}

fn soon() -> Instant {
    Instant::now() + SOON
}

fn pair() -> ((Link, Receiver<Asked>), (Link, Receiver<Asked>)) {
    let (agent, shim) = UnixStream::pair().unwrap();
    (Link::start(agent, End::Connected), Link::start(shim, End::Accepted))
}

/// A link, and the bare other end of its socket, which blocks.
fn with_raw(end: End) -> ((Link, Receiver<Asked>), Raw) {
    let (ours, theirs) = Raw::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    theirs.set_read_timeout(Some(SOON)).unwrap();
    (Link::start(UnixStream::from_std(ours).unwrap(), end), theirs)
}

fn send_raw(to: &Raw, bytes: &[u8], carried: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(carried.is_empty() || control.push(SendAncillaryMessage::ScmRights(carried)));
    let sent = sendmsg(to, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL).unwrap();
    assert_eq!(sent, bytes.len());
}

fn read_raw(from: &mut Raw) -> (Header, Result<Message, Fault>) {
    let mut head = [0; HEADER];
    from.read_exact(&mut head).unwrap();
    let header = Header::decode(&head).unwrap();
    let mut payload = vec![0; header.length];
    from.read_exact(&mut payload).unwrap();
    (header, header.open(&payload))
}

fn of(volume: impl ToString) -> Message {
    Message::Unpublish(Unpublish { volume: volume.to_string() })
}

fn done() -> Message {
    Message::Done(Done::default())
}

fn warned(text: impl ToString) -> Message {
    Message::Done(Done { warnings: vec![text.to_string()] })
}

fn warning(answer: Message) -> String {
    let Message::Done(Done { mut warnings }) = answer else { panic!("another answer: {}", answer.kind()) };
    warnings.remove(0)
}

fn volume(message: &Message) -> String {
    match message {
        Message::Unpublish(Unpublish { volume }) => volume.clone(),
        other => panic!("another question: {}", other.kind()),
    }
}

/// The reading end of a pipe, and the writing one to be sent: the first sees the end when no copy of the other is open.
fn canary() -> (std::io::PipeReader, OwnedFd) {
    let (reader, writer) = std::io::pipe().unwrap();
    (reader, writer.into())
}

fn is_closed(mut reader: std::io::PipeReader) {
    let ended = std::thread::spawn(move || reader.read(&mut [0]).unwrap());
    assert_eq!(ended.join().unwrap(), 0);
}

#[test]
fn both_sides_ask_and_are_answered() {
    alone(|| async {
        let ((agent, mut of_shim), (shim, mut of_agent)) = pair();
        let answering = async {
            let asked = of_agent.recv().await.unwrap();
            assert_eq!(volume(&asked.message), "from the agent");
            let asked_meanwhile = shim.ask(&of("from the shim"), Vec::new(), soon()).await.unwrap();
            asked.answer(warned(warning(asked_meanwhile) + " and shim"));
        };
        let nested = async {
            let asked = of_shim.recv().await.unwrap();
            assert_eq!(volume(&asked.message), "from the shim");
            asked.answer(warned("agent"));
        };
        let question = of("from the agent");
        let (answer, (), ()) = tokio::join!(agent.ask(&question, Vec::new(), soon()), answering, nested);
        assert_eq!(warning(answer.unwrap()), "agent and shim");
    });
}

#[test]
fn descriptors_arrive_with_their_frame_and_only_with_theirs() {
    alone(|| async {
        let ((agent, _of_shim), (_shim, mut of_agent)) = pair();
        let mut asking = JoinSet::new();
        let mut readers = Vec::new();
        for carried in 0..=64 {
            let (mut ends, mut sent) = (Vec::new(), Vec::new());
            for _ in 0..carried % 5 + if carried == 64 { 60 } else { 0 } {
                let (reader, writer) = canary();
                ends.push(reader);
                sent.push(writer);
            }
            readers.push(ends);
            let agent = agent.clone();
            // Every third one is longer than what the kernel takes at once.
            let files = vec!["x".repeat(1000); if carried % 3 == 0 { 600 } else { 0 }];
            let question = Message::Poke(Poke { volume: carried.to_string(), generation: 0, files });
            asking.spawn(async move { agent.ask(&question, sent, soon()).await.map(warning) });
        }
        for _ in 0..=64 {
            let asked = of_agent.recv().await.unwrap();
            let Message::Poke(Poke { volume, .. }) = &asked.message else { panic!("another question") };
            let number: usize = volume.parse().unwrap();
            assert_eq!(asked.descriptors.len(), readers[number].len());
            for (sent, reader) in asked.descriptors.iter().zip(&mut readers[number]) {
                assert!(rustix::io::fcntl_getfd(sent).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
                rustix::io::write(sent, &[number as u8]).unwrap();
                let mut through = [255];
                reader.read_exact(&mut through).unwrap();
                assert_eq!(usize::from(through[0]), number);
            }
            asked.answer(warned(number));
        }
        while let Some(answer) = asking.join_next().await {
            answer.unwrap().unwrap();
        }
        for reader in readers.into_iter().flatten() {
            is_closed(reader);
        }
    });
}

#[test]
fn three_hundred_questions_at_once_each_get_their_answer_in_whatever_order() {
    alone(|| async {
        let ((agent, _of_shim), (_shim, mut of_agent)) = pair();
        let mut asking = JoinSet::new();
        for number in 0..300 {
            let agent = agent.clone();
            asking.spawn(async move {
                assert_eq!(
                    warning(agent.ask(&of(number), Vec::new(), soon()).await.unwrap()),
                    number.to_string()
                );
            });
        }
        let (mut held, mut most, mut answered) = (Vec::new(), 0, 0);
        while answered < 300 {
            if held.is_empty() {
                held.push(of_agent.recv().await.unwrap());
            }
            while let Ok(more) = of_agent.try_recv() {
                held.push(more);
            }
            most = most.max(held.len());
            assert!(most <= AT_ONCE, "{most} at a time");
            // The last first, and half of them stay for the next round.
            for _ in 0..held.len().div_ceil(2) {
                let asked = held.pop().unwrap();
                let number = volume(&asked.message);
                asked.answer(warned(number));
                answered += 1;
            }
        }
        while let Some(one) = asking.join_next().await {
            one.unwrap();
        }
    });
}

#[test]
fn a_heartbeat_overtakes_questions_that_wait_for_their_turn() {
    alone(|| async {
        let ((agent, mut of_shim), (shim, _of_agent)) = pair();
        let mut asking = JoinSet::new();
        for number in 0..2 * AT_ONCE {
            let shim = shim.clone();
            asking.spawn(async move { shim.ask(&of(number), Vec::new(), soon()).await.map(|_| ()) });
        }
        let answering = async {
            let mut held = Vec::new();
            loop {
                let asked = of_shim.recv().await.unwrap();
                match &asked.message {
                    Message::Stats(_) => break asked.answer(Message::Stats(Stats::default())),
                    _ => held.push(asked),
                }
            }
        };
        let heartbeat = Message::Stats(Stats::default());
        let (beat, ()) = tokio::join!(shim.ask(&heartbeat, Vec::new(), soon()), answering);
        assert!(matches!(beat.unwrap(), Message::Stats(_)));
        agent.close();
        while let Some(one) = asking.join_next().await {
            assert!(one.unwrap().is_ok() || shim.ask(&done(), Vec::new(), soon()).await.is_err());
        }
    });
}

#[test]
fn a_question_that_is_dropped_is_refused() {
    alone(|| async {
        let ((agent, _of_shim), (_shim, mut of_agent)) = pair();
        let question = of("v");
        let (answer, ()) = tokio::join!(agent.ask(&question, Vec::new(), soon()), async {
            drop(of_agent.recv().await);
        });
        assert!(matches!(answer.unwrap(), Message::Refused(refused) if refused.code == 14));
        // Also when nobody takes questions any more.
        drop(of_agent);
        let (sentinel, carried) = canary();
        let answer = agent.ask(&question, vec![carried], soon()).await.unwrap();
        assert!(matches!(answer, Message::Refused(refused) if refused.code == 14));
        is_closed(sentinel);
    });
}

#[test]
fn an_answer_that_does_not_fit_a_frame_is_a_refusal_and_such_a_question_is_not_asked() {
    alone(|| async {
        let ((agent, _of_shim), (_shim, mut of_agent)) = pair();
        let question = of("v");
        let (answer, ()) = tokio::join!(agent.ask(&question, Vec::new(), soon()), async {
            of_agent.recv().await.unwrap().answer(warned("x".repeat(LONGEST)));
        });
        assert!(matches!(answer.unwrap(), Message::Refused(_)));
        let long = agent.ask(&of("x".repeat(LONGEST)), Vec::new(), soon()).await;
        assert!(matches!(long, Err(AskError::Fault(Fault::TooLong(_)))));
        let many = (0..65).map(|_| canary().1).collect();
        let many = agent.ask(&question, many, soon()).await;
        assert!(matches!(many, Err(AskError::Fault(Fault::Descriptors(65)))));
    });
}

#[test]
fn a_peer_that_never_reads_costs_the_asker_its_deadline_and_no_more() {
    alone(|| async {
        let ((link, _asked), mut raw) = with_raw(End::Accepted);
        let long = "x".repeat(LONGEST / 2);
        let mut sentinels = Vec::new();
        // More than the socket takes and more than may wait.
        for _ in 0..2 * AT_ONCE {
            let (sentinel, carried) = canary();
            let question = Message::Unpublish(Unpublish {
                volume: if sentinels.is_empty() { long.clone() } else { "v".to_owned() },
            });
            let answer = link.ask(&question, vec![carried], Instant::now()).await;
            assert!(matches!(answer, Err(AskError::Deadline)));
            sentinels.push(sentinel);
        }
        // Those for which there was no room are gone already.
        assert!(descriptors().len() < 2 * AT_ONCE + AT_ONCE + 50);
        // It reads after all: the one that was being written comes whole, the others were given up and are not asked.
        let (answer, ()) =
            tokio::join!(async { link.ask(&of("after"), Vec::new(), soon()).await.map(warning) }, async {
                tokio::task::spawn_blocking(move || {
                    loop {
                        let (header, message) = read_raw(&mut raw);
                        if volume(&message.unwrap()) == "after" {
                            raw.write_all(&encode(header.id, &warned("heard"), 0).unwrap()).unwrap();
                            return;
                        }
                    }
                })
                .await
                .unwrap();
            });
        assert_eq!(answer.unwrap(), "heard");
        link.closed().await;
        sentinels.into_iter().for_each(is_closed);
    });
}

#[test]
fn a_peer_that_asks_and_never_reads_is_not_heard_beyond_the_limit() {
    alone(|| async {
        let ((link, mut asked), raw) = with_raw(End::Accepted);
        let mut asking = raw.try_clone().unwrap();
        let asker = std::thread::spawn(move || {
            for number in 0..4 * AT_ONCE {
                let frame = encode(u32::try_from(2 * number).unwrap(), &of(number), 0).unwrap();
                if asking.write_all(&frame).is_err() {
                    return;
                }
            }
        });
        let mut answered = 0;
        let long = "x".repeat(LONGEST / 8);
        while let Ok(Some(question)) = tokio::time::timeout(Duration::from_millis(500), asked.recv()).await {
            question.answer(warned(&long));
            answered += 1;
        }
        assert!((1..=AT_ONCE + 8).contains(&answered), "{answered}");
        link.close();
        link.closed().await;
        drop(raw);
        asker.join().unwrap();
    });
}

#[test]
fn frames_that_must_not_be_read_end_the_connection_and_close_what_came_along() {
    let good = encode(0, &of("v"), 2).unwrap();
    let with = |at: usize, byte: u8| {
        let mut frame = good.to_vec();
        frame[at] = byte;
        frame
    };
    let cases = [
        ("wrong magic", with(0, b'X'), 2),
        ("wrong version", with(4, 2), 2),
        ("too long a payload", with(15, 1), 2),
        ("a truncated header", good[..HEADER - 1].to_vec(), 2),
        ("a truncated payload", good[..good.len() - 1].to_vec(), 2),
        ("too many descriptors announced", with(16, 65), 65),
        ("more descriptors than announced", good.to_vec(), 3),
        ("fewer descriptors than announced", good.to_vec(), 1),
        ("descriptors that are not announced", with(16, 0), 1),
        ("more descriptors than are ever taken", with(16, 64), 200),
    ];
    for (name, frame, carried) in &cases {
        alone(|| async {
            let ((link, mut asked), raw) = with_raw(End::Accepted);
            let (sentinels, sent): (Vec<_>, Vec<_>) = (0..*carried).map(|_| canary()).unzip();
            let borrowed: Vec<_> = sent.iter().map(AsFd::as_fd).collect();
            let question = of("v");
            let ((), answer) = tokio::join!(
                async {
                    send_raw(&raw, frame, &borrowed);
                    raw.shutdown(std::net::Shutdown::Write).unwrap();
                },
                link.ask(&question, Vec::new(), soon())
            );
            assert!(matches!(answer, Err(AskError::Closed)), "{name}");
            link.closed().await;
            assert!(asked.recv().await.is_none(), "{name}");
            drop(sent);
            sentinels.into_iter().for_each(is_closed);
        });
    }
}

#[test]
fn descriptors_in_the_middle_of_a_frame_end_the_connection() {
    alone(|| async {
        let ((link, _asked), raw) = with_raw(End::Accepted);
        let frame = encode(0, &of("v"), 1).unwrap();
        let (sentinel, sent) = canary();
        send_raw(&raw, &frame[..10], &[sent.as_fd()]);
        send_raw(&raw, &frame[10..], &[sent.as_fd()]);
        link.closed().await;
        drop(sent);
        is_closed(sentinel);
    });
}

#[test]
fn a_frame_that_comes_in_pieces_is_read_whole() {
    alone(|| async {
        let ((_link, mut asked), mut raw) = with_raw(End::Accepted);
        let frame = encode(6, &of("v"), 1).unwrap();
        let (sentinel, sent) = canary();
        send_raw(&raw, &frame[..1], &[sent.as_fd()]);
        drop(sent);
        for byte in &frame[1..] {
            raw.write_all(&[*byte]).unwrap();
        }
        let question = asked.recv().await.unwrap();
        assert_eq!((volume(&question.message).as_str(), question.descriptors.len()), ("v", 1));
        question.answer(done());
        let (header, answer) = tokio::task::spawn_blocking(move || read_raw(&mut raw)).await.unwrap();
        assert_eq!(header.id, 6);
        assert!(matches!(answer.unwrap(), Message::Done(_)));
        is_closed(sentinel);
    });
}

#[test]
fn answers_that_nobody_asked_for_are_counted_and_what_they_carry_is_closed() {
    alone(|| async {
        let ((link, mut asked), raw) = with_raw(End::Accepted);
        let (sentinel, sent) = canary();
        // The lowest bit is set: an answer to the side that accepted.
        send_raw(&raw, &encode(7, &done(), 1).unwrap(), &[sent.as_fd()]);
        send_raw(&raw, &encode(9, &of("v"), 0).unwrap(), &[]);
        send_raw(&raw, &encode(2, &of("still here"), 0).unwrap(), &[]);
        assert_eq!(volume(&asked.recv().await.unwrap().message), "still here");
        assert_eq!(link.strays(), 2);
        drop(sent);
        is_closed(sentinel);
    });
}

#[test]
fn an_answer_that_comes_too_late_is_counted() {
    alone(|| async {
        let ((agent, _of_shim), (_shim, mut of_agent)) = pair();
        let question = of("v");
        let asked = tokio::select! {
            _ = agent.ask(&question, Vec::new(), soon()) => panic!("answered"),
            asked = of_agent.recv() => asked.unwrap(),
        };
        asked.answer(done());
        // Answers keep the order in which they were given.
        let (second, ()) = tokio::join!(agent.ask(&question, Vec::new(), soon()), async {
            of_agent.recv().await.unwrap().answer(done());
        });
        assert!(second.is_ok() && agent.strays() == 1);
    });
}

#[test]
fn a_message_that_cannot_be_read_is_answered_and_the_connection_lives_on() {
    alone(|| async {
        let ((link, mut asked), raw) = with_raw(End::Accepted);
        let changed = |id: u32, kind: u16, message: &Message| {
            let mut frame = encode(id, message, 0).unwrap().to_vec();
            frame[6..8].copy_from_slice(&kind.to_le_bytes());
            frame
        };
        send_raw(&raw, &changed(0, 77, &of("v")), &[]);
        send_raw(&raw, &changed(2, 12, &Message::Deposit(Deposit::default())), &[]);
        let wrong = changed(4, 9, &Message::Stats(Stats { volume: "v".into(), ..Stats::default() }));
        let mut wrong_type = wrong.clone();
        // The volume becomes a number: `{"volume":123...`.
        wrong_type.splice(HEADER + 10..HEADER + 13, *b"123");
        wrong_type[6..8].copy_from_slice(&7u16.to_le_bytes());
        send_raw(&raw, &wrong_type, &[]);
        send_raw(&raw, &encode(6, &done(), 0).unwrap(), &[]);
        assert!(matches!(asked.recv().await.unwrap().message, Message::Volumes(_)));
        let mut reading = raw.try_clone().unwrap();
        let answers = tokio::task::spawn_blocking(move || -> Vec<_> {
            (0..4).map(|_| read_raw(&mut reading)).collect()
        });
        let mut answers: Vec<_> = answers.await.unwrap();
        answers.sort_by_key(|(header, _)| header.id);
        let kinds: Vec<_> =
            answers.iter().map(|(header, message)| (header.id, message.as_ref().unwrap().kind())).collect();
        assert_eq!(kinds, [(0, 130), (2, 129), (4, 129), (6, 129)]);
        assert!(matches!(&answers[0].1, Ok(Message::Unsupported(unsupported)) if unsupported.kind == 77));
        // And an answer of a kind that this side does not know.
        let question = of("v");
        let (answer, ()) = tokio::join!(link.ask(&question, Vec::new(), soon()), async {
            let mut reading = raw.try_clone().unwrap();
            let (header, _) = tokio::task::spawn_blocking(move || read_raw(&mut reading)).await.unwrap();
            send_raw(&raw, &changed(header.id, 200, &done()), &[]);
        });
        assert!(matches!(answer.unwrap(), Message::Unsupported(unsupported) if unsupported.kind == 200));
    });
}

#[test]
fn what_was_answered_before_closing_still_arrives() {
    alone(|| async {
        let ((agent, _of_shim), (shim, mut of_agent)) = pair();
        let hello = Message::Hello(Hello::default());
        let (answer, ()) = tokio::join!(agent.ask(&hello, Vec::new(), soon()), async {
            of_agent.recv().await.unwrap().answer(warned("no"));
            shim.close();
        });
        assert_eq!(warning(answer.unwrap()), "no");
        agent.closed().await;
        shim.closed().await;
        assert!(matches!(agent.ask(&hello, Vec::new(), soon()).await, Err(AskError::Closed)));
        assert!(of_agent.recv().await.is_none());
    });
}

#[test]
fn a_connection_ends_when_nobody_holds_it_and_not_before() {
    alone(|| async {
        let ((agent, of_shim), (shim, mut of_agent)) = pair();
        let again = agent.clone();
        drop(agent);
        drop(of_shim);
        let question = of("v");
        let (answer, ()) = tokio::join!(again.ask(&question, Vec::new(), soon()), async {
            of_agent.recv().await.unwrap().answer(done());
        });
        assert!(answer.is_ok());
        drop(again);
        shim.closed().await;
    });
}

#[test]
fn questions_that_wait_end_with_the_connection() {
    alone(|| async {
        let ((agent, _of_shim), (shim, mut of_agent)) = pair();
        let question = of("v");
        let (answer, held) = tokio::join!(agent.ask(&question, Vec::new(), soon()), async {
            let held = of_agent.recv().await.unwrap();
            shim.close();
            held
        });
        assert!(matches!(answer, Err(AskError::Closed)));
        shim.closed().await;
        // Too late, and harmless.
        held.answer(done());
    });
}
