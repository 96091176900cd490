//! The launcher with real processes: exit codes, deaths, hangs, signals, orphans, restarts, and where output goes.
//!
//! The ranks are small shell scripts. The launcher is this test program, started again on `stands_in_for_the_launcher` alone.
//!
//! Invariant: no test waits for ever; a launcher that is not done in time is killed and the test fails.

use clap::Parser;
use ferrotron::launch::options::LaunchOptions;
use ferrotron::launch::supervisor::launch;
use rustix::process::{Pid, Signal, kill_process};
use std::collections::BTreeSet;
use std::env;
use std::ffi::OsString;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{self, Child, ChildStderr, ChildStdout, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// Longer than any launcher here takes on a busy machine, shorter than the ranks that are to be stopped would sleep.
const LIMIT: Duration = Duration::from_secs(40);

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    options: LaunchOptions,
}

/// Not a test by itself: the launcher of the others.
#[test]
fn stands_in_for_the_launcher() {
    let (Ok(flags), Ok(script)) = (env::var("TEST_FLAGS"), env::var("TEST_SCRIPT")) else { return };
    let line = Line::parse_from(["launch"].into_iter().chain(flags.split_whitespace()));
    let arguments = [OsString::from("-c"), OsString::from(script)];
    match launch(line.options, Path::new("/bin/sh"), &arguments) {
        Ok(code) => process::exit(code),
        Err(error) => panic!("{error:?}"),
    }
}

/// A launcher with these flags, whose ranks run this script.
fn command(flags: &str, script: &str) -> Command {
    let mut command = Command::new(env::current_exe().expect("a test has a program"));
    command.args(["--exact", "stands_in_for_the_launcher", "--nocapture"]);
    command.env_clear().env("PATH", env::var_os("PATH").unwrap_or_default());
    command.env("TEST_FLAGS", flags).env("TEST_SCRIPT", script);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

struct Running {
    child: Child,
    stdout: BufReader<ChildStdout>,
    stderr: BufReader<ChildStderr>,
    /// What has been read while waiting for something.
    seen: String,
}

struct Done {
    code: i32,
    stdout: String,
    stderr: String,
}

impl Running {
    fn start(mut command: Command) -> Running {
        let mut child = command.spawn().expect("the test program starts");
        let stdout = BufReader::new(child.stdout.take().expect("piped"));
        let stderr = BufReader::new(child.stderr.take().expect("piped"));
        Running { child, stdout, stderr, seen: String::new() }
    }

    /// Reads stdout until this many of its lines contain `word`.
    fn await_lines(&mut self, word: &str, count: usize) {
        let mut found = 0;
        while found < count {
            let mut line = String::new();
            let length = self.stdout.read_line(&mut line).expect("text");
            assert!(length > 0, "the output ended before `{word}` had come {count} times:\n{}", self.seen);
            found += usize::from(line.contains(word));
            self.seen.push_str(&line);
        }
    }

    fn await_report(&mut self, word: &str) {
        let mut line = String::new();
        while !line.contains(word) {
            line.clear();
            assert!(self.stderr.read_line(&mut line).expect("text") > 0, "the report ended before `{word}`");
        }
    }

    fn send(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("the launcher runs");
    }

    fn finish(mut self) -> Done {
        let (mut out, mut err) = (self.stdout, self.stderr);
        let out = thread::spawn(move || text_of(&mut out));
        let err = thread::spawn(move || text_of(&mut err));
        let start = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("our own child") {
                break status;
            }
            if start.elapsed() > LIMIT {
                self.child.kill().expect("our own child");
            }
            thread::sleep(Duration::from_millis(5));
        };
        let stdout = self.seen + &out.join().expect("a reader does not panic");
        let stderr = err.join().expect("a reader does not panic");
        let code = status.code().unwrap_or_else(|| panic!("the launcher was not done in time or died: {status}\n{stdout}\n{stderr}"));
        Done { code, stdout, stderr }
    }
}

fn text_of(pipe: &mut impl Read) -> String {
    let mut bytes = Vec::new();
    pipe.read_to_end(&mut bytes).expect("a pipe can be read");
    String::from_utf8_lossy(&bytes).into_owned()
}

fn run(flags: &str, script: &str) -> Done {
    Running::start(command(flags, script)).finish()
}

