//! What of the cluster concerns the driver: its CSIDriver, the resources of classes, both DaemonSets, and who has it registered.
//! Judged from what `kubectl` printed alone, so that every verdict is tested with recorded objects.

use serde::Deserialize;

use super::agents::{List, Metadata, Pod};
use crate::cli::doctor::Check;

/// The definitions of class resources, and the attribute that names each.
pub(super) const DEFINITIONS: [(&str, &str); 2] = [
    ("secretproviderclasses.secrets-store.csi.x-k8s.io", "secretProviderClass"),
    ("secretsstoreimports.deckhouse.io", "secretsStoreImport"),
];
/// Names that are told of a longer list.
const SHOWN: usize = 5;

/// What is asked, each answered or why not.
pub(super) struct Facts {
    /// The driver's name.
    pub(super) driver: String,
    pub(super) csi_driver: Asked<Option<CsiDriver>>,
    /// In the order of [`DEFINITIONS`].
    pub(super) definitions: [Asked<Option<Definition>>; 2],
    /// The agents' and the shims'.
    pub(super) sets: [Set; 2],
    pub(super) csi_nodes: Asked<List<CsiNode>>,
}

/// What it is called, the daemon set, its pods.
pub(super) type Set = (&'static str, Asked<Option<DaemonSet>>, Asked<List<Pod>>);

/// What the API server said, or why it did not.
pub(super) type Asked<T> = Result<T, String>;

#[derive(Clone, Deserialize)]
pub(super) struct CsiDriver {
    pub(super) spec: CsiDriverSpec,
}

#[derive(Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct CsiDriverSpec {
    pub(super) attach_required: Option<bool>,
    pub(super) pod_info_on_mount: Option<bool>,
    pub(super) requires_republish: Option<bool>,
    pub(super) fs_group_policy: Option<String>,
    pub(super) volume_lifecycle_modes: Vec<String>,
    pub(super) token_requests: Vec<TokenRequest>,
}

#[derive(Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct TokenRequest {
    pub(super) audience: String,
}

#[derive(Deserialize)]
pub(super) struct Definition {
    spec: DefinitionSpec,
}

#[derive(Deserialize)]
struct DefinitionSpec {
    versions: Vec<DefinitionVersion>,
}

#[derive(Deserialize)]
struct DefinitionVersion {
    name: String,
    served: bool,
}

#[derive(Deserialize)]
pub(super) struct DaemonSet {
    status: DaemonSetStatus,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct DaemonSetStatus {
    desired_number_scheduled: u32,
    number_ready: u32,
}

#[derive(Deserialize)]
pub(super) struct CsiNode {
    pub(super) metadata: Metadata,
    spec: CsiNodeSpec,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct CsiNodeSpec {
    /// `null` where there is none.
    drivers: Option<Vec<CsiNodeDriver>>,
}

#[derive(Deserialize)]
struct CsiNodeDriver {
    name: String,
}

impl CsiNode {
    /// Whether the driver has registered there.
    pub(super) fn has(&self, driver: &str) -> bool {
        self.spec.drivers.iter().flatten().any(|there| there.name == driver)
    }
}

impl CsiDriver {
    /// The audiences that kubelet asks tokens for.
    pub(super) fn audiences(&self) -> Vec<&str> {
        self.spec.token_requests.iter().map(|request| request.audience.as_str()).collect()
    }
}

impl Facts {
    /// Whether everything could be asked.
    pub(super) fn is_whole(&self) -> bool {
        self.csi_driver.is_ok()
            && self.definitions.iter().all(Result::is_ok)
            && self.sets.iter().all(|(_, set, pods)| set.is_ok() && pods.is_ok())
            && self.csi_nodes.is_ok()
    }

    pub(super) fn judge(&self) -> Vec<Check> {
        let mut checks = self.csi_driver();
        checks.extend(self.definitions());
        checks.extend(self.sets.iter().map(|(name, set, pods)| daemon_set(name, set, pods)));
        checks.push(self.registered());
        checks.extend(self.images());
        checks
    }

