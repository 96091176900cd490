//! Runs that are interrupted, as real processes: killed at random moments and at file system calls, asked to stop, started again with
//! other settings, on a full disk; and runs whose work is done in other ways, by threads, ranks and recomputation. What they leave must
//! be what a run leaves that nobody disturbed, bit by bit.

#[path = "support/runs.rs"]
mod runs;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
#[path = "support/trace.rs"]
mod trace;

use ferrotron::checkpoint::diff::diff;
use ferrotron::checkpoint::load::Checkpoint;
use ferrotron::rng::Stream;
use runs::{Running, Runs};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// A run of documents that do not see each other, and its last step.
const SHORT: [&str; 3] = ["train.steps=12", "data.document_mask=true", "eval.interval=6"];
const LAST: u64 = 12;

/// A model whose steps take longer than a person takes to press two keys.
const SLOW: [&str; 4] = ["train.global_batch_size=256", "train.seq_len=512", "model.hidden_size=256", "model.intermediate_size=1024"];

/// Kills a run at a random moment, starts it again, and so on until it is done. Gives the number of kills.
fn killed_until_done(runs: &Runs, dir: &str, sets: &[&str], seed: u64, longest: Duration) -> usize {
    let stream = Stream::new(seed, "kills");
    let mut kills = 0;
    loop {
        let running = runs.start(dir, sets);
        if kills < 60 {
            sleep(longest.mul_f64(stream.uniform(kills as u64)));
            running.send(Signal::KILL);
        }
        let done = running.finish();
        if !done.was_killed() {
            done.expect(0);
            return kills;
        }
        kills += 1;
    }
}

fn survives_kills(name: &str, sets: &[&str]) {
    let runs = Runs::new(name);
    let begun = Instant::now();
    runs.run("whole", sets);
    let whole = begun.elapsed();
    for round in 0..4 {
        let dir = format!("killed-{round}");
        let kills = killed_until_done(&runs, &dir, sets, round, whole.mul_f64(0.4));
        println!("{name}, round {round}: killed {kills} times; undisturbed it takes {:.2} s", whole.as_secs_f64());
        runs.assert_equal(&dir, "whole", 40);
    }
}

#[test]
fn killed_at_any_moment_a_run_goes_on_bit_by_bit() {
    survives_kills("killed-f32", &[]);
}

#[test]
fn killed_at_any_moment_in_bf16_saving_beside_no_training() {
    survives_kills("killed-bf16", &["train.dtype=\"bf16\"", "checkpoint.async=false", "checkpoint.keep=1", "data.order=\"sequential\""]);
}

#[test]
fn killed_at_any_moment_in_f16_with_skipped_steps() {
    survives_kills("killed-f16", &["train.dtype=\"f16\"", "train.loss_scale.initial=1e14", "train.loss_scale.growth_interval=6"]);
}

