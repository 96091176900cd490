//! Causal attention, block by block: o = softmax(q k^T / sqrt(d)) v without the matrix of scores in memory.
//!
//! A row of `qkv` is the query heads, then the key heads, then the value heads, each `dim` wide; query heads that share a key head are
//! neighbours. Row q of a sequence sees key k when starts[q] <= k <= q, and with a window w also q - w < k.
//!
//! Scores, statistics and sums are f32; weights and their gradients are rounded to the dtype before they are multiplied, as one does on
//! matrix units. Forward goes over keys in blocks and keeps a running maximum. Backward redoes the weights from `lse`. On a GPU it is the
//! same with blocks of other sizes (`attention_kernels.rs`).
//!
//! Invariant: the bits of a row depend on its sequence, its position and its head's inputs, never on the other heads, sequences or threads
//! of a call; gradients of a key head add its query heads in order.

use crate::device::Device;
use crate::device::cpu::block::{Blocks, Buffer, PAD, Packed, Sum};
use crate::device::cpu::columns::Columns;
use crate::device::cpu::micro::Sums;
use crate::device::cpu::pack::{Along, Operand};
use crate::device::cpu::softmax::{self, Visible};
use crate::device::cpu::vector;
use crate::device::cpu::{Cpu, Isa};
use crate::device::tensor::{Tensor, View};
use crate::dispatch;
use crate::dtype::{Dtype, Element};
use crate::elementary;
use crate::ops::attention_kernels::{Kernels, Rows};
use std::ops::Range;

/// Rows of queries that are computed together.
const QUERIES: usize = softmax::ROWS;
/// Blocks of queries that share packed keys and values in the forward pass.
const SHARED: usize = 4;
/// The widest head that the buffers of a thread are sure to hold.
const WIDEST: usize = 2048;

/// Numbers of heads, and how wide each is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Heads {
    pub query: usize,
    pub kv: usize,
    pub dim: usize,
}

impl Heads {
    /// Columns of `qkv`.
    pub fn columns(&self) -> usize {
        (self.query + 2 * self.kv) * self.dim
    }

    fn group(&self) -> usize {
        self.query / self.kv
    }
}

/// Which keys a row sees.
#[derive(Clone, Copy)]
pub struct Mask<'a> {
    /// Rows of a sequence.
    pub t: usize,
    /// u32[n]: the first position of its sequence that a row sees.
    pub starts: View<'a>,
    /// With a window w, row q sees keys from q - w + 1 on.
    pub window: Option<usize>,
}

/// qkv[n, (query + 2 kv) dim] -> o[n, query dim], lse f32[n, query].
pub fn forward(qkv: View<'_>, heads: Heads, mask: Mask<'_>) -> (Tensor, Tensor) {
    let n = check(qkv, heads, mask);
    let mut o = qkv.device().empty([n, heads.query * heads.dim], qkv.dtype());
    let mut lse = qkv.device().empty([n, heads.query], Dtype::F32);
    match qkv.device() {
        Device::Cpu(cpu) => dispatch!(qkv.dtype(), T => {
            let attention = Attention::<T>::new(cpu, qkv, heads, mask);
            attention.forward(cpu, o.view_mut().into_slice(), lse.view_mut().into_slice());
        }),
        Device::Gpu(gpu) => Kernels { gpu, qkv, heads, mask }.forward(o.view_mut(), lse.view_mut()),
        Device::Dry(_) => {}
    }
    (o, lse)
}

