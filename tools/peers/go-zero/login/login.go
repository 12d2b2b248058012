// Package login has the message that api publishes after a login, and mq consumes.
package login

import (
	"github.com/zeromicro/go-queue/rabbitmq"
	"github.com/zeromicro/go-zero/core/trace"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/propagation"
	oteltrace "go.opentelemetry.io/otel/trace"
)

const (
	Exchange   = "usercenter"
	RoutingKey = "user.login"
	Queue      = "mq.user_login"
)

// Message is the original's: the trace context travels in the body, and not in the headers of AMQP.
type Message struct {
	Carrier propagation.HeaderCarrier
	Msg     string // the mobile number
}

// Broker says where the queue is. The services in Rust, or the test, declare it: its arguments are theirs.
type Broker struct {
	rabbitmq.RabbitSenderConf
	Prefix string `json:",optional"` // in front of the exchange and of the queue
}

func Tracer() oteltrace.Tracer { return otel.Tracer(trace.TraceName) }
