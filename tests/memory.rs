//! Memory is what the rehearsal said, to the byte, on every rank; and a step leaves as much as the one before it.

#[path = "support/ranks.rs"]
mod ranks;

use ferrotron::comm::connect::Transport;
use ferrotron::comm::groups::Groups;
use ferrotron::comm::threads::Threads;
use ferrotron::config::Config;
use ferrotron::device::Device;
use ferrotron::device::mapped::OffloadFile;
use ferrotron::plan::Plan;
use ferrotron::train::fit;
use ferrotron::train::rehearsal;
use ferrotron::train::resume;
use ferrotron::train::step::Trainer;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

/// A small model; `more` are lines of further sections.
fn config(dtype: &str, tied: bool, more: &str) -> Config {
    let text = format!(
        "[model]\nfamily = \"llama\"\nhidden_size = 32\nintermediate_size = 64\nnum_layers = 6\nnum_heads = 4\nvocab_size = 97\n\
         tie_word_embeddings = {tied}\n[train]\nsteps = 10\nseq_len = 16\nglobal_batch_size = 16\nmicro_batch_size = 1\n\
         dtype = \"{dtype}\"\n{more}"
    );
    Config::parse("memory.toml", &text, &[]).unwrap_or_else(|problems| panic!("{problems}")).0
}

/// What a rank's allocator says after a step.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Seen {
    live: usize,
    /// Of freed buffers that are kept.
    free: usize,
    /// So far.
    peak: usize,
    offloaded: usize,
}

fn measured(config: &Config, plan: &Plan, transport: &Transport, rank: usize) -> Vec<Seen> {
    let device = Device::cpu(1);
    let memory = device.memory();
    let groups = Groups::connect(transport, &plan.mesh, rank).expect("groups of threads");
    let mut trainer = Trainer::new(config, plan.clone(), rank, &device, groups).expect("a trainer");
    resume::start(&mut trainer, config).expect("initial weights");
    memory.reset_peak();
    let step = |step| {
        let batch = ranks::tokens::batch(step, &trainer.rank.rows, plan.t, config.model.vocab_size);
        assert!(trainer.step(step, &batch, false).expect("a step").applied);
        let (live, free, peak) = (memory.bytes_live(), memory.bytes_free(), memory.bytes_peak());
        Seen { live, free, peak, offloaded: memory.bytes_offloaded() }
    };
    (0..4).map(step).collect()
}

fn on_all_ranks(config: &Config, plan: &Plan) -> Vec<Vec<Seen>> {
    let world = plan.mesh.world();
    let threads = Transport::Threads(Threads::new(world, Duration::from_secs(120)));
    thread::scope(|scope| {
        let one = |rank| {
            let threads = threads.clone();
            scope.spawn(move || measured(config, plan, &threads, rank))
        };
        let ranks: Vec<_> = (0..world).map(one).collect();
        ranks.into_iter().map(|rank| rank.join().expect("no rank panics")).collect()
    })
}

/// Layouts as lines of `[parallel]`, `[geometry]` and `[train]` keys, with their number of ranks.
fn layouts() -> Vec<(usize, String)> {
    let mut layouts = Vec::new();
    for zero in 0..4 {
        for order in ["lanes", "rows"] {
            let geometry = format!("[geometry]\norder = \"{order}\"\n");
            layouts.push((2, format!("[parallel]\nzero = {zero}\n{geometry}")));
            layouts.push((4, format!("[parallel]\nzero = {zero}\ndp_replicate = 2\n{geometry}lanes = 8\n")));
            layouts.push((4, format!("[parallel]\nzero = {zero}\npp = 2\npp_schedule = \"zero_bubble\"\n{geometry}")));
            layouts.push((4, format!("[parallel]\nzero = {zero}\npp = 2\npp_chunks = 2\npp_schedule = \"interleaved\"\n{geometry}")));
            layouts.push((4, format!("[parallel]\nzero = {zero}\ntp = 2\n{geometry}")));
        }
    }
    layouts
}

#[test]
fn the_peak_is_the_rehearsed_one_and_steps_leave_nothing_behind() {
    for (number, (world, layout)) in layouts().into_iter().enumerate() {
        let config = config(["bf16", "f32"][number % 2], number % 3 == 0, &layout);
        let plan = Plan::new(&config, world, None).unwrap_or_else(|problems| panic!("{problems:?}"));
        for (rank, steps) in on_all_ranks(&config, &plan).iter().enumerate() {
            let place = format!("rank {rank} of {world}, {layout}");
            let rehearsed = rehearsal::rehearse(&config, &plan, rank).expect("a rehearsal");
            assert_eq!(steps[3].peak, rehearsed.peak, "peak on {place}");
            let before = |step: &Seen| (step.live, step.free);
            assert!(steps[2..].iter().all(|step| before(step) == before(&steps[1])), "live and free bytes on {place}: {steps:?}");
            assert_eq!(steps[0].live, steps[1].live, "live bytes of the first step and the second on {place}");
        }
    }
}

