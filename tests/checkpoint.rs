//! Checkpoints: what any layout saves any other reads, the same state gives the same bytes, and few are kept.

#[path = "support/checkpoints.rs"]
mod checkpoints;

use checkpoints::{Cut, KINDS, Scratch, check, encode, facts, flat, options, save, save_well, shards, simple_cut, writers};
use ferrotron::checkpoint::commit::last_incarnation;
use ferrotron::checkpoint::folder;
use ferrotron::checkpoint::index::Kind;
use ferrotron::checkpoint::load::{Checkpoint, by_step, newest_verified};
use ferrotron::checkpoint::save::{Shard, Writer};
use ferrotron::dtype::Dtype;
use ferrotron::plan::layout::Piece;
use proptest::collection::vec;
use proptest::prelude::{Just, ProptestConfig, Strategy, any, prop_assert, proptest};
use proptest::test_runner::TestCaseError;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// A stream of decisions drawn beforehand, so that a failing case shrinks.
struct Draws<'a>(std::iter::Cycle<std::slice::Iter<'a, u32>>);

impl Draws<'_> {
    fn below(&mut self, bound: usize) -> usize {
        *self.0.next().expect("the draws are a cycle") as usize % bound
    }
}

/// Cuts every tensor into random boxes, gives them to random ranks, and lays them in random order with gaps between.
fn random_cut(shapes: &[Vec<usize>], ranks: usize, draws: &mut Draws<'_>) -> Cut {
    let mut cut: Cut = (0..ranks).map(|_| (Vec::new(), draws.below(3))).collect();
    for (number, shape) in shapes.iter().enumerate() {
        let mut boxes = vec![(vec![0; shape.len()], shape.clone())];
        for _ in 0..draws.below(6) {
            let chosen = draws.below(boxes.len());
            let dim = draws.below(shape.len());
            if boxes[chosen].1[dim] < 2 {
                continue;
            }
            let (mut start, mut size) = boxes[chosen].clone();
            let first = 1 + draws.below(size[dim] - 1);
            boxes[chosen].1[dim] = first;
            start[dim] += first;
            size[dim] -= first;
            boxes.push((start, size));
        }
        for (start, size) in boxes {
            let (pieces, at) = &mut cut[draws.below(ranks)];
            let elements: usize = size.iter().product();
            let transposed = draws.below(2) == 1;
            pieces.push(Piece {
                name: format!("tensor.{number}"),
                shape: shape.clone(),
                start,
                size,
                transposed,
                flat: *at..*at + elements,
            });
            *at += elements + draws.below(3);
        }
    }
    for (pieces, _) in &mut cut {
        let turn = draws.below(pieces.len() + 1);
        pieces.rotate_left(turn);
    }
    cut
}

fn shapes() -> impl Strategy<Value = Vec<Vec<usize>>> {
    vec(vec(1usize..14, 1..=2), 1..5)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_tiling_reads_what_any_other_wrote(
        shapes in shapes(), ranks in 1usize..5, readers in 1usize..5, draws in vec(any::<u32>(), 200),
        written in Just([Dtype::F32, Dtype::Bf16, Dtype::F16]), choice in 0usize..9,
    ) {
        let scratch = Scratch::new("tilings");
        let mut draws = Draws(draws.iter().cycle());
        let (saved_as, read_as) = (written[choice % 3], written[choice / 3]);
        let cut = random_cut(&shapes, ranks, &mut draws);
        let mut writers = writers(&scratch.0, ranks, |_| ());
        for (rank, writer) in writers.iter_mut().enumerate() {
            let kinds = [(Kind::Weights, saved_as), (Kind::Master, Dtype::F32)];
            writer.save(facts(5), shards(&cut, rank, 5, &kinds)).expect("arguments are sound");
        }
        for writer in &mut writers {
            writer.finish().expect("nothing is in the way");
        }
        let (checkpoint, skipped) = newest_verified(&scratch.0).expect("a sound folder").expect("a checkpoint");
        prop_assert!(skipped.is_empty());
        for (pieces, elements) in random_cut(&shapes, readers, &mut draws) {
            let mut out = encode(&vec![-999.0; elements], read_as);
            checkpoint.read(Kind::Weights, &pieces, read_as, &mut out).map_err(|error| TestCaseError::fail(format!("{error:#}")))?;
            prop_assert!(out == flat(Kind::Weights, 5, read_as, &pieces, elements));
        }
    }
}

