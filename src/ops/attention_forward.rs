//! Attention on a CPU: how a call is cut into blocks, and the forward pass.
//!
//! A part of the forward pass has some query heads of a key head and some blocks of queries of a sequence: it goes over the blocks of keys
//! and values, packs each once, and keeps the statistics and sums of all its queries meanwhile.
//!
//! Invariant: where blocks of queries and keys begin depends on the width of a head alone; how many of them a part has changes no bit.

use crate::device::cpu::block::{Blocks, Buffer, Left, PAD, Packed, Seen, Sum};
use crate::device::cpu::columns::Columns;
use crate::device::cpu::micro::Sums;
use crate::device::cpu::pack::{Along, Operand};
use crate::device::cpu::softmax::{self, Visible};
use crate::device::cpu::{Cpu, Isa};
use crate::device::tensor::View;
use crate::dtype::Element;
use crate::ops::attention::{Heads, Mask};
use std::f64::consts::LOG2_E;
use std::ops::Range;

/// What the sums of a part may take of a thread's buffer, which has four times as much.
pub const MOST_SUMS: usize = 1 << 18;

/// What all parts of a call know.
pub struct Attention<'a, T> {
    pub blocks: Blocks,
    pub isa: Isa,
    pub heads: Heads,
    pub t: usize,
    /// Columns of a row of sums.
    pub width: usize,
    /// What makes exponents of two of scores: 1 / (sqrt(d) ln 2).
    pub factor: f32,
    /// Rows of queries that are computed together.
    pub queries: usize,
    /// Keys of a block: whole blocks of queries.
    pub keys: usize,
    qkv: &'a [T],
    starts: &'a [u32],
    window: usize,
}

/// A block of queries of a head: all that its keys must know.
pub struct Queries {
    pub sequence: usize,
    pub head: usize,
    pub rows: Range<usize>,
    /// The first key that any of the rows sees.
    pub lowest: usize,
}

impl Queries {
    /// Those of `keys` that some of the rows may see.
    pub fn seen(&self, keys: &Range<usize>) -> Option<Range<usize>> {
        let seen = keys.start..keys.end.min(self.rows.end);
        (!seen.is_empty() && seen.end > self.lowest).then_some(seen)
    }

    /// Whether no block of `keys` keys before this one is seen.
    pub fn begin_at(&self, start: usize, keys: usize) -> bool {
        self.lowest / keys * keys == start
    }

    /// By how much the rows are after the keys from `start` on.
    pub fn shift(&self, start: usize) -> usize {
        self.rows.start - start
    }
}

/// Some blocks of queries of some heads of a group, with their part of the results.
struct Part<'a, T> {
    sequence: usize,
    rows: Range<usize>,
    heads: Range<usize>,
    o: Vec<Columns<'a, T>>,
    lse: Vec<Columns<'a, f32>>,
}

impl<'a, T: Element> Attention<'a, T> {
    pub fn new(cpu: &Cpu, qkv: View<'a>, heads: Heads, mask: Mask<'a>) -> Self {
        let (t, starts) = (mask.t, mask.starts.slice::<u32>());
        for (row, &start) in starts.iter().enumerate() {
            assert!(start as usize <= row % t, "row {} of a sequence sees from {start} on, which leaves out itself", row % t);
        }
        // Scores of a block and what is packed for it stay in the caches.
        let (queries, keys) = if heads.dim <= 512 { (softmax::ROWS, 4 * softmax::ROWS) } else { (32, 32) };
        Attention {
            blocks: Blocks::narrow(cpu, qkv.dtype()),
            isa: cpu.isa(),
            heads,
            t,
            width: heads.dim.next_multiple_of(PAD),
            factor: (LOG2_E / (heads.dim as f64).sqrt()) as f32,
            queries,
            keys,
            qkv: qkv.slice(),
            starts,
            window: mask.window.unwrap_or(t),
        }
    }

