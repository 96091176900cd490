//! The configuration of a run: one struct per section of the TOML file, every default filled in.
//!
//! The doc comment of a field is the reference of its key. `load` reads a file and the `--set` arguments and reports every problem
//! at once (`source` renders them under the line they are about); `hugging_face` reads and writes `config.json`.
//!
//! Invariant: a `Config` that exists has passed every check that needs neither a device, nor the world's size, nor the data.
//! `Config::to_toml` loads back equal.

pub mod check;
pub mod choice;
pub mod hugging_face;
pub mod load;
pub mod load_model;
pub mod load_train;
pub mod reader;
pub mod source;

use crate::dtype::Dtype;
use choice::name;
use serde::Serialize;
use std::path::{Path, PathBuf};

#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Config {
    pub run: Run,
    pub model: Model,
    pub data: Data,
    pub train: Train,
    pub parallel: Parallel,
    pub geometry: Geometry,
    pub optimizer: Optimizer,
    pub schedule: Schedule,
    pub checkpoint: Checkpoint,
    pub eval: Eval,
    pub log: Log,
    pub device: Device,
}

/// `[run]`: who the run is and where it writes.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Run {
    /// Default: the name of the configuration file, without `.toml`.
    pub name: String,
    /// Everything the run writes goes under it. Default: `runs/<name>`.
    pub dir: PathBuf,
    /// Decides initial weights and the order of the data. Default 1234.
    pub seed: u64,
}

/// `[model]`. The keys `config` (path of a Hugging Face `config.json`) and `init` give defaults for all the others.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Model {
    /// `llama` or `gpt2`. Required, unless `config` or `init` says it.
    #[serde(serialize_with = "name")]
    pub family: Family,
    /// Width of the residual stream. Required.
    pub hidden_size: usize,
    /// Width inside the MLP. Required for llama; 4 × `hidden_size` for gpt2.
    pub intermediate_size: usize,
    /// Number of decoder blocks. Required.
    pub num_layers: usize,
    /// Number of query heads. Required.
    pub num_heads: usize,
    /// Number of key and value heads; divides `num_heads`. Default: `num_heads`.
    pub num_kv_heads: usize,
    /// Width of a head. Default: `hidden_size / num_heads`.
    pub head_dim: usize,
    /// Rows of the embedding. Default: the number of ids of the tokenizer (257 for `bytes`).
    pub vocab_size: usize,
    /// Longest sequence. Default: `train.seq_len`.
    pub max_position_embeddings: usize,
    /// Base of the rotary frequencies (llama only; 0 for gpt2). Default 10000.
    #[serde(skip_serializing_if = "is_zero")]
    pub rope_theta: f64,
    /// Stretching of the rotary frequencies (llama only). Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rope_scaling: Option<RopeScaling>,
    /// Added to the mean square (llama) or the variance (gpt2) under the root. Default 1e-5.
    pub norm_eps: f64,
    /// Whether the output projection is the embedding. Default: false for llama, true for gpt2.
    pub tie_word_embeddings: bool,
    /// Standard deviation of the initial weights. Default 0.02.
    pub init_std: f64,
    /// Start from these weights: a folder with `config.json` and safetensors.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Family {
    Llama,
    Gpt2,
}

/// `model.rope_scaling = { rope_type = "llama3", ... }`: all keys are required.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct RopeScaling {
    #[serde(serialize_with = "name")]
    pub rope_type: RopeType,
    pub factor: f64,
    pub low_freq_factor: f64,
    pub high_freq_factor: f64,
    pub original_max_position_embeddings: usize,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RopeType {
    Llama3,
}

/// `[data]`.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Data {
    /// What is trained on: `"path or glob"` or `{ path = "...", weight = 1.0 }` each.
    pub sources: Vec<DataSource>,
    /// What `eval` measures on. Default: nothing.
    pub validation: Vec<DataSource>,
    /// `"bytes"`: 256 bytes and one end of document. Default `bytes`. A `tokenizer.json` gives only its number of ids, for token files.
    pub tokenizer: String,
    /// Default `shuffled`. With `sequential`, sample n is tokens[n·T ..= n·T+T] and step s takes samples s·G onwards.
    #[serde(serialize_with = "name")]
    pub order: DataOrder,
    /// Whether a token sees only tokens of its own document. Default false.
    pub document_mask: bool,
    /// Where token shards made from text are kept. Default: `<run.dir>/cache`.
    pub cache: PathBuf,
}

