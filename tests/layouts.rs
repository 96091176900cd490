//! Layouts of random models on random meshes: nothing is missing, nothing is there twice, and what the plan says will be sent is sent.

#[path = "support/meshes.rs"]
mod meshes;

use ferrotron::comm::connect::Transport;
use ferrotron::comm::groups::Groups;
use ferrotron::comm::metered;
use ferrotron::config::Config;
use ferrotron::data::loader::Batch;
use ferrotron::device::Device;
use ferrotron::plan::catalog::Kind;
use ferrotron::plan::layout::Piece;
use ferrotron::plan::mesh::{Coordinates, Mesh};
use ferrotron::plan::schedule::{Placement, Route};
use ferrotron::plan::traffic::{Count, Traffic};
use ferrotron::plan::{Order, Plan, RankPlan, budget, catalog, stages};
use ferrotron::train::forecast;
use ferrotron::train::step::Trainer;
use meshes::{config, plan, planned};
use proptest::prelude::{ProptestConfig, any, prop_assert, prop_assert_eq, proptest};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

/// The boxes of weights that a rank answers for in a checkpoint, which are those that it updates.
fn answered_for(plan: &Plan, rank: &RankPlan) -> Vec<Piece> {
    let (slices, index) = if plan.zero >= 1 { (plan.mesh.shard, rank.at.shard) } else { (1, 0) };
    let speaks = rank.at.replicate == 0 && (plan.zero >= 1 || rank.at.shard == 0);
    let units = rank.units.iter().enumerate().filter(|(unit, _)| speaks && rank.kind(plan, *unit) != Kind::Head { tied: true });
    units
        .flat_map(|(_, (_, layout))| {
            let length = layout.numel / slices;
            layout.pieces_owned(index * length..(index + 1) * length)
        })
        .collect()
}

