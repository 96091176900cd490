//! The commands. Each reads its arguments, calls the library, and turns what comes back into an exit code.
//!
//! Invariant: 0 is done; 2 is a wrong configuration or argument, and nothing was written; 98 is stopped on request with a checkpoint
//! saved; anything else that went wrong is 1.

use anyhow::{Context, Result};
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use ferrotron::checkpoint::diff::diff;
use ferrotron::checkpoint::index::{Facts, Geometry};
use ferrotron::checkpoint::inspect::inspect;
use ferrotron::checkpoint::load::Checkpoint;
use ferrotron::checkpoint::{export, import};
use ferrotron::config::source::Problems;
use ferrotron::config::{Config, Model};
use ferrotron::data::prepare::prepare;
use ferrotron::data::tokenizer::Tokenizer;
use ferrotron::device::gpu::cuda::libraries::Search;
use ferrotron::device::gpu::cuda::probe;
use ferrotron::dtype::Dtype;
use ferrotron::launch::doctor;
use ferrotron::launch::identity::{self, CudaPlaces, Identity};
use ferrotron::launch::options::LaunchOptions;
use ferrotron::launch::supervisor;
use ferrotron::plan::Plan;
use ferrotron::train::fit;
use ferrotron::train::forecast;
use ferrotron::train::generate::{Sampling, Speaker};
use ferrotron::train::run::{self, Ending, Failure};
use serde_json::{Value, json};
use std::ffi::OsString;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

const FAILED: u8 = 1;
const WRONG_INPUT: u8 = 2;
const STOPPED: u8 = 98;

/// A model-parallel trainer for large language models.
#[derive(Parser)]
#[command(version, max_term_width = 100, after_help = "Start with: ferrotron train configs/quickstart.toml")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Train: one rank, or one rank of a launched job
    Train(Configured),
    /// Start the ranks of a job on this node, and watch them
    Launch(Box<LaunchArguments>),
    /// Tell what would happen: mesh, layout, schedule, memory, traffic; no device needed
    Plan(PlanArguments),
    /// Turn text into token shards, in constant memory
    Prepare(PrepareArguments),
    /// Look at, check, compare checkpoints; to and from a Hugging Face folder
    #[command(subcommand)]
    Checkpoint(CheckpointCommand),
    /// Sample text from a checkpoint or a Hugging Face folder
    Generate(GenerateArguments),
    /// Measure every operation on this machine's processor or GPU, as a share of what it could do
    Bench(BenchArguments),
    /// Tell what this machine has: processor, memory, driver, libraries, fabric, limits
    Doctor,
    /// Print completions for a shell
    Completions { shell: clap_complete::Shell },
}

#[derive(Args)]
struct Configured {
    /// Configuration of the run
    #[arg(value_name = "CONFIG.toml")]
    config: PathBuf,
    /// Set a key of the configuration, with a TOML value; may be repeated
    #[arg(long = "set", value_name = "section.key=value")]
    overrides: Vec<String>,
}

#[derive(Args)]
struct LaunchArguments {
    #[command(flatten)]
    options: LaunchOptions,
    /// The command of every rank, such as: train configs/quickstart.toml
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
    command: Vec<OsString>,
}

