//! The launcher of one node: starts its ranks, watches them, stops all when one fails, starts them again where that may help.
//!
//! Invariant: when `launch` returns, every rank is gone, or the error names the one that does not even die of SIGKILL.

use crate::launch::crew::{Program, Rank};
use crate::launch::job::Job;
use crate::launch::options::LaunchOptions;
use crate::launch::outcome::{self, BAD_ARGUMENTS, Ending, GIVEN_UP, How, STOPPED};
use crate::launch::output::say;
use crate::launch::requests;
use anyhow::{Context, Result, bail};
use signal_hook::consts::{SIGINT, SIGTERM};
use std::ffi::OsString;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

/// A process that has not died of SIGKILL by then is stuck in the kernel.
const DEATH: Duration = Duration::from_secs(30);

/// Runs `program arguments` once per rank of this node and returns the exit code for this process: 0 when all ranks are done, 98
/// when they stopped on request, else the code of the rank that failed first (128 + n for signal n), or 99 when restarts are used up.
///
/// Call it on the main thread: the ranks die with the thread that called it.
pub fn launch(options: LaunchOptions, program: &Path, arguments: &[OsString]) -> Result<i32> {
    let job = match Job::new(options) {
        Ok(job) => job,
        Err(error) => {
            say(&format!("error: {error:#}"));
            return Ok(BAD_ARGUMENTS);
        }
    };
    if job.lacks_token() {
        say("several nodes and no FERROTRON_JOB_TOKEN: set it to one secret on all nodes, by which ranks know each other from strangers");
    }
    let (sender, events) = channel();
    let heard = sender.clone();
    // When nobody receives any more the launcher has its answer already.
    let hear = move |signal| drop(heard.send(Event::Requested(signal)));
    let listener = requests::listen(&job.signals, hear)?;
    let code = Launcher { job, program: Program { path: program, arguments }, sender, events, requested: None }.run();
    listener.close();
    code
}

enum Event {
    /// The process of this local rank has ended; nobody has reaped it yet.
    Ended(usize),
    Requested(i32),
}

/// How far an attempt is. Where something has to happen without an event, by when.
#[derive(Clone, Copy, Debug)]
enum Phase {
    Running,
    /// A rank has failed; what others do until then they do by themselves.
    Failing(Instant),
    /// All have been asked to stop, and are killed then.
    Stopping(Instant),
    /// All have been killed.
    Killing(Instant),
}

impl Phase {
    fn deadline(self) -> Option<Instant> {
        match self {
            Phase::Running => None,
            Phase::Failing(time) | Phase::Stopping(time) | Phase::Killing(time) => Some(time),
        }
    }
}

struct Launcher<'a> {
    job: Job,
    program: Program<'a>,
    sender: Sender<Event>,
    events: Receiver<Event>,
    /// The last signal from outside.
    requested: Option<i32>,
}

impl Launcher<'_> {
    fn run(&mut self) -> Result<i32> {
        let mut attempt = 0;
        loop {
            let endings = self.attempt(attempt)?;
            let outcome = outcome::judge(&endings, self.requested);
            if let Some(report) = outcome::report(&endings, outcome) {
                say(&report);
            }
            if self.requested.is_some() || !outcome.is_worth_a_restart() || self.job.max_restarts == 0 {
                return Ok(outcome.code);
            }
            if attempt == self.job.max_restarts {
                say(&format!("all {} restarts are used up: exit code {GIVEN_UP}, not to be queued again", self.job.max_restarts));
                return Ok(GIVEN_UP);
            }
            attempt += 1;
            say(&format!("starting all ranks again: restart {attempt} of {}", self.job.max_restarts));
        }
    }

    /// All ranks, from start to end. The endings are in the order in which they came.
    fn attempt(&mut self, attempt: u64) -> Result<Vec<Ending>> {
        let meeting = self.job.meeting()?;
        let mut ranks = Vec::new();
        for local_rank in 0..self.job.ranks_per_node {
            let sender = self.sender.clone();
            let ended = move || drop(sender.send(Event::Ended(local_rank)));
            ranks.push(Rank::start(&self.job, &self.program, &meeting, attempt, local_rank, ended)?);
        }
        let mut phase = Phase::Running;
        let mut order = Vec::new();
        while order.len() < ranks.len() {
            match self.next_event(phase) {
                Some(Event::Ended(local_rank)) => {
                    let how = ranks[local_rank].reap()?;
                    order.push(local_rank);
                    if !matches!(how, How::Code(0 | STOPPED)) && matches!(phase, Phase::Running) {
                        phase = Phase::Failing(Instant::now() + self.job.monitor_interval);
                    }
                }
                Some(Event::Requested(signal)) => phase = self.pass_on(signal, phase, &mut ranks)?,
                None => phase = self.next_phase(phase, &mut ranks)?,
            }
        }
        Ok(order.into_iter().map(|local_rank| ranks[local_rank].ending()).collect())
    }

    /// None: the phase's time is over.
    fn next_event(&self, phase: Phase) -> Option<Event> {
        let why = "the launcher itself holds a sender";
        match phase.deadline() {
            None => Some(self.events.recv().expect(why)),
            Some(time) => match self.events.recv_timeout(time.saturating_duration_since(Instant::now())) {
                Ok(event) => Some(event),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => unreachable!("{why}"),
            },
        }
    }

    fn next_phase(&self, phase: Phase, ranks: &mut [Rank]) -> Result<Phase> {
        match phase {
            Phase::Running => unreachable!("running has no deadline"),
            Phase::Failing(_) => {
                ranks.iter_mut().try_for_each(|rank| rank.ask(SIGTERM))?;
                Ok(Phase::Stopping(Instant::now() + self.job.shutdown_timeout))
            }
            Phase::Stopping(_) => kill(ranks),
            Phase::Killing(_) => {
                let stuck: Vec<String> = ranks.iter().filter(|rank| rank.lives()).map(Rank::name).collect();
                bail!("{} did not die of SIGKILL within {} s: stuck in the kernel", stuck.join(", "), DEATH.as_secs())
            }
        }
    }

    /// What somebody asks of the launcher is asked of its ranks.
    fn pass_on(&mut self, signal: i32, phase: Phase, ranks: &mut [Rank]) -> Result<Phase> {
        if signal == SIGINT && self.requested == Some(SIGINT) {
            say("interrupted again: killing the ranks");
            return kill(ranks);
        }
        self.requested = Some(signal);
        ranks.iter_mut().try_for_each(|rank| rank.ask(signal)).context("passing on a request")?;
        let name = requests::name(signal);
        if !requests::presses(signal) {
            say(&format!("{name}: passed on to the ranks"));
            return Ok(phase);
        }
        let patience = self.job.shutdown_timeout;
        let again = if signal == SIGINT { ", or at once on another" } else { "" };
        say(&format!("{name}: passed on to the ranks, which are killed after {} s{again}", patience.as_secs_f64()));
        Ok(match phase {
            Phase::Running | Phase::Failing(_) => Phase::Stopping(Instant::now() + patience),
            Phase::Stopping(_) | Phase::Killing(_) => phase,
        })
    }
}

fn kill(ranks: &mut [Rank]) -> Result<Phase> {
    ranks.iter_mut().try_for_each(Rank::kill)?;
    Ok(Phase::Killing(Instant::now() + DEATH))
}
