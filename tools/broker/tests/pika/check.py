"""A second client, pika, on the broker at AMQP_URL: what one client library takes for granted, another may not.

    python3 -m venv target/pika && target/pika/bin/pip install -r tools/broker/tests/pika/requirements.txt
    cargo dev broker --listen 127.0.0.1:5673 &
    AMQP_URL=amqp://guest:guest@127.0.0.1:5673/%2f target/pika/bin/python tools/broker/tests/pika/check.py
"""

import os
import sys
import time
import uuid

import pika
from pika.exceptions import (
    ChannelClosedByBroker,
    ConnectionClosedByBroker,
    NackError,
    ProbableAuthenticationError,
    UnroutableError,
)

URL = os.environ.get("AMQP_URL", "amqp://guest:guest@127.0.0.1:5672/%2f")
PREFIX = f"pika.{uuid.uuid4().hex}."
PATIENCE = 10


def connect(**changes):
    parameters = pika.URLParameters(URL)
    for name, value in changes.items():
        setattr(parameters, name, value)
    return pika.BlockingConnection(parameters)


def exclusive(channel, name="", arguments=None):
    """A queue that goes with the connection."""
    name = PREFIX + name if name else ""
    return channel.queue_declare(name, exclusive=True, arguments=arguments).method.queue


