//! The driver as its manifests put it on a cluster: what it may do, and what it does not have.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use fuse_tests::cluster::audit::Request;
use fuse_tests::cluster::driver::Part;
use fuse_tests::cluster::shared::settings;
use fuse_tests::cluster::{Cluster, alone, shared};
use serde_json::{Value, json};

/// A file or directory of this repository.
fn repository(path: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join(path).display().to_string()
}

#[test]
fn the_agent_meets_the_restricted_level_but_for_its_socket_directory() {
    let Some(cluster) = shared() else { return };
    let tenant = cluster.tenant("restricted");
    let level = json!({"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "restricted"}}});
    let (status, _) = cluster.ask("PATCH", &format!("api/v1/namespaces/{}", tenant.namespace), Some(&level));
    assert_eq!(status, 200);
    let mut pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "agent"},
        "spec": cluster.daemon_set(Part::Agent)["spec"]["template"]["spec"],
    });
    let spec = &mut pod["spec"];
    // What else a pod of this namespace must have to be let in.
    spec["serviceAccountName"] = json!("default");
    spec["serviceAccount"] = json!("default");
    let pods = format!("api/v1/namespaces/{}/pods?dryRun=All", tenant.namespace);
    let (status, refused) = cluster.ask("POST", &pods, Some(&pod));
    let refused = refused["message"].as_str().unwrap_or_default();
    assert_eq!(status, 403, "{refused}");
    let (_, faults) = refused.split_once("violates PodSecurity \"restricted:latest\": ").unwrap();
    assert_eq!(faults, "restricted volume types (volume \"node\" uses restricted volume type \"hostPath\")");
    let volumes = pod["spec"]["volumes"].as_array_mut().unwrap();
    volumes.iter_mut().filter(|volume| volume["name"] == "node").for_each(|volume| {
        *volume = json!({"name": "node", "emptyDir": {}});
    });
    let (status, why) = cluster.ask("POST", &pods, Some(&pod));
    assert_eq!(status, 201, "{}", why["message"]);
}

#[test]
fn there_are_two_containers_per_node() {
    let Some(cluster) = shared() else { return };
    let nodes = cluster.list("api/v1/nodes").len();
    for part in Part::ALL {
        cluster.wait_driver(part);
        let pods = cluster.driver_pods(part);
        let containers = pods.iter().flat_map(|pod| {
            let kinds = ["containers", "initContainers", "ephemeralContainers"];
            kinds.into_iter().flat_map(|kind| pod["spec"][kind].as_array().into_iter().flatten())
        });
        let names: Vec<&Value> = containers.map(|container| &container["name"]).collect();
        assert_eq!(names, vec![part.container(); nodes]);
    }
    // Nothing else of it is anywhere.
    let ours =
        cluster.list("api/v1/pods").into_iter().filter(|pod| pod.to_string().contains("/fuse-secrets-"));
    assert_eq!(ours.count(), 2 * nodes);
}

/// What a service account may do in a namespace, as the API server lists it.
fn rights(cluster: &Cluster, namespace: &str, account: (&str, &str)) -> BTreeSet<String> {
    let (home, name) = account;
    let list = cluster.kubectl(&[
        "auth",
        "can-i",
        "--list",
        "--no-headers",
        &format!("--namespace={namespace}"),
        &format!("--as=system:serviceaccount:{home}:{name}"),
        "--as-group=system:serviceaccounts",
        &format!("--as-group=system:serviceaccounts:{home}"),
        "--as-group=system:authenticated",
    ]);
    list.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect()
}

#[test]
fn the_agent_may_do_what_its_role_lists_and_nothing_else() {
    let Some(cluster) = shared() else { return };
    let tenant = cluster.tenant("rights");
    let ours = |part: Part| (part.namespace(), part.name());
    for namespace in [&tenant.namespace, "fuse-secrets", "fuse-secrets-csi", "kube-system"] {
        // Whatever every service account may.
        let everybody = rights(&cluster, namespace, (&tenant.namespace, "default"));
        let agent = rights(&cluster, namespace, ours(Part::Agent));
        let more: Vec<&str> = agent.difference(&everybody).map(String::as_str).collect();
        assert_eq!(
            more,
            [
                "events [] [] [create]",
                "secretproviderclasses.secrets-store.csi.x-k8s.io [] [] [get list watch]",
                "secretsstoreimports.deckhouse.io [] [] [get list watch]",
            ],
            "{namespace}"
        );
        let shim = rights(&cluster, namespace, ours(Part::Shim));
        assert_eq!(shim, everybody, "{namespace}: the shim may do nothing");
    }
}

