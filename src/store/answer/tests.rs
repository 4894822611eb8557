use super::*;

const V2: &str = r#"{"request_id":"r1","lease_id":"","renewable":false,"lease_duration":0,"data":{"data":{"password":"o\nne","port":5432,"opts":{"a": [1]},"user":"app"},"metadata":{"created_time":"2026-01-02T03:04:05.678Z","custom_metadata":null,"deletion_time":"","destroyed":false,"version":7}},"wrap_info":null,"warnings":null,"auth":null,"mount_type":"kv"}"#;
const V1: &str = r#"{"request_id":"r2","lease_id":"","renewable":false,"lease_duration":2764800,"data":{"password":"old","data":"not kv2"},"warnings":null}"#;
const LEASED: &str = r#"{"request_id":"r3","lease_id":"database/creds/app/xyz","renewable":true,"lease_duration":3600,"data":{"username":"u","password":"p"}}"#;

fn text(body: &str, key: Option<&str>) -> String {
    let bytes = extract(body.as_bytes(), key, Encoding::Utf8).map_err(|error| error.to_string()).unwrap();
    String::from_utf8(bytes.expose().to_vec()).unwrap()
}

fn failure(body: &str, key: Option<&str>, encoding: Encoding) -> ExtractError {
    match extract(body.as_bytes(), key, encoding) {
        Ok(_) => panic!("no failure"),
        Err(error) => error,
    }
}

fn parsed(body: &str) -> Result<Answer, ParseError> {
    parse(SecretBytes::new(body.as_bytes().to_vec()))
}

#[test]
fn keys_of_both_kv_versions_are_found_by_shape() {
    assert_eq!(text(V2, Some("password")), "o\nne");
    assert_eq!(text(V1, Some("password")), "old");
    assert_eq!(text(V1, Some("data")), "not kv2");
    assert_eq!(text(LEASED, Some("username")), "u");
}

