//! From what kubelet says of a pod to what is served: attributes name the class, the pod context names the subject, the class
//! names the audience, and the audience the token.
//!
//! ```text
//!   attributes ─▶ kind and name ─▶ Classes ─▶ class ─┬─Policy──────────────────▶ VolumeSpec
//!   pod context ─▶ namespace, service account ───────┤                              ▲
//!   tokens ──the audience that the class asks for──▶ token ─its claims─▶ Identity ──┘
//! ```
//! The token's claims are read and compared here, not verified: that is `worker`'s next step, by the issuer's keys or by a login,
//! before anything cached is shared with it.

use std::borrow::Cow;
use std::collections::BTreeMap;

use fuse_secrets_csi::wire::Secret;
use fuse_secrets_csi::wire::message::Publish;

use super::refusal::{Code, Refusal};
use crate::class::{Class, Classes, Kind, object_name};
use crate::config::fault::Broken;
use crate::config::settings::Settings;
use crate::config::{AgentConfig, UnknownAttributes, text};
use crate::kubernetes::token::Claims;
use crate::reference::{Subject, VolumeSpec};
use crate::secret::Token;
use crate::volume::Pod;

/// Attributes that name a class.
const PROVIDER_CLASS: &str = "secretProviderClass";
const STORE_IMPORT: &str = "secretsStoreImport";
const OVERRIDE: Broken = Broken {
    rule: Cow::Borrowed("is a parameter of the class, and a pod overrides nothing of it"),
    remedy: Cow::Borrowed("write it into the class, or remove it"),
};
/// What is said of a volume with a `nodePublishSecretRef`.
const SECRET_REF: &str =
    "nodePublishSecretRef: has no effect, the Secret is not read; remove it from the pod's spec";
/// Names that are told where one is not found.
const MOST_NAMES: usize = 5;

/// What a volume needs beside its descriptor.
pub struct Resolved {
    /// What is served.
    pub spec: VolumeSpec,
    /// To whom.
    pub pod: Pod,
    /// What the store is shown.
    pub token: Token,
    /// What the pod's owner should know all the same.
    pub warnings: Vec<String>,
}

/// Reads the class, and picks the token. May block.
///
/// # Errors
/// [`Refusal`]
pub fn resolve(publish: Publish, classes: &dyn Classes, config: &AgentConfig) -> Result<Resolved, Refusal> {
    let Publish { pod, attributes, mut tokens, secret_ref, .. } = publish;
    let (kind, name, mut warnings) = which(&attributes, config.unknown_attributes)?;
    if secret_ref {
        warnings.push(SECRET_REF.to_owned());
    }
    let pod = context(&pod)?;
    let mut class = find(classes, kind, &pod.namespace, &name)?;
    warnings
        .extend(class.warnings.iter().map(|warning| format!("{class}: {}: {}", warning.field, warning.text)));
    // Before a token is picked, and before anybody outside of this process hears of it.
    let allowed = config.policy.check(&class, &pod.namespace, &config.under);
    allowed.map_err(|faults| Refusal::new(Code::PermissionDenied, faults.to_string()))?;
    let asked = class.settings.login.audience.take().or_else(|| config.under.login.audience.clone());
    let (audience, token) = pick(&mut tokens, asked.as_deref())?;
    let uid = account(&token, &audience, &pod)?;
    // So that a refused login names it, and a newer token is picked alike.
    class.settings.login.audience = Some(audience).filter(|audience| !audience.is_empty());
    let subject =
        Subject::ServiceAccount { namespace: pod.namespace.clone(), name: pod.service_account.clone(), uid };
    let spec = class.into_spec(&Settings::default(), &config.under, subject);
    let spec = spec.map_err(|faults| Refusal::new(Code::FailedPrecondition, faults.to_string()))?;
    Ok(Resolved { spec, pod, token, warnings })
}

/// The token for an audience; where none is asked for, the only one there is.
///
/// # Errors
/// [`Refusal`] with the line that is missing in the CSIDriver, or in the class.
pub fn pick(tokens: &mut BTreeMap<String, Secret>, asked: Option<&str>) -> Result<(String, Token), Refusal> {
    let refuse = |text| Err(Refusal::new(Code::FailedPrecondition, text));
    let there = |tokens: &BTreeMap<String, Secret>| {
        tokens.keys().map(|audience| format!("{audience:?}")).collect::<Vec<_>>().join(", ")
    };
    let picked = match asked {
        Some(audience) => tokens.remove_entry(audience),
        None if tokens.len() > 1 => {
            return refuse(format!(
                "the class names no audience, and kubelet sent tokens for {}; set audience in the class to one of them",
                there(tokens)
            ));
        }
        None => tokens.pop_first(),
    };
    let Some((audience, secret)) = picked else {
        let audience = asked.unwrap_or("vault");
        let sent =
            if tokens.is_empty() { "none at all".to_owned() } else { format!("only {}", there(tokens)) };
        return refuse(format!(
            "kubelet sent no service-account token for audience {audience:?}, but {sent}; add the line `- audience: \
             {audience}` to spec.tokenRequests of the CSIDriver"
        ));
    };
    match Token::new(secret.expose().to_owned()) {
        Ok(token) => Ok((audience, token)),
        Err(error) => refuse(format!("kubelet's service-account token for audience {audience:?} is {error}")),
    }
}

