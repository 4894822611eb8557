//! A stand-in for `kubectl`, for tests without an API server: it tells its test what it was called with and says what the test
//! answers (`fuse_tests::kubectl`). The socket's path is in `TEST_KUBECTL`.

#![allow(clippy::unwrap_used, reason = "what fails in here is a test that fails")]

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use fuse_tests::kubectl::{Answer, Call};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let mut input = String::new();
    if arguments.iter().any(|argument| argument == "-i") {
        std::io::stdin().read_to_string(&mut input).unwrap();
    }
    let mut test = UnixStream::connect(std::env::var("TEST_KUBECTL").unwrap()).unwrap();
    serde_json::to_writer(&mut test, &Call { arguments, input }).unwrap();
    test.shutdown(std::net::Shutdown::Write).unwrap();
    let Answer { out, err, code } = serde_json::from_reader(&test).unwrap();
    std::io::stdout().write_all(out.as_bytes()).unwrap();
    std::io::stderr().write_all(err.as_bytes()).unwrap();
    ExitCode::from(code)
}
