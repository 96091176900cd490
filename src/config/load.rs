//! From a file and `--set` arguments to a `Config`: every key is read here, with its range and its default.
//!
//! Invariant: all problems are reported at once, and a `Config` comes out only when there are none. Reading takes text and paths;
//! of the world it opens only the configuration file, a model's `config.json`, a tokenizer whose size is asked for and a schedule file.

use super::reader::{COUNT, DIM, Findings, Reader, SOME, nearest};
use super::source::{Problem, Problems, Source};
use super::{
    Checkpoint, Config, Data, DataOrder, DataSource, Device, DeviceKind, Eval, Geometry, Log, Matmul, Offload, Optimizer, OptimizerKind,
    Parallel, Resume, Run, Schedule, ScheduleKind, SumOrder, WsdShape,
};
use super::{check, load_model, load_train};
use std::path::{Path, PathBuf};
use toml::{Table, Value};

/// The schedules that have a name; anything else is the path of a file.
pub const PP_SCHEDULES: [&str; 7] = ["gpipe", "1f1b", "interleaved", "breadth_first", "zero_bubble", "zbv", "dualpipe_v"];

const SECTIONS: [&str; 12] =
    ["run", "model", "data", "train", "parallel", "geometry", "optimizer", "schedule", "checkpoint", "eval", "log", "device"];

impl Config {
    /// Reads the file at `path` and applies `overrides`, each `section.key=value`.
    pub fn load(path: &Path, overrides: &[String]) -> Result<(Config, Source), Problems> {
        let name = path.display().to_string();
        match std::fs::read_to_string(path) {
            Ok(text) => Config::parse(&name, &text, overrides),
            Err(error) => {
                let problem = Problem::new("", format!("the configuration cannot be read: {error}")).help("give the path of a TOML file");
                Err(Problems { source: Source::new(&name, ""), problems: vec![problem] })
            }
        }
    }

    /// The same from text; `name` is what messages call it.
    pub fn parse(name: &str, text: &str, overrides: &[String]) -> Result<(Config, Source), Problems> {
        let mut source = Source::new(name, text);
        let mut problems = Vec::new();
        let mut table = source.parse(&mut problems);
        let readable = problems.is_empty();
        for argument in overrides {
            source.set(argument, &mut table, &mut problems);
        }
        // Where the file is no TOML its keys are not known, and each would be reported as missing.
        if !readable {
            return Err(Problems { source, problems });
        }
        let stem = Path::new(name).file_stem().map_or("run".to_string(), |stem| stem.to_string_lossy().into_owned());
        let mut findings = Findings::of(problems);
        match read(table, &stem, &mut findings) {
            Some(config) if findings.problems.is_empty() => Ok((config, source)),
            _ => Err(Problems { problems: source.sorted(findings.problems), source }),
        }
    }

    /// The whole configuration with every default filled in; loads back equal.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("every field of a configuration has a TOML form")
    }

    /// What training needs beyond what planning does.
    pub fn problems_for_training(&self) -> Vec<Problem> {
        if self.data.sources.is_empty() {
            return vec![
                Problem::new("data.sources", "`data.sources` is empty: there is nothing to train on")
                    .help("for instance sources = [\"corpus/*.txt\"]"),
            ];
        }
        Vec::new()
    }
}