/// ZeRO 3 holds two whole units at a time, however many there are: a layer more takes what is kept of it, and no whole weights.
#[test]
fn whole_weights_are_not_kept() {
    let layout = "recompute = \"full\"\n[parallel]\nzero = 3\n[geometry]\norder = \"rows\"\n";
    let footprint = |layers: usize| {
        let mut config = config("bf16", false, layout);
        config.model.num_layers = layers;
        let plan = Plan::new(&config, 8, None).unwrap_or_else(|problems| panic!("{problems:?}"));
        rehearsal::rehearse(&config, &plan, 0).expect("a rehearsal")
    };
    let (few, many) = (footprint(6), footprint(12));
    let whole = 2 * 6 * (4 * 32 * 32 + 3 * 32 * 64);
    let slices = many.weights + many.optimizer - few.weights - few.optimizer;
    let beyond = many.peak - few.peak - slices - (many.activations - few.activations);
    assert!(beyond < whole / 2, "six layers more, of {whole} bytes, take {beyond} more than what is kept of them: {few:?} {many:?}");
}

fn scratch(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("memory").join(name);
    fs::create_dir_all(&folder).expect("a writable folder");
    folder
}

#[test]
fn what_is_offloaded_keeps_its_bits_and_leaves_the_device() {
    let folder = scratch("offload");
    let keys = [
        (1, "bf16", format!("offload_optimizer = {folder:?}\n")),
        (0, "f32", format!("offload_optimizer = {folder:?}\n")),
        (3, "bf16", format!("offload_optimizer = {folder:?}\noffload_weights = {folder:?}\n")),
        (3, "f32", format!("offload_weights = {folder:?}\n")),
    ];
    for (zero, dtype, keys) in keys {
        let layout = format!("[parallel]\nzero = {zero}\n");
        let (within, outside) = (config(dtype, true, &layout), config(dtype, true, &format!("{layout}{keys}")));
        assert_eq!(ranks::train(&outside, 2, 3).difference(&ranks::train(&within, 2, 3)), None, "zero {zero}, {dtype}");
        let plan = |config| Plan::new(config, 2, None).unwrap_or_else(|problems| panic!("{problems:?}"));
        let (plan, before) = (plan(&outside), plan(&within));
        let before = rehearsal::rehearse(&within, &before, 1).expect("a rehearsal");
        let rehearsed = rehearsal::rehearse(&outside, &plan, 1).expect("a rehearsal");
        let seen = on_all_ranks(&outside, &plan)[1][3];
        assert_eq!((seen.peak, seen.offloaded), (rehearsed.peak, rehearsed.offloaded), "zero {zero}, {dtype}");
        assert!(seen.offloaded > 0 && before.peak - seen.peak == seen.offloaded, "zero {zero}, {dtype}: {before:?}, {seen:?}");
        assert_eq!(fs::read_dir(&folder).expect("a folder").count(), 0, "nothing is left behind");
    }
}

#[test]
fn folders_that_will_not_do_are_named() {
    let refused = |folder: &Path, bytes| format!("{:#}", OffloadFile::create(folder, bytes).expect_err("it cannot be"));
    let folder = scratch("refused");
    let missing = refused(&folder.join("missing"), 1);
    assert!(missing.contains("refused/missing is not there"), "{missing}");
    // Nobody makes files there, not even root.
    let closed = refused(Path::new("/proc"), 1);
    assert!(closed.contains("/proc cannot be written to"), "{closed}");
    let full = refused(&folder, 1 << 56);
    assert!(full.contains("not enough room in") && full.contains("needs 72057594037927936 bytes") && full.contains("refused"), "{full}");
    let layout = "[parallel]\noffload_optimizer = \"/nowhere\"\n";
    let config = config("bf16", false, layout);
    let plan = Plan::new(&config, 1, None).unwrap_or_else(|problems| panic!("{problems:?}"));
    let error = Trainer::new(&config, plan, 0, &Device::cpu(1), Groups::solo()).err().expect("no such folder");
    assert!(format!("{error:#}").starts_with("parallel.offload_optimizer: the folder /nowhere is not there"), "{error:#}");
}

#[test]
fn a_plan_that_does_not_fit_says_what_would() {
    let mut config = config("bf16", false, "");
    config.train.micro_batch_size = 4;
    let plan = Plan::new(&config, 2, None).unwrap_or_else(|problems| panic!("{problems:?}"));
    let peak = rehearsal::rehearse(&config, &plan, 0).expect("a rehearsal").peak as u64;
    let mut said = |memory| {
        config.device.memory = memory;
        fit::check(&config, &plan).expect("a rehearsal").map(|problem| (problem.message, problem.help.unwrap_or_default()))
    };
    assert_eq!(said(None), None);
    assert_eq!(said(Some(peak)), None);
    let (message, help) = said(Some(peak - 1)).expect("too little");
    assert!(
        message.starts_with("`device.memory` = ") && message.contains(", but rank 0 needs ") && message.contains("activations"),
        "{message}"
    );
    assert!(help.starts_with("one of these fits: ") && help.contains("train.micro_batch_size = 1 ("), "{help}");
    let (_, help) = said(Some(10_000)).expect("too little");
    assert!(help.contains(" together still need ") && help.contains("parallel.zero = 3"), "{help}");
}
