//! Ends services whose parent was killed, and so could not end them itself.
//!
//! A shell waits beside this process, at the other end of a pipe. It is told of each service that starts and
//! of each that is not ours any more. When the pipe ends, however this process did, it ends those that are
//! left.

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

/// Says that a process was started, and when this is dropped, that it has ended.
pub(crate) fn watch(pid: u32) -> Watched {
    tell("born", pid);
    Watched(pid)
}

/// A process that ends with this one.
pub(crate) struct Watched(u32);

impl Drop for Watched {
    fn drop(&mut self) {
        tell("gone", self.0);
    }
}

/// Without a shell there is nobody to tell, and services outlive a parent that is killed.
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
    // What a terminal sends to this process must not end the shell before it.
    shell.process_group(0).spawn()
}