#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct DataSource {
    pub path: String,
    /// Share of the samples, relative to the other sources. Default 1.
    pub weight: f64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DataOrder {
    Shuffled,
    Sequential,
}

/// `[train]`.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Train {
    /// Optimizer steps of the whole run. Required, or `tokens = "10B"` in its place (k, M, B and T are powers of 1000; the last
    /// step is whole).
    pub steps: u64,
    /// End this start cleanly after that step, with a checkpoint; the schedule still counts to `steps`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_after: Option<u64>,
    /// Tokens in a sequence. Required.
    pub seq_len: usize,
    /// Sequences in a step, over all ranks; the number of micro-batches follows. Required.
    pub global_batch_size: usize,
    /// Sequences in one forward pass of one rank. Default 1.
    pub micro_batch_size: usize,
    /// Format of weights and activations: `f32`, `bf16` or `f16`. Master weights and moments are f32
    /// (`optimizer.stochastic_rounding`: no master weights). Default `bf16`.
    #[serde(serialize_with = "name")]
    pub dtype: Dtype,
    /// What the backward pass computes again instead of keeping. Default `none`.
    #[serde(serialize_with = "name")]
    pub recompute: Recompute,
    /// Dynamic loss scaling, in force when `dtype = "f16"`.
    pub loss_scale: LossScale,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Recompute {
    None,
    Selective,
    Full,
}

/// `train.loss_scale = { ... }`.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct LossScale {
    /// Scale of the first step. Default 65536.
    pub initial: f64,
    /// The scale doubles after this many steps without an overflow. Default 2000.
    pub growth_interval: u64,
    /// What the scale is multiplied with at an overflow. Default 0.5.
    pub backoff: f64,
    /// The scale never falls below it. Default 1.
    pub min: f64,
    /// The run fails after this many skipped steps in a row. Default 50.
    pub max_skips: u64,
}

/// `[parallel]`: tp × pp × dp_replicate × dp_shard ranks.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Parallel {
    /// Ranks that share each matrix product. Default 1.
    pub tp: usize,
    /// Pipeline stages. Default 1.
    pub pp: usize,
    /// Data-parallel groups that each hold everything. Default 1.
    pub dp_replicate: usize,
    /// Data-parallel ranks that share by ZeRO; -1: the rest of the world. Default -1.
    pub dp_shard: i64,
    /// What `dp_shard` ranks share: 0 nothing, 1 optimizer state, 2 and gradients, 3 and weights. Default 1.
    pub zero: u8,
    /// Cut the residual stream over tp too. Default true; of no effect where tp = 1.
    pub sequence_parallel: bool,
    /// `gpipe`, `1f1b`, `interleaved`, `breadth_first`, `zero_bubble`, `zbv`, `dualpipe_v`, or the path of a schedule file (its format:
    /// `plan/schedule/text.rs`). Default `1f1b`.
    pub pp_schedule: String,
    /// What stands in that file.
    #[serde(skip)]
    pub pp_schedule_text: Option<String>,
    /// Chunks of blocks per pipeline rank. Default 1.
    pub pp_chunks: usize,
    /// Where master weights and moments lie: `none` (in the device's memory) or a folder, on a fast disk, in which each rank maps a
    /// file of its own that nobody else sees and that is gone with the process. Default `none`.
    pub offload_optimizer: Offload,
    /// Where a rank's slices of the weights lie, with `zero = 3`: as above. Default `none`.
    pub offload_weights: Offload,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Offload {
    None,
    Folder(PathBuf),
}

impl Offload {
    pub fn folder(&self) -> Option<&Path> {
        match self {
            Offload::None => None,
            Offload::Folder(folder) => Some(folder),
        }
    }
}

/// `[geometry]`: the run's canonical sums, the same on every layout.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Geometry {
    /// Finest tensor-parallel cut. Default 0: that of the first layout.
    pub shards: usize,
    /// Finest data-parallel cut. Default 0: that of the first layout.
    pub lanes: usize,
    /// What is added first. Default `auto`: lanes when the first layout has zero <= 1, else rows.
    #[serde(serialize_with = "name")]
    pub order: SumOrder,
    /// Key `move`. True: a run may go on with other canonical sums than its checkpoint's, those of this section and the layout; its
    /// numbers then differ from an unmoved run's by rounding. Default false.
    #[serde(rename = "move")]
    pub may_move: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SumOrder {
    Auto,
    Lanes,
    Rows,
}

