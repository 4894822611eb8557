//! What containers of a pod find in its volume.

use aws_lc_rs::digest::{SHA256, digest};
use fuse_tests::cluster::pods::{SECRETS, add_volume};
use fuse_tests::cluster::{PATIENCE, Tenant, shared};
use fuse_tests::wait;
use serde_json::{Value, json};

/// What every test's secret `app` has under `password`.
const VALUE: &str = "value-of-a-test";

/// Whatever would change a volume.
const WRITES: &[&str] = &[
    "touch new",
    "echo more > new",
    "echo more > password",
    "echo more >> password",
    "truncate -s 0 password",
    "touch password",
    "chmod 600 password",
    "chown 1:1 password",
    "rm -f password",
    "mv password other",
    "mkdir more",
    "rmdir db",
    "ln password hard",
    "ln -s password soft",
    "mknod pipe p",
];

/// A tenant with the secret `app`, and the class `app` that makes files of its two keys.
fn write_app(tenant: &Tenant<'_>) {
    tenant.put("app", &json!({"password": VALUE, "user": "shop"}));
    tenant.class("app", &[("password", "app", "password"), ("user", "app", "user")], &json!({}));
}

/// Owner, group, mode and size of everything in the volume, one a line.
fn owners(tenant: &Tenant<'_>, pod: &str) -> String {
    tenant.sh(pod, "cd /mnt/secrets && stat -c '%u %g %a %s %n' *")
}

#[test]
fn a_pod_reads_its_secret_as_root() {
    let Some(cluster) = shared() else { return };
    let tenant = cluster.tenant("root");
    write_app(&tenant);
    let uid = tenant.run(&tenant.reader("reads", "app"));
    assert_eq!(tenant.sh("reads", "cat /mnt/secrets/password"), VALUE);
    assert_eq!(tenant.sh("reads", "cat /mnt/secrets/user"), "shop");
    assert_eq!(tenant.sh("reads", "ls -a /mnt/secrets"), ".\n..\n..1\n..data\npassword\nuser\n");
    assert_eq!(owners(&tenant, "reads"), "0 0 444 15 password\n0 0 444 4 user\n");
    assert_eq!(tenant.sh("reads", "stat -c '%F' /mnt/secrets/password"), "regular file\n");
    assert_eq!(cluster.mounts_of(&uid), 1);
    tenant.remove("reads");
    cluster.leaves_nothing();
    assert_eq!(cluster.mounts_of(&uid), 0);
}

#[test]
fn a_pod_of_another_user_reads_by_its_fs_group() {
    let Some(cluster) = shared() else { return };
    let tenant = cluster.tenant("fs-group");
    write_app(&tenant);
    let mut pod = tenant.reader("member", "app");
    pod["spec"]["securityContext"] = json!({"runAsUser": 1000, "runAsGroup": 1000, "fsGroup": 2000});
    tenant.run(&pod);
    assert_eq!(tenant.sh("member", "id -u"), "1000\n");
    assert_eq!(tenant.sh("member", "cat /mnt/secrets/password"), VALUE);
    assert_eq!(owners(&tenant, "member"), "0 2000 440 15 password\n0 2000 440 4 user\n");
}

#[test]
fn files_have_the_owner_and_mode_that_their_class_gives() {
    let Some(cluster) = shared() else { return };
    let tenant = cluster.tenant("owners");
    tenant.put("app", &json!({"password": VALUE, "user": "shop"}));
    let object = |name: &str, further: &Value| {
        let mut object = json!({"objectName": name, "secretPath": tenant.path("app"), "secretKey": name});
        object.as_object_mut().unwrap().extend(further.as_object().unwrap().clone());
        object
    };
    let objects = json!([
        object("password", &json!({"uid": 1000, "gid": 1001, "filePermission": "0400"})),
        object("user", &json!({"uid": 2000, "filePermission": "0440"})),
    ]);
    tenant.class("owners", &[], &json!({"objects": objects.to_string()}));
    let mut pod = tenant.reader("user", "owners");
    pod["spec"]["securityContext"] = json!({"runAsUser": 1000, "runAsGroup": 3000});
    tenant.run(&pod);
    assert_eq!(owners(&tenant, "user"), "1000 1001 400 15 password\n2000 0 440 4 user\n");
    assert_eq!(tenant.sh("user", "cat /mnt/secrets/password"), VALUE);
    let refused = tenant.exec("user", &["cat", "/mnt/secrets/user"]).unwrap_err();
    assert!(refused.contains("Permission denied"), "{refused}");
}