impl Done {
    #[track_caller]
    fn expect(&self, code: i32, words: &[&str]) {
        assert_eq!(self.code, code, "{}{}", self.stdout, self.stderr);
        for word in words {
            assert!(self.stderr.contains(word), "`{word}` is not in:\n{}", self.stderr);
        }
    }

    /// What follows a word in the lines of stdout.
    fn after(&self, word: &str) -> BTreeSet<String> {
        self.stdout.lines().filter_map(|line| line.split_once(word)).map(|(_, rest)| rest.trim().to_owned()).collect()
    }
}

/// A folder under cargo's own for tests, empty.
fn folder(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("launch").join(name);
    if path.exists() {
        fs::remove_dir_all(&path).expect("our own folder");
    }
    path
}

fn read(path: PathBuf) -> String {
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Whether a process is there and runs. One that waits to be reaped by nobody in particular does not.
fn lives(pid: &str) -> bool {
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
    let state = stat.rsplit(") ").next().and_then(|rest| rest.chars().next());
    !matches!(state, Some('Z' | 'X'))
}

#[track_caller]
fn expect_gone(pids: &BTreeSet<String>, within: Duration) {
    let start = Instant::now();
    while pids.iter().any(|pid| lives(pid)) {
        assert!(start.elapsed() < within, "of {pids:?}, some live on after {within:?}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// A rank that does what it is asked to, and says when it can be asked.
const OBEDIENT: &str = "trap 'echo saved; exit 98' TERM INT USR1; echo ready; while :; do sleep 0.05; done";

#[test]
fn all_done_is_zero() {
    let done = run("--nproc-per-node 3", "exit 0");
    done.expect(0, &[]);
    assert!(!done.stderr.contains("launch:"), "{}", done.stderr);
}

#[test]
fn the_first_failure_stops_the_others_and_gives_the_code() {
    let start = Instant::now();
    let done = run("--nproc-per-node 4", "[ $RANK = 2 ] && { echo 'no such corpus' >&2; exit 7; }; exec sleep 60");
    done.expect(7, &["rank 2 failed first: exit code 7", "its stderr ended: no such corpus", "ranks 0, 1, 3: ended by SIGTERM"]);
    assert!(start.elapsed() < Duration::from_secs(20));
}

#[test]
fn a_rank_may_be_done_before_the_others() {
    run("--nproc-per-node 2", "[ $RANK = 0 ] && exit 0; sleep 0.5; exit 0").expect(0, &[]);
}

#[test]
fn a_death_by_signal_is_named() {
    run("--nproc-per-node 2", "[ $RANK = 1 ] && kill -SEGV $$; exec sleep 60").expect(139, &["rank 1 failed first: killed by SIGSEGV"]);
    run("", "kill -KILL $$").expect(137, &["rank 0 failed first: killed by SIGKILL, not by the launcher"]);
}

#[test]
fn a_rank_that_does_not_stop_is_killed() {
    let start = Instant::now();
    let script = "[ $RANK = 0 ] && { sleep 0.3; exit 3; }; trap '' TERM; while :; do sleep 0.05; done";
    let done = run("--nproc-per-node 2 --shutdown-timeout 0.3", script);
    done.expect(3, &["rank 0 failed first: exit code 3", "rank 1: did not stop when asked to and was killed"]);
    assert!(start.elapsed() < Duration::from_secs(20));
}

#[test]
fn requests_are_passed_on() {
    for signal in [Signal::TERM, Signal::INT, Signal::USR1] {
        let mut launcher = Running::start(command("--nproc-per-node 2", OBEDIENT));
        launcher.await_lines("ready", 2);
        launcher.send(signal);
        let done = launcher.finish();
        done.expect(98, &["passed on to the ranks"]);
        assert_eq!(done.stdout.matches("saved").count(), 2, "{}", done.stdout);
    }
}

#[test]
fn a_request_nobody_heeds_ends_in_a_kill() {
    let script = "trap '' TERM; echo ready; while :; do sleep 0.05; done";
    let mut launcher = Running::start(command("--nproc-per-node 2 --shutdown-timeout 0.3", script));
    launcher.await_lines("ready", 2);
    launcher.send(Signal::TERM);
    launcher.finish().expect(143, &["ranks 0, 1: did not stop when asked to and was killed"]);
}

#[test]
fn a_second_interrupt_kills() {
    let mut launcher = Running::start(command("--nproc-per-node 2", "trap '' INT; echo ready; while :; do sleep 0.05; done"));
    launcher.await_lines("ready", 2);
    launcher.send(Signal::INT);
    launcher.await_report("passed on");
    launcher.send(Signal::INT);
    launcher.finish().expect(130, &["interrupted again"]);
}

#[test]
fn a_stop_on_request_is_not_restarted() {
    let script = "trap 'exit 1' TERM; echo ready; while :; do sleep 0.05; done";
    let mut launcher = Running::start(command("--max-restarts 5", script));
    launcher.await_lines("ready", 1);
    launcher.send(Signal::TERM);
    let done = launcher.finish();
    done.expect(1, &["rank 0 failed first: exit code 1"]);
    assert_eq!(done.stdout.matches("ready").count(), 1);
}

#[test]
fn nohup_is_respected() {
    let inner = command("--nproc-per-node 1", "echo ready; sleep 0.5; exit 0");
    let mut outer = Command::new("/bin/sh");
    outer.args(["-c", "trap '' HUP; exec \"$0\" \"$@\""]).arg(inner.get_program()).args(inner.get_args()).env_clear();
    outer.envs(inner.get_envs().filter_map(|(name, value)| Some((name, value?))));
    outer.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut launcher = Running::start(outer);
    launcher.await_lines("ready", 1);
    launcher.send(Signal::HUP);
    launcher.finish().expect(0, &[]);
}

#[test]
fn ranks_die_with_the_launcher() {
    let mut launcher = Running::start(command("--nproc-per-node 4", "echo pid $$; exec sleep 60"));
    launcher.await_lines("pid ", 4);
    let pids = Done { code: 0, stdout: launcher.seen.clone(), stderr: String::new() }.after("pid ");
    assert!(pids.len() == 4 && pids.iter().all(|pid| lives(pid)), "{pids:?}");
    launcher.send(Signal::KILL);
    expect_gone(&pids, Duration::from_secs(2));
    launcher.child.wait().expect("our own child");
}

#[test]
fn what_a_rank_started_goes_with_it() {
    let done = run("--nproc-per-node 2", "sleep 60 & echo pid $!; exit 0");
    done.expect(0, &[]);
    let pids = done.after("pid ");
    assert_eq!(pids.len(), 2);
    expect_gone(&pids, Duration::from_secs(2));
}

#[test]
fn ranks_but_the_first_are_marked_on_the_console() {
    let done = run("--nproc-per-node 3", "echo out $RANK; echo err $RANK >&2; printf 'no end'");
    done.expect(0, &["\n[rank 1] err 1\n", "[rank 2] err 2\n", "err 0\n"].map(|word| word.trim_start()));
    for line in ["out 0", "[rank 1] out 1", "[rank 2] out 2", "[rank 1] no end", "[rank 2] no end"] {
        assert!(done.stdout.contains(line), "`{line}` is not in:\n{}", done.stdout);
    }
    assert!(!done.stdout.contains("[rank 0]") && !done.stderr.contains("[rank 0]"));
    let filtered = run("--nproc-per-node 3 --local-ranks-filter 1", "echo out $RANK; echo err $RANK >&2; [ $RANK != 2 ] || exit 4");
    filtered.expect(4, &["its stderr ended: err 2"]);
    assert!(!filtered.stdout.contains("out 0") && filtered.stdout.contains("out 1") && !filtered.stdout.contains("out 2"));
}

#[test]
fn logs_keep_what_ranks_print() {
    let logs = folder("logs");
    let script = "echo out $RANK; echo err $RANK >&2; [ $TORCHELASTIC_RESTART_COUNT = 1 ] || exit 5";
    let done = run(&format!("--nproc-per-node 2 --max-restarts 1 --log-dir {} --redirects 1:3", logs.display()), script);
    done.expect(0, &["its files: ", "restart 1 of 1"]);
    assert!(done.stdout.contains("out 0") && !done.stdout.contains("out 1") && !done.stderr.contains("[rank 1] err 1"));
    assert!(!logs.join("attempt_0/0/stdout.log").exists(), "rank 0 goes to the console alone");
    let done = run(&format!("--nproc-per-node 2 --max-restarts 1 --log-dir {}", logs.display()), script);
    done.expect(0, &[]);
    assert!(done.stdout.contains("[rank 1] out 1"));
    for attempt in ["attempt_0", "attempt_1"] {
        assert_eq!(read(logs.join(attempt).join("0/stdout.log")), "out 0\n");
        assert_eq!(read(logs.join(attempt).join("1/stderr.log")), "err 1\nerr 1\n", "a second run writes behind the first");
    }
}

#[test]
fn a_failed_job_is_started_again_as_often_as_allowed() {
    let script = "echo round $TORCHELASTIC_RESTART_COUNT $MASTER_PORT; [ $TORCHELASTIC_RESTART_COUNT = 2 ] && exit 0; exit 5";
    let done = run("--nproc-per-node 2 --max-restarts 3", script);
    done.expect(0, &["restart 1 of 3", "restart 2 of 3"]);
    assert_eq!(done.stdout.matches("round ").count(), 6);
    let done = run("--max-restarts 1", script);
    done.expect(99, &["failed first: exit code 5", "all 1 restarts are used up"]);
    run("--max-restarts 0", script).expect(5, &[]);
    for code in [2, 98, 99] {
        let done = run("--max-restarts 3", &format!("echo round; exit {code}"));
        done.expect(code, &[]);
        assert_eq!(done.stdout.matches("round").count(), 1, "exit code {code} is not worth a restart");
    }
}

#[test]
fn ranks_that_disagree_on_the_end_are_told_of() {
    run("--nproc-per-node 2", "[ $RANK = 0 ] && exit 98; exit 0").expect(98, &["do not agree", "rank 1: done"]);
}

#[test]
fn the_error_file_says_why_and_who_was_first() {
    let logs = folder("errors");
    let script = "[ $RANK = 0 ] && exit 1
        echo '{\"message\": {\"message\": \"loss is NaN\", \"extraInfo\": {\"timestamp\": \"1000000000\"}}}' > $TORCHELASTIC_ERROR_FILE
        sleep 0.3; exit 6";
    let done = run(&format!("--nproc-per-node 2 --monitor-interval 2 --log-dir {}", logs.display()), script);
    done.expect(6, &["rank 1 failed first: exit code 6", "it reported: loss is NaN", "rank 0: exit code 1"]);
}

#[test]
fn ranks_know_their_place() {
    let script = "echo place $RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $GROUP_RANK; echo meet $MASTER_ADDR:$MASTER_PORT; \
                  echo token $FERROTRON_JOB_TOKEN";
    let done = run("--nproc-per-node 2 --standalone", script);
    done.expect(0, &[]);
    assert_eq!(done.after("place "), BTreeSet::from(["0 0 2 2 0".to_owned(), "1 1 2 2 0".to_owned()]));
    let (meetings, tokens) = (done.after("meet "), done.after("token "));
    assert!(meetings.len() == 1 && meetings.iter().all(|meeting| meeting.starts_with("127.0.0.1:")), "{meetings:?}");
    assert!(tokens.len() == 1 && tokens.iter().all(|token| token.len() == 32), "{tokens:?}");
    let mut second = command("--nproc_per_node=2 --nnodes=2 --node_rank=1 --master_addr=head --master_port=1234", script);
    second.env("FERROTRON_JOB_TOKEN", "secret");
    let done = Running::start(second).finish();
    done.expect(0, &[]);
    assert_eq!(done.after("place "), BTreeSet::from(["2 0 4 2 1".to_owned(), "3 1 4 2 1".to_owned()]));
    assert_eq!((done.after("meet "), done.after("token ")), (BTreeSet::from(["head:1234".into()]), BTreeSet::from(["secret".into()])));
}

#[test]
fn torchruns_environment_gives_defaults() {
    let mut command = command("", "echo place $RANK");
    command.env("PET_NPROC_PER_NODE", "3");
    let done = Running::start(command).finish();
    done.expect(0, &[]);
    assert_eq!(done.after("place ").len(), 3);
}

#[test]
fn bad_arguments_start_nothing() {
    for (flags, word) in [("--nnodes 2", "--master-addr"), ("--tee 3", "--log-dir"), ("--nproc-per-node x", "auto")] {
        let done = run(flags, "echo started");
        done.expect(2, &[word]);
        assert!(!done.stdout.contains("started"));
    }
}
