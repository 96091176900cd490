//! Rotary position embedding, in the convention of Hugging Face (`rotate_half`): element j of a head turns with element j + d / 2.
//!
//! ```text
//! angle = position / theta^(2 j / d)
//! y[j] = x[j] cos - x[j + d/2] sin        y[j + d/2] = x[j + d/2] cos + x[j] sin        backward: the same with -sin
//! ```
//!
//! Frequencies and angles are f32, as there; sine and cosine are exact to the last place of f32, and stay f32 in the products.
//! On a GPU (`cuda/rope.cu`) the same roundings give the same bits.
//!
//! Invariant: element by element, so bits depend on nothing but head, position and table.

use crate::args;
use crate::device::Device;
use crate::device::gpu::driver::Grid;
use crate::device::gpu::kernel;
use crate::device::tensor::{Tensor, View, ViewMut};
use crate::dispatch;
use crate::dtype::{Dtype, Element};
use crate::elementary::{power, sine_cosine};
use crate::ops::rows::{Rows, over_rows};
use std::f32::consts::TAU;
use std::ops::Range;

/// How frequencies are stretched for contexts longer than the model was first trained on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scaling {
    None,
    /// Wavelengths above `original / low` are stretched by `factor`, those below `original / high` stay, between is a smooth passage.
    Llama3 {
        factor: f64,
        low: f64,
        high: f64,
        original: usize,
    },
}

/// f32 [positions_max, head_dim]: cosines in the first half of a row, sines in the second.
pub fn table(device: &Device, head_dim: usize, theta: f64, scaling: Scaling, positions_max: usize) -> Tensor {
    let frequencies = frequencies(head_dim, theta, scaling);
    let mut table = device.empty([positions_max, head_dim], Dtype::F32);
    match device {
        Device::Cpu(cpu) => {
            let out = Rows::new(table.view_mut().into_slice::<f32>(), head_dim);
            over_rows(
                cpu,
                positions_max,
                16 * head_dim,
                out,
                #[inline(always)]
                |positions, rows| fill(positions, rows, &frequencies),
            );
        }
        // Once in a run: a GPU is given what the host has computed, so that no bit is another.
        Device::Gpu(_) => {
            let mut numbers = vec![0f32; positions_max * head_dim];
            fill(0..positions_max, Rows::new(&mut numbers, head_dim), &frequencies);
            table.view_mut().write(&numbers);
        }
        Device::Dry(_) => {}
    }
    table
}

/// The rows of the table for `positions`.
#[inline(always)]
fn fill(positions: Range<usize>, rows: Rows<'_, f32>, frequencies: &[f32]) {
    for (position, row) in positions.zip(rows.each()) {
        let (cosines, sines) = row.split_at_mut(frequencies.len());
        for ((cosine, sine), frequency) in cosines.iter_mut().zip(sines).zip(frequencies) {
            let (s, c) = sine_cosine((position as f32 * frequency) as f64);
            (*cosine, *sine) = (c as f32, s as f32);
        }
    }
}

/// Radians by which each pair of a head turns from one position to the next.
fn frequencies(head_dim: usize, theta: f64, scaling: Scaling) -> Vec<f32> {
    assert!(head_dim > 0 && head_dim.is_multiple_of(2), "a head of {head_dim} elements in pairs");
    let plain = |pair: usize| {
        let exponent = (2 * pair) as f32 / head_dim as f32;
        1.0 / power(theta, exponent as f64) as f32
    };
    (0..head_dim / 2).map(|pair| scaled(plain(pair), scaling)).collect()
}

fn scaled(frequency: f32, scaling: Scaling) -> f32 {
    let Scaling::Llama3 { factor, low, high, original } = scaling else { return frequency };
    let (factor, low, high, original) = (factor as f32, low as f32, high as f32, original as f32);
    let wavelength = TAU / frequency;
    if wavelength < original / high {
        frequency
    } else if wavelength > original / low {
        frequency / factor
    } else {
        let smooth = (original / wavelength - low) / (high - low);
        (1.0 - smooth) * frequency / factor + smooth * frequency
    }
}

/// Turns the first `rotated_heads` heads of each row of qkv [n, width], in place, by positions u32 [n].
pub fn forward(qkv: ViewMut<'_>, rotated_heads: usize, head_dim: usize, table: View<'_>, positions: View<'_>) {
    turn(qkv, rotated_heads, head_dim, table, positions, 1.0);
}

