//! A secret that occurs nowhere else flows through everything, and is then searched for everywhere.

use std::collections::BTreeMap;
use std::fs::File;

use base64::Engine as _;
use fuse_tests::agent::{Agent, Command};
use fuse_tests::backend::{Backend, Kind};
use fuse_tests::memory::{self, Look};
use fuse_tests::mounted::Mounted;
use fuse_tests::needs;
use fuse_tests::product::{self, Mount};
use fuse_tests::sys::{Map, cached_pages};
use fuse_tests::wait::{SOON, until, until_true};
use serde_json::json;

use super::stores::{Files, class};
use super::{AGENT, agent};

/// A text that occurs nowhere else, and what is searched for in its place: parts of it, so that a half-wiped copy is found
/// too, and other spellings.
struct Canary {
    text: String,
    needles: Vec<(String, Vec<u8>)>,
}

impl Canary {
    fn new(name: &str) -> Self {
        // Not hexadecimal by its length and first letter.
        let random: String = (0..4).map(|_| format!("{:032x}", rand::random::<u128>())).collect();
        let text = format!("z{random}");
        let part = |what: &str, bytes: &[u8]| (format!("{name}, {what}"), bytes.to_vec());
        let base64 = base64::engine::general_purpose::STANDARD.encode(&text);
        let hex: String = text.bytes().map(|byte| format!("{byte:02x}")).collect();
        let needles = vec![
            part("its beginning", &text.as_bytes()[..16]),
            part("its middle", &text.as_bytes()[56..72]),
            part("its end", &text.as_bytes()[112..]),
            part("in base64", &base64.as_bytes()[..24]),
            part("in hex", &hex.as_bytes()[..32]),
        ];
        Self { text, needles }
    }
}

fn needles<'a>(canaries: &[&'a Canary]) -> Vec<(&'a str, &'a [u8])> {
    let all = canaries.iter().flat_map(|canary| &canary.needles);
    all.map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect()
}

fn holds(output: &str, canaries: &[&Canary]) -> Option<String> {
    let all = canaries.iter().flat_map(|canary| &canary.needles);
    let mut found = all.filter(|(_, bytes)| output.contains(std::str::from_utf8(bytes).unwrap()));
    found.next().map(|(name, _)| name.clone())
}

/// Reads a file in every way that leaves traces, and looks for those in the page cache.
fn read_all_ways(mounted: &Mounted, text: &str) {
    for name in ["value", "..data/value"] {
        assert_eq!(mounted.text(name), text);
        let file = File::open(mounted.join(name)).unwrap();
        let map = Map::new(&file, text.len(), rustix::mm::MapFlags::PRIVATE).unwrap();
        assert!(map.to_vec() == text.as_bytes());
        drop(map);
        let scratch = tempfile::tempfile().unwrap();
        while rustix::fs::sendfile(&scratch, &file, None, 4_096).unwrap() > 0 {}
        until_true("no page in the page cache", SOON, || cached_pages(&file).unwrap() == 0);
    }
}

/// A search when nothing is on its way any more.
fn idle_search(pid: u32, backend: &Backend, needles: &[(&str, &[u8])]) -> Look {
    let idle = || memory::connections(pid, backend.port()).unwrap() == 0;
    until_true("an idle pool", SOON, idle);
    memory::search(pid, needles).unwrap()
}