    fn csi_driver(&self) -> Vec<Check> {
        let check = |found: String| Check::of("CSIDriver", found);
        let driver = match &self.csi_driver {
            Err(why) => return vec![unknown("CSIDriver", why)],
            Ok(None) => {
                let found = format!("no CSIDriver {}", self.driver);
                return vec![check(found).lost("no pod can mount: apply the manifests of deploy/")];
            }
            Ok(Some(driver)) => driver,
        };
        let spec = &driver.spec;
        let mut wrong = Vec::new();
        let mut must = |right: bool, found: String, remedy: &str| {
            if !right {
                wrong.push(check(found).lost(remedy));
            }
        };
        let said = |switch: Option<bool>| switch.map_or("missing".to_owned(), |switch| switch.to_string());
        must(
            spec.attach_required == Some(false),
            format!("attachRequired: {}", said(spec.attach_required)),
            "pods wait for an attachment that nobody makes: create it anew with attachRequired: false",
        );
        must(
            spec.pod_info_on_mount == Some(true),
            format!("podInfoOnMount: {}", said(spec.pod_info_on_mount)),
            "every volume is refused, since kubelet does not say whose it is: set podInfoOnMount: true",
        );
        must(
            spec.volume_lifecycle_modes.iter().any(|mode| mode == "Ephemeral"),
            format!("volumeLifecycleModes: {}", spec.volume_lifecycle_modes.join(", ")),
            "pods cannot name the driver: create it anew with volumeLifecycleModes: [Ephemeral]",
        );
        must(
            spec.requires_republish == Some(true),
            format!("requiresRepublish: {}", said(spec.requires_republish)),
            "tokens expire and dead mounts stay dead: set requiresRepublish: true",
        );
        must(
            !spec.token_requests.is_empty(),
            "tokenRequests: none".to_owned(),
            "no pod can log in: add `- audience: vault` to spec.tokenRequests",
        );
        if spec.fs_group_policy.as_deref() != Some("None") {
            let found = format!("fsGroupPolicy: {}", spec.fs_group_policy.as_deref().unwrap_or("missing"));
            wrong.push(
                check(found).note(
                    "the driver gives files their group itself: create it anew with fsGroupPolicy: None",
                ),
            );
        }
        if wrong.is_empty() {
            let audiences = driver.audiences().iter().map(|one| format!("{one:?}")).collect::<Vec<_>>();
            wrong.push(check(format!("{}, tokens for {}", self.driver, audiences.join(", "))));
        }
        wrong
    }

    fn definitions(&self) -> Vec<Check> {
        let there = |definition: &Asked<Option<Definition>>| !matches!(definition, Ok(None));
        let none = !self.definitions.iter().any(there);
        let judge = |((name, attribute), found): (&(&str, &str), &Asked<Option<Definition>>)| {
            let kind = name.split('.').next().unwrap_or(name);
            match found {
                Err(why) => unknown("CRD", why),
                Ok(Some(definition)) => {
                    let served = definition.spec.versions.iter().filter(|version| version.served);
                    let versions = served.map(|version| version.name.as_str()).collect::<Vec<_>>();
                    Check::of("CRD", format!("{kind}: {}", versions.join(", ")))
                }
                Ok(None) if none => Check::of("CRD", format!("no {kind}"))
                    .lost(format!("no pod can name a class: apply the definition of {name}")),
                Ok(None) => Check::of("CRD", format!("no {kind}"))
                    .note(format!("pods that name {attribute} are refused: apply the definition of {name}")),
            }
        };
        let mut checks: Vec<Check> = DEFINITIONS.iter().zip(&self.definitions).map(judge).collect();
        // One right is missing, not two.
        checks.dedup();
        checks
    }

