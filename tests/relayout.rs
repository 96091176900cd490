//! Runs that move: some steps on one layout, a checkpoint, some on another, and again. Losses, norms, weights, master weights and moments
//! must be those of the run that never moved, bit by bit. And what a geometry does not allow is told in words.

#[path = "support/ranks.rs"]
mod ranks;

use ferrotron::config::Config;
use ferrotron::plan::{Geometry, Order, Plan};
use ferrotron::rng::Stream;
use ranks::{Leg, Trace, run, train};
use std::path::{Path, PathBuf};
use std::time::Instant;

const STEPS: u64 = 4;

/// What stays: the model and the run's canonical sums.
struct Run {
    family: &'static str,
    /// Fewer than shards: neighbouring shards share them.
    kv_heads: usize,
    tied: bool,
    dtype: &'static str,
    shards: usize,
    lanes: usize,
    order: &'static str,
    /// Sequences of a micro-batch, where they are part of the geometry.
    rows: usize,
}

/// What may change from start to start.
#[derive(Clone, Debug)]
struct Layout {
    replicate: usize,
    shard: usize,
    tp: usize,
    pp: usize,
    zero: usize,
    schedule: (&'static str, usize),
    recompute: &'static str,
    sequence: bool,
    micro: usize,
}

impl Layout {
    fn world(&self) -> usize {
        self.replicate * self.shard * self.tp * self.pp
    }

    fn text(&self) -> String {
        let Layout { replicate, shard, tp, pp, zero, schedule: (schedule, _), recompute, sequence, micro } = self;
        format!("dp {replicate}x{shard} tp {tp} pp {pp} zero {zero} {schedule} {recompute} sp {sequence} micro {micro}")
    }

    fn config(&self, run: &Run) -> Config {
        let Layout { replicate, shard, tp, pp, zero, schedule: (schedule, chunks), recompute, sequence, micro } = self;
        let Run { family, kv_heads, tied, dtype, shards, lanes, order, .. } = run;
        let (dtype, by_chance) = dtype.strip_suffix(" by chance").map_or((*dtype, false), |dtype| (dtype, true));
        let kv = if *family == "llama" { format!("num_kv_heads = {kv_heads}") } else { String::new() };
        let text = format!(
            "[model]\nfamily = \"{family}\"\nhidden_size = 32\nintermediate_size = 64\nnum_layers = 8\nnum_heads = 8\n{kv}\n\
             vocab_size = 97\ntie_word_embeddings = {tied}\ninit_std = 0.1\n\
             [train]\nsteps = 10\nseq_len = 16\nglobal_batch_size = 16\nmicro_batch_size = {micro}\ndtype = \"{dtype}\"\n\
             recompute = \"{recompute}\"\n[optimizer]\nlr = 1e-2\ngrad_clip = 0.5\nstochastic_rounding = {by_chance}\n[schedule]\nwarmup_steps = 3\n\
             [parallel]\ntp = {tp}\npp = {pp}\ndp_replicate = {replicate}\ndp_shard = {shard}\nzero = {zero}\n\
             sequence_parallel = {sequence}\npp_schedule = \"{schedule}\"\npp_chunks = {chunks}\n\
             [geometry]\nshards = {shards}\nlanes = {lanes}\norder = \"{order}\"\n"
        );
        Config::parse("layout.toml", &text, &[]).unwrap_or_else(|problems| panic!("{problems}")).0
    }
}

/// Choices that follow from the number of the case.
struct Choices {
    stream: Stream,
    next: u64,
}

impl Choices {
    fn of<T: Copy>(&mut self, from: &[T]) -> T {
        self.next += 1;
        from[(self.stream.uniform(self.next) * from.len() as f64) as usize]
    }

    fn run(&mut self, case: usize) -> Run {
        let (family, tied) = self.of(&[("llama", false), ("llama", true), ("gpt2", true)]);
        Run {
            family,
            kv_heads: self.of(&[1, 2, 4]),
            tied,
            dtype: ["f32", "bf16", "bf16 by chance"][case % 3],
            shards: self.of(&[2, 4]),
            lanes: self.of(&[2, 4]),
            order: self.of(&["lanes", "rows"]),
            rows: self.of(&[1, 2]),
        }
    }

    /// A layout of at most eight ranks that the geometry allows.
    fn layout(&mut self, run: &Run) -> Layout {
        loop {
            let pp = self.of(&[1, 1, 2, 2, 4]);
            let mixed =
                [("gpipe", 1), ("1f1b", 1), ("zero_bubble", 1), ("interleaved", 2), ("breadth_first", 2), ("zbv", 2), ("dualpipe_v", 2)];
            let layout = Layout {
                replicate: self.of(&[1, 1, 2]),
                shard: self.of(&[1, 2, 4]),
                tp: self.of(&[1, 2, 4]),
                pp,
                zero: self.of(&[0, 1, 2, 3]),
                schedule: if pp == 1 { ("1f1b", 1) } else { self.of(&mixed) },
                recompute: self.of(&["none", "selective", "full"]),
                sequence: self.of(&[true, false]),
                micro: if run.order == "rows" { run.rows } else { self.of(&[1, 2, 4]) },
            };
            let world = layout.world();
            if (2..=8).contains(&world) && Plan::new(&layout.config(run), world, None).is_ok() {
                return layout;
            }
        }
    }
}

/// A folder that is not there yet.
fn folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("relayout").join(name);
    if folder.exists() {
        std::fs::remove_dir_all(&folder).expect("our own folder");
    }
    folder
}

