//! The spool is the file that keeps logins while the broker is away. The tests cover a full spool, a full
//! disk, a spool in use, a damaged spool, and a spool whose process died.

use anyhow::{Context, Result};
use harness::{
    PATIENCE,
    client::Client,
    database::Database,
    poll,
    process::Process,
    proxy::Proxy,
    stack::{KNOWN_MOBILE, Stack, TestBroker},
};
use serde_json::json;
use std::{
    collections::HashSet,
    fs,
    sync::{Arc, Mutex},
    time::Duration,
};
use tempfile::TempDir;
use tokio::{process::Command, task::JoinSet, time::sleep};

async fn spooled(stack: &Stack) -> Option<u64> {
    let ready = stack.client.get(&format!("http://{}/readyz", stack.api.address)).await.ok()?;
    ready.json()["spooled"].as_u64()
}

async fn drained(stack: &Stack) -> Result<()> {
    let empty = poll(PATIENCE, async || (spooled(stack).await? == 0).then_some(()));
    empty.await.with_context(|| format!("not drained:\n{}", stack.api.output()))
}

/// Replaces api with an instance that has these variables and reaches the broker through a proxy.
async fn behind_proxy(stack: &mut Stack, variables: &[(&str, &str)]) -> Result<Proxy> {
    let (proxy, url) = stack.broker.proxy()?;
    let variables = [&[("AMQP_URL", url.as_str())], variables].concat();
    stack.api = stack.another("api", &variables).await?;
    stack.api.said("connected to the broker").await?;
    Ok(proxy)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_spool_refuses_logins_and_says_so_until_there_is_room() -> Result<()> {
    let (stack, proxy) = Stack::start_with_proxy(&[("api", "API_SPOOL_MAX_ENTRIES", "3")]).await?;
    proxy.refuse();
    for _ in 0..3 {
        assert_eq!(stack.login(KNOWN_MOBILE, &[]).await?.status, 200);
    }
    for _ in 0..5 {
        let refused = stack.login(KNOWN_MOBILE, &[]).await?;
        assert_eq!(refused.status, 503);
        assert_eq!(refused.json()["type"], "urn:throughline:problem:spool-full");
        assert_eq!(refused.header("retry-after"), "1");
        let tree = "
            api POST /usercenter/v1/user/login SERVER ERROR error.type=503
              api usercenter.v1.Usercenter/GetUserByMobile CLIENT
                usercenter usercenter.v1.Usercenter/GetUserByMobile SERVER
              api local INTERNAL
              api send_msg_mq PRODUCER ERROR error.type=spool_full
        ";
        stack.receiver.expect_tree(&refused.trace_id(), tree).await;
    }
    stack.api.said("the spool is full").await?;
    assert_eq!(stack.api.output().matches("the spool is full").count(), 1);
    // A single try may fail, because usercenter has only one second to answer api.
    let said = poll(PATIENCE, async || {
        let ready = stack.client.get(&format!("http://{}/readyz", stack.api.address)).await.ok()?;
        let mut body = ready.json();
        let [bytes, seconds] = ["spooledBytes", "oldestSeconds"].map(|key| body[key].take().as_u64());
        let unready = json!({
            "usercenter": true, "broker": false, "topology": true, "spool": false, "spooled": 3,
            "spooledBytes": null, "oldestSeconds": null, "stopping": false,
        });
        (body == unready && bytes? > 3 * 100 && seconds? > 0).then_some(ready.status)
    });
    assert_eq!(said.await.context("not as expected")?, 503);

    for too_early in ["published the spooled logins", "the spool has room again"] {
        assert!(!stack.api.output().contains(too_early), "{}", stack.api.output());
    }

    proxy.restore();
    drained(&stack).await?;
    assert_eq!(stack.login(KNOWN_MOBILE, &[]).await?.status, 200);
    stack.api.said("the spool has room again").await?;
    let published = stack.api.said("published the spooled logins").await?;
    assert!(published.contains("published=3"), "{published}");
    Ok(())
}

/// Limits the size of any file that the process writes from now on.
async fn limit_files(process: &Process, bytes: &str) -> Result<()> {
    let pid = process.id().to_string();
    let limited =
        Command::new("prlimit").args(["--pid", &pid, &format!("--fsize={bytes}:")]).status().await?;
    anyhow::ensure!(limited.success(), "prlimit: {limited}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_is_full_refuses_logins_until_it_has_room_and_loses_none() -> Result<()> {
    let mut stack = Stack::start(&[]).await?;
    let (proxy, url) = stack.broker.proxy()?;
    // With this trap, a write beyond the limit fails as on a full disk, instead of ending the process.
    let script = "trap '' XFSZ; exec \"$0\"";
    let data = TempDir::new()?;
    let variables = [("AMQP_URL", url.as_str()), ("API_DATA_DIR", &*data.path().to_string_lossy())];
    stack.api = stack.another_by(script, "api", &variables).await?;
    stack.api.said("connected to the broker").await?;
    proxy.refuse();
    let mut answered = HashSet::new();
    let login = stack.login(KNOWN_MOBILE, &[]).await?;
    assert_eq!(login.status, 200);
    answered.insert(login.trace_id());

    let size = fs::metadata(data.path().join("spool.redb"))?.len();
    limit_files(&stack.api, &size.to_string()).await?;
    // Large messages fill the disk sooner.
    let baggage = format!("k={}", "x".repeat(3000));
    let headers = [("baggage", baggage.as_str())];
    let refused = poll(PATIENCE, async || {
        let logins = (0..20).map(|_| stack.login(KNOWN_MOBILE, &headers));
        let logins = futures_util::future::try_join_all(logins).await.ok()?;
        answered.extend(logins.iter().filter(|login| login.status == 200).map(|login| login.trace_id()));
        logins.into_iter().find(|login| login.status != 200)
    });
    let refused = refused.await.context("the disk is not full")?;
    assert_eq!(refused.status, 503);
    assert_eq!(refused.json()["type"], "urn:throughline:problem:spool-failed");
    assert_eq!(refused.header("retry-after"), "1");
    stack.api.said("the spool failed").await?;
    let output = stack.api.output();
    let before = output.split("the spool failed").next();
    assert!(before.is_some_and(|before| !before.contains("the spool works again")), "{output}");
    // Each failed login makes api unready until api tries the disk again, a second later.
    let spool_is = async |works: bool| {
        let ready = stack.client.get(&format!("http://{}/readyz", stack.api.address)).await.ok()?;
        (ready.json()["spool"] == works).then_some(())
    };
    for _ in 0..5 {
        let unready = poll(PATIENCE, async || {
            stack.login(KNOWN_MOBILE, &headers).await.ok()?;
            spool_is(false).await
        });
        unready.await.context("api is still ready")?;
    }

    limit_files(&stack.api, "unlimited").await?;
    // api tries the disk again by itself, because no load balancer sends a login to an unready api.
    let ready = poll(PATIENCE, async || spool_is(true).await).await;
    ready.with_context(|| format!("not ready:\n{}", stack.api.output()))?;
    let taken = poll(PATIENCE, async || {
        let login = stack.login(KNOWN_MOBILE, &[]).await.ok().filter(|login| login.status == 200);
        login.map(|login| login.trace_id())
    });
    answered.insert(taken.await.with_context(|| format!("still refused:\n{}", stack.api.output()))?);
    stack.api.said("the spool works again").await?;
    // If several logins fail in a row, api logs that only once.
    let output = stack.api.output();
    let [failed, works] =
        ["the spool failed", "the spool works again"].map(|text| output.matches(text).count());
    assert!(failed <= works + 1, "{output}");

    proxy.restore();
    drained(&stack).await?;
    for trace_id in answered {
        stack.receiver.expect_span(|span| span.trace_id == trace_id && span.kind == "CONSUMER").await;
    }
    Ok(())
}

/// Eight callers that log in until the service dies. As soon as a login is answered with 200, the caller
/// records it.
struct Load(JoinSet<()>);

impl Load {
    fn start(url: &str, answered: &Arc<Mutex<HashSet<String>>>) -> Self {
        let mut callers = JoinSet::new();
        for _ in 0..8 {
            let (url, answered, client) = (url.to_owned(), answered.clone(), Client::new());
            callers.spawn(async move {
                let body = format!(r#"{{"mobile":"{KNOWN_MOBILE}"}}"#);
                let json = [("content-type", "application/json")];
                while let Ok(login) = client.send(http::Method::POST, &url, &json, body.clone()).await {
                    assert_eq!(login.status, 200, "{:?}", login.json());
                    answered.lock().expect("no caller has panicked").insert(login.trace_id());
                }
            });
        }
        Self(callers)
    }

    async fn end(mut self) -> Result<()> {
        while let Some(caller) = self.0.join_next().await {
            caller?;
        }
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_is_killed_again_and_again_loses_nothing_that_was_answered() -> Result<()> {
    let database = Database::new()?;
    let mut stack = Stack::start(&[("mq", "MQ_DATABASE_URL", &database.url)]).await?;
    let data = TempDir::new()?;
    let variables = [("API_DATA_DIR", &*data.path().to_string_lossy())];
    let answered = Arc::new(Mutex::new(HashSet::new()));
    let mut spooled_at_the_end = 0;
    // api is killed while the broker is available, while the broker is away, while the spool is being
    // drained, and at moments in between.
    for round in 0..12_u64 {
        let proxy = behind_proxy(&mut stack, &variables).await?;
        let before = answered.lock().unwrap().len();
        let load = Load::start(&stack.login_url(), &answered);
        let more = async |count: usize| {
            poll(PATIENCE, async || (answered.lock().unwrap().len() >= before + count).then_some(())).await
        };
        more(20).await.context("no logins")?;
        if round % 3 > 0 {
            proxy.refuse();
            more(60).await.context("no logins without the broker")?;
        }
        if round % 3 > 1 {
            proxy.restore();
            // This pause varies the moment of the kill.
            sleep(Duration::from_millis(100 + 23 * round)).await;
        }
        spooled_at_the_end += spooled(&stack).await.unwrap_or_default();
        stack.api.kill().await?;
        load.end().await?;
    }
    assert!(spooled_at_the_end > 0, "api was never killed while the spool had entries");

    let _proxy = behind_proxy(&mut stack, &variables).await?;
    drained(&stack).await?;
    let answered = answered.lock().unwrap().clone();
    // A login that the broker has confirmed may still be on its way to the history.
    let mut lost = answered.len();
    let all = poll(PATIENCE, async || {
        lost = answered.difference(&database.traces().await.ok()?).count();
        (lost == 0).then_some(())
    });
    all.await.with_context(|| format!("{lost} of {} answered logins are not in the history", answered.len()))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_is_stopped_without_a_broker_keeps_its_spool_for_the_next_start() -> Result<()> {
    let mut stack = Stack::start(&[]).await?;
    let data = TempDir::new()?;
    let directory = data.path().to_string_lossy();
    // This time-out is longer than the test waits, so the test fails if api ends only at the time-out.
    let variables = [("API_DATA_DIR", &*directory), ("SHUTDOWN_TIMEOUT", "1h")];
    let proxy = behind_proxy(&mut stack, &variables).await?;
    proxy.refuse();
    let mut logins = Vec::new();
    for _ in 0..5 {
        logins.push(stack.login(KNOWN_MOBILE, &[]).await?);
    }
    assert!(stack.api.stop().await?.success());
    let said = stack.api.said("logins stay in the spool until the next start").await?;
    assert!(said.contains("spooled=5"), "{said}");

    let _proxy = behind_proxy(&mut stack, &variables).await?;
    for login in logins {
        let trace = login.trace_id();
        stack.receiver.expect_span(|span| span.trace_id == trace && span.kind == "CONSUMER").await;
    }
    drained(&stack).await?;
    assert!(stack.api.stop().await?.success());
    assert!(!stack.api.output().contains("logins stay in the spool"), "{}", stack.api.output());
    Ok(())
}

/// Runs api with this directory until api exits. Returns the exit code and the log.
async fn ends(directory: &str, variables: &[(&str, &str)]) -> Result<(Option<i32>, String)> {
    let basics = [
        ("API_DATA_DIR", directory),
        ("API_LISTEN", "127.0.0.1:0"),
        ("AMQP_URL", "amqp://127.0.0.1:1"),
        ("OTEL_TRACES_EXPORTER", "none"),
    ];
    let output = Process::command("api", &[&basics[..], variables].concat())?.output().await?;
    Ok((output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned()))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_spool_that_cannot_be_opened_is_a_failure_that_says_why() -> Result<()> {
    let data = TempDir::new()?;
    let directory = data.path().to_string_lossy().into_owned();
    let variables =
        [("API_DATA_DIR", &*directory), ("AMQP_URL", "amqp://127.0.0.1:1"), ("OTEL_TRACES_EXPORTER", "none")];
    let mut service = Process::start("api", &variables).await?;
    service.said("can't connect to the broker").await?;
    let (code, said) = ends(&directory, &[]).await?;
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains(&format!("opening the spool in {directory}: another process uses it")), "{said}");
    assert!(service.stop().await?.success());

    let file = data.path().join("spool.redb");
    fs::write(&file, "no spool")?;
    let (code, said) = ends(&directory, &[]).await?;
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("the file is damaged, or is not a spool"), "{said}");
    assert!(!said.contains("panicked"), "{said}");

    let (code, said) = ends(&file.to_string_lossy(), &[]).await?;
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("File exists"), "{said}");
    Ok(())
}

/// Runs `api spool {command}` with these variables. Returns the exit code, the standard output and the log.
async fn operate(command: &str, variables: &[(&str, &str)]) -> Result<(Option<i32>, String, String)> {
    let variables = [&[("OTEL_TRACES_EXPORTER", "none")], variables].concat();
    let output = Process::command("api", &variables)?.args(["spool", command]).output().await?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok((output.status.code(), text(&output.stdout), text(&output.stderr)))
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_lists_exports_and_drains_the_spool_of_an_instance_that_is_gone() -> Result<()> {
    let mut stack = Stack::start(&[]).await?;
    let data = TempDir::new()?;
    let directory = data.path().to_string_lossy();
    let proxy = behind_proxy(&mut stack, &[("API_DATA_DIR", &*directory)]).await?;
    proxy.refuse();
    let mut logins = Vec::new();
    for baggage in ["k=1", "k=2", "k=3"] {
        logins.push(stack.login(KNOWN_MOBILE, &[("baggage", baggage)]).await?);
    }
    let variables = [("API_DATA_DIR", &*directory)];
    for command in ["list", "export", "drain"] {
        let (code, out, log) = operate(command, &variables).await?;
        assert_eq!((code, &*out), (Some(1), ""), "{command}: {log}");
        assert!(log.contains(&format!("another process uses the spool in {directory}")), "{log}");
    }
    stack.api.kill().await?;

    let (code, listed, log) = operate("list", &variables).await?;
    assert_eq!((code, listed.lines().count()), (Some(0), 4), "{listed}{log}");
    assert!(!(listed.clone() + &log).contains(KNOWN_MOBILE), "{listed}{log}");
    let (code, exported, _) = operate("export", &variables).await?;
    assert_eq!((code, exported.lines().count()), (Some(0), 3), "{exported}");
    for ((line, entry), login) in exported.lines().zip(listed.lines().skip(1)).zip(&logins) {
        let message: serde_json::Value = serde_json::from_str(line)?;
        let [id, _age, bytes] = entry.split_whitespace().collect::<Vec<_>>()[..] else {
            anyhow::bail!("{entry}");
        };
        assert_eq!((&message["id"], bytes), (&json!(id), &*line.len().to_string()));
        assert_eq!(message["mobile"], KNOWN_MOBILE);
        let headers = message["headers"].as_array().context("headers")?;
        for (name, value) in [("traceparent", &*login.trace_id()), ("baggage", "k=")] {
            let has = |header: &serde_json::Value| header[0] == name && header[1].to_string().contains(value);
            assert!(headers.iter().any(has), "{name}: {line}");
        }
    }

    // Without a broker, the logins stay in the spool.
    let away = [variables[0], ("AMQP_URL", "amqp://127.0.0.1:1")];
    let (code, out, log) = operate("drain", &away).await?;
    assert_eq!((code, &*out), (Some(1), "published 0 of 3 logins\n"), "{log}");
    assert!(log.contains("3 logins stay in the spool, because the broker at 127.0.0.1:1"), "{log}");
    let broker = [("AMQP_URL", &*stack.broker.url), ("AMQP_PREFIX", &stack.broker.prefix)];
    let (code, out, log) = operate("drain", &[&variables[..], &broker].concat()).await?;
    assert_eq!((code, &*out), (Some(0), "published 3 of 3 logins\n"), "{log}");
    for login in logins {
        let trace = login.trace_id();
        stack.receiver.expect_span(|span| span.trace_id == trace && span.kind == "CONSUMER").await;
    }
    let (code, out, _) = operate("export", &variables).await?;
    assert_eq!((code, &*out), (Some(0), ""));

    let missing = data.path().join("missing");
    let (code, _, log) = operate("list", &[("API_DATA_DIR", &*missing.to_string_lossy())]).await?;
    assert_eq!(code, Some(1));
    assert!(log.contains("there is no spool in") && !missing.exists(), "{log}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_bytes_of_the_spool_are_bounded_as_well() -> Result<()> {
    let (stack, proxy) = Stack::start_with_proxy(&[("api", "API_SPOOL_MAX_BYTES", "500")]).await?;
    proxy.refuse();
    let refused = poll(PATIENCE, async || {
        let login = stack.login(KNOWN_MOBILE, &[]).await.ok()?;
        (login.status == 503).then_some(login)
    });
    let refused = refused.await.context("the spool never becomes full")?;
    assert_eq!(refused.json()["type"], "urn:throughline:problem:spool-full");
    assert!(spooled(&stack).await.is_some_and(|entries| (1..5).contains(&entries)));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_that_the_broker_does_not_accept_is_set_aside_and_stops_no_other() -> Result<()> {
    let mut stack = Stack::start_on(TestBroker::embedded().await?, &[]).await?;
    let data = TempDir::new()?;
    let variables = [("API_DATA_DIR", &*data.path().to_string_lossy())];
    let _proxy = behind_proxy(&mut stack, &variables).await?;
    // A login's message has about 110 bytes, plus its baggage.
    stack.broker.set_longest_body(300);
    let baggage = format!("k={}", "x".repeat(400));
    let long = stack.login(KNOWN_MOBILE, &[("baggage", &baggage)]).await?;
    assert_eq!(long.status, 200);
    for _ in 0..3 {
        let login = stack.login(KNOWN_MOBILE, &[]).await?;
        assert_eq!(login.status, 200);
        let trace = login.trace_id();
        stack.receiver.expect_span(|span| span.trace_id == trace && span.kind == "CONSUMER").await;
    }
    stack.api.said("the broker does not accept a login").await?;
    assert_eq!(stack.api.output().matches("the broker does not accept a login").count(), 1);
    // Waits until the other logins are removed from the spool.
    let kept = poll(PATIENCE, async || (spooled(&stack).await? == 1).then_some(()));
    kept.await.context("the long login is not kept")?;
    stack.api.kill().await?;

    // The operator raises the broker's limit, and starts api again.
    stack.broker.set_longest_body(1000);
    let _proxy = behind_proxy(&mut stack, &variables).await?;
    drained(&stack).await?;
    let trace = long.trace_id();
    stack.receiver.expect_span(|span| span.trace_id == trace && span.kind == "CONSUMER").await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_context_takes_its_own_room_in_the_spool_and_little_more() -> Result<()> {
    let (stack, proxy) = Stack::start_with_proxy(&[("api", "API_SPOOL_MAX_BYTES", "20000")]).await?;
    proxy.refuse();
    // Each quotation mark takes two bytes in a JSON string, and four bytes if that JSON is stored in another
    // JSON string.
    let tracestate = (10..42).map(|i| format!("k{i}={}", "\"".repeat(12))).collect::<Vec<_>>().join(",");
    let baggage = format!("k=v;{}", "\"".repeat(7000));
    let parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let headers = [("traceparent", parent), ("tracestate", tracestate.as_str()), ("baggage", &baggage)];
    for n in 0..10 {
        let login = stack.login(KNOWN_MOBILE, &headers).await?;
        assert_eq!(login.status, 200, "login {n}: {:?}", login.json());
    }
    assert_eq!(spooled(&stack).await, Some(10));
    proxy.restore();
    drained(&stack).await
}

/// Returns whether `/readyz` says that the spool accepts logins.
async fn takes(stack: &Stack) -> Option<bool> {
    let ready = stack.client.get(&format!("http://{}/readyz", stack.api.address)).await.ok()?;
    ready.json()["spool"].as_bool()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_deleted_loses_no_login_and_takes_none_until_its_own_are_published() -> Result<()> {
    let mut stack = Stack::start(&[]).await?;
    let data = TempDir::new()?;
    let variables = [("API_DATA_DIR", &*data.path().to_string_lossy())];
    let proxy = behind_proxy(&mut stack, &variables).await?;
    proxy.refuse();
    let mut logins = Vec::new();
    for _ in 0..2 {
        logins.push(stack.login(KNOWN_MOBILE, &[]).await?);
    }
    let file = data.path().join("spool.redb");
    fs::remove_file(&file)?;
    // api notices the deletion even without a login.
    let noticed = poll(PATIENCE, async || (!takes(&stack).await?).then_some(()));
    noticed.await.context("not noticed")?;
    assert!(stack.api.said("the spool failed").await?.contains("was deleted or replaced"));
    let refused = stack.login(KNOWN_MOBILE, &[]).await?;
    assert_eq!(refused.json()["type"], "urn:throughline:problem:spool-failed");

    proxy.restore();
    let again = poll(PATIENCE, async || (takes(&stack).await? && file.exists()).then_some(()));
    again.await.with_context(|| format!("no new file:\n{}", stack.api.output()))?;
    proxy.refuse();
    logins.push(stack.login(KNOWN_MOBILE, &[]).await?);
    assert_eq!(logins[2].status, 200, "{:?}", logins[2].json());
    // The new file outlives the process.
    stack.api.kill().await?;
    let _proxy = behind_proxy(&mut stack, &variables).await?;
    for login in logins {
        let trace = login.trace_id();
        stack.receiver.expect_span(|span| span.trace_id == trace && span.kind == "CONSUMER").await;
    }
    Ok(())
}