/// The ranks that a launcher has started, when all are there.
fn ranks_of(launcher: &Running, count: usize) -> Vec<Pid> {
    let path = format!("/proc/{0}/task/{0}/children", launcher.id());
    loop {
        let ids = fs::read_to_string(&path).expect("a launcher that runs");
        let ids: Vec<Pid> = ids.split_whitespace().filter_map(|id| id.parse().ok().and_then(Pid::from_raw)).collect();
        if ids.len() == count {
            return ids;
        }
        sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_rank_that_is_killed_costs_a_restart_and_nothing_else() {
    let runs = Runs::new("launched");
    let sets = ["parallel.dp_shard=2", "parallel.zero=2", "train.steps=120"];
    let launch = ["launch", "--nproc-per-node", "2", "--standalone", "--max-restarts", "4", "--shutdown-timeout", "0.2"];
    runs.spawn(runs.command(&launch, "whole", &sets)).finish().expect(0);
    let mut launcher = runs.spawn(runs.command(&launch, "killed", &sets));
    for (victim, step) in [(0, 3), (1, 30)] {
        launcher.await_text(&format!("saved step {step} "));
        kill_process(ranks_of(&launcher, 2)[victim], Signal::KILL).expect("a rank that trains");
        launcher.await_text(&format!("restart {} of 4", victim + 1));
    }
    launcher.finish().expect(0);
    runs.assert_equal("killed", "whole", 120);
}

#[test]
fn asked_to_stop_a_run_saves_and_goes_on_from_there() {
    let runs = Runs::new("signals");
    let mut asked = Vec::new();
    for (signal, dir) in [(Signal::TERM, "term"), (Signal::USR1, "usr1"), (Signal::INT, "int")] {
        let mut running = runs.start(dir, &["train.steps=1000000", "checkpoint.interval=0"]);
        running.await_text("step 5/1000000");
        running.send(signal);
        let said = running.finish().expect(98);
        let step = *runs.metrics(dir).keys().last().map(|(step, _)| step).expect("steps");
        assert!(said.contains(&format!("saved step {step} to ")), "{said}");
        assert!(runs.checkpoint(dir, step).exists(), "{dir}: stopped after step {step}");
        asked.push((dir, step));
    }
    for (dir, step) in asked {
        let (last, reference) = (step + 4, format!("{dir}-whole"));
        let stop = format!("train.stop_after={last}");
        let said = runs.run(dir, &["train.steps=1000000", "checkpoint.interval=0", &stop]);
        assert!(said.contains(&format!("going on after step {step}")) && !said.contains(&format!("step {step}/")), "{said}");
        runs.run(&reference, &["train.steps=1000000", "checkpoint.interval=0", &stop]);
        runs.assert_equal(dir, &reference, last);
        println!("{dir}: stopped after step {step}");
    }
}

#[test]
fn a_second_interrupt_ends_a_run_at_once() {
    let runs = Runs::new("twice");
    let mut running = runs.start("run", &SLOW);
    // It is there when signals are heard.
    running.await_file(&runs.dir("run").join("metrics.jsonl"));
    running.send(Signal::INT);
    sleep(Duration::from_millis(100));
    let begun = Instant::now();
    running.send(Signal::INT);
    running.finish().expect(130);
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    let metrics = fs::read_to_string(runs.dir("run").join("metrics.jsonl")).expect("metrics.jsonl");
    assert_eq!(metrics, "", "it did not even end its first step");
}

#[test]
fn a_start_may_end_early_and_the_schedule_does_not_mind() {
    let runs = Runs::new("stop_after");
    runs.run("whole", &[]);
    for stop in [7, 20, 40] {
        let said = runs.run("parts", &[&format!("train.stop_after={stop}"), "checkpoint.interval=0"]);
        assert!(said.contains(&format!("saved step {stop} to ")), "{said}");
    }
    runs.assert_equal("parts", "whole", 40);
    assert!(runs.run("parts", &[]).contains("nothing to do: 40 steps are done"));
    assert!(runs.run("parts", &["train.stop_after=9"]).contains("nothing to do"), "stop_after may lie behind");
    // A longer run goes on with the same numbers where its schedule is the same.
    let constant = ["schedule.kind=\"constant\"", "schedule.warmup_steps=0"];
    runs.run("short", &[&constant[..], &["train.steps=12"]].concat());
    let said = runs.run("short", &[&constant[..], &["train.steps=21"]].concat());
    assert!(said.contains("train.steps was 12 and is 21"), "{said}");
    runs.run("long", &[&constant[..], &["train.steps=21"]].concat());
    runs.assert_equal("short", "long", 21);
}

#[test]
fn no_resume_starts_anew_and_says_what_is_there() {
    let runs = Runs::new("none");
    runs.run("whole", &["train.steps=12"]);
    runs.run("again", &["train.steps=12", "run.seed=7"]);
    let said = runs.run("again", &["train.steps=12", "checkpoint.resume=\"none\"", "train.stop_after=5"]);
    assert!(said.contains("step 1/12") && !said.contains("going on"), "{said}");
    assert!(said.contains("starts anew beside 3 checkpoints") && said.contains("step-00000012"), "{said}");
    // What the abandoned run left is older than what the new one did, whatever its step.
    let said = runs.run("again", &["train.steps=12"]);
    assert!(said.contains("going on after step 5 from "), "{said}");
    runs.assert_equal("again", "whole", 12);
    assert!(runs.run("fresh", &["train.steps=6", "checkpoint.resume=\"none\""]).contains("step 1/6"));
}

#[test]
fn a_run_may_go_back_to_a_step_or_on_from_a_path() {
    let runs = Runs::new("step");
    runs.run("whole", &["checkpoint.keep=0"]);
    runs.run("back", &["checkpoint.keep=0"]);
    let said = runs.run("back", &["checkpoint.keep=0", "checkpoint.resume=21"]);
    assert!(said.contains("going on after step 21 from ") && said.contains("step 22/40"), "{said}");
    runs.assert_equal("back", "whole", 40);
    let missing = runs.start("back", &["checkpoint.resume=20"]).finish().expect(1);
    assert!(missing.contains("no checkpoint of step 20") && missing.contains("step-00000021"), "{missing}");

    let from = format!("checkpoint.resume={:?}", runs.checkpoint("whole", 30).display().to_string());
    let said = runs.run("elsewhere", &[&from]);
    assert!(said.contains("going on after step 30 from ") && said.contains("step 31/40"), "{said}");
    let (whole, elsewhere) = (runs.metrics("whole"), runs.metrics("elsewhere"));
    assert_eq!(elsewhere, whole.into_iter().filter(|((step, _), _)| *step > 30).collect());
    let folder = format!("checkpoint.resume={:?}", runs.dir("whole/checkpoints").display().to_string());
    let said = runs.start("elsewhere", &[&folder]).finish().expect(1);
    assert!(said.contains("is not a checkpoint") && said.contains("step-00000040 would be one"), "{said}");
}

#[test]
fn what_changed_is_told_and_another_model_is_refused() {
    let runs = Runs::new("changed");
    runs.run("run", &["train.stop_after=6"]);
    let before = files(&runs.dir("run"));
    let other = runs.start("run", &["model.num_layers=3", "model.norm_eps=1e-6", "optimizer.lr=1e-3"]).finish().expect(2);
    for part in ["`model.num_layers` is 3, but ", "of another model: there it was 2", "`model.norm_eps` is 0.000001", "to start anew"] {
        assert!(other.contains(part), "{part}: {other}");
    }
    assert!(!other.contains("optimizer.lr"), "{other}");
    let wide = runs.command(&["launch", "--nproc-per-node", "2", "--standalone"], "run", &[]);
    let wide = runs.spawn(wide).finish().expect(2);
    assert!(wide.contains("`geometry.lanes` = 1 cannot be cut over") && wide.contains("cannot be kept on this layout"), "{wide}");
    assert!(!wide.contains("geometry.lanes = 2"), "another geometry is no way out: {wide}");
    assert_eq!(files(&runs.dir("run")), before, "nothing is written when a run is refused");
    println!("{wide}");
    let sets = ["optimizer.lr=5e-3", "train.micro_batch_size=2", "checkpoint.keep=5", "log.interval=2", "geometry.lanes=2"];
    let said = runs.run("run", &sets);
    assert!(said.contains("optimizer.lr was 0.01 and is 0.005") && said.contains("going on after step 6"), "{said}");
    assert!(said.contains("the run keeps the canonical sums of its checkpoint (shards 1, lanes 1, order lanes)"), "{said}");
    assert!(!said.contains("checkpoint.keep was") && !said.contains("log.interval was"), "{said}");
}

/// Every file of a run and its size.
fn files(folder: &Path) -> Vec<(PathBuf, u64)> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                folders.push(path);
            } else {
                found.push((path.clone(), path.metadata().expect("a file").len()));
            }
        }
    }
    found.sort();
    found
}