#[derive(Args)]
struct GenerateArguments {
    /// A checkpoint (step folder, or the run's folder for its newest) or a Hugging Face folder
    #[arg(long, value_name = "DIR")]
    from: PathBuf,
    #[arg(long)]
    prompt: String,
    /// New tokens, at most
    #[arg(long, default_value_t = 200)]
    tokens: usize,
    /// 0: always the likeliest token
    #[arg(long, default_value_t = 0.8)]
    temperature: f64,
    /// Only the likeliest so many; 0: all
    #[arg(long, default_value_t = 0)]
    top_k: usize,
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

#[derive(Args)]
struct BenchArguments {
    /// Only operations whose line has all of these words, such as: matmul bf16
    words: Vec<String>,
    /// Threads; 0: all there are
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// What to measure
    #[arg(long, value_enum, default_value_t = Measured::Cpu)]
    device: Measured,
    /// One JSON object a line
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Measured {
    Cpu,
    Cuda,
}

#[derive(Args)]
struct PlanArguments {
    #[command(flatten)]
    configured: Configured,
    /// Number of ranks [default: the least that fits the layout]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    world: Option<u32>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Draw the schedule: time from left to right, a row for each pipeline rank
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

#[derive(Args)]
struct PrepareArguments {
    /// How text becomes ids; "bytes" is the one there is
    #[arg(long, value_name = "T", default_value = "bytes")]
    tokenizer: String,
    /// Folder of the shards
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Text files, folders or patterns
    #[arg(required = true)]
    input: Vec<PathBuf>,
}

#[derive(Subcommand)]
enum CheckpointCommand {
    /// Print what a checkpoint holds
    Inspect { step_dir: PathBuf },
    /// Read every byte and hold it to the checksums
    Verify { step_dir: PathBuf },
    /// Compare two checkpoints or Hugging Face folders; exit code 1 where they differ
    Diff { left: PathBuf, right: PathBuf },
    /// Write a folder that `transformers` loads
    Export {
        step_dir: PathBuf,
        out: PathBuf,
        /// Format of the weights [default: train.dtype of the run]
        #[arg(long)]
        dtype: Option<WeightFormat>,
    },
    /// Make a Hugging Face folder a checkpoint
    Import { weights: PathBuf, out: PathBuf },
}

#[derive(Clone, Copy, ValueEnum)]
enum WeightFormat {
    F32,
    Bf16,
    F16,
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Train(arguments) => train(&arguments),
        Command::Launch(arguments) => launch(*arguments),
        Command::Plan(arguments) => plan(&arguments),
        Command::Prepare(arguments) => prepare_text(&arguments),
        Command::Checkpoint(command) => checkpoint(&command),
        Command::Generate(arguments) => generate(&arguments),
        Command::Bench(arguments) => bench(&arguments),
        Command::Doctor => {
            let environment = identity::environment();
            let gpu = probe::report(Search::new(&CudaPlaces::detect(&environment)));
            print(&doctor::report(&environment, &gpu))
        }
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "ferrotron", &mut script);
            print(&String::from_utf8_lossy(&script))
        }
    };
    result.unwrap_or_else(|error| tell(&error))
}

/// Prints an error, and gives the exit code it makes.
fn tell(error: &anyhow::Error) -> ExitCode {
    if let Some(problems) = error.downcast_ref::<Problems>() {
        let color = identity::wants_color(&identity::environment(), std::io::stderr().is_terminal());
        eprintln!("{}", problems.render(color));
        return ExitCode::from(WRONG_INPUT);
    }
    eprintln!("error: {error}");
    error.chain().skip(1).for_each(|cause| eprintln!("  because: {cause}"));
    ExitCode::from(FAILED)
}

fn bench(arguments: &BenchArguments) -> Result<ExitCode> {
    if arguments.device == Measured::Cuda {
        ferrotron::bench::gpu::run(&[Dtype::Bf16, Dtype::F32], &arguments.words, arguments.json, &mut std::io::stdout())?;
        return Ok(ExitCode::SUCCESS);
    }
    let available = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = if arguments.threads > 0 { arguments.threads } else { available };
    ferrotron::bench::run(threads, &[Dtype::Bf16, Dtype::F32], &arguments.words, arguments.json, &mut std::io::stdout())?;
    Ok(ExitCode::SUCCESS)
}

fn train(arguments: &Configured) -> Result<ExitCode> {
    let (config, source) = Config::load(&arguments.config, &arguments.overrides)?;
    let problems = config.problems_for_training();
    if !problems.is_empty() {
        return Err(Problems { source, problems }.into());
    }
    let identity = Identity::detect(&identity::environment())?;
    match run::run(&config, &identity) {
        Ok(Ending::Done) => Ok(ExitCode::SUCCESS),
        Ok(Ending::Stopped) => Ok(ExitCode::from(STOPPED)),
        Err(Failure::Config(problems)) => Err(Problems { source, problems }.into()),
        Err(Failure::Error(error)) if identity.world > 1 => Err(error.context(identity.describe())),
        Err(Failure::Error(error)) => Err(error),
    }
}

fn launch(arguments: LaunchArguments) -> Result<ExitCode> {
    // A mistake is told once here, instead of by every rank.
    let words = std::iter::once("ferrotron".into()).chain(arguments.command.iter().cloned());
    if let Command::Train(configured) = Cli::parse_from(words).command {
        Config::load(&configured.config, &configured.overrides)?;
    }
    let program = identity::program()?;
    let code = supervisor::launch(arguments.options, &program, &arguments.command)?;
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(FAILED)))
}

fn generate(arguments: &GenerateArguments) -> Result<ExitCode> {
    let &GenerateArguments { ref from, ref prompt, tokens: count, temperature, top_k, seed } = arguments;
    let mut speaker = Speaker::open(from)?;
    let mut out = std::io::stdout().lock();
    let sampling = Sampling { temperature, top_k, seed };
    let mut show = |bytes: &[u8]| out.write_all(bytes).and_then(|()| out.flush()).context("writing to standard output");
    show(prompt.as_bytes())?;
    speaker.speak(prompt.as_bytes(), count, sampling, &mut show)?;
    show(b"\n")?;
    Ok(ExitCode::SUCCESS)
}