/// A line of `/proc/PID/status`.
fn status(pid: u32, name: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(&format!("{name}:")));
    line.unwrap().split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn the_agent_has_no_capability_and_a_read_only_root() {
    let Some(cluster) = shared() else { return };
    let processes = cluster.driver_processes(Part::Agent);
    assert_eq!(processes.len(), 2, "supervisor and worker");
    for pid in processes {
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(status(pid, set), "0000000000000000", "{set}");
        }
        assert_eq!((status(pid, "NoNewPrivs"), status(pid, "Seccomp")), ("1".into(), "2".into()));
        assert_eq!(status(pid, "Uid"), "65532 65532 65532 65532");
        assert_eq!(status(pid, "Gid"), "65532 65532 65532 65532");
        let root = format!("/proc/{pid}/root");
        let refused = fs::write(format!("{root}/file"), "").unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
        // Of the node it has one directory, and may not change that.
        let table = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
        let shown: Vec<&str> =
            table.lines().filter(|line| line.contains(" /run/fuse-secrets/node ")).collect();
        assert!(
            matches!(shown[..], [line] if line.split(' ').nth(5).unwrap().starts_with("ro")),
            "{shown:?}"
        );
        assert!(!table.contains("/kubelet/pods ") && !table.contains("/var/lib/kubelet "), "{table}");
        let own = fs::read_link(format!("/proc/{pid}/ns/pid")).unwrap();
        assert_ne!(own, fs::read_link(format!("/proc/{}/ns/pid", cluster.node_pid())).unwrap());
    }
}

#[test]
fn the_shim_has_no_token() {
    let Some(cluster) = shared() else { return };
    let [shim] = cluster.driver_processes(Part::Shim)[..] else { panic!("one process") };
    let mounts = fs::read_to_string(format!("/proc/{shim}/mountinfo")).unwrap();
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(4));
    let projected: Vec<&str> = points.filter(|point| point.starts_with("/var/run/secrets")).collect();
    assert_eq!(projected, Vec::<&str>::new());
    assert!(!Path::new(&format!("/proc/{shim}/root/var/run/secrets")).exists());
    let environment = fs::read_to_string(format!("/proc/{shim}/environ")).unwrap();
    assert!(!environment.to_lowercase().contains("token"), "names of its variables alone would tell");
    let pod = &cluster.driver_pods(Part::Shim)[0];
    assert_eq!(pod["spec"]["automountServiceAccountToken"], false);
    let read_only = fs::write(format!("/proc/{shim}/root/file"), "").unwrap_err();
    assert_eq!(read_only.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
}

#[test]
fn definitions_that_exist_are_left_alone() {
    let Some(cluster) = shared() else { return };
    let names = ["secretproviderclasses.secrets-store.csi.x-k8s.io", "secretsstoreimports.deckhouse.io"];
    let paths = names.map(|name| format!("apis/apiextensions.k8s.io/v1/customresourcedefinitions/{name}"));
    // Somebody else's: it has what ours do not.
    let theirs = json!({"metadata": {"annotations": {"owner": "the other driver"}}});
    let changed = paths.each_ref().map(|path| {
        let (status, object) = cluster.ask("PATCH", path, Some(&theirs));
        assert_eq!(status, 200, "{}", object["message"]);
        object["metadata"]["generation"].clone()
    });
    let refused = cluster.try_kubectl(&["create", "--filename", &repository("deploy/crds")]).unwrap_err();
    for name in names {
        assert!(refused.contains(&format!("\"{name}\" already exists")), "{refused}");
    }
    for (path, generation) in paths.iter().zip(&changed) {
        let now = cluster.find(path).unwrap();
        assert_eq!(now["metadata"]["annotations"]["owner"], "the other driver");
        assert_eq!(now["metadata"]["generation"], *generation);
    }
}

