//! Makes spans by hand, below the spans that the layers make. One request shows five ways to make such spans:
//!
//! ```text
//! GET /report/{id}            the layer
//! ├─ local                    a function
//! │  └─ instrumented          a function with #[tracing::instrument]
//! │     └─ inner              a function again: the two kinds of span nest in each other
//! ├─ asynchronous             an async block
//! ├─ blocking                 tokio::task::spawn_blocking
//! └─ background               tokio::spawn: continues after the request
//! ```
//!
//! Run it with `OTEL_TRACES_EXPORTER=console cargo run -p telemetry --example spans`. The test
//! `tools/devstack/tests/e2e/spans.rs` runs it, and checks the tree.

use axum::{Router, body::Body, extract::Path, routing::get};
use http::Request;
use opentelemetry::{
    Context,
    context::FutureExt,
    global::{self, BoxedTracer},
    trace::{TraceContextExt, Tracer},
};
use std::{
    sync::{Arc, LazyLock},
    time::Duration,
};
use telemetry::{Config, Telemetry, http::HttpServerLayer};
use tokio::{
    sync::{Notify, mpsc},
    task::spawn_blocking,
    time::sleep,
};
use tower::ServiceExt;

static TRACER: LazyLock<BoxedTracer> = LazyLock::new(|| global::tracer("spans"));

async fn report(Path(id): Path<u64>, answered: Arc<Notify>, done: mpsc::Sender<()>) -> &'static str {
    // A function: the span is current inside the function, and ends with it.
    TRACER.in_span("local", |_| instrumented(id));

    // An async block: a span must be current whenever the block is polled, and only then.
    let cx = Context::current_with_span(TRACER.start("asynchronous"));
    async {
        sleep(Duration::from_millis(1)).await;
        tracing::info!("a log line in the asynchronous span");
    }
    .with_context(cx.clone())
    .await;
    cx.span().end();

    // Another thread: it doesn't know this thread's context, so the closure brings the context along.
    let cx = Context::current();
    let work = spawn_blocking(move || {
        let _attached = cx.attach();
        TRACER.in_span("blocking", |_| std::thread::sleep(Duration::from_millis(1)));
    });
    work.await.expect("the closure does not panic");

    // Another task, which continues after the answer: its span ends when the task ends.
    let background = async move {
        let cx = Context::current_with_span(TRACER.start("background"));
        answered.notified().with_context(cx.clone()).await;
        cx.span().end();
        drop(done);
    };
    tokio::spawn(background.with_current_context());
    "done\n"
}

#[tracing::instrument(skip_all, fields(report.id = id))]
fn instrumented(id: u64) {
    TRACER.in_span("inner", |_| tracing::info!(id, "a log line in the inner span"));
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let telemetry = Telemetry::start(Config::from_env("spans", env!("CARGO_PKG_VERSION"))?)?;

    let (done, mut all_done) = mpsc::channel(1);
    let answered = Arc::new(Notify::new());
    let told = answered.clone();
    let app: Router = Router::new()
        .route("/report/{id}", get(move |path| report(path, told.clone(), done.clone())))
        .layer(HttpServerLayer::new());
    // A real service would listen on a port. Here, the request is made in memory. The body is read, because
    // the server span ends at the end of the body. If nobody read the body, the span would end as if the
    // caller had hung up.
    let response = app.oneshot(Request::get("/report/7").body(Body::empty())?).await?;
    axum::body::to_bytes(response.into_body(), 1024).await?;
    answered.notify_one();

    all_done.recv().await;
    telemetry.shut_down(Duration::from_secs(5)).await;
    Ok(())
}