/// The gradient of `qkv`, from that of `o` and from what `forward` gave.
pub fn backward(dout: View<'_>, qkv: View<'_>, o: View<'_>, lse: View<'_>, heads: Heads, mask: Mask<'_>) -> Tensor {
    let n = check(qkv, heads, mask);
    for (name, x) in [("dout", dout), ("o", o)] {
        assert_eq!(x.shape().numel(), n * heads.query * heads.dim, "{name} {} for {n} rows of {heads:?}", x.shape());
        assert_eq!(x.dtype(), qkv.dtype(), "{name} in the dtype of qkv");
    }
    assert_eq!((lse.shape().numel(), lse.dtype()), (n * heads.query, Dtype::F32), "lse of {n} rows of {heads:?}");
    let device = qkv.device();
    let mut dqkv = device.empty([n, heads.columns()], qkv.dtype());
    let mut scratch = Scratch::new(device, n, heads);
    let mut rows = Rows::new(device, n, heads, mask.t);
    match device {
        Device::Cpu(cpu) => dispatch!(qkv.dtype(), T => {
            let Scratch { dq, dots } = scratch.as_mut().expect("a CPU has it");
            let attention = Attention::<T>::new(cpu, qkv, heads, mask);
            attention.dots(cpu, dout.slice(), o.slice(), dots.view_mut().into_slice());
            let given = Given { dout: dout.slice(), lse: lse.slice(), dots: dots.view().slice() };
            attention.backward(cpu, &given, dq.view_mut().into_slice(), dqkv.view_mut().into_slice());
        }),
        Device::Gpu(gpu) => {
            let rows = rows.as_mut().expect("a GPU has them");
            Kernels { gpu, qkv, heads, mask }.backward(dqkv.view_mut(), dout, o, lse, rows);
        }
        Device::Dry(_) => {}
    }
    dqkv
}

fn check(qkv: View<'_>, heads: Heads, mask: Mask<'_>) -> usize {
    let Mask { t, starts, window } = mask;
    assert!(heads.kv > 0 && heads.query.is_multiple_of(heads.kv), "query heads in groups of one size: {heads:?}");
    assert!((1..=WIDEST).contains(&heads.dim), "heads of 1 to {WIDEST}: {heads:?}");
    assert_eq!(qkv.shape().columns(), heads.columns(), "qkv {} for {heads:?}", qkv.shape());
    let n = qkv.shape().rows();
    assert!(t > 0 && n.is_multiple_of(t), "{n} rows in sequences of {t}");
    assert_eq!((starts.shape().numel(), starts.dtype()), (n, Dtype::U32), "one start for each of {n} rows");
    assert!(window != Some(0), "a window sees at least the row itself");
    n
}

/// What only a CPU's backward pass has need of.
struct Scratch {
    /// Sums over blocks of keys, for each head of each sequence its rows together.
    dq: Tensor,
    /// sum(dout o) of each row.
    dots: Tensor,
}

impl Scratch {
    /// None on a GPU.
    fn new(device: &Device, n: usize, heads: Heads) -> Option<Scratch> {
        let zeros = || device.zeros([heads.query * n, heads.dim.next_multiple_of(PAD)], Dtype::F32);
        (!device.is_gpu()).then(|| Scratch { dq: zeros(), dots: device.empty([n, heads.query], Dtype::F32) })
    }
}

/// What all parts of a call know.
struct Attention<'a, T> {
    blocks: Blocks,
    isa: Isa,
    qkv: &'a [T],
    starts: &'a [u32],
    heads: Heads,
    t: usize,
    window: usize,
    scale: f32,
    /// Keys of a block.
    keys: usize,
}

/// What the backward pass is given beside the inputs.
struct Given<'a, T> {
    dout: &'a [T],
    lse: &'a [f32],
    dots: &'a [f32],
}

/// Some blocks of queries of some heads of a group, with their part of the results.
struct ForwardPart<'a, T> {
    sequence: usize,
    rows: Range<usize>,
    heads: Range<usize>,
    o: Vec<Columns<'a, T>>,
    lse: Vec<Columns<'a, f32>>,
}

/// A key head of a sequence with its query heads, and their gradients.
struct BackwardPart<'a, T> {
    sequence: usize,
    key_head: usize,
    dq_sums: &'a mut [f32],
    dq: Vec<Columns<'a, T>>,
    dk: Columns<'a, T>,
    dv: Columns<'a, T>,
}

/// A block of queries of a head: all that its keys must know.
struct Queries {
    sequence: usize,
    head: usize,
    rows: Range<usize>,
    /// The first key that any of the rows sees.
    lowest: usize,
}

