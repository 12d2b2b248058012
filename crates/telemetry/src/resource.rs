//! Describes this process, in the resource of every span (semantic conventions 1.45, resources).

use opentelemetry::KeyValue;
use std::{env, process, time::SystemTime};
use uuid::Uuid;

/// Detects the attributes that need no configuration. The command line is left out, because arguments may
/// hold secrets.
pub(crate) fn detect(service_name: &'static str, service_version: &'static str) -> Vec<KeyValue> {
    let executable = env::current_exe().ok();
    let file_name = executable.as_deref().and_then(|path| path.file_name());
    let mut attributes = vec![
        KeyValue::new("service.name", service_name),
        KeyValue::new("service.namespace", "throughline"),
        KeyValue::new("service.version", service_version),
        KeyValue::new("service.instance.id", Uuid::new_v4().to_string()),
        KeyValue::new("deployment.environment.name", "development"),
        KeyValue::new("host.name", gethostname::gethostname().to_string_lossy().into_owned()),
        KeyValue::new("host.arch", arch()),
        KeyValue::new("os.type", env::consts::OS),
        KeyValue::new("process.pid", i64::from(process::id())),
        // Telemetry starts first, so this time is only a few milliseconds late.
        KeyValue::new(
            "process.creation.time",
            humantime::format_rfc3339_millis(SystemTime::now()).to_string(),
        ),
        KeyValue::new("process.runtime.name", "rustc"),
        KeyValue::new("process.runtime.version", env!("RUSTC_VERSION")),
    ];
    if let Some(name) = file_name {
        attributes.push(KeyValue::new("process.executable.name", name.to_string_lossy().into_owned()));
    }
    attributes
}

/// Returns the name that `host.arch` has for the architecture.
fn arch() -> &'static str {
    match env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "x86" => "x86",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_processes_differ_in_their_instance_id() {
        let id = || {
            let attributes = detect("api", "1");
            attributes.into_iter().find(|kv| kv.key.as_str() == "service.instance.id").unwrap().value
        };
        assert_ne!(id(), id());
    }
}
