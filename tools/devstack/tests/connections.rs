//! Slow, silent and excess connections are closed in time, and do not affect clients that send requests.

use anyhow::{Context, Result, ensure};
use harness::{
    PATIENCE,
    client::{Client, read_status},
    poll,
    process::Process,
    stack::{KNOWN_MOBILE, Stack},
};
use std::{
    fs, io,
    net::SocketAddr,
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    process::Command,
    select,
    sync::{Mutex, MutexGuard},
    task::JoinSet,
    time::{MissedTickBehavior, interval, sleep, timeout},
    try_join,
};

/// The time within which a login must be answered during an attack. The time is long enough for a busy
/// machine, but shorter than the ten seconds after which a silent connection is closed.
const LOGIN_PATIENCE: Duration = Duration::from_secs(9);

/// The time within which api must cut off a client that sends no headers or reads no answers. api allows such
/// a client only ten seconds. By default, hyper would allow thirty seconds for the headers.
const SILENT: Duration = Duration::from_secs(20);

/// The time within which a service must cut off a client that doesn't begin to speak HTTP/2. The services
/// allow such a client only three seconds. tonic alone would wait for ever.
const SILENT_HTTP2: Duration = Duration::from_secs(12);

/// How long a body may take to arrive. With this limit, no slow connection is closed before the logins are
/// done.
const BODY: (&str, &str, &str) = ("api", "API_DEADLINE", "9s");

/// All connections of a test come from one address, so api must allow this many connections from one address.
const ONE_ADDRESS: (&str, &str, &str) = ("api", "API_MAX_CONNECTIONS_PER_ADDRESS", "10000");

/// The number of slow clients that a service must survive.
const MANY: usize = 10_000;

/// Returns how many connections this process can hold, at most [`MANY`]. The tests that open so many take turns,
/// because all tests of this file share the limit of open files. A test's turn ends when its guard is dropped.
#[expect(clippy::print_stderr, reason = "a run with fewer connections must be noticed")]
async fn as_many_as_possible() -> Result<(usize, MutexGuard<'static, ()>)> {
    static TURN: Mutex<()> = Mutex::const_new(());

    let turn = TURN.lock().await;
    let limit = usize::try_from(rlimit::increase_nofile_limit(rlimit::INFINITY)?)?;
    // The same limit applies to the service, which also has a file for each connection. Both processes also
    // have other open files.
    let possible = limit.saturating_sub(300).min(MANY);
    if possible < MANY {
        eprintln!("ulimit -n is {limit}: only {possible} of {MANY} connections are tried");
    }
    Ok((possible, turn))
}

/// Opens `count` connections, and sends `first(i)` on the `i`th connection.
async fn open(
    address: SocketAddr,
    count: usize,
    first: impl Fn(usize) -> &'static str,
) -> Result<Vec<TcpStream>> {
    let mut opening = JoinSet::new();
    let mut opened = Vec::new();
    for i in 0..count {
        let first = first(i);
        opening.spawn(async move {
            let mut stream = TcpStream::connect(address).await?;
            stream.write_all(first.as_bytes()).await?;
            io::Result::Ok(stream)
        });
        // At any time, fewer connections are being opened than the queue of a listening socket can hold.
        while opening.len() >= 200 {
            opened.extend(opening.join_next().await.transpose()?.transpose()?);
        }
    }
    while let Some(stream) = opening.join_next().await {
        opened.push(stream??);
    }
    Ok(opened)
}

/// Sends one byte per second on each stream, for ever. Streams that the other end has closed are skipped.
async fn drip(streams: &[TcpStream]) {
    let mut second = interval(Duration::from_secs(1));
    second.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        second.tick().await;
        for stream in streams {
            let _ = stream.try_write(b"x");
        }
    }
}

/// Waits until the other end has closed all streams, but no longer than `limit`.
async fn all_closed(streams: &[TcpStream], limit: Duration) -> Result<()> {
    let mut rest = [0; 4096];
    let is_open = |read: io::Result<usize>| match read {
        Ok(read) => read > 0,
        Err(error) => error.kind() == io::ErrorKind::WouldBlock,
    };
    let closed = async {
        for stream in streams {
            while stream.readable().await.is_ok() && is_open(stream.try_read(&mut rest)) {}
        }
    };
    timeout(limit, closed).await.with_context(|| format!("connections are still open after {limit:?}"))
}

