//! The program itself, as its users start it: ranks are processes that talk over TCP, and what a run leaves on disk is what counts.
//!
//! Invariant: no test waits for ever; a command that is not done in time is killed and the test fails.

use ferrotron::checkpoint::diff::diff;
use rustix::process::{Pid, Signal, kill_process};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// Longer than any command here takes on a busy machine, shorter than any deadline within a run.
const LIMIT: Duration = Duration::from_secs(30);

/// A folder with a configuration and a small corpus, removed at the end.
struct Place(PathBuf);

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// How a command ended, and what it said.
struct Done {
    code: Option<i32>,
    said: String,
}

impl Done {
    fn expect(self, code: i32) -> String {
        assert_eq!(self.code, Some(code), "the exit code of a command that said:\n{}", self.said);
        self.said
    }
}

struct Running {
    child: Child,
    output: PathBuf,
}

impl Running {
    fn finish(mut self) -> Done {
        let begun = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("our own child") {
                break status;
            }
            if begun.elapsed() > LIMIT {
                self.child.kill().expect("our own child");
                self.child.wait().expect("our own child");
                panic!("not done in {LIMIT:?}:\n{}", read(&self.output));
            }
            thread::sleep(Duration::from_millis(5));
        };
        Done { code: status.code(), said: read(&self.output) }
    }

    /// The process that is rank `rank` of this launch, once it is there.
    fn rank(&self, rank: usize) -> Pid {
        let wanted = format!("RANK={rank}");
        let launcher = self.child.id();
        let children = read(Path::new(&format!("/proc/{launcher}/task/{launcher}/children")));
        let is_wanted = |child: &&str| {
            let environment = fs::read(format!("/proc/{child}/environ")).unwrap_or_default();
            environment.split(|&byte| byte == 0).any(|variable| variable == wanted.as_bytes())
        };
        let child = children.split_whitespace().find(is_wanted).unwrap_or_else(|| panic!("no {wanted} among {children}"));
        Pid::from_raw(child.parse().expect("a number")).expect("not zero")
    }
}

impl Place {
    fn new(name: &str, steps: u64) -> Place {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("processes-{name}-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a writable folder");
        let line = |i: u64| format!("{i} times 7919 is {}, and the rest by 997 is {}.\n", i * 7919, i * 7919 % 997);
        fs::write(folder.join("corpus.txt"), (0..400).map(line).collect::<String>()).expect("a writable folder");
        let text = format!(
            "[model]\nfamily = \"llama\"\nhidden_size = 32\nintermediate_size = 64\nnum_layers = 4\nnum_heads = 4\nnum_kv_heads = 1\n\
             tie_word_embeddings = true\n[data]\nsources = [\"corpus.txt\"]\n\
             [train]\nsteps = {steps}\nseq_len = 16\nglobal_batch_size = 8\ndtype = \"bf16\"\n[optimizer]\nlr = 1e-2\n\
             [geometry]\nshards = 2\nlanes = 2\norder = \"lanes\"\n[checkpoint]\ninterval = 10\nkeep = 100\n"
        );
        fs::write(folder.join("tiny.toml"), text).expect("a writable folder");
        Place(folder)
    }

    /// Starts `train` with these keys: a process of its own for one rank, else under `launch`.
    fn start(&self, run: &str, ranks: usize, keys: &[&str]) -> Running {
        let (ranks, dir) = (ranks.to_string(), format!("run.dir={run}"));
        let mut words = if ranks == "1" { Vec::new() } else { vec!["launch", "--nproc-per-node", &ranks] };
        words.extend(["train", "tiny.toml", "--set", &dir]);
        words.extend(keys.iter().flat_map(|key| ["--set", key]));
        self.command(&words, run)
    }

    /// Starts the program with these words. What it says goes to a file of this name.
    fn command(&self, words: &[&str], name: &str) -> Running {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ferrotron"));
        command.args(words);
        let output = self.0.join(format!("{name}.output"));
        let file = File::create(&output).expect("a writable folder");
        command.current_dir(&self.0).env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command.stdin(Stdio::null()).stdout(file.try_clone().expect("a file")).stderr(file);
        Running { child: command.spawn().expect("the program starts"), output }
    }

