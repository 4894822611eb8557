//go:build programs

// Package programs keeps what is built from this module in its go.mod.
package programs

import _ "github.com/opencontainers/runc"
