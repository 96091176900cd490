//! What ranks print: to the console, rank 0 as it is and the others line by line with `[rank 3]` in front; to log files as it is.
//!
//! Invariant: a rank never waits for a reader. Its pipes are drained until they close, even when console and files refuse to take more.

use crate::launch::job::Ways;
use anyhow::{Context, Result};
use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal, Read, Write};
use std::path::Path;
use std::process::Stdio;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

/// A line that has no end by then is shown in parts.
const LONGEST_LINE: usize = 1 << 16;
/// Lines that are kept for the report of a failure, and how much of each.
const LAST_LINES: usize = 3;
const LAST_LINE_CHARS: usize = 400;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stream {
    Stdout,
    Stderr,
}

impl Stream {
    fn file_name(self) -> &'static str {
        match self {
            Stream::Stdout => "stdout.log",
            Stream::Stderr => "stderr.log",
        }
    }

    fn is_terminal(self) -> bool {
        match self {
            Stream::Stdout => io::stdout().is_terminal(),
            Stream::Stderr => io::stderr().is_terminal(),
        }
    }

    /// A console that is gone (`| head`) is no reason to stop a run.
    fn show(self, bytes: &[u8]) {
        let shown = match self {
            Stream::Stdout => put(io::stdout().lock(), bytes),
            Stream::Stderr => put(io::stderr().lock(), bytes),
        };
        drop(shown);
    }
}

fn put(mut console: impl Write, bytes: &[u8]) -> io::Result<()> {
    console.write_all(bytes)?;
    console.flush()
}

/// A line of the launcher itself.
pub fn say(text: &str) {
    let text: String = text.lines().map(|line| format!("launch: {line}\n")).collect();
    Stream::Stderr.show(text.as_bytes());
}

enum Console {
    Hidden,
    AsItIs,
    Prefixed(String),
}

/// Where one stream of one rank goes.
pub struct Route {
    stream: Stream,
    console: Console,
    file: Option<File>,
}

impl Route {
    /// Opens the log file in `folder`, if the stream goes to one. Earlier runs' lines stay in front of this one's.
    pub fn open(stream: Stream, rank: usize, ways: Ways, folder: Option<&Path>) -> Result<Route> {
        let console = match (ways.to_console, rank) {
            (false, _) => Console::Hidden,
            (true, 0) => Console::AsItIs,
            (true, _) => Console::Prefixed(format!("[rank {rank}] ")),
        };
        let file = match folder.filter(|_| ways.to_file) {
            Some(folder) => {
                let path = folder.join(stream.file_name());
                let file = OpenOptions::new().create(true).append(true).open(&path);
                Some(file.with_context(|| format!("opening the log {}", path.display()))?)
            }
            None => None,
        };
        Ok(Route { stream, console, file })
    }

    /// What to start the rank with. A terminal is lent to rank 0 itself, so that it can draw a progress bar on it.
    pub fn stdio(&self) -> Stdio {
        let lent = matches!(self.console, Console::AsItIs) && self.file.is_none() && self.stream.is_terminal();
        if lent { Stdio::inherit() } else { Stdio::piped() }
    }

    /// Copies what comes through the pipe, on a thread of its own, until the last writer has closed it.
    pub fn follow(self, pipe: impl Read + Send + 'static) -> Result<Follower> {
        let tail = Tail::default();
        let (lines, (ended, end)) = (tail.clone(), channel());
        thread::Builder::new()
            .name("output".to_owned())
            .spawn(move || self.copy(pipe, &lines, &ended))
            .context("starting a thread that reads a rank's output")?;
        Ok(Follower { tail, end })
    }

    /// The sender is dropped at the end, which is how the follower learns of it.
    fn copy(mut self, mut pipe: impl Read, tail: &Tail, _ended: &Sender<()>) {
        let mut chunk = vec![0; LONGEST_LINE];
        let mut line = Vec::new();
        loop {
            let count = match pipe.read(&mut chunk) {
                Ok(0) => break,
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    say(&format!("reading a rank's output: {error}"));
                    break;
                }
            };
            let bytes = &chunk[..count];
            self.keep(bytes);
            if let Console::AsItIs = self.console {
                self.stream.show(bytes);
            }
            let mut shown = Vec::new();
            for part in bytes.split_inclusive(|byte| *byte == b'\n') {
                line.extend_from_slice(part);
                if part.ends_with(b"\n") || line.len() >= LONGEST_LINE {
                    self.finish_line(&mut line, &mut shown, tail);
                }
            }
            self.stream.show(&shown);
        }
        if !line.is_empty() {
            let mut shown = Vec::new();
            self.finish_line(&mut line, &mut shown, tail);
            self.stream.show(&shown);
        }
    }

    fn finish_line(&self, line: &mut Vec<u8>, shown: &mut Vec<u8>, tail: &Tail) {
        if line.last() == Some(&b'\n') {
            line.pop();
        }
        if let Console::Prefixed(prefix) = &self.console {
            shown.extend_from_slice(prefix.as_bytes());
            shown.extend_from_slice(line);
            shown.push(b'\n');
        }
        tail.push(line);
        line.clear();
    }

    fn keep(&mut self, bytes: &[u8]) {
        if let Some(Err(error)) = self.file.as_mut().map(|file| file.write_all(bytes)) {
            say(&format!("a log file takes no more, this rank's {} is lost from here on: {error}", self.stream.file_name()));
            self.file = None;
        }
    }
}

/// The last lines of a stream that say something.
#[derive(Clone, Default)]
struct Tail(Arc<Mutex<VecDeque<String>>>);

impl Tail {
    fn push(&self, line: &[u8]) {
        let text: String = String::from_utf8_lossy(line).trim_end().chars().take(LAST_LINE_CHARS).collect();
        if !text.trim().is_empty() {
            let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            lines.push_back(text);
            if lines.len() > LAST_LINES {
                lines.pop_front();
            }
        }
    }
}

pub struct Follower {
    tail: Tail,
    end: Receiver<()>,
}

impl Follower {
    /// The last lines, once the stream has ended; those so far when it has not ended after `patience`.
    pub fn last_lines(&self, patience: Duration) -> Vec<String> {
        // Nothing is ever sent: either the sender is gone or the patience is.
        let _ = self.end.recv_timeout(patience);
        self.tail.0.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }
}