/// `None` where a required key is missing or wrong: `findings` says which.
fn read(mut table: Table, stem: &str, findings: &mut Findings) -> Option<Config> {
    let run = run(Reader::section(&mut table, "run", findings), stem);
    let data = data(Reader::section(&mut table, "data", findings), &run);
    let train = load_train::read(Reader::section(&mut table, "train", findings));
    let seq_len = train.as_ref().map(|train| train.seq_len);
    let model = load_model::read(Reader::section(&mut table, "model", findings), seq_len, &data.tokenizer);
    let parallel = parallel(Reader::section(&mut table, "parallel", findings));
    let geometry = geometry(Reader::section(&mut table, "geometry", findings));
    let optimizer = optimizer(Reader::section(&mut table, "optimizer", findings));
    let schedule = schedule(Reader::section(&mut table, "schedule", findings), &optimizer, train.as_ref().map(|train| train.steps));
    let checkpoint = checkpoint(Reader::section(&mut table, "checkpoint", findings));
    let eval = eval(Reader::section(&mut table, "eval", findings), &data);
    let log = log(Reader::section(&mut table, "log", findings));
    let device = device(Reader::section(&mut table, "device", findings));
    for key in table.keys() {
        let help = match nearest(key, &SECTIONS) {
            Some(name) => format!("did you mean [{name}]?"),
            None => format!("the sections are {}", SECTIONS.join(", ")),
        };
        findings.problems.push(Problem::new(key, format!("unknown section `{key}`")).help(help));
    }
    findings.report_unknown_keys();
    check::evaluation(&eval, &data, findings);
    check::offload(&parallel, findings);
    if let Some(train) = &train {
        check::training(train, findings);
        check::rounding(&optimizer, train, findings);
        check::schedule(&schedule, train.steps, optimizer.lr, findings);
    }
    if let (Some(train), Some(model)) = (&train, &model) {
        check::positions(train, model, findings);
    }
    Some(Config { run, model: model?, data, train: train?, parallel, geometry, optimizer, schedule, checkpoint, eval, log, device })
}

fn run(mut r: Reader, stem: &str) -> Run {
    let name = r.text("name").unwrap_or_else(|| stem.to_string());
    let dir = r.text("dir").map_or_else(|| Path::new("runs").join(&name), PathBuf::from);
    let run = Run { name, dir, seed: r.whole("seed", 0..=i64::MAX).unwrap_or(1234) };
    r.finish();
    run
}

fn data(mut r: Reader, run: &Run) -> Data {
    let data = Data {
        sources: sources(&mut r, "sources"),
        validation: sources(&mut r, "validation"),
        tokenizer: r.text("tokenizer").unwrap_or_else(|| "bytes".to_string()),
        order: r.choice("order").unwrap_or(DataOrder::Shuffled),
        document_mask: r.flag("document_mask").unwrap_or(false),
        cache: r.text("cache").map_or_else(|| run.dir.join("cache"), PathBuf::from),
    };
    r.finish();
    data
}

fn sources(r: &mut Reader, key: &'static str) -> Vec<DataSource> {
    let items = match r.take(key) {
        None => Vec::new(),
        Some(Value::Array(items)) => items,
        Some(one @ Value::String(_)) => vec![one],
        Some(other) => r.wrong(key, "a list of paths", &other).unwrap_or_default(),
    };
    let mut sources = Vec::new();
    for (index, item) in items.into_iter().enumerate() {
        match item {
            Value::String(path) => sources.push(DataSource { path, weight: 1.0 }),
            Value::Table(table) => {
                let mut item = r.item(key, index, table);
                let path = item.text("path");
                let path = item.required("path", path, "\"corpus/*.txt\"");
                let weight = item.number("weight", |weight| weight > 0.0, "above 0").unwrap_or(1.0);
                item.finish();
                sources.extend(path.map(|path| DataSource { path, weight }));
            }
            other => r.wrong(&format!("{key}.{index}"), "a path or { path = ..., weight = ... }", &other).unwrap_or_default(),
        }
    }
    sources
}

fn parallel(mut r: Reader) -> Parallel {
    let ranks = 1..=1 << 20;
    let tp = r.whole("tp", ranks.clone()).unwrap_or(1);
    let pp = r.whole("pp", ranks.clone()).unwrap_or(1);
    let dp_replicate = r.whole("dp_replicate", ranks).unwrap_or(1);
    let mut dp_shard = r.whole("dp_shard", -1..=1 << 20).unwrap_or(-1);
    if dp_shard == 0 {
        r.problem("dp_shard", "`parallel.dp_shard` = 0 is out of range", "it is a whole number from 1 on, or -1: the rest of the world");
        dp_shard = -1;
    }
    let zero = r.whole("zero", 0..=3).unwrap_or(1);
    let sequence_parallel = r.flag("sequence_parallel").unwrap_or(true);
    let pp_schedule = r.text("pp_schedule").unwrap_or_else(|| "1f1b".to_string());
    let pp_schedule_text = if PP_SCHEDULES.contains(&pp_schedule.as_str()) { None } else { schedule_file(&mut r, &pp_schedule) };
    let pp_chunks = r.whole("pp_chunks", DIM).unwrap_or(1);
    let [offload_optimizer, offload_weights] = ["offload_optimizer", "offload_weights"].map(|key| offload(&mut r, key));
    r.finish();
    Parallel {
        tp,
        pp,
        dp_replicate,
        dp_shard,
        zero,
        sequence_parallel,
        pp_schedule,
        pp_schedule_text,
        pp_chunks,
        offload_optimizer,
        offload_weights,
    }
}

