//! Atomic changes of global and shared memory.
//!
//! Invariant: lanes change memory one after the other, from the lowest; each sees what the ones before left.

use super::memory::{Doing, lost, misaligned_global, place, read_bytes, shared_index, write_bytes};
use crate::fault::{Fault, FaultKind};
use crate::instruction::{Atomic, AtomicOperator, HalfFormat, Rounding};
use crate::machine::{At, Machine};
use crate::registers::{Registers, each, first};
use crate::rounding::{canonical, from_half, half, sum_to_odd};
use crate::scalar::Scalar;
use crate::syntax::Space;
use crate::watch::{Touch, touch};

pub(super) fn execute(machine: &mut Machine<'_>, at: At, atomic: &Atomic) -> Result<(), Fault> {
    let bytes = atomic.scalar.bytes();
    let wide = bytes == 8;
    let mut rest = at.mask;
    while rest != 0 {
        let place = place(&machine.warps[at.warp].registers, atomic.space, &atomic.address, rest);
        rest &= !place.mask;
        for lane in each(place.mask) {
            for (i, value) in atomic.values.iter().enumerate() {
                let registers = &machine.warps[at.warp].registers;
                let value = word_or_double(registers, *value, lane, wide);
                let replacement = if atomic.operator == AtomicOperator::CompareExchange {
                    word_or_double(registers, atomic.replacement, lane, wide)
                } else {
                    0
                };
                let address = place.at[lane] + (i * bytes) as u64;
                let change = |old: u64| changed(atomic.operator, atomic.scalar, old, value, replacement);
                let old = match place.space {
                    Space::Shared => change_shared(machine, at, lane, address, bytes, change)?,
                    Space::Global | Space::Constant => change_global(machine, at, lane, address, bytes, change)?,
                    Space::Local | Space::Parameter => {
                        let message = format!("changes {bytes} bytes of {:?} memory, which has no atomics", place.space);
                        return Err(machine.fault(at, first(place.mask), FaultKind::OutOfBounds, message));
                    }
                };
                if let Some(result) = atomic.results.get(i) {
                    let registers = &mut machine.warps[at.warp].registers;
                    if wide {
                        registers.doubles[*result as usize][lane] = old;
                    } else {
                        registers.words[*result as usize][lane] = old as u32;
                    }
                }
            }
        }
        let bytes = bytes * atomic.values.len();
        let touched = Touch { space: place.space, doing: Doing::Changing, mask: place.mask, at: &place.at, bytes, order: atomic.order };
        touch(machine, at, touched)?;
    }
    Ok(())
}

fn word_or_double(registers: &Registers, slot: u32, lane: usize, wide: bool) -> u64 {
    if wide { registers.double(slot, lane) } else { u64::from(registers.word(slot, lane)) }
}

fn change_shared(machine: &mut Machine<'_>, at: At, lane: usize, address: u64, bytes: usize, f: impl Fn(u64) -> u64) -> Result<u64, Fault> {
    let index = shared_index(machine, at, lane, address, bytes, Doing::Changing)?;
    let old = read_bytes(&machine.shared, index, bytes);
    write_bytes(&mut machine.shared, index, bytes, f(old));
    Ok(old)
}

pub(super) fn change_global(
    machine: &Machine<'_>,
    at: At,
    lane: usize,
    address: u64,
    bytes: usize,
    f: impl Fn(u64) -> u64,
) -> Result<u64, Fault> {
    if !address.is_multiple_of(bytes as u64) {
        return Err(misaligned_global(machine, at, lane, address, bytes, Doing::Changing));
    }
    match machine.global.find(address, bytes as u64) {
        Some((allocation, offset)) => {
            if machine.setup.trusting {
                allocation.trust();
            }
            Ok(allocation.update(offset, bytes, machine.setup.crowded, f))
        }
        None => Err(lost(machine, at, lane, address, bytes, Doing::Changing)),
    }
}

/// The value after the operation.
pub(super) fn changed(operator: AtomicOperator, scalar: Scalar, old: u64, value: u64, replacement: u64) -> u64 {
    if scalar.float() && operator != AtomicOperator::Exchange {
        return changed_float(operator, scalar, old, value);
    }
    let sign = |x: u64| match scalar.bytes() {
        4 => i64::from(x as u32 as i32),
        2 => i64::from(x as u16 as i16),
        _ => x as i64,
    };
    let signed = scalar.signed();
    match operator {
        AtomicOperator::Add => old.wrapping_add(value),
        AtomicOperator::Minimum if signed => sign(old).min(sign(value)) as u64,
        AtomicOperator::Maximum if signed => sign(old).max(sign(value)) as u64,
        AtomicOperator::Minimum => old.min(value),
        AtomicOperator::Maximum => old.max(value),
        AtomicOperator::And => old & value,
        AtomicOperator::Or => old | value,
        AtomicOperator::Xor => old ^ value,
        AtomicOperator::Exchange => value,
        AtomicOperator::CompareExchange => {
            if old == value {
                replacement
            } else {
                old
            }
        }
        AtomicOperator::Increment => {
            if old >= value {
                0
            } else {
                old + 1
            }
        }
        AtomicOperator::Decrement => {
            if old == 0 || old > value {
                value
            } else {
                old - 1
            }
        }
    }
}

fn changed_float(operator: AtomicOperator, scalar: Scalar, old: u64, value: u64) -> u64 {
    let of_halves = |format: HalfFormat, shift: u32| {
        let (x, y) = (from_half((old >> shift) as u32, format), from_half((value >> shift) as u32, format));
        let result = match operator {
            AtomicOperator::Minimum => f64::from(super::float::minimum(x, y)),
            AtomicOperator::Maximum => f64::from(-super::float::minimum(-x, -y)),
            _ => sum_to_odd(f64::from(x), f64::from(y)),
        };
        u64::from(half(result, format, Rounding::Nearest)) << shift
    };
    match scalar {
        Scalar::F16 => of_halves(HalfFormat::F16, 0),
        Scalar::Bf16 => of_halves(HalfFormat::Bf16, 0),
        Scalar::F16x2 => of_halves(HalfFormat::F16, 0) | of_halves(HalfFormat::F16, 16),
        Scalar::Bf16x2 => of_halves(HalfFormat::Bf16, 0) | of_halves(HalfFormat::Bf16, 16),
        Scalar::F64 => (f64::from_bits(old) + f64::from_bits(value)).to_bits(),
        _ => {
            let (x, y) = (f32::from_bits(old as u32), f32::from_bits(value as u32));
            let result = match operator {
                AtomicOperator::Minimum => super::float::minimum(x, y),
                AtomicOperator::Maximum => -super::float::minimum(-x, -y),
                _ => x + y,
            };
            u64::from(canonical(result).to_bits())
        }
    }
}
