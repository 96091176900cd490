//! The same run, bit for bit, on every layout: each layout of a table trains a few steps on threads and is compared with one rank
//! that keeps the same canonical geometry. Losses, norms, weights, master weights and moments must be equal bit by bit.

#[path = "support/ranks.rs"]
mod ranks;

use ferrotron::config::Config;
use ranks::{Trace, train};
use std::collections::HashMap;
use std::time::Instant;

const STEPS: u64 = 2;

/// A model and how it computes.
#[derive(Clone, Copy)]
struct Model {
    name: &'static str,
    family: &'static str,
    kv_heads: usize,
    tied: bool,
    dtype: &'static str,
    vocabulary: usize,
}

/// Prime vocabularies do not divide by any number of ranks.
const MODELS: [Model; 4] = [
    Model { name: "llama gqa f32", family: "llama", kv_heads: 4, tied: false, dtype: "f32", vocabulary: 97 },
    Model { name: "llama tied bf16", family: "llama", kv_heads: 8, tied: true, dtype: "bf16", vocabulary: 97 },
    Model { name: "gpt2 f32", family: "gpt2", kv_heads: 8, tied: true, dtype: "f32", vocabulary: 101 },
    Model { name: "gpt2 bf16", family: "gpt2", kv_heads: 8, tied: true, dtype: "bf16", vocabulary: 96 },
];

/// Fewer kv heads than virtual shards: neighbouring shards share them, on one rank and on several.
const SHARING: [Model; 4] = [
    Model { name: "llama kv 2 f32", family: "llama", kv_heads: 2, tied: false, dtype: "f32", vocabulary: 97 },
    Model { name: "llama kv 2 bf16", family: "llama", kv_heads: 2, tied: true, dtype: "bf16", vocabulary: 96 },
    Model { name: "llama kv 1 f32", family: "llama", kv_heads: 1, tied: true, dtype: "f32", vocabulary: 96 },
    Model { name: "llama kv 1 bf16", family: "llama", kv_heads: 1, tied: false, dtype: "bf16", vocabulary: 97 },
];

/// Without master weights: transposed and whole tensors, and shared heads.
const BY_CHANCE: [Model; 2] = [
    Model { name: "gpt2 by chance", family: "gpt2", kv_heads: 8, tied: true, dtype: "bf16 by chance", vocabulary: 97 },
    Model { name: "llama by chance", family: "llama", kv_heads: 2, tied: false, dtype: "bf16 by chance", vocabulary: 97 },
];

#[derive(Clone, Copy)]
struct Layout {
    replicate: usize,
    shard: usize,
    tp: usize,
    pp: usize,
    zero: u8,
    schedule: &'static str,
    chunks: usize,
    recompute: &'static str,
    sequence: bool,
    micro: usize,
    order: &'static str,
    /// The geometry is this many times finer than the layout.
    finer: usize,
}

const PLAIN: Layout = Layout {
    replicate: 1,
    shard: 1,
    tp: 1,
    pp: 1,
    zero: 1,
    schedule: "1f1b",
    chunks: 1,
    recompute: "none",
    sequence: true,
    micro: 1,
    order: "lanes",
    finer: 1,
};

impl Layout {
    fn world(&self) -> usize {
        self.replicate * self.shard * self.tp * self.pp
    }

    fn text(&self) -> String {
        let Layout { replicate, shard, tp, pp, zero, schedule, chunks, recompute, sequence, micro, order, finer } = self;
        format!(
            "dp {replicate}x{shard} tp {tp} pp {pp} zero {zero} {schedule}/{chunks} recompute {recompute} sp {sequence} micro {micro} {order} finer {finer}"
        )
    }

    fn config(&self, model: &Model) -> Config {
        let Layout { replicate, shard, tp, pp, zero, schedule, chunks, recompute, sequence, micro, order, finer } = self;
        let Model { family, kv_heads, tied, dtype, vocabulary, .. } = model;
        let (dtype, by_chance) = dtype.strip_suffix(" by chance").map_or((*dtype, false), |dtype| (dtype, true));
        let kv = if *family == "llama" { format!("num_kv_heads = {kv_heads}") } else { String::new() };
        let text = format!(
            "[model]\nfamily = \"{family}\"\nhidden_size = 32\nintermediate_size = 64\nnum_layers = 8\nnum_heads = 8\n{kv}\n\
             vocab_size = {vocabulary}\ntie_word_embeddings = {tied}\ninit_std = 0.1\n\
             [train]\nsteps = 10\nseq_len = 16\nglobal_batch_size = 16\nmicro_batch_size = {micro}\ndtype = \"{dtype}\"\n\
             recompute = \"{recompute}\"\n[optimizer]\nlr = 1e-2\ngrad_clip = 0.5\nstochastic_rounding = {by_chance}\n\
             [parallel]\ntp = {tp}\npp = {pp}\ndp_replicate = {replicate}\ndp_shard = {shard}\nzero = {zero}\n\
             sequence_parallel = {sequence}\npp_schedule = \"{schedule}\"\npp_chunks = {chunks}\n\
             [geometry]\nshards = {}\nlanes = {}\norder = \"{order}\"\n",
            tp * finer,
            replicate * shard * finer,
        );
        Config::parse("layout.toml", &text, &[]).unwrap_or_else(|problems| panic!("{problems}")).0
    }

