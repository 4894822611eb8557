#!/bin/sh
# Tells a Vault or OpenBao about one application: how pods log in, what the role `app` of namespace `shop` may read, a secret to try. Run it
# with VAULT_ADDR and VAULT_TOKEN of somebody who may, and with kubectl of the cluster. Once more does no harm: it adds a version of the secret.
#
#   sh deploy/vault/setup.sh https://10.0.0.1:6443           the API server as the store reaches it; the store asks it who a pod is
#   sh deploy/vault/setup.sh https://10.0.0.1:6443 jwt       the store reads the issuer's keys there, and asks for no pod
set -eu
cd "$(dirname "$0")"
server=${1:?the address at which the store reaches the API server}
method=${2:-kubernetes}
ca=$(kubectl --namespace fuse-secrets get configmap kube-root-ca.crt --output 'jsonpath={.data.ca\.crt}')

vault policy write app policy.hcl
vault auth list | grep -q "^$method/" || vault auth enable "$method"
case $method in
kubernetes)
	kubectl apply --filename reviewer.yaml
	kubectl --namespace fuse-secrets wait --for 'jsonpath={.data.token}' secret/vault-reviewer
	kubectl --namespace fuse-secrets get secret vault-reviewer --output 'jsonpath={.data.token}' | base64 -d |
		vault write auth/kubernetes/config kubernetes_host="$server" kubernetes_ca_cert="$ca" token_reviewer_jwt=-
	vault write auth/kubernetes/role/app bound_service_account_names=app bound_service_account_namespaces=shop \
		audience=vault token_policies=app token_ttl=1h
	;;
jwt)
	# The issuer's keys are public, but most API servers show them to service accounts only: let the store read them.
	kubectl get clusterrolebinding fuse-secrets-public-keys >/dev/null 2>&1 || kubectl create clusterrolebinding fuse-secrets-public-keys \
		--clusterrole=system:service-account-issuer-discovery --group=system:unauthenticated
	vault write auth/jwt/config jwks_url="$server/openid/v1/jwks" jwks_ca_pem="$ca"
	vault write auth/jwt/role/app role_type=jwt user_claim=sub bound_audiences=vault \
		bound_subject=system:serviceaccount:shop:app token_policies=app token_ttl=1h
	;;
*)
	echo "$method: kubernetes or jwt" >&2
	exit 64
	;;
esac
vault kv put secret/app password=first