#[test]
fn nested_names_are_directories() {
    let Some(cluster) = shared() else { return };
    let tenant = cluster.tenant("nested");
    tenant.put("app", &json!({"password": VALUE, "user": "shop"}));
    let files = [("db/main/password", "app", "password"), ("db/user", "app", "user"), ("top", "app", "user")];
    tenant.class("nested", &files, &json!({}));
    tenant.run(&tenant.reader("walks", "nested"));
    let found = tenant.sh(
        "walks",
        "cd /mnt/secrets && find . -mindepth 1 -not -path './..*' | sort | xargs stat -c '%F %a %n'",
    );
    let wanted = "directory 555 ./db\ndirectory 555 ./db/main\nregular file 444 ./db/main/password\n\
                  regular file 444 ./db/user\nregular file 444 ./top\n";
    assert_eq!(found, wanted);
    assert_eq!(tenant.sh("walks", "cat /mnt/secrets/db/main/password"), VALUE);
    assert_eq!(tenant.sh("walks", "cat /mnt/secrets/db/user /mnt/secrets/top"), "shopshop");
}

#[test]
fn two_volumes_with_two_classes_hold_what_each_says() {
    let Some(cluster) = shared() else { return };
    let tenant = cluster.tenant("two");
    write_app(&tenant);
    tenant.put("mail", &json!({"password": "value-of-mail"}));
    tenant.class("mail", &[("password", "mail", "password")], &json!({}));
    let mut pod = tenant.reader("both", "app");
    add_volume(&mut pod, "mail", "/mnt/mail", &json!({"secretProviderClass": "mail"}));
    let uid = tenant.run(&pod);
    assert_eq!(tenant.sh("both", "cat /mnt/secrets/password"), VALUE);
    assert_eq!(tenant.sh("both", "cat /mnt/mail/password"), "value-of-mail");
    assert_eq!(tenant.sh("both", "ls /mnt/secrets"), "password\nuser\n");
    assert_eq!(tenant.sh("both", "ls /mnt/mail"), "password\n");
    assert_eq!(cluster.mounts_of(&uid), 2);
}

#[test]
fn pods_of_one_deployment_share_a_login_and_a_read() {
    let Some(cluster) = shared() else { return };
    let tenant = cluster.tenant("deployment");
    tenant.put("app", &json!({"password": VALUE, "user": "shop"}));
    tenant.put("mail", &json!({"password": "value-of-mail"}));
    let files = [("password", "app", "password"), ("user", "app", "user"), ("mail", "mail", "password")];
    // What is read is read because a pod starts, not because it is old.
    tenant.class("shared", &files, &json!({"refreshInterval": "1h"}));
    let labels = json!({"app": "web"});
    let mut template = tenant.reader("template", "shared");
    template["metadata"] = json!({ "labels": labels });
    template["spec"]["containers"][0]["command"] =
        json!(["sh", "-c", "cat /mnt/secrets/*; echo; exec sleep 86400"]);
    let deployment = json!({
        "metadata": {"name": "web"},
        "spec": {"replicas": 2, "selector": {"matchLabels": labels}, "template": template},
    });
    let deployments = format!("apis/apps/v1/namespaces/{}/deployments", tenant.namespace);
    cluster.create(&deployments, &deployment);
    let ready = |replicas: u64| {
        cluster.wait_for(&format!("{deployments}/web"), "ready", |found| {
            (found["status"]["readyReplicas"] == replicas).then_some(())
        });
    };
    let requests = || {
        let reads = cluster.store().counts().reads;
        let of = |name: &str| reads.get(&tenant.path(name)).copied().unwrap_or_default();
        (cluster.store().logins_at("kubernetes", &tenant.role), of("app"), of("mail"))
    };
    ready(2);
    assert_eq!(requests(), (1, 1, 1), "logins, reads of the one and of the other secret");
    let (status, why) =
        cluster.ask("PATCH", &format!("{deployments}/web"), Some(&json!({"spec": {"replicas": 5}})));
    assert_eq!(status, 200, "{why}");
    ready(5);
    assert_eq!(requests(), (1, 1, 1), "the same for pods that come later");
    let pods = cluster.list(&format!("api/v1/namespaces/{}/pods", tenant.namespace));
    assert_eq!(pods.len(), 5);
    for pod in &pods {
        let printed = tenant.logs(pod["metadata"]["name"].as_str().unwrap());
        assert_eq!(printed, format!("value-of-mail{VALUE}shop\n"));
    }
}

