//! What a run says while it trains: one line per step to `metrics.jsonl`, and a progress bar or plain lines to stderr.
//!
//! This is the only place in `train/` that looks at a clock.
//!
//! Invariant: every optimizer step makes exactly one line of `metrics.jsonl`, written by one call, whose floats read back to the same
//! bits (one that is not finite is `null`); what is printed is derived from the same `Report`.

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use std::fs::{File, OpenOptions};
use std::io::{IsTerminal, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The clock of one step, from before its batch is asked for until its update is done.
pub struct StepClock {
    start: Instant,
    data_wait: Duration,
}

impl StepClock {
    pub fn start() -> StepClock {
        StepClock { start: Instant::now(), data_wait: Duration::ZERO }
    }

    /// The batch is here: all time so far was spent waiting for it.
    pub fn data_arrived(&mut self) {
        self.data_wait = self.start.elapsed();
    }

    pub fn seconds(&self) -> f64 {
        self.start.elapsed().as_secs_f64()
    }
}

/// What the training loop knows of a step; the clock knows the rest.
pub struct Step {
    /// Counted from 1.
    pub step: u64,
    pub loss: f64,
    /// Before clipping.
    pub grad_norm: f64,
    pub lr: f64,
    /// Seen so far, over all ranks.
    pub tokens: u64,
    /// Time in which communication held up computation.
    pub comm_exposed_s: f64,
    pub memory_peak_bytes: u64,
    pub loss_scale: Option<f64>,
    /// Whether the update was left out, because the gradient was not finite.
    pub skipped: bool,
}

/// A line of `metrics.jsonl`.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub step: u64,
    pub loss: f64,
    pub grad_norm: f64,
    pub lr: f64,
    pub tokens: u64,
    pub tokens_per_s: f64,
    pub step_s: f64,
    pub data_wait_s: f64,
    pub comm_exposed_s: f64,
    /// Share of the devices' peak; none where the peak is not known.
    pub mfu: Option<f64>,
    pub memory_peak_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<f64>,
    pub skipped: bool,
    pub incarnation: u64,
}

/// A validation line of `metrics.jsonl`.
#[derive(Serialize)]
struct Evaluation {
    step: u64,
    eval_loss: f64,
    incarnation: u64,
}

/// The facts of a run that its reports need.
pub struct Facts {
    pub total_steps: u64,
    /// Steps between printed lines.
    pub interval: u64,
    /// Over all ranks.
    pub tokens_per_step: u64,
    /// Forward and backward, as `mfu` counts them.
    pub flops_per_token: f64,
    /// FLOP/s of all devices together at their best; `None`: not known, and no MFU is reported.
    pub peak_flops: Option<f64>,
    /// How often the run had been started before.
    pub incarnation: u64,
}

/// Every rank has one; rank 0's speaks for all, the others' only keep a log.
pub struct Reporter {
    facts: Facts,
    metrics: Option<File>,
    log: File,
    bar: Option<ProgressBar>,
    /// Mean seconds of recent steps, for the time that is left.
    pace: Option<f64>,
}

impl Reporter {
    /// Appends to `metrics.jsonl` (rank 0) and `log/rank-N.log` in `run_dir`, which are made if they are not there.
    pub fn new(run_dir: &Path, rank: usize, facts: Facts) -> Result<Reporter> {
        let logs = run_dir.join("log");
        std::fs::create_dir_all(&logs).with_context(|| format!("making the folder {}", logs.display()))?;
        let open = |path: PathBuf| open_lines(&path).with_context(|| format!("opening {}", path.display()));
        let metrics = if rank == 0 { Some(open(run_dir.join("metrics.jsonl"))?) } else { None };
        let bar = (rank == 0 && std::io::stderr().is_terminal()).then(|| {
            let style = ProgressStyle::with_template("{bar:20} {msg}").expect("the template is well-formed");
            ProgressBar::with_draw_target(Some(facts.total_steps), ProgressDrawTarget::stderr()).with_style(style)
        });
        Ok(Reporter { facts, metrics, log: open(logs.join(format!("rank-{rank}.log")))?, bar, pace: None })
    }

