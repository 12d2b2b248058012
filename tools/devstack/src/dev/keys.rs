//! Reads single keys from the terminal, without Enter. Without a terminal, there are no keys.

use rustix::{
    process::getpgrp,
    stdio::stdin,
    termios::{LocalModes, OptionalActions, SpecialCodeIndex, Termios, tcgetattr, tcgetpgrp, tcsetattr},
};
use std::{io::Read, thread};
use tokio::sync::mpsc;

/// The keys that are pressed while this value lives. Dropping it restores the terminal.
pub struct Keys {
    pressed: mpsc::Receiver<char>,
    /// The terminal's original settings.
    before: Option<Termios>,
}

impl Keys {
    /// Switches the terminal so that it delivers each key at once. Ctrl-C still sends a signal.
    pub fn listen() -> Self {
        let (press, pressed) = mpsc::channel(16);
        let before = Self::switch();
        if before.is_some() {
            // A `read` of a terminal can't be cancelled, so a separate thread reads. The process need not
            // wait for this thread to end.
            thread::spawn(move || {
                let keys = std::io::stdin().lock().bytes().map_while(Result::ok);
                keys.map(char::from).all(|key| press.blocking_send(key).is_ok())
            });
        }
        Self { pressed, before }
    }

    fn switch() -> Option<Termios> {
        // The kernel stops a background process that changes the terminal's settings (SIGTTOU).
        if tcgetpgrp(stdin()).ok()? != getpgrp() {
            return None;
        }
        let before = tcgetattr(stdin()).ok()?;
        let mut termios = before.clone();
        termios.local_modes.remove(LocalModes::ICANON | LocalModes::ECHO);
        termios.special_codes[SpecialCodeIndex::VMIN] = 1;
        termios.special_codes[SpecialCodeIndex::VTIME] = 0;
        tcsetattr(stdin(), OptionalActions::Now, &termios).ok()?;
        Some(before)
    }

    /// Returns whether keys can be read.
    pub fn exist(&self) -> bool {
        self.before.is_some()
    }

    /// Waits for the next key. Returns `None` if keys can't be read.
    pub async fn next(&mut self) -> Option<char> {
        self.pressed.recv().await
    }
}

impl Drop for Keys {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            let _ = tcsetattr(stdin(), OptionalActions::Now, before);
        }
    }
}
