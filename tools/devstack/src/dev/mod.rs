//! `cargo dev`: the three services as processes, with a broker and a trace backend, and each trace drawn in
//! the terminal as it arrives.
//!
//! - `parts`: the parts of the system, their start and their end
//! - `view`: when a trace is drawn
//! - `terminal`: how it is drawn

mod parts;
mod terminal;
mod view;

use anyhow::Result;
use clap::Args;
use parts::Parts;
use std::{
    env,
    io::{self, IsTerminal, Write},
    process::ExitCode,
    time::Duration,
};
use terminal::Terminal;
use tokio::{
    select,
    signal::unix::{SignalKind, signal},
    time::interval,
};
use view::View;

/// How to run.
#[derive(Args)]
pub struct Options {
    /// Use any free ports instead of the usual ports.
    #[arg(long)]
    free_ports: bool,
    /// Show every log line of the services, not only warnings and errors.
    #[arg(long)]
    logs: bool,
    /// Show traces in Jaeger's own page.
    #[cfg(feature = "jaeger-ui")]
    #[arg(long)]
    jaeger_ui: bool,
}

/// How often new traces and log lines are printed.
const TICK: Duration = Duration::from_millis(100);

/// Runs until a signal comes, until no service is left, or until nobody reads the output.
///
/// # Errors
/// If a part can't be started. The error names the part and a remedy.
pub async fn run(options: Options) -> Result<ExitCode> {
    // Signals are caught before anything is started, so that Ctrl-C or a closed terminal leaves no process
    // behind.
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hang_up = signal(SignalKind::hangup())?;
    let mut stopped = async || {
        select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {}, _ = hang_up.recv() => {} }
    };

    let mut parts = select! {
        parts = Parts::start(&options) => parts?,
        () = stopped() => return Ok(ExitCode::SUCCESS),
    };
    say(&parts.summary());

    let no_color = env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let terminal = Terminal { colour: io::stdout().is_terminal() && !no_color };
    let mut view = parts.backend.as_ref().map(|backend| View::new(backend, terminal));
    let mut tick = interval(TICK);
    let exit = loop {
        select! {
            () = stopped() => break ExitCode::SUCCESS,
            _ = tick.tick() => {}
        }
        let mut news = parts.new_log_lines(options.logs);
        news.extend(parts.deaths());
        if let (Some(view), Some(backend)) = (&mut view, &parts.backend) {
            news.extend(view.due(backend));
        }
        if !news.iter().all(|line| say(line)) {
            break ExitCode::SUCCESS;
        }
        if parts.services.is_empty() {
            break ExitCode::FAILURE;
        }
    };

    say("stopping");
    select! {
        () = parts.stop() => {}
        // A second signal ends everything at once.
        () = stopped() => {}
    }
    Ok(exit)
}

/// Prints a line; returns whether that succeeded. It fails after the reader of the output has ended (as with
/// `cargo dev | head`). Then `cargo dev` stops.
fn say(line: &str) -> bool {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush()).is_ok()
}
