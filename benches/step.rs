//! Speed of whole training steps: forward, backward, clipping and AdamW, by the code that a run trains with.
//!
//! ```text
//! cargo bench --bench step                                       every line
//! cargo bench --bench step -- --model tiny --dtype bf16          those of one model and format
//! cargo bench --bench step -- --model gpt2-124m --threads 1 --time 256 --json
//! cargo bench --bench step -- --device cuda --model llama-1b     on the first GPU
//! ```
//!
//! Two rates are told. `tok/s` is of the median step as a clock sees it: what a user gets on this machine as busy as it is. `free` is
//! tokens over the processor time that a step took, times the threads: what the step would do if nothing else ran and no thread waited.
//! The share of the peak is of the latter, with the FLOPs that `mfu` counts, against the best burst of multiply-adds between the steps.
//! On a GPU there is one rate, by the clock, and its peak is that of a large square product.
//!
//! Invariant: all steps of a line are on the same tokens, and the first of them are not counted.

use anyhow::{Context, Result, anyhow};
use clap::Parser;
use ferrotron::bench::cases::Work;
use ferrotron::bench::gpu::Limits;
use ferrotron::bench::machine;
use ferrotron::comm::connect::Transport;
use ferrotron::comm::groups::Groups;
use ferrotron::comm::threads::Threads;
use ferrotron::config::Config;
use ferrotron::data::loader::Batch;
use ferrotron::device::Device;
use ferrotron::device::gpu::cuda;
use ferrotron::device::gpu::cuda::context::Context as Gpu;
use ferrotron::device::gpu::cuda::libraries::Search;
use ferrotron::dtype::Dtype;
use ferrotron::launch::identity::{self, CudaPlaces};
use ferrotron::plan::Plan;
use ferrotron::plan::budget::Flops;
use ferrotron::plan::catalog;
use ferrotron::rng::Stream;
use ferrotron::train::hardware::Products;
use ferrotron::train::rehearsal;
use ferrotron::train::report::{short_bytes, short_count};
use ferrotron::train::resume;
use ferrotron::train::step::Trainer;
use std::thread;
use std::time::{Duration, Instant};

/// Name, `[model]`, rows of a step, tokens of a row. `peers/peers_torch.py` has the same.
const MODELS: [(&str, &str, usize, &[usize]); 3] = [
    (
        "tiny",
        "family = \"llama\"\nhidden_size = 384\nintermediate_size = 1024\nnum_layers = 6\nnum_heads = 6\nnum_kv_heads = 2\nvocab_size = 257",
        16,
        &[256],
    ),
    (
        "gpt2-124m",
        "family = \"gpt2\"\nhidden_size = 768\nnum_layers = 12\nnum_heads = 12\nvocab_size = 50257\nmax_position_embeddings = 1024",
        4,
        &[64, 256],
    ),
    (
        "llama-1b",
        "family = \"llama\"\nhidden_size = 2048\nintermediate_size = 8192\nnum_layers = 16\nnum_heads = 32\nnum_kv_heads = 8\nvocab_size = 128256\n\
         tie_word_embeddings = true",
        4,
        &[2048],
    ),
];

/// Too large for a processor: measured where it is named.
const LARGE: &str = "llama-1b";

/// Ranks, and threads of each.
const LAYOUTS: [(usize, usize); 3] = [(1, 1), (1, 2), (2, 1)];

#[derive(Parser)]
struct Options {
    /// tiny, gpt2-124m or llama-1b [default: the first two]
    #[arg(long)]
    model: Option<String>,
    /// f32 or bf16 [default: both]
    #[arg(long)]
    dtype: Option<String>,
    /// Threads of all ranks together [default: 1 and 2]
    #[arg(long)]
    threads: Option<usize>,
    /// Data-parallel ranks, as threads of this process [default: 1 and 2]
    #[arg(long)]
    ranks: Option<usize>,
    /// Sequences of a step [default: the model's own]
    #[arg(long)]
    rows: Option<usize>,
    /// Tokens of a sequence [default: the model's own]
    #[arg(long)]
    time: Option<usize>,
    /// Steps that are timed, at most
    #[arg(long, default_value_t = 12)]
    steps: usize,
    /// Steps before those
    #[arg(long, default_value_t = 2)]
    warmup: usize,
    /// Begin no further step after so many seconds
    #[arg(long, default_value_t = 60.0)]
    seconds: f64,
    /// cpu or cuda
    #[arg(long, default_value = "cpu", value_parser = ["cpu", "cuda"])]
    device: String,
    /// Who does the products of cuda: auto, cublaslt or own
    #[arg(long, default_value = "auto")]
    matmul: String,
    /// One JSON object a line
    #[arg(long)]
    json: bool,
    /// Given by cargo
    #[arg(long, hide = true)]
    bench: bool,
}

/// One line.
#[derive(Clone, Copy)]
struct Case {
    model: &'static str,
    keys: &'static str,
    dtype: Dtype,
    rows: usize,
    time: usize,
    ranks: usize,
    /// Of each rank.
    threads: usize,
}