/// Large enough to be read and written in several chunks, both whole rows and segments of rows.
#[test]
fn large_tensors_are_cut_and_turned_in_chunks() {
    let scratch = Scratch::new("large");
    let shape = vec![1100, 9000];
    let whole = |transposed| {
        let flat = 0..1100 * 9000;
        vec![Piece { name: "w".to_owned(), shape: shape.clone(), start: vec![0, 0], size: shape.clone(), transposed, flat }]
    };
    let mut writers = writers(&scratch.0, 1, |_| ());
    let bytes = flat(Kind::Master, 1, Dtype::F32, &whole(true), 1100 * 9000);
    writers[0]
        .save(facts(1), vec![Shard { kind: Kind::Master, dtype: Dtype::F32, pieces: whole(true), bytes }])
        .expect("arguments are sound");
    writers[0].finish().expect("nothing is in the way");
    let checkpoint = by_step(&scratch.0, 1).expect("a checkpoint");
    checkpoint.verify().expect("a sound one");
    let part = |start: [usize; 2], size: [usize; 2], transposed| {
        let flat = 3..3 + size[0] * size[1];
        vec![Piece { name: "w".to_owned(), shape: shape.clone(), start: start.to_vec(), size: size.to_vec(), transposed, flat }]
    };
    let parts = [part([0, 0], [1100, 8000], false), part([500, 8990], [600, 10], true), part([7, 100], [1000, 7000], true)];
    for pieces in parts.into_iter().chain([whole(false)]) {
        let elements = pieces[0].flat.end;
        for dtype in [Dtype::F32, Dtype::Bf16] {
            let mut out = encode(&vec![-999.0; elements], dtype);
            checkpoint.read(Kind::Master, &pieces, dtype, &mut out).expect("a sound checkpoint");
            assert!(out == flat(Kind::Master, 1, dtype, &pieces, elements), "{dtype} {pieces:?}");
        }
    }
}

fn contents(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry"));
    entries.map(|entry| (entry.file_name().into_string().expect("a name"), fs::read(entry.path()).expect("a file"))).collect()
}

#[test]
fn the_same_state_gives_the_same_bytes() {
    let (first, second) = (Scratch::new("bytes"), Scratch::new("bytes"));
    for scratch in [&first, &second] {
        save_well(&mut writers(&scratch.0, 3, |_| ()), &simple_cut(3), 9);
    }
    let (first, second) = (contents(&first.0.join("step-00000009")), contents(&second.0.join("step-00000009")));
    assert_eq!(first.len(), 13, "four kinds of three ranks, and the index; no parts: {:?}", first.keys());
    assert!(first == second);
    let header = u64::from_le_bytes(first["master-00001-of-00003.safetensors"][..8].try_into().expect("eight bytes"));
    assert_eq!((header + 8) % 4096, 0, "data are aligned");
}

fn steps(checkpoints: &Path) -> Vec<String> {
    folder::names(checkpoints).expect("a folder").into_iter().map(folder::Name::text).collect()
}

#[test]
fn few_are_kept_and_latest_names_the_last() {
    let scratch = Scratch::new("keep");
    let mut writers = writers(&scratch.0, 2, |options| options.keep = 2);
    for step in [10, 20, 30, 40] {
        save_well(&mut writers, &simple_cut(2), step);
        assert_eq!(fs::read_to_string(scratch.0.join("latest")).expect("latest"), format!("step-{step:08}\n"));
    }
    assert_eq!(steps(&scratch.0), ["step-00000030", "step-00000040"]);
    check(&by_step(&scratch.0, 30).expect("kept"), &simple_cut(1), 30);
    let error = by_step(&scratch.0, 20).expect_err("deleted").to_string();
    assert!(error.contains("step 20") && error.contains("step-00000030, step-00000040"), "{error}");
}