/// Which class the attributes name.
fn which(
    attributes: &BTreeMap<String, String>,
    unknown: UnknownAttributes,
) -> Result<(Kind, String, Vec<String>), Refusal> {
    let refuse = |text| Err(Refusal::new(Code::InvalidArgument, text));
    let (mut strange, mut warnings) = (Vec::new(), Vec::new());
    for name in attributes.keys().filter(|name| ![PROVIDER_CLASS, STORE_IMPORT].contains(&name.as_str())) {
        let shown: String = name.chars().filter(|c| !c.is_control()).take(63).collect();
        match unknown {
            UnknownAttributes::Reject => {
                let meant = if is_parameter(name) {
                    OVERRIDE
                } else {
                    text::unknown(name, [PROVIDER_CLASS, STORE_IMPORT])
                };
                strange.push(format!("volumeAttributes.{shown}: {}; {}", meant.rule, meant.remedy));
            }
            UnknownAttributes::Ignore => {
                warnings.push(format!("volumeAttributes.{shown} has no effect; remove it"))
            }
        }
    }
    if !strange.is_empty() {
        return refuse(strange.join("\n"));
    }
    let (field, kind, name) = match (attributes.get(PROVIDER_CLASS), attributes.get(STORE_IMPORT)) {
        (Some(name), None) => (PROVIDER_CLASS, Kind::SecretProviderClass, name),
        (None, Some(name)) => (STORE_IMPORT, Kind::SecretsStoreImport, name),
        (None, None) => {
            return refuse(format!(
                "volumeAttributes name no class; add {PROVIDER_CLASS} or {STORE_IMPORT} with the class's name"
            ));
        }
        (Some(_), Some(_)) => {
            return refuse(format!(
                "volumeAttributes name two classes; keep one of {PROVIDER_CLASS} and {STORE_IMPORT}"
            ));
        }
    };
    match object_name(name) {
        Ok(name) => Ok((kind, name, warnings)),
        Err(fault) => refuse(format!("volumeAttributes.{field}: {}; {}", fault.rule, fault.remedy)),
    }
}

/// Whether it is a parameter, which other drivers let a pod put over its class's.
fn is_parameter(name: &str) -> bool {
    let of_provider =
        |prefix| name.strip_prefix(prefix).is_some_and(|rest| rest.starts_with(char::is_uppercase));
    ["roleName", "objects", "audience"].contains(&name)
        || ["vault", "bao", "openbao"].into_iter().any(of_provider)
}

fn context(pod: &BTreeMap<String, String>) -> Result<Pod, Refusal> {
    let said = |key: &str| match pod.get(&format!("csi.storage.k8s.io/{key}")) {
        Some(value) if !value.is_empty() => Ok(value.clone()),
        _ => {
            let text = format!(
                "kubelet did not send csi.storage.k8s.io/{key}; set podInfoOnMount: true in the CSIDriver"
            );
            Err(Refusal::new(Code::FailedPrecondition, text))
        }
    };
    Ok(Pod {
        name: said("pod.name")?,
        namespace: said("pod.namespace")?,
        service_account: said("serviceAccount.name")?,
        uid: said("pod.uid")?,
    })
}

fn find(classes: &dyn Classes, kind: Kind, namespace: &str, name: &str) -> Result<Class, Refusal> {
    if let Some(class) = classes.find(kind, namespace, name)? {
        return Ok(class);
    }
    let refuse = |text| Err(Refusal::new(Code::NotFound, text));
    let there = classes.names(namespace)?;
    if let Some((other, _)) = there.iter().find(|(_, other)| other == name) {
        let field = if *other == Kind::SecretProviderClass { PROVIDER_CLASS } else { STORE_IMPORT };
        return refuse(format!(
            "{namespace}/{name} is a {other}, not a {kind}; write `{field}: {name}` in volumeAttributes"
        ));
    }
    let missing = format!("there is no {kind} {namespace}/{name}");
    let elsewhere = classes.elsewhere(kind, namespace, name);
    if !elsewhere.is_empty() {
        let there = first(&elsewhere.iter().map(String::as_str).collect::<Vec<_>>());
        return refuse(format!(
            "{missing}; {name} is in namespace {there}, but a pod may only use classes of its own namespace {namespace}: create \
             it there"
        ));
    }
    let of_kind: Vec<&str> =
        there.iter().filter(|(of, _)| *of == kind).map(|(_, name)| name.as_str()).collect();
    if of_kind.is_empty() {
        return refuse(format!(
            "{missing}, nor any other in this namespace; create it, or correct the name or namespace"
        ));
    }
    let meant = text::closest(name, of_kind.iter().copied()).map(|meant| format!("did you mean {meant}? "));
    refuse(format!("{missing}; {}there are {}", meant.unwrap_or_default(), first(&of_kind)))
}

/// The first of several names, and how many more there are.
fn first(names: &[&str]) -> String {
    let more = names.len().saturating_sub(MOST_NAMES);
    let rest = if more > 0 { format!(" and {more} more") } else { String::new() };
    names.iter().take(MOST_NAMES).copied().collect::<Vec<_>>().join(", ") + &rest
}

/// The uid of the service account, from the token's claims; they must be those of the pod.
fn account(token: &Token, audience: &str, pod: &Pod) -> Result<String, Refusal> {
    let claims = Claims::read(token).map_err(|why| {
        Refusal::new(Code::FailedPrecondition, format!("the token for audience {audience:?} {why}"))
    })?;
    match claims.stranger_to(pod) {
        None => Ok(claims.account_uid),
        Some(why) => {
            Err(Refusal::new(Code::PermissionDenied, format!("the token for audience {audience:?} {why}")))
        }
    }
}

/// Which kind of class the attributes name, as far as that can be told.
#[must_use]
pub fn kind(attributes: &BTreeMap<String, String>) -> Option<Kind> {
    match (attributes.contains_key(PROVIDER_CLASS), attributes.contains_key(STORE_IMPORT)) {
        (true, false) => Some(Kind::SecretProviderClass),
        (false, true) => Some(Kind::SecretsStoreImport),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
