//! Logins that a key or a button starts: one login, or ten logins per second.

use super::say;
use harness::{client::Client, stack::KNOWN_MOBILE};
use http::Method;
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::{sync::Semaphore, task::JoinHandle, time::interval};

/// How many logins may be unanswered at once. While this many are unanswered, the load pauses.
const MAX_IN_FLIGHT: usize = 50;

/// How often each answer came: a status, or the reason why there was no answer.
type Counts = Arc<Mutex<BTreeMap<String, usize>>>;

/// Sends logins to api.
pub struct Logins {
    client: Client,
    url: String,
    load: Option<(JoinHandle<()>, Counts)>,
}

impl Logins {
    /// Makes a client for api at this URL.
    pub fn new(api: &str) -> Self {
        Self { client: Client::new(), url: format!("{api}/usercenter/v1/user/login"), load: None }
    }

    /// Returns whether the load is on.
    pub fn is_load_on(&self) -> bool {
        self.load.is_some()
    }

    /// Logs in once with this body, and prints the answer. Returns the answer and its trace id.
    pub fn once(&self, body: String) -> JoinHandle<(String, String)> {
        let (client, url) = (self.client.clone(), self.url.clone());
        tokio::spawn(async move {
            let (answer, trace_id) = answer(&client, &url, body).await;
            let said = format!("login: {answer}");
            say(&said);
            (said, trace_id)
        })
    }

    /// Switches the load on or off. When the load ends, prints how often each answer came.
    pub fn toggle_load(&mut self) {
        if let Some((load, counts)) = self.load.take() {
            load.abort();
            let counts = counts.lock().unwrap_or_else(PoisonError::into_inner);
            let counts: Vec<_> = counts.iter().map(|(answer, count)| format!("{count} × {answer}")).collect();
            say(&format!("load off; the answers: {}", counts.join(", ")));
            return;
        }
        let counts = Counts::default();
        let load = tokio::spawn(load(self.client.clone(), self.url.clone(), Arc::clone(&counts)));
        self.load = Some((load, counts));
        say("load on: ten logins per second");
    }
}

async fn load(client: Client, url: String, counts: Counts) {
    let room = Arc::new(Semaphore::new(MAX_IN_FLIGHT));
    let mut tick = interval(Duration::from_millis(100));
    loop {
        tick.tick().await;
        let Ok(place) = Arc::clone(&room).acquire_owned().await else { return };
        let (client, url, counts) = (client.clone(), url.clone(), Arc::clone(&counts));
        tokio::spawn(async move {
            let (answer, _) = answer(&client, &url, body(KNOWN_MOBILE)).await;
            *counts.lock().unwrap_or_else(PoisonError::into_inner).entry(answer).or_default() += 1;
            drop(place);
        });
    }
}

/// Returns the body of a login with this number.
pub fn body(mobile: &str) -> String {
    format!(r#"{{"mobile":"{mobile}"}}"#)
}

/// Returns the status (or the reason why there is no answer) and the trace id.
async fn answer(client: &Client, url: &str, body: String) -> (String, String) {
    match client.send(Method::POST, url, &[("content-type", "application/json")], body).await {
        Ok(answer) => (answer.status.to_string(), answer.trace_id()),
        Err(error) => (format!("{error:#}; if api is stopped, press a to start it"), String::new()),
    }
}
