// The HTTP API as it is in go-zero. The framework opens the spans of the request and of the call; those of the
// local function and of the message are opened by hand.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"net/http"
	"strconv"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"github.com/zeromicro/go-zero/core/conf"
	"github.com/zeromicro/go-zero/core/logx"
	"github.com/zeromicro/go-zero/rest"
	"github.com/zeromicro/go-zero/rest/httpx"
	"github.com/zeromicro/go-zero/zrpc"
	"go.opentelemetry.io/otel"
	otelcodes "go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	oteltrace "go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"peer/login"
	"peer/usercenter"
)

type config struct {
	rest.RestConf
	Usercenter   zrpc.RpcClientConf
	AccessSecret string
	AccessExpire int64 // seconds
	Rabbit       login.Broker
	Confirms     bool // whether api waits until the broker has a message
}

type api struct {
	config
	usercenter usercenter.UsercenterClient
	publish    func(ctx context.Context, body []byte) error
}

type (
	request struct {
		Mobile string `json:"mobile"`
	}
	answer struct {
		AccessToken  string `json:"accessToken"`
		AccessExpire int64  `json:"accessExpire"`
		RefreshAfter int64  `json:"refreshAfter"`
	}
)

var errNotPublished = errors.New("the login could not be published")

func main() {
	file := flag.String("f", "etc/api.yaml", "the configuration")
	flag.Parse()
	var c config
	conf.MustLoad(*file, &c, conf.UseEnv())
	server := rest.MustNewServer(c.RestConf)
	defer server.Stop()
	httpx.SetErrorHandlerCtx(problem)
	a := api{c, usercenter.NewUsercenterClient(zrpc.MustNewClient(c.Usercenter).Conn()), publisher(c)}
	server.AddRoute(rest.Route{Method: http.MethodPost, Path: "/usercenter/v1/user/login", Handler: a.handle})
	server.Start()
}

func (a api) handle(w http.ResponseWriter, r *http.Request) {
	var in request
	if err := httpx.Parse(r, &in); err != nil {
		httpx.ErrorCtx(r.Context(), w, status.Error(codes.InvalidArgument, "the body is not a login"))
	} else if out, err := a.login(r.Context(), in.Mobile); err != nil {
		httpx.ErrorCtx(r.Context(), w, err)
	} else {
		httpx.OkJsonCtx(r.Context(), w, out)
	}
}

func (a api) login(ctx context.Context, mobile string) (*answer, error) {
	found, err := a.usercenter.GetUserByMobile(ctx, &usercenter.GetUserByMobileRequest{Mobile: mobile})
	if err != nil {
		return nil, err
	}
	token, err := a.token(ctx, found.User.Id)
	if err != nil {
		return nil, err
	}
	if err := a.send(ctx, mobile); err != nil {
		logx.WithContext(ctx).Errorf("publishing: %v", err)
		return nil, errNotPublished
	}
	return token, nil
}

func (a api) token(ctx context.Context, id uint64) (*answer, error) {
	_, span := login.Tracer().Start(ctx, "local", oteltrace.WithSpanKind(oteltrace.SpanKindInternal))
	defer span.End()
	now := time.Now().Unix()
	token, err := jwt.NewWithClaims(jwt.SigningMethodHS256, jwt.MapClaims{
		"sub": strconv.FormatUint(id, 10), "iat": now, "exp": now + a.AccessExpire,
	}).SignedString([]byte(a.AccessSecret))
	return &answer{token, now + a.AccessExpire, now + a.AccessExpire/2}, err
}

func (a api) send(ctx context.Context, mobile string) error {
	ctx, span := login.Tracer().Start(ctx, "send_msg_mq", oteltrace.WithSpanKind(oteltrace.SpanKindProducer))
	defer span.End()
	message := login.Message{Carrier: propagation.HeaderCarrier{}, Msg: mobile}
	otel.GetTextMapPropagator().Inject(ctx, message.Carrier)
	body, err := json.Marshal(message)
	if err == nil {
		err = a.publish(ctx, body)
	}
	if err != nil {
		span.SetStatus(otelcodes.Error, err.Error())
	}
	return err
}

// problem answers errors with the statuses of the system in Rust.
func problem(_ context.Context, err error) (int, any) {
	code := http.StatusBadGateway
	switch status.Code(err) {
	case codes.NotFound:
		code = http.StatusUnauthorized
	case codes.InvalidArgument:
		code = http.StatusUnprocessableEntity
	case codes.Unavailable:
		code = http.StatusServiceUnavailable
	case codes.DeadlineExceeded:
		code = http.StatusGatewayTimeout
	}
	if errors.Is(err, errNotPublished) {
		code = http.StatusServiceUnavailable
	}
	return code, map[string]any{"title": status.Convert(err).Message(), "status": code}
}
