//! Faults of the broker, for tests of its clients: the broker stops and starts again, and raises the alarm
//! during which RabbitMQ accepts no messages.

use super::{Broker, arguments::QueueType, message::Message, queue::Queue, virtual_host::VirtualHost};
use loopback::poll;
use std::time::Duration;

impl Broker {
    /// Stops as in a crash: connections end without `close`, and new connections are closed at once. The
    /// broker keeps what RabbitMQ keeps on its disk: durable exchanges, durable queues, and the persistent
    /// messages in durable queues. Deliveries that were not acknowledged return to their queues.
    pub async fn crash(&self) {
        /// The tasks of the connections end at once, unless the machine is busy.
        const PATIENCE: Duration = Duration::from_secs(10);

        self.is_up.send_replace(false);
        poll(PATIENCE, async || self.shared.lock().peers.is_empty().then_some(())).await;
        self.shared.lock().lose_what_is_transient();
    }

    /// Accepts connections again after a crash.
    pub fn restart(&self) {
        self.is_up.send_replace(true);
    }

    /// Raises or clears an alarm, as if the memory had become full, or free again. During an alarm, the
    /// broker does not read from connections that publish, and informs their clients with
    /// `connection.blocked`.
    pub fn set_alarm(&self, on: bool) {
        self.shared.memory.set_alarm(on);
    }

    /// Bounds the number of messages that wait in each existing queue, as a policy of RabbitMQ does.
    pub fn set_longest_queue(&self, messages: Option<usize>) {
        for queue in self.shared.lock().queues.values_mut() {
            queue.longest = messages;
        }
    }

    /// Sets the largest body of a message, like RabbitMQ's setting `max_message_size`. The broker refuses
    /// messages with a larger body.
    pub fn set_longest_body(&self, bytes: u64) {
        self.shared.memory.set_longest_body(bytes);
    }
}

impl VirtualHost {
    fn lose_what_is_transient(&mut self) {
        let transient = self.queues.iter().filter(|(_, queue)| !queue.durable).map(|(id, _)| *id).collect();
        self.delete_queues(&transient);
        // A quorum queue keeps all its messages, because RabbitMQ's quorum queues write every message to
        // disk.
        let is_classic = |queue: &&mut Queue| queue.arguments.queue_type == QueueType::Classic;
        for queue in self.queues.values_mut().filter(is_classic) {
            queue.retain(Message::is_persistent);
        }
        self.exchanges.retain(|_, exchange| exchange.durable);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lapin::{
        BasicProperties, Channel, Connection, ConnectionProperties,
        options::{BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions},
        types::FieldTable,
    };

    const PATIENCE: Duration = Duration::from_secs(10);

    async fn connect(broker: &Broker) -> (Connection, Channel) {
        let connection = Connection::connect(&broker.url(), ConnectionProperties::default()).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
        channel
            .queue_declare("q".into(), QueueDeclareOptions::durable(), FieldTable::default())
            .await
            .unwrap();
        (connection, channel)
    }

    async fn publish(channel: &Channel, delivery_mode: u8) {
        let properties = BasicProperties::default().with_delivery_mode(delivery_mode);
        let options = BasicPublishOptions::default();
        channel.basic_publish("".into(), "q".into(), options, b"", properties).await.unwrap().await.unwrap();
    }

    #[tokio::test]
    async fn a_crash_ends_connections_and_leaves_what_is_durable() {
        let broker = Broker::start().await.unwrap();
        let (connection, channel) = connect(&broker).await;
        publish(&channel, 1).await;
        publish(&channel, 2).await;
        broker.crash().await;
        let ended = poll(PATIENCE, async || (!connection.status().connected()).then_some(())).await;
        assert!(ended.is_some());
        assert!(Connection::connect(&broker.url(), ConnectionProperties::default()).await.is_err());

        broker.restart();
        let (_connection, channel) = connect(&broker).await;
        let passive = QueueDeclareOptions { passive: true, ..Default::default() };
        let queue = channel.queue_declare("q".into(), passive, FieldTable::default()).await.unwrap();
        assert_eq!(queue.message_count(), 1);
    }
}