/// The gradient before the turn from that after it, in place.
pub fn backward(dqkv: ViewMut<'_>, rotated_heads: usize, head_dim: usize, table: View<'_>, positions: View<'_>) {
    turn(dqkv, rotated_heads, head_dim, table, positions, -1.0);
}

fn turn(mut x: ViewMut<'_>, heads: usize, head_dim: usize, table: View<'_>, positions: View<'_>, direction: f32) {
    let (n, width, most) = (x.shape().rows(), x.shape().columns(), table.shape().rows());
    assert!(heads * head_dim <= width, "{heads} heads of {head_dim} in rows of {width}");
    assert_eq!((table.shape().columns(), table.dtype()), (head_dim, Dtype::F32), "the table of heads of {head_dim}");
    assert_eq!((positions.shape().numel(), positions.dtype()), (n, Dtype::U32), "a u32 position for each row");
    match table.device() {
        Device::Cpu(cpu) => dispatch!(x.dtype(), T => {
            let (table, positions) = (table.slice::<f32>(), positions.slice::<u32>());
            over_rows(cpu, n, heads * head_dim, Rows::new(x.slice_mut::<T>(), width), #[inline(always)] |rows, x| {
                for (position, row) in positions[rows].iter().zip(x.each()) {
                    assert!((*position as usize) < most, "position {position} of a table of {most}");
                    let (cosines, sines) = table[*position as usize * head_dim..][..head_dim].split_at(head_dim / 2);
                    for head in row[..heads * head_dim].chunks_exact_mut(head_dim) {
                        turn_head(head, cosines, sines, direction);
                    }
                }
            });
        }),
        Device::Gpu(gpu) => {
            let narrow = |x: usize| u32::try_from(x).expect("heads and positions are far fewer");
            let half = head_dim / 2;
            let grid = Grid::over(n * heads * half, 256 * 16 / x.dtype().bytes(), 256);
            let numbers = args![&x, table, positions, n, width, narrow(heads), narrow(half), narrow(most), direction];
            gpu.launch(&kernel("rope_turn", x.dtype()), grid, &numbers);
        }
        Device::Dry(_) => {}
    }
}

#[inline(always)]
fn turn_head<T: Element>(head: &mut [T], cosines: &[f32], sines: &[f32], direction: f32) {
    let (left, right) = head.split_at_mut(cosines.len());
    for (((left, right), cosine), sine) in left.iter_mut().zip(right).zip(cosines).zip(sines) {
        let (a, b, sine) = (left.to_f32(), right.to_f32(), direction * sine);
        *left = T::from_f32(a * cosine - b * sine);
        *right = T::from_f32(b * cosine + a * sine);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values that Hugging Face transformers computes for the two Llama models.
    #[test]
    fn frequencies_are_those_of_llama() {
        let llama_31 = Scaling::Llama3 { factor: 8.0, low: 1.0, high: 4.0, original: 8192 };
        let llama_32 = Scaling::Llama3 { factor: 32.0, low: 1.0, high: 4.0, original: 8192 };
        let golden_31 = [
            (0, 1.0),
            (1, 0.814617217),
            (29, 0.00216657063),
            (32, 0.000524846022),
            (35, 9.55621217e-05),
            (62, 3.7673226e-07),
            (63, 3.06892588e-07),
        ];
        let golden_32 = [
            (0, 1.0),
            (1, 0.663601279),
            (13, 0.00483942125),
            (16, 0.000429556705),
            (19, 1.29147675e-05),
            (30, 1.41927202e-07),
            (31, 9.41830649e-08),
        ];
        for (head_dim, scaling, golden) in [(128, llama_31, golden_31), (64, llama_32, golden_32)] {
            let frequencies = frequencies(head_dim, 500_000.0, scaling);
            for (pair, expected) in golden {
                assert_eq!(frequencies[pair], expected as f32, "pair {pair} of {head_dim}");
            }
        }
    }

    #[test]
    fn the_table_holds_cosines_and_sines() {
        let table = table(&Device::cpu(2), 6, 10_000.0, Scaling::None, 300).to_vec::<f32>();
        for position in 0..300 {
            for pair in 0..3 {
                let angle = (position as f32 * (1.0 / 10_000f32.powf(2.0 * pair as f32 / 6.0))) as f64;
                assert!((table[position * 6 + pair] as f64 - angle.cos()).abs() < 1e-4);
                assert!((table[position * 6 + 3 + pair] as f64 - angle.sin()).abs() < 1e-4);
            }
        }
    }
}