fn offload(r: &mut Reader, key: &'static str) -> Offload {
    match r.text(key).as_deref() {
        None | Some("none") => Offload::None,
        Some("host") => {
            let message = format!("`{}` = \"host\": on the CPU the host's memory is the device's own", r.path_of(key));
            r.problem(key, message, "name a folder on a fast disk, such as \"/nvme/offload\", or \"none\"");
            Offload::None
        }
        Some(folder) => Offload::Folder(PathBuf::from(folder)),
    }
}

/// What stands in the schedule file `path`.
fn schedule_file(r: &mut Reader, path: &str) -> Option<String> {
    if !path.contains(['/', '.']) {
        let guess = nearest(path, &PP_SCHEDULES).map(|name| format!("did you mean \"{name}\"? ")).unwrap_or_default();
        let help = format!("{guess}it is one of {}, or the path of a schedule file", PP_SCHEDULES.join(", "));
        r.problem("pp_schedule", format!("`parallel.pp_schedule` = \"{path}\" is not known"), help);
        return None;
    }
    match std::fs::read_to_string(path) {
        Ok(text) => Some(text),
        Err(error) => {
            let help = format!("it is one of {}, or the path of a schedule file", PP_SCHEDULES.join(", "));
            r.problem("pp_schedule", format!("the schedule file `{path}` cannot be read: {error}"), help);
            None
        }
    }
}

fn geometry(mut r: Reader) -> Geometry {
    let geometry = Geometry {
        shards: r.whole("shards", 0..=1 << 20).unwrap_or(0),
        lanes: r.whole("lanes", 0..=1 << 20).unwrap_or(0),
        order: r.choice("order").unwrap_or(SumOrder::Auto),
        may_move: r.flag("move").unwrap_or(false),
    };
    r.finish();
    geometry
}

fn optimizer(mut r: Reader) -> Optimizer {
    let no_decay = r.list("no_decay").unwrap_or_default();
    let optimizer = Optimizer {
        kind: r.choice("kind").unwrap_or(OptimizerKind::Adamw),
        lr: r.number("lr", |x| x > 0.0, "above 0").unwrap_or(3e-4),
        beta1: r.number("beta1", |x| (0.0..1.0).contains(&x), "from 0 to below 1").unwrap_or(0.9),
        beta2: r.number("beta2", |x| (0.0..1.0).contains(&x), "from 0 to below 1").unwrap_or(0.95),
        eps: r.number("eps", |x| x > 0.0, "above 0").unwrap_or(1e-8),
        weight_decay: r.number("weight_decay", |x| x >= 0.0, "of 0 or more").unwrap_or(0.1),
        no_decay: no_decay
            .iter()
            .enumerate()
            .filter_map(|(index, item)| match item.as_str() {
                Some(text) => Some(text.to_string()),
                None => r.wrong(&format!("no_decay.{index}"), "the name of a tensor", item),
            })
            .collect(),
        grad_clip: r.number("grad_clip", |x| x >= 0.0, "of 0 or more").unwrap_or(1.0),
        stochastic_rounding: r.flag("stochastic_rounding").unwrap_or(false),
    };
    r.finish();
    optimizer
}

