//! Values moved, cut and put together.
//!
//! Invariant: parts are counted from the lowest bits.

use crate::address::{LOCAL_WINDOW, PARAMETER_WINDOW, SHARED_WINDOW, in_window};
use crate::instruction::{Parts, Slots};
use crate::registers::{LANES, Lane, Mask, Registers};
use crate::syntax::Space;

pub(super) fn select_double(registers: &mut Registers, slots: &Slots, mask: Mask) {
    let chosen = registers.predicates[slots.c as usize];
    let (a, b) = (u64::read(registers, slots.a), u64::read(registers, slots.b));
    u64::write(registers, slots.to, mask, |lane| if chosen >> lane & 1 != 0 { a[lane] } else { b[lane] });
}

pub(super) fn select_word(registers: &mut Registers, slots: &Slots, mask: Mask) {
    let chosen = registers.predicates[slots.c as usize];
    let (a, b) = (u32::read(registers, slots.a), u32::read(registers, slots.b));
    u32::write(registers, slots.to, mask, |lane| if chosen >> lane & 1 != 0 { a[lane] } else { b[lane] });
}

pub(super) fn pack(parts: &Parts, registers: &mut Registers, to: u32, mask: Mask) {
    let keep = (1u64 << parts.bits) - 1;
    let mut whole = [0u64; LANES];
    for (i, slot) in parts.slots.iter().enumerate() {
        let part = u32::read(registers, *slot);
        for lane in 0..LANES {
            whole[lane] |= (u64::from(part[lane]) & keep) << (parts.bits * i as u32);
        }
    }
    if parts.wide {
        u64::write(registers, to, mask, |lane| whole[lane]);
    } else {
        u32::write(registers, to, mask, |lane| whole[lane] as u32);
    }
}

pub(super) fn unpack(parts: &Parts, registers: &mut Registers, from: u32, mask: Mask) {
    let keep = (1u64 << parts.bits) - 1;
    let whole = if parts.wide { u64::read(registers, from) } else { u32::read(registers, from).map(u64::from) };
    for (i, slot) in parts.slots.iter().enumerate() {
        u32::write(registers, *slot, mask, |lane| (whole[lane] >> (parts.bits * i as u32) & keep) as u32);
    }
}

pub(super) fn in_space(space: Space, registers: &mut Registers, slots: &Slots, mask: Mask) {
    let addresses = u64::read(registers, slots.a);
    let windows = [SHARED_WINDOW, LOCAL_WINDOW, PARAMETER_WINDOW];
    let inside = |address: u64| match space {
        Space::Shared => in_window(address, SHARED_WINDOW),
        Space::Local => in_window(address, LOCAL_WINDOW),
        Space::Parameter => in_window(address, PARAMETER_WINDOW),
        Space::Global => windows.iter().all(|window| !in_window(address, *window)),
        Space::Constant => false,
    };
    let result = (0..LANES).fold(0, |result, lane| result | u32::from(inside(addresses[lane])) << lane);
    registers.set_predicate(slots.to, mask, result);
}
