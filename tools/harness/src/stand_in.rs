//! A stand-in for usercenter, which answers as a test tells it to.

use crate::{PATIENCE, poll};
use anyhow::{Context, Result};
use proto::usercenter::v1::{
    GetUserByMobileRequest, GetUserByMobileResponse, User,
    usercenter_server::{Usercenter, UsercenterServer},
};
use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{net::TcpListener, sync::Semaphore};
use tonic::{Code, Request, Response, Status, service::Routes};

/// The response of the stand-in to a call.
#[derive(Clone)]
pub enum Reply {
    /// A user.
    User,
    /// This error, with a message that no caller of `api` may see.
    Error(Code),
    /// A user, as soon as there is a permit.
    After(Arc<Semaphore>),
    /// This error, as soon as there is a permit.
    ErrorAfter(Code, Arc<Semaphore>),
    /// No response at all.
    Never,
}

/// Returns the response to each call. Calls are numbered from 1.
type Script = Box<dyn FnMut(usize) -> Reply + Send>;

/// A stand-in that listens until the test ends.
#[derive(Clone)]
pub struct StandIn {
    /// The URL of the stand-in.
    pub url: String,
    script: Arc<Mutex<Script>>,
    calls: Arc<Mutex<Vec<Duration>>>,
}

impl StandIn {
    /// Listens on a free port.
    ///
    /// # Errors
    /// If no port is free.
    pub async fn start(script: impl FnMut(usize) -> Reply + Send + 'static) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let url = format!("http://{}", listener.local_addr()?);
        let stand_in = Self { url, script: Arc::new(Mutex::new(Box::new(script))), calls: Arc::default() };
        let routes = Routes::new(UsercenterServer::new(stand_in.clone())).into_axum_router();
        // The stand-in does not use tonic's server, because that server responds by itself at the caller's
        // deadline.
        tokio::spawn(axum::serve(listener, routes).into_future());
        Ok(stand_in)
    }

    /// Makes the stand-in respond as this script says from now on.
    pub fn follow(&self, script: impl FnMut(usize) -> Reply + Send + 'static) {
        *lock(&self.script) = Box::new(script);
    }

    /// Returns the `grpc-timeout` of each call so far.
    pub fn calls(&self) -> Vec<Duration> {
        lock(&self.calls).clone()
    }

    /// Waits until the stand-in has been called this many times.
    ///
    /// # Errors
    /// If the calls don't come in time.
    pub async fn called(&self, times: usize) -> Result<()> {
        let called = poll(PATIENCE, async || (lock(&self.calls).len() >= times).then_some(())).await;
        called.with_context(|| format!("not called {times} times"))
    }
}

#[tonic::async_trait]
impl Usercenter for StandIn {
    async fn get_user_by_mobile(
        &self,
        request: Request<GetUserByMobileRequest>,
    ) -> Result<Response<GetUserByMobileResponse>, Status> {
        let timeout = request.metadata().get("grpc-timeout").and_then(|timeout| timeout.to_str().ok());
        let timeout = timeout.and_then(parse).ok_or_else(|| Status::invalid_argument("no deadline"))?;
        let call = {
            let mut calls = lock(&self.calls);
            calls.push(timeout);
            calls.len()
        };
        let reply = lock(&self.script)(call);
        if let Reply::After(permits) | Reply::ErrorAfter(_, permits) = &reply {
            permits.acquire().await.map_err(|error| Status::internal(error.to_string()))?.forget();
        }
        let user = match reply {
            Reply::User | Reply::After(_) => Some(User { id: 1, nickname: "Ada".to_owned() }),
            Reply::Error(code) | Reply::ErrorAfter(code, _) => {
                return Err(Status::new(code, "internal detail"));
            }
            Reply::Never => std::future::pending().await,
        };
        Ok(Response::new(GetUserByMobileResponse { user }))
    }
}

/// Parses a `grpc-timeout` in the units that api uses.
fn parse(timeout: &str) -> Option<Duration> {
    let micros = timeout.strip_suffix('u').and_then(|micros| micros.parse().ok()).map(Duration::from_micros);
    micros.or_else(|| Some(Duration::from_millis(timeout.strip_suffix('m')?.parse().ok()?)))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