#[test]
fn a_secret_is_in_no_output_argument_environment_or_page_and_in_memory_only_where_it_belongs() {
    if !needs::kernel() {
        return;
    }
    let program = product::program(AGENT);
    let backend = Backend::start(&Kind::Embedded, false);
    let (value, second, other) =
        (Canary::new("value"), Canary::new("second value"), Canary::new("wrong token"));
    let token = Canary::new("token");
    let all = [&value, &second, &other, &token];
    backend.put("app", &json!({"value": value.text}));
    let made = backend.write("auth/token/create", &json!({"id": token.text, "policies": ["root"]}));
    assert_eq!(made["auth"]["client_token"], token.text.as_str());

    let files = Files::new();
    let (good, bad) = (files.write("token", &token.text), files.write("bad-token", &other.text));
    // Its name lies in memory for as long as it is mounted: the search must find it.
    let control = format!("control-{:032x}", rand::random::<u128>());
    let document =
        files.write("class.yaml", &class(&control, &[("value", "secret/data/app", Some("value"))]));
    let address = backend.address();
    let start = |class: &str, token: &str, format: &str, more: &[&str]| {
        let common = ["--class", class, "--address", &address, "--token-file", token, "--log-format", format];
        Mount::start(&program, &[&common, more].concat())
    };
    let (text_log, json_log) = (
        start(&document, &good, "text", &[]).unwrap(),
        start(&document, &good, "json", &["--refresh-interval", "1s"]).unwrap(),
    );
    for mount in [&text_log, &json_log] {
        read_all_ways(mount.mounted(), &value.text);
    }

    let mut output = Vec::new();
    let mut failed = |name: &str, class: &str, token: &str| match start(class, token, "text", &[]) {
        Ok(_) => panic!("{name} was mounted"),
        Err((_, text)) => output.push((name.to_owned(), text)),
    };
    let absent = files.write("absent.yaml", &class("absent", &[("value", "secret/data/app", Some("valeu"))]));
    failed("a missing key", &absent, &good);
    let encoded = document_with(&files, "encoded.yaml", "encoding", "hex");
    failed("a wrong encoding", &encoded, &good);
    failed("a wrong token", &document, &bad);
    // As when somebody pastes a secret where it does not belong.
    let faulty = document_with(&files, "faulty.yaml", "filePermission", &value.text);
    failed("a bad class", &faulty, &good);

    backend.put("app", &json!({"value": second.text}));
    until_true("the rotation", SOON, || json_log.mounted().text("value") == second.text);
    read_all_ways(json_log.mounted(), &second.text);
    backend.embedded().seal();
    until_true("the outage", SOON, || json_log.log().contains("sealed"));
    backend.embedded().unseal();

    let path = json_log.mounted().path().to_str().unwrap();
    let commands: [&[&str]; 8] = [
        &["mounts"],
        &["mounts", "-o", "wide"],
        &["mounts", "-o", "json"],
        &["mounts", path],
        &["mounts", path, "-o", "json"],
        &["mounts", "--metrics"],
        &["check", &faulty],
        &["doctor"],
    ];
    for command in commands {
        let ran = product::run(&program, command);
        let text = [ran.stdout, ran.stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat();
        assert!(!text.is_empty(), "{command:?}");
        output.push((command.join(" "), text));
    }
    assert_eq!(memory::search_arguments(&needles(&all)).unwrap(), [] as [String; 0]);

    // At rest: in pages that not even root can read, and nowhere else. The token has no such pages while it is in use.
    let searched = [needles(&[&value, &second]), vec![("control", control.as_bytes())]].concat();
    let look = idle_search(text_log.pid(), &backend, &searched);
    assert!(look.closed >= 1, "no secret pages");
    assert!(look.found.iter().any(|found| found.needle == "control"), "the search finds nothing at all");
    let found: Vec<_> = look.found.iter().filter(|found| found.needle != "control").collect();
    assert!(found.is_empty(), "{found:#?}");

    for (name, mount) in [("text log", text_log), ("json log", json_log)] {
        let (code, log) = mount.stop();
        assert_eq!(code, Some(0));
        assert!(log.contains("TRACE") || log.contains("DEBUG"), "{name} is not complete");
        output.push((name.to_owned(), log));
    }
    for (name, text) in &output {
        assert_eq!(holds(text, &all), None, "in the output of: {name}");
    }
}

/// A class whose one file has one more member.
fn document_with(files: &Files, name: &str, member: &str, value: &str) -> String {
    let text = class("faulty", &[("value", "secret/data/app", Some("value"))]);
    let mut document: serde_json::Value = serde_json::from_str(&text).unwrap();
    let objects = &mut document["spec"]["parameters"]["objects"];
    let mut list: serde_json::Value = serde_json::from_str(objects.as_str().unwrap()).unwrap();
    list[0][member] = json!(value);
    *objects = json!(list.to_string());
    files.write(name, &document.to_string())
}

#[test]
fn after_an_unmount_and_an_idle_pool_no_memory_of_the_agent_holds_a_secret() {
    // A real server by TLS, whose library has buffers of its own.
    for (_, kind) in Kind::all() {
        let Some(agent) = agent() else { return };
        leaves_nothing(agent, &Backend::start(&kind, true));
    }
}

fn leaves_nothing(mut agent: Agent, backend: &Backend) {
    let (value, second, token) = (Canary::new("value"), Canary::new("second value"), Canary::new("token"));
    // Large enough for several requests, buffers and pages of its own, with the canary at both ends.
    let large = |canary: &Canary| format!("{}{}{}", canary.text, "x".repeat(300_000), canary.text);
    let put = |canary: &Canary| backend.put("app", &json!({"value": canary.text, "large": large(canary)}));
    put(&value);
    backend.write("auth/token/create", &json!({"id": token.text, "policies": ["root"]}));
    let files = Files::new();
    let mut settings: BTreeMap<String, String> = [
        ("address", backend.address()),
        ("token_file", files.write("token", &token.text)),
        ("refresh_interval", "1s".into()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into();
    settings.extend(backend.ca().map(|ca| ("ca".to_owned(), ca.display().to_string())));
    let document = class(
        "app",
        &[
            ("value", "secret/data/app", Some("value")),
            ("large", "secret/data/app", Some("large")),
            ("whole", "secret/data/app", None),
        ],
    );
    let mounted = Mounted::new();
    agent.ask(&Command::Class { path: mounted.path().to_owned(), class: document, settings }).unwrap();
    read_all_ways(&mounted, &value.text);
    assert_eq!(mounted.text("large"), large(&value));
    assert!(mounted.text("whole").contains(&value.text));

    agent.ask(&Command::Panic { path: mounted.path().to_owned() }).unwrap();
    put(&second);
    let panicked = until("the panic", SOON, || std::fs::read(mounted.join("value")).err());
    assert_eq!(panicked.raw_os_error(), Some(libc::EIO));
    until_true("the rotation", SOON, || mounted.text("value") == second.text);
    until_true("the rotation", SOON, || mounted.text("large") == large(&second));

    agent.unmount(&mounted);
    until_true("nothing held", SOON, || agent.metric("volumes") == 0 && agent.metric("cache_entries") == 0);
    let control = format!("control-{:032x}", rand::random::<u128>());
    agent.ask(&Command::Plant(control.clone())).unwrap();
    let searched = [needles(&[&value, &second, &token]), vec![("control", control.as_bytes())]].concat();
    let look = idle_search(agent.pid(), backend, &searched);
    assert!(look.found.iter().any(|found| found.needle == "control"), "the search finds nothing at all");
    let found: Vec<_> = look.found.iter().filter(|found| found.needle != "control").collect();
    assert!(found.is_empty(), "{found:#?}");
    assert_eq!(holds(&agent.log(), &[&value, &second, &token]), None, "in the log");
}