/// Returns the resident memory of a service, in KiB.
fn memory(service: &Process) -> Result<usize> {
    let status = fs::read_to_string(format!("/proc/{}/status", service.id()))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

/// Logs in `count` times, alternately on a new connection and on a kept connection. Returns the sorted
/// durations of the logins.
async fn logins(stack: &Stack, count: usize) -> Result<Vec<Duration>> {
    let (kept, url) = (Client::new(), stack.login_url());
    let mut took = Vec::new();
    for i in 0..count {
        let client = if i % 2 == 0 { Client::new() } else { kept.clone() };
        let body = format!(r#"{{"mobile":"{KNOWN_MOBILE}"}}"#);
        let json = [("content-type", "application/json")];
        let start = Instant::now();
        let answer = client.send(http::Method::POST, &url, &json, body);
        let answer = timeout(LOGIN_PATIENCE, answer).await.context("a login was held up")??;
        ensure!(answer.status == 200, "{}", answer.status);
        took.push(start.elapsed());
        sleep(Duration::from_millis(10)).await;
    }
    took.sort();
    Ok(took)
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_slow_connections_harm_nobody_and_are_cut_off() -> Result<()> {
    let (count, _turn) = as_many_as_possible().await?;
    let stack = Stack::start(&[BODY, ONE_ADDRESS]).await?;
    let alone = logins(&stack, 100).await?;
    let memory_alone = memory(&stack.api)?;

    let opened = Instant::now();
    let slow = open(stack.api.address, count, |i| match i % 4 {
        0 => "",
        1 => "POST /usercenter/v1/user/login HTTP/1.1\r\nhost: x\r\nx-slow: ",
        2 => {
            "POST /usercenter/v1/user/login HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
             content-length: 1000000\r\n\r\n"
        }
        _ => "GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n",
    })
    .await?;
    let took_opening = opened.elapsed();
    let logins_among_many = async {
        let took = logins(&stack, 300).await?;
        anyhow::Ok((took, memory(&stack.api)?))
    };
    let cut_off = async {
        all_closed(&slow, SILENT).await?;
        anyhow::Ok(opened.elapsed())
    };
    let ((among_many, memory_among_many), cut_off) = select! {
        both = async { try_join!(logins_among_many, cut_off) } => both?,
        () = drip(&slow) => unreachable!("it never ends"),
    };
    let (p50, p99) =
        (|took: &[Duration]| took[took.len() / 2], |took: &[Duration]| took[took.len() * 99 / 100]);
    println!(
        "{count} slow connections, opened in {took_opening:.1?}; logins before: p50 {:.1?}, p99 {:.1?}; \
         logins meanwhile: p50 {:.1?}, p99 {:.1?}; memory {memory_alone} -> {memory_among_many} KiB",
        p50(&alone),
        p99(&alone),
        p50(&among_many),
        p99(&among_many),
    );
    // A slow connection may cost at most 20 KiB.
    assert!(memory_among_many < memory_alone + 20 * count, "{memory_alone} -> {memory_among_many} KiB");
    println!("all connections were cut off within {cut_off:.1?} after the first one was opened");
    logins(&stack, 10).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_has_asked_nothing_takes_little_memory_and_gives_it_back() -> Result<()> {
    let (possible, _turn) = as_many_as_possible().await?;
    let count = possible / 2;
    let stack = Stack::start(&[ONE_ADDRESS]).await?;
    logins(&stack, 100).await?;
    for (kind, first) in [("silent", ""), ("slow", "POST /usercenter/v1/user/login HTTP/1.1\r\nx-slow: ")] {
        let alone = memory(&stack.api)?;
        let connections = open(stack.api.address, count, |_| first).await?;
        tokio::select! {
            done = logins(&stack, 100) => done?,
            () = drip(if first.is_empty() { &[] } else { &connections }) => unreachable!("it never ends"),
        };
        let among_many = memory(&stack.api)?;
        drop(connections);
        let back = poll(PATIENCE, async || {
            let now = memory(&stack.api).ok()?;
            (now < alone + count).then_some(now)
        });
        let back = back.await;
        println!("{count} {kind} connections: {alone} -> {among_many} -> {back:?} KiB");
        assert!(among_many < alone + 8 * count, "{kind}: {alone} -> {among_many} KiB");
        // api keeps at most 1 KiB of each connection's memory for later connections.
        back.with_context(|| format!("{kind}: {} KiB are kept", memory(&stack.api).unwrap_or_default()))?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn beyond_the_bound_the_connection_that_waited_longest_makes_room() -> Result<()> {
    let stack = Stack::start(&[("api", "API_MAX_CONNECTIONS", "20"), ONE_ADDRESS]).await?;
    let mut silent = Vec::new();
    for _ in 0..20 {
        silent.push(TcpStream::connect(stack.api.address).await?);
    }
    // If api made no room, the login would wait until api closes the silent connections after ten seconds.
    let start = Instant::now();
    logins(&stack, 1).await?;
    let left = LOGIN_PATIENCE.checked_sub(start.elapsed()).context("the login was held up")?;
    all_closed(&silent[..1], left).await.context("the first")?;
    // The last connection is still open.
    let last = silent.pop().context("the last one")?;
    assert_eq!(last.try_read(&mut [0]).map_err(|error| error.kind()), Err(io::ErrorKind::WouldBlock));
    Ok(())
}

/// Opens a connection from this address.
async fn connect_from(source: [u8; 4], to: SocketAddr) -> Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind(SocketAddr::from((source, 0)))?;
    Ok(socket.connect(to).await?)
}

/// Returns whether the other side has left this connection open.
fn is_open(stream: &TcpStream) -> bool {
    stream.try_read(&mut [0]).is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
}

const LOGIN: &[u8] = b"POST /usercenter/v1/user/login HTTP/1.1\r\nhost: x\r\n\
    content-type: application/json\r\ncontent-length: 24\r\n\r\n{\"mobile\":\"13800138000\"}";

#[tokio::test(flavor = "multi_thread")]
async fn one_address_takes_its_share_of_the_connections_and_harms_no_other() -> Result<()> {
    const SLOW_BODY: &[u8] = b"POST /usercenter/v1/user/login HTTP/1.1\r\nhost: x\r\n\
        content-type: application/json\r\ncontent-length: 24\r\nexpect: 100-continue\r\n\r\n";
    const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";
    let stack = Stack::start(&[BODY, ("api", "API_MAX_CONNECTIONS_PER_ADDRESS", "5")]).await?;
    let api = stack.api.address;
    let mut buffer = Vec::new();
    let other = connect_from([127, 0, 0, 4], api).await?;

    // If an address has all the connections that it may have, api makes room for a new one. It closes the
    // connection of this address that has waited longest for a request.
    let mut silent = Vec::new();
    for _ in 0..5 {
        silent.push(connect_from([127, 0, 0, 3], api).await?);
    }
    let mut new = connect_from([127, 0, 0, 3], api).await?;
    new.write_all(LOGIN).await?;
    assert_eq!(timeout(LOGIN_PATIENCE, read_status(&mut new, &mut buffer)).await??, 200);
    all_closed(&[silent.remove(0)], LOGIN_PATIENCE).await.context("the first")?;
    assert!(silent.iter().all(is_open));

    // If each allowed connection of an address has an unfinished request, api refuses a new connection from
    // this address.
    let mut busy = Vec::new();
    for _ in 0..5 {
        let mut stream = connect_from([127, 0, 0, 2], api).await?;
        stream.write_all(SLOW_BODY).await?;
        stream.read_exact(&mut [0; CONTINUE.len()]).await?;
        busy.push(stream);
    }
    let refused = connect_from([127, 0, 0, 2], api).await?;
    all_closed(&[refused], LOGIN_PATIENCE).await.context("the new connection is not refused")?;
    assert!(busy.iter().all(is_open));
    logins(&stack, 10).await?;
    assert!(is_open(&other));
    // api still answers the five unfinished requests when their bodies are complete.
    for stream in &mut busy {
        stream.write_all(&LOGIN[LOGIN.len() - 24..]).await?;
        assert_eq!(timeout(LOGIN_PATIENCE, read_status(stream, &mut buffer)).await??, 200);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_sends_a_body_that_is_too_large_can_send_it_and_reads_the_answer() -> Result<()> {
    const LENGTH: usize = 16 * 1024 * 1024;
    let stack = Stack::start(&[]).await?;
    let length = format!("content-length: {LENGTH}\r\n\r\n");
    for (of_its_length, end) in
        [(length, ""), (format!("transfer-encoding: chunked\r\n\r\n{LENGTH:x}\r\n"), "\r\n0\r\n\r\n")]
    {
        let mut stream = TcpStream::connect(stack.api.address).await?;
        let head = "POST /usercenter/v1/user/login HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n";
        stream.write_all(format!("{head}{of_its_length}").as_bytes()).await?;
        stream.write_all(&vec![b' '; LENGTH]).await?;
        stream.write_all(end.as_bytes()).await?;
        assert_eq!(timeout(LOGIN_PATIENCE, read_status(&mut stream, &mut Vec::new())).await??, 413);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_closes_its_half_of_the_connection_after_the_request_is_answered() -> Result<()> {
    let stack = Stack::start(&[]).await?;
    for _ in 0..20 {
        let mut stream = TcpStream::connect(stack.api.address).await?;
        stream.write_all(LOGIN).await?;
        stream.shutdown().await?;
        assert_eq!(timeout(LOGIN_PATIENCE, read_status(&mut stream, &mut Vec::new())).await??, 200);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn if_an_address_makes_room_for_itself_no_other_has_to() -> Result<()> {
    let bounds = [("api", "API_MAX_CONNECTIONS", "6"), ("api", "API_MAX_CONNECTIONS_PER_ADDRESS", "5")];
    let stack = Stack::start(&bounds).await?;
    // This connection has waited longer than all others.
    let other = connect_from([127, 0, 0, 4], stack.api.address).await?;
    let mut silent = Vec::new();
    for _ in 0..5 {
        silent.push(connect_from([127, 0, 0, 3], stack.api.address).await?);
    }
    let mut new = connect_from([127, 0, 0, 3], stack.api.address).await?;
    new.write_all(LOGIN).await?;
    assert_eq!(timeout(LOGIN_PATIENCE, read_status(&mut new, &mut Vec::new())).await??, 200);
    all_closed(&[silent.remove(0)], LOGIN_PATIENCE).await.context("the first")?;
    assert!(is_open(&other) && silent.iter().all(is_open));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn without_file_descriptors_the_service_waits_and_says_so_once() -> Result<()> {
    let stack = Stack::start(&[]).await?;
    logins(&stack, 1).await?;
    // The limit is the number of files that api has open now, plus five.
    let open_files = fs::read_dir(format!("/proc/{}/fd", stack.api.id()))?.count();
    let limit = format!("--nofile={0}:{0}", open_files + 5);
    let prlimit =
        Command::new("prlimit").args(["--pid", &stack.api.id().to_string(), &limit]).status().await?;
    ensure!(prlimit.success(), "prlimit");

    let silent = open(stack.api.address, 50, |_| "").await?;
    stack.api.said("can't accept connections").await?;
    // The test closes the silent connections. Otherwise, api would close only a few of them every ten
    // seconds.
    drop(silent);
    let answered = poll(PATIENCE, async || {
        stack.login(KNOWN_MOBILE, &[]).await.ok().filter(|answer| answer.status == 200)
    });
    answered.await.context("api no longer answers a login")?;
    let said = stack.api.output();
    assert_eq!(said.matches("can't accept connections").count(), 1, "{said}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_asks_and_never_reads_is_cut_off() -> Result<()> {
    let stack = Stack::start(&[]).await?;
    let mut deaf = TcpStream::connect(stack.api.address).await?;
    let request = b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n".repeat(1000);
    // Writes until the buffers on both sides are full, and then waits until api closes the connection.
    let cut_off = async {
        loop {
            if let Err(error) = deaf.write_all(&request).await {
                return error;
            }
        }
    };
    timeout(SILENT, cut_off).await.context("the client is not cut off")?;
    logins(&stack, 1).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_do_not_begin_to_speak_http2_are_cut_off_and_harm_no_call() -> Result<()> {
    let (possible, _turn) = as_many_as_possible().await?;
    // Each of the two services gets half of the connections that this process can hold.
    let count = possible / 2;
    let stack = Stack::start(&[]).await?;
    for service in [&stack.rpc, &stack.mq] {
        let slow = open(service.address, count, |i| if i % 2 == 0 { "" } else { "PRI * HT" }).await?;
        let meanwhile = async {
            let healthy = poll(LOGIN_PATIENCE, async || serving::health::probe(service.address).await.ok());
            healthy.await.context("a health check was held up")?;
            logins(&stack, 10).await
        };
        let cut_off = async { all_closed(&slow, SILENT_HTTP2).await.context(service.name) };
        try_join!(meanwhile, cut_off)?;
    }
    Ok(())
}
