//go:build programs

// Package programs keeps what is built from this module in its go.mod.
package programs

import _ "go.etcd.io/etcd/server/v3"
