//! A runtime beside the caller's: what runs on it ends when it is dropped, open connections included.

use std::{io, ops::Deref};
use tokio::runtime::{Builder, Runtime};

/// May be dropped anywhere, which tokio's own runtime may not: in an async function, that panics.
pub(crate) struct Background(Option<Runtime>);

impl Background {
    /// With so many threads for tasks, and for what blocks.
    pub fn start(worker_threads: usize, blocking_threads: usize) -> io::Result<Self> {
        let mut builder = Builder::new_multi_thread();
        builder.worker_threads(worker_threads).max_blocking_threads(blocking_threads).enable_all();
        Ok(Self(Some(builder.build()?)))
    }
}

impl Deref for Background {
    type Target = Runtime;

    fn deref(&self) -> &Runtime {
        self.0.as_ref().expect("it is taken in `drop` only")
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}
