//! Checks of the behaviour that clients rely on. The same checks run on RabbitMQ and on the embedded broker.
//!
//! If `AMQP_URL` is set, the checks run on the broker at that URL. Otherwise, each check starts an embedded
//! broker. The checks hold for RabbitMQ 3.10 and 4.0. Where these versions differ, a check allows both
//! behaviours. No check declares a queue that is neither durable nor exclusive, because RabbitMQ 4.3 refuses
//! such queues.
//!
//! - [`client`]: a client connection with the operations that most checks need

mod client;
mod connections;
mod consumers;
mod dead_letters;
mod definitions;
mod frames;
mod limits;
mod publishing;
