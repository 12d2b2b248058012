//! Claims the queue for one history, so that two instances of mq with different databases can't both apply
//! logins.
//!
//! The claim is an exchange that routes nothing. Its name is derived from the name of the queue, and its
//! argument `alternate-exchange` names the history. The broker compares that argument when an exchange is
//! declared again. It accepts a claim of the same history, and refuses a claim of another history (406
//! PRECONDITION_FAILED).

use amqp::{OpenError, Topology};
use lapin::{
    Channel, ErrorKind, ExchangeKind,
    options::ExchangeDeclareOptions,
    protocol::{AMQPErrorKind, AMQPSoftError},
    types::{AMQPValue, FieldTable},
};

/// Declares the claim of `history`.
///
/// # Errors
/// If the connection is lost, or if the queue belongs to another history.
pub async fn claim(channel: &Channel, topology: &Topology, history: &str) -> Result<(), OpenError> {
    let (queue, claim) = (&topology.queue, format!("{}.history", topology.queue));
    let mut arguments = FieldTable::default();
    arguments.insert("alternate-exchange".into(), AMQPValue::LongString(format!("{claim}.{history}").into()));
    // Nobody can publish to an internal exchange.
    let options = ExchangeDeclareOptions { durable: true, internal: true, ..Default::default() };
    let claimed =
        channel.exchange_declare(claim.as_str().into(), ExchangeKind::Fanout, options, arguments).await;
    claimed.map_err(|error| explained(error, queue, &claim))
}

fn explained(error: lapin::Error, queue: &str, claim: &str) -> OpenError {
    match error.kind() {
        ErrorKind::ProtocolError(answer)
            if *answer.kind() == AMQPErrorKind::Soft(AMQPSoftError::PRECONDITIONFAILED) =>
        {
            OpenError::Refused(format!(
                "the queue {queue} belongs to another history, that is, to the login history of another database; \
                 with this database, mq could apply logins again that the other database has already recorded. \
                 Use the database of the other instances of mq. If that database is lost, delete the exchange \
                 {claim}"
            ))
        }
        _ => OpenError::Connection(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lapin::protocol::AMQPError;

    #[test]
    fn only_a_claim_that_differs_is_another_history() {
        let refused = |error: AMQPSoftError| {
            let error = ErrorKind::ProtocolError(AMQPError::new(error.into(), "no".into())).into();
            matches!(explained(error, "queue", "claim"), OpenError::Refused(_))
        };
        assert!(refused(AMQPSoftError::PRECONDITIONFAILED));
        // For example, this user may not declare exchanges.
        assert!(!refused(AMQPSoftError::ACCESSREFUSED));
    }
}
