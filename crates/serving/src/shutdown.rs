//! Leads a service from the stop signal to its exit, within one deadline.
//!
//! The order is the same in every service:
//!
//! 1. The service reports that it is not ready, and continues to serve until its callers have noticed
//!    (`SHUTDOWN_DELAY`).
//! 2. It accepts no new work, and finishes the requests, calls and deliveries in progress.
//! 3. It closes the parts that this work needed: the publisher with its spool, and the connection to the
//!    broker.
//! 4. It sends the last spans.
//!
//! A step that ends early leaves its time to the next steps. A step that takes too long is cut off, so that
//! the next steps have their time. `SHUTDOWN_TIMEOUT` bounds all steps together.

use crate::arguments::duration;
use clap::Args;
use std::{io, time::Duration};
use tokio::{
    select,
    signal::unix::{SignalKind, signal},
    sync::watch,
    time::{Instant, sleep_until},
};

/// How long the shutdown of a service may take.
#[derive(Debug, Clone, Copy, Args)]
pub struct Options {
    /// The longest time from the stop signal to the exit.
    #[arg(long, env = "SHUTDOWN_TIMEOUT", default_value = "8s", value_parser = duration)]
    pub shutdown_timeout: Duration,

    /// How long to continue serving after the stop signal, while reporting that the service is not ready, so
    /// that a load balancer switches to other instances first. This delay is a part of the time-out.
    #[arg(long, env = "SHUTDOWN_DELAY", default_value = "0s", value_parser = duration)]
    pub shutdown_delay: Duration,
}

impl Options {
    /// Checks that the delay fits into the time-out.
    ///
    /// # Errors
    /// If the delay does not fit. The error says what is expected.
    pub fn check(&self) -> Result<(), String> {
        if self.shutdown_delay.is_zero() || self.shutdown_delay < self.shutdown_timeout {
            Ok(())
        } else {
            Err("SHUTDOWN_DELAY must be shorter than SHUTDOWN_TIMEOUT, which includes it".to_owned())
        }
    }
}

/// When the steps of the shutdown end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Schedule {
    /// Until this time, new work is accepted.
    pub serve_until: Instant,
    /// Requests, calls and deliveries that are not finished by this time are cut off.
    pub finish_by: Instant,
    /// By this time, the publisher and the connection to the broker are closed.
    pub close_by: Instant,
    /// Spans that are not sent by this time are lost.
    pub exit_by: Instant,
}

impl Schedule {
    /// Divides the time after the delay. Three fifths are for work that has begun, and a tenth is for
    /// closing. The rest is for spans, because the last spans matter most.
    fn new(signalled: Instant, options: Options) -> Self {
        let serve_until = signalled + options.shutdown_delay;
        let left = options.shutdown_timeout.saturating_sub(options.shutdown_delay);
        Self {
            serve_until,
            finish_by: serve_until + left.mul_f64(0.6),
            close_by: serve_until + left.mul_f64(0.7),
            exit_by: serve_until + left,
        }
    }
}

/// Tells each part of a service when its time is over.
#[derive(Debug, Clone)]
pub struct Shutdown {
    options: Options,
    signalled: watch::Receiver<Option<Instant>>,
}

impl Shutdown {
    /// Begins the shutdown at SIGTERM or SIGINT. From now on, these signals don't end the process at once.
    ///
    /// # Errors
    /// If the system can't handle these signals.
    pub fn on_signal(options: Options) -> io::Result<Self> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let (sender, signalled) = watch::channel(None);
        tokio::spawn(async move {
            select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
            sender.send_replace(Some(Instant::now()));
            // Keep the channel open until nobody listens to it any more.
            sender.closed().await;
        });
        Ok(Self { options, signalled })
    }

    /// Returns whether the signal has arrived. After the signal, the service is not ready.
    pub fn has_begun(&self) -> bool {
        self.signalled.borrow().is_some()
    }

    /// Waits for the signal.
    pub async fn begun(&self) -> Schedule {
        let mut signalled = self.signalled.clone();
        match signalled.wait_for(Option::is_some).await.map(|signalled| *signalled) {
            Ok(signalled) => Schedule::new(signalled.unwrap_or_else(Instant::now), self.options),
            // The task that waits for signals ends only with the runtime.
            Err(_) => std::future::pending().await,
        }
    }

    /// Waits for the signal and then for the delay. After that, no new work may be accepted.
    pub async fn stopped(&self) -> Schedule {
        let schedule = self.begun().await;
        sleep_until(schedule.serve_until).await;
        schedule
    }

    /// Returns how much of the time-out is left for the spans when everything else is closed. If a service
    /// ends without a signal, all of the time-out is left.
    pub fn time_left(&self) -> Duration {
        let signalled = self.signalled.borrow().unwrap_or_else(Instant::now);
        Schedule::new(signalled, self.options).exit_by.saturating_duration_since(Instant::now())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(timeout: u64, delay: u64) -> Options {
        Options { shutdown_timeout: Duration::from_secs(timeout), shutdown_delay: Duration::from_secs(delay) }
    }

    #[test]
    fn steps_follow_each_other_and_end_at_one_deadline() {
        let signalled = Instant::now();
        for (timeout, delay) in [(8, 0), (30, 5), (1, 0), (0, 0)] {
            let Schedule { serve_until, finish_by, close_by, exit_by } =
                Schedule::new(signalled, options(timeout, delay));
            assert_eq!(serve_until, signalled + Duration::from_secs(delay));
            assert!(serve_until <= finish_by && finish_by <= close_by && close_by <= exit_by);
            assert_eq!(exit_by, signalled + Duration::from_secs(timeout));
        }
    }

    #[test]
    fn every_step_has_time_of_its_own_even_if_those_before_it_took_all_of_theirs() {
        let schedule = Schedule::new(Instant::now(), options(10, 5));
        assert_eq!(schedule.finish_by - schedule.serve_until, Duration::from_secs(3));
        assert_eq!(schedule.close_by - schedule.finish_by, Duration::from_millis(500));
        assert_eq!(schedule.exit_by - schedule.close_by, Duration::from_millis(1500));
    }

    #[test]
    fn a_delay_that_leaves_no_time_is_refused() {
        assert!(options(8, 8).check().is_err());
        assert!(options(8, 9).check().is_err());
        assert!(options(8, 7).check().is_ok());
        // If the delay and the time-out are zero, the service ends at once.
        assert!(options(0, 0).check().is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn the_delay_is_between_the_signal_and_the_stop() {
        let (sender, signalled) = watch::channel(None);
        let shutdown = Shutdown { options: options(8, 5), signalled };
        assert!(!shutdown.has_begun());
        assert_eq!(shutdown.time_left(), Duration::from_secs(8));

        let begun = Instant::now();
        sender.send_replace(Some(begun));
        assert!(shutdown.has_begun());
        shutdown.begun().await;
        assert_eq!(Instant::now(), begun);
        shutdown.stopped().await;
        assert_eq!(Instant::now(), begun + Duration::from_secs(5));
        assert_eq!(shutdown.time_left(), Duration::from_secs(3));
    }
}