#[test]
fn a_sub_path_follows_a_rotation() {
    let Some(cluster) = shared() else { return };
    let tenant = cluster.tenant("sub-path");
    tenant.put("app", &json!({"password": "first"}));
    tenant.class("quick", &[("password", "app", "password")], &json!({"refreshInterval": "1s"}));
    let mut pod = tenant.reader("reads", "quick");
    let mounts = pod["spec"]["containers"][0]["volumeMounts"].as_array_mut().unwrap();
    mounts.push(json!({
        "name": "secrets", "mountPath": "/etc/app/password", "subPath": "password", "readOnly": true,
    }));
    tenant.run(&pod);
    let read = "cat /etc/app/password /mnt/secrets/password";
    assert_eq!(tenant.sh("reads", read), "firstfirst");
    tenant.put("app", &json!({"password": "the-second"}));
    let follows =
        |file: &str| format!("until [ \"$(cat {file})\" = the-second ]; do sleep 0.1; done; cat {file}");
    assert_eq!(tenant.sh("reads", &follows("/etc/app/password")), "the-second");
    assert_eq!(tenant.sh("reads", &follows("/mnt/secrets/password")), "the-second");
    assert_eq!(tenant.sh("reads", "stat -c %s /etc/app/password"), "10\n");
}

#[test]
fn a_pod_in_a_user_namespace_reads() {
    let Some(cluster) = shared() else { return };
    let tenant = cluster.tenant("user-ns");
    write_app(&tenant);
    let mut pod = tenant.reader("reads", "app");
    pod["spec"]["hostUsers"] = json!(false);
    let mut other = pod.clone();
    tenant.run(&pod);
    let map = tenant.sh("reads", "cat /proc/self/uid_map");
    let map: Vec<&str> = map.split_whitespace().collect();
    assert_eq!(map[0], "0");
    assert_ne!(map[1], "0", "root of the pod is nobody on the node");
    assert_eq!(tenant.sh("reads", "id -u"), "0\n");
    assert_eq!(tenant.sh("reads", "cat /mnt/secrets/password"), VALUE);
    assert_eq!(owners(&tenant, "reads"), "0 0 444 15 password\n0 0 444 4 user\n");

    other["metadata"]["name"] = json!("member");
    other["spec"]["securityContext"] = json!({"runAsUser": 1000, "runAsGroup": 1000, "fsGroup": 2000});
    tenant.run(&other);
    assert_eq!(tenant.sh("member", "cat /mnt/secrets/password"), VALUE);
    assert_eq!(owners(&tenant, "member"), "0 2000 440 15 password\n0 2000 440 4 user\n");
}

