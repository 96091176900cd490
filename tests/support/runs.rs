//! Real runs of a tiny model: processes that are started, killed, asked to stop and started again, and what they leave.
//!
//! Invariant: no test waits for ever; a process that is not done in time is killed and the test fails.

use ferrotron::checkpoint::diff::diff;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Longer than any run here takes on a busy machine.
const LIMIT: Duration = Duration::from_secs(120);

const CONFIG: &str = "
[model]
family = \"llama\"
hidden_size = 32
intermediate_size = 64
num_layers = 2
num_heads = 4
num_kv_heads = 2
[data]
sources = [\"CORPUS\"]
validation = [\"CORPUS\"]
[train]
steps = 40
seq_len = 32
global_batch_size = 8
dtype = \"f32\"
[optimizer]
lr = 1e-2
[schedule]
warmup_steps = 5
[checkpoint]
interval = 3
[eval]
interval = 10
steps = 2
[device]
threads = 1
";

/// A folder with a corpus and a configuration, for runs in folders beside them.
pub struct Runs {
    pub folder: PathBuf,
}

/// A process that was started.
pub struct Running {
    child: Child,
    stderr: PathBuf,
}

/// How a process ended, and what it said.
pub struct Done {
    pub status: ExitStatus,
    pub stderr: String,
}

impl Runs {
    pub fn new(name: &str) -> Runs {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("resume").join(name);
        if folder.exists() {
            fs::remove_dir_all(&folder).expect("our own folder");
        }
        fs::create_dir_all(&folder).expect("a folder");
        // Documents of many lengths, with something to learn in them.
        let document = |i: usize| {
            format!("{{\"text\": \"{}\"}}\n", "one two three four ".repeat(1 + i * i % 7).trim_end().replace("two", ["two", "2"][i % 2]))
        };
        let corpus = folder.join("corpus.jsonl");
        fs::write(&corpus, (0..200).map(document).collect::<String>()).expect("a file");
        fs::write(folder.join("tiny.toml"), CONFIG.replace("CORPUS", &corpus.display().to_string())).expect("a file");
        Runs { folder }
    }

    /// The folder of the run named `dir`.
    pub fn dir(&self, dir: &str) -> PathBuf {
        self.folder.join(dir)
    }

    pub fn checkpoint(&self, dir: &str, step: u64) -> PathBuf {
        self.dir(dir).join(format!("checkpoints/step-{step:08}"))
    }

    /// The program, with nothing in its environment that names a rank. `before`: what comes before `train`.
    pub fn command(&self, before: &[&str], dir: &str, sets: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ferrotron"));
        command.env_clear().current_dir(&self.folder).args(before).args(["train", "tiny.toml"]);
        command.args(["--set", &format!("run.dir = {:?}", self.dir(dir).display().to_string())]);
        for set in sets {
            command.args(["--set", set]);
        }
        command
    }

    pub fn start(&self, dir: &str, sets: &[&str]) -> Running {
        self.spawn(self.command(&[], dir, sets))
    }

    pub fn spawn(&self, mut command: Command) -> Running {
        // One file for each process, whichever thread of the tests starts it.
        let stderr = (0..).map(|i| self.folder.join(format!("stderr-{i}"))).find(|path| !path.exists()).expect("there are many numbers");
        let file = File::create_new(&stderr).expect("a fresh file");
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(file).spawn().expect("the program starts");
        Running { child, stderr }
    }

    /// Starts a run and waits for its end, which is good.
    pub fn run(&self, dir: &str, sets: &[&str]) -> String {
        self.start(dir, sets).finish().expect(0)
    }

    /// The numbers of every step and evaluation that do not depend on the clock; the last line of a step counts.
    pub fn metrics(&self, dir: &str) -> BTreeMap<(u64, &'static str), String> {
        let text = fs::read_to_string(self.dir(dir).join("metrics.jsonl")).expect("metrics.jsonl");
        let mut steps = BTreeMap::new();
        // A line that a kill cut short was made again.
        for line in text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()) {
            let kind = if line["eval_loss"].is_null() { "train" } else { "eval" };
            let numbers = ["loss", "eval_loss", "grad_norm", "lr", "tokens", "loss_scale", "skipped"].map(|key| line[key].to_string());
            steps.insert((line["step"].as_u64().expect("a step"), kind), numbers.join(" "));
        }
        steps
    }

    /// That a run has the metrics and the checkpoint of step `last` that another has, bit by bit.
    #[track_caller]
    pub fn assert_equal(&self, dir: &str, reference: &str, last: u64) {
        let (metrics, expected) = (self.metrics(dir), self.metrics(reference));
        for (key, numbers) in expected.range(..=(last, "train")) {
            assert_eq!(metrics.get(key), Some(numbers), "{dir}: {key:?}, against {reference}");
        }
        let difference = diff(&self.checkpoint(dir, last), &self.checkpoint(reference, last)).expect("two checkpoints");
        let facts: Vec<&str> = difference.text.lines().filter(|line| *line != "the configurations differ").collect();
        assert!(difference.equal && facts.len() == 1, "{dir} against {reference}: {}", difference.text);
    }
}

impl Running {
    /// Waits until it has said something.
    pub fn await_text(&mut self, text: &str) {
        let stderr = self.stderr.clone();
        self.await_that(text, || fs::read_to_string(&stderr).expect("its stderr").contains(text));
    }

    pub fn await_file(&mut self, path: &Path) {
        self.await_that(&path.display().to_string(), || path.exists());
    }

    fn await_that(&mut self, what: &str, there: impl Fn() -> bool) {
        let start = Instant::now();
        while !there() {
            let status = self.child.try_wait().expect("our own child");
            assert!(status.is_none() && start.elapsed() < LIMIT, "no {what:?}: {status:?}");
            sleep(Duration::from_millis(1));
        }
    }

    pub fn send(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("it has not been waited for");
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn finish(mut self) -> Done {
        let start = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("our own child") {
                break status;
            }
            if start.elapsed() > LIMIT {
                self.child.kill().expect("our own child");
                self.child.wait().expect("our own child");
                panic!("not done in time: {}", fs::read_to_string(&self.stderr).expect("its stderr"));
            }
            sleep(Duration::from_millis(1));
        };
        Done { status, stderr: fs::read_to_string(&self.stderr).expect("its stderr") }
    }
}

impl Done {
    pub fn was_killed(&self) -> bool {
        self.status.signal() == Some(Signal::KILL.as_raw())
    }

    /// What it said, if it ended with this code.
    #[track_caller]
    pub fn expect(self, code: i32) -> String {
        assert_eq!(self.status.code(), Some(code), "{}", self.stderr);
        self.stderr
    }
}
