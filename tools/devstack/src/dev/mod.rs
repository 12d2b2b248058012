//! `cargo dev`: the three services as processes, with a broker and a trace backend, and each trace drawn in
//! the terminal as it arrives.
//!
//! - `parts`: the parts of the system, their start and their end
//! - `keys`, `controls`: what the user presses in the terminal and on the page
//! - `logins`, `poison`: what a press can send
//! - `view`: when a trace is drawn
//! - `terminal`: how a trace is drawn

mod controls;
mod keys;
mod logins;
mod parts;
mod poison;
mod service;
mod terminal;
mod view;

use anyhow::Result;
use clap::Args;
use harness::stack::KNOWN_MOBILE;
use keys::Keys;
use logins::Logins;
use parts::Parts;
use std::{
    io::{self, Write},
    process::{ExitCode, Stdio},
    time::Duration,
};
use tokio::{
    process::Command,
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
}

/// The interval at which new traces and log lines are printed.
const TICK: Duration = Duration::from_millis(100);

const KEYS: &str = "Keys: u usercenter, m mq, a api, b broker, t traces (stop or start); l log in, 0 ten \
                    logins per second, o open the page, q quit";

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
        // Without `exit`, the build would continue. The parts that were started are already dropped.
        () = stopped() => std::process::exit(0),
    };
    say(&parts.summary());

    let mut keys = Keys::listen();
    if keys.exist() {
        say(KEYS);
    }
    let mut logins = Logins::new(&parts.api_url());
    let mut view = View::default();
    if let Some(backend) = &parts.backend {
        view.follow(backend);
    }
    let mut tick = interval(TICK);
    let exit = loop {
        select! {
            () = stopped() => break ExitCode::SUCCESS,
            Some(key) = keys.next() => match key {
                'q' => break ExitCode::SUCCESS,
                'l' => drop(logins.once(logins::body(KNOWN_MOBILE))),
                '0' => logins.toggle_load(),
                'o' => open(parts.page_url()),
                key => {
                    if !parts.toggle(key).await {
                        say(KEYS);
                    }
                    if key == 't' && let Some(backend) = &parts.backend {
                        view.follow(backend);
                    }
                }
            },
            Some(press) = parts.presses.recv() => controls::act(press, &mut parts, &mut logins).await,
            _ = tick.tick() => {}
        }
        if parts.go_on().await
            && let Some(backend) = &parts.backend
        {
            view.follow(backend);
        }
        let mut news = parts.new_log_lines(options.logs);
        news.extend(parts.ends(keys.exist()).await);
        if let Some(backend) = &parts.backend {
            news.extend(view.due(backend, logins.is_load_on()));
        }
        if !news.iter().all(|line| say(line)) {
            break ExitCode::SUCCESS;
        }
        if !keys.exist() && parts.have_all_ended() {
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

/// Opens the page in a browser.
fn open(url: Option<String>) {
    let Some(url) = url else {
        say("there is no page here, because the traces go to OTEL_EXPORTER_OTLP_ENDPOINT");
        return;
    };
    let program = if cfg!(target_os = "macos") { "open" } else { "xdg-open" };
    let mut command = Command::new(program);
    command.arg(&url).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    tokio::spawn(async move {
        match command.status().await {
            Ok(status) if status.success() => {}
            Ok(status) => drop(say(&format!("open {url} by hand, because {program} failed ({status})"))),
            Err(error) => drop(say(&format!("open {url} by hand, because {program} can't be run ({error})"))),
        }
    });
}

/// Prints a line; returns whether that succeeded. Printing fails after the reader of the output has ended (as
/// with `cargo dev | head`). Then `cargo dev` stops.
fn say(line: &str) -> bool {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush()).is_ok()
}
