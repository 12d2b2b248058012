//! Short runs of the test behind `cargo dev chaos`. The services must pass the test, and the control, which
//! treats logins as the Go original does, must fail it.

use chaos::{self, Options, broker::Kind, faults::Fault, flood};

/// Returns the options for a few seconds of load with the worst faults. These faults are a crash of the
/// publisher, crashes of the consumer, and an outage of the broker. Two of the crashes come at the worst
/// moment.
fn short(is_control: bool) -> Options {
    Options {
        logins: 500,
        rate: 200,
        callers: 8,
        seconds: 120,
        seed: Some(1),
        faults: vec![Fault::BrokerRestart, Fault::CrashAfterConfirm, Fault::CrashBeforeAck, Fault::KillMq],
        broker: Kind::Embedded,
        control: is_control,
        flood: None,
        keep: false,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_services_lose_and_duplicate_nothing() {
    let verdict = chaos::test(&short(false)).await.unwrap().verdict;
    assert!(verdict.is_clean(), "{verdict:?}");
    assert!(verdict.answered >= 400, "{verdict:?}");
}

/// Tests the kinds of fault that an outsider can cause.
#[tokio::test(flavor = "multi_thread")]
async fn hostile_callers_and_messages_that_are_too_large_cost_no_login() {
    let faults = vec![Fault::HostileCaller, Fault::MessageTooLarge];
    let verdict = chaos::test(&Options { faults, ..short(false) }).await.unwrap().verdict;
    assert!(verdict.is_clean(), "{verdict:?}");
    assert!(verdict.refused.is_empty() && verdict.unknown == 0, "{verdict:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_hostile_callers_fails_no_login_and_takes_bounded_memory() {
    let flooded = flood::test(&short(false), 20).await.unwrap();
    assert!(flooded.is_harmless(), "{:?}, {:?} KiB", flooded.verdict, flooded.memory);
    assert!(flooded.verdict.answered >= 1000 && flooded.hostile >= 500, "{:?}", flooded.verdict);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_control_loses_logins_under_the_same_faults() {
    let verdict = chaos::test(&short(true)).await.unwrap().verdict;
    assert!(!verdict.lost.is_empty(), "{verdict:?}");
}