    /// Ends the step of `clock`: one line of metrics, and the printed line where it is due.
    pub fn step(&mut self, step: Step, clock: &StepClock) -> Result<Report> {
        let step_s = clock.seconds();
        let tokens_per_s = self.facts.tokens_per_step as f64 / step_s;
        let report = Report {
            step: step.step,
            loss: step.loss,
            grad_norm: step.grad_norm,
            lr: step.lr,
            tokens: step.tokens,
            tokens_per_s,
            step_s,
            data_wait_s: clock.data_wait.as_secs_f64(),
            comm_exposed_s: step.comm_exposed_s,
            mfu: self.facts.peak_flops.map(|peak| tokens_per_s * self.facts.flops_per_token / peak),
            memory_peak_bytes: step.memory_peak_bytes,
            loss_scale: step.loss_scale,
            skipped: step.skipped,
            incarnation: self.facts.incarnation,
        };
        self.append(&report)?;
        // The first step warms up caches and memory; those after it outweigh it soon.
        let pace = self.pace.map_or(step_s, |pace| 0.9 * pace + 0.1 * step_s);
        self.pace = Some(pace);
        let total = self.facts.total_steps;
        let left = pace * total.saturating_sub(report.step) as f64;
        let text = line(&report, total, left);
        let due = report.step.is_multiple_of(self.facts.interval) || report.step == total;
        if due {
            self.log(&text);
        }
        match &self.bar {
            Some(bar) => {
                bar.set_position(report.step);
                bar.set_message(text);
            }
            None if due && self.metrics.is_some() => print_line(&text),
            None => {}
        }
        Ok(report)
    }

    /// A loss on the validation data after `step`.
    pub fn evaluation(&mut self, step: u64, eval_loss: f64) -> Result<()> {
        self.append(&Evaluation { step, eval_loss, incarnation: self.facts.incarnation })?;
        self.say(&format!("step {step}/{}  eval loss {eval_loss:.4}", self.facts.total_steps));
        Ok(())
    }

    /// A line between those of the steps.
    pub fn say(&self, text: &str) {
        self.log(text);
        match &self.bar {
            Some(bar) => bar.println(text),
            None if self.metrics.is_some() => print_line(text),
            None => {}
        }
    }

    /// Into this rank's log. A run goes on when the log cannot be written: its numbers are in `metrics.jsonl`.
    fn log(&self, text: &str) {
        let _ = writeln!(&self.log, "{text}");
    }

    /// Leaves the last state of the bar standing.
    pub fn finish(self) {
        if let Some(bar) = &self.bar {
            bar.abandon();
        }
    }

    fn append(&mut self, line: &impl Serialize) -> Result<()> {
        let Some(metrics) = &mut self.metrics else { return Ok(()) };
        let mut text = serde_json::to_string(line).context("a line of metrics is plain numbers")?;
        text.push('\n');
        metrics.write_all(text.as_bytes()).context("writing metrics.jsonl")
    }
}

/// Opens for appending. A last line that a crash cut short is ended, so that it spoils no other.
fn open_lines(path: &Path) -> std::io::Result<File> {
    let mut file = OpenOptions::new().create(true).read(true).append(true).open(path)?;
    if file.metadata()?.len() > 0 {
        file.seek(SeekFrom::End(-1))?;
        let mut last = [0];
        file.read_exact(&mut last)?;
        if last != [b'\n'] {
            file.write_all(b"\n")?;
        }
    }
    Ok(file)
}

