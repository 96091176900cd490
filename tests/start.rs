//! How long after the start of its process a run has done its first step.
//!
//! Invariant: held by the clock where the machine has time for us; where it has not, by the processor time of the process, which is at
//! least what its threads would have taken one after the other.
#![cfg(target_os = "linux")]

use ferrotron::device::cpu::Isa;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const TRIES: usize = 6;

/// Kills its process, whatever becomes of the test.
struct Run(Child);

impl Drop for Run {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Run {
    /// Of all its threads, user and system.
    fn processor_time(&self) -> Duration {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.0.id())).expect("the process is there until it is waited for");
        // The name, in parentheses, may hold anything. Fields 14 and 15 are user and system time in hundredths of a second; behind the name
        // comes field 3.
        let behind = stat.rsplit_once(')').expect("a name in parentheses").1;
        let ticks: u64 = behind.split_whitespace().skip(11).take(2).map(|field| field.parse::<u64>().expect("ticks")).sum();
        Duration::from_millis(ticks * 10)
    }
}

/// By the clock and by processor time, until the line of the first step is read.
fn first_step(folder: &Path) -> (Duration, Duration) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ferrotron"));
    command.env_clear().current_dir(env!("CARGO_MANIFEST_DIR")).args(["train", "configs/quickstart.toml"]);
    for set in [format!("run.dir={:?}", folder.display().to_string()), "log.interval=1".into(), "device.kind=cpu".into()] {
        command.args(["--set", &set]);
    }
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    let started = Instant::now();
    let mut run = Run(command.spawn().expect("the program starts"));
    let output = BufReader::new(run.0.stderr.take().expect("stderr is piped"));
    let mut before = Vec::new();
    for line in output.lines() {
        let line = line.expect("the program writes text");
        if line.starts_with("step 1/") {
            return (started.elapsed(), run.processor_time());
        }
        before.push(line);
    }
    panic!("it ended before its first step:\n{}", before.join("\n"));
}

/// Reading the text, taking memory, drawing weights and the step itself, all included. `import torch` alone takes longer.
#[test]
fn the_quickstart_has_done_a_step_within_300_ms() {
    // Without vector instructions, and in a build for debugging, the step alone takes longer.
    let is_fast = Isa::detect() >= Isa::Avx2 && !cfg!(debug_assertions);
    let limit = Duration::from_millis(if is_fast { 300 } else { 5000 });
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("start");
    let mut seen = Vec::new();
    for _ in 0..TRIES {
        if folder.exists() {
            fs::remove_dir_all(&folder).expect("clearing the folder of a test");
        }
        seen.push(first_step(&folder));
        let (clock, processor) = seen[seen.len() - 1];
        println!("{} ms by the clock, {} ms of processors", clock.as_millis(), processor.as_millis());
        if clock <= limit {
            return;
        }
    }
    let least = seen.iter().map(|&(_, processor)| processor).min().expect("there were tries");
    assert!(least <= limit, "(clock, processors) until the first step: {seen:?}, and {limit:?} are allowed");
}
