//! The buttons on the trace page. They are served at the page's own address, which is on localhost. A page of
//! another site can't press them, because each request must name the trace page's address as its `Host`
//! (against DNS rebinding) and as its `Origin` (against cross-site request forgery).

use super::{
    logins::{self, Logins},
    parts::Parts,
    poison, say,
};
use axum::{
    Json, Router,
    extract::{Path, Request, State},
    http::{HeaderMap, Method, StatusCode, header},
    middleware::{Next, from_fn_with_state},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use harness::stack::KNOWN_MOBILE;
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};

/// A press of a button, or a request for the list of buttons.
pub struct Press {
    /// The button's name, or `None` if the page asks which buttons there are.
    pub button: Option<String>,
    /// Takes the answer for the page, or `None` if there is no such button.
    pub answer: oneshot::Sender<Option<Value>>,
}

/// Returns the routes for the page at this port, and the presses that arrive at these routes.
pub fn controls(port: u16) -> (Router, mpsc::Receiver<Press>) {
    let (press, pressed) = mpsc::channel(1);
    let router = Router::new()
        .route("/controls", get(async |State(press)| ask(press, None).await))
        .route(
            "/controls/{button}",
            post(async |State(press), Path(button): Path<String>| ask(press, Some(button)).await),
        )
        .with_state(press)
        .layer(from_fn_with_state(port, own_page_only));
    (router, pressed)
}

async fn ask(press: mpsc::Sender<Press>, button: Option<String>) -> Response {
    let (answer, answered) = oneshot::channel();
    // `cargo dev` may be ending.
    if press.send(Press { button, answer }).await.is_err() {
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    }
    match answered.await {
        Ok(Some(answer)) => Json(answer).into_response(),
        Ok(None) => StatusCode::NOT_FOUND.into_response(),
        Err(_) => StatusCode::SERVICE_UNAVAILABLE.into_response(),
    }
}

async fn own_page_only(State(port): State<u16>, request: Request, next: Next) -> Response {
    let headers = request.headers();
    let hosts = [format!("localhost:{port}"), format!("127.0.0.1:{port}")];
    let host = only(headers, header::HOST).filter(|host| hosts.iter().any(|own| own == host));
    // A browser sends an `Origin` with every press, but not when a page sends a GET request to its own site.
    let is_question = request.method() == Method::GET && !headers.contains_key(header::ORIGIN);
    let origin = only(headers, header::ORIGIN).and_then(|origin| origin.strip_prefix("http://"));
    let is_own = host.is_some() && (is_question || origin == host);
    match is_own {
        true => next.run(request).await,
        false => {
            (StatusCode::FORBIDDEN, "only the page at this address may use these controls\n").into_response()
        }
    }
}

/// Performs the action of the pressed button, and answers the page.
pub async fn act(Press { button, answer }: Press, parts: &mut Parts, logins: &mut Logins) {
    let mut login = None;
    match button.as_deref() {
        None => {}
        Some("login") => login = Some(logins::body(KNOWN_MOBILE)),
        Some("unknown") => login = Some(logins::body("13900139000")),
        Some("malformed") => login = Some("{".to_owned()),
        Some("load") => logins.toggle_load(),
        Some("slow") => parts.toggle_delay().await,
        Some("traces") => parts.interrupt_backend(),
        Some("poison") => {
            let (url, buttons) = (parts.variable("AMQP_URL").to_owned(), buttons(parts, logins));
            tokio::spawn(async move {
                let (said, trace_id) = match poison::publish(&url).await {
                    Ok(trace_id) => ("a message that mq can't read was published".to_owned(), trace_id),
                    Err(error) => (format!("the message was not published: {error:#}"), String::new()),
                };
                say(&said);
                answer.send(Some(json!({ "buttons": buttons, "said": said, "traceID": trace_id })))
            });
            return;
        }
        Some(name) => {
            let key = parts.all().into_iter().find(|(_, part, _)| *part == name).map(|(key, ..)| key);
            let Some(key) = key else {
                let _ = answer.send(None);
                return;
            };
            parts.toggle(key).await;
        }
    }
    let buttons = buttons(parts, logins);
    match login.map(|body| logins.once(body)) {
        None => drop(answer.send(Some(json!({ "buttons": buttons })))),
        Some(login) => drop(tokio::spawn(async move {
            let (said, trace_id) = login.await.unwrap_or_default();
            answer.send(Some(json!({ "buttons": buttons, "said": said, "traceID": trace_id })))
        })),
    }
}

/// Returns the buttons, each with a sentence about what to look for.
fn buttons(parts: &Parts, logins: &Logins) -> Vec<Value> {
    let button = |name: &str, label: &str, pressed: Option<bool>, hint: &str| -> Value {
        json!({ "name": name, "label": label, "pressed": pressed, "hint": hint })
    };
    let mut buttons = vec![
        button(
            "login",
            "Log in",
            None,
            "One trace leads from HTTP through gRPC to RabbitMQ, across three services.",
        ),
        button(
            "unknown",
            "Unknown number",
            None,
            "usercenter knows no such user, api answers 401, and no message is sent.",
        ),
        button(
            "malformed",
            "Malformed",
            None,
            "api itself refuses the request with 400, so the trace has only one span.",
        ),
        button(
            "load",
            "Load",
            Some(logins.is_load_on()),
            "Ten logins per second are sent. The list fills, and the logins take similar times.",
        ),
        button(
            "slow",
            "Slow usercenter by 300 ms",
            Some(parts.is_slow()),
            "The span of api's call is 300 ms longer than usercenter's span inside it.",
        ),
        button(
            "poison",
            "Poison message",
            None,
            "mq can't read the message, so its span has an error, and the message becomes a dead letter.",
        ),
    ];
    for (_, name, is_running) in parts.all() {
        let hint = match (name, is_running) {
            (_, false) => "After the start, logins work as before.",
            ("usercenter", _) => "A login is answered with 503, and the span of api's call says why.",
            ("mq", _) => "A login succeeds, and the consumer's span appears once mq is running again.",
            ("broker", _) => {
                "A login succeeds, and api keeps the message on its disk until the broker is back."
            }
            _ => "A login gets no answer, and leaves no trace.",
        };
        let label = format!("{} {name}", if is_running { "Stop" } else { "Start" });
        buttons.push(button(name, &label, None, hint));
    }
    buttons.push(button(
        "traces",
        "Stop traces for 10 s",
        None,
        "Logins still succeed without the trace backend. This page comes back by itself, without old traces.",
    ));
    buttons
}

/// Returns the header's value if the request has this header exactly once.
fn only(headers: &HeaderMap, name: header::HeaderName) -> Option<&str> {
    let mut values = headers.get_all(name).iter();
    values.next().filter(|_| values.next().is_none())?.to_str().ok()
}