/// A run goes on when nobody reads what it prints, so a closed stderr is no error.
fn print_line(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

/// The line of a step; `left`: seconds until the end of the run.
pub fn line(report: &Report, total_steps: u64, left: f64) -> String {
    let share = |seconds: f64| format!("{:.0}%", 100.0 * (seconds / report.step_s).clamp(0.0, 1.0));
    let mut parts = vec![
        format!("step {}/{total_steps}", report.step),
        format!("loss {:.4}", report.loss),
        format!("norm {:.2}", report.grad_norm),
        format!("lr {:.1e}", report.lr),
        format!("tok/s {}", short_count(report.tokens_per_s)),
    ];
    parts.extend(report.mfu.map(|mfu| format!("mfu {:.0}%", 100.0 * mfu)));
    parts.push(format!("mem {}", short_bytes(report.memory_peak_bytes)));
    parts.extend(report.loss_scale.map(|scale| format!("scale {scale}")));
    parts.push(format!("wait data {} comm {}", share(report.data_wait_s), share(report.comm_exposed_s)));
    parts.push(format!("eta {}", short_time(left)));
    if report.skipped {
        parts.push("skipped".to_string());
    }
    parts.join("  ")
}

/// Three digits and a power of 1000: `18.4k`.
pub fn short_count(count: f64) -> String {
    let (mut scaled, mut units) = (count, ["", "k", "M", "G", "T", "P"].iter());
    let mut unit = units.next().expect("there are units");
    // 999.5 would be printed as 1000.
    while scaled >= 999.5 {
        let Some(next) = units.next() else { break };
        (scaled, unit) = (scaled / 1000.0, next);
    }
    let digits = if unit.is_empty() || scaled >= 99.95 {
        0
    } else if scaled >= 9.995 {
        1
    } else {
        2
    };
    format!("{scaled:.digits$}{unit}")
}

/// One digit after the point and a power of 1024: `1.2 GiB`.
pub fn short_bytes(bytes: u64) -> String {
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let (mut scaled, mut units) = (bytes as f64 / 1024.0, ["KiB", "MiB", "GiB", "TiB", "PiB"].iter());
    let mut unit = units.next().expect("there are units");
    while scaled >= 1023.95 {
        let Some(next) = units.next() else { break };
        (scaled, unit) = (scaled / 1024.0, next);
    }
    format!("{scaled:.1} {unit}")
}

/// `01:12`, `2:01:12` or `3d 02:01`.
pub fn short_time(seconds: f64) -> String {
    if !seconds.is_finite() {
        return "?".to_string();
    }
    let seconds = seconds.round().max(0.0) as u64;
    let (days, hours, minutes) = (seconds / 86400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours) {
        (0, 0) => format!("{minutes:02}:{:02}", seconds % 60),
        (0, _) => format!("{hours}:{minutes:02}:{:02}", seconds % 60),
        _ => format!("{days}d {hours:02}:{minutes:02}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Report {
        Report {
            step: 120,
            loss: 4.10234,
            grad_norm: 0.912,
            lr: 2.9e-4,
            tokens: 983040,
            tokens_per_s: 18432.1,
            step_s: 0.4444,
            data_wait_s: 0.0001,
            comm_exposed_s: 0.0133,
            mfu: Some(0.412),
            memory_peak_bytes: 1_288_490_188,
            loss_scale: None,
            skipped: false,
            incarnation: 0,
        }
    }

    #[test]
    fn the_line_of_a_step() {
        let full = "step 120/300  loss 4.1023  norm 0.91  lr 2.9e-4  tok/s 18.4k  mfu 41%  mem 1.2 GiB  wait data 0% comm 3%  eta 01:12";
        assert_eq!(line(&example(), 300, 72.3), full);
        let other = Report { mfu: None, loss_scale: Some(32768.0), skipped: true, ..example() };
        let line = line(&other, 300, 72.3);
        assert!(!line.contains("mfu") && line.contains("scale 32768") && line.ends_with("skipped"), "{line}");
    }

    #[test]
    fn counts_bytes_and_times_are_short() {
        let counts =
            [(0.0, "0"), (950.4, "950"), (999.6, "1.00k"), (18432.1, "18.4k"), (184_321.0, "184k"), (1.84e6, "1.84M"), (9.996e3, "10.0k")];
        for (count, text) in counts {
            assert_eq!(short_count(count), text);
        }
        for (bytes, text) in [(1023, "1023 B"), (1024, "1.0 KiB"), (1_048_570, "1.0 MiB"), (1_288_490_188, "1.2 GiB")] {
            assert_eq!(short_bytes(bytes), text);
        }
        for (seconds, text) in [(0.4, "00:00"), (72.3, "01:12"), (7272.0, "2:01:12"), (266_460.0, "3d 02:01"), (f64::NAN, "?")] {
            assert_eq!(short_time(seconds), text);
        }
    }

    #[test]
    fn metrics_read_back_to_the_same_bits_and_survive_a_torn_line() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("target/tmp/report-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a temporary folder");
        std::fs::write(dir.join("metrics.jsonl"), "{\"step\": 1, \"lo").expect("a torn line");
        let facts = Facts { total_steps: 9, interval: 100, tokens_per_step: 64, flops_per_token: 1.0, peak_flops: None, incarnation: 3 };
        let mut reporter = Reporter::new(&dir, 0, facts).expect("a writable folder");
        let (loss, lr) = (f64::from(1.1f32) / 3.0, 0.1 + 0.2);
        let step = Step {
            step: 2,
            loss,
            grad_norm: f64::INFINITY,
            lr,
            tokens: 128,
            comm_exposed_s: 0.0,
            memory_peak_bytes: 7,
            loss_scale: None,
            skipped: true,
        };
        reporter.step(step, &StepClock::start()).expect("a line");
        reporter.evaluation(2, 0.1).expect("a line");
        let text = std::fs::read_to_string(dir.join("metrics.jsonl")).expect("metrics");
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3);
        let step: serde_json::Value = serde_json::from_str(lines[1]).expect("a whole line");
        assert_eq!(step["loss"].as_f64().map(f64::to_bits), Some(loss.to_bits()));
        assert_eq!(step["lr"].as_f64().map(f64::to_bits), Some(lr.to_bits()));
        assert!(step["grad_norm"].is_null() && step["mfu"].is_null() && step.get("loss_scale").is_none());
        assert_eq!(step["incarnation"], 3);
        let evaluation: serde_json::Value = serde_json::from_str(lines[2]).expect("a whole line");
        assert_eq!((&evaluation["step"], &evaluation["eval_loss"]), (&serde_json::json!(2), &serde_json::json!(0.1)));
        std::fs::remove_dir_all(&dir).expect("its own folder");
    }
}
