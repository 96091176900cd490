//! Which tokens a row is, and the batches of a step.
//!
//! Invariant: a row is a function of (seed, step, row), whoever reads it and in whatever order.

use crate::support::{fails, folder, source, u16_file, write};
use ferrotron::data::corpus::Corpus;
use ferrotron::data::loader::{Batch, IGNORED, Loader, LoaderSpec};
use ferrotron::data::sampler::{Order, Sampler, Share};
use ferrotron::data::sources;
use ferrotron::data::tokenizer::Tokenizer;
use proptest::prelude::{ProptestConfig, any, prop_assert, prop_assert_eq, proptest};
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

fn share(tokens: usize, weight: f64) -> Share {
    Share { name: format!("a source of {tokens}"), tokens, weight }
}

#[test]
fn sequential_samples_lie_side_by_side_and_start_over() {
    let sampler = Sampler::new(Order::Sequential, 1, 4, 3, &[share(4 * 5 + 3, 1.0)]).expect("good");
    let starts: Vec<usize> =
        (0..4).flat_map(|step| (0..3).map(move |row| (step, row))).map(|(step, row)| sampler.row(step, row).start).collect();
    assert_eq!(starts, [0, 4, 8, 12, 16, 0, 4, 8, 12, 16, 0, 4]);
    assert_eq!(sampler.row(1, 2).epoch, 1);
    assert_eq!(sampler.samples_before_repeat(), 5);
}

#[test]
fn an_epoch_of_shuffled_samples_reads_each_window_once() {
    let tokens = 7 * 50 + 6;
    let sampler = Sampler::new(Order::Shuffled, 9, 7, 4, &[share(tokens, 1.0)]).expect("good");
    let mut orders = BTreeSet::new();
    let mut offsets = BTreeSet::new();
    for epoch in 0..8u64 {
        let samples: Vec<_> = (epoch * 50..(epoch + 1) * 50).map(|n| sampler.sample(n)).collect();
        assert!(samples.iter().all(|sample| sample.epoch == epoch && sample.start + 8 <= tokens));
        let starts: BTreeSet<usize> = samples.iter().map(|sample| sample.start).collect();
        let offset = *starts.first().expect("fifty samples");
        assert!(offset < 7 && (epoch > 0 || offset == 0), "epoch {epoch} starts at {offset}");
        assert_eq!(starts, (0..50).map(|window| offset + 7 * window).collect());
        orders.insert(samples.iter().map(|sample| sample.start - offset).collect::<Vec<usize>>());
        offsets.insert(offset);
    }
    assert_eq!(orders.len(), 8, "each epoch has an order of its own");
    assert!(offsets.len() > 2, "the cuts move: {offsets:?}");
    let other = Sampler::new(Order::Shuffled, 10, 7, 4, &[share(tokens, 1.0)]).expect("good");
    assert!((0..50).any(|n| other.sample(n) != sampler.sample(n)), "another seed, another order");
}

#[test]
fn weights_decide_how_often_a_source_is_read() {
    let shares = [share(1000, 0.7), share(50, 0.2), share(100_000, 0.1)];
    let sampler = Sampler::new(Order::Shuffled, 3, 8, 10, &shares).expect("good");
    let mut counts = [0i32; 3];
    for step in 0..1000 {
        for row in 0..10 {
            let sample = sampler.row(step, row);
            counts[sample.source] += 1;
            assert!(sample.start + 9 <= shares[sample.source].tokens);
        }
    }
    for (count, expected) in counts.into_iter().zip([7000, 2000, 1000]) {
        assert!((count - expected).abs() <= 3, "{counts:?}");
    }
    // The source of 50 tokens has six windows and runs out first.
    let end = sampler.samples_before_repeat();
    assert_eq!((sampler.sample(end).source, sampler.sample(end).epoch), (1, 1));
    assert!((0..end).all(|n| sampler.sample(n).epoch == 0));
}