    /// One rank with the same geometry.
    fn alone(&self) -> Layout {
        let lanes = self.replicate * self.shard * self.finer;
        // A rank alone says its geometry by being finer than itself; shards and lanes are set apart below.
        Layout { finer: lanes, ..PLAIN }
    }
}

/// The references, by all that decides a run's bits.
#[derive(Default)]
struct References(HashMap<(&'static str, usize, usize, &'static str, usize), Trace>);

impl References {
    fn of(&mut self, model: &Model, layout: &Layout) -> &Trace {
        let (shards, lanes) = (layout.tp * layout.finer, layout.replicate * layout.shard * layout.finer);
        // In the order of rows the micro-batch is part of the geometry.
        let micro = if layout.order == "rows" { layout.micro } else { 1 };
        self.0.entry((model.name, shards, lanes, layout.order, micro)).or_insert_with(|| {
            let mut config = Layout { order: layout.order, micro, ..layout.alone() }.config(model);
            (config.geometry.shards, config.geometry.lanes) = (shards, lanes);
            train(&config, 1, STEPS)
        })
    }
}

/// Every (dp, tp, pp) with a product of up to 8, with ZeRO stage and schedule taking turns.
fn meshes() -> Vec<Layout> {
    let mut layouts = Vec::new();
    let sizes = [1, 2, 4, 8];
    for pp in sizes {
        for tp in sizes {
            for dp in sizes {
                if dp * tp * pp > 8 || dp * tp * pp == 1 {
                    continue;
                }
                let turn = layouts.len();
                layouts.push(Layout { shard: dp, tp, pp, zero: (turn % 4) as u8, ..PLAIN });
            }
        }
    }
    layouts
}

fn schedules() -> Vec<Layout> {
    let named = [("gpipe", 1), ("1f1b", 1), ("zero_bubble", 1), ("interleaved", 2), ("breadth_first", 2), ("zbv", 2), ("dualpipe_v", 2)];
    let mut layouts = Vec::new();
    for (schedule, chunks) in named {
        for pp in [2, 4] {
            layouts.push(Layout { pp, schedule, chunks, ..PLAIN });
            layouts.push(Layout { pp, schedule, chunks, tp: 2, recompute: "selective", ..PLAIN });
            layouts.push(Layout { pp, schedule, chunks, finer: 2, micro: 2, ..PLAIN });
            layouts.push(Layout { pp, schedule, chunks, shard: 2, zero: 2, order: "rows", recompute: "full", ..PLAIN });
        }
    }
    layouts
}

fn sharding() -> Vec<Layout> {
    let mut layouts = Vec::new();
    for zero in 0..4 {
        for order in ["lanes", "rows"] {
            layouts.push(Layout { shard: 4, zero, order, ..PLAIN });
            layouts.push(Layout { replicate: 2, shard: 2, zero, order, recompute: "full", ..PLAIN });
            layouts.push(Layout { replicate: 2, shard: 2, tp: 2, zero, order, ..PLAIN });
            layouts.push(Layout { shard: 2, pp: 2, zero, order, schedule: "zero_bubble", ..PLAIN });
        }
    }
    layouts
}

fn streams_and_geometries() -> Vec<Layout> {
    let mut layouts = Vec::new();
    for (tp, sequence) in [(2, false), (4, false), (8, false), (2, true), (4, true)] {
        layouts.push(Layout { tp, sequence, ..PLAIN });
        layouts.push(Layout { tp, sequence, micro: 2, recompute: "selective", ..PLAIN });
    }
    for recompute in ["none", "selective", "full"] {
        layouts.push(Layout { recompute, ..PLAIN });
        layouts.push(Layout { recompute, micro: 4, ..PLAIN });
        layouts.push(Layout { recompute, micro: 2, finer: 2, ..PLAIN });
    }
    for finer in [2, 4] {
        layouts.push(Layout { finer, ..PLAIN });
        layouts.push(Layout { finer, shard: 2, zero: 3, ..PLAIN });
        layouts.push(Layout { finer, shard: 2, zero: 2, order: "rows", ..PLAIN });
        layouts.push(Layout { finer: 2, tp: finer, sequence: finer == 2, ..PLAIN });
        layouts.push(Layout { finer: 2, tp: 2, shard: 2, pp: finer / 2, ..PLAIN });
    }
    layouts
}

