use crate::process::run;
use crate::world::World;

const COMMANDS: [&str; 7] = ["dev", "mount", "agent", "mounts", "abort", "check", "doctor"];

#[test]
fn every_help_has_examples_and_keeps_to_100_columns() {
    let Some(world) = World::new() else { return };
    let mut texts = vec![run(world.program().arg("--help"))];
    texts.extend(COMMANDS.map(|command| run(world.program().args([command, "--help"]))));
    for help in texts {
        assert_eq!((help.code, help.err.as_str()), (0, ""));
        assert!(help.out.contains("Examples:"), "{}", help.out);
        for line in help.out.lines() {
            assert!(line.chars().count() <= 100, "{line}");
        }
        // What is to be copied is not wrapped on a terminal of 80 columns either.
        let examples = help.out[help.out.find("Examples:").unwrap()..].lines();
        for line in examples.filter(|line| line.starts_with("  ")) {
            assert!(line.chars().count() <= 80, "{line}");
        }
    }
}

#[test]
fn the_examples_of_mount_are_command_lines_that_are_understood() {
    let Some(world) = World::new() else { return };
    world.directory("home", 0);
    let help = run(world.program().args(["mount", "--help"])).out;
    let examples: Vec<String> = help[help.find("Examples:").unwrap()..]
        .replace("\\\n", " ")
        .lines()
        .filter(|line| line.trim_start().starts_with("fuse-secrets mount"))
        .map(ToOwned::to_owned)
        .collect();
    assert_eq!(examples.len(), 3, "{help}");
    for example in examples {
        // All is well but the class, which is not there: so flags and settings were read.
        let tried = run(world.command("sh").env("HOME", "/tmp/home").args(["-c", &example]));
        assert_eq!(tried.code, 66, "{example}: {}", tried.err);
        assert_eq!(tried.err.lines().count(), 1, "{example}: {}", tried.err);
    }
}

#[test]
fn wrong_command_lines_exit_with_64_and_say_what_was_meant() {
    let Some(world) = World::new() else { return };
    for (arguments, text) in [
        (&["mounst"][..], "'mounts'"),
        (&["mounts", "--ouptut", "json"], "'--output'"),
        (&["mounts", "-o", "jsn"], "json"),
        (&["mount", "--clas", "x", "mnt"], "'--class'"),
        (&["mount", "mnt"], "--class <FILE>"),
        (&["dev", "--listen", "nowhere"], "--listen"),
        (&["mounts", "--metrics", "-o", "json"], "cannot be used with"),
    ] {
        let ended = run(world.program().args(arguments));
        assert_eq!((ended.code, ended.out.as_str()), (64, ""), "{arguments:?}");
        assert!(ended.err.contains(text), "{arguments:?}: {}", ended.err);
    }
    let nothing = run(&mut world.program());
    assert_eq!(nothing.code, 64);
    assert!(nothing.err.contains("Commands:"), "{}", nothing.err);
    let version = run(world.program().arg("--version"));
    assert_eq!((version.code, version.out), (0, format!("fuse-secrets {}\n", env!("CARGO_PKG_VERSION"))));
}

#[test]
fn check_tells_good_from_faulty_and_unreadable_and_reads_standard_input() {
    let Some(world) = World::new() else { return };
    let mut documents = Vec::new();
    for text in [
        include_str!("../../../examples/classes/secret-provider-class.yaml"),
        include_str!("../../../examples/classes/secrets-store-import.yaml"),
    ] {
        documents.push(world.file(&format!("{}.yaml", documents.len()), text));
    }
    let good = run(world.program().arg("check").args(&documents));
    assert_eq!(good.code, 0, "{}{}", good.out, good.err);
    assert!(good.out.lines().all(|line| line.chars().count() <= 80), "{}", good.out);
    let faulty = world
        .file("faulty.yaml", "apiVersion: v1\nkind: SecretProviderClass\nmetadata: {name: x}\nspec: {}\n");
    let bad = run(world.program().arg("check").arg(&faulty).arg(&documents[0]));
    assert_eq!(bad.code, 65);
    assert!(bad.out.contains("FAULT") && bad.out.contains("ok "), "{}", bad.out);
    let unreadable = run(world.program().args(["check", "nosuch"]));
    assert_eq!(unreadable.code, 66);
    let json = run(world.program().args(["check", "-o", "json", "nosuch"]).arg(&faulty).arg(&documents[0]));
    let value: serde_json::Value = serde_json::from_str(&json.out).unwrap();
    assert_eq!((value["ok"].as_bool(), value["documents"].as_array().unwrap().len()), (Some(false), 3));
    let piped = run(world.command("sh").args(["-c", "fuse-secrets check - < 0.yaml"]));
    assert_eq!(piped.code, 0, "{}", piped.err);
}

#[test]
fn doctor_prints_a_table_of_80_columns_and_json() {
    let Some(world) = World::new() else { return };
    for user in [0, crate::world::NOBODY] {
        let program = || if user == 0 { world.program() } else { world.program_as(user) };
        let table = run(program().arg("doctor"));
        assert!(table.code <= 1 && table.err.is_empty(), "{}", table.err);
        assert!(table.out.lines().all(|line| line.chars().count() <= 80), "{}", table.out);
        let json = run(program().args(["doctor", "-o", "json"]));
        let value: serde_json::Value = serde_json::from_str(&json.out).unwrap();
        assert!(value["checks"].as_array().unwrap().iter().all(|check| check["verdict"].is_string()));
        assert_eq!(json.code, table.code);
    }
}
