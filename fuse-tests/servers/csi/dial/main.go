// Dials a plugin's registration socket as kubelet does, and says what it hears.
//
// Usage: dial-registration SOCKET [ERROR]
//
// Prints type, name, endpoint and versions, one a line. Then it reports the plugin as registered; or, with ERROR, as refused
// for that reason.
package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"
)

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: dial-registration SOCKET [ERROR]")
		os.Exit(64)
	}
	if err := register(os.Args[1], strings.Join(os.Args[2:], " ")); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func register(socket, refusal string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	// The raw path as target and no word about an authority: grpc then makes one of the path, and that is what is tried here.
	connection, err := grpc.DialContext(ctx, socket,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithBlock(),
		grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
			var dialer net.Dialer
			return dialer.DialContext(ctx, "unix", address)
		}))
	if err != nil {
		return fmt.Errorf("cannot connect to %s: %w", socket, err)
	}
	defer connection.Close()
	plugin := registration.NewRegistrationClient(connection)
	info, err := plugin.GetInfo(ctx, &registration.InfoRequest{})
	if err != nil {
		return fmt.Errorf("GetInfo: %w", err)
	}
	fmt.Printf("type %s\nname %s\nendpoint %s\nversions %s\n",
		info.Type, info.Name, info.Endpoint, strings.Join(info.SupportedVersions, " "))
	status := &registration.RegistrationStatus{PluginRegistered: refusal == "", Error: refusal}
	if _, err := plugin.NotifyRegistrationStatus(ctx, status); err != nil {
		return fmt.Errorf("NotifyRegistrationStatus: %w", err)
	}
	return nil
}
