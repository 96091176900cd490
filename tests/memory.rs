//! Memory is what the rehearsal said, to the byte, on every rank; and a step leaves as much as the one before it.

#[path = "support/tokens.rs"]
mod tokens;

use ferrotron::comm::connect::Transport;
use ferrotron::comm::groups::Groups;
use ferrotron::comm::threads::Threads;
use ferrotron::config::Config;
use ferrotron::device::Device;
use ferrotron::plan::Plan;
use ferrotron::train::rehearsal;
use ferrotron::train::resume;
use ferrotron::train::step::Trainer;
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

/// What a rank's allocator says of each step: bytes live after it, bytes of freed buffers that it keeps, the peak so far.
fn measured(config: &Config, plan: &Plan, transport: &Transport, rank: usize) -> Vec<[usize; 3]> {
    let device = Device::cpu(1);
    let memory = device.memory();
    let groups = Groups::connect(transport, &plan.mesh, rank).expect("groups of threads");
    let mut trainer = Trainer::new(config, plan.clone(), rank, &device, groups).expect("a trainer");
    resume::start(&mut trainer, config).expect("initial weights");
    memory.reset_peak();
    let step = |step| {
        let batch = tokens::batch(step, &trainer.rank.rows, plan.t, config.model.vocab_size);
        assert!(trainer.step(step, &batch, false).expect("a step").applied);
        [memory.bytes_live(), memory.bytes_free(), memory.bytes_peak()]
    };
    (0..4).map(step).collect()
}

fn on_all_ranks(config: &Config, plan: &Plan) -> Vec<Vec<[usize; 3]>> {
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
            assert_eq!(steps[3][2], rehearsed.peak, "peak on {place}");
            let [live, free, _] = steps[1];
            assert!(steps[1..].iter().all(|step| step[..2] == [live, free]), "live and free bytes of steps 2 to 4 on {place}: {steps:?}");
            assert_eq!(steps[0][0], live, "live bytes of the first step and the others on {place}");
        }
    }
}