fn plan(arguments: &PlanArguments) -> Result<ExitCode> {
    let (config, source) = Config::load(&arguments.configured.config, &arguments.configured.overrides)?;
    let parallel = &config.parallel;
    let least = parallel.tp * parallel.pp * parallel.dp_replicate * parallel.dp_shard.max(1) as usize;
    let world = arguments.world.map_or(least, |world| world as usize);
    let plan = match Plan::new(&config, world, None) {
        Ok(plan) => plan,
        Err(problems) => return Err(Problems { source, problems }.into()),
    };
    if let Some(problem) = fit::check(&config, &plan)? {
        return Err(Problems { source, problems: vec![problem] }.into());
    }
    if let Some(file) = &arguments.svg {
        std::fs::write(file, forecast::svg(&plan)).with_context(|| format!("writing {}", file.display()))?;
    }
    if arguments.json { print(&format!("{:#}\n", forecast::json(&config, &plan)?)) } else { print(&forecast::text(&config, &plan)?) }
}

fn prepare_text(arguments: &PrepareArguments) -> Result<ExitCode> {
    let tokenizer = Tokenizer::from_name(&arguments.tokenizer)?;
    let prepared = prepare(&arguments.input, &tokenizer, &arguments.out)?;
    let done = if prepared.reused { "was there already, from the same texts" } else { "is ready" };
    print(&format!("{} {done}: use it as data.sources = [\"{}\"]\n", prepared.folder.display(), prepared.folder.display()))
}

fn checkpoint(command: &CheckpointCommand) -> Result<ExitCode> {
    match command {
        CheckpointCommand::Inspect { step_dir } => print(&inspect(&Checkpoint::open(step_dir)?)),
        CheckpointCommand::Verify { step_dir } => {
            let report = Checkpoint::open(step_dir)?.verify()?;
            print(&format!(
                "{} is sound: {} tensors in {} files of {} bytes\n",
                step_dir.display(),
                report.tensors,
                report.files,
                report.bytes
            ))
        }
        CheckpointCommand::Diff { left, right } => {
            let difference = diff(left, right)?;
            print(&difference.text)?;
            Ok(if difference.equal { ExitCode::SUCCESS } else { ExitCode::from(FAILED) })
        }
        CheckpointCommand::Export { step_dir, out, dtype } => export_weights(step_dir, out, *dtype),
        CheckpointCommand::Import { weights, out } => import_weights(weights, out),
    }
}

fn export_weights(step_dir: &Path, out: &Path, dtype: Option<WeightFormat>) -> Result<ExitCode> {
    let checkpoint = Checkpoint::open(step_dir)?;
    let config = Config::parse("the checkpoint's configuration", &checkpoint.index.facts.config, &[])?.0;
    let dtype = match dtype {
        Some(WeightFormat::F32) => Dtype::F32,
        Some(WeightFormat::Bf16) => Dtype::Bf16,
        Some(WeightFormat::F16) => Dtype::F16,
        None => config.train.dtype,
    };
    let end = Tokenizer::from_name(&config.data.tokenizer).ok().and_then(|tokenizer| tokenizer.end_of_text());
    let generation = json!({ "eos_token_id": end, "transformers_version": "4.51.0" });
    export::export(&checkpoint, out, &config.model.to_hugging_face(dtype), Some(&generation), export::Options::new(dtype))?;
    print(&format!("{} is ready, with weights in {dtype}\n", out.display()))
}

fn import_weights(weights: &Path, out: &Path) -> Result<ExitCode> {
    let file = weights.join("config.json");
    Model::from_hugging_face(&file)?;
    // The model is what is imported; of a run, only what a configuration cannot do without.
    let lines = ["[train]", "steps = 1", "seq_len = 1", "global_batch_size = 1", "[model]"].join("\n");
    let text = format!("{lines}\nconfig = {}\n", toml::Value::String(file.display().to_string()));
    let config = Config::parse("the imported model's configuration", &text, &[])?.0;
    let facts = Facts {
        step: 0,
        tokens: 0,
        seed: config.run.seed,
        geometry: Geometry { shards: 1, lanes: 1, order: "lanes".to_string() },
        state: Value::Null,
        config: config.to_toml(),
    };
    import::import(weights, out, facts)?;
    print(&format!("{} is ready\n", out.display()))
}

/// To standard output. Whoever closes it early, as `head` does, has seen enough.
fn print(text: &str) -> Result<ExitCode> {
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error).context("writing to standard output"),
        _ => Ok(ExitCode::SUCCESS),
    }
}
