//! Models, options, clock and JSON line of the peers that are written in Rust: `candle` and `burn` include this file as a module.
//!
//! The models are those of `peers_torch.py` and `../step.rs`, and so is what is told of a step. All steps are on the same tokens.
//! `tokens_per_s` is of the median step by the clock, `tokens_per_s_free` of the median step by processor time, times the threads.

use rustix::time::{ClockId, clock_gettime};
use std::env;
use std::fs;
use std::time::Instant;

/// One of the two kinds: Llama (RMSNorm, rotary positions, SwiGLU, a head of its own) or GPT-2 (LayerNorm, learned positions, GELU, tied).
#[derive(Clone, Copy)]
pub struct Model {
    pub name: &'static str,
    pub llama: bool,
    pub layers: usize,
    pub width: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub hidden: usize,
    pub vocabulary: usize,
    pub positions: usize,
    pub rows: usize,
    pub time: usize,
}

const MODELS: [Model; 2] = [
    Model {
        name: "tiny",
        llama: true,
        layers: 6,
        width: 384,
        heads: 6,
        kv_heads: 2,
        hidden: 1024,
        vocabulary: 257,
        positions: 256,
        rows: 16,
        time: 256,
    },
    Model {
        name: "gpt2-124m",
        llama: false,
        layers: 12,
        width: 768,
        heads: 12,
        kv_heads: 12,
        hidden: 3072,
        vocabulary: 50257,
        positions: 1024,
        rows: 4,
        time: 64,
    },
];

pub struct Options {
    pub model: Model,
    threads: usize,
    warmup: usize,
    steps: usize,
    seconds: f64,
}

impl Options {
    /// `--model`, `--rows`, `--time`, `--threads`, `--warmup`, `--steps` and `--seconds`, each with a value. To be called first: sets the
    /// number of threads that rayon will start.
    pub fn parse() -> Options {
        let mut options = Options { model: MODELS[0], threads: 2, warmup: 1, steps: 12, seconds: 120.0 };
        let words: Vec<String> = env::args().skip(1).collect();
        if let Some(name) = words.iter().skip_while(|word| *word != "--model").nth(1) {
            options.model = MODELS.into_iter().find(|model| model.name == name).expect("--model tiny or gpt2-124m");
        }
        for pair in words.chunks(2) {
            let value = pair.get(1).map_or("", |value| value.as_str());
            let number = || value.parse().unwrap_or_else(|_| panic!("{} takes a number", pair[0]));
            match pair[0].as_str() {
                "--model" => {}
                "--dtype" => assert_eq!(value, "f32", "--dtype"),
                "--device" => assert_eq!(value, "cpu", "--device"),
                "--rows" => options.model.rows = number(),
                "--time" => options.model.time = number(),
                "--threads" => options.threads = number(),
                "--warmup" => options.warmup = number(),
                "--steps" => options.steps = number(),
                "--seconds" => options.seconds = value.parse().expect("--seconds takes a number"),
                other => panic!("what is {other}?"),
            }
        }
        options.model.positions = options.model.positions.max(options.model.time);
        unsafe { env::set_var("RAYON_NUM_THREADS", options.threads.to_string()) } // no other thread has been started
        options
    }

    /// Inputs and targets of a step.
    pub fn tokens(&self) -> (Vec<u32>, Vec<u32>) {
        let mut state = 7u64;
        let mut next = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ((state >> 33) % self.model.vocabulary as u64) as u32
        };
        let rows: Vec<Vec<u32>> = (0..self.model.rows).map(|_| (0..=self.model.time).map(|_| next()).collect()).collect();
        let each = |offset: usize| rows.iter().flat_map(|row| row[offset..][..self.model.time].to_vec()).collect();
        (each(0), each(1))
    }

    /// Does steps, which return their loss, and prints the line.
    pub fn measure(&self, peer: &str, version: &str, parameters: usize, mut step: impl FnMut() -> f32) {
        let mut timed = || {
            let (start, processor) = (Instant::now(), processor_seconds());
            let loss = step();
            (start.elapsed().as_secs_f64(), processor_seconds() - processor, loss)
        };
        let (begin, first) = (Instant::now(), timed());
        (1..self.warmup).for_each(|_| _ = timed());
        let mut steps = vec![timed()];
        while steps.len() < self.steps && begin.elapsed().as_secs_f64() < self.seconds {
            steps.push(timed());
        }
        let loss_last = steps[steps.len() - 1].2;
        let median = |mut seconds: Vec<f64>| {
            seconds.sort_by(f64::total_cmp);
            seconds[seconds.len() / 2]
        };
        let wall = median(steps.iter().map(|step| step.0).collect());
        let best = steps.iter().map(|step| step.0).fold(f64::INFINITY, f64::min);
        let processor = median(steps.iter().map(|step| step.1).collect());
        let tokens = (self.model.rows * self.model.time) as f64;
        let line = serde_json::json!({
            "peer": peer, "version": version, "device": "cpu", "model": self.model.name, "dtype": "f32", "threads": self.threads,
            "rows": self.model.rows, "time": self.model.time, "parameters": parameters, "tokens_per_s": tokens / wall,
            "tokens_per_s_best": tokens / best, "tokens_per_s_free": tokens * self.threads as f64 / processor,
            "processor_s": processor, "step_s": wall, "steps": steps.len(), "first_step_s": first.0,
            "memory_peak_bytes": memory_peak(), "loss_first": first.2, "loss_last": loss_last,
        });
        println!("{line}");
    }
}

/// Of all threads of this process.
fn processor_seconds() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

/// The most memory that was ever resident; 0 where the system does not tell.
fn memory_peak() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or("0");
    1024 * line.trim().trim_end_matches(" kB").parse().unwrap_or(0)
}