/// How the run that moves parts from the one that stays; None: nowhere.
fn moved(name: &str, run_of: &Run, layouts: &[Layout; 3]) -> Option<String> {
    let whole = train(&layouts[0].config(run_of), layouts[0].world(), STEPS);
    let folders = [folder(&format!("{name}-first")), folder(&format!("{name}-second"))];
    let legs = [
        Leg { from: None, steps: 0..2, save_to: Some(&folders[0]) },
        Leg { from: Some(&folders[0]), steps: 2..3, save_to: Some(&folders[1]) },
        Leg { from: Some(&folders[1]), steps: 3..STEPS, save_to: None },
    ];
    let mut steps = Vec::new();
    for (layout, leg) in layouts.iter().zip(&legs) {
        let mut trace = run(&layout.config(run_of), layout.world(), leg);
        steps.append(&mut trace.steps);
        if leg.save_to.is_none() {
            trace.steps = steps;
            return whole.difference(&trace);
        }
    }
    unreachable!("the last leg leaves no checkpoint")
}

#[test]
fn a_run_that_moves_is_the_run_that_stays() {
    let mut choices = Choices { stream: Stream::new(11, "relayout"), next: 0 };
    let mut failures = Vec::new();
    for case in 0..20 {
        let run = choices.run(case);
        let layouts = [(); 3].map(|()| choices.layout(&run));
        let Run { family, kv_heads, tied, dtype, shards, lanes, order, .. } = run;
        let begun = Instant::now();
        let difference = moved(&case.to_string(), &run, &layouts);
        let (verdict, seconds) = (difference.as_deref().unwrap_or("equal"), begun.elapsed().as_secs_f64());
        println!(
            "case {case}: {family} kv {kv_heads} tied {tied} {dtype}, shards {shards} lanes {lanes} {order}: {verdict} ({seconds:.2} s)"
        );
        layouts.iter().for_each(|layout| println!("    {}", layout.text()));
        failures.extend(difference.map(|difference| format!("case {case}: {difference}")));
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// The tensors of a kind, by name.
fn kind<'a>(trace: &'a Trace, kind: &str) -> Vec<(&'a str, &'a [u8])> {
    let of_kind = |(name, bytes): (&'a String, &'a Vec<u8>)| Some((name.strip_prefix(kind)?.strip_prefix(' ')?, &bytes[..]));
    trace.tensors.iter().filter_map(of_kind).collect()
}

/// A run that goes on with chance drops its master weights; the model that it goes on with is the checkpoint's to the bit. One that goes
/// on without chance takes the weights for masters.
#[test]
fn master_weights_may_be_dropped_and_taken_up() {
    let config = |dtype| {
        let run = Run { family: "gpt2", kv_heads: 4, tied: true, dtype, shards: 2, lanes: 2, order: "lanes", rows: 1 };
        let layout =
            Layout { replicate: 1, shard: 2, tp: 2, pp: 1, zero: 3, schedule: ("1f1b", 1), recompute: "none", sequence: true, micro: 1 };
        layout.config(&run)
    };
    for (before, after) in [("bf16", "bf16 by chance"), ("bf16 by chance", "bf16"), ("f32", "bf16 by chance"), ("bf16 by chance", "f32")] {
        let folder = folder(&format!("{before} to {after}"));
        let saved = run(&config(before), 4, &Leg { from: None, steps: 0..2, save_to: Some(&folder) });
        let loaded = run(&config(after), 4, &Leg { from: Some(&folder), steps: 2..2, save_to: None });
        for moment in ["exp_avg", "exp_avg_sq"] {
            assert!(kind(&loaded, moment) == kind(&saved, moment), "{before} to {after}: {moment}");
        }
        assert_eq!(kind(&loaded, "master").is_empty(), after != "bf16", "{after}");
        if before.starts_with("bf16") && after.starts_with("bf16") {
            assert!(kind(&loaded, "weights") == kind(&saved, "weights"), "{before} to {after}");
        }
        run(&config(after), 4, &Leg { from: Some(&folder), steps: 2..3, save_to: None });
    }
}

/// What is said of a layout on the geometry of a checkpoint.
fn refused(change: impl Fn(&mut Config), world: usize, geometry: Geometry) -> String {
    let plain =
        Layout { replicate: 1, shard: 1, tp: 1, pp: 1, zero: 1, schedule: ("1f1b", 1), recompute: "none", sequence: true, micro: 1 };
    let mut config =
        plain.config(&Run { family: "llama", kv_heads: 4, tied: false, dtype: "f32", shards: 0, lanes: 0, order: "auto", rows: 1 });
    change(&mut config);
    Plan::new(&config, world, None).expect("a run may start with it");
    let problems = Plan::new(&config, world, Some(geometry)).expect_err("the geometry does not allow it");
    problems.into_iter().map(|problem| format!("{} ({})", problem.message, problem.help.unwrap_or_default())).collect::<Vec<_>>().join("\n")
}

#[test]
fn what_a_geometry_does_not_allow_is_told() {
    let geometry = Geometry { shards: 2, lanes: 4, order: Order::Lanes };
    let tp = refused(|config| config.parallel.tp = 4, 4, geometry);
    assert!(tp.contains("`geometry.shards` = 2 cannot be cut over `parallel.tp` = 4 ranks") && tp.contains("(tp 2"), "{tp}");
    let dp = refused(|config| config.parallel.dp_shard = 8, 8, geometry);
    assert!(dp.contains("`geometry.lanes` = 4 cannot be cut over") && dp.contains("dp_shard 8"), "{dp}");
    let wide = |config: &mut Config| {
        config.train.global_batch_size = 12;
        config.parallel.dp_replicate = 2;
        config.parallel.dp_shard = 1;
    };
    let batch = refused(wide, 2, Geometry { lanes: 8, ..geometry });
    assert!(batch.contains("`train.global_batch_size` = 12 cannot be shared evenly by `geometry.lanes` = 8"), "{batch}");
    println!("{tp}\n{dp}\n{batch}");
}
