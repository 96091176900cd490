//! The ranks of this node as processes: started, signalled, reaped.
//!
//! Invariant: a process id is signalled only while its process has not been reaped, so no signal can reach a stranger; and with a
//! rank goes its process group.

use crate::launch::job::{Job, Meeting};
use crate::launch::outcome::{Ending, How, read_error_file};
use crate::launch::output::{Follower, Route, Stream};
use crate::launch::spawn;
use anyhow::{Context, Result};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, kill_process_group, waitid};
use signal_hook::consts::SIGKILL;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How long output may still come after a rank has ended: a grandchild in a session of its own can hold the pipe.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// What every rank runs.
pub struct Program<'a> {
    pub path: &'a Path,
    pub arguments: &'a [OsString],
}

pub struct Rank {
    rank: usize,
    child: Child,
    pid: Pid,
    started: Instant,
    sent: Vec<i32>,
    end: Option<End>,
    followers: Vec<(Stream, Follower)>,
    folder: Option<PathBuf>,
    error_file: Option<PathBuf>,
}

struct End {
    how: How,
    after: Duration,
    /// Since 1970.
    second: u64,
}

impl Rank {
    /// `ended` is called, on another thread, when the process has ended and waits to be reaped.
    pub fn start(
        job: &Job,
        program: &Program,
        meeting: &Meeting,
        attempt: u64,
        local_rank: usize,
        ended: impl FnOnce() + Send + 'static,
    ) -> Result<Rank> {
        let rank = job.rank(local_rank);
        let folder = job.folder(attempt, local_rank);
        let error_file = job.error_file(attempt, local_rank);
        if let Some(folder) = &folder {
            fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
        }
        if let Some(old) = &error_file {
            remove_old(old)?;
        }
        let stdout = Route::open(Stream::Stdout, rank, job.stdout(local_rank), folder.as_deref())?;
        let stderr = Route::open(Stream::Stderr, rank, job.stderr(local_rank), folder.as_deref())?;
        let variables = job.variables(meeting, attempt, local_rank);
        let child = spawn::start(program.path, program.arguments, &variables, stdout.stdio(), stderr.stdio())?;
        let pid = Pid::from_child(&child);
        let (started, sent, followers) = (Instant::now(), Vec::new(), Vec::new());
        let mut rank = Rank { rank, child, pid, started, sent, end: None, followers, folder, error_file };
        if let Some(pipe) = rank.child.stdout.take() {
            rank.followers.push((Stream::Stdout, stdout.follow(pipe)?));
        }
        if let Some(pipe) = rank.child.stderr.take() {
            rank.followers.push((Stream::Stderr, stderr.follow(pipe)?));
        }
        watch(pid, ended)?;
        Ok(rank)
    }

    pub fn lives(&self) -> bool {
        self.end.is_none()
    }

    pub fn name(&self) -> String {
        format!("rank {} (pid {})", self.rank, self.pid)
    }

    /// Asks the rank alone: it answers for processes of its own, which it may need to do what is asked.
    pub fn ask(&mut self, signal: i32) -> Result<()> {
        if self.lives() {
            let known = Signal::from_named_raw(signal).with_context(|| format!("signal {signal} has no name"))?;
            self.sent.push(signal);
            reached(kill_process(self.pid, known)).with_context(|| format!("sending signal {signal} to {}", self.name()))?;
        }
        Ok(())
    }

    /// SIGKILL to the rank and all that it started.
    pub fn kill(&mut self) -> Result<()> {
        if self.lives() {
            self.sent.push(SIGKILL);
            reached(kill_process_group(self.pid, Signal::KILL)).with_context(|| format!("killing {}", self.name()))?;
        }
        Ok(())
    }

    /// Takes note of the end of a process that has ended, and ends what it left behind.
    pub fn reap(&mut self) -> Result<How> {
        // While the dead process is not reaped its number, which is its group's too, belongs to nobody else.
        reached(kill_process_group(self.pid, Signal::KILL)).with_context(|| format!("killing what {} left behind", self.name()))?;
        let status = self.child.wait().with_context(|| format!("waiting for {}", self.name()))?;
        let how = How::of(status);
        let second = SystemTime::now().duration_since(UNIX_EPOCH).context("the clock stands before 1970")?.as_secs();
        self.end = Some(End { how, after: self.started.elapsed(), second });
        Ok(how)
    }

    /// All that is known of the end. Panics for a rank that lives.
    pub fn ending(&self) -> Ending {
        let End { how, after, second } = *self.end.as_ref().expect("only ranks that have been reaped have an ending");
        let mut last_lines = Vec::new();
        for (stream, follower) in &self.followers {
            // Both streams are waited for, so that the console has everything before the launcher's own report.
            let lines = follower.last_lines(LAST_WORDS);
            if *stream == Stream::Stderr {
                last_lines = lines;
            }
        }
        let (message, said) = match self.error_file.as_deref().and_then(read_error_file) {
            Some((message, said)) => (Some(message), said),
            None => (None, None),
        };
        Ending {
            rank: self.rank,
            pid: self.child.id(),
            how,
            sent: self.sent.clone(),
            after,
            second: said.unwrap_or(second),
            message,
            last_lines,
            folder: self.folder.clone(),
        }
    }
}

impl Drop for Rank {
    /// A launcher that gives up leaves nobody behind. There is no one left to tell of a failure here.
    fn drop(&mut self) {
        drop(self.kill());
    }
}

/// Calls `ended` when the process has ended, without reaping it.
fn watch(pid: Pid, ended: impl FnOnce() + Send + 'static) -> Result<()> {
    let wait = move || {
        // The only other error is that there is no such child, and the child is reaped after this only.
        while let Err(Errno::INTR) = waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT) {}
        ended();
    };
    thread::Builder::new().name("watch".to_owned()).spawn(wait).context("starting a thread that watches a rank")?;
    Ok(())
}

/// A process that has just ended cannot be signalled, and need not.
fn reached(sent: Result<(), Errno>) -> io::Result<()> {
    match sent {
        Ok(()) | Err(Errno::SRCH) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn remove_old(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}, an earlier run's error file", path.display()))
        }
        _ => Ok(()),
    }
}
