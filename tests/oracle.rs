//! Training against Hugging Face transformers: tiny models start from the same weights and see the same tokens. They must show the same
//! losses, norms and learning rates in every step, the same gradients in the first, and the same weights and moments after the last.
//!
//! `tests/reference/README.md` says how the references were made; `scripts/reference_runs.py` states the arithmetic.
//!
//! Invariant: tolerances are a few times what f32 differs from f64 in the reference itself, and a slightly wrong model is outside of
//! them (`a_slightly_wrong_model_is_seen`).

use ferrotron::checkpoint::index::Kind;
use ferrotron::comm::groups::Groups;
use ferrotron::config::Config;
use ferrotron::data::loader::{Loader, LoaderSpec};
use ferrotron::data::sampler::Order;
use ferrotron::data::sources::{self, Source};
use ferrotron::data::tokenizer::Tokenizer;
use ferrotron::device::Device;
use ferrotron::plan::Plan;
use ferrotron::plan::layout::Piece;
use ferrotron::train::resume;
use ferrotron::train::step::Trainer;
use safetensors::SafeTensors;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

const ROWS: usize = 4;
const TIME: usize = 64;
const VOCABULARY: u64 = 128;

/// Largest differences: of a loss in itself, of a norm relative to it, of tensors as relative L2 norms.
#[derive(Clone, Copy)]
struct Tolerance {
    loss: f64,
    norm: f64,
    gradients: f64,
    weights: f64,
    moments: f64,
}

const F32: Tolerance = Tolerance { loss: 1e-5, norm: 5e-5, gradients: 1e-5, weights: 2e-4, moments: 5e-4 };
const BF16: Tolerance = Tolerance { loss: 5e-3, norm: 5e-2, gradients: 1e-1, weights: 3e-1, moments: 4e-1 };

/// Public tensors by name: dims and numbers.
type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

struct Metrics {
    loss: f64,
    norm: f64,
    rate: f64,
}

/// What a training run leaves to be compared.
struct Run {
    metrics: Vec<Metrics>,
    /// Of the first step, before clipping.
    gradients: Tensors,
    weights: Tensors,
    /// `exp_avg.<name>` and `exp_avg_sq.<name>`.
    moments: Tensors,
}

fn reference(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference").join(name)
}