    fn registered(&self) -> Check {
        let nodes = match &self.csi_nodes {
            Err(why) => return unknown("registered", why),
            Ok(nodes) => &nodes.items,
        };
        let total = nodes.len();
        let without: Vec<&CsiNode> = nodes.iter().filter(|node| !node.has(&self.driver)).collect();
        let check = Check::of("registered", format!("on {} of {total} nodes", total - without.len()));
        if without.is_empty() {
            return check;
        }
        let [_, (_, _, shims)] = &self.sets;
        // A node that no shim is meant for is no loss.
        let meant = |node: &&CsiNode| match shims {
            Ok(shims) => shims.items.iter().any(|pod| pod.spec.node_name == node.metadata.name),
            Err(_) => true,
        };
        let (lost, left_out): (Vec<&CsiNode>, Vec<_>) = without.into_iter().partition(meant);
        let names = |nodes: &[&CsiNode]| several(nodes.iter().map(|node| node.metadata.name.as_str()));
        if lost.is_empty() {
            let text =
                format!("no shim is meant for {}: pods with secrets cannot run there", names(&left_out));
            return check.note(text);
        }
        check.lost(format!(
            "pods with secrets do not start on {}: see the log of the shim there, and --kubelet-root",
            names(&lost)
        ))
    }

    fn images(&self) -> Vec<Check> {
        let judge = |(name, _, pods): &(&'static str, Asked<Option<DaemonSet>>, Asked<List<Pod>>)| {
            let pods = &pods.as_ref().ok()?.items;
            let mut images: Vec<(&str, Vec<&str>)> = Vec::new();
            for pod in pods {
                let image = pod.spec.containers.first().map_or("", |container| container.image.as_str());
                match images.iter_mut().find(|(known, _)| *known == image) {
                    Some((_, nodes)) => nodes.push(&pod.spec.node_name),
                    None => images.push((image, vec![&pod.spec.node_name])),
                }
            }
            // Most nodes first: the rest is what differs.
            images.sort_by_key(|(_, nodes)| std::cmp::Reverse(nodes.len()));
            let ((first, _), rest) = images.split_first()?;
            let check = Check::of(format!("{name} image"), *first);
            let differs =
                |(image, nodes): &(&str, Vec<&str>)| format!("{image} on {}", several(nodes.iter().copied()));
            Some(match rest {
                [] => check,
                rest => check.note(format!(
                    "an update is under way, or waits for the pods to be deleted (OnDelete): {}",
                    rest.iter().map(differs).collect::<Vec<_>>().join("; ")
                )),
            })
        };
        self.sets.iter().filter_map(judge).collect()
    }
}

fn daemon_set(name: &'static str, set: &Asked<Option<DaemonSet>>, pods: &Asked<List<Pod>>) -> Check {
    let check = |found: String| Check::of(format!("{name} pods"), found);
    let status = match set {
        Err(why) => return unknown(&format!("{name} pods"), why),
        Ok(None) => {
            let remedy = "apply the manifests of deploy/, or name the right namespace";
            return check("no DaemonSet".to_owned()).lost(format!("no pod can mount: {remedy}"));
        }
        Ok(Some(set)) => &set.status,
    };
    let (ready, desired) = (status.number_ready, status.desired_number_scheduled);
    let check = check(format!("{ready} of {desired} ready"));
    if ready >= desired && desired > 0 {
        return check;
    }
    if desired == 0 {
        return check.lost("no node is meant to run it: see its nodeSelector and tolerations");
    }
    let bad = pods.iter().flat_map(|pods| &pods.items).filter(|pod| !pod.is_ready());
    let bad: Vec<String> =
        bad.map(|pod| format!("{} on {} ({})", pod.metadata.name, pod.spec.node_name, pod.state())).collect();
    let which = if bad.is_empty() {
        "some are not there".to_owned()
    } else {
        several(bad.iter().map(String::as_str))
    };
    check.lost(format!("on their nodes volumes wait: {which}"))
}

/// What could not be asked is not known to be good.
fn unknown(check: &str, why: &str) -> Check {
    Check::of(check.to_owned(), "unknown").note(why)
}

/// Names in a line, not too many.
pub(super) fn several<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let names: Vec<&str> = names.collect();
    let more = names.len().saturating_sub(SHOWN);
    let rest = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("{}{rest}", names.iter().take(SHOWN).copied().collect::<Vec<_>>().join(", "))
}

#[cfg(test)]
mod tests;
