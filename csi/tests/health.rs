//! The health port as kubelet and Prometheus call it.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "what fails in here is a test that fails")]

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use fuse_secrets_csi::health::{Health, serve};
use tokio::net::{TcpListener, TcpStream};

#[derive(Default)]
struct Sick(AtomicBool);

impl Health for Sick {
    fn healthy(&self) -> Result<(), String> {
        if self.0.load(Ordering::Relaxed) { Err("its thread is gone".to_owned()) } else { Ok(()) }
    }

    fn ready(&self) -> Result<(), String> {
        self.healthy().map_err(|_| "no agent is attached".to_owned())
    }

    fn metrics(&self) -> String {
        "# TYPE things counter\nthings 7\n".to_owned()
    }
}

async fn start() -> (SocketAddr, Arc<Sick>, tokio::task::JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, sick) = (listener.local_addr().unwrap(), Arc::new(Sick::default()));
    (address, Arc::clone(&sick), tokio::spawn(serve(listener, sick)))
}

/// Until the other side closes, or has nothing to say for a long time.
async fn read_all(stream: &TcpStream) -> String {
    let mut all = Vec::new();
    let reading = async {
        loop {
            stream.readable().await.unwrap();
            let mut some = [0; 1024];
            match stream.try_read(&mut some) {
                Ok(0) => return,
                Ok(read) => all.extend(&some[..read]),
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return,
                Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(30), reading).await.expect("the end of an answer");
    String::from_utf8(all).unwrap()
}

async fn connect(address: SocketAddr, text: &str) -> TcpStream {
    let stream = TcpStream::connect(address).await.unwrap();
    stream.writable().await.unwrap();
    assert_eq!(stream.try_write(text.as_bytes()).unwrap(), text.len());
    stream
}

/// Status and body.
async fn call(address: SocketAddr, method: &str, path: &str) -> (u16, String, String) {
    let request = format!("{method} {path} HTTP/1.1\r\nhost: node\r\n\r\n");
    let answer = read_all(&connect(address, &request).await).await;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head[9..12].parse().unwrap(), head.to_lowercase(), body.to_owned())
}

#[tokio::test]
async fn a_sick_process_answers_503_and_says_why() {
    let (address, sick, _serving) = start().await;
    for path in ["/healthz", "/readyz"] {
        let (status, _, body) = call(address, "GET", path).await;
        assert_eq!((status, body.as_str()), (200, "ok"));
    }
    sick.0.store(true, Ordering::Relaxed);
    let (status, _, body) = call(address, "GET", "/healthz").await;
    assert_eq!((status, body.as_str()), (503, "its thread is gone"));
    let (status, _, body) = call(address, "GET", "/readyz?verbose").await;
    assert_eq!((status, body.as_str()), (503, "no agent is attached"));
}

#[tokio::test]
async fn metrics_are_in_the_text_format_of_prometheus() {
    let (address, _sick, _serving) = start().await;
    let (status, head, body) = call(address, "GET", "/metrics").await;
    assert_eq!((status, body.as_str()), (200, "# TYPE things counter\nthings 7\n"));
    assert!(head.contains("content-type: text/plain; version=0.0.4"), "{head}");
}

#[tokio::test]
async fn nothing_else_is_there() {
    let (address, _sick, _serving) = start().await;
    for (method, path) in [("GET", "/"), ("GET", "/metrics/"), ("POST", "/healthz"), ("DELETE", "/metrics")] {
        let (status, _, body) = call(address, method, path).await;
        assert_eq!((status, body.as_str()), (404, ""), "{method} {path}");
    }
}

#[tokio::test]
async fn clients_that_say_nothing_or_nonsense_do_not_keep_the_port_from_others() {
    let (address, _sick, _serving) = start().await;
    let mut silent = Vec::new();
    for _ in 0..20 {
        silent.push(connect(address, "GET /healthz HT").await);
    }
    assert!(read_all(&connect(address, "\0\x01nonsense\r\n\r\n").await).await.starts_with("HTTP/1.1 400"));
    assert_eq!(call(address, "GET", "/healthz").await.0, 200);
    // They were ended, not answered.
    for stream in &silent[..16] {
        assert_eq!(read_all(stream).await, "");
    }
}

#[tokio::test]
async fn what_is_dropped_answers_no_more() {
    let (address, _sick, serving) = start().await;
    let open = connect(address, "GET /").await;
    assert_eq!(call(address, "GET", "/healthz").await.0, 200);
    serving.abort();
    assert!(serving.await.unwrap_err().is_cancelled());
    assert_eq!(read_all(&open).await, "");
    assert!(TcpStream::connect(address).await.is_err());
}