/// What the steps of a line took.
struct Measured {
    /// Seconds of each step, sorted.
    wall: Vec<f64>,
    /// Processor seconds of the median step, of all threads.
    processor: f64,
    losses: [f64; 2],
    memory: usize,
    parameters: u64,
    flops_per_token: f64,
    /// FLOP/s of all threads.
    peak: f64,
}

fn main() -> Result<()> {
    let options = Options::parse();
    let wanted = |model: &str| options.model.as_ref().map_or(model != LARGE, |name| name == model);
    for (model, keys, rows, times) in MODELS.into_iter().filter(|model| wanted(model.0)) {
        for &time in times.iter().take(if options.time.is_some() { 1 } else { times.len() }) {
            for dtype in
                [Dtype::F32, Dtype::Bf16].into_iter().filter(|dtype| options.dtype.as_ref().is_none_or(|name| *name == dtype.to_string()))
            {
                let (rows, time) = (options.rows.unwrap_or(rows), options.time.unwrap_or(time));
                let case = Case { model, keys, dtype, rows, time, ranks: 1, threads: 1 };
                if options.on_gpu() {
                    one_line(&options, case, None)?;
                } else {
                    layouts(&options, case)?;
                }
            }
        }
    }
    Ok(())
}

impl Options {
    fn on_gpu(&self) -> bool {
        self.device == "cuda"
    }
}

/// Measures a case and prints its line; the time of its median step.
fn one_line(options: &Options, case: Case, together: Option<f64>) -> Result<f64> {
    let measured = run(options, case).with_context(|| format!("{} {}", case.model, case.dtype))?;
    if options.json {
        print_json(options, case, &measured)
    } else {
        print_line(case, &measured, together)
    }
    Ok(median(&measured.wall))
}

/// One case on every layout that is asked for.
fn layouts(options: &Options, case: Case) -> Result<()> {
    let mut together = None;
    for (ranks, threads) in LAYOUTS {
        // A number of threads that is not in the table is shared by the ranks.
        let threads = match (options.threads, ranks * threads) {
            (Some(wanted), total) if wanted == total || (wanted > 2 && total == 2) => wanted / ranks,
            (Some(_), _) => continue,
            (None, _) => threads,
        };
        if options.ranks.is_some_and(|wanted| wanted != ranks) {
            continue;
        }
        let case = Case { ranks, threads, ..case };
        let seconds = one_line(options, case, together)?;
        if ranks == 1 && threads > 1 {
            together = Some(seconds);
        }
    }
    Ok(())
}

fn print_line(case: Case, measured: &Measured, together: Option<f64>) {
    let Case { model, dtype, rows, time, ranks, threads, .. } = case;
    let (tokens, all) = ((rows * time) as f64, ranks * threads);
    let free = tokens * all as f64 / measured.processor;
    let ratio = match together {
        Some(seconds) if ranks > 1 => format!(", {:.2} of one rank with {all} threads", seconds / median(&measured.wall)),
        _ => String::new(),
    };
    println!(
        "{model} {dtype} {rows} x {time} ranks {ranks} threads {threads}: {:>5} tok/s ({:>5} to {:>5}), free {:>5}, {:3.0} % of the peak, {}{ratio}",
        short_count(tokens / median(&measured.wall)),
        short_count(tokens / measured.wall[measured.wall.len() - 1]),
        short_count(tokens / measured.wall[0]),
        short_count(free),
        100.0 * free * measured.flops_per_token / measured.peak,
        short_bytes(measured.memory as u64),
    );
}

fn print_json(options: &Options, case: Case, measured: &Measured) {
    let Case { model, dtype, rows, time, ranks, threads, .. } = case;
    let tokens = (rows * time) as f64;
    let free = tokens * (ranks * threads) as f64 / measured.processor;
    let line = serde_json::json!({
        "peer": "ferrotron", "version": env!("CARGO_PKG_VERSION"), "device": options.device, "model": model, "dtype": dtype.to_string(), "ranks": ranks,
        "threads": threads, "rows": rows, "time": time, "parameters": measured.parameters,
        "tokens_per_s": tokens / median(&measured.wall), "tokens_per_s_best": tokens / measured.wall[0], "tokens_per_s_free": free,
        "step_s": median(&measured.wall), "steps": measured.wall.len(), "processor_s": measured.processor,
        "peak_share": free * measured.flops_per_token / measured.peak, "memory_peak_bytes": measured.memory,
        "loss_first": measured.losses[0], "loss_last": measured.losses[1],
    });
    println!("{line}");
}

fn median(sorted: &[f64]) -> f64 {
    sorted[sorted.len() / 2]
}

