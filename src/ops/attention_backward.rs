//! Attention on a CPU: the backward pass.
//!
//! A part has a key head of a sequence and its query heads. For each block of keys it goes over the blocks of queries, redoes their weights
//! and adds to all three gradients. The products that go along the queries take weights and their gradients as the softmax writes them.
//!
//! Invariant: gradients of keys and values add the query heads in order, and of each its blocks of queries in order; those of queries add
//! the blocks of keys in order.

use crate::device::Device;
use crate::device::cpu::Cpu;
use crate::device::cpu::block::{Buffer, Left, PAD, Packed, Seen, Sum};
use crate::device::cpu::columns::Columns;
use crate::device::cpu::micro::Sums;
use crate::device::cpu::pack::{Along, Operand};
use crate::device::cpu::{softmax, vector};
use crate::device::tensor::Tensor;
use crate::dtype::{Dtype, Element};
use crate::ops::attention::Heads;
use crate::ops::attention_forward::{Attention, MOST_SUMS, Queries};
use std::f32::consts::LOG2_E;
use std::ops::Range;

/// What only a CPU's backward pass has need of.
pub struct Scratch {
    /// Sums over blocks of keys, for each head of each sequence its rows together: where a thread's buffer has no room for them.
    pub dq: Option<Tensor>,
    /// sum(dout o) of each row.
    pub dots: Tensor,
}

impl Scratch {
    /// None on a GPU.
    pub fn new(device: &Device, n: usize, heads: Heads, t: usize) -> Option<Scratch> {
        let width = heads.dim.next_multiple_of(PAD);
        let dq = || (heads.group() * t * width > MOST_SUMS).then(|| device.empty([heads.query * n, width], Dtype::F32));
        (!device.is_gpu()).then(|| Scratch { dq: dq(), dots: device.empty([n, heads.query], Dtype::F32) })
    }
}

/// What the backward pass is given beside the inputs.
pub struct Given<'a, T> {
    pub dout: &'a [T],
    pub lse: &'a [f32],
    pub dots: &'a [f32],
}

/// A key head of a sequence with its query heads, and their gradients.
struct Part<'a, T> {
    sequence: usize,
    key_head: usize,
    dq_sums: Option<&'a mut [f32]>,
    dq: Vec<Columns<'a, T>>,
    dk: Columns<'a, T>,
    dv: Columns<'a, T>,
}

/// A block of keys and values, packed.
struct Keys<'a> {
    range: Range<usize>,
    k: Packed<'a>,
    v: Packed<'a>,
    k_rows: Packed<'a>,
}

