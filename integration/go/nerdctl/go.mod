module darter.example/tools/nerdctl

go 1.26.3

require github.com/containerd/nerdctl/v2 v2.3.5

// A test-only module that nerdctl's go.mod names and that no proxy has; the stub satisfies its one use.
replace github.com/containerd/nerdctl/mod/tigron => ./tigron