fn run(options: &Options, case: Case) -> Result<Measured> {
    let Case { keys, dtype, rows, time, ranks, threads, .. } = case;
    let text = format!(
        "[model]\n{keys}\n[train]\nsteps = 1000\nseq_len = {time}\nglobal_batch_size = {rows}\nmicro_batch_size = {}\ndtype = \"{dtype}\"\n[device]\nkind = \"{}\"\nmatmul = \"{}\"\n",
        rows / ranks,
        options.device,
        options.matmul
    );
    let config = Config::parse("the benchmark", &text, &[]).map_err(|problems| anyhow!("{problems}"))?.0;
    let plan = Plan::new(&config, ranks, None).map_err(|problems| anyhow!("{problems:?}"))?;
    let transport = Transport::Threads(Threads::new(ranks, Duration::from_secs(600)));
    thread::scope(|scope| {
        let one = |rank| {
            let (config, plan, transport) = (&config, plan.clone(), &transport);
            scope.spawn(move || {
                let device = if options.on_gpu() { gpu(config, &plan, rank, ranks)? } else { Device::cpu(threads) };
                device.install(|| one_rank(options, case, config, plan, transport, rank, &device))
            })
        };
        let all: Vec<_> = (0..ranks).map(one).collect();
        let mut measured = all.into_iter().map(|rank| rank.join().map_err(|_| anyhow!("a rank panicked"))?).collect::<Result<Vec<_>>>()?;
        Ok(measured.swap_remove(0))
    })
}

/// With as much memory as a run of the plan takes.
fn gpu(config: &Config, plan: &Plan, rank: usize, ranks: usize) -> Result<Device> {
    let search = Search::new(&CudaPlaces::detect(&identity::environment()));
    let context = Gpu::find(&search, rank, ranks)?;
    let products = Products::find(config.device.matmul, &context, &search).map_err(|problem| anyhow!("{}", problem.message))?;
    let bytes = cuda::bytes_with_slack(rehearsal::rehearse(config, plan, rank)?.peak);
    Device::cuda(context, products.library.map(|found| *found), bytes, "measure with fewer --rows".to_string())
}

fn one_rank(
    options: &Options,
    case: Case,
    config: &Config,
    plan: Plan,
    transport: &Transport,
    rank: usize,
    device: &Device,
) -> Result<Measured> {
    let groups = Groups::connect(transport, &plan.mesh, rank)?;
    let (flops, parameters) = (Flops::of(&plan).per_token as f64, catalog::parameters(&plan.units));
    let mut trainer = Trainer::new(config, plan, rank, device, groups)?;
    resume::start(&mut trainer, config)?;
    let batch = random(&trainer.rank.rows, case.time, config.model.vocab_size);
    let threads = case.ranks * case.threads;
    let (mut wall, mut processor, mut losses, mut peak) = (Vec::new(), Vec::new(), Vec::new(), 0f64);
    let begin = Instant::now();
    for step in 0..options.warmup + options.steps {
        // Nobody else computes while the peak is taken, and all ranks do as many steps.
        trainer.groups.world.barrier()?;
        if rank == 0 && !options.on_gpu() {
            peak = peak.max(machine::peak_flops(threads, case.dtype));
        }
        let over = step > options.warmup && begin.elapsed().as_secs_f64() > options.seconds;
        if trainer.groups.world.exchange(&[over as u8])?[0][0] != 0 {
            break;
        }
        let (start, start_processor) = (Instant::now(), machine::processor_seconds());
        losses.push(trainer.step(step as u64, &batch, false)?.loss);
        device.check()?;
        if step >= options.warmup {
            wall.push(start.elapsed().as_secs_f64());
            // A GPU's time is the clock's: the host only waits.
            let busy = machine::processor_seconds() - start_processor;
            processor.push(if options.on_gpu() { start.elapsed().as_secs_f64() } else { busy });
        }
    }
    // A GPU's peak takes memory that is not the steps'.
    let memory = device.memory().bytes_peak();
    if options.on_gpu() {
        let mut limits = Limits::of_products(device, case.dtype)?;
        for _ in 0..5 {
            peak = peak.max(limits.of(Work::Flops(0.0))?);
        }
    }
    wall.sort_by(f64::total_cmp);
    processor.sort_by(f64::total_cmp);
    Ok(Measured {
        processor: median(&processor),
        wall,
        losses: [losses[0], losses[losses.len() - 1]],
        memory,
        parameters,
        flops_per_token: flops,
        peak,
    })
}

fn random(rows: &[usize], t: usize, vocabulary: usize) -> Batch {
    let stream = Stream::new(7, "tokens");
    let token = |row: usize, i: usize| (stream.uniform((row * (t + 1) + i) as u64) * vocabulary as f64) as u32;
    let each = |offset: usize| rows.iter().flat_map(|&row| (0..t).map(move |i| token(row, i + offset))).collect();
    Batch {
        rows: rows.to_vec(),
        seq_len: t,
        inputs: each(0),
        targets: each(1),
        positions: rows.iter().flat_map(|_| 0..t as u32).collect(),
        starts: vec![0; rows.len() * t],
    }
}
