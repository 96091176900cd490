//! `wgmma`: products of matrices by four warps together.
//!
//! Invariant: each warp computes its own 16 rows. A product is carried out, from registers and memory as they are then, when it is
//! waited for (with a seed now and then at once), so that early changes show. Sums are made as in `matrix.rs`.

use super::Flow;
use super::barrier::whole_warp;
use super::matrix::elements;
use super::memory::{Doing, read_bytes, shared_index};
use crate::copies::Product;
use crate::fault::{Fault, FaultKind};
use crate::instruction::{GroupFactor, GroupMultiply, HalfFormat, MatrixType, Operation, Rounding};
use crate::machine::{At, Machine};
use crate::registers::{LANES, Registers, first};
use crate::rounding::{from_f16, half};
use crate::syntax::Space;
use crate::tensor_map::swizzled;
use crate::watch::check::Remote;
use crate::watch::clocks::{Viewer, WHOLE};

const ROWS: usize = 16;
const GROUP: usize = 4;

pub(super) fn execute(machine: &mut Machine<'_>, at: At, operation: &Operation) -> Result<Flow, Fault> {
    if !whole_warp(machine, at)? {
        return Ok(Flow::Park);
    }
    if at.warp | (GROUP - 1) >= machine.warps.len() {
        let message = format!("needs four warps in a row; the block has {}", machine.warps.len());
        return Err(machine.fault(at, 0, FaultKind::Protocol, message));
    }
    let products = &mut machine.warps[at.warp].products;
    match operation {
        Operation::GroupFence => products.fenced = true,
        Operation::GroupCommit => products.open += 1,
        Operation::GroupWait(groups) => {
            let (groups, open) = (*groups, products.open);
            let due: Vec<Product> = products.waiting.extract_if(.., |product| product.group + groups < open).collect();
            if groups == 0 {
                products.fenced = false;
            }
            for product in due {
                carry_out(machine, at.warp, &product)?;
            }
        }
        Operation::GroupMultiply(multiply) => begin(machine, at, multiply)?,
        other => unreachable!("{other:?} is no instruction of a group"),
    }
    Ok(Flow::Next)
}

fn begin(machine: &mut Machine<'_>, at: At, multiply: &GroupMultiply) -> Result<(), Fault> {
    let warp = &machine.warps[at.warp];
    if !warp.products.fenced {
        let message = "uses registers that no wgmma.fence has handed over since they were last free";
        return Err(machine.fault(at, 0, FaultKind::Protocol, message));
    }
    let a = match &multiply.a {
        GroupFactor::Descriptor(slot) => warp.registers.double(*slot, 0),
        GroupFactor::Registers(_) => 0,
    };
    let keep = warp.registers.predicates[multiply.keep as usize] & 1 != 0;
    let product = Product { pc: at.pc, group: warp.products.open, keep, a, b: warp.registers.double(multiply.b, 0) };
    let alone = warp.products.waiting.is_empty();
    if alone && machine.random.as_mut().is_some_and(|random| random.below(2) == 0) {
        return carry_out(machine, at.warp, &product);
    }
    machine.warps[at.warp].products.waiting.push(product);
    Ok(())
}

fn carry_out(machine: &mut Machine<'_>, warp: usize, product: &Product) -> Result<(), Fault> {
    let at = At { warp, pc: product.pc, mask: !0 };
    let Operation::GroupMultiply(multiply) = &machine.kernel.code[product.pc as usize].operation else {
        unreachable!("a product was begun by such an instruction")
    };
    let mut a = match &multiply.a {
        GroupFactor::Registers(slots) => from_registers(&machine.warps[warp].registers, slots, multiply.factor),
        GroupFactor::Descriptor(_) => {
            let rows = warp % GROUP * ROWS..(warp % GROUP + 1) * ROWS;
            from_memory(machine, at, &Tile { descriptor: product.a, rows, transposed: multiply.transposed[0], multiply })?
        }
    };
    let columns = 0..multiply.columns;
    let b = from_memory(machine, at, &Tile { descriptor: product.b, rows: columns, transposed: multiply.transposed[1], multiply })?;
    if multiply.negate[0] != multiply.negate[1] {
        a.iter_mut().for_each(|value| *value = -*value);
    }
    let registers = &mut machine.warps[warp].registers;
    let mut sums = vec![0f32; multiply.columns];
    for row in 0..ROWS {
        let place = |column: usize| [column / 8 * 2 + row / 8, column, row % 8 * 4 + column % 8 / 2];
        for (column, sum) in sums.iter_mut().enumerate() {
            *sum = if product.keep { read_sum(registers, multiply, place(column)) } else { 0.0 };
        }
        for (a, b) in a.chunks_exact(ROWS).zip(b.chunks_exact(multiply.columns)) {
            for (sum, b) in sums.iter_mut().zip(b) {
                *sum += a[row] * b;
            }
        }
        for (column, sum) in sums.iter().enumerate() {
            write_sum(registers, multiply, place(column), *sum);
        }
    }
    Ok(())
}

/// Pair `i` of a lane's sums; the column's parity tells which of the pair.
fn read_sum(registers: &Registers, multiply: &GroupMultiply, [i, column, lane]: [usize; 3]) -> f32 {
    if multiply.wide_sum {
        return f32::from_bits(registers.word(multiply.d[2 * i + column % 2], lane));
    }
    from_f16(registers.word(multiply.d[i], lane) >> (16 * (column % 2)) & 0xFFFF)
}

