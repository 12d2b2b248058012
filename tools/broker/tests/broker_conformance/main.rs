//! The behaviour that a client may rely on, checked in the same way on RabbitMQ and on the embedded broker.
//!
//! With `AMQP_URL` set, the checks run on the broker there; otherwise, each check starts an embedded broker.
//! They hold for RabbitMQ 3.10 and 4.0, and where these versions differ a check allows both. No check
//! declares a queue that is neither durable nor exclusive, because RabbitMQ 4.3 refuses such queues.
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