fn corrupt(folder: &Path) {
    let names = fs::read_dir(folder).expect("a checkpoint").map(|entry| entry.expect("an entry").path());
    let file = names.into_iter().find(|path| path.extension().is_some_and(|end| end == "safetensors")).expect("a file of tensors");
    let mut bytes = fs::read(&file).expect("a file");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&file, bytes).expect("a file");
}

#[test]
fn a_checkpoint_that_is_not_sound_is_stepped_back_over() {
    let runs = Runs::new("corrupt");
    runs.run("whole", &[]);
    runs.run("run", &["train.stop_after=20"]);
    corrupt(&runs.checkpoint("run", 20));
    let said = runs.run("run", &["train.stop_after=30"]);
    assert!(said.contains("stepped back over") && said.contains("step-00000020: ") && said.contains("was altered"), "{said}");
    assert!(said.contains("going on after step 18 from "), "{said}");
    // A whole file of it is gone.
    fs::remove_file(runs.checkpoint("run", 30).join("index.json")).expect("a file");
    let said = runs.run("run", &[]);
    assert!(said.contains("stepped back over") && said.contains("going on after step 27 from "), "{said}");
    runs.assert_equal("run", "whole", 40);
    let named = fs::read_dir(runs.dir("run/checkpoints")).expect("a folder").map(|entry| entry.expect("an entry").path());
    named.filter(|path| path.is_dir() && path.join("index.json").exists()).for_each(|path| corrupt(&path));
    let said = runs.start("run", &["train.steps=50"]).finish().expect(1);
    assert!(said.contains("not one is sound") && !said.contains("step 1/"), "{said}");
}