#[test]
fn the_registry_and_kubelets_root_are_one_value_each() {
    let Some(cluster) = shared() else { return };
    let directory = tempfile::tempdir().unwrap();
    let copied =
        Command::new("cp").arg("-r").arg(repository("deploy")).arg(directory.path()).status().unwrap();
    assert!(copied.success());
    let deploy = directory.path().join("deploy");
    let settings = fs::read_to_string(deploy.join("settings.yaml")).unwrap();
    let settings = settings.replace("registry: localhost", "registry: registry.example.org/platform");
    let settings = settings.replace("kubeletRoot: /var/lib/kubelet", "kubeletRoot: /var/snap/kubelet");
    fs::write(deploy.join("settings.yaml"), settings).unwrap();
    let rendered = cluster.kubectl(&["kustomize", &deploy.display().to_string()]);
    let lines =
        |with: &str| rendered.lines().filter(|line| line.contains(with)).map(str::trim).collect::<Vec<_>>();
    let version = env!("CARGO_PKG_VERSION");
    for image in ["fuse-secrets-agent", "fuse-secrets-csi"] {
        let line = format!("image: registry.example.org/platform/{image}:{version}");
        assert_eq!(lines(image).iter().filter(|found| found.ends_with(&line)).count(), 1, "{rendered}");
    }
    assert_eq!(lines("localhost/"), Vec::<&str>::new());
    assert_eq!(lines("/var/lib/kubelet"), Vec::<&str>::new());
    assert_eq!(lines("/var/snap/kubelet").len(), 3, "the volume, its mount, the shim's setting: {rendered}");
}

#[test]
fn tokens_come_in_secrets_where_the_csi_driver_says_so() {
    let Some(cluster) = alone() else { return };
    cluster.wait_whole_driver();
    let tenant = cluster.tenant("in-secrets");
    tenant.put("app", &json!({"password": "value-of-a-test"}));
    tenant.class("app", &[("password", "app", "password")], &json!({}));
    let says = || {
        let driver = cluster.find("apis/storage.k8s.io/v1/csidrivers/fuse-secrets").unwrap();
        driver["spec"]["serviceAccountTokenInSecrets"].as_bool()
    };
    cluster.install_with(&settings(), &["tokens-in-secrets"]);
    assert_eq!(says(), Some(true));
    tenant.run(&tenant.reader("reads", "app"));
    assert_eq!(tenant.sh("reads", "cat /mnt/secrets/password"), "value-of-a-test");
    cluster.install_with(&settings(), &[]);
    assert_ne!(says(), Some(true));
}

#[test]
fn a_mount_writes_nothing_to_the_api_server() {
    // Alone: what the agent asks for other tests' sake cannot be told apart.
    let Some(cluster) = alone() else { return };
    cluster.wait_whole_driver();
    let tenant = cluster.tenant("audit");
    tenant.put("app", &json!({"password": "value-of-a-test"}));
    tenant.class("app", &[("password", "app", "password")], &json!({}));
    // The first one that asks for this class.
    let mark = cluster.audit_mark();
    for pod in ["first", "second", "third"] {
        tenant.run(&tenant.reader(pod, "app"));
        assert_eq!(tenant.exec(pod, &["cat", "/mnt/secrets/password"]).unwrap(), "value-of-a-test");
        tenant.remove(pod);
    }
    let users = Part::ALL.map(Part::user);
    // The watch of a kind is begun again every few minutes; the issuer's keys are asked for every ten.
    let is_upkeep = |request: &Request| {
        request.verb == "watch"
            || ["/openid/v1/jwks", "/.well-known/openid-configuration"].contains(&&*request.resource)
    };
    let requests = cluster.requests_since(mark);
    assert!(requests.iter().any(|request| request.namespace == tenant.namespace), "the log is written");
    let ours = requests.into_iter().filter(|request| users.contains(&request.user));
    let more: Vec<Request> = ours.filter(|request| !is_upkeep(request)).collect();
    assert_eq!(more, Vec::<Request>::new());
}
