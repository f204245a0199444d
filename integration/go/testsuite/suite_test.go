// containerd's own snapshotter test suite against darter-snapshotter over its socket.
//
// The daemon runs without a mesh, so every snapshot is plain. Run as root:
//
//	go test . -args -test.root -daemon /path/to/darter-snapshotter
package testsuite

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

var daemon = flag.String("daemon", "darter-snapshotter", "the program to test")

// Each subtest has a daemon of its own: they run at the same time and use the same keys.
func start(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
	socket := filepath.Join(root, "s.sock")
	cmd := exec.Command(*daemon, "--plain", "--config", "/dev/null", "--root", root, "--address", socket)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		return nil, nil, err
	}
	stop := func() error {
		cmd.Process.Signal(os.Interrupt)
		return cmd.Wait()
	}
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if _, err := os.Stat(socket); err == nil {
			break
		}
		if time.Now().After(deadline) {
			stop()
			return nil, nil, fmt.Errorf("no socket at %s", socket)
		}
	}
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		stop()
		return nil, nil, err
	}
	client := proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "darter")
	return client, func() error { conn.Close(); return stop() }, nil
}

func TestSuite(t *testing.T) {
	// By this name the suite leaves out the one thing that no overlayfs without redirect_dir can do: renaming a directory
	// of a lower layer.
	testsuite.SnapshotterSuite(t, "overlayfs", start)
}
