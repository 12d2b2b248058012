//! Ends the services of a process that was killed and so could not end them itself.
//!
//! A shell waits beside this process, at the other end of a pipe. Through the pipe, this process reports each
//! service that it starts, and each service that has ended. The pipe closes when this process ends, in whatever
//! way. Then the shell ends the services that are left.

use std::{
    io::Write,
    os::unix::process::CommandExt,
    process::{Child, ChildStdin, Command, Stdio},
    sync::{Mutex, OnceLock, PoisonError},
};

const SCRIPT: &str = r#"
ours=' '
while read -r what pid; do
  case $what in
    born) ours="$ours$pid " ;;
    gone) case $ours in *" $pid "*) ours="${ours%% $pid *} ${ours#* $pid }" ;; esac ;;
  esac
done
[ "$ours" = ' ' ] || kill $ours
"#;

/// Reports that a process was started and, when the returned value is dropped, that it has ended.
pub(crate) fn watch(pid: u32) -> Watched {
    tell("born", pid);
    Watched(pid)
}

/// A process that ends at the latest when this process does.
pub(crate) struct Watched(u32);

impl Drop for Watched {
    fn drop(&mut self) {
        tell("gone", self.0);
    }
}

/// Sends the shell a line. If the shell could not be started, nothing is sent, and services outlive a killed
/// parent.
fn tell(what: &str, pid: u32) {
    static SHELL: OnceLock<Option<Mutex<ChildStdin>>> = OnceLock::new();

    if let Some(shell) = SHELL.get_or_init(|| start().ok()?.stdin.map(Mutex::new)) {
        let mut shell = shell.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = writeln!(shell, "{what} {pid}");
    }
}

fn start() -> std::io::Result<Child> {
    let mut shell = Command::new("sh");
    shell.args(["-c", SCRIPT]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    // A signal from the terminal to this process must not end the shell first.
    shell.process_group(0).spawn()
}