fn sharing_heads() -> Vec<Layout> {
    let mut layouts = Vec::new();
    for (tp, sequence) in [(2, true), (4, true), (8, true), (2, false), (4, false), (8, false)] {
        layouts.push(Layout { tp, sequence, ..PLAIN });
    }
    for sequence in [true, false] {
        for (tp, finer) in [(1, 4), (1, 8), (2, 2), (2, 4), (4, 2)] {
            layouts.push(Layout { tp, finer, sequence, ..PLAIN });
        }
        layouts.push(Layout { tp: 2, finer: 2, shard: 2, zero: 3, micro: 2, sequence, ..PLAIN });
        layouts.push(Layout { tp: 4, shard: 2, zero: 2, order: "rows", recompute: "full", sequence, ..PLAIN });
        layouts.push(Layout { tp: 2, finer: 2, replicate: 2, zero: 0, order: "rows", sequence, ..PLAIN });
        layouts.push(Layout { tp: 4, pp: 2, schedule: "zero_bubble", recompute: "selective", sequence, ..PLAIN });
        layouts.push(Layout { tp: 2, finer: 4, pp: 2, schedule: "interleaved", chunks: 2, sequence, ..PLAIN });
    }
    layouts
}

fn compare(kind: &str, layouts: &[Layout], models: &[Model]) {
    let mut references = References::default();
    let mut failures = Vec::new();
    let mut compared = 0;
    for model in models {
        for layout in layouts {
            let begun = Instant::now();
            let difference = train(&layout.config(model), layout.world(), STEPS).difference(references.of(model, layout));
            let verdict = difference.as_deref().unwrap_or("equal");
            println!("{kind:9} {:16} {}: {verdict} ({:.2} s)", model.name, layout.text(), begun.elapsed().as_secs_f64());
            compared += 1;
            failures.extend(difference.map(|difference| format!("{} {}: {difference}", model.name, layout.text())));
        }
    }
    println!("{kind}: {compared} layouts compared");
    assert!(failures.is_empty(), "{} of {compared} layouts differ from one rank:\n{}", failures.len(), failures.join("\n"));
}

#[test]
fn every_mesh_up_to_eight_ranks() {
    compare("mesh", &meshes(), &MODELS);
}

#[test]
fn shared_heads() {
    compare("heads", &sharing_heads(), &SHARING);
}

/// What a copied head learns is what the one head would have learnt, up to rounding.
#[test]
fn shared_heads_learn_what_one_would() {
    for model in [&SHARING[0], &SHARING[2]] {
        let trace = |shards: usize| {
            let mut config = PLAIN.config(model);
            config.geometry.shards = shards;
            train(&config, 1, STEPS).steps
        };
        let whole = trace(1);
        for shards in [4, 8] {
            for ((loss, norm), (other_loss, other_norm)) in whole.iter().zip(trace(shards)) {
                let apart = |a: u64, b: u64| (f64::from_bits(a) - f64::from_bits(b)).abs() / f64::from_bits(a);
                assert!(apart(*loss, other_loss) < 1e-5 && apart(*norm, other_norm) < 1e-5, "{} over {shards} shards", model.name);
            }
        }
    }
}

#[test]
fn weights_rounded_by_chance() {
    compare("chance", &meshes(), &BY_CHANCE[..1]);
    compare("chance", &sharing_heads(), &BY_CHANCE[1..]);
    let sharded: Vec<Layout> = sharding().into_iter().filter(|layout| layout.order == "lanes").collect();
    compare("chance", &sharded, &BY_CHANCE);
}

/// With updates that are mostly less than half of a weight's last place.
#[test]
fn chance_learns_what_master_weights_learn() {
    let last = |dtype| {
        let mut config = PLAIN.config(&Model { dtype, ..BY_CHANCE[0] });
        (config.optimizer.lr, config.schedule.min_lr, config.train.steps) = (1e-4, 1e-4, 60);
        let steps = train(&config, 1, 60).steps;
        let mean = |steps: &[(u64, u64)]| steps.iter().map(|(loss, _)| f64::from_bits(*loss)).sum::<f64>() / steps.len() as f64;
        (mean(&steps[..10]), mean(&steps[50..]))
    };
    let ((first, with_masters), (_, by_chance)) = (last("bf16"), last("bf16 by chance"));
    println!("from {first} to {with_masters} with master weights, {by_chance} by chance");
    assert!((with_masters - by_chance).abs() < 0.1 * (first - with_masters), "{first} to {with_masters}, by chance {by_chance}");
}

#[test]
fn every_schedule() {
    compare("schedule", &schedules(), &MODELS[..2]);
}

#[test]
fn every_zero_stage_and_order() {
    compare("zero", &sharding(), &MODELS[1..3]);
}

#[test]
fn streams_recomputation_micro_batches_and_finer_geometries() {
    compare("stream", &streams_and_geometries(), &MODELS);
}
