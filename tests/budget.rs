//! What is predicted is measured: the peak memory and the traffic that a plan tells, held against real steps with ranks on threads.
//!
//! The peak of each rank must lie within 2 % of its rehearsal, what ZeRO holds must be what its table says to the byte, and so must
//! every call of every group.

use ferrotron::comm::connect::Transport;
use ferrotron::comm::groups::Groups;
use ferrotron::comm::threads::Threads;
use ferrotron::config::{Config, DataSource};
use ferrotron::data::loader::Batch;
use ferrotron::device::Device;
use ferrotron::parallel::state::Held;
use ferrotron::plan::Plan;
use ferrotron::plan::catalog::Kind;
use ferrotron::plan::traffic::{Count, Traffic};
use ferrotron::train::step::Trainer;
use ferrotron::train::{forecast, rehearsal, resume};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

#[derive(Clone, Copy)]
struct Case {
    family: &'static str,
    tied: bool,
    dtype: &'static str,
    replicate: usize,
    shard: usize,
    tp: usize,
    pp: usize,
    zero: usize,
    schedule: (&'static str, usize),
    recompute: &'static str,
    sequence: bool,
    micro: usize,
    order: &'static str,
    /// Lanes of each data-parallel rank.
    lanes: usize,
    masked: bool,
}

const PLAIN: Case = Case {
    family: "llama",
    tied: false,
    dtype: "bf16",
    replicate: 1,
    shard: 1,
    tp: 1,
    pp: 1,
    zero: 1,
    schedule: ("1f1b", 1),
    recompute: "none",
    sequence: true,
    micro: 1,
    order: "lanes",
    lanes: 1,
    masked: false,
};

impl Case {
    fn world(&self) -> usize {
        self.replicate * self.shard * self.tp * self.pp
    }

    fn text(&self) -> String {
        let Case { family, tied, dtype, replicate, shard, tp, pp, zero, schedule: (schedule, _), recompute, .. } = self;
        let Case { sequence, micro, order, lanes, masked, .. } = self;
        format!(
            "{family:5} tied {tied} {dtype:4} dp {replicate}x{shard} tp {tp} pp {pp} zero {zero} {schedule} {recompute} sp {sequence} micro {micro} \
             {order}/{lanes} masked {masked}"
        )
    }

