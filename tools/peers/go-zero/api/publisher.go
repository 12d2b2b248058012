package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"
	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/zeromicro/go-queue/rabbitmq"
	"github.com/zeromicro/go-zero/core/logx"

	"peer/login"
)

var errNotConfirmed = errors.New("the broker did not accept the message")

// publisher publishes as the original does, by go-queue's sender: the message is not persistent, has no id, and
// nobody waits for the broker. (The original opens a connection for each login, which that sender can't close.)
// With confirms, the message is persistent and has an id, and the login waits until the broker has it.
func publisher(c config) func(context.Context, []byte) error {
	r := c.Rabbit
	exchange := r.Prefix + login.Exchange
	if !c.Confirms {
		sender := rabbitmq.MustNewSender(r.RabbitSenderConf)
		return func(_ context.Context, body []byte) error { return sender.Send(exchange, login.RoutingKey, body) }
	}
	connection, err := amqp.Dial(fmt.Sprintf("amqp://%s:%s@%s:%d/%s", r.Username, r.Password, r.Host, r.Port, r.VHost))
	logx.Must(err)
	channel, err := connection.Channel()
	logx.Must(err)
	logx.Must(channel.Confirm(false))
	return func(ctx context.Context, body []byte) error {
		confirm, err := channel.PublishWithDeferredConfirmWithContext(ctx, exchange, login.RoutingKey, false, false,
			amqp.Publishing{
				ContentType:  r.ContentType,
				DeliveryMode: amqp.Persistent,
				MessageId:    uuid.NewString(),
				Timestamp:    time.Now(),
				Body:         body,
			})
		if err != nil {
			return err
		}
		if accepted, err := confirm.WaitContext(ctx); err != nil || !accepted {
			return errors.Join(errNotConfirmed, err)
		}
		return nil
	}
}