/// The token stream that `scripts/reference_runs.py` describes.
fn tokens(count: usize) -> Vec<u16> {
    let (mut state, mut token) = (1234u64, 1234 % VOCABULARY);
    let mut next = || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut r = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        r = (r ^ (r >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        r ^= r >> 31;
        token = if r.is_multiple_of(8) { (r >> 32) % VOCABULARY } else { (5 * token + 17) % VOCABULARY };
        u16::try_from(token).expect("the vocabulary is small")
    };
    (0..count).map(|_| next()).collect()
}

/// The configuration of a reference run; `case` names the folder for its files.
fn config(case: &str, name: &str, dtype: &str, steps: usize, warmup: usize, overrides: &[&str]) -> Config {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("oracle").join(case);
    fs::create_dir_all(&folder).expect("a folder for temporary files");
    let stream: Vec<u8> = tokens(steps * ROWS * TIME + 1).iter().flat_map(|token| token.to_le_bytes()).collect();
    fs::write(folder.join("tokens.bin"), stream).expect("a file of tokens");
    let (init, tokens) = (reference(name).join("init"), folder.join("tokens.bin"));
    let text = format!(
        "
        run = {{ dir = {folder:?}, name = {name:?} }}
        model = {{ init = {init:?} }}
        data = {{ sources = [{{ path = {tokens:?} }}], order = \"sequential\" }}
        train = {{ steps = {steps}, seq_len = {TIME}, global_batch_size = {ROWS}, micro_batch_size = 2, dtype = {dtype:?} }}
        optimizer = {{ lr = 1e-3, beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0.1, grad_clip = 0.5 }}
        schedule = {{ kind = \"cosine\", warmup_steps = {warmup}, min_lr = 1e-4 }}
        device = {{ kind = \"cpu\", threads = 2 }}
        "
    );
    let overrides: Vec<String> = overrides.iter().map(|text| text.to_string()).collect();
    match Config::parse(case, &text, &overrides) {
        Ok((config, _)) => config,
        Err(problems) => panic!("{problems}"),
    }
}

fn loader(config: &Config) -> Loader {
    let tokenizer = Tokenizer::from_name(&config.data.tokenizer).expect("the tokenizer of bytes");
    let sources: Vec<Source> =
        config.data.sources.iter().map(|source| Source { path: source.path.clone().into(), weight: 1.0, dtype: None }).collect();
    Loader::new(LoaderSpec {
        sources: sources::open(&sources, &tokenizer, &config.data.cache, config.model.vocab_size).expect("the tokens just written"),
        order: Order::Sequential,
        seed: config.run.seed,
        seq_len: TIME,
        global_batch: ROWS,
        rows: (0..ROWS).collect(),
        document_mask: None,
    })
    .expect("a loader")
}

/// Trains on one rank, as `train::run` does but for files and reports.
fn train(config: &Config) -> Run {
    let plan = Plan::new(config, 1, None).unwrap_or_else(|problems| panic!("{problems:?}"));
    let device = Device::cpu(2);
    let mut trainer = Trainer::new(config, plan, 0, &device, Groups::solo()).expect("a trainer");
    resume::start(&mut trainer, config).expect("the reference's weights");
    let mut loader = loader(config);

    let batch = loader.batch(0).expect("the first batch");
    trainer.stage.begin(&batch, 1.0 / (ROWS * TIME) as f32);
    trainer.run_schedule().expect("forward and backward");
    let mut gradients = Tensors::new();
    for (pieces, values) in trainer.stage.zero.gradients() {
        scatter(&mut gradients, "", &pieces, &values);
    }
    trainer.stage.zero.clear();

    let mut metrics = Vec::new();
    for step in 0..config.train.steps {
        let batch = loader.batch(step).expect("a batch");
        let outcome = trainer.step(step, &batch, false).expect("a step");
        assert!(outcome.applied, "step {} was skipped: {:?}", step + 1, outcome.overflow);
        metrics.push(Metrics { loss: outcome.loss, norm: outcome.norm, rate: outcome.rate });
    }

    let shards = trainer.stage.zero.shards().expect("a group of one has nothing to wait for");
    let main = if shards.iter().any(|shard| shard.kind == Kind::Master) { Kind::Master } else { Kind::Weights };
    let (mut weights, mut moments) = (Tensors::new(), Tensors::new());
    for shard in shards.iter().filter(|shard| shard.kind == main || [Kind::ExpAvg, Kind::ExpAvgSq].contains(&shard.kind)) {
        let values = floats(&shard.bytes);
        match shard.kind {
            Kind::ExpAvg | Kind::ExpAvgSq => scatter(&mut moments, &format!("{}.", shard.kind.name()), &shard.pieces, &values),
            Kind::Weights | Kind::Master => scatter(&mut weights, "", &shard.pieces, &values),
        }
    }
    Run { metrics, gradients, weights, moments }
}

/// Puts the boxes of a flat buffer where they belong in the public tensors. What no box covers stays NaN.
fn scatter(tensors: &mut Tensors, prefix: &str, pieces: &[Piece], values: &[f32]) {
    for piece in pieces {
        let blank = || (piece.shape.clone(), vec![f32::NAN; piece.shape.iter().product()]);
        let (_, tensor) = tensors.entry(format!("{prefix}{}", piece.name)).or_insert_with(blank);
        let rows_and_columns = |dims: &[usize], of_vectors: usize| if dims.len() == 1 { [of_vectors, dims[0]] } else { [dims[0], dims[1]] };
        let [rows, columns] = rows_and_columns(&piece.size, 1);
        let [top, left] = rows_and_columns(&piece.start, 0);
        let [_, width] = rows_and_columns(&piece.shape, 1);
        let values = &values[piece.flat.clone()];
        assert_eq!(values.len(), rows * columns, "the box {piece:?}");
        for row in 0..rows {
            for column in 0..columns {
                let place = if piece.transposed { column * rows + row } else { row * columns + column };
                tensor[(top + row) * width + left + column] = values[place];
            }
        }
    }
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    let (chunks, rest) = bytes.as_chunks::<4>();
    assert!(rest.is_empty(), "{} bytes of f32", bytes.len());
    chunks.iter().map(|chunk| f32::from_le_bytes(*chunk)).collect()
}

fn read_tensors(path: &Path) -> Tensors {
    let bytes = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let file = SafeTensors::deserialize(&bytes).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let read = |(name, tensor): (String, safetensors::tensor::TensorView<'_>)| {
        assert_eq!(tensor.dtype(), safetensors::Dtype::F32, "{name} in {}", path.display());
        (name, (tensor.shape().to_vec(), floats(tensor.data())))
    };
    file.tensors().into_iter().map(read).collect()
}

fn read_metrics(path: &Path) -> Vec<Metrics> {
    let text = fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let line = |line: &str| {
        let object: serde_json::Value = serde_json::from_str(line).expect("a line of metrics is JSON");
        let number = |key: &str| object[key].as_f64().unwrap_or_else(|| panic!("{}: no {key} in {line}", path.display()));
        Metrics { loss: number("loss"), norm: number("grad_norm"), rate: number("lr") }
    };
    text.lines().map(line).collect()
}

/// The key third of GPT-2's joint bias has no gradient but rounding, which Adam turns into steps of full size: it is not compared.
fn compared(name: &str, values: &[f32]) -> Vec<f64> {
    let mut values: Vec<f64> = values.iter().map(|&value| value as f64).collect();
    if name.ends_with("attn.c_attn.bias") {
        let third = values.len() / 3;
        values[third..2 * third].fill(0.0);
    }
    values
}

/// Relative L2 distance, NaN where a number is missing.
fn distance(name: &str, expected: &[f32], found: &[f32]) -> f64 {
    let (expected, found) = (compared(name, expected), compared(name, found));
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    norm(&mut expected.iter().zip(&found).map(|(a, b)| a - b)) / (norm(&mut expected.iter().copied()) + 1e-30)
}

/// Collects what is out of tolerance, and shows the worst of what was compared.
#[derive(Default)]
struct Verdict(Vec<String>);

impl Verdict {
    fn metrics(&mut self, expected: &[Metrics], found: &[Metrics], tolerance: Tolerance) {
        assert_eq!(expected.len(), found.len(), "steps of the reference and of the run");
        let mut worst = [0.0f64; 3];
        for (step, (a, b)) in expected.iter().zip(found).enumerate() {
            let differences = [
                ("loss", a.loss, b.loss, (a.loss - b.loss).abs(), tolerance.loss),
                ("norm", a.norm, b.norm, (b.norm / a.norm - 1.0).abs(), tolerance.norm),
                ("lr", a.rate, b.rate, (b.rate / a.rate - 1.0).abs(), 1e-9),
            ];
            for (place, (what, a, b, difference, limit)) in differences.into_iter().enumerate() {
                worst[place] = worst[place].max(difference);
                if difference.is_nan() || difference > limit {
                    self.0.push(format!("step {} {what}: expected {a}, found {b} ({difference:.1e} > {limit:.0e})", step + 1));
                }
            }
        }
        println!("worst of {} steps: loss {:.1e}, norm {:.1e}, lr {:.1e}", found.len(), worst[0], worst[1], worst[2]);
    }

    fn tensors(&mut self, what: &str, expected: &Tensors, found: &Tensors, limit: f64) {
        let names = |tensors: &Tensors| tensors.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(expected), names(found), "names of {what}");
        let mut worst = (0.0, "");
        for (name, (shape, values)) in expected {
            let (found_shape, found) = &found[name];
            assert_eq!(shape, found_shape, "dims of {name}");
            let distance = distance(name, values, found);
            if distance.is_nan() || distance > limit {
                self.0.push(format!("{what} of {name}: relative distance {distance:.1e} > {limit:.0e}"));
            }
            if distance > worst.0 {
                worst = (distance, name);
            }
        }
        println!("worst of {} {what}: {:.1e} ({})", expected.len(), worst.0, worst.1);
    }

    fn give(self, case: &str) {
        assert!(self.0.is_empty(), "{case}:\n{}", self.0.join("\n"));
    }
}

/// Five steps: every number the reference has.
fn five_steps(name: &str, dtype: &str, tolerance: Tolerance) {
    let case = format!("{name}-{dtype}");
    let run = train(&config(&case, name, dtype, 5, 2, &[]));
    let folder = reference(name).join(dtype);
    let mut verdict = Verdict::default();
    verdict.metrics(&read_metrics(&folder.join("metrics.jsonl")), &run.metrics, tolerance);
    verdict.tensors("gradients", &read_tensors(&folder.join("gradients.safetensors")), &run.gradients, tolerance.gradients);
    verdict.tensors("weights", &read_tensors(&folder.join("weights.safetensors")), &run.weights, tolerance.weights);
    verdict.tensors("moments", &read_tensors(&folder.join("moments.safetensors")), &run.moments, tolerance.moments);
    verdict.give(&case);
}

/// Fifty steps: losses, norms and rates, which would show a drift.
fn fifty_steps(name: &str) {
    let case = format!("{name}-50");
    let run = train(&config(&case, name, "f32", 50, 10, &[]));
    let mut verdict = Verdict::default();
    verdict.metrics(&read_metrics(&reference(name).join("f32/metrics-50.jsonl")), &run.metrics, F32);
    verdict.give(&case);
}

#[test]
fn llama_with_grouped_queries() {
    five_steps("llama-tiny", "f32", F32);
    fifty_steps("llama-tiny");
}

#[test]
fn llama_with_as_many_keys_as_queries() {
    five_steps("llama-mha-tiny", "f32", F32);
    fifty_steps("llama-mha-tiny");
}

#[test]
fn llama_tied_with_wide_heads_and_scaled_rotation() {
    five_steps("llama32-tiny", "f32", F32);
    fifty_steps("llama32-tiny");
}

#[test]
fn gpt2() {
    five_steps("gpt2-tiny", "f32", F32);
    fifty_steps("gpt2-tiny");
}

#[test]
fn llama_in_bf16() {
    five_steps("llama-tiny", "bf16", BF16);
}

#[test]
fn gpt2_in_bf16() {
    five_steps("gpt2-tiny", "bf16", BF16);
}

#[test]
fn a_slightly_wrong_model_is_seen() {
    let expected = read_metrics(&reference("llama-tiny").join("f32/metrics.jsonl"));
    for (case, wrong) in [("wrong-rotation", "model.rope_theta=11000.0"), ("wrong-epsilon", "model.norm_eps=1e-6")] {
        let run = train(&config(case, "llama-tiny", "f32", 5, 2, &[wrong]));
        let mut verdict = Verdict::default();
        verdict.metrics(&expected, &run.metrics, F32);
        assert!(verdict.0.iter().any(|line| line.contains("loss")), "{wrong} went by unnoticed");
    }
}
