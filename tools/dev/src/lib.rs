//! The usual ports of `cargo dev`, and which process uses them.

use std::{env, fs, net::TcpListener, path::Path};

/// The usual ports. Each has the name of the part that listens on it, and the variable that is set if this
/// part runs elsewhere.
const PORTS: [(u16, &str, &str); 7] = [
    (8888, "api", ""),
    (50051, "usercenter", ""),
    (50052, "mq", ""),
    (5672, "the broker", "AMQP_URL"),
    (4317, "OTLP/gRPC", "OTEL_EXPORTER_OTLP_ENDPOINT"),
    (4318, "OTLP/HTTP", "OTEL_EXPORTER_OTLP_ENDPOINT"),
    (16686, "the trace page", "OTEL_EXPORTER_OTLP_ENDPOINT"),
];

/// Checks that the usual ports are free.
///
/// # Errors
/// If ports are in use. The error names these ports, and the processes that use them, as far as they are
/// known.
pub fn check_ports() -> Result<(), String> {
    let is_elsewhere = |variable: &str| env::var_os(variable).is_some_and(|value| !value.is_empty());
    let taken: Vec<_> = PORTS
        .iter()
        .filter(|(port, _, elsewhere)| {
            !is_elsewhere(elsewhere) && TcpListener::bind(("127.0.0.1", *port)).is_err()
        })
        .map(|(port, part, _)| (port, part, user(*port).unwrap_or_else(|| "another process".to_owned())))
        .collect();
    if let Some((port, _, user)) = taken.iter().find(|(.., user)| user.starts_with("devstack ")) {
        return Err(format!(
            "another `cargo dev` is running: {user} uses port {port}; stop it, or run `cargo dev --free-ports`"
        ));
    }
    let taken: Vec<_> =
        taken.iter().map(|(port, part, user)| format!("port {port} ({part}) is in use by {user}")).collect();
    match taken.is_empty() {
        true => Ok(()),
        false => Err(format!("{}: free the ports, or run `cargo dev --free-ports`", taken.join(", "))),
    }
}

/// Returns the name and the id of the process that listens on a port, if Linux shows them to this user.
fn user(port: u16) -> Option<String> {
    let tables =
        ["/proc/net/tcp", "/proc/net/tcp6"].map(|table| fs::read_to_string(table).unwrap_or_default());
    // The second column of the table ends with the port, the fourth is 0A for a listener, and the tenth is the
    // socket's inode.
    let inode = tables.iter().flat_map(|table| table.lines()).find_map(|line| {
        let columns: Vec<_> = line.split_whitespace().collect();
        let is_it = columns.get(1)?.ends_with(&format!(":{port:04X}")) && *columns.get(3)? == "0A";
        is_it.then(|| columns.get(9).copied())?
    })?;
    let socket = format!("socket:[{inode}]");
    let has_it = |process: &Path| {
        let mut files = fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
        files.any(|file| fs::read_link(file.path()).is_ok_and(|link| link.as_os_str() == socket.as_str()))
    };
    let process =
        fs::read_dir("/proc").ok()?.flatten().map(|entry| entry.path()).find(|path| has_it(path))?;
    let name = fs::read_to_string(process.join("comm")).ok()?;
    Some(format!("{} (process {})", name.trim(), process.file_name()?.display()))
}