#[test]
fn samplers_that_cannot_be_are_refused() {
    let sampler = |seq_len, shares: &[Share]| Sampler::new(Order::Sequential, 0, seq_len, 1, shares);
    sampler(16, &[share(17, 1.0)]).expect("one window");
    fails(sampler(16, &[share(500, 1.0), share(16, 1.0)]), &["a source of 16", "holds 16 tokens", "seq_len + 1 = 17"]);
    fails(sampler(16, &[]), &["data.sources is empty"]);
    fails(sampler(16, &[share(50, 1.0), share(60, 1e-9)]), &["a source of 60", "weight 0.000000001", "smallest part"]);
    fails(sampler(16, &[share(50, -1.0)]), &["weight -1", "positive"]);
    fails(sampler(0, &[share(50, 1.0)]), &["seq_len = 0"]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn an_epoch_is_a_permutation_of_the_windows(seed in any::<u64>(), windows in 1usize..2000, spare in 0usize..5, epoch in 0u64..1000) {
        let sampler = Sampler::new(Order::Shuffled, seed, 5, 3, &[share(windows * 5 + 1 + spare, 1.0)]).expect("good");
        let starts: BTreeSet<usize> = (0..windows as u64).map(|i| sampler.sample(epoch * windows as u64 + i).start).collect();
        prop_assert_eq!(starts.len(), windows);
        prop_assert!(starts.iter().all(|start| start % 5 == starts.first().expect("a window") % 5 && start + 6 <= windows * 5 + 1 + spare));
    }

    #[test]
    fn a_row_depends_on_its_number_alone(seed in any::<u64>(), step in 0u64..1 << 40, row in 0usize..12, split in 1usize..4) {
        // The same sample of the run, whether it is counted in batches of 12 or of another size, and in whatever order it is asked for.
        let shares = [share(997, 2.0), share(331, 1.0)];
        let large = Sampler::new(Order::Shuffled, seed, 10, 12, &shares).expect("good");
        let small = Sampler::new(Order::Shuffled, seed, 10, 12 / split, &shares).expect("good");
        let n = step * 12 + row as u64;
        let size = (12 / split) as u64;
        prop_assert_eq!(large.row(step, row), small.row(n / size, (n % size) as usize));
    }
}

fn spec(corpora: &[Arc<Corpus>], order: Order, rows: Vec<usize>) -> LoaderSpec {
    let sources = corpora.iter().map(|corpus| (corpus.clone(), 1.0)).collect();
    LoaderSpec { sources, order, seed: 5, seq_len: 8, global_batch: 6, rows, document_mask: None }
}

fn counting(root: &Path, tokens: u16) -> Arc<Corpus> {
    let path = u16_file(&root.join("counting.bin"), 0..tokens);
    Arc::new(Corpus::open(&[path], None, tokens as usize).expect("good"))
}

#[test]
fn ranks_read_their_rows_of_the_same_batch() {
    let root = folder("ranks");
    let corpora = [counting(&root, 1000)];
    for order in [Order::Sequential, Order::Shuffled] {
        let mut whole = Loader::new(spec(&corpora, order, (0..6).collect())).expect("good");
        let mut parts: Vec<Loader> =
            [vec![0, 1], vec![5, 4], vec![2, 3]].map(|rows| Loader::new(spec(&corpora, order, rows)).expect("good")).into();
        // Far ahead, back, and over the end of epochs (124 samples).
        for step in (0..50).chain([1_000_000, 3, 3, 4]) {
            let all = whole.batch(step).expect("good");
            assert_eq!((all.seq_len, all.inputs.len(), all.valid()), (8, 48, 48));
            for loader in &mut parts {
                let part = loader.batch(step).expect("good");
                for (i, &row) in part.rows.iter().enumerate() {
                    let (mine, theirs) = (i * 8..(i + 1) * 8, row * 8..(row + 1) * 8);
                    assert_eq!(part.inputs[mine.clone()], all.inputs[theirs.clone()]);
                    assert_eq!(part.targets[mine.clone()], all.targets[theirs]);
                    assert_eq!(part.positions[mine.clone()], [0, 1, 2, 3, 4, 5, 6, 7]);
                    assert_eq!(part.starts[mine], [0; 8]);
                }
            }
            assert!(all.inputs.iter().zip(&all.targets).all(|(input, target)| input + 1 == *target));
        }
    }
    let mut loader = Loader::new(spec(&corpora, Order::Sequential, vec![2])).expect("good");
    assert_eq!(loader.batch(1).expect("good").inputs, (64..72).collect::<Vec<u32>>());
}

#[test]
fn documents_do_not_see_each_other_under_a_mask() {
    let root = folder("masks");
    // Two rows of 8: an end of text within, at the end of a row, at its start, and two in a row.
    let path = u16_file(&root.join("a.bin"), [1, 2, 9, 3, 4, 5, 6, 9, 9, 9, 7, 7, 9, 8, 8, 8, 8]);
    let corpus = Arc::new(Corpus::open(&[path], None, 10).expect("good"));
    let spec = LoaderSpec { document_mask: Some(9), global_batch: 2, ..spec(&[corpus], Order::Sequential, vec![0, 1]) };
    let batch = Loader::new(spec).expect("good").batch(0).expect("good");
    let expected = Batch {
        rows: vec![0, 1],
        seq_len: 8,
        inputs: vec![1, 2, 9, 3, 4, 5, 6, 9, 9, 9, 7, 7, 9, 8, 8, 8],
        targets: vec![2, 9, IGNORED, 4, 5, 6, 9, IGNORED, IGNORED, IGNORED, 7, 9, IGNORED, 8, 8, 8],
        positions: vec![0, 1, 2, 0, 1, 2, 3, 4, 0, 0, 0, 1, 2, 0, 1, 2],
        starts: vec![0, 0, 0, 3, 3, 3, 3, 3, 0, 1, 2, 2, 2, 5, 5, 5],
    };
    assert_eq!(batch, expected);
    assert_eq!(batch.valid(), 11);
}

#[test]
fn an_error_of_the_thread_comes_back_from_its_step_and_later_steps_go_on() {
    let root = folder("thread_error");
    let path = u16_file(&root.join("a.bin"), (0..100).map(|i| if i == 60 { 999 } else { i }));
    let corpora = [Arc::new(Corpus::open(&[path], None, 100).expect("good"))];
    let spec = LoaderSpec { global_batch: 3, ..spec(&corpora, Order::Sequential, vec![0, 1, 2]) };
    let mut loader = Loader::new(spec).expect("good");
    for _ in 0..2 {
        loader.batch(0).expect("good");
        loader.batch(1).expect("good");
        fails(loader.batch(2), &["batch of step 2", "a.bin, byte 120", "999", "100"]);
        loader.batch(3).expect("good");
    }
}

#[test]
fn dropping_the_loader_ends_the_thread() {
    let corpora = [counting(&folder("dropped"), 500)];
    let mut loader = Loader::new(spec(&corpora, Order::Shuffled, vec![0])).expect("good");
    loader.batch(0).expect("good");
    assert!(Arc::strong_count(&corpora[0]) > 1);
    drop(loader);
    assert_eq!(Arc::strong_count(&corpora[0]), 1, "the thread held the corpus");
}

#[test]
fn loaders_that_cannot_be_are_refused() {
    let root = folder("refused");
    let corpora = [counting(&root, 8)];
    fails(Loader::new(spec(&corpora, Order::Sequential, vec![0])), &["counting.bin", "holds 8 tokens", "seq_len + 1 = 9"]);
    let corpora = [counting(&root, 9)];
    Loader::new(spec(&corpora, Order::Sequential, vec![0])).and_then(|mut loader| loader.batch(0)).expect("one window is enough");
    fails(Loader::new(spec(&corpora, Order::Sequential, vec![0, 6])), &["row 6", "global_batch_size = 6"]);
}

#[test]
fn from_text_to_batches_as_a_run_does_it() {
    let root = folder("whole");
    let text = "The quick brown fox jumps over the lazy dog. ".repeat(40);
    for name in ["a.txt", "b.txt", "c.txt"] {
        write(&root.join(name), &text);
    }
    let opened = sources::open(&[source(&root.join("*.txt"))], &Tokenizer::Bytes, &root.join("cache"), 320).expect("good");
    let spec = LoaderSpec {
        sources: opened,
        order: Order::Shuffled,
        seed: 1234,
        seq_len: 64,
        global_batch: 8,
        rows: (0..8).collect(),
        document_mask: Tokenizer::Bytes.end_of_text(),
    };
    let mut loader = Loader::new(spec).expect("good");
    let mut seen = 0;
    // 5403 tokens: 84 windows in an epoch.
    for step in 0..42 {
        let batch = loader.batch(step).expect("good");
        let ends = batch.inputs.iter().filter(|&&token| token == 256).count() as u64;
        seen += ends;
        assert_eq!(batch.valid(), 8 * 64 - ends);
    }
    assert!((8..=12).contains(&seen), "four epochs have two or three ends of text each as inputs, not {seen}");
}