#[test]
fn values_that_are_no_strings_come_as_json_text() {
    assert_eq!(text(V2, Some("port")), "5432");
    assert_eq!(text(V2, Some("opts")), r#"{"a": [1]}"#);
}

#[test]
fn without_a_key_the_whole_answer_comes_without_its_request_id() {
    let whole = text(V2, None);
    assert_eq!(whole, V2.replace(r#""request_id":"r1","#, ""));
    let value: serde_json::Value = serde_json::from_str(&whole).unwrap();
    assert_eq!(value["data"]["data"]["port"], 5432);
    assert_eq!(whole, text(&V2.replace("r1", "another"), None));
}

#[test]
fn a_missing_key_names_the_keys_that_exist_and_the_close_ones_first() {
    let error = failure(V2, Some("pasword"), Encoding::Utf8);
    assert_eq!(
        error.to_string(),
        r#"the secret has no key "pasword"; it has "password", "opts", "port", "user""#
    );
    let empty = failure(r#"{"data":{}}"#, Some("x"), Encoding::Utf8);
    assert_eq!(empty.to_string(), r#"the secret has no key "x"; it has none"#);
}

#[test]
fn at_most_twenty_names_are_listed_and_the_rest_is_counted() {
    let keys: Vec<_> = (0..50).map(|n| format!(r#""key{n:02}":"v""#)).collect();
    let body = format!(r#"{{"data":{{{}}}}}"#, keys.join(","));
    let text = failure(&body, Some("other"), Encoding::Utf8).to_string();
    assert!(text.starts_with(r#"the secret has no key "other"; it has "key00", "key01","#), "{text}");
    assert!(text.ends_with(r#""key19" and 30 more"#), "{text}");
    let long: Vec<_> = (0..9).map(|n| format!(r#""{}{n}":"v""#, "k".repeat(120))).collect();
    let body = format!(r#"{{"data":{{{}}}}}"#, long.join(","));
    let text = failure(&body, Some("other"), Encoding::Utf8).to_string();
    assert!(text.len() < 400 && text.ends_with(r#"k1" and 7 more"#), "{text}");
    let text =
        failure(&format!(r#"{{"data":{{"{}":1}}}}"#, "k".repeat(999)), Some("x"), Encoding::Utf8).to_string();
    assert_eq!(text, r#"the secret has no key "x"; it has 1 with long names"#);
}

#[test]
fn no_error_holds_a_value() {
    let body = r#"{"data":{"k":"s3cr*t-value","list":["s3cr*t-value"]}}"#;
    for (key, encoding) in [("none", Encoding::Utf8), ("k", Encoding::Base64), ("k", Encoding::Hex)] {
        let error = failure(body, Some(key), encoding);
        assert!(!format!("{error} {error:?}").contains("s3cr"), "{error:?}");
    }
    let odd = r#"{"data":"s3cr*t","lease_duration":"s3cr*t"}"#;
    assert_eq!(failure(odd, Some("k"), Encoding::Utf8), ExtractError::Shape);
    assert!(matches!(parsed(odd), Err(ParseError::NotJson)));
}

#[test]
fn base64_ignores_line_breaks_and_insists_on_padding() {
    let body = |text: &str| format!(r#"{{"data":{{"k":"{text}"}}}}"#);
    let decoded = |text: &str| {
        extract(body(text).as_bytes(), Some("k"), Encoding::Base64).map(|bytes| bytes.expose().to_vec())
    };
    assert_eq!(decoded(r"aGVs\r\nbG8=\n").unwrap(), b"hello");
    assert_eq!(decoded("").unwrap(), b"");
    assert_eq!(decoded("AP8Q").unwrap(), [0, 255, 16]);
    let failed = |text: &str| failure(&body(text), Some("k"), Encoding::Base64).to_string();
    assert!(failed("aGVsbG8").contains("padding"), "{}", failed("aGVsbG8"));
    assert!(failed(r"aGVs\nb*8=").ends_with("alphabet at position 6"), "{}", failed(r"aGVs\nb*8="));
    assert!(failed("aGVs bG8=").contains("alphabet at position 4"));
}

#[test]
fn hex_takes_both_cases_and_names_the_wrong_digit() {
    let body = r#"{"data":{"good":"00fFa1","bad":"00xx","odd":"abc"}}"#;
    let good = extract(body.as_bytes(), Some("good"), Encoding::Hex).ok().unwrap();
    assert_eq!(good.expose(), [0, 255, 0xa1]);
    assert!(failure(body, Some("bad"), Encoding::Hex).to_string().ends_with("at position 2"));
    assert!(failure(body, Some("odd"), Encoding::Hex).to_string().ends_with("is odd"));
}

#[test]
fn version_time_and_lease_are_read_and_the_body_stays_whole() {
    let answer = parsed(V2).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!((answer.version, answer.body.expose()), (Some(7), V2.as_bytes()));
    assert_eq!(answer.created, humantime::parse_rfc3339("2026-01-02T03:04:05.678Z").ok());
    assert_eq!(answer.lease, Lease::default());
    let leased = parsed(LEASED).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(leased.lease.id.as_deref(), Some("database/creds/app/xyz"));
    assert_eq!((leased.lease.duration, leased.lease.renewable), (Some(Duration::from_secs(3600)), true));
    assert_eq!((leased.version, leased.created), (None, None));
}

#[test]
fn a_duration_without_a_lease_id_is_no_lease() {
    assert_eq!(parsed(V1).ok().unwrap().lease, Lease::default());
}

#[test]
fn answers_without_a_secret_are_told_apart() {
    assert_eq!(parsed(" \n").err(), Some(ParseError::Empty));
    assert_eq!(parsed("<html>").err(), Some(ParseError::NotJson));
    assert_eq!(parsed("[1]").err(), Some(ParseError::NotJson));
    let warned = parsed(r#"{"data":null,"warnings":["wrong\n path"]}"#).err().unwrap();
    assert_eq!(warned.to_string(), r#"an answer without data (the store warns: "wrong path")"#);
}

#[test]
fn a_deleted_version_has_an_obituary() {
    let gone = |rest: &str| format!(r#"{{"data":{{"data":null,"metadata":{{"version":2,{rest}}}}}}}"#);
    let deleted = gone(r#""deletion_time":"2026-11-23T12:17:51.82Z","destroyed":false"#);
    assert_eq!(
        obituary(deleted.as_bytes()).as_deref(),
        Some("version 2 was deleted at 2026-11-23T12:17:51.82Z")
    );
    let destroyed = gone(r#""deletion_time":"","destroyed":true"#);
    assert_eq!(obituary(destroyed.as_bytes()).as_deref(), Some("version 2 was destroyed"));
    assert_eq!(obituary(br#"{"errors":[]}"#), None);
}