    fn train(&self, run: &str, ranks: usize, keys: &[&str]) -> String {
        self.start(run, ranks, keys).finish().expect(0)
    }

    /// Loss and norm of every step, as they were written. The last line of a step counts.
    fn metrics(&self, run: &str) -> BTreeMap<u64, [String; 2]> {
        let text = read(&self.0.join(run).join("metrics.jsonl"));
        let number = |line: &str, key: &str| {
            let (_, rest) = line.split_once(&format!("\"{key}\":")).unwrap_or_else(|| panic!("no {key} in {line}"));
            rest.split([',', '}']).next().expect("a split has a first part").to_string()
        };
        let of_line = |line| (number(line, "step").parse().expect("a number"), ["loss", "grad_norm"].map(|key| number(line, key)));
        text.lines().map(of_line).collect()
    }

    /// Fails unless both runs have the same numbers in every step and the same checkpoint after the last.
    fn assert_equal(&self, run: &str, reference: &str, steps: u64) {
        let (metrics, expected) = (self.metrics(run), self.metrics(reference));
        assert_eq!(expected.len() as u64, steps, "{reference}");
        assert_eq!(metrics, expected, "losses and norms of {run} and of {reference}");
        let checkpoint = |run: &str| self.0.join(run).join(format!("checkpoints/step-{steps:08}"));
        let difference = diff(&checkpoint(run), &checkpoint(reference)).expect("two checkpoints");
        assert!(difference.equal, "{run} and {reference}:\n{}", difference.text);
    }
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Name, ranks and keys, of runs with sums in the order of lanes and of rows.
type Layouts = [(&'static str, usize, &'static [&'static str])];

const LANES: &Layouts = &[
    ("tp2", 2, &["parallel.tp=2"]),
    ("tp2-whole-stream", 2, &["parallel.tp=2", "parallel.sequence_parallel=false"]),
    ("pp2", 2, &["parallel.pp=2"]),
    ("dp2-zero0", 2, &["parallel.zero=0"]),
    ("dp2-zero1", 2, &["parallel.zero=1", "train.micro_batch_size=2"]),
    ("dp2-zero2", 2, &["parallel.zero=2"]),
    ("dp2-zero3", 2, &["parallel.zero=3", "train.recompute=full"]),
    ("replicated", 2, &["parallel.dp_replicate=2"]),
    ("interleaved", 2, &["parallel.pp=2", "parallel.pp_schedule=interleaved", "parallel.pp_chunks=2"]),
    ("zero-bubble", 4, &["parallel.pp=2", "parallel.pp_schedule=zero_bubble", "parallel.zero=2"]),
    ("tp2-pp2-dp2", 8, &["parallel.tp=2", "parallel.pp=2"]),
];

const ROWS: &Layouts = &[
    ("rows-zero2", 2, &["geometry.order=rows", "parallel.zero=2"]),
    ("rows-tp2-zero3", 4, &["geometry.order=rows", "parallel.tp=2", "parallel.zero=3"]),
    ("rows-pp2-zero1", 4, &["geometry.order=rows", "parallel.pp=2", "parallel.zero=1", "train.recompute=selective"]),
];

#[test]
fn every_layout_leaves_what_one_rank_leaves() {
    const STEPS: u64 = 4;
    let place = Place::new("layouts", STEPS);
    for (reference, keys, layouts) in [("one", &[][..], LANES), ("one-rows", &["geometry.order=rows"], ROWS)] {
        place.train(reference, 1, keys);
        for (run, ranks, keys) in layouts {
            let begun = Instant::now();
            place.train(run, *ranks, keys);
            place.assert_equal(run, reference, STEPS);
            println!("{run}: equal to one rank ({:.2} s)", begun.elapsed().as_secs_f64());
        }
    }
}

#[test]
fn a_killed_rank_ends_the_run_which_goes_on_as_if_nothing_had_been() {
    const STEPS: u64 = 60;
    let place = Place::new("killed", STEPS);
    place.train("one", 1, &[]);
    let running = place.start("killed", 4, &["parallel.tp=2"]);
    let metrics = place.0.join("killed/metrics.jsonl");
    let begun = Instant::now();
    while fs::read_to_string(&metrics).map_or(0, |text| text.lines().count()) < 25 {
        assert!(begun.elapsed() < LIMIT, "25 steps are not done:\n{}", read(&running.output));
        thread::sleep(Duration::from_millis(2));
    }
    kill_process(running.rank(2), Signal::KILL).expect("rank 2 runs");
    // 128 and the signal, as shells tell it.
    let said = running.finish().expect(128 + Signal::KILL.as_raw());
    assert!(said.contains("launch: rank 2 failed first: killed by SIGKILL"), "{said}");
    for rank in ["", "[rank 1] ", "[rank 3] "] {
        let told = said.lines().filter(|line| line.starts_with(&format!("{rank}  because: "))).any(|line| line.contains("rank 2 is gone"));
        assert!(told, "`{rank}` does not name who is gone:\n{said}");
    }
    assert!(read(&place.0.join("killed/failure.json")).contains("rank 2 is gone"));
    let said = place.train("killed", 4, &["parallel.tp=2", "train.stop_after=45"]);
    assert!([10, 20, 30, 40].iter().any(|step| said.contains(&format!("going on after step {step} from"))), "{said}");
    // The rest on another layout.
    let said = place.train("killed", 4, &["parallel.pp=2", "parallel.pp_schedule=zero_bubble", "parallel.zero=3"]);
    assert!(said.contains("going on after step 45 from"), "{said}");
    place.assert_equal("killed", "one", STEPS);
}

#[test]
fn a_world_that_does_not_fit_is_told_what_would() {
    let place = Place::new("world", 2);
    let said = place.start("three", 3, &["parallel.tp=2"]).finish().expect(2);
    assert!(said.contains("does not divide the world of 3 ranks") && said.contains("a world of 2 or 4 ranks"), "{said}");
    let said = place.start("one", 1, &["parallel.pp=2"]).finish().expect(2);
    assert!(said.contains("does not divide the world of 1 ranks") && said.contains("a world of 2 ranks"), "{said}");
    assert!(!place.0.join("three").exists() && !place.0.join("one").exists(), "nothing is written");
}

#[test]
fn canonical_sums_move_only_when_told_to() {
    let place = Place::new("moving", 6);
    place.train("run", 1, &["train.stop_after=2"]);
    let keys = ["parallel.tp=4", "geometry.shards=0", "geometry.lanes=0"];
    let said = place.start("run", 4, &keys).finish().expect(2);
    for words in [
        "the checkpoint's canonical sums (shards 2, lanes 2, order lanes) cannot be kept on this layout",
        "parallel.tp = 1 or 2",
        "geometry.move = true",
    ] {
        assert!(said.contains(words), "`{words}` is not in:\n{said}");
    }
    let said = place.train("run", 4, &[&keys[..], &["geometry.move=true", "train.stop_after=4"]].concat());
    let note = "the run's canonical sums move from (shards 2, lanes 2, order lanes) to (shards 4, lanes 1, order lanes)";
    assert!(said.contains(note), "{said}");
    // What it has moved to is kept from then on.
    let said = place.train("run", 1, &["geometry.shards=0", "geometry.lanes=0"]);
    assert!(!said.contains("canonical sums move"), "{said}");
    assert_eq!(place.metrics("run").len(), 6);
}

#[test]
fn imported_weights_begin_on_any_layout() {
    let place = Place::new("imported", 4);
    place.train("run", 1, &["train.stop_after=2"]);
    for words in [["export", "run/checkpoints/step-00000002", "folder"], ["import", "folder", "weights"]] {
        place.command(&[&["checkpoint"], &words[..]].concat(), "checkpoint").finish().expect(0);
    }
    let keys = ["checkpoint.resume=weights", "geometry.lanes=4", "geometry.order=rows"];
    place.train("one", 1, &keys);
    let said = place.train("tp2", 4, &[&keys[..], &["parallel.tp=2"]].concat());
    assert!(said.contains("going on after step 0 from weights") && !said.contains("canonical sums"), "{said}");
    place.assert_equal("tp2", "one", 4);
}
