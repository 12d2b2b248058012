//! Claims the queue for one history, so that two instances of mq with different databases can't both apply logins.
//!
//! The claim is an exchange that routes nothing. Its name belongs to the queue, and its argument
//! `alternate-exchange` names the history. The broker compares that argument when an exchange is declared
//! again: it accepts a claim for the same history, and refuses one for another with 406 PRECONDITION_FAILED.

use crate::history::History;
use amqp::Topology;
use lapin::{
    Channel, ErrorKind, ExchangeKind,
    options::ExchangeDeclareOptions,
    protocol::{AMQPErrorKind, AMQPSoftError},
    types::{AMQPValue, FieldTable},
};
use serving::seldom::Seldom;

/// Declares the claim. Waits until the history has been available once. If the broker holds a claim for another
/// history, that is logged once a minute.
///
/// # Errors
/// If the connection is lost, or if the queue belongs to another history.
pub async fn claim(
    channel: &Channel,
    topology: &Topology,
    history: &History,
    log: &Seldom,
) -> lapin::Result<()> {
    let claim = format!("{}.history", topology.queue);
    let history = history.secret().await.id_of(&[b"history"]);
    let mut arguments = FieldTable::default();
    arguments.insert("alternate-exchange".into(), AMQPValue::LongString(format!("{claim}.{history}").into()));
    // Nobody can publish to an internal exchange.
    let options = ExchangeDeclareOptions { durable: true, internal: true, ..Default::default() };
    let claimed =
        channel.exchange_declare(claim.as_str().into(), ExchangeKind::Fanout, options, arguments).await;
    let is_refused = |error: &lapin::Error| match error.kind() {
        ErrorKind::ProtocolError(error) => {
            *error.kind() == AMQPErrorKind::Soft(AMQPSoftError::PRECONDITIONFAILED)
        }
        _ => false,
    };
    if claimed.as_ref().is_err_and(is_refused) && log.is_due() {
        tracing::error!(
            queue = topology.queue,
            claim,
            history,
            "the queue belongs to another history, so logins that it has would be applied again; use the database \
             of the other instances of mq, or, if that is lost, delete the exchange that is the claim"
        );
    }
    claimed
}