#[test]
fn two_runs_in_one_folder_refuse_each_other() {
    let runs = Runs::new("two");
    let mut first = runs.start("run", &SLOW);
    first.await_file(&runs.dir("run").join("metrics.jsonl"));
    let before = fs::read_to_string(runs.dir("run/config.toml")).expect("config.toml");
    let second = runs.start("run", &["train.steps=6"]).finish().expect(1);
    assert!(second.contains("another run is writing to") && second.contains("run/checkpoints"), "{second}");
    assert_eq!(fs::read_to_string(runs.dir("run/config.toml")).expect("config.toml"), before);
    first.send(Signal::KILL);
    assert!(first.finish().was_killed());
    runs.run("run", &["train.steps=6"]);
}

/// Trains with each way and compares with the plain run, bit by bit.
fn assert_alike(runs: &Runs, common: &[&str], ways: &[&[&str]]) {
    let common = [&SHORT[..], common].concat();
    runs.run("plain", &common);
    for (number, way) in ways.iter().enumerate() {
        let dir = format!("way-{number}");
        runs.run(&dir, &[&common[..], way].concat());
        runs.assert_equal(&dir, "plain", LAST);
        println!("{common:?} with {way:?}: equal");
    }
}

#[test]
fn how_one_rank_works_changes_no_bit() {
    for dtype in ["f32", "bf16", "f16"] {
        let runs = Runs::new(&format!("ways-{dtype}"));
        let ways: [&[&str]; 6] = [
            &["train.recompute=\"selective\""],
            &["train.recompute=\"full\""],
            &["device.threads=2"],
            &["device.threads=3", "train.recompute=\"full\"", "train.micro_batch_size=2"],
            &["train.micro_batch_size=4"],
            &["train.micro_batch_size=8", "device.threads=2", "parallel.zero=3", "geometry.order=\"lanes\""],
        ];
        assert_alike(&runs, &[&format!("train.dtype={dtype:?}")], &ways);
    }
}

#[test]
fn how_many_ranks_there_are_changes_no_bit() {
    let runs = Runs::new("ranks");
    let geometry = ["geometry.lanes=2", "geometry.shards=2", "model.num_kv_heads=2"];
    runs.run("plain", &[&SHORT[..], &geometry].concat());
    let layouts: [&[&str]; 4] = [
        &["parallel.dp_shard=2"],
        &["parallel.dp_replicate=2", "train.micro_batch_size=4"],
        &["parallel.tp=2", "train.recompute=\"full\""],
        &["parallel.pp=2", "parallel.zero=3", "geometry.order=\"lanes\""],
    ];
    for (number, layout) in layouts.iter().enumerate() {
        let dir = format!("layout-{number}");
        let sets = [&SHORT[..], &geometry, layout].concat();
        let launcher = runs.command(&["launch", "--nproc-per-node", "2", "--standalone"], &dir, &sets);
        runs.spawn(launcher).finish().expect(0);
        runs.assert_equal(&dir, "plain", LAST);
        println!("{layout:?}: equal");
    }
}

