//! The mesh and the geometry that a configuration asks for, and whether world, model, batch and schedule fit them.
//!
//! Invariant: every problem is found at once, names the keys with their numbers and says what would work; where there is none, all
//! that `Plan` computes later divides without remainder.

use crate::config::check::{divisors_near, multiples_near};
use crate::config::source::Problem;
use crate::config::{Config, Model, SumOrder};
use crate::plan::mesh::Mesh;
use crate::plan::schedule::{self, Schedule, text};
use crate::plan::{Geometry, Order};

/// The axes that fill a world of `world` ranks.
pub fn mesh(config: &Config, world: usize, problems: &mut Vec<Problem>) -> Mesh {
    let parallel = &config.parallel;
    let (tp, pp, replicate) = (parallel.tp, parallel.pp, parallel.dp_replicate);
    let fixed = tp.saturating_mul(pp).saturating_mul(replicate);
    let axes = format!("`parallel.tp` = {tp} × `parallel.pp` = {pp} × `parallel.dp_replicate` = {replicate}");
    let shard = match usize::try_from(parallel.dp_shard) {
        Err(_) if world > 0 && world.is_multiple_of(fixed) => world / fixed,
        Err(_) => {
            let message = format!("{axes} = {fixed} does not divide the world of {world} ranks");
            let help = format!("a world of {} ranks, or lower one of the three", multiples_near(fixed as u64, world as u64));
            problems.push(Problem::new("parallel.tp", message).help(help));
            1
        }
        Ok(shard) => {
            let needed = fixed.saturating_mul(shard);
            if needed != world {
                let message = format!("{axes} × `parallel.dp_shard` = {shard} makes {needed} ranks, but the world has {world}");
                let rest =
                    if world > 0 && world.is_multiple_of(fixed) { format!(", or dp_shard {}", world / fixed) } else { String::new() };
                problems.push(Problem::new("parallel.dp_shard", message).help(format!("a world of {needed} ranks{rest}")));
            }
            shard
        }
    };
    Mesh { pp, replicate, shard, tp }
}

/// The canonical sums of a run that starts with `mesh`.
pub fn geometry(config: &Config, mesh: &Mesh) -> Geometry {
    let or = |chosen: usize, default: usize| if chosen == 0 { default } else { chosen };
    let order = match (config.geometry.order, config.parallel.zero) {
        (SumOrder::Lanes, _) | (SumOrder::Auto, 0 | 1) => Order::Lanes,
        (SumOrder::Rows, _) | (SumOrder::Auto, _) => Order::Rows,
    };
    Geometry { shards: or(config.geometry.shards, mesh.tp), lanes: or(config.geometry.lanes, mesh.dp()), order }
}

/// Whether sums over `leaves` in the balanced tree of adjacent pairs can be split over `parts` ranks, each adding up its consecutive
/// leaves, and the same tree over the ranks adding the rest. A rank's leaves must be a subtree: all of them, or a power of two.
pub fn tree_allows(leaves: usize, parts: usize) -> bool {
    parts > 0 && leaves.is_multiple_of(parts) && (parts == 1 || (leaves / parts).is_power_of_two())
}

/// What tensor parallelism cuts.
pub fn tensors(config: &Config, mesh: &Mesh, geometry: &Geometry, problems: &mut Vec<Problem>) {
    let (model, train, shards) = (&config.model, &config.train, geometry.shards);
    if !tree_allows(shards, mesh.tp) {
        let message = format!("`geometry.shards` = {shards} cannot be cut over `parallel.tp` = {} ranks: {SUBTREES}", mesh.tp);
        problems.push(Problem::new("parallel.tp", message).help(tree_help("tp", "geometry.shards", shards, mesh.tp)));
    }
    if shards == 0 {
        return;
    }
    let (key, name) = if shards == mesh.tp { ("tp", "`parallel.tp`") } else { ("shards", "`geometry.shards`") };
    let mut cut = |what: &str, number: usize, help: String| {
        if !number.is_multiple_of(shards) {
            let message = format!("`{what}` = {number} is not a multiple of {name} = {shards}");
            problems.push(Problem::new(what, message).help(help));
        }
    };
    let near = |number: usize| format!("{key} {}", divisors_near(number as u64, shards as u64));
    cut("model.num_heads", model.num_heads, near(model.num_heads));
    let kv_heads = model.num_kv_heads;
    if kv_heads != model.num_heads && kv_heads >= shards {
        cut("model.num_kv_heads", kv_heads, near(kv_heads));
    }
    cut("model.intermediate_size", model.intermediate_size, near(model.intermediate_size));
    let longer = multiples_near(shards as u64, train.seq_len as u64);
    cut("train.seq_len", train.seq_len, format!("seq_len {longer}, or {}", near(train.seq_len)));
    if kv_heads != model.num_heads && kv_heads < shards && !shards.is_multiple_of(kv_heads) {
        let message =
            format!("{name} = {shards} is not a multiple of `model.num_kv_heads` = {kv_heads}: each kv head is shared by as many");
        problems.push(Problem::new("model.num_kv_heads", message).help(format!("{key} {}", sharers_near(model, shards))));
    }
    let vocabulary = model.vocab_size;
    if shards.saturating_sub(1).saturating_mul(vocabulary.div_ceil(shards)) >= vocabulary {
        let message = format!("`model.vocab_size` = {vocabulary} is too small for {name} = {shards}: the last of them would have no ids");
        problems.push(Problem::new("model.vocab_size", message).help(format!("a larger vocabulary, or a smaller {key}")));
    }
}