/// `[optimizer]`.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Optimizer {
    /// Default `adamw`.
    #[serde(serialize_with = "name")]
    pub kind: OptimizerKind,
    /// Highest learning rate. Default 3e-4.
    pub lr: f64,
    /// Default 0.9.
    pub beta1: f64,
    /// Default 0.95.
    pub beta2: f64,
    /// Default 1e-8.
    pub eps: f64,
    /// On tensors of two or more dims, embeddings too. Default 0.1.
    pub weight_decay: f64,
    /// Names (with `*`) of tensors that do not decay either. Default: none.
    pub no_decay: Vec<String>,
    /// Largest norm of the gradient; 0: no clipping. Default 1.
    pub grad_clip: f64,
    /// True: weights in bf16 or f16 have no f32 master weights beside them, which saves four bytes a weight. After an update each is rounded
    /// to one of its two neighbours by chance, so that small updates come to pass now and then instead of never. Default false.
    pub stochastic_rounding: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OptimizerKind {
    Adamw,
}

/// `[schedule]` of the learning rate; `train/learning_rate.rs` has the formulas.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Schedule {
    /// Default `cosine`.
    #[serde(serialize_with = "name")]
    pub kind: ScheduleKind,
    /// Update k of the warm-up (k = 1..=W) uses lr × k / W; a run may end before. Default 0.
    pub warmup_steps: u64,
    /// Step at which `min_lr` is reached, counted from the start; 0: the last one. Default 0.
    pub decay_steps: u64,
    /// Where the decay ends. Default: `optimizer.lr` / 10.
    pub min_lr: f64,
    /// Length of the decay at the end of `wsd`. Default: a fifth of the run.
    pub wsd_decay_steps: u64,
    /// Shape of that decay. Default `sqrt`.
    #[serde(serialize_with = "name")]
    pub wsd_shape: WsdShape,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ScheduleKind {
    Constant,
    Linear,
    Cosine,
    Wsd,
    InverseSqrt,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WsdShape {
    Sqrt,
    Linear,
}

/// `[checkpoint]`. One is always written at the end, at `stop_after` and on a stop signal.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Checkpoint {
    /// Steps between checkpoints; 0: only those that are always written. Default 100.
    pub interval: u64,
    /// How many are kept, the newest; 0: all. Default 3.
    pub keep: usize,
    /// Write files beside the training. Default true.
    #[serde(rename = "async")]
    pub asynchronous: bool,
    /// `"auto"`: the newest verified one under `run.dir`, else start; or `"none"`, a step, or a path. Default `auto`.
    pub resume: Resume,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Resume {
    Auto,
    None,
    Step(u64),
    Path(PathBuf),
}

/// `[eval]`: the loss on `data.validation`, and a look at what the model writes.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Eval {
    /// Steps between evaluations; 0: never. Default: 50 where there is `data.validation`, else 0.
    pub interval: u64,
    /// Global batches of one evaluation. Default 10.
    pub steps: u64,
    /// After the last step, print how the model continues this text. Default: nothing is printed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sample: Option<String>,
    /// New tokens of that sample, at most. Default 200.
    pub sample_tokens: usize,
}

/// `[log]`.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Log {
    /// Steps between printed lines; `metrics.jsonl` has every step. Default 1.
    pub interval: u64,
}

/// `[device]`.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Device {
    /// `auto`: GPUs where every rank has one, else the CPU; `emulated`: the GPU's kernels, on the CPU. Default `auto`.
    #[serde(serialize_with = "name")]
    pub kind: DeviceKind,
    /// Threads of one rank on the CPU; 0: as many as it has processors, with the ranks of a host sharing those that several may use.
    /// Default 0.
    pub threads: usize,
    /// Who does a GPU's matrix products. `auto`: cuBLASLt where every rank finds it, else ferrotron's own kernels (on an emulated GPU the
    /// processor, which is faster); `cublaslt`, `own`: that and nothing else. Default `auto`.
    #[serde(serialize_with = "name")]
    pub matmul: Matmul,
    /// Memory of one rank's device that a run may use, in bytes or as text such as "8GiB": a plan that needs more is refused, with
    /// what would fit. Default: on a GPU what is free there, else no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<u64>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DeviceKind {
    Auto,
    Cpu,
    Cuda,
    Emulated,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Matmul {
    Auto,
    Cublaslt,
    Own,
}

fn is_zero(value: &f64) -> bool {
    *value == 0.0
}