fn state(runs: &Runs, dir: &str, step: u64) -> Value {
    Checkpoint::open(&runs.checkpoint(dir, step)).expect("a checkpoint").index.facts.state
}

/// A scale that no f16 gradient survives.
const ABSURD: [&str; 4] = ["train.dtype=\"f16\"", "train.loss_scale.initial=1e12", "train.loss_scale.backoff=0.1", "eval.interval=0"];

#[test]
fn steps_with_an_absurd_scale_are_skipped_and_change_nothing() {
    let runs = Runs::new("skips");
    for stop in [1, 3] {
        let said = runs.run(&format!("{stop}"), &[&ABSURD[..], &[&format!("train.stop_after={stop}")]].concat());
        assert!(said.contains(&format!("step {stop} is skipped: the gradient of model.")) && said.contains("skipped"), "{said}");
    }
    let difference = diff(&runs.checkpoint("1", 1), &runs.checkpoint("3", 3)).expect("two checkpoints");
    assert!(difference.equal, "{}", difference.text);
    assert_eq!((&state(&runs, "3", 3)["updates"], &state(&runs, "3", 3)["loss_scale"]["skips"]), (&Value::from(0), &Value::from(3)));

    runs.run("3", &ABSURD);
    runs.run("whole", &ABSURD);
    runs.assert_equal("3", "whole", 40);
    let state = state(&runs, "whole", 40);
    let (updates, skips) = (state["updates"].as_u64().expect("a number"), state["loss_scale"]["skips"].as_u64().expect("a number"));
    assert!(updates + skips == 40 && (4..10).contains(&skips), "{state}");
    let loss = |step: u64| -> f64 {
        let line = &runs.metrics("whole")[&(step, "train")];
        line.split(' ').next().and_then(|loss| loss.parse().ok()).expect("a loss")
    };
    println!("{skips} steps skipped; loss {} at the start, {} in the end", loss(1), loss(40));
    assert!(loss(40) < 0.8 * loss(1), "it learns once the scale fits: {} and {}", loss(1), loss(40));
}

#[test]
fn a_run_that_diverges_ends_with_advice() {
    let runs = Runs::new("diverges");
    for (dtype, lr) in [("f16", "1e6"), ("bf16", "1e38")] {
        let sets =
            [&format!("train.dtype={dtype:?}"), &format!("optimizer.lr={lr}"), "train.loss_scale.max_skips=4", "schedule.warmup_steps=0"];
        let said = runs.start(dtype, &sets.map(|set| set as &str)).finish().expect(1);
        for part in ["is skipped: the gradient of ", "4 steps in a row", "lower optimizer.lr"] {
            assert!(said.contains(part), "{dtype}: {part}: {said}");
        }
        assert_eq!(said.contains("does not fit f16"), dtype == "f16", "{said}");
        println!("{dtype}: {}", said.lines().filter(|line| line.starts_with("error") || line.contains("because")).collect::<String>());
    }
}

/// A file system of its own for the checkpoints of a run; unmounted at the end.
struct Disk(PathBuf);

impl Disk {
    fn mount(folder: PathBuf, size: &str) -> Option<Disk> {
        fs::create_dir_all(&folder).expect("a folder");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &format!("size={size}"), "none"]).arg(&folder).output();
        match mounted {
            Ok(output) if output.status.success() => return Some(Disk(folder)),
            Ok(output) => println!("skipped: no file system can be mounted here: {}", String::from_utf8_lossy(&output.stderr)),
            Err(error) => println!("skipped: mount cannot be run: {error}"),
        }
        None
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).output();
    }
}