/// Lanes and rows of the global batch.
pub fn batch(config: &Config, mesh: &Mesh, geometry: &Geometry, problems: &mut Vec<Problem>) {
    let (batch, micro) = (config.train.global_batch_size, config.train.micro_batch_size);
    let (lanes, dp) = (geometry.lanes, mesh.dp());
    let ranks = format!("dp_replicate {} × dp_shard {} = {dp} ranks", mesh.replicate, mesh.shard);
    if !tree_allows(lanes, dp) {
        let message = format!("`geometry.lanes` = {lanes} cannot be cut over {ranks}: {SUBTREES}");
        let help = tree_help("a number of data-parallel ranks of", "geometry.lanes", lanes, dp);
        problems.push(Problem::new("geometry.lanes", message).help(help));
    }
    if !tree_allows(dp, mesh.replicate) {
        let shard = mesh.shard as u64;
        let message = format!(
            "`parallel.dp_shard` = {shard} cannot be one of `parallel.dp_replicate` = {} parts of a sum: {SUBTREES}",
            mesh.replicate
        );
        let near = either_power(shard);
        problems.push(Problem::new("parallel.dp_shard", message).help(format!("dp_shard {near}, or dp_replicate 1")));
    }
    if lanes == 0 {
        return;
    }
    let name = if lanes == dp { ranks } else { format!("`geometry.lanes` = {lanes}") };
    if !batch.is_multiple_of(lanes) {
        let message = format!("`train.global_batch_size` = {batch} cannot be shared evenly by {name}");
        let help = format!("global_batch_size {}", multiples_near(lanes as u64 * micro as u64, batch as u64));
        problems.push(Problem::new("train.global_batch_size", message).help(help));
    } else if !(batch / lanes).is_multiple_of(micro) {
        let each = batch / lanes;
        let message = format!(
            "`train.global_batch_size` = {batch} over {name} is {each} sequences each, not a multiple of `train.micro_batch_size` = {micro}"
        );
        let help = format!(
            "micro_batch_size {}, or global_batch_size {}",
            divisors_near(each as u64, micro as u64),
            multiples_near(lanes as u64 * micro as u64, batch as u64)
        );
        problems.push(Problem::new("train.micro_batch_size", message).help(help));
    }
}

/// Stages against blocks, and the chunks that the schedule runs.
pub fn stages(config: &Config, problems: &mut Vec<Problem>) {
    let (layers, parallel) = (config.model.num_layers, &config.parallel);
    let (pp, chunks) = (parallel.pp, parallel.pp_chunks);
    let stages = pp.saturating_mul(chunks);
    if stages > layers {
        let of_chunks = if chunks > 1 { format!(" × `parallel.pp_chunks` = {chunks}") } else { String::new() };
        let message = format!(
            "`parallel.pp` = {pp}{of_chunks} makes {stages} stages, but the model has `model.num_layers` = {layers} blocks to share"
        );
        let mut ways = Vec::new();
        if layers >= chunks {
            ways.push(format!("pp {} or less", layers / chunks));
        }
        if chunks > 1 && layers >= pp {
            ways.push(format!("pp_chunks {} or less", layers / pp));
        }
        ways.push(format!("num_layers {stages} or more"));
        problems.push(Problem::new("parallel.pp", message).help(ways.join(", or ")));
    }
    // One rank and one micro-batch are enough to know whether the name and the chunks go together.
    if stages <= layers
        && parallel.pp_schedule_text.is_none()
        && let Err(error) = schedule::by_name(&parallel.pp_schedule, 1, 1, chunks)
    {
        problems.push(Problem::new("parallel.pp_schedule", format!("{error:#}")));
    }
}

