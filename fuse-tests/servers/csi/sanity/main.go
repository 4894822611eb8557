// csi-sanity for a plugin whose volumes belong to one pod each and so have no controller.
//
// Many specs of the node service begin with CreateVolume. Here a controller in this very process answers it: a volume is a name
// as kubelet makes them, and its context is what `--csi.testvolumeparameters` says. Every other call goes to the plugin.
package main

import (
	"context"
	"crypto/sha256"
	"flag"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/kubernetes-csi/csi-test/v5/pkg/sanity"
	"google.golang.org/grpc"
)

type controller struct {
	csi.UnimplementedControllerServer
	csi.UnimplementedIdentityServer
}

// The identity service is asked of controllers too.

func (controller) GetPluginInfo(context.Context, *csi.GetPluginInfoRequest) (*csi.GetPluginInfoResponse, error) {
	return &csi.GetPluginInfoResponse{Name: "controller-of-the-test"}, nil
}

func (controller) GetPluginCapabilities(context.Context, *csi.GetPluginCapabilitiesRequest) (*csi.GetPluginCapabilitiesResponse, error) {
	return &csi.GetPluginCapabilitiesResponse{}, nil
}

func (controller) Probe(context.Context, *csi.ProbeRequest) (*csi.ProbeResponse, error) {
	return &csi.ProbeResponse{}, nil
}

func (controller) CreateVolume(_ context.Context, request *csi.CreateVolumeRequest) (*csi.CreateVolumeResponse, error) {
	return &csi.CreateVolumeResponse{Volume: &csi.Volume{
		VolumeId:      fmt.Sprintf("csi-%x", sha256.Sum256([]byte(request.Name))),
		VolumeContext: request.Parameters,
	}}, nil
}

func (controller) DeleteVolume(context.Context, *csi.DeleteVolumeRequest) (*csi.DeleteVolumeResponse, error) {
	return &csi.DeleteVolumeResponse{}, nil
}

func (controller) ControllerGetCapabilities(context.Context, *csi.ControllerGetCapabilitiesRequest) (*csi.ControllerGetCapabilitiesResponse, error) {
	create := csi.ControllerServiceCapability_RPC{Type: csi.ControllerServiceCapability_RPC_CREATE_DELETE_VOLUME}
	return &csi.ControllerGetCapabilitiesResponse{Capabilities: []*csi.ControllerServiceCapability{
		{Type: &csi.ControllerServiceCapability_Rpc{Rpc: &create}},
	}}, nil
}

// withController adds the controller of this process to the capabilities that the plugin itself has.
func withController(ctx context.Context, method string, request, reply any, connection *grpc.ClientConn, invoke grpc.UnaryInvoker, options ...grpc.CallOption) error {
	err := invoke(ctx, method, request, reply, connection, options...)
	if capabilities, ok := reply.(*csi.GetPluginCapabilitiesResponse); ok && err == nil {
		service := csi.PluginCapability_Service{Type: csi.PluginCapability_Service_CONTROLLER_SERVICE}
		capabilities.Capabilities = append(capabilities.Capabilities,
			&csi.PluginCapability{Type: &csi.PluginCapability_Service_{Service: &service}})
	}
	return err
}

type outcome struct{ failed bool }

func (o *outcome) Fail() { o.failed = true }

func main() {
	config := sanity.NewTestConfig()
	flag.StringVar(&config.Address, "csi.endpoint", "", "the plugin's socket")
	flag.StringVar(&config.TargetPath, "csi.mountdir", "", "below which volumes are published; made and removed for each spec")
	flag.StringVar(&config.StagingPath, "csi.stagingdir", "", "not used by plugins without stages; made and removed too")
	flag.StringVar(&config.SecretsFile, "csi.secrets", "", "YAML: secrets that each call carries")
	flag.StringVar(&config.TestVolumeParametersFile, "csi.testvolumeparameters", "", "YAML: every volume's context")
	flag.Parse()
	config.DialOptions = append(config.DialOptions, grpc.WithUnaryInterceptor(withController))

	directory, err := os.MkdirTemp("", "controller")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	config.ControllerAddress = filepath.Join(directory, "controller.sock")
	listener, err := net.Listen("unix", config.ControllerAddress)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	server := grpc.NewServer()
	csi.RegisterControllerServer(server, controller{})
	csi.RegisterIdentityServer(server, controller{})
	go server.Serve(listener)

	var specs outcome
	sanity.Test(&specs, config)
	server.Stop()
	os.RemoveAll(directory)
	if specs.failed {
		os.Exit(1)
	}
}
