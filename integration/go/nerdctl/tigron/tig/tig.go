// Package tig stands in for nerdctl's own test framework, which its released modules lack.
package tig

// T is the one name that nerdctl's sources use.
type T interface {
	Log(...any)
	FailNow()
}