/// How often each element of each public tensor is held.
fn coverage(plan: &Plan) -> BTreeMap<String, Vec<u8>> {
    let mut counts: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    for entry in plan.units.iter().flat_map(|unit| &unit.entries) {
        counts.entry(entry.name.clone()).or_insert_with(|| vec![0; entry.public_shape.iter().product()]);
    }
    for rank in 0..plan.mesh.world() {
        for piece in answered_for(plan, &plan.rank(rank)) {
            let counts = counts.get_mut(&piece.name).expect("a piece of a tensor of the catalog");
            let width = *piece.shape.last().expect("a dim");
            let (rows, columns) = match (&piece.start[..], &piece.size[..]) {
                ([row, column], [height, width]) => (*row..row + height, *column..column + width),
                ([start], [length]) => (0..1, *start..start + length),
                other => panic!("a box of {other:?}"),
            };
            assert_eq!(rows.len() * columns.len(), piece.flat.len(), "a box and its run");
            rows.for_each(|row| counts[row * width..][columns.clone()].iter_mut().for_each(|count| *count += 1));
        }
    }
    counts
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_parameter_is_answered_for_once((config, world) in planned()) {
        let plan = plan(&config, world);
        for (name, counts) in coverage(&plan) {
            prop_assert!(counts.iter().all(|&count| count == 1), "{name}: {counts:?}");
        }
    }

    #[test]
    fn rows_of_all_ranks_are_the_global_batch((config, world) in planned()) {
        let plan = plan(&config, world);
        let mut taken = vec![0; plan.global_batch];
        let lane_of = |row: usize| row / (plan.global_batch / plan.geometry.lanes);
        for rank in (0..world).map(|rank| plan.rank(rank)) {
            let own = rank.at.dp(&plan.mesh) * rank.lanes..(rank.at.dp(&plan.mesh) + 1) * rank.lanes;
            prop_assert_eq!((rank.rows.len(), rank.micros()), (plan.global_batch / plan.mesh.dp(), plan.schedule.micros));
            for (micro, rows) in rank.rows.chunks(plan.micro_batch).enumerate() {
                let (lane, index) = match plan.geometry.order {
                    Order::Lanes => (micro / rank.micros_per_lane, micro % rank.micros_per_lane),
                    Order::Rows => (micro % rank.lanes, micro / rank.lanes),
                };
                prop_assert!(own.contains(&lane_of(rows[0])), "{:?} are not of lanes {own:?}", rows);
                let first = (own.start + lane) * (plan.global_batch / plan.geometry.lanes) + index * plan.micro_batch;
                prop_assert_eq!(rows, (first..first + plan.micro_batch).collect::<Vec<_>>());
            }
            if rank.at.tp == 0 && rank.at.pp == 0 {
                rank.rows.iter().for_each(|&row| taken[row] += 1);
            }
        }
        prop_assert!(taken.iter().all(|&count| count == 1), "{:?}", taken);
    }

    #[test]
    fn ranks_hold_each_unit_where_its_stage_is((config, world) in planned()) {
        let plan = plan(&config, world);
        let placement = plan.schedule.placement;
        let mut held = vec![0; plan.units.len()];
        for rank in (0..world).map(|rank| plan.rank(rank)).filter(|rank| rank.at == Coordinates { pp: rank.at.pp, replicate: 0, shard: 0, tp: 0 }) {
            for (chunk, units) in rank.chunks.iter().enumerate() {
                let of_plan: Vec<usize> = rank.units[units.clone()].iter().map(|(unit, _)| *unit).collect();
                prop_assert_eq!(&of_plan, &plan.stages[placement.stage(rank.at.pp, chunk)].clone().collect::<Vec<_>>());
                of_plan.iter().for_each(|&unit| held[unit] += 1);
            }
        }
        prop_assert!(held.iter().all(|&count| count == 1), "{:?}", held);
    }

    #[test]
    fn groups_partition_the_world(pp in 1usize..5, replicate in 1usize..4, shard in 1usize..6, tp in 1usize..5) {
        let mesh = Mesh { pp, replicate, shard, tp };
        type Groups = fn(&Mesh, Coordinates) -> Vec<usize>;
        for (group, size) in [(Mesh::tp_group as Groups, tp), (Mesh::shard_group, shard), (Mesh::replica_group, replicate), (Mesh::pp_group, pp)] {
            let mut members = vec![0; mesh.world()];
            for rank in 0..mesh.world() {
                let at = mesh.coordinates(rank);
                prop_assert_eq!(mesh.rank(at), rank);
                let ranks = group(&mesh, at);
                prop_assert!(ranks.len() == size && ranks.contains(&rank) && ranks.is_sorted(), "{rank} in {ranks:?}");
                for &other in &ranks {
                    prop_assert_eq!(&group(&mesh, mesh.coordinates(other)), &ranks);
                }
                members[ranks[0]] += usize::from(ranks[0] == rank);
            }
            prop_assert_eq!(members.iter().sum::<usize>() * size, mesh.world());
        }
    }

    /// For any number of layers and stages that a configuration may ask for, and a head of any weight.
    #[test]
    fn stages_tile_the_units_and_have_a_block(
        layers in 1usize..140, part in 0.0f64..1.0, chunks in 1usize..4, vee: bool, vocab in 8usize..200_000, gpt2: bool, t in 1usize..9000
    ) {
        let chunks = chunks.min(layers);
        let ranks = 1 + (part * (layers / chunks - 1) as f64) as usize;
        let placement = Placement { ranks, chunks, route: if vee { Route::Vee } else { Route::Loop } };
        let count = placement.stages();
        let family = if gpt2 { "gpt2" } else { "llama" };
        let model = config(&format!(
            "[model]\nfamily = \"{family}\"\nhidden_size = 64\nintermediate_size = 256\nnum_heads = 4\nnum_layers = {layers}\n\
             vocab_size = {vocab}\n[train]\nsteps = 1\nseq_len = {t}\nglobal_batch_size = 1\n"
        )).model;
        let units = catalog::units(&model, &[]);
        let ranges = stages::of_units(&units, &budget::unit_costs(&units, &model, t), &placement).expect("good arguments");
        prop_assert_eq!((ranges.len(), ranges[0].start, ranges[count - 1].end), (count, 0, units.len()));
        prop_assert!(ranges.windows(2).all(|pair| pair[0].end == pair[1].start), "{:?}", ranges);
        let blocks = |range: &Range<usize>| units[range.clone()].iter().filter(|unit| matches!(unit.kind, Kind::Block(_))).count();
        prop_assert!(ranges[..count - 1].iter().all(|range| blocks(range) > 0), "{:?}", ranges);
        let (first, last) = (&units[ranges[0].clone()], &units[ranges[count - 1].clone()]);
        prop_assert!(first[0].kind == Kind::Embedding && (!gpt2 || first[1].kind == Kind::Positions), "{:?}", ranges);
        prop_assert!(last.len() >= 2 && last[last.len() - 2].kind == Kind::Norm, "{:?}", ranges);
    }
}

