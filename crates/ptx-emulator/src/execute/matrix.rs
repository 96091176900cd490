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
    let mut sums = [[0f32; 8]; 16];
    read_sums(registers, multiply, &mut sums);
    let (a, b) = (read_a(registers, multiply), read_b(registers, multiply));
    for (row, sum) in a.iter().zip(&mut sums) {
        for (factor, b) in row[..multiply.depth].iter().zip(&b) {
            for (sum, b) in sum.iter_mut().zip(b) {
                *sum += factor * b;
            }
        }
    }
    write_sums(registers, multiply, &sums);
    Ok(Flow::Next)
}

/// Of lane 4g+t, register i of A holds row g + 8 (i odd) and, of 16-bit elements, columns 2t, 2t+1 + 8 (i over 1); a wider element
/// has column t + 4 (i over 1).
fn read_a(registers: &Registers, multiply: &Multiply) -> [[f32; 16]; 16] {
    let mut a = [[0f32; 16]; 16];
    for (i, slot) in multiply.a.iter().enumerate() {
        for (lane, bits) in registers.words[*slot as usize].iter().enumerate() {
            let (g, t) = (lane / 4, lane % 4);
            let row = &mut a[g + 8 * (i % 2)];
            let [low, high] = elements(*bits, multiply.factor);
            if multiply.factor == MatrixType::Tf32 {
                row[t + 4 * (i / 2)] = low;
            } else {
                row[2 * t + 8 * (i / 2)] = low;
                row[2 * t + 8 * (i / 2) + 1] = high;
            }
        }
    }
    a
}

/// B by rows: of lane 4g+t, register i holds column g and rows 2t, 2t+1 + 8i, or row t + 4i of wider elements.
fn read_b(registers: &Registers, multiply: &Multiply) -> [[f32; 8]; 16] {
    let mut b = [[0f32; 8]; 16];
    for (i, slot) in multiply.b.iter().enumerate() {
        for (lane, bits) in registers.words[*slot as usize].iter().enumerate() {
            let (g, t) = (lane / 4, lane % 4);
            let [low, high] = elements(*bits, multiply.factor);
            if multiply.factor == MatrixType::Tf32 {
                b[t + 4 * i][g] = low;
            } else {
                b[2 * t + 8 * i][g] = low;
                b[2 * t + 8 * i + 1][g] = high;
            }
        }
    }
    b
}

/// C and D: of lane 4g+t, element i stands in row g + 8 (i over 1), column 2t + i mod 2; f16 elements go two to a register.
fn read_sums(registers: &Registers, multiply: &Multiply, sums: &mut [[f32; 8]; 16]) {
    for lane in 0..LANES {
        let (g, t) = (lane / 4, lane % 4);
        for i in 0..4 {
            let value = if multiply.wide_sum {
                f32::from_bits(registers.word(multiply.c[i], lane))
            } else {
                from_f16(registers.word(multiply.c[i / 2], lane) >> (16 * (i % 2)) & 0xFFFF)
            };
            sums[g + 8 * (i / 2)][2 * t + i % 2] = value;
        }
    }
}

fn write_sums(registers: &mut Registers, multiply: &Multiply, sums: &[[f32; 8]; 16]) {
    for lane in 0..LANES {
        let (g, t) = (lane / 4, lane % 4);
        for i in 0..2 {
            let [low, high] = [sums[g + 8 * i][2 * t], sums[g + 8 * i][2 * t + 1]];
            if multiply.wide_sum {
                registers.words[multiply.d[2 * i] as usize][lane] = low.to_bits();
                registers.words[multiply.d[2 * i + 1] as usize][lane] = high.to_bits();
            } else {
                let cut = |value: f32| half(f64::from(value), HalfFormat::F16, Rounding::Nearest);
                registers.words[multiply.d[i] as usize][lane] = cut(low) | cut(high) << 16;
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

/// Where a lane's pair of elements of a matrix lies: two (row, column), side by side or, transposed, one above the other.
fn pair(lane: usize, transposed: bool) -> [(usize, usize); 2] {
    let (x, y) = (lane / 4, lane % 4 * 2);
    if transposed { [(y, x), (y + 1, x)] } else { [(x, y), (x, y + 1)] }
}

pub(super) fn load(machine: &mut Machine<'_>, at: At, matrix: &MatrixMove) -> Result<Flow, Fault> {
    if !whole_warp(machine, at)? {
        return Ok(Flow::Park);
    }
    let rows = rows(machine, at, matrix, Doing::Reading)?;
    let registers = &mut machine.warps[at.warp].registers;
    for (m, slot) in matrix.registers.iter().enumerate() {
        for lane in 0..LANES {
            let [low, high] = pair(lane, matrix.transposed).map(|(row, column)| {
                let index = rows[8 * m + row] + 2 * column;
                u32::from(u16::from_le_bytes([machine.shared[index], machine.shared[index + 1]]))
            });
            registers.words[*slot as usize][lane] = low | high << 16;
        }
    }
    Ok(Flow::Next)
}

pub(super) fn store(machine: &mut Machine<'_>, at: At, matrix: &MatrixMove) -> Result<Flow, Fault> {
    if !whole_warp(machine, at)? {
        return Ok(Flow::Park);
    }
    let rows = rows(machine, at, matrix, Doing::Writing)?;
    for (m, slot) in matrix.registers.iter().enumerate() {
        for lane in 0..LANES {
            let bits = machine.warps[at.warp].registers.word(*slot, lane);
            for ((row, column), half) in pair(lane, matrix.transposed).into_iter().zip([bits as u16, (bits >> 16) as u16]) {
                let index = rows[8 * m + row] + 2 * column;
                machine.shared[index..index + 2].copy_from_slice(&half.to_le_bytes());
            }
        }
    }
    Ok(Flow::Next)
}
