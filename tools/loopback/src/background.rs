//! A runtime for servers, separate from the caller's. Dropping the runtime ends the servers and their open
//! connections.

use axum::{Router, serve::ListenerExt};
use std::{io, net::SocketAddr, ops::Deref};
use tokio::{
    net::TcpListener,
    runtime::{Builder, Runtime},
};

/// A runtime that may be dropped anywhere. Dropping tokio's own runtime in an async function panics.
pub struct Background(Option<Runtime>);

impl Background {
    /// Starts a runtime with these numbers of threads, for tasks and for blocking calls.
    ///
    /// # Errors
    /// If the threads can't be started.
    pub fn start(worker_threads: usize, blocking_threads: usize) -> io::Result<Self> {
        let mut builder = Builder::new_multi_thread();
        builder.worker_threads(worker_threads).max_blocking_threads(blocking_threads).enable_all();
        Ok(Self(Some(builder.build()?)))
    }

    /// Opens a listener for a server on this runtime.
    ///
    /// # Errors
    /// If the address is in use.
    pub fn listen(&self, address: SocketAddr) -> io::Result<TcpListener> {
        let listener = std::net::TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        let _inside = self.enter();
        TcpListener::from_std(listener)
    }

    /// Serves `routes` on this runtime.
    pub fn serve_http(&self, listener: TcpListener, routes: Router) {
        // With Nagle's algorithm, the end of an answer would wait up to 40 ms, until the client has
        // acknowledged the beginning of the answer.
        let listener = listener.tap_io(|connection| drop(connection.set_nodelay(true)));
        self.spawn(axum::serve(listener, routes).into_future());
    }
}

impl Deref for Background {
    type Target = Runtime;

    fn deref(&self) -> &Runtime {
        self.0.as_ref().expect("only `drop` takes the runtime")
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}
