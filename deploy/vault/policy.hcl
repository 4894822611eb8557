# What the role `app` of namespace `shop` may read: one application's secrets, and nothing else. `read` is all that a volume needs.
path "secret/data/app" {
  capabilities = ["read"]
}
# Which version a KV v2 secret is at, for messages such as "version 3 was deleted at ...". May be left out.
path "secret/metadata/app" {
  capabilities = ["read"]
}
# A token gives itself back when its last volume has gone, and is renewed before. Vault's `default` policy says the same.
path "auth/token/revoke-self" {
  capabilities = ["update"]
}
path "auth/token/renew-self" {
  capabilities = ["update"]
}