#[test]
fn a_full_disk_costs_checkpoints_and_no_training() {
    let runs = Runs::new("full");
    runs.run("whole", &[]);
    let Some(disk) = Disk::mount(runs.dir("run/checkpoints"), "1400k") else { return };
    // All are kept until there is no more room.
    let said = runs.start("run", &["checkpoint.keep=0"]).finish().expect(1);
    assert!(said.contains("saved step 3 to ") && said.contains("step 40/40"), "{said}");
    let failed = said.lines().filter(|line| line.contains("was not saved") && line.contains("training goes on")).collect::<Vec<_>>();
    assert!(failed.len() > 3, "{said}");
    assert!(failed.iter().all(|line| line.contains(&*disk.0.to_string_lossy())), "{failed:#?}");
    assert!(said.contains("error: the last checkpoint was not written"), "{said}");
    println!("{}", failed[0]);
    // Room comes back when few are kept.
    let oldest = runs.checkpoint("run", 3);
    fs::remove_dir_all(&oldest).expect("a checkpoint");
    let said = runs.run("run", &["checkpoint.keep=1"]);
    assert!(said.contains("going on after step ") && said.contains("saved step 40 to "), "{said}");
    runs.assert_equal("run", "whole", 40);
}

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod sweeps {
    use crate::runs::Runs;
    use crate::trace::{Fault, Traced, run};
    use std::fs;

    /// Tokens are made once: what is swept is the run.
    const SETS: [&str; 4] = ["train.steps=9", "checkpoint.keep=2", "eval.interval=0", "data.cache=\"cache\""];
    /// Calls that are meddled with, of all that a run makes.
    const SAMPLE: usize = 25;

    fn traced(runs: &Runs, dir: &str, under: &str, fault: Option<(usize, Fault)>) -> Traced {
        let under = runs.dir(dir).join(under);
        run(&mut runs.command(&[], dir, &SETS), &under, fault)
            .expect("tracing one's own child must be permitted for this test: see ptrace(2) and kernel.yama.ptrace_scope")
    }

    /// Meddles with calls below `under`, spread over a whole run, one run for each; then the run is started again until it is done.
    fn sweep(name: &str, under: &str, faults: &[Fault], look: impl Fn(&Runs, &Traced, &str)) {
        let runs = Runs::new(name);
        runs.run("whole", &SETS);
        fs::remove_dir_all(runs.dir("whole")).expect("our own folder");
        let count = traced(&runs, "whole", under, None).calls.len();
        assert!(count > 60, "three saves make more than {count} calls: the tracer misses some");
        for i in 0..SAMPLE {
            let (number, fault) = (1 + i * count / SAMPLE, faults[i % faults.len()]);
            let traced = traced(&runs, "run", under, Some((number, fault)));
            let call = traced.calls.get(number - 1).map_or("no call", String::as_str);
            let case = format!("{fault:?} at call {number} of {count}, {call}");
            look(&runs, &traced, &case);
            runs.run("run", &SETS);
            runs.assert_equal("run", "whole", 9);
            println!("{case}: the run went on");
            fs::remove_dir_all(runs.dir("run")).expect("our own folder");
        }
    }

    #[test]
    fn killed_at_file_system_calls() {
        sweep("calls-killed", "", &[Fault::Kill, Fault::Torn], |_, traced, case| {
            assert!(traced.status.is_none() || traced.status == Some(0), "{case}: {}", traced.output);
        });
    }

    #[test]
    fn failing_calls_of_saves_cost_checkpoints_and_no_training() {
        let faults = [Fault::Errno(libc::ENOSPC), Fault::ErrnoFromHere(libc::EIO), Fault::Short, Fault::Errno(libc::EIO)];
        sweep("calls-failing", "checkpoints", &faults, |runs, traced, case| {
            let output = &traced.output;
            assert!(!output.contains("panicked"), "{case}: {output}");
            let trained = output.contains("step 9/9");
            let told = output.contains(&*runs.dir("run").to_string_lossy());
            match traced.status {
                Some(0) => assert!(trained, "{case}: {output}"),
                // It could not begin, or its last checkpoint is missing: either way it says where.
                Some(1) => assert!(told && (!output.contains("step 1/9") || trained), "{case}: {output}"),
                other => panic!("{case}: {other:?}: {output}"),
            }
        });
    }
}