/// The newest by number is corrupt, and the run goes on from before it: what verifies is not deleted in its favour.
#[test]
fn a_corrupt_newest_does_not_cost_the_last_good_one() {
    let scratch = Scratch::new("corrupt-newest");
    save_well(&mut writers(&scratch.0, 1, |_| ()), &simple_cut(1), 100);
    save_well(&mut writers(&scratch.0, 1, |_| ()), &simple_cut(1), 50);
    let file = scratch.0.join("step-00000100/master-00000-of-00001.safetensors");
    let mut bytes = fs::read(&file).expect("a file");
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&file, bytes).expect("a file");
    let (found, skipped) = newest_verified(&scratch.0).expect("one is sound").expect("one is there");
    assert_eq!((found.index.facts.step, skipped.len()), (50, 1));
    assert!(skipped[0].reason.contains("master-00000-of-00001.safetensors was altered"), "{}", skipped[0].reason);
    // In the same incarnation the higher step still counts as newer; the one just saved stays all the same.
    save_well(&mut writers(&scratch.0, 1, |options| options.keep = 1), &simple_cut(1), 60);
    assert_eq!(steps(&scratch.0), ["step-00000060", "step-00000100"]);
    // A later incarnation is newer than an abandoned one, whatever the steps.
    let mut later = writers(&scratch.0, 1, |options| (options.keep, options.incarnation) = (1, 1));
    save_well(&mut later, &simple_cut(1), 70);
    assert_eq!(steps(&scratch.0), ["step-00000070"]);
}

#[test]
fn a_step_that_exists_is_replaced() {
    let scratch = Scratch::new("replace");
    save_well(&mut writers(&scratch.0, 2, |_| ()), &simple_cut(2), 10);
    save_well(&mut writers(&scratch.0, 3, |options| options.incarnation = 1), &simple_cut(3), 10);
    assert_eq!(steps(&scratch.0), ["step-00000010"]);
    let checkpoint = by_step(&scratch.0, 10).expect("the new one");
    assert_eq!((checkpoint.index.incarnation, checkpoint.index.files.len()), (1, 12));
    check(&checkpoint, &simple_cut(3), 10);
}

/// A start finds what a kill between the two renames of a replacement leaves.
#[test]
fn a_replacement_that_was_cut_short_is_undone_or_finished() {
    let scratch = Scratch::new("cut-short");
    save_well(&mut writers(&scratch.0, 1, |_| ()), &simple_cut(1), 10);
    fs::rename(scratch.0.join("step-00000010"), scratch.0.join("step-00000010.replaced")).expect("a rename");
    check(&newest_verified(&scratch.0).expect("sound").expect("the one aside counts").0, &simple_cut(1), 10);
    check(&by_step(&scratch.0, 10).expect("the one aside counts"), &simple_cut(1), 10);
    let writer = writers(&scratch.0, 1, |_| ());
    assert_eq!(steps(&scratch.0), ["step-00000010"]);
    drop(writer);
    let (from, to) = (scratch.0.join("step-00000010"), scratch.0.join("step-00000010.replaced"));
    fs::create_dir(&to).expect("a folder");
    for (name, bytes) in contents(&from) {
        fs::write(to.join(name), bytes).expect("a file");
    }
    drop(writers(&scratch.0, 1, |_| ()));
    assert_eq!(steps(&scratch.0), ["step-00000010"]);
}

#[test]
fn leftovers_are_cleared_at_the_start_and_foreign_folders_are_not() {
    let scratch = Scratch::new("leftovers");
    for name in ["step-00000005.0-1.tmp", "step-00000005.9-1.tmp", "step-00000004.deleted.tmp", "mine.tmp"] {
        fs::create_dir(scratch.0.join(name)).expect("a folder");
        fs::write(scratch.0.join(name).join("file"), "x").expect("a file");
    }
    let mut writers = writers(&scratch.0, 1, |options| options.incarnation = 3);
    assert_eq!(steps(&scratch.0), ["step-00000005.9-1.tmp"], "a later incarnation may be at work");
    assert!(scratch.0.join("mine.tmp/file").exists());
    save_well(&mut writers, &simple_cut(1), 6);
    assert!(newest_verified(&scratch.0).expect("sound").is_some());
}