/// What a rehearsed step of a rank sends.
fn rehearsed(config: &Config, plan: &Plan, rank: usize) -> Traffic {
    let groups = Groups::connect(&Transport::Rehearsal, &plan.mesh, rank).expect("groups of nobody else");
    let mut trainer = Trainer::new(config, plan.clone(), rank, &Device::dry(), groups).expect("a trainer");
    let zeros = vec![0; trainer.rank.rows.len() * plan.t];
    let [inputs, targets, positions, starts] = [(); 4].map(|()| zeros.clone());
    let batch = Batch { rows: trainer.rank.rows.clone(), seq_len: plan.t, inputs, targets, positions, starts };
    trainer.step(0, &batch, false).expect("a rehearsed step");
    let sizes: BTreeMap<&str, usize> = {
        let Groups { world, tp, shard, replica, down, up, tie, .. } = &trainer.groups;
        [("world", world), ("tp", tp), ("shard", shard), ("replica", replica), ("down", down), ("up", up), ("tie", tie)]
            .map(|(name, group)| (name, group.size()))
            .into()
    };
    let counts = |traffic: metered::Traffic| {
        traffic.into_iter().map(|(name, count)| (name, Count { calls: count.calls, bytes: count.bytes })).collect::<BTreeMap<_, _>>()
    };
    let travels = trainer.groups.take_traffic().into_iter().filter(|(name, traffic)| sizes[name] > 1 && !traffic.is_empty());
    travels.map(|(name, traffic)| (name, counts(traffic))).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_predicted_is_sent((config, world) in planned(), which in any::<usize>()) {
        let plan = plan(&config, world);
        let rank = which % world;
        prop_assert_eq!(forecast::traffic(&config, &plan, &plan.rank(rank)), rehearsed(&config, &plan, rank), "rank {} of\n{}", rank, config.to_toml());
    }
}

/// What becomes of a user's schedule for two pipeline ranks and two micro-batches.
fn with_schedule_file(name: &str, text: &str) -> Result<Plan, String> {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::write(&path, text).expect("a writable folder");
    let config = config(&format!(
        "[model]\nfamily = \"llama\"\nhidden_size = 16\nintermediate_size = 16\nnum_heads = 2\nnum_layers = 4\n[train]\nsteps = 1\n\
         seq_len = 8\nglobal_batch_size = 2\n[parallel]\npp = 2\npp_schedule = \"{}\"\n",
        path.display()
    ));
    Plan::new(&config, 2, None).map_err(|problems| problems.iter().map(|problem| problem.message.clone()).collect::<Vec<_>>().join("\n"))
}

#[test]
fn a_schedule_may_be_a_file() {
    let plan = with_schedule_file("good.txt", "F0.0 F0.1 B0.0 B0.1\nF0.0 B0.0 F0.1 I0.1 W0.1\n").expect("it can run");
    assert_eq!((plan.stages.len(), plan.schedule.micros), (2, 2));
    let refused = |name, text| with_schedule_file(name, text).expect_err("it cannot run");
    let many = refused("many.txt", "F0.0 B0.0 F0.1 B0.1 F0.2 B0.2\n");
    assert!(many.contains("is written for 1 pipeline ranks, but `parallel.pp` = 2"), "{many}");
    assert!(many.contains("is written for 3 micro-batches, but batch and data-parallel ranks ask for 2"), "{many}");
    let stuck = refused("stuck.txt", "F0.0 B0.0 F0.1 B0.1\nF0.1 B0.1 F0.0 B0.0\n");
    assert!(stuck.contains("cannot run: deadlock: rank 0 at action 2"), "{stuck}");
    let typo = refused("typo.txt", "F0.0 B0\n");
    assert!(typo.contains("line 1, word 2: `B0`: expected"), "{typo}");
}