    fn config(&self) -> Config {
        let Case { family, tied, dtype, replicate, shard, tp, pp, zero, schedule: (schedule, chunks), recompute, .. } = self;
        let Case { sequence, micro, order, lanes, masked, .. } = self;
        let (dtype, by_chance) = dtype.strip_suffix(" by chance").map_or((*dtype, false), |dtype| (dtype, true));
        let kv = if *family == "llama" { "num_kv_heads = 4" } else { "" };
        let text = format!(
            "[model]\nfamily = \"{family}\"\nhidden_size = 64\nintermediate_size = 160\nnum_layers = 8\nnum_heads = 8\n{kv}\n\
             vocab_size = 499\ntie_word_embeddings = {tied}\n[data]\ndocument_mask = {masked}\n\
             [train]\nsteps = 10\nseq_len = 64\nglobal_batch_size = 16\nmicro_batch_size = {micro}\ndtype = \"{dtype}\"\n\
             recompute = \"{recompute}\"\n[optimizer]\nstochastic_rounding = {by_chance}\n[parallel]\ntp = {tp}\npp = {pp}\ndp_replicate = {replicate}\ndp_shard = {shard}\nzero = {zero}\n\
             sequence_parallel = {sequence}\npp_schedule = \"{schedule}\"\npp_chunks = {chunks}\n\
             [geometry]\nlanes = {}\norder = \"{order}\"\n",
            replicate * shard * lanes,
        );
        Config::parse("case.toml", &text, &[]).unwrap_or_else(|problems| panic!("{problems}")).0
    }
}

/// What a rank really did.
struct Measured {
    held: Held,
    peak: usize,
    /// Of one step.
    traffic: Traffic,
}

/// Two steps on threads. The first is like all others in memory and traffic; the second shows it.
fn measure(config: &Config, plan: &Plan) -> Vec<Measured> {
    let world = plan.mesh.world();
    let transport = Transport::Threads(Threads::new(world, Duration::from_secs(120)));
    thread::scope(|scope| {
        let ranks: Vec<_> = (0..world)
            .map(|rank| {
                let (plan, transport) = (plan.clone(), &transport);
                scope.spawn(move || measure_rank(config, plan, transport, rank))
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().expect("no rank panics")).collect()
    })
}

fn measure_rank(config: &Config, plan: Plan, transport: &Transport, rank: usize) -> Measured {
    let device = Device::cpu(1);
    let groups = Groups::connect(transport, &plan.mesh, rank).expect("groups of threads");
    let mut trainer = Trainer::new(config, plan, rank, &device, groups).expect("a trainer");
    resume::start(&mut trainer, config).expect("initial weights");
    let held = trainer.stage.zero.held().expect("gathers that end");
    let batch = batch(&trainer.rank.rows, trainer.plan.t, config.model.vocab_size);
    device.memory().reset_peak();
    let mut traffic = Vec::new();
    for step in 0..2 {
        trainer.groups.take_traffic();
        let outcome = trainer.step(step, &batch, false).expect("a step");
        assert!(outcome.applied, "{outcome:?}");
        traffic.push(sent(&trainer.groups));
    }
    let peak = device.memory().bytes_peak();
    assert_eq!(traffic[0], traffic[1], "steps are alike");
    assert_eq!(trainer.stage.zero.held().expect("gathers that end"), held, "between steps a rank holds what it held before");
    Measured { held, peak, traffic: traffic.swap_remove(1) }
}

fn batch(rows: &[usize], t: usize, vocabulary: usize) -> Batch {
    let each =
        |offset: usize| rows.iter().flat_map(|row| (0..t).map(move |i| ((row * 31 + (i + offset) * 7) % vocabulary) as u32)).collect();
    let positions = rows.iter().flat_map(|_| 0..t as u32).collect();
    Batch { rows: rows.to_vec(), seq_len: t, inputs: each(0), targets: each(1), positions, starts: vec![0; rows.len() * t] }
}

/// What the groups of more than one rank have carried, as a plan tells it.
fn sent(groups: &Groups) -> Traffic {
    let of = [&groups.world, &groups.tp, &groups.shard, &groups.replica, &groups.down, &groups.up, &groups.tie];
    let mut traffic = Traffic::new();
    for ((name, carried), group) in groups.take_traffic().into_iter().zip(of) {
        if group.size() > 1 && !carried.is_empty() {
            let counts = carried.into_iter().map(|(operation, count)| (operation, Count { calls: count.calls, bytes: count.bytes }));
            traffic.insert(name, counts.collect());
        }
    }
    traffic
}

/// Prints prediction and measurement of every rank, and gives what is further apart than 2 %.
fn hold(cases: &[Case]) {
    let mut failures = Vec::new();
    for case in cases {
        let config = case.config();
        let plan = Plan::new(&config, case.world(), None).unwrap_or_else(|problems| panic!("{}: {problems:#?}", case.text()));
        let measured = measure(&config, &plan);
        let mut told = Vec::new();
        for (rank, measured) in measured.iter().enumerate() {
            let predicted = rehearsal::rehearse(&config, &plan, rank).expect("a rehearsal");
            let off = measured.peak as f64 / predicted.peak as f64 - 1.0;
            told.push(format!("{}/{} ({:+.2} %)", predicted.peak, measured.peak, 100.0 * off));
            let held = Held {
                weights: predicted.weights,
                gradients: predicted.gradients,
                optimizer: predicted.optimizer,
                offloaded: predicted.offloaded,
            };
            if off.abs() > 0.02 || held != measured.held {
                failures.push(format!("{} rank {rank}: {predicted:?}, measured {} and {:?}", case.text(), measured.peak, measured.held));
            }
            let expected = forecast::traffic(&config, &plan, &plan.rank(rank));
            if expected != measured.traffic {
                failures.push(format!("{} rank {rank}: told {expected:?}\n    sent {:?}", case.text(), measured.traffic));
            }
        }
        told.dedup();
        println!("{}: predicted/measured bytes {}", case.text(), told.join(", "));
    }
    assert!(failures.is_empty(), "{} differ:\n{}", failures.len(), failures.join("\n"));
}

#[test]
fn one_rank() {
    let mut cases = Vec::new();
    for family in ["llama", "gpt2"] {
        for dtype in ["f32", "bf16"] {
            for recompute in ["none", "selective", "full"] {
                cases.push(Case { family, tied: family == "gpt2", dtype, recompute, ..PLAIN });
                cases.push(Case { family, dtype, recompute, micro: 4, ..PLAIN });
            }
        }
    }
    cases.push(Case { lanes: 4, ..PLAIN });
    cases.push(Case { lanes: 4, order: "rows", zero: 2, ..PLAIN });
    cases.push(Case { dtype: "f16 by chance", family: "gpt2", tied: true, ..PLAIN });
    hold(&cases);
}

#[test]
fn every_zero_stage() {
    let mut cases = Vec::new();
    for zero in 0..4 {
        for order in ["lanes", "rows"] {
            cases.push(Case { shard: 4, zero, order, ..PLAIN });
            cases.push(Case { shard: 2, lanes: 2, zero, order, recompute: "full", ..PLAIN });
            cases.push(Case { shard: 4, zero, order, dtype: "bf16 by chance", ..PLAIN });
            cases.push(Case { replicate: 2, shard: 2, zero, order, dtype: "f32", family: "gpt2", tied: true, ..PLAIN });
        }
    }
    hold(&cases);
}

#[test]
fn tensor_and_pipeline_parallelism() {
    let named = [("gpipe", 1), ("1f1b", 1), ("zero_bubble", 1), ("interleaved", 2), ("breadth_first", 2), ("zbv", 2), ("dualpipe_v", 2)];
    let mut cases = Vec::new();
    for sequence in [true, false] {
        cases.push(Case { tp: 2, sequence, ..PLAIN });
        cases.push(Case { tp: 4, sequence, recompute: "selective", family: "gpt2", tied: true, ..PLAIN });
        cases.push(Case { tp: 2, shard: 2, sequence, zero: 3, order: "rows", recompute: "full", micro: 2, ..PLAIN });
    }
    for schedule in named {
        cases.push(Case { pp: 2, schedule, tied: true, ..PLAIN });
        cases.push(Case { pp: 4, schedule, recompute: "full", ..PLAIN });
        cases.push(Case { pp: 2, tp: 2, shard: 2, zero: 2, order: "rows", schedule, ..PLAIN });
    }
    cases.push(Case { pp: 2, shard: 2, zero: 3, schedule: ("zero_bubble", 1), masked: true, ..PLAIN });
    cases.push(Case { replicate: 2, pp: 2, tp: 2, dtype: "f32", family: "gpt2", masked: true, ..PLAIN });
    hold(&cases);
}

/// The table of `parallel/zero.rs`: what is held between steps of each kind, in bytes.
#[test]
fn zero_holds_what_its_table_says() {
    let ranks = 4;
    let mut peaks = Vec::new();
    for zero in 0..4 {
        let case = Case { shard: ranks, zero, ..PLAIN };
        let config = case.config();
        let plan = Plan::new(&config, ranks, None).unwrap_or_else(|problems| panic!("{problems:#?}"));
        let rank = plan.rank(0);
        let of = |bytes: &dyn Fn(usize) -> usize| {
            // Buffers are whole cache lines.
            rank.units.iter().map(|(_, layout)| bytes(layout.numel).next_multiple_of(64)).sum::<usize>()
        };
        assert!((0..rank.units.len()).all(|unit| rank.kind(&plan, unit) != Kind::Head { tied: true }), "every unit has weights");
        let state = |cut: usize| of(&|numel| 4 * numel / cut) + 2 * of(&|numel| 4 * numel / cut);
        let expected = Held {
            weights: of(&|numel| 2 * numel / if zero == 3 { ranks } else { 1 }),
            gradients: if zero <= 1 { of(&|numel| 4 * numel) } else { 0 },
            optimizer: state(if zero == 0 { 1 } else { ranks }),
            offloaded: 0,
        };
        let measured = measure(&config, &plan);
        for (rank, measured) in measured.iter().enumerate() {
            assert_eq!(measured.held, expected, "stage {zero}, rank {rank}");
        }
        println!("zero {zero}: {:?}, peak {}", expected, measured[0].peak);
        peaks.push(measured[0].peak);
    }
    // In the order of lanes whole gradients are needed until the step's reduction: between steps stage 2 holds less, at its peak not.
    assert!(peaks[0] > peaks[1] && peaks[1] >= peaks[2] && peaks[2] > peaks[3], "no stage takes more than the one before it: {peaks:?}");
}

/// Rows of gradients that are reduced as they come leave no whole buffers behind: what the order of rows buys.
#[test]
fn sums_in_the_order_of_rows_take_less() {
    let peak = |zero: usize, order: &'static str| {
        let config = Case { shard: 4, zero, order, ..PLAIN }.config();
        let plan = Plan::new(&config, 4, None).unwrap_or_else(|problems| panic!("{problems:#?}"));
        measure(&config, &plan)[0].peak
    };
    let peaks: BTreeMap<(usize, &str), usize> =
        [2, 3].into_iter().flat_map(|zero| ["lanes", "rows"].map(|order| ((zero, order), peak(zero, order)))).collect();
    println!("{peaks:?}");
    for zero in [2, 3] {
        assert!(peaks[&(zero, "rows")] < peaks[&(zero, "lanes")], "{peaks:?}");
    }
}

/// The program, with nothing in its environment that names a rank.
fn ferrotron(arguments: &[&str]) -> Vec<u8> {
    let output = Command::new(env!("CARGO_BIN_EXE_ferrotron")).args(arguments).env_clear().output().expect("the program starts");
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// The number that `plan` prints is the one that a run then reports, whatever the number of its threads.
#[test]
fn a_run_reports_the_peak_that_its_plan_told() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("budget");
    if folder.exists() {
        fs::remove_dir_all(&folder).expect("our own folder");
    }
    fs::create_dir_all(&folder).expect("a folder");
    for (name, case) in
        [("llama", PLAIN), ("gpt2", Case { family: "gpt2", tied: true, dtype: "f32", recompute: "full", micro: 4, ..PLAIN })]
    {
        let (file, run) = (folder.join(format!("{name}.toml")), folder.join(name));
        let mut config = case.config();
        config.run.dir.clone_from(&run);
        config.train.steps = 2;
        config.device.threads = 2;
        config.data.cache = folder.join("cache");
        config.data.sources = vec![DataSource { path: concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.lock").to_string(), weight: 1.0 }];
        fs::write(&file, config.to_toml()).expect("a file");
        let file = file.to_str().expect("a path of ours");
        let told: Value = serde_json::from_slice(&ferrotron(&["plan", file, "--json"])).expect("JSON");
        ferrotron(&["train", file]);
        let metrics = fs::read_to_string(run.join("metrics.jsonl")).expect("metrics");
        let last: Value = metrics.lines().last().and_then(|line| serde_json::from_str(line).ok()).expect("a line of metrics");
        let (told, reported) = (&told["memory_bytes"][0]["peak"], &last["memory_peak_bytes"]);
        println!("{name}: {told} told, {reported} reported");
        assert_eq!(told, reported, "{name}");
    }
}
