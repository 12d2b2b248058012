// Usercenter as it is in go-zero. The framework opens its spans.
package main

import (
	"context"
	"flag"
	"regexp"
	"time"

	"github.com/zeromicro/go-zero/core/conf"
	"github.com/zeromicro/go-zero/core/logx"
	"github.com/zeromicro/go-zero/zrpc"
	"go.opentelemetry.io/otel/baggage"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"peer/usercenter"
)

func main() {
	file := flag.String("f", "etc/usercenter.yaml", "the configuration")
	flag.Parse()
	var c zrpc.RpcServerConf
	conf.MustLoad(*file, &c, conf.UseEnv())
	server := zrpc.MustNewServer(c, func(s *grpc.Server) {
		usercenter.RegisterUsercenterServer(s, service{})
	})
	defer server.Stop()
	server.Start()
}

type service struct {
	usercenter.UnimplementedUsercenterServer
}

var (
	mobile = regexp.MustCompile(`^[0-9]{7,15}$`)
	users  = map[string]*usercenter.User{
		"13800138000": {Id: 1, Nickname: "Ada"},
		"13800138001": {Id: 2, Nickname: "Grace"},
		"13800138002": {Id: 3, Nickname: "Barbara"},
	}
)

func (service) GetUserByMobile(ctx context.Context, in *usercenter.GetUserByMobileRequest) (*usercenter.GetUserByMobileResponse, error) {
	deadline, _ := ctx.Deadline()
	// The test reads from this line what came along with the call.
	logx.WithContext(ctx).Infow("called", logx.Field("deadline_ms", time.Until(deadline).Milliseconds()),
		logx.Field("baggage", baggage.FromContext(ctx).String()))
	if !mobile.MatchString(in.Mobile) {
		return nil, status.Error(codes.InvalidArgument, "mobile must be 7 to 15 digits")
	}
	user, known := users[in.Mobile]
	if !known {
		return nil, status.Error(codes.NotFound, "no user with this mobile number")
	}
	return &usercenter.GetUserByMobileResponse{User: user}, nil
}
