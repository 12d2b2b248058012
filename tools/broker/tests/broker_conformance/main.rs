//! What a client may rely on, of RabbitMQ and of the embedded broker alike: the same checks run on either.
//!
//! With `AMQP_URL` set they run on the broker there, else each on an embedded one of its own. They hold for
//! RabbitMQ 3.10 and 4.0, and where these differ a check allows both. Queues that are neither durable nor
//! exclusive are refused by 4.3, so none is made here.
//!
//! - [`client`]: a connection with what the checks do most

mod client;
mod connections;
mod consumers;
mod dead_letters;
mod definitions;
mod frames;
mod limits;
mod publishing;