/// Room for one block of queries.
struct Work<'a, T> {
    packed: [&'a mut [u32]; 2],
    scores: [&'a mut [f32]; 2],
    weights: &'a mut [T],
    gradients: &'a mut [T],
    pairs: [&'a mut [u32]; 2],
    scratch: &'a mut [u32],
}

/// The sums that a block of queries and a block of keys add to.
struct Into<'a> {
    dq: &'a mut [f32],
    dk: &'a mut [f32],
    dv: &'a mut [f32],
    /// Whether the sums of keys and values begin here.
    begins: bool,
}

impl<T: Element> Attention<'_, T> {
    /// dots[n, query] = sum over a head of dout * o.
    pub fn dots(&self, cpu: &Cpu, dout: &[T], o: &[T], dots: &mut [f32]) {
        let Heads { query, dim, .. } = self.heads;
        cpu.for_rows(dots, query, 16, |first, rows| {
            let heads = dout.chunks_exact(dim).zip(o.chunks_exact(dim)).skip(first * query);
            for (dot, (dout, o)) in rows.iter_mut().zip(heads) {
                vector::dot(self.isa, dout, o, dot);
            }
        });
    }

    pub fn backward(&self, cpu: &Cpu, given: &Given<'_, T>, dq: Option<&mut [f32]>, dqkv: &mut [T]) {
        let Heads { query, kv, dim } = self.heads;
        let group = self.heads.group();
        let mut parts = Vec::new();
        let mut sums = dq.map(|dq| dq.chunks_mut(group * self.t * self.width));
        for (sequence, rows) in dqkv.chunks_mut(self.t * self.heads.columns()).enumerate() {
            let mut queries = Columns::split(rows, std::iter::repeat_n(dim, query + 2 * kv));
            let mut values = queries.split_off(query + kv).into_iter();
            let mut keys = queries.split_off(query).into_iter();
            let mut queries = queries.into_iter();
            for key_head in 0..kv {
                parts.push(Part {
                    sequence,
                    key_head,
                    dq_sums: sums.as_mut().map(|sums| sums.next().expect("sums for each key head of each sequence")),
                    dq: queries.by_ref().take(group).collect(),
                    dk: keys.next().expect("kv keys"),
                    dv: values.next().expect("kv values"),
                });
            }
        }
        cpu.parallel_over(parts, |part| cpu.with_buffer(|buffer| self.backward_part(part, given, buffer)));
    }

    fn backward_part(&self, part: Part<'_, T>, given: &Given<'_, T>, buffer: &mut [u32]) {
        let Heads { query, kv, dim } = self.heads;
        let Part { sequence, key_head, dq_sums, mut dq, mut dk, mut dv } = part;
        let (keys, width, group) = (self.keys, self.width, self.heads.group());
        let all = self.query_blocks(sequence, key_head * group..(key_head + 1) * group, 0..self.t);
        let mut buffer = Buffer::new(buffer);
        let mut packed = [keys; 2].map(|keys| buffer.units(self.blocks.units(keys, dim)));
        let packed_rows = buffer.units(self.blocks.units(dim, keys));
        let [dk_sums, dv_sums] = [keys; 2].map(|keys| buffer.floats(keys * width));
        let mut work = self.work(&mut buffer);
        let dq_sums = dq_sums.unwrap_or_else(|| buffer.floats(group * self.t * width));
        for block in self.key_blocks(0, self.t) {
            let [k_columns, v_columns] = &mut packed;
            let k = self.head(sequence, block.start, query + key_head, Along::K);
            let v = self.head(sequence, block.start, query + kv + key_head, Along::K);
            let k_rows = Operand { along: Along::X, ..k };
            let of_keys = Keys {
                range: block.clone(),
                k: self.blocks.pack(&k, block.len(), dim, k_columns),
                v: self.blocks.pack(&v, block.len(), dim, v_columns),
                k_rows: self.blocks.pack(&k_rows, dim, block.len(), packed_rows),
            };
            // The first block of queries writes the sums of the keys that it sees, later ones add to them.
            let written = block.len().min(self.queries) * width;
            for sums in [&mut *dk_sums, &mut *dv_sums] {
                sums[written..block.len() * width].fill(0.0);
            }
            for queries in &all {
                if let Some(seen) = queries.seen(&block) {
                    let row = (queries.head - key_head * group) * self.t + queries.rows.start;
                    let dq = &mut dq_sums[row * width..][..queries.rows.len() * width];
                    let begins = queries.head == key_head * group && queries.rows.start == block.start;
                    let to = Into { dq, dk: dk_sums, dv: dv_sums, begins };
                    self.backward_block(queries, seen, &of_keys, given, &mut work, to);
                }
            }
            for (sums, factor, out) in [(&*dk_sums, self.scale(), &mut dk), (&*dv_sums, 1.0, &mut dv)] {
                self.finish(sums, factor, out, block.clone());
            }
        }
        for (dq, sums) in dq.iter_mut().zip(dq_sums.chunks_exact(self.t * width)) {
            self.finish(sums, self.scale(), dq, 0..self.t);
        }
    }

    fn work<'b>(&self, buffer: &mut Buffer<'b>) -> Work<'b, T> {
        let (queries, keys, dim) = (self.queries, self.keys, self.heads.dim);
        let pairs = softmax::pairs(self.isa, T::DTYPE);
        Work {
            packed: [queries; 2].map(|queries| buffer.units(self.blocks.units(dim, queries))),
            scores: [queries; 2].map(|queries| buffer.floats(queries * keys)),
            weights: buffer.elements(if pairs { 0 } else { queries * keys }),
            gradients: buffer.elements(queries * keys),
            pairs: [queries; 2].map(|queries| buffer.units(if pairs { queries / 2 * keys } else { 0 })),
            scratch: buffer.units(self.blocks.units(queries, dim.max(keys)).max(self.blocks.units(keys, queries))),
        }
    }

    /// The gradients of scores are those of exponents of e, but for this.
    fn scale(&self) -> f32 {
        (1.0 / (self.heads.dim as f64).sqrt()) as f32
    }

    /// The rows `rows` of `out` from sums that begin with them.
    fn finish(&self, sums: &[f32], factor: f32, out: &mut Columns<'_, T>, rows: Range<usize>) {
        let factors = [factor; softmax::ROWS];
        for (first, sums) in rows.clone().step_by(softmax::ROWS).zip(sums.chunks(softmax::ROWS * self.width)) {
            let factors = &factors[..softmax::ROWS.min(rows.end - first)];
            softmax::finish(self.isa, softmax::Finished { sums, width: self.width, factors }, out, first);
        }
    }

    /// Adds to the gradients what a block of queries and a block of keys have to do with each other.
    fn backward_block(
        &self,
        queries: &Queries,
        seen: Range<usize>,
        keys: &Keys<'_>,
        given: &Given<'_, T>,
        work: &mut Work<'_, T>,
        to: Into<'_>,
    ) {
        let Heads { query, dim, .. } = self.heads;
        let (rows, width, stride, shift) = (queries.rows.len(), self.width, self.keys, queries.shift(seen.start));
        let Work { packed: [packed_q, packed_dout], scores: [scores, dweights], weights, gradients, pairs, scratch } = work;
        let Queries { sequence, head, rows: of_sequence, .. } = queries;
        let Into { dq, dk, dv, begins } = to;
        let first = sequence * self.t + of_sequence.start;
        let q = self.head(*sequence, of_sequence.start, *head, Along::K);
        let dout = Operand { data: &given.dout[first * query * dim + head * dim..], stride: query * dim, along: Along::K };
        let blocks = &self.blocks;
        for (a, b, to) in [(q, keys.k, &mut *scores), (dout, keys.v, &mut *dweights)] {
            let to = Sum { sums: to, stride, how: Sums::Store };
            blocks.multiply(&Left::Plain(a), b, [rows, seen.len(), dim], to, scratch, Seen::Columns { shift });
        }
        let (mut log_sums, mut dots, mut room) = ([0.0; softmax::ROWS], [0.0; softmax::ROWS], [(0, 0); softmax::ROWS]);
        for (row, (log_sum, dot)) in log_sums.iter_mut().zip(&mut dots).enumerate().take(rows) {
            let at = (first + row) * query + head;
            (*log_sum, *dot) = (given.lse[at] * LOG2_E, given.dots[at]);
        }
        let [weight_pairs, gradient_pairs] = pairs;
        let block = softmax::Gradient {
            stride,
            factor: self.factor,
            visible: self.visible(queries, &seen, &mut room),
            scores,
            dweights,
            log_sums: &log_sums[..rows],
            dots: &dots[..rows],
            weights,
            gradients,
            pairs: [weight_pairs, gradient_pairs],
        };
        softmax::backward(self.isa, block);
        let q_rows = blocks.pack(&Operand { along: Along::X, ..q }, dim, rows, packed_q);
        let dout_rows = blocks.pack(&Operand { along: Along::X, ..dout }, dim, rows, packed_dout);
        for (data, units, b, to) in [(&*weights, weight_pairs, dout_rows, dv), (&*gradients, gradient_pairs, q_rows, dk)] {
            let by_key = if softmax::pairs(self.isa, T::DTYPE) {
                Left::Units { units, stride }
            } else {
                Left::Plain(Operand { data, stride, along: Along::X })
            };
            let to = Sum { sums: to, stride: width, how: if begins { Sums::Store } else { Sums::Resume } };
            blocks.multiply(&by_key, b, [seen.len(), dim, rows], to, scratch, Seen::From { shift });
        }
        // Beyond the keys seen, gradients are zero: whole units may be read.
        let (by_query, count) = (Left::Plain(Operand { data: gradients, stride, along: Along::K }), blocks.whole(seen.len()));
        let how = if queries.begin_at(keys.range.start, self.keys) { Sums::Store } else { Sums::Resume };
        blocks.multiply(&by_query, keys.k_rows, [rows, dim, count], Sum { sums: dq, stride: width, how }, scratch, Seen::Until { shift });
    }
}
