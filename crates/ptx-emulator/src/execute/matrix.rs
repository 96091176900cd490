//! Matrix products of a warp, and matrices between registers and shared memory.
//!
//! Invariant: products are exact in f32; a sum begins with the element of C and adds the products in the order of k, each addition
//! rounded to nearest in f32. A sum in f16 is rounded to f16 once, at the end. The hardware adds several products at a time and
//! truncates, so its last bits differ.

use super::Flow;
use super::barrier::whole_warp;
use super::memory::{Doing, addresses, shared_index};
use crate::fault::Fault;
use crate::instruction::{HalfFormat, MatrixMove, MatrixType, Multiply, Order, Rounding};
use crate::machine::{At, Machine};
use crate::registers::{LANES, Registers};
use crate::rounding::{from_f16, half};
use crate::syntax::Space;
use crate::watch::{Touch, touch};

/// The low and, for 16 bits, the high element of a register of a fragment.
#[inline(always)]
pub(super) fn elements(bits: u32, factor: MatrixType) -> [f32; 2] {
    match factor {
        MatrixType::Bf16 => [f32::from_bits(bits << 16), f32::from_bits(bits & 0xFFFF_0000)],
        MatrixType::F16 => [from_f16(bits & 0xFFFF), from_f16(bits >> 16)],
        // The hardware looks at 10 bits of the fraction.
        MatrixType::Tf32 => [f32::from_bits(bits & !0x1FFF), 0.0],
    }
}

pub(super) fn multiply(machine: &mut Machine<'_>, at: At, multiply: &Multiply) -> Result<Flow, Fault> {
    if !whole_warp(machine, at)? {
        return Ok(Flow::Park);
    }
    let registers = &mut machine.warps[at.warp].registers;
    let mut sums = [0f32; 16 * COLUMNS];
    read_sums(registers, multiply, &mut sums);
    let (a, b) = (read_a(registers, multiply), read_b(registers, multiply));
    for (row, sums) in a.chunks_exact(DEPTH).zip(sums.chunks_exact_mut(COLUMNS)) {
        // A copy, so that the sums of a row stay in registers of the host.
        let mut sum: [f32; COLUMNS] = std::array::from_fn(|column| sums[column]);
        for (factor, b) in row[..multiply.depth].iter().zip(&b) {
            for (sum, b) in sum.iter_mut().zip(b) {
                *sum += factor * b;
            }
        }
        sums.copy_from_slice(&sum);
    }
    write_sums(registers, multiply, &sums);
    Ok(Flow::Next)
}

const DEPTH: usize = 16;
const COLUMNS: usize = 8;

/// A by rows. Of lane 4g+t, register i holds row g + 8 (i odd) and, of 16-bit elements, columns 2t, 2t+1 + 8 (i over 1); a wider
/// element has column t + 4 (i over 1).
fn read_a(registers: &Registers, multiply: &Multiply) -> [f32; 16 * DEPTH] {
    let mut a = [0f32; 16 * DEPTH];
    for (i, slot) in multiply.a.iter().enumerate() {
        let rows = &mut a[8 * DEPTH * (i % 2)..][..8 * DEPTH];
        for (row, lanes) in rows.chunks_exact_mut(DEPTH).zip(registers.words[*slot as usize].chunks_exact(4)) {
            if multiply.factor == MatrixType::Tf32 {
                for (value, bits) in row[4 * (i / 2)..].iter_mut().zip(lanes) {
                    *value = elements(*bits, multiply.factor)[0];
                }
            } else {
                for (pair, bits) in row[8 * (i / 2)..].chunks_exact_mut(2).zip(lanes) {
                    pair.copy_from_slice(&elements(*bits, multiply.factor));
                }
            }
        }
    }
    a
}

/// B by rows: of lane 4g+t, register i holds column g and rows 2t, 2t+1 + 8i, or row t + 4i of wider elements.
fn read_b(registers: &Registers, multiply: &Multiply) -> [[f32; COLUMNS]; DEPTH] {
    let mut b = [[0f32; COLUMNS]; DEPTH];
    let wide = multiply.factor == MatrixType::Tf32;
    for (i, slot) in multiply.b.iter().enumerate() {
        let rows = &mut b[if wide { 4 } else { 8 } * i..];
        for (g, lanes) in registers.words[*slot as usize].chunks_exact(4).enumerate() {
            for (t, bits) in lanes.iter().enumerate() {
                let [low, high] = elements(*bits, multiply.factor);
                if wide {
                    rows[t][g] = low;
                } else {
                    rows[2 * t][g] = low;
                    rows[2 * t + 1][g] = high;
                }
            }
        }
    }
    b
}

