#!/bin/sh
# Takes the driver out of a cluster. Refuses while a pod has a volume of it: without the driver such a pod loses its files
# and cannot be deleted. Run it with kubectl of somebody who may do what the manifests did.
#
#   sh deploy/uninstall.sh --check       says what stands against it, and changes nothing
#   sh deploy/uninstall.sh               does it, unless something stands against it
#
# DRIVER is the CSIDriver's name, if it is not fuse-secrets. Definitions of classes, classes, and what the store knows are left.
set -eu
driver=${DRIVER:-fuse-secrets}
case "$#,${1:-}" in
0, | 1,--check) ;;
*)
	echo "usage: sh deploy/uninstall.sh [--check]" >&2
	exit 64
	;;
esac

# Pods that are not over and name the driver.
pods() {
	all=$(kubectl get pods --all-namespaces --output \
		'jsonpath={range .items[*]}{.metadata.namespace}/{.metadata.name} {.status.phase} {.spec.volumes[*].csi.driver}{"\n"}{end}') || return
	printf '%s\n' "$all" | awk -v driver="$driver" '$2 != "Succeeded" && $2 != "Failed" {
		for (i = 3; i <= NF; i++) if ($i == driver) { print "  pod " $1; next }
	}'
}

# Nodes whose agent serves something still, as of pods that have gone from the API server only.
nodes() {
	agents=$(kubectl --namespace fuse-secrets get pods --selector app.kubernetes.io/name=fuse-secrets-agent --output \
		'jsonpath={range .items[*]}{.metadata.name} {.spec.nodeName}{"\n"}{end}') || return
	printf '%s\n' "$agents" | while read -r pod node; do
		[ -n "$pod" ] || continue
		mounts=$(kubectl --namespace fuse-secrets exec "$pod" --container agent -- \
			/fuse-secrets --log error mounts --output json </dev/null) || mounts="no answer"
		[ "$mounts" = "[]" ] || echo "  node $node: its agent serves volumes, or does not answer"
	done
}

# What stands against it; a failed question does, too.
against() {
	found=$(pods) || return
	if [ -n "$found" ]; then
		printf 'these have volumes of %s:\n%s\n' "$driver" "$found" >&2
		return 1
	fi
}

against
# Every agent is attached to its shim, so that what it says is all there is.
kubectl --namespace fuse-secrets rollout status daemonset/fuse-secrets-agent --timeout=30s >&2
busy=$(nodes)
if [ -n "$busy" ]; then
	printf 'not every node has let go:\n%s\n' "$busy" >&2
	exit 1
fi
if [ "${1:-}" = --check ]; then
	echo "nothing stands against it"
	exit
fi

# From here on kubelets mount nothing of this driver; to unmount they do not need the object.
kubectl delete csidriver "$driver" --ignore-not-found
if ! against; then
	echo "what is said above came meanwhile; \`kubectl apply -k deploy\` puts the CSIDriver back, or delete them and run this again" >&2
	exit 1
fi
kubectl delete namespace fuse-secrets fuse-secrets-csi --ignore-not-found
kubectl delete clusterrolebinding fuse-secrets-agent --ignore-not-found
kubectl delete clusterrole fuse-secrets-agent --ignore-not-found