#[test]
fn an_earlier_incarnation_is_fenced_out() {
    let scratch = Scratch::new("fence");
    let mut early = writers(&scratch.0, 1, |options| options.incarnation = 4);
    save_well(&mut early, &simple_cut(1), 1);
    assert_eq!(last_incarnation(&scratch.0).expect("readable"), Some(4));
    let error = Writer::new(options(&scratch.0, 0, 1)).err().expect("the folder is taken").to_string();
    assert!(error.contains("another run is writing"), "{error}");
    // As when the later start is on another machine, where the lock does not reach.
    fs::write(scratch.0.join("incarnation"), "5\n").expect("a file");
    let error = format!("{:#}", save(&mut early, &simple_cut(1), 2).remove(0).expect_err("fenced out"));
    assert!(error.contains("incarnation 5") && error.contains("incarnation 4 may no longer"), "{error}");
    assert_eq!(steps(&scratch.0), ["step-00000001"]);
    drop(early);
    let error = Writer::new(options(&scratch.0, 0, 1)).err().expect("0 is before 5").to_string();
    assert!(error.contains("incarnation 5"), "{error}");
}

#[test]
fn a_rank_that_fails_or_never_comes_fails_the_save_and_nothing_else() {
    let scratch = Scratch::new("missing");
    let mut writers = writers(&scratch.0, 2, |options| options.deadline = std::time::Duration::from_millis(300));
    save_well(&mut writers, &simple_cut(2), 1);
    writers[0].save(facts(2), shards(&simple_cut(2), 0, 2, &KINDS)).expect("arguments are sound");
    let error = format!("{:#}", writers[0].finish().expect_err("rank 1 does not come"));
    assert!(error.contains("ranks [1]"), "{error}");
    // Rank 1 comes late; both are at their third save then.
    writers[1].save(facts(2), shards(&simple_cut(2), 1, 2, &KINDS)).expect("arguments are sound");
    writers[1].finish().expect("its part is written");
    // The halves of different cuts do not make whole tensors.
    writers[0].save(facts(3), shards(&simple_cut(2), 0, 3, &KINDS)).expect("arguments are sound");
    writers[1].save(facts(3), shards(&simple_cut(3), 1, 3, &KINDS)).expect("arguments are sound");
    let error = format!("{:#}", writers[0].finish().expect_err("they do not fit"));
    assert!(error.contains("do not make whole tensors") && error.contains("overlap"), "{error}");
    writers[1].finish().expect("its part is written");
    save_well(&mut writers, &simple_cut(2), 4);
    assert_eq!(steps(&scratch.0), ["step-00000001", "step-00000004"]);
    check(&by_step(&scratch.0, 4).expect("a checkpoint"), &simple_cut(2), 4);
}

#[test]
fn bad_pieces_and_bad_questions_are_errors() {
    let scratch = Scratch::new("bad");
    let mut writers = writers(&scratch.0, 1, |_| ());
    let mut bad = shards(&simple_cut(1), 0, 1, &KINDS);
    bad[0].pieces[0].flat.end += 1;
    let error = format!("{:#}", writers[0].save(facts(1), bad).expect_err("a range that is too long"));
    assert!(error.contains("model.up.weight") && error.contains("weights"), "{error}");
    save_well(&mut writers, &simple_cut(1), 1);
    let checkpoint = by_step(&scratch.0, 1).expect("a checkpoint");
    let mut pieces = simple_cut(1)[0].0.clone();
    let mut out = vec![0; simple_cut(1)[0].1 * 4];
    pieces[0].shape[0] = 5;
    let error = checkpoint.read(Kind::Master, &pieces, Dtype::F32, &mut out).expect_err("another shape").to_string();
    assert!(error.contains("[12, 6]") && error.contains("[5, 6]") && error.contains("model.up.weight"), "{error}");
    pieces[0].name = "nothing".to_owned();
    let error = checkpoint.read(Kind::Master, &pieces, Dtype::F32, &mut out).expect_err("no such tensor").to_string();
    assert!(error.contains("\"nothing\" of master"), "{error}");
    let error = Checkpoint::open(&scratch.0).expect_err("the folder above").to_string();
    assert!(error.contains("step-00000001 would be one"), "{error}");
}