    /// The rows from `row` of `sequence` on and one head's columns, `head` counting over queries, keys and values.
    pub fn head(&self, sequence: usize, row: usize, head: usize, along: Along) -> Operand<'a, T> {
        let stride = self.heads.columns();
        Operand { data: &self.qkv[(sequence * self.t + row) * stride + head * self.heads.dim..], stride, along }
    }

    /// The first key that row `q` of `sequence` sees; the last is q itself.
    fn first_key(&self, sequence: usize, q: usize) -> usize {
        (self.starts[sequence * self.t + q] as usize).max((q + 1).saturating_sub(self.window))
    }

    /// The blocks of the queries `rows` of each of `heads`.
    pub fn query_blocks(&self, sequence: usize, heads: Range<usize>, rows: Range<usize>) -> Vec<Queries> {
        let starts = rows.clone().step_by(self.queries);
        let ranges: Vec<_> = starts.map(|row| row..rows.end.min(row + self.queries)).collect();
        let lowest = |rows: &Range<usize>| rows.clone().map(|q| self.first_key(sequence, q)).min().expect("a block has rows");
        let lowest: Vec<_> = ranges.iter().map(lowest).collect();
        let of_head = |head| ranges.iter().zip(&lowest).map(move |(rows, &lowest)| Queries { sequence, head, rows: rows.clone(), lowest });
        heads.flat_map(of_head).collect()
    }

    /// Which of the `keys` each of `queries` sees, counted from `keys.start`.
    pub fn visible<'v>(&self, queries: &Queries, keys: &Range<usize>, room: &'v mut [Visible; softmax::ROWS]) -> &'v [Visible] {
        let within = |key: usize| (key.clamp(keys.start, keys.end) - keys.start) as u32;
        for (q, visible) in queries.rows.clone().zip(&mut *room) {
            *visible = (within(self.first_key(queries.sequence, q)), within(q + 1));
        }
        &room[..queries.rows.len()]
    }

    /// Blocks of keys that rows before `end` may see, of which none sees one before `lowest`.
    pub fn key_blocks(&self, lowest: usize, end: usize) -> impl Iterator<Item = Range<usize>> + use<T> {
        let size = self.keys;
        (lowest / size * size..end).step_by(size).map(move |start| start..end.min(start + size))
    }

    /// How many heads of a group and rows a part has: as many as its sums have room for, while all threads have work.
    fn size_of_parts(&self, threads: usize) -> (usize, usize) {
        let most = (MOST_SUMS / (self.queries * self.width)).max(1);
        let group = self.heads.group();
        let heads = (1..=group.min(most)).rev().find(|count| group.is_multiple_of(*count)).expect("one divides");
        let lanes = self.starts.len() / self.t * self.heads.query / heads;
        let stretches = (4 * threads).div_ceil(lanes.max(1));
        let blocks = self.t.div_ceil(self.queries).div_ceil(if threads == 1 { 1 } else { stretches });
        (heads, blocks.min(most / heads).max(1) * self.queries)
    }

    pub fn forward(&self, cpu: &Cpu, o: &mut [T], lse: &mut [f32]) {
        let Heads { query, dim, .. } = self.heads;
        let (heads_of_part, rows_of_part) = self.size_of_parts(cpu.threads());
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
                    parts.push(Part { sequence, rows: rows.clone(), heads: first..first + heads_of_part, o, lse });
                }
            }
        }
        cpu.parallel_over(parts, |part| cpu.with_buffer(|buffer| self.forward_part(part, buffer)));
    }

    fn forward_part(&self, mut part: Part<'_, T>, buffer: &mut [u32]) {
        let Heads { query, kv, dim } = self.heads;
        let (queries_of_block, keys) = (self.queries, self.keys);
        let all = self.query_blocks(part.sequence, part.heads.clone(), part.rows.clone());
        let mut buffer = Buffer::new(buffer);
        let (packed_keys, packed_values) = (buffer.units(self.blocks.units(keys, dim)), buffer.units(self.blocks.units(dim, keys)));
        let mut work = Work {
            scores: buffer.floats(queries_of_block * keys),
            weights: buffer.elements::<T>(queries_of_block * keys),
            scratch: buffer.units(self.blocks.units(queries_of_block, dim.max(keys))),
        };
        let rows = queries_of_block * all.len();
        let mut running = Running { maxima: buffer.floats(rows), sums: buffer.floats(rows), totals: buffer.floats(rows * self.width) };
        running.maxima.fill(f32::NEG_INFINITY);
        running.sums.fill(0.0);
        let key_head = part.heads.start / self.heads.group();
        let lowest = all.iter().map(|queries| queries.lowest).min().expect("a part has queries");
        for block in self.key_blocks(lowest, part.rows.end) {
            let k = self.head(part.sequence, block.start, query + key_head, Along::K);
            let v = self.head(part.sequence, block.start, query + kv + key_head, Along::X);
            let k = self.blocks.pack(&k, block.len(), dim, packed_keys);
            let v = self.blocks.pack(&v, dim, block.len(), packed_values);
            for (index, queries) in all.iter().enumerate() {
                if let Some(seen) = queries.seen(&block) {
                    self.forward_block(
                        queries,
                        seen,
                        [k, v],
                        &mut work,
                        running.of(index * queries_of_block, queries.rows.len(), self.width),
                    );
                }
            }
        }
        let mut lse = [0.0; softmax::ROWS];
        for (index, queries) in all.iter().enumerate() {
            let Running { maxima, sums, totals } = running.of(index * queries_of_block, queries.rows.len(), self.width);
            let (head, first) = (queries.head - part.heads.start, queries.rows.start - part.rows.start);
            let lse = &mut lse[..sums.len()];
            softmax::log_sums(self.isa, maxima, sums, lse);
            lse.iter().enumerate().for_each(|(row, lse)| part.lse[head].row(first + row)[0] = *lse);
            sums.iter_mut().for_each(|sum| *sum = 1.0 / *sum);
            let from = softmax::Finished { sums: totals, width: self.width, factors: sums };
            softmax::finish(self.isa, from, &mut part.o[head], first);
        }
    }

    /// Takes a block of keys and values into what a block of queries has so far.
    fn forward_block(&self, queries: &Queries, seen: Range<usize>, [k, v]: [Packed<'_>; 2], work: &mut Work<'_, T>, running: Running<'_>) {
        let (rows, dim, stride, shift) = (queries.rows.len(), self.heads.dim, self.keys, queries.shift(seen.start));
        let Work { scores, weights, scratch } = work;
        let q = Left::Plain(self.head(queries.sequence, queries.rows.start, queries.head, Along::K));
        let to = Sum { sums: scores, stride, how: Sums::Store };
        self.blocks.multiply(&q, k, [rows, seen.len(), dim], to, scratch, Seen::Columns { shift });
        let first = queries.begin_at(seen.start, self.keys);
        let mut room = [(0, 0); softmax::ROWS];
        let step = softmax::Step {
            stride,
            factor: self.factor,
            visible: self.visible(queries, &seen, &mut room),
            scores,
            weights,
            maxima: running.maxima,
            sums: running.sums,
            totals: if first { &mut [] } else { &mut *running.totals },
        };
        softmax::forward(self.isa, step);
        // Beyond the keys seen, weights are zero: whole units may be read.
        let (weights, count) = (Left::Plain(Operand { data: weights, stride, along: Along::K }), self.blocks.whole(seen.len()));
        let to = Sum { sums: running.totals, stride: self.width, how: if first { Sums::Store } else { Sums::Resume } };
        self.blocks.multiply(&weights, v, [rows, dim, count], to, scratch, Seen::Until { shift });
    }
}

/// Room for one block of queries in the forward pass.
struct Work<'a, T> {
    scores: &'a mut [f32],
    weights: &'a mut [T],
    scratch: &'a mut [u32],
}

/// For each row: the largest exponent so far, the sum of 2^(exponent - that), and the sums of values with these weights.
struct Running<'a> {
    maxima: &'a mut [f32],
    sums: &'a mut [f32],
    totals: &'a mut [f32],
}

impl Running<'_> {
    fn of(&mut self, first: usize, rows: usize, width: usize) -> Running<'_> {
        Running {
            maxima: &mut self.maxima[first..][..rows],
            sums: &mut self.sums[first..][..rows],
            totals: &mut self.totals[first * width..][..rows * width],
        }
    }
}