#[test]
fn without_read_only_every_write_is_refused() {
    let Some(cluster) = shared() else { return };
    let tenant = cluster.tenant("writes");
    tenant.put("app", &json!({"password": VALUE}));
    tenant.class("app", &[("password", "app", "password"), ("db/user", "app", "password")], &json!({}));
    let mut pod = tenant.reader("writes", "app");
    let spec = &mut pod["spec"];
    spec["volumes"][0]["csi"].as_object_mut().unwrap().remove("readOnly").unwrap();
    spec["containers"][0]["volumeMounts"][0].as_object_mut().unwrap().remove("readOnly").unwrap();
    tenant.run(&pod);
    let script = r#"cd /mnt/secrets; for write in "$@"; do
        if said=$(eval "$write" 2>&1); then said=done; fi
        echo "$write: $said"
    done"#;
    let answers = tenant.exec("writes", &[&["sh", "-c", script, "sh"], WRITES].concat()).unwrap();
    let answers: Vec<&str> = answers.lines().collect();
    assert_eq!(answers.len(), WRITES.len(), "{answers:#?}");
    for (write, answer) in WRITES.iter().zip(answers) {
        let refused = answer.starts_with(write) && answer.ends_with("Read-only file system");
        assert!(refused, "{write}: {answer}");
    }
    assert_eq!(
        tenant.sh("writes", "ls /mnt/secrets; cat /mnt/secrets/password"),
        format!("db\npassword\n{VALUE}")
    );
}

#[test]
fn a_pod_in_a_user_namespace_that_does_not_say_read_only_is_told_by_its_runtime() {
    let Some(cluster) = shared() else { return };
    let tenant = cluster.tenant("mapped");
    write_app(&tenant);
    let mut pod = tenant.reader("mapped", "app");
    pod["spec"]["hostUsers"] = json!(false);
    pod["spec"]["volumes"][0]["csi"].as_object_mut().unwrap().remove("readOnly").unwrap();
    pod["spec"]["containers"][0]["volumeMounts"][0].as_object_mut().unwrap().remove("readOnly").unwrap();
    tenant.create(&pod);
    tenant.wait_event("mapped", "failed to set user-requested vfs flags on bind-mount");
}

#[test]
fn a_shell_loop_makes_variables_of_files() {
    let Some(cluster) = shared() else { return };
    let tenant = cluster.tenant("variables");
    write_app(&tenant);
    let mut pod = tenant.reader("exports", "app");
    let print = r#"echo "$user has $password"; exec sleep 86400"#;
    let script = format!(
        "for f in $(ls /mnt/secrets); do export $f=$(cat /mnt/secrets/$f); done; exec sh -c '{print}'"
    );
    pod["spec"]["containers"][0]["command"] = json!(["sh", "-c", script]);
    tenant.run(&pod);
    wait::until_true("what the program prints", PATIENCE, || !tenant.logs("exports").is_empty());
    assert_eq!(tenant.logs("exports"), format!("shop has {VALUE}\n"));
}

#[test]
fn secrets_of_4_kib_and_of_1_mib_arrive_whole() {
    let Some(cluster) = shared() else { return };
    let tenant = cluster.tenant("large");
    let mut files = Vec::new();
    let mut sums = String::new();
    for (name, length) in [("page", 4 << 10), ("megabyte", 1 << 20)] {
        // No two blocks of it are the same, and it is one line of ASCII.
        let value: String = (0..length / 8).map(|block| format!("{block:08x}")).collect();
        let sum = digest(&SHA256, value.as_bytes());
        let sum: String = sum.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        sums += &format!("{length} {sum}  {name}\n");
        tenant.put(name, &json!({ "value": value }));
        files.push((name, name, "value"));
    }
    tenant.class("large", &files, &json!({}));
    tenant.run(&tenant.reader("sums", "large"));
    let script =
        "cd /mnt/secrets && for f in page megabyte; do echo $(stat -c %s $f) \"$(sha256sum $f)\"; done";
    assert_eq!(tenant.sh("sums", script), sums);
}