/// C and D: of lane 4g+t, element i stands in row g + 8 (i over 1), column 2t + i mod 2; f16 elements go two to a register.
fn read_sums(registers: &Registers, multiply: &Multiply, sums: &mut [f32; 16 * COLUMNS]) {
    for (half, rows) in sums.chunks_exact_mut(8 * COLUMNS).enumerate() {
        for lane in 0..LANES {
            let pair = &mut rows[2 * lane..2 * lane + 2];
            if multiply.wide_sum {
                pair[0] = f32::from_bits(registers.word(multiply.c[2 * half], lane));
                pair[1] = f32::from_bits(registers.word(multiply.c[2 * half + 1], lane));
            } else {
                pair.copy_from_slice(&elements(registers.word(multiply.c[half], lane), MatrixType::F16));
            }
        }
    }
}

fn write_sums(registers: &mut Registers, multiply: &Multiply, sums: &[f32; 16 * COLUMNS]) {
    for (half_of_rows, rows) in sums.chunks_exact(8 * COLUMNS).enumerate() {
        for (lane, pair) in rows.chunks_exact(2).enumerate() {
            if multiply.wide_sum {
                registers.words[multiply.d[2 * half_of_rows] as usize][lane] = pair[0].to_bits();
                registers.words[multiply.d[2 * half_of_rows + 1] as usize][lane] = pair[1].to_bits();
            } else {
                let cut = |value: f32| half(f64::from(value), HalfFormat::F16, Rounding::Nearest);
                registers.words[multiply.d[half_of_rows] as usize][lane] = cut(pair[0]) | cut(pair[1]) << 16;
            }
        }
    }
}

/// The shared index of each row: lane 8m + r has the address of row r of matrix m.
fn rows(machine: &mut Machine<'_>, at: At, matrix: &MatrixMove, doing: Doing) -> Result<Vec<usize>, Fault> {
    let addresses = addresses(&machine.warps[at.warp].registers, &matrix.address);
    let count = matrix.registers.len();
    let rows = (0..8 * count).map(|lane| shared_index(machine, at, lane, addresses[lane], 16, doing)).collect::<Result<_, _>>()?;
    for m in 0..count {
        let touched = Touch { space: Space::Shared, doing, mask: 0xFF << (8 * m), at: &addresses, bytes: 16, order: Order::Weak };
        touch(machine, at, touched)?;
    }
    Ok(rows)
}

/// A lane's two elements of a matrix: side by side in row g from column 2t or, transposed, one above the other in column g.
#[inline(always)]
fn pair(elements: &[[u16; 8]; 8], lane: usize, transposed: bool) -> [u16; 2] {
    let (g, t) = (lane / 4 % 8, lane % 4 * 2);
    if transposed { [elements[t][g], elements[t + 1][g]] } else { [elements[g][t], elements[g][t + 1]] }
}

pub(super) fn load(machine: &mut Machine<'_>, at: At, matrix: &MatrixMove) -> Result<Flow, Fault> {
    if !whole_warp(machine, at)? {
        return Ok(Flow::Park);
    }
    let rows = rows(machine, at, matrix, Doing::Reading)?;
    let registers = &mut machine.warps[at.warp].registers;
    for (slot, rows) in matrix.registers.iter().zip(rows.chunks_exact(8)) {
        let mut elements = [[0u16; 8]; 8];
        for (elements, row) in elements.iter_mut().zip(rows) {
            for (element, bytes) in elements.iter_mut().zip(machine.shared[*row..*row + 16].chunks_exact(2)) {
                *element = u16::from_le_bytes([bytes[0], bytes[1]]);
            }
        }
        for (lane, word) in registers.words[*slot as usize].iter_mut().enumerate() {
            let [low, high] = pair(&elements, lane, matrix.transposed);
            *word = u32::from(low) | u32::from(high) << 16;
        }
    }
    Ok(Flow::Next)
}

pub(super) fn store(machine: &mut Machine<'_>, at: At, matrix: &MatrixMove) -> Result<Flow, Fault> {
    if !whole_warp(machine, at)? {
        return Ok(Flow::Park);
    }
    let rows = rows(machine, at, matrix, Doing::Writing)?;
    for (slot, rows) in matrix.registers.iter().zip(rows.chunks_exact(8)) {
        for lane in 0..LANES {
            let bits = machine.warps[at.warp].registers.word(*slot, lane);
            let (g, t) = (lane / 4, lane % 4 * 2);
            for (i, half) in [bits as u16, (bits >> 16) as u16].into_iter().enumerate() {
                let (row, column) = if matrix.transposed { (t + i, g) } else { (g, t + i) };
                let index = rows[row] + 2 * column;
                machine.shared[index..index + 2].copy_from_slice(&half.to_le_bytes());
            }
        }
    }
    Ok(Flow::Next)
}