fn write_sum(registers: &mut Registers, multiply: &GroupMultiply, [i, column, lane]: [usize; 3], sum: f32) {
    if multiply.wide_sum {
        registers.words[multiply.d[2 * i + column % 2] as usize][lane] = sum.to_bits();
        return;
    }
    let (shift, word) = (16 * (column % 2), &mut registers.words[multiply.d[i] as usize][lane]);
    *word = (*word & !(0xFFFF << shift)) | half(f64::from(sum), HalfFormat::F16, Rounding::Nearest) << shift;
}

/// The fragment of A in registers, laid out as for `mma.sync`; k by k, all rows.
fn from_registers(registers: &Registers, slots: &[u32], factor: MatrixType) -> Vec<f32> {
    let depth = if factor == MatrixType::Tf32 { 8 } else { 16 };
    let mut a = vec![0f32; depth * ROWS];
    for (i, slot) in slots.iter().enumerate() {
        for lane in 0..LANES {
            let (row, t) = (lane / 4 + 8 * (i % 2), lane % 4);
            let [low, high] = elements(registers.word(*slot, lane), factor);
            if factor == MatrixType::Tf32 {
                a[(t + 4 * (i / 2)) * ROWS + row] = low;
            } else {
                a[(2 * t + 8 * (i / 2)) * ROWS + row] = low;
                a[(2 * t + 8 * (i / 2) + 1) * ROWS + row] = high;
            }
        }
    }
    a
}

/// Rows (of A, or columns of B) of a factor in shared memory.
struct Tile<'a> {
    descriptor: u64,
    rows: std::ops::Range<usize>,
    transposed: bool,
    multiply: &'a GroupMultiply,
}

/// k by k, all rows. 16 bytes lie side by side: along k or, transposed, along the rows.
fn from_memory(machine: &mut Machine<'_>, at: At, tile: &Tile<'_>) -> Result<Vec<f32>, Fault> {
    let (factor, depth, count) = (tile.multiply.factor, tile.multiply.depth, tile.rows.len());
    let bytes = if factor == MatrixType::Tf32 { 4 } else { 2 };
    let (step_k, step_row) = if tile.transposed { (1, 16 / bytes) } else { (16 / bytes, 1) };
    let viewer = machine.checking(|check, _| {
        let own = &check.clocks.warps[at.warp];
        (Viewer { clock: own.clock, actor: at.warp, lane: WHOLE }, own.segment)
    });
    let mut values = vec![0f32; depth * count];
    for row in (0..count).step_by(step_row) {
        for k in (0..depth).step_by(step_k) {
            let address =
                element_address(tile.descriptor, (tile.rows.start + row) as u32, (k * bytes) as u32, bytes as u32, tile.transposed);
            let index = shared_index(machine, at, first(at.mask), u64::from(address), 16, Doing::Reading)?;
            if let Some((viewer, segment)) = viewer {
                let remote = Remote { space: Space::Shared, doing: Doing::Reading, begin: u64::from(address), bytes: 16, viewer, segment };
                machine.checking(|check, machine| check.remote(machine, at, &remote)).unwrap_or(Ok(()))?;
            }
            for (i, element) in machine.shared[index..index + 16].chunks_exact(bytes).enumerate() {
                let (k, row) = if tile.transposed { (k, row + i) } else { (k + i, row) };
                values[k * count + row] = elements(read_bytes(element, 0, bytes) as u32, factor)[0];
            }
        }
    }
    Ok(values)
}

/// The shared address of an element: `row` of the factor (of A, or column of B), `k` in bytes. The descriptor holds the start, the
/// leading and the stride offset, all over 16, and the swizzle mode; the unit of a layout is 8 rows of 16 bytes or of a swizzle's span.
fn element_address(descriptor: u64, row: u32, k: u32, bytes: u32, transposed: bool) -> u32 {
    let field = |shift: u32| (descriptor >> shift & 0x3FFF) as u32 * 16;
    let (start, leading, stride, mode) = (field(0), field(16), field(32), (descriptor >> 62) as u32);
    let span = [16, 128, 64, 32][mode as usize];
    let address = match (transposed, mode) {
        (false, 0) => start + row / 8 * stride + k / 16 * leading + row % 8 * 16 + k % 16,
        (false, _) => start + row / 8 * stride + row % 8 * span + k,
        (true, 0) => start + row / 8 * stride + k / bytes / 8 * leading + k / bytes % 8 * 16 + row % 8 * bytes,
        (true, _) => {
            let (k, per_span) = (k / bytes, span / bytes);
            start + row / per_span * leading + k / 8 * stride + k % 8 * span + row % per_span * bytes
        }
    };
    swizzled(address, mode)
}

impl Machine<'_> {
    /// A warp must not leave with products under way.
    pub(crate) fn finish_products(&mut self, at: At) -> Result<(), Fault> {
        if self.warps[at.warp].products.waiting.is_empty() {
            return Ok(());
        }
        Err(self.fault(at, first(at.mask), FaultKind::Protocol, "leaves with products of wgmma that were not waited for"))
    }
}
