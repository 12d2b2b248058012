// The consumer as it is in go-zero. Its span is opened by hand, below the span of the producer.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"

	"github.com/google/uuid"
	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/zeromicro/go-queue/rabbitmq"
	"github.com/zeromicro/go-zero/core/conf"
	"github.com/zeromicro/go-zero/core/logx"
	"github.com/zeromicro/go-zero/core/service"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/baggage"
	oteltrace "go.opentelemetry.io/otel/trace"

	"peer/login"
)

type config struct {
	service.ServiceConf
	Rabbit   login.Broker
	Database string
}

// prefetch is the default of the system in Rust: how many messages are consumed, and so committed, together.
const prefetch = 64

func main() {
	file := flag.String("f", "etc/mq.yaml", "the configuration")
	flag.Parse()
	var c config
	conf.MustLoad(*file, &c, conf.UseEnv())
	c.MustSetUp()
	group := service.NewServiceGroup()
	defer group.Stop()
	group.Add(mustListen(c))
	group.Start()
}

// listener is in the place of go-queue's, which sees neither the id of a message nor can it acknowledge one.
type listener struct {
	connection *amqp.Connection
	deliveries <-chan amqp.Delivery
	history    *history
}

func mustListen(c config) *listener {
	queue := c.Rabbit.Prefix + login.Queue
	l := &listener{history: mustOpen(c.Database)}
	// A queue belongs to one history. The broker refuses the claim of another.
	claim := queue + ".history"
	admin := rabbitmq.MustNewAdmin(c.Rabbit.RabbitConf)
	logx.Must(admin.DeclareExchange(rabbitmq.ExchangeConf{ExchangeName: claim, Type: "fanout", Durable: true, Internal: true},
		amqp.Table{"alternate-exchange": claim + "." + l.history.id}))

	r := c.Rabbit
	connection, err := amqp.Dial(fmt.Sprintf("amqp://%s:%s@%s:%d/%s", r.Username, r.Password, r.Host, r.Port, r.VHost))
	logx.Must(err)
	channel, err := connection.Channel()
	logx.Must(err)
	logx.Must(channel.Qos(prefetch, 0, false))
	l.connection = connection
	l.deliveries, err = channel.Consume(queue, "", false, false, false, false, nil)
	logx.Must(err)
	logx.Info("consuming")
	return l
}

// Start takes the messages that have come so far together, and acknowledges them when they are on disk.
func (l *listener) Start() {
	for first := range l.deliveries {
		batch := []amqp.Delivery{first}
		for waiting := true; waiting && len(batch) < prefetch; {
			select {
			case next, open := <-l.deliveries:
				if waiting = open; open {
					batch = append(batch, next)
				}
			default:
				waiting = false
			}
		}
		last := batch[len(batch)-1]
		if err := l.history.apply(batch); err != nil {
			logx.Errorf("applying: %v", err)
			_ = last.Nack(true, true)
		} else {
			_ = last.Ack(true)
		}
	}
}

func (l *listener) Stop() { _ = l.connection.Close() }

// consume opens the span of a message, which ends when its login is on disk.
func consume(d amqp.Delivery) (id string, message login.Message, producer oteltrace.SpanContext, span oteltrace.Span, err error) {
	err = json.Unmarshal(d.Body, &message)
	ctx := otel.GetTextMapPropagator().Extract(context.Background(), message.Carrier)
	producer = oteltrace.SpanContextFromContext(ctx)
	ctx, span = login.Tracer().Start(ctx, "mq_consumer_msg", oteltrace.WithSpanKind(oteltrace.SpanKindConsumer))
	// The test reads from this line what came along with the message.
	logx.WithContext(ctx).Infow("consumed", logx.Field("baggage", baggage.FromContext(ctx).String()))
	if id = d.MessageId; id == "" && producer.IsValid() {
		id = producer.TraceID().String() + "-" + producer.SpanID().String()
	} else if id == "" {
		id = uuid.NewString()
	}
	return
}