impl Queries {
    /// Before which of the keys `seen` ends what the first rows see, for `Blocks::multiply_until`.
    fn until(&self, seen: &Range<usize>) -> impl Fn(usize) -> usize + use<> {
        let (first, start) = (self.rows.start, seen.start);
        move |row| (first + row).saturating_sub(start)
    }
}

impl<'a, T: Element> Attention<'a, T> {
    fn new(cpu: &Cpu, qkv: View<'a>, heads: Heads, mask: Mask<'a>) -> Self {
        let (t, starts) = (mask.t, mask.starts.slice::<u32>());
        for (row, &start) in starts.iter().enumerate() {
            assert!(start as usize <= row % t, "row {} of a sequence sees from {start} on, which leaves out itself", row % t);
        }
        Attention {
            blocks: Blocks::new(cpu, qkv.dtype()),
            isa: cpu.isa(),
            qkv: qkv.slice(),
            starts,
            heads,
            t,
            window: mask.window.unwrap_or(t),
            scale: (1.0 / (heads.dim as f64).sqrt()) as f32,
            keys: if heads.dim <= 512 { 192 } else { 48 },
        }
    }

    /// The rows from `row` of `sequence` on and one head's columns, `head` counting over queries, keys and values.
    fn head(&self, sequence: usize, row: usize, head: usize, along: Along) -> Operand<'a, T> {
        let stride = self.heads.columns();
        Operand { data: &self.qkv[(sequence * self.t + row) * stride + head * self.heads.dim..], stride, along }
    }

    /// The first key that row `q` of `sequence` sees; the last is q itself.
    fn first_key(&self, sequence: usize, q: usize) -> usize {
        (self.starts[sequence * self.t + q] as usize).max((q + 1).saturating_sub(self.window))
    }

    fn queries(&self, sequence: usize, head: usize, rows: Range<usize>) -> Queries {
        let lowest = rows.clone().map(|q| self.first_key(sequence, q)).min().expect("a block has rows");
        Queries { sequence, head, rows, lowest }
    }

    /// Which of the `keys` each of `queries` sees, counted from `keys.start`.
    fn visible(&self, queries: &Queries, keys: &Range<usize>) -> Vec<Visible> {
        let within = |key: usize| (key.clamp(keys.start, keys.end) - keys.start) as u32;
        queries.rows.clone().map(|q| (within(self.first_key(queries.sequence, q)), within(q + 1))).collect()
    }

    /// Blocks of keys that `rows` may see.
    fn key_blocks(&self, lowest: usize, end: usize) -> impl Iterator<Item = Range<usize>> + use<T> {
        let size = self.keys;
        (lowest / size * size..end).step_by(size).map(move |start| start..end.min(start + size))
    }

    fn forward(&self, cpu: &Cpu, o: &mut [T], lse: &mut [f32]) {
        let Heads { query, dim, .. } = self.heads;
        // Four blocks: those of one head, or as many heads of one group.
        let heads_of_part = (1..=SHARED).rev().find(|count| self.heads.group().is_multiple_of(*count)).expect("one divides");
        let rows_of_part = QUERIES * (SHARED / heads_of_part);
        let mut parts = Vec::new();
        let sequences = o.chunks_mut(self.t * query * dim).zip(lse.chunks_mut(self.t * query));
        for (sequence, (o, lse)) in sequences.enumerate() {
            let stretches = o.chunks_mut(rows_of_part * query * dim).zip(lse.chunks_mut(rows_of_part * query));
            for (stretch, (o, lse)) in stretches.enumerate() {
                let rows = stretch * rows_of_part..self.t.min((stretch + 1) * rows_of_part);
                let mut o = Columns::split(o, std::iter::repeat_n(dim, query)).into_iter();
                let mut lse = Columns::split(lse, std::iter::repeat_n(1, query)).into_iter();
                for first in (0..query).step_by(heads_of_part) {
                    let (o, lse) = (o.by_ref().take(heads_of_part).collect(), lse.by_ref().take(heads_of_part).collect());
                    parts.push(ForwardPart { sequence, rows: rows.clone(), heads: first..first + heads_of_part, o, lse });
                }
            }
        }
        cpu.parallel_over(parts, |part| cpu.with_buffer(|buffer| self.forward_part(part, buffer)));
    }

    fn forward_part(&self, mut part: ForwardPart<'_, T>, buffer: &mut [u32]) {
        let Heads { query, kv, dim } = self.heads;
        let (sequence, keys, width) = (part.sequence, self.keys, dim.next_multiple_of(PAD));
        let starts = part.rows.clone().step_by(QUERIES);
        let all: Vec<Queries> = part
            .heads
            .clone()
            .flat_map(|head| starts.clone().map(move |row| (head, row)))
            .map(|(head, row)| self.queries(sequence, head, row..part.rows.end.min(row + QUERIES)))
            .collect();
        let mut buffer = Buffer::new(buffer);
        let (packed_keys, packed_values) = (buffer.units(self.blocks.units(keys, dim)), buffer.units(self.blocks.units(dim, keys)));
        let scratch = buffer.units(self.blocks.units(QUERIES, dim.max(keys)));
        let scores = buffer.floats(QUERIES * keys);
        let weights = buffer.elements::<T>(QUERIES * keys);
        let totals = buffer.floats(all.len() * QUERIES * width);
        totals.fill(0.0);
        let mut maxima = vec![f32::NEG_INFINITY; all.len() * QUERIES];
        let mut sums = vec![0.0; all.len() * QUERIES];
        let key_head = part.heads.start / self.heads.group();
        let lowest = all.iter().map(|queries| queries.lowest).min().expect("a part has queries");
        for block in self.key_blocks(lowest, part.rows.end) {
            let k = self.head(sequence, block.start, query + key_head, Along::K);
            let v = self.head(sequence, block.start, query + kv + key_head, Along::X);
            let k = self.blocks.pack(&k, block.len(), dim, packed_keys);
            let v = self.blocks.pack(&v, dim, block.len(), packed_values);
            for (index, queries) in all.iter().enumerate() {
                let seen = block.start..block.end.min(queries.rows.end);
                if seen.is_empty() || seen.end <= queries.lowest {
                    continue;
                }
                let (rows, state) = (queries.rows.len(), index * QUERIES..index * QUERIES + queries.rows.len());
                let q = self.head(sequence, queries.rows.start, queries.head, Along::K);
                let scores_of = sum(scores, keys, Sums::Store);
                self.blocks.multiply_until(&q, k, [rows, seen.len(), dim], scores_of, scratch, queries.until(&seen));
                let totals = &mut totals[index * QUERIES * width..][..rows * width];
                let step = softmax::Step {
                    stride: keys,
                    width: seen.len().next_multiple_of(PAD),
                    scale: self.scale,
                    visible: &self.visible(queries, &seen),
                    scores,
                    weights,
                    maxima: &mut maxima[state.clone()],
                    sums: &mut sums[state],
                    totals,
                };
                softmax::forward(self.isa, step);
                // Beyond the keys seen, weights are zero: whole units may be read.
                let (weights, count) = (Operand { data: weights, stride: keys, along: Along::K }, self.blocks.whole(seen.len()));
                self.blocks.multiply(&weights, v, [rows, dim, count], sum(totals, width, Sums::Resume), scratch);
            }
        }
        for (index, queries) in all.iter().enumerate() {
            let head = queries.head - part.heads.start;
            for (row, q) in queries.rows.clone().enumerate() {
                let (state, to) = (index * QUERIES + row, q - part.rows.start);
                vector::scaled(self.isa, &totals[state * width..][..dim], 1.0 / sums[state], part.o[head].row(to));
            }
            // In a loop of their own, long chains of additions overlap.
            for (row, q) in queries.rows.clone().enumerate() {
                let state = index * QUERIES + row;
                part.lse[head].row(q - part.rows.start)[0] = maxima[state] + elementary::ln(sums[state] as f64) as f32;
            }
        }
    }

    /// dots[n, query] = sum over a head of dout * o.
    fn dots(&self, cpu: &Cpu, dout: &[T], o: &[T], dots: &mut [f32]) {
        let Heads { query, dim, .. } = self.heads;
        cpu.for_rows(dots, query, 16, |first, rows| {
            let heads = dout.chunks_exact(dim).zip(o.chunks_exact(dim)).skip(first * query);
            for (dot, (dout, o)) in rows.iter_mut().zip(heads) {
                vector::dot(self.isa, dout, o, dot);
            }
        });
    }

    fn backward(&self, cpu: &Cpu, given: &Given<'_, T>, dq: &mut [f32], dqkv: &mut [T]) {
        let Heads { query, kv, dim } = self.heads;
        let (group, width) = (self.heads.group(), dim.next_multiple_of(PAD));
        let mut parts = Vec::new();
        let mut sums = dq.chunks_mut(group * self.t * width);
        for (sequence, rows) in dqkv.chunks_mut(self.t * self.heads.columns()).enumerate() {
            let mut queries = Columns::split(rows, std::iter::repeat_n(dim, query + 2 * kv));
            let mut values = queries.split_off(query + kv).into_iter();
            let mut keys = queries.split_off(query).into_iter();
            let mut queries = queries.into_iter();
            for key_head in 0..kv {
                parts.push(BackwardPart {
                    sequence,
                    key_head,
                    dq_sums: sums.next().expect("sums for each key head of each sequence"),
                    dq: queries.by_ref().take(group).collect(),
                    dk: keys.next().expect("kv keys"),
                    dv: values.next().expect("kv values"),
                });
            }
        }
        cpu.parallel_over(parts, |part| cpu.with_buffer(|buffer| self.backward_part(part, given, buffer)));
    }

    fn backward_part(&self, mut part: BackwardPart<'_, T>, given: &Given<'_, T>, buffer: &mut [u32]) {
        let Heads { query, kv, dim } = self.heads;
        let (sequence, keys, width, group) = (part.sequence, self.keys, dim.next_multiple_of(PAD), self.heads.group());
        let all: Vec<Queries> = (part.key_head * group..(part.key_head + 1) * group)
            .flat_map(|head| (0..self.t).step_by(QUERIES).map(move |row| (head, row)))
            .map(|(head, row)| self.queries(sequence, head, row..self.t.min(row + QUERIES)))
            .collect();
        let mut buffer = Buffer::new(buffer);
        let mut packed = [keys; 2].map(|keys| buffer.units(self.blocks.units(keys, dim)));
        let packed_rows = buffer.units(self.blocks.units(dim, keys));
        let mut sums = [keys; 2].map(|keys| buffer.floats(keys * width));
        let mut work = Work {
            packed: [QUERIES; 2].map(|queries| buffer.units(self.blocks.units(dim, queries))),
            scores: [QUERIES; 2].map(|queries| buffer.floats(queries * keys)),
            weights: [QUERIES; 2].map(|queries| buffer.elements(queries * keys)),
            scratch: buffer.units(self.blocks.units(QUERIES, dim.max(keys)).max(self.blocks.units(keys, QUERIES))),
        };
        let lowest = all.iter().map(|queries| queries.lowest).min().expect("a sequence has rows");
        assert!(lowest < keys, "row 0 sees itself");
        for block in self.key_blocks(0, self.t) {
            let [k_columns, v_columns] = &mut packed;
            let k = self.head(sequence, block.start, query + part.key_head, Along::K);
            let v = self.head(sequence, block.start, query + kv + part.key_head, Along::K);
            let k_rows = Operand { along: Along::X, ..k };
            let of_keys = Keys {
                range: block.clone(),
                k: self.blocks.pack(&k, block.len(), dim, k_columns),
                v: self.blocks.pack(&v, block.len(), dim, v_columns),
                k_rows: self.blocks.pack(&k_rows, dim, block.len(), packed_rows),
            };
            sums.iter_mut().for_each(|sums| sums.fill(0.0));
            for queries in &all {
                let seen = block.start..block.end.min(queries.rows.end);
                if !seen.is_empty() && seen.end > queries.lowest {
                    let dq = (queries.head - part.key_head * group) * self.t + queries.rows.start;
                    let dq = &mut part.dq_sums[dq * width..][..queries.rows.len() * width];
                    self.backward_block(queries, &of_keys, given, &mut work, dq, &mut sums);
                }
            }
            for (row, key) in block.enumerate() {
                vector::scaled(self.isa, &sums[0][row * width..][..dim], self.scale, part.dk.row(key));
                vector::scaled(self.isa, &sums[1][row * width..][..dim], 1.0, part.dv.row(key));
            }
        }
        for (dq, sums) in part.dq.iter_mut().zip(part.dq_sums.chunks_exact(self.t * width)) {
            for (row, sums) in sums.chunks_exact(width).enumerate() {
                vector::scaled(self.isa, &sums[..dim], self.scale, dq.row(row));
            }
        }
    }

    /// Adds to the gradients what a block of queries and a block of keys have to do with each other.
    fn backward_block(
        &self,
        queries: &Queries,
        keys: &Keys<'_>,
        given: &Given<'_, T>,
        work: &mut Work<'_, T>,
        dq: &mut [f32],
        [dk, dv]: &mut [&mut [f32]; 2],
    ) {
        let Heads { query, dim, .. } = self.heads;
        let (rows, width) = (queries.rows.len(), dim.next_multiple_of(PAD));
        let seen = keys.range.start..keys.range.end.min(queries.rows.end);
        let Work { packed: [packed_q, packed_dout], scores: [scores, dweights], weights: [weights, gradients], scratch } = work;
        let Queries { sequence, head, rows: of_sequence, .. } = queries;
        let first = sequence * self.t + of_sequence.start;
        let q = self.head(*sequence, of_sequence.start, *head, Along::K);
        let dout = Operand { data: &given.dout[first * query * dim + head * dim..], stride: query * dim, along: Along::K };
        let blocks = &self.blocks;
        for (a, b, to) in [(&q, keys.k, &mut *scores), (&dout, keys.v, &mut *dweights)] {
            blocks.multiply_until(a, b, [rows, seen.len(), dim], sum(to, self.keys, Sums::Store), scratch, queries.until(&seen));
        }
        let of_rows = |all: &[f32]| -> Vec<f32> { (first..first + rows).map(|row| all[row * query + head]).collect() };
        let (lse, dots) = (of_rows(given.lse), of_rows(given.dots));
        let block = softmax::Gradient {
            stride: self.keys,
            width: seen.len().next_multiple_of(PAD),
            scale: self.scale,
            visible: &self.visible(queries, &seen),
            scores,
            dweights,
            log_sums: &lse,
            dots: &dots,
            weights,
            gradients,
        };
        softmax::backward(self.isa, block);
        let q_rows = blocks.pack(&Operand { along: Along::X, ..q }, dim, rows, packed_q);
        let dout_rows = blocks.pack(&Operand { along: Along::X, ..dout }, dim, rows, packed_dout);
        let stride = self.keys;
        let by_key = |data| Operand { data, stride, along: Along::X };
        blocks.multiply(&by_key(weights), dout_rows, [seen.len(), dim, rows], sum(dv, width, Sums::Resume), scratch);
        blocks.multiply(&by_key(gradients), q_rows, [seen.len(), dim, rows], sum(dk, width, Sums::Resume), scratch);
        // Beyond the keys seen, gradients are zero: whole units may be read.
        let (by_query, count) = (Operand { data: gradients, stride, along: Along::K }, self.blocks.whole(seen.len()));
        blocks.multiply(&by_query, keys.k_rows, [rows, dim, count], sum(dq, width, Sums::Resume), scratch);
    }
}

/// A block of keys and values, packed.
struct Keys<'a> {
    range: Range<usize>,
    k: Packed<'a>,
    v: Packed<'a>,
    k_rows: Packed<'a>,
}

/// Room for one block of queries in the backward pass.
struct Work<'a, T> {
    packed: [&'a mut [u32]; 2],
    scores: [&'a mut [f32]; 2],
    weights: [&'a mut [T]; 2],
    scratch: &'a mut [u32],
}

fn sum(sums: &mut [f32], stride: usize, how: Sums) -> Sum<'_> {
    Sum { sums, stride, how }
}