/// The compute actions of `micros` micro-batches on every pipeline rank.
pub fn actions(config: &Config, micros: usize, problems: &mut Vec<Problem>) -> Option<Schedule> {
    let parallel = &config.parallel;
    let (key, name) = ("parallel.pp_schedule", &parallel.pp_schedule);
    let read = match &parallel.pp_schedule_text {
        Some(text) => text::from_text(text),
        None => schedule::by_name(name, parallel.pp, micros, parallel.pp_chunks),
    };
    let schedule = match read {
        Ok(schedule) => schedule,
        Err(error) => {
            problems.push(Problem::new(key, format!("`{key}` = \"{name}\": {error:#}")));
            return None;
        }
    };
    let before = problems.len();
    let placement = schedule.placement;
    let mut agree = |what: &str, written: usize, asked: usize, asked_by: &str, help: String| {
        if written != asked {
            let message = format!("`{key}` = \"{name}\" is written for {written} {what}, but {asked_by} {asked}");
            problems.push(Problem::new(key, message).help(help));
        }
    };
    agree("pipeline ranks", placement.ranks, parallel.pp, "`parallel.pp` =", format!("pp {}", placement.ranks));
    agree("chunks", placement.chunks, parallel.pp_chunks, "`parallel.pp_chunks` =", format!("pp_chunks {}", placement.chunks));
    let sequences = schedule.micros * config.train.global_batch_size / micros;
    agree(
        "micro-batches",
        schedule.micros,
        micros,
        "batch and data-parallel ranks ask for",
        format!("global_batch_size {sequences}, or another micro_batch_size or number of data-parallel ranks"),
    );
    (problems.len() == before).then_some(schedule)
}

const SUBTREES: &str = "each must hold a power of two of them, or all, to be a subtree of the balanced tree that adds them";

/// The numbers of ranks and of leaves around `parts` and `leaves` that go together.
fn tree_help(parts_key: &str, leaves_key: &str, leaves: usize, parts: usize) -> String {
    let allowed = |parts: &usize| tree_allows(leaves, *parts);
    let below = (1..=parts.min(leaves)).rev().find(allowed);
    let above = (parts..=leaves).find(allowed);
    let near: Vec<String> = below.into_iter().chain(above).map(|parts| parts.to_string()).collect();
    // A whole power of two of leaves for each part.
    let fitting = parts.saturating_mul((leaves / parts.max(1)).max(1).next_power_of_two());
    let leaves_fit = format!("{leaves_key} = {fitting}");
    if near.is_empty() { leaves_fit } else { format!("{parts_key} {}, or {leaves_fit}", near.join(" or ")) }
}

/// The numbers of shards around `shards` that share the kv heads evenly.
fn sharers_near(model: &Model, shards: usize) -> String {
    let allowed = |shards: &usize| shards.is_multiple_of(model.num_kv_heads) && model.num_heads.is_multiple_of(*shards);
    let (below, above) = ((1..=shards).rev().find(allowed), (shards..=model.num_heads).find(allowed));
    let near: Vec<String> = below.into_iter().chain(above).map(|shards| shards.to_string()).collect();
    near.join(" or ")
}

