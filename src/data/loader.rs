//! The batch of a step, read ahead by a thread.
//!
//! Invariant: a batch is a function of the step. Asking for a step other than the next one costs the time of a read, and nothing else.

use crate::data::corpus::Corpus;
use crate::data::sampler::{Order, Sampler, Share};
use anyhow::{Context, Result, bail, ensure};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::{self, JoinHandle};

/// The target of a token whose prediction does not count.
pub const IGNORED: u32 = u32::MAX;

pub struct LoaderSpec {
    /// The sources and their weights, as `sources::open` gives them.
    pub sources: Vec<(Arc<Corpus>, f64)>,
    pub order: Order,
    pub seed: u64,
    pub seq_len: usize,
    /// Rows of a step over all ranks.
    pub global_batch: usize,
    /// Which of these this rank reads, in this order.
    pub rows: Vec<usize>,
    /// The end of text id, when documents are not to see each other. Then a token attends to its own document only, positions count
    /// from 0 in each, and what follows an end of text is not asked for: its target is `IGNORED`. (The options `--reset-attention-mask`,
    /// `--reset-position-ids` and the loss mask at the end of documents of Megatron-LM, together.)
    pub document_mask: Option<u32>,
}

/// The rows of a step that one rank reads; row-major, `[rows, t]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Which rows of the global batch these are.
    pub rows: Vec<usize>,
    pub seq_len: usize,
    pub inputs: Vec<u32>,
    /// For each input the token that follows it, or `IGNORED`.
    pub targets: Vec<u32>,
    /// The position of each input in its row, or in its document under a document mask.
    pub positions: Vec<u32>,
    /// The first input of the row that this one may attend to: the start of its document under a document mask, else 0.
    pub starts: Vec<u32>,
}

impl Batch {
    /// The number of targets that count.
    pub fn valid(&self) -> u64 {
        self.targets.iter().filter(|&&target| target != IGNORED).count() as u64
    }
}

/// Gives the batches of steps, and has the next one read while the last one is trained on.
pub struct Loader {
    plan: Arc<BatchPlan>,
    reader: Option<Reader>,
}

struct Reader {
    /// The step of the next batch in the channel.
    next: u64,
    batches: Receiver<Result<Batch>>,
    thread: JoinHandle<()>,
}

/// All that a batch depends on but its step.
struct BatchPlan {
    corpora: Vec<Arc<Corpus>>,
    sampler: Sampler,
    rows: Vec<usize>,
    document_mask: Option<u32>,
}

impl Loader {
    pub fn new(spec: LoaderSpec) -> Result<Loader> {
        let LoaderSpec { sources, order, seed, seq_len, global_batch, rows, document_mask } = spec;
        ensure!(u32::try_from(seq_len).is_ok(), "train.seq_len = {seq_len}: positions in a row are counted with 32 bits");
        if let Some(row) = rows.iter().find(|&&row| row >= global_batch) {
            bail!("row {row} is asked for, but a step has train.global_batch_size = {global_batch} rows");
        }
        let share = |(corpus, weight): &(Arc<Corpus>, f64)| Share { name: corpus.name(), tokens: corpus.tokens(), weight: *weight };
        let sampler = Sampler::new(order, seed, seq_len, global_batch, &sources.iter().map(share).collect::<Vec<Share>>())?;
        let corpora = sources.into_iter().map(|(corpus, _)| corpus).collect();
        Ok(Loader { plan: Arc::new(BatchPlan { corpora, sampler, rows, document_mask }), reader: None })
    }

    /// Which tokens the rows are.
    pub fn sampler(&self) -> &Sampler {
        &self.plan.sampler
    }

    /// The batch of `step`, counted from 0.
    pub fn batch(&mut self, step: u64) -> Result<Batch> {
        if self.reader.as_ref().is_some_and(|reader| reader.next != step) {
            self.stop();
        }
        if self.reader.is_none() {
            self.reader = Some(Reader::start(&self.plan, step)?);
        }
        let reader = self.reader.as_mut().expect("it was just started");
        reader.next = step + 1;
        // A thread that ends without a word has panicked; its message is on stderr.
        let batch = reader.batches.recv().unwrap_or_else(|_| bail!("the thread that reads ahead panicked"));
        if batch.is_err() {
            self.stop();
        }
        batch.with_context(|| format!("reading the batch of step {step} (from 0)"))
    }

    /// Ends the thread, at the latest when it has read the batch it is at.
    fn stop(&mut self) {
        if let Some(Reader { batches, thread, .. }) = self.reader.take() {
            drop(batches);
            // An error here is a panic of the thread, which `batch` has reported.
            thread.join().ok();
        }
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Reader {
    fn start(plan: &Arc<BatchPlan>, first: u64) -> Result<Reader> {
        // One batch waits in the channel while the thread reads the one after it.
        let (sender, batches) = sync_channel(1);
        let plan = plan.clone();
        let read_ahead = move || {
            for step in first.. {
                let batch = plan.read(step);
                let last = batch.is_err();
                // Nobody listens any more: the loader stopped this thread.
                if sender.send(batch).is_err() || last {
                    return;
                }
            }
        };
        let thread =
            thread::Builder::new().name("read-ahead".to_string()).spawn(read_ahead).context("starting the thread that reads ahead")?;
        Ok(Reader { next: first, batches, thread })
    }
}

impl BatchPlan {
    fn read(&self, step: u64) -> Result<Batch> {
        let seq_len = self.sampler.seq_len();
        let numel = self.rows.len() * seq_len;
        let mut batch = Batch {
            rows: self.rows.clone(),
            seq_len,
            inputs: Vec::with_capacity(numel),
            targets: Vec::with_capacity(numel),
            positions: Vec::with_capacity(numel),
            starts: Vec::with_capacity(numel),
        };
        let mut tokens = vec![0; seq_len + 1];
        for &row in &self.rows {
            let sample = self.sampler.row(step, row);
            self.corpora[sample.source].read(sample.start, &mut tokens)?;
            batch.inputs.extend_from_slice(&tokens[..seq_len]);
            batch.targets.extend_from_slice(&tokens[1..]);
            match self.document_mask {
                None => {
                    batch.positions.extend(0..seq_len as u32);
                    batch.starts.extend(std::iter::repeat_n(0, seq_len));
                }
                Some(end_of_text) => batch.mask_documents(end_of_text),
            }
        }
        Ok(batch)
    }
}

impl Batch {
    /// Fills positions and starts of the last row added, and masks its targets.
    fn mask_documents(&mut self, end_of_text: u32) {
        let row = self.inputs.len() - self.seq_len;
        let mut start = 0;
        for at in 0..self.seq_len {
            self.positions.push((at - start) as u32);
            self.starts.push(start as u32);
            if self.inputs[row + at] == end_of_text {
                self.targets[row + at] = IGNORED;
                start = at + 1;
            }
        }
    }
}
