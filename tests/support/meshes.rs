//! Random configurations of models and meshes, small enough to go through all their ranks.
//!
//! Invariant: every configuration given out has a plan.

use ferrotron::config::Config;
use ferrotron::plan::Plan;
use proptest::prelude::{Just, Strategy, any, prop_oneof};

/// A configuration and the size of its world.
pub fn planned() -> impl Strategy<Value = (Config, usize)> {
    let tp = prop_oneof![Just(1usize), Just(2), Just(4)];
    let pp = prop_oneof![Just((1usize, "1f1b", 1usize)), Just((2, "1f1b", 1)), Just((3, "gpipe", 1)), Just((2, "interleaved", 2))];
    let more =
        prop_oneof![Just((1usize, "zero_bubble", 1usize)), Just((2, "zbv", 2)), Just((4, "zero_bubble", 1)), Just((2, "dualpipe_v", 2))];
    let dp = prop_oneof![Just((1usize, 1usize)), Just((1, 2)), Just((2, 1)), Just((2, 4)), Just((1, 3)), Just((3, 1))];
    let model = (any::<bool>(), any::<bool>(), 30usize..300, 4usize..9, 1usize..4, 0u32..4);
    let run = (0u8..4, any::<bool>(), any::<bool>(), 1usize..3, 0usize..3, 0usize..3, 0usize..3);
    (tp, prop_oneof![pp, more], dp, model, run).prop_map(|(tp, (pp, schedule, chunks), (replicate, shard), model, run)| {
        let (llama, tied, vocab, layers, size, sharing) = model;
        let (zero, rows, sequence_parallel, micro, per_lane, finer, recompute) = run;
        let (family, kv) = if llama { ("llama", format!("num_kv_heads = {}", 8 >> sharing)) } else { ("gpt2", String::new()) };
        let (finer, order) = ([1, 2, 4][finer], if rows { "rows" } else { "lanes" });
        let (shards, lanes) = (tp.max(finer.min(4)), replicate * shard * finer);
        let batch = lanes * micro * (per_lane + 1);
        let recompute = ["none", "selective", "full"][recompute];
        let text = format!(
            "[model]\nfamily = \"{family}\"\nhidden_size = {hidden}\nintermediate_size = {wide}\nnum_layers = {layers}\nnum_heads = 8\n{kv}\n\
             vocab_size = {vocab}\ntie_word_embeddings = {tied}\n[train]\nsteps = 1\nseq_len = 8\nglobal_batch_size = {batch}\n\
             micro_batch_size = {micro}\nrecompute = \"{recompute}\"\n[parallel]\ntp = {tp}\npp = {pp}\ndp_replicate = {replicate}\n\
             dp_shard = {shard}\nzero = {zero}\nsequence_parallel = {sequence_parallel}\npp_schedule = \"{schedule}\"\npp_chunks = {chunks}\n\
             [geometry]\nshards = {shards}\nlanes = {lanes}\norder = \"{order}\"\n",
            hidden = 16 * size,
            wide = 20 * size,
        );
        (config(&text), tp * pp * replicate * shard)
    })
}

/// The configuration in `text`, which has no problems.
pub fn config(text: &str) -> Config {
    Config::parse("test.toml", text, &[]).unwrap_or_else(|problems| panic!("{problems}\n{text}")).0
}

pub fn plan(config: &Config, world: usize) -> Plan {
    Plan::new(config, world, None).unwrap_or_else(|problems| panic!("{problems:#?}\n{}", config.to_toml()))
}