/// The powers of two around `number`.
fn either_power(number: u64) -> String {
    let above = number.next_power_of_two();
    format!("{} or {above}", above / 2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Plan;

    /// What is said of a small llama with these lines on top, on `world` ranks: each problem, then its help.
    fn problems(parallel: &str, geometry: &str, world: usize) -> Vec<String> {
        let text = format!(
            "[model]\nfamily = \"llama\"\nhidden_size = 96\nintermediate_size = 100\nnum_layers = 6\nnum_heads = 12\nnum_kv_heads = 4\n\
             [train]\nsteps = 1\nseq_len = 30\nglobal_batch_size = 20\nmicro_batch_size = 2\n[parallel]\n{parallel}\n[geometry]\n{geometry}\n"
        );
        let (config, _) = Config::parse("small.toml", &text, &[]).expect("each key is well-formed");
        let told = |problem: Problem| problem.help.into_iter().fold(problem.message, |message, help| message + ": " + &help);
        Plan::new(&config, world, None).err().into_iter().flatten().map(told).collect()
    }

    /// What is added to what, written with brackets: adjacent pairs level by level, the odd one passes up.
    fn tree(mut row: Vec<String>) -> String {
        while row.len() > 1 {
            row = row.chunks(2).map(|pair| if pair.len() == 2 { format!("({}+{})", pair[0], pair[1]) } else { pair[0].clone() }).collect();
        }
        row.remove(0)
    }

    #[test]
    fn a_tree_is_allowed_where_its_parts_give_the_same_brackets() {
        for leaves in 1..=40usize {
            let names: Vec<String> = (0..leaves).map(|leaf| leaf.to_string()).collect();
            for parts in 1..=leaves {
                let in_two_steps = || tree(names.chunks(leaves / parts).map(|part| tree(part.to_vec())).collect());
                let same = leaves.is_multiple_of(parts) && in_two_steps() == tree(names.clone());
                assert_eq!(tree_allows(leaves, parts), same, "{leaves} leaves in {parts} parts");
            }
        }
        assert!(!tree_allows(4, 0) && !tree_allows(4, 8));
        assert!(tree_allows(0, 1), "no leaves are all of them: who asks for none is told elsewhere");
    }

    #[test]
    fn help_names_what_would_work() {
        assert_eq!(tree_help("tp", "geometry.shards", 12, 2), "tp 1 or 3, or geometry.shards = 16");
        assert_eq!(tree_help("tp", "geometry.shards", 2, 4), "tp 2, or geometry.shards = 4");
        assert_eq!(either_power(3), "2 or 4");
    }
    #[test]
    fn all_problems_are_told_at_once_with_what_would_work() {
        assert_eq!(problems("", "", 1), Vec::<String>::new());
        assert_eq!(
            problems("tp = 8\npp = 8", "", 64),
            [
                "`model.num_heads` = 12 is not a multiple of `parallel.tp` = 8: tp 6 or 12",
                "`model.intermediate_size` = 100 is not a multiple of `parallel.tp` = 8: tp 5 or 10",
                "`train.seq_len` = 30 is not a multiple of `parallel.tp` = 8: seq_len 24 or 32, or tp 6 or 10",
                "`parallel.pp` = 8 makes 8 stages, but the model has `model.num_layers` = 6 blocks to share: \
                 pp 6 or less, or num_layers 8 or more",
            ]
        );
        assert_eq!(
            problems("dp_replicate = 2\ndp_shard = 3", "lanes = 12", 6),
            [
                "`parallel.dp_shard` = 3 cannot be one of `parallel.dp_replicate` = 2 parts of a sum: each must hold a power of two of them, \
                 or all, to be a subtree of the balanced tree that adds them: dp_shard 2 or 4, or dp_replicate 1",
                "`train.global_batch_size` = 20 cannot be shared evenly by `geometry.lanes` = 12: global_batch_size 24",
            ]
        );
        assert_eq!(
            problems("pp = 2\npp_chunks = 2", "", 4),
            ["parallel.pp_schedule = \"1f1b\" runs 1 chunks on each rank, but parallel.pp_chunks = 2: set pp_chunks to 1, \
              or choose interleaved or breadth_first"]
        );
        assert_eq!(
            problems("tp = 2", "", 8),
            ["`train.global_batch_size` = 20 over dp_replicate 1 × dp_shard 4 = 4 ranks is 5 sequences each, not a multiple of \
              `train.micro_batch_size` = 2: micro_batch_size 1 or 5, or global_batch_size 16 or 24"]
        );
    }

    #[test]
    fn kv_heads_are_shared_evenly_or_not_at_all() {
        assert_eq!(
            problems("tp = 4", "shards = 4", 4),
            ["`train.seq_len` = 30 is not a multiple of `parallel.tp` = 4: seq_len 28 or 32, or tp 3 or 5"]
        );
        assert_eq!(
            problems("", "shards = 6", 1),
            [
                "`model.intermediate_size` = 100 is not a multiple of `geometry.shards` = 6: shards 5 or 10",
                "`geometry.shards` = 6 is not a multiple of `model.num_kv_heads` = 4: each kv head is shared by as many: shards 4 or 12"
            ]
        );
    }

    #[test]
    fn a_world_that_does_not_fit_is_told_with_one_that_would() {
        assert_eq!(
            problems("tp = 2\npp = 3", "", 8),
            ["`parallel.tp` = 2 × `parallel.pp` = 3 × `parallel.dp_replicate` = 1 = 6 does not divide the world of 8 ranks: \
              a world of 6 or 12 ranks, or lower one of the three"]
        );
        assert_eq!(
            problems("tp = 2\ndp_shard = 2", "", 8),
            ["`parallel.tp` = 2 × `parallel.pp` = 1 × `parallel.dp_replicate` = 1 × `parallel.dp_shard` = 2 makes 4 ranks, \
              but the world has 8: a world of 4 ranks, or dp_shard 4"]
        );
        let huge = problems("tp = 1048576\npp = 1048576\ndp_replicate = 1048576\ndp_shard = 1048576", "", 1);
        assert!(huge[0].contains("but the world has 1"), "{huge:?}");
        assert!(!problems("", "", 1 << 60).is_empty() && !problems("", "", 0).is_empty());
    }
}
