//! The same bits on layouts that nobody thought of: random models on random meshes with random schedules, orders of sums, micro-batches,
//! recomputation and formats train two steps, and are compared with one rank that keeps the same canonical geometry.
//!
//! A failing case prints its configuration; `PROPTEST_RNG_SEED` repeats a run of cases.

#[path = "support/meshes.rs"]
mod meshes;
#[path = "support/ranks.rs"]
mod ranks;

use ferrotron::config::{Config, Recompute, SumOrder};
use ferrotron::dtype::Dtype;
use meshes::{plan, planned};
use proptest::prelude::{Just, ProptestConfig, Strategy, prop_assert, prop_assert_eq, prop_oneof, proptest};
use ranks::train;

const STEPS: u64 = 2;

/// The most ranks of a case: they are threads of one small machine.
const RANKS: usize = 12;

/// One rank with the geometry of `config`, none of its layout and none of its choices that may not change a bit.
fn alone(config: &Config) -> Config {
    let mut alone = config.clone();
    let parallel = &mut alone.parallel;
    (parallel.tp, parallel.pp, parallel.dp_replicate, parallel.dp_shard, parallel.zero) = (1, 1, 1, 1, 0);
    (parallel.pp_schedule, parallel.pp_chunks) = ("1f1b".to_string(), 1);
    alone.train.recompute = Recompute::None;
    if alone.geometry.order == SumOrder::Lanes {
        // In the order of rows the micro-batch is part of the geometry.
        alone.train.micro_batch_size = 1;
    }
    alone
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, max_shrink_iters: 20, ..ProptestConfig::default() })]

    #[test]
    fn random_layouts_equal_one_rank(
        (config, world) in planned().prop_filter("few ranks", |(_, world)| (2..=RANKS).contains(world)),
        dtype in prop_oneof![Just(Dtype::F32), Just(Dtype::Bf16), Just(Dtype::F16)],
    ) {
        let mut config = config;
        (config.train.dtype, config.train.steps) = (dtype, STEPS);
        // Gradients of a first step overflow at no smaller scale than this.
        config.train.loss_scale.initial = 1024.0;
        let alone = alone(&config);
        prop_assert_eq!(plan(&config, world).geometry, plan(&alone, 1).geometry);
        let difference = train(&config, world, STEPS).difference(&train(&alone, 1, STEPS));
        prop_assert!(difference.is_none(), "{} on {world} ranks of\n{}", difference.unwrap_or_default(), config.to_toml());
    }
}