#[test]
fn an_init_container_and_a_sidecar_share_the_volume() {
    let Some(cluster) = shared() else { return };
    let tenant = cluster.tenant("sidecar");
    write_app(&tenant);
    let mut pod = tenant.reader("three", "app");
    let mut container = pod["spec"]["containers"][0].clone();
    container["name"] = json!("first");
    container["command"] = json!(["cat", "/mnt/secrets/password"]);
    let mut sidecar = pod["spec"]["containers"][0].clone();
    sidecar["name"] = json!("beside");
    sidecar["restartPolicy"] = json!("Always");
    pod["spec"]["initContainers"] = json!([container, sidecar]);
    let uid = tenant.run(&pod);
    assert_eq!(cluster.logs(&tenant.namespace, "three", Some("first")), VALUE);
    for container in ["app", "beside"] {
        let read = ["cat", "/mnt/secrets/password"];
        let read = cluster.exec(&tenant.namespace, "three", Some(container), &read);
        assert_eq!(read.unwrap(), VALUE, "{container}");
    }
    assert_eq!(cluster.mounts_of(&uid), 1, "one volume for all of them");
}

#[test]
fn a_job_completes_and_leaves_nothing() {
    let Some(cluster) = shared() else { return };
    let tenant = cluster.tenant("job");
    write_app(&tenant);
    let mut template = tenant.reader("template", "app");
    template["metadata"] = json!({});
    template["spec"]["restartPolicy"] = json!("Never");
    template["spec"]["containers"][0]["command"] = json!(["cat", "/mnt/secrets/password"]);
    let job = json!({"metadata": {"name": "once"}, "spec": {"backoffLimit": 0, "template": template}});
    let jobs = format!("apis/batch/v1/namespaces/{}/jobs", tenant.namespace);
    cluster.create(&jobs, &job);
    cluster.wait_for(&format!("{jobs}/once"), "complete", |job| {
        assert_eq!(job["status"]["failed"], Value::Null, "{}", job["status"]);
        (job["status"]["succeeded"] == 1).then_some(())
    });
    let pods = cluster.list(&format!("api/v1/namespaces/{}/pods", tenant.namespace));
    let text = |field: &str| pods[0]["metadata"][field].as_str().unwrap();
    assert_eq!(tenant.logs(text("name")), VALUE);
    // The pod is still there, its volume is not.
    wait::until_true("its volume is unmounted", PATIENCE, || cluster.mounts_of(text("uid")) == 0);
    assert!(cluster.pod(&tenant.namespace, text("name")).is_some());
    let gone = json!({"propagationPolicy": "Foreground"});
    let (status, why) = cluster.ask("DELETE", &format!("{jobs}/once"), Some(&gone));
    assert_eq!(status, 200, "{why}");
    cluster.wait_gone(&tenant.namespace, text("name"));
    cluster.leaves_nothing();
}

#[test]
fn a_pod_reads_through_a_jwt_login() {
    let Some(cluster) = shared() else { return };
    let tenant = cluster.tenant("jwt");
    tenant.put("app", &json!({"password": VALUE}));
    let files = [("password", "app", "password")];
    tenant.class("app", &files, &json!({"vaultAuthMountPath": "jwt"}));
    tenant.run(&tenant.reader("reads", "app"));
    assert_eq!(tenant.sh("reads", "cat /mnt/secrets/password"), VALUE);
    assert_eq!(cluster.store().logins_at("jwt", &tenant.role), 1);
    assert_eq!(cluster.store().logins_at("kubernetes", &tenant.role), 0);
}

#[test]
fn a_secrets_store_import_is_read() {
    let Some(cluster) = shared() else { return };
    let tenant = cluster.tenant("import");
    tenant.put("app", &json!({"password": VALUE, "key": "aGVsbG8="}));
    let source = |key: &str| json!({"path": tenant.path("app"), "key": key});
    tenant.import(
        "app",
        &json!({
            "type": "CSI", "role": tenant.role,
            "files": [
                {"name": "password", "source": source("password")},
                {"name": "decoded", "decodeBase64": true, "source": source("key")},
            ],
        }),
    );
    let mut pod = tenant.pod("reads");
    add_volume(&mut pod, "secrets", SECRETS, &json!({"secretsStoreImport": "app"}));
    tenant.run(&pod);
    assert_eq!(tenant.sh("reads", "cat /mnt/secrets/password"), VALUE);
    assert_eq!(tenant.sh("reads", "cat /mnt/secrets/decoded"), "hello");
    assert_eq!(owners(&tenant, "reads"), "0 0 444 5 decoded\n0 0 444 15 password\n");
}