def expect(channel, queue):
    """Gets a message that is there or will soon be."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        method, properties, body = channel.basic_get(queue)
        if method:
            return method, properties, body
        time.sleep(0.01)
    raise AssertionError(f"no message in {queue}")


def closes_with(code, kind, operation):
    try:
        operation()
    except kind as error:
        assert error.reply_code == code, error
    else:
        raise AssertionError(f"no {code}")


def a_wrong_password_is_refused():
    try:
        connect(credentials=pika.PlainCredentials("guest", "wrong"))
    except ProbableAuthenticationError:
        pass
    else:
        raise AssertionError("let in")


def a_message_arrives_as_it_was_published(channel):
    channel.confirm_delivery()
    queue = exclusive(channel)
    headers = {"text": "é", "int": -7, "big": 1 << 40, "flag": True, "none": None, "list": [1, "two"], "table": {"a": 1}}
    sent = pika.BasicProperties(
        content_type="text/plain", headers=headers, delivery_mode=2, priority=1, correlation_id="c",
        reply_to="r", message_id="m", timestamp=1_700_000_000, type="t", user_id="guest", app_id="a",
    )
    for body in (b"", b"small", os.urandom(400_000)):
        channel.basic_publish("", queue, body, sent, mandatory=True)
        method, properties, received = expect(channel, queue)
        assert received == body and properties == sent, properties
        assert not method.redelivered and method.routing_key == queue
        channel.basic_ack(method.delivery_tag)


def what_is_unroutable_is_returned(channel):
    channel.confirm_delivery()
    try:
        channel.basic_publish("", PREFIX + "nowhere", b"back", mandatory=True)
    except UnroutableError as error:
        assert [message.body for message in error.messages] == [b"back"]
    else:
        raise AssertionError("routed")


def a_full_queue_nacks(channel):
    channel.confirm_delivery()
    queue = exclusive(channel, "full", {"x-max-length": 1, "x-overflow": "reject-publish"})
    try:
        for _ in range(100):
            channel.basic_publish("", queue, b"m")
    except NackError:
        pass
    else:
        raise AssertionError("taken")


def a_consumer_gets_and_acknowledges(channel):
    queue = exclusive(channel)
    channel.basic_qos(prefetch_count=2)
    for i in range(10):
        channel.basic_publish("", queue, str(i).encode())
    seen = []
    for method, _, body in channel.consume(queue, inactivity_timeout=PATIENCE):
        assert method, f"no delivery after {seen}"
        seen.append(int(body))
        channel.basic_ack(method.delivery_tag)
        if len(seen) == 10:
            break
    channel.cancel()
    assert seen == list(range(10)), seen
    assert channel.queue_declare(queue, passive=True).method.message_count == 0


def what_is_requeued_comes_again(channel):
    queue = exclusive(channel)
    for body in (b"a", b"b"):
        channel.basic_publish("", queue, body)
    method, _, _ = expect(channel, queue)
    channel.basic_nack(method.delivery_tag, requeue=True)
    method, _, body = expect(channel, queue)
    assert (method.redelivered, body) == (True, b"a"), (method, body)
    channel.basic_recover(requeue=True)
    method, _, body = expect(channel, queue)
    assert (method.redelivered, body) == (True, b"a"), (method, body)


def exchanges_route(channel):
    channel.confirm_delivery()
    for kind, binding, key in (("direct", "k", "k"), ("topic", "a.*.#", "a.b"), ("fanout", "", "any")):
        exchange, queue = PREFIX + kind, exclusive(channel)
        channel.exchange_declare(exchange, kind, durable=True, auto_delete=True)
        channel.queue_bind(queue, exchange, binding)
        channel.basic_publish(exchange, key, kind.encode(), mandatory=True)
        assert expect(channel, queue)[2] == kind.encode()
        channel.queue_unbind(queue, exchange, binding)


def a_rejected_message_is_dead_lettered(channel):
    dead = exclusive(channel, "dead")
    arguments = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": dead}
    queue = exclusive(channel, "rejecting", arguments)
    channel.basic_publish("", queue, b"m", pika.BasicProperties(expiration="60000"))
    method, _, _ = expect(channel, queue)
    channel.basic_reject(method.delivery_tag, requeue=False)
    _, properties, body = expect(channel, dead)
    death = properties.headers["x-death"][0]
    assert (body, properties.expiration) == (b"m", None)
    assert (death["count"], death["reason"], death["queue"], death["exchange"]) == (1, "rejected", queue, "")
    assert (death["routing-keys"], death["original-expiration"]) == ([queue], "60000")


def an_expired_message_is_dead_lettered(channel):
    dead = exclusive(channel, "late")
    arguments = {"x-message-ttl": 50, "x-dead-letter-exchange": "", "x-dead-letter-routing-key": dead}
    channel.basic_publish("", exclusive(channel, "expiring", arguments), b"m")
    assert expect(channel, dead)[1].headers["x-first-death-reason"] == "expired"


def a_consumer_is_told_when_its_queue_is_deleted(channel):
    queue = exclusive(channel)
    told = []
    channel.add_on_cancel_callback(told.append)
    channel.basic_consume(queue, lambda *delivery: None)
    channel.connection.channel().queue_delete(queue)
    deadline = time.monotonic() + PATIENCE
    while not told and time.monotonic() < deadline:
        channel.connection.process_data_events(time_limit=0.1)
    assert told, "not told"


def errors_have_their_codes(channel):
    new = channel.connection.channel
    queue = exclusive(channel, "mine")
    other = connect()
    closes_with(404, ChannelClosedByBroker, lambda: new().queue_declare(PREFIX + "missing", passive=True))
    closes_with(406, ChannelClosedByBroker, lambda: new().queue_declare(queue, exclusive=True, arguments={"x-message-ttl": 1}))
    closes_with(403, ChannelClosedByBroker, lambda: new().queue_declare("amq.mine", exclusive=True))
    closes_with(405, ChannelClosedByBroker, lambda: other.channel().queue_declare(queue, passive=True))
    closes_with(503, ConnectionClosedByBroker, lambda: other.channel().exchange_declare(PREFIX + "x", "nonsense"))
    assert channel.connection.is_open


def signs_of_life_keep_a_connection():
    connection = connect(heartbeat=4)
    # pika sends heartbeats while it waits.
    connection.sleep(10)
    connection.channel().close()
    connection.close()


def main():
    checks = [
        a_message_arrives_as_it_was_published,
        what_is_unroutable_is_returned,
        a_full_queue_nacks,
        a_consumer_gets_and_acknowledges,
        what_is_requeued_comes_again,
        exchanges_route,
        a_rejected_message_is_dead_lettered,
        an_expired_message_is_dead_lettered,
        a_consumer_is_told_when_its_queue_is_deleted,
        errors_have_their_codes,
    ]
    for check in (a_wrong_password_is_refused, signs_of_life_keep_a_connection):
        check()
        print("ok", check.__name__)
    for check in checks:
        connection = connect()
        check(connection.channel())
        connection.close()
        print("ok", check.__name__)
    print(f"{len(checks) + 2} checks passed with pika {pika.__version__}")


if __name__ == "__main__":
    sys.exit(main())
