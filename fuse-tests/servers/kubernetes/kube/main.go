// All programs of Kubernetes that a node and its control plane need, in one binary: five would hold the same code five times.
//
// Usage: hyperkube PROGRAM [ARGUMENT...]
package main

import (
	"context"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"k8s.io/component-base/cli"
	kubectl "k8s.io/kubectl/pkg/cmd"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	manager "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	scheduler "k8s.io/kubernetes/cmd/kube-scheduler/app"
	kubelet "k8s.io/kubernetes/cmd/kubelet/app"
)

var programs = map[string]func() *cobra.Command{
	"kube-apiserver":          apiserver.NewAPIServerCommand,
	"kube-controller-manager": manager.NewControllerManagerCommand,
	"kube-scheduler":          func() *cobra.Command { return scheduler.NewSchedulerCommand() },
	"kubectl":                 kubectl.NewDefaultKubectlCommand,
	"kubelet":                 func() *cobra.Command { return kubelet.NewKubeletCommand(context.Background()) },
}

func main() {
	var program func() *cobra.Command
	if len(os.Args) > 1 {
		program = programs[os.Args[1]]
	}
	if program == nil {
		names := slices.Sorted(maps.Keys(programs))
		fmt.Fprintf(os.Stderr, "usage: hyperkube %s [ARGUMENT...]\n", strings.Join(names, "|"))
		os.Exit(64)
	}
	// Each reads its own name and arguments from here.
	os.Args = os.Args[1:]
	os.Exit(cli.Run(program()))
}