fn schedule(mut r: Reader, optimizer: &Optimizer, steps: Option<u64>) -> Schedule {
    let kind = r.choice("kind").unwrap_or(ScheduleKind::Cosine);
    let warmup_steps = r.whole("warmup_steps", COUNT).unwrap_or(0);
    let decay_steps = r.whole("decay_steps", COUNT).unwrap_or(0);
    let end = if decay_steps == 0 { steps.unwrap_or(0) } else { decay_steps };
    let schedule = Schedule {
        kind,
        warmup_steps,
        decay_steps,
        min_lr: r.number("min_lr", |x| x >= 0.0, "of 0 or more").unwrap_or_else(|| tenth(optimizer.lr)),
        // Only `wsd` reads it; a run too short for a fifth still gets one step.
        wsd_decay_steps: r.whole("wsd_decay_steps", SOME).unwrap_or((end / 5).max(1)),
        wsd_shape: r.choice("wsd_shape").unwrap_or(WsdShape::Sqrt),
    };
    r.finish();
    schedule
}

/// A tenth as one writes it: a tenth of 3e-4 is 3e-5, which division misses by one bit.
fn tenth(value: f64) -> f64 {
    format!("{:.12e}", value / 10.0).parse().expect("a number that was just written")
}

fn checkpoint(mut r: Reader) -> Checkpoint {
    let checkpoint = Checkpoint {
        interval: r.whole("interval", COUNT).unwrap_or(100),
        keep: r.whole("keep", COUNT).unwrap_or(3),
        asynchronous: r.flag("async").unwrap_or(true),
        resume: match r.take("resume") {
            None => Resume::Auto,
            Some(Value::Integer(step)) if step >= 0 => Resume::Step(step as u64),
            Some(Value::String(text)) => match text.as_str() {
                "auto" => Resume::Auto,
                "none" => Resume::None,
                path => Resume::Path(PathBuf::from(path)),
            },
            Some(other) => r.wrong("resume", "\"auto\", \"none\", a step or a path", &other).unwrap_or(Resume::Auto),
        },
    };
    r.finish();
    checkpoint
}

fn eval(mut r: Reader, data: &Data) -> Eval {
    let interval = if data.validation.is_empty() { 0 } else { 50 };
    let eval = Eval {
        interval: r.whole("interval", COUNT).unwrap_or(interval),
        steps: r.whole("steps", SOME).unwrap_or(10),
        sample: r.text("sample"),
        sample_tokens: r.whole("sample_tokens", 1..=1 << 20).unwrap_or(200),
    };
    r.finish();
    eval
}

fn log(mut r: Reader) -> Log {
    let log = Log { interval: r.whole("interval", SOME).unwrap_or(1) };
    r.finish();
    log
}

fn device(mut r: Reader) -> Device {
    let device = Device {
        kind: r.choice("kind").unwrap_or(DeviceKind::Auto),
        threads: r.whole("threads", 0..=1 << 16).unwrap_or(0),
        matmul: r.choice("matmul").unwrap_or(Matmul::Auto),
        memory: memory(&mut r),
    };
    r.finish();
    device
}

/// A number of bytes, or text such as "8GiB".
fn memory(r: &mut Reader) -> Option<u64> {
    let bytes = match r.take("memory")? {
        Value::Integer(bytes) => u64::try_from(bytes).ok(),
        Value::String(text) => with_unit(text.trim()),
        other => return r.wrong("memory", "a number of bytes such as \"8GiB\"", &other),
    };
    // A TOML number holds no more.
    let bytes = bytes.filter(|bytes| (1..=i64::MAX as u64).contains(bytes));
    if bytes.is_none() {
        let path = r.path_of("memory");
        r.problem("memory", format!("`{path}` is not a number of bytes"), "for instance \"8GiB\", \"512MiB\" or 8000000000");
    }
    bytes
}

fn with_unit(text: &str) -> Option<u64> {
    let units =
        [("KiB", 1u64 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("TiB", 1 << 40), ("kB", 1000), ("MB", 1_000_000), ("GB", 1_000_000_000)];
    let (number, factor) = units.iter().find_map(|(unit, factor)| Some((text.strip_suffix(unit)?, *factor))).unwrap_or((text, 1));
    let number: f64 = number.trim().parse().ok()?;
    (number.is_finite() && number > 0.0).then(|| (number * factor as f64).round() as u64)
}
