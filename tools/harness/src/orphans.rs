//! Ends the services and the builds of a process that was killed and so could not end them itself.
//!
//! A shell waits beside this process, at the other end of a pipe. Services and builds start in the shell's
//! process group, so the shell can always end them. The pipe closes when this process ends, for whatever
//! reason. Then the shell ends its group.

use std::{
    os::unix::process::CommandExt,
    process::{Child, Command, Stdio},
    sync::OnceLock,
};

const SCRIPT: &str = "read -r _; trap '' TERM; kill -s TERM 0";

/// Returns the process group whose processes end when this process ends, or earlier. A signal from the terminal
/// to this process does not reach the group. If the shell can't be started, returns 0, which means a new group.
/// The processes of a new group outlive a killed parent.
pub(crate) fn group() -> i32 {
    static SHELL: OnceLock<Option<Child>> = OnceLock::new();

    let shell = SHELL.get_or_init(|| start().ok());
    shell.as_ref().and_then(|shell| shell.id().try_into().ok()).unwrap_or(0)
}

fn start() -> std::io::Result<Child> {
    let mut shell = Command::new("sh");
    shell.args(["-c", SCRIPT]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    shell.process_group(0).spawn()
}
