//! Starts one rank as a process that cannot outlive the launcher.
//!
//! Invariant: from its first instruction on, a rank gets SIGKILL when the thread that started it ends, however that ends; and it
//! leads a process group of its own, so that a terminal's Ctrl-C reaches the launcher alone and SIGKILL reaches all the rank started.
#![allow(unsafe_code)]

use anyhow::{Context, Result};
use rustix::io::Errno;
use rustix::process::{Signal, getpid, getppid, set_parent_process_death_signal};
use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// To be called on a thread that lives as long as the launcher: the kernel ties a child to the thread, not to the process.
pub fn start(program: &Path, arguments: &[OsString], variables: &[(&'static str, String)], stdout: Stdio, stderr: Stdio) -> Result<Child> {
    let mut command = Command::new(program);
    command.args(arguments).envs(variables.iter().map(|(name, value)| (name, value)));
    command.stdin(Stdio::null()).stdout(stdout).stderr(stderr).process_group(0);
    let launcher = getpid();
    let tie_to_launcher = move || {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // A launcher that died before the line above sent no signal; the rank then has another parent already.
        if getppid() == Some(launcher) { Ok(()) } else { Err(Errno::SRCH.into()) }
    };
    // SAFETY: between fork and exec a child may only do what is safe in a signal handler. The closure makes two system calls, and
    // its errors are bare numbers: it allocates nothing and takes no lock.
    unsafe { command.pre_exec(tie_to_launcher) };
    command.spawn().with_context(|| format!("starting {}", program.display()))
}
