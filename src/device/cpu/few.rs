//! Matrix products with few rows, as when a model generates: all the time goes into reading B once.
//!
//! Invariant: the same chains as `gemm::product`, so a row computed alone has the bits it has among others.

use crate::device::cpu::Cpu;
use crate::device::cpu::block::{Blocks, Left, Seen, Sum};
use crate::device::cpu::columns::Columns;
use crate::device::cpu::micro::{COLUMNS, ROWS, Sums};
use crate::device::cpu::pack::Operand;
use crate::device::cpu::vector;
use crate::dtype::Element;

/// Elements along K that are packed at a time: with a panel's columns they fit into the L1 cache.
const STEP: usize = 256;

/// out[m, n] = A[m, k] B[k, n] (+ bias[n]) for m of at most `ROWS`.
pub fn product<T: Element>(cpu: &Cpu, a: Operand<'_, T>, b: Operand<'_, T>, [m, n, k]: [usize; 3], bias: Option<&[T]>, out: &mut [T]) {
    assert!(m <= ROWS, "{m} rows are not few");
    let blocks = Blocks::new(cpu, T::DTYPE);
    let starts = (0..n).step_by(COLUMNS);
    let parts: Vec<_> = starts.clone().zip(Columns::split(out, starts.map(|start| COLUMNS.min(n - start)))).collect();
    cpu.parallel_over(parts, |(start, mut out)| {
        cpu.with_buffer(|buffer| {
            let columns = COLUMNS.min(n - start);
            let (packed, scratch) = buffer.split_at_mut(blocks.units(COLUMNS, STEP));
            let mut sums = [0f32; ROWS * COLUMNS];
            for first in (0..k).step_by(STEP) {
                let count = STEP.min(k - first);
                let packed = blocks.pack(&b.part(start, first), columns, count, packed);
                let sum = Sum { sums: &mut sums, stride: COLUMNS, how: if first == 0 { Sums::Store } else { Sums::Resume } };
                blocks.multiply(&Left::Plain(a.part(0, first)), packed, [m, columns, count], sum, scratch, Seen::All);
            }
            let bias = bias.map(|bias| &bias[start..start + columns]);
            for (row, sums) in sums.chunks_exact(COLUMNS).take(m).enumerate() {
                vector::finish(cpu.isa(), &sums[..columns], bias, out.row(row));
            }
        });
    });
}
