//! Loads and stores.
//!
//! Invariant: no byte is touched before the access of its lane was found aligned and inside one allocation, or inside the block's
//! shared, the lane's local or the launch's parameter memory.

use crate::address::{LOCAL_WINDOW, PARAMETER_WINDOW, SHARED_BEGIN, SHARED_WINDOW, in_window};
use crate::fault::{Fault, FaultKind};
use crate::instruction::{Access, Address, Element, NONE};
use crate::machine::{At, Machine};
use crate::registers::{LANES, Mask, Registers, each, first};
use crate::scalar::Scalar;
use crate::syntax::Space;
use crate::watch::{Touch, touch};

/// What an access does, for messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Doing {
    Reading,
    Writing,
    Changing,
}

impl Doing {
    pub(crate) fn verb(self) -> &'static str {
        match self {
            Doing::Reading => "reads",
            Doing::Writing => "writes",
            Doing::Changing => "changes",
        }
    }
}

/// The addresses of the lanes of `mask`, all in one space, counted from its beginning.
pub(super) struct Place {
    pub(super) space: Space,
    pub(super) mask: Mask,
    pub(super) at: [u64; LANES],
}

fn resolve(address: u64) -> (Space, u64) {
    for (space, window) in [(Space::Shared, SHARED_WINDOW), (Space::Local, LOCAL_WINDOW), (Space::Parameter, PARAMETER_WINDOW)] {
        if in_window(address, window) {
            return (space, address - window);
        }
    }
    (Space::Global, address)
}

#[inline(always)]
pub(super) fn addresses(registers: &Registers, address: &Address) -> [u64; LANES] {
    match (address.slot, address.wide) {
        (NONE, _) => [address.offset as u64; LANES],
        (slot, true) => {
            let mut addresses = registers.doubles[slot as usize];
            addresses.iter_mut().for_each(|address_of_lane| *address_of_lane = address_of_lane.wrapping_add(address.offset as u64));
            addresses
        }
        (slot, false) => {
            let mut addresses = [0; LANES];
            for (at, base) in addresses.iter_mut().zip(&registers.words[slot as usize]) {
                *at = u64::from(base.wrapping_add(address.offset as u32));
            }
            addresses
        }
    }
}

/// Where the lanes of `mask` go. A generic access whose lanes go to different spaces takes those of the first lane's space.
pub(super) fn place(registers: &Registers, space: Option<Space>, address: &Address, mask: Mask) -> Place {
    let mut at = addresses(registers, address);
    let Some(space) = space else {
        let (chosen, _) = resolve(at[first(mask)]);
        let mut same = 0;
        for lane in each(mask) {
            let (space, offset) = resolve(at[lane]);
            if space == chosen {
                same |= 1 << lane;
                at[lane] = offset;
            }
        }
        return Place { space: chosen, mask: same, at };
    };
    Place { space: if space == Space::Constant { Space::Global } else { space }, mask, at }
}

fn touched<'a>(access: &Access, place: &'a Place, doing: Doing) -> Touch<'a> {
    let bytes = access.scalar.bytes() * access.elements.len();
    Touch { space: place.space, doing, mask: place.mask, at: &place.at, bytes, order: access.order }
}

/// A shared address as an index, if so many bytes lie there aligned and inside the block's memory.
pub(crate) fn shared_index(machine: &Machine<'_>, at: At, lane: usize, address: u64, bytes: usize, doing: Doing) -> Result<usize, Fault> {
    if !address.is_multiple_of(bytes as u64) {
        return Err(machine.fault(at, lane, FaultKind::Misaligned, misaligned(doing, bytes, "shared", address)));
    }
    let end = machine.shared.len() as u64;
    if address < u64::from(SHARED_BEGIN) || address > end || bytes as u64 > end - address {
        let (static_end, size) = (SHARED_BEGIN as usize + machine.kernel.shared_static, end - u64::from(SHARED_BEGIN));
        let message = format!(
            "{} {bytes} bytes at shared address {address:#x}, outside the block's {size} bytes (variables {SHARED_BEGIN:#x} to {static_end:#x}, dynamic memory {:#x} to {end:#x})",
            doing.verb(),
            machine.setup.dynamic_begin
        );
        return Err(machine.fault(at, lane, FaultKind::OutOfBounds, message));
    }
    Ok(address as usize)
}

fn misaligned(doing: Doing, bytes: usize, space: &str, address: u64) -> String {
    format!("{} {bytes} bytes at {space} address {address:#x}, which is no multiple of {bytes}", doing.verb())
}

pub(crate) fn misaligned_global(machine: &Machine<'_>, at: At, lane: usize, address: u64, bytes: usize, doing: Doing) -> Fault {
    machine.fault(at, lane, FaultKind::Misaligned, misaligned(doing, bytes, "global", address))
}

pub(crate) fn lost(machine: &Machine<'_>, at: At, lane: usize, address: u64, bytes: usize, doing: Doing) -> Fault {
    let (kind, message) = machine.global.blame(address, bytes as u64);
    machine.fault(at, lane, kind, format!("{} {message}", doing.verb()))
}

/// The value a load brings into a register of so many bits.
#[inline(always)]
fn extended(raw: u64, scalar: Scalar, bits: u32) -> u64 {
    if !scalar.signed() || scalar.bytes() == 8 {
        return raw;
    }
    let shift = 64 - 8 * scalar.bytes() as u32;
    let value = ((raw << shift) as i64 >> shift) as u64;
    if bits < 64 { value & ((1 << bits) - 1) } else { value }
}

#[inline(always)]
fn put(registers: &mut Registers, element: &Element, scalar: Scalar, lane: usize, raw: u64) {
    let value = extended(raw, scalar, element.bits);
    if element.wide {
        registers.doubles[element.slot as usize][lane] = value;
    } else {
        registers.words[element.slot as usize][lane] = value as u32;
    }
}

#[inline(always)]
fn get(registers: &Registers, element: &Element, lane: usize) -> u64 {
    if element.wide { registers.double(element.slot, lane) } else { u64::from(registers.word(element.slot, lane)) }
}

#[inline(always)]
pub(crate) fn read_bytes(bytes: &[u8], at: usize, count: usize) -> u64 {
    match count {
        4 => u64::from(u32::from_le_bytes(bytes[at..at + 4].try_into().expect("a slice of four"))),
        8 => u64::from_le_bytes(bytes[at..at + 8].try_into().expect("a slice of eight")),
        2 => u64::from(u16::from_le_bytes(bytes[at..at + 2].try_into().expect("a slice of two"))),
        _ => u64::from(bytes[at]),
    }
}

#[inline(always)]
pub(crate) fn write_bytes(bytes: &mut [u8], at: usize, count: usize, value: u64) {
    match count {
        4 => bytes[at..at + 4].copy_from_slice(&(value as u32).to_le_bytes()),
        8 => bytes[at..at + 8].copy_from_slice(&value.to_le_bytes()),
        2 => bytes[at..at + 2].copy_from_slice(&(value as u16).to_le_bytes()),
        _ => bytes[at] = value as u8,
    }
}

pub(super) fn load(machine: &mut Machine<'_>, at: At, access: &Access) -> Result<(), Fault> {
    let mut rest = at.mask;
    while rest != 0 {
        let place = place(&machine.warps[at.warp].registers, access.space, &access.address, rest);
        rest &= !place.mask;
        match place.space {
            Space::Shared => load_shared(machine, at, access, &place)?,
            Space::Local => load_local(machine, at, access, &place)?,
            Space::Parameter => load_parameter(machine, at, access, &place)?,
            Space::Global | Space::Constant => load_global(machine, at, access, &place)?,
        }
    }
    Ok(())
}

fn load_global(machine: &mut Machine<'_>, at: At, access: &Access, place: &Place) -> Result<(), Fault> {
    let (scalar, bytes) = (access.scalar, access.scalar.bytes());
    let total = bytes * access.elements.len();
    for lane in each(place.mask) {
        let address = place.at[lane];
        if address & (total as u64 - 1) != 0 {
            return Err(misaligned_global(machine, at, lane, address, total, Doing::Reading));
        }
        let Some((allocation, offset)) = machine.global.find(address, total as u64) else {
            return Err(lost(machine, at, lane, address, total, Doing::Reading));
        };
        let registers = &mut machine.warps[at.warp].registers;
        for (i, element) in access.elements.iter().enumerate() {
            put(registers, element, scalar, lane, allocation.load(offset + (i * bytes) as u64, bytes));
        }
    }
    touch(machine, at, touched(access, place, Doing::Reading))
}

fn load_shared(machine: &mut Machine<'_>, at: At, access: &Access, place: &Place) -> Result<(), Fault> {
    let (scalar, bytes) = (access.scalar, access.scalar.bytes());
    let total = bytes * access.elements.len();
    for lane in each(place.mask) {
        let index = shared_index(machine, at, lane, place.at[lane], total, Doing::Reading)?;
        let registers = &mut machine.warps[at.warp].registers;
        for (i, element) in access.elements.iter().enumerate() {
            put(registers, element, scalar, lane, read_bytes(&machine.shared, index + i * bytes, bytes));
        }
    }
    touch(machine, at, touched(access, place, Doing::Reading))
}

/// The index of a lane's local address in the local memory of its warp.
fn local_index(machine: &Machine<'_>, at: At, lane: usize, address: u64, bytes: usize, doing: Doing) -> Result<usize, Fault> {
    let size = machine.kernel.local_bytes;
    if !address.is_multiple_of(bytes as u64) {
        return Err(machine.fault(at, lane, FaultKind::Misaligned, misaligned(doing, bytes, "local", address)));
    }
    if address > size as u64 || bytes > size - address as usize {
        let message = format!("{} {bytes} bytes at local address {address:#x}, outside the thread's {size} bytes", doing.verb());
        return Err(machine.fault(at, lane, FaultKind::OutOfBounds, message));
    }
    Ok(lane * size + address as usize)
}

fn load_local(machine: &mut Machine<'_>, at: At, access: &Access, place: &Place) -> Result<(), Fault> {
    let (scalar, bytes) = (access.scalar, access.scalar.bytes());
    for lane in each(place.mask) {
        let index = local_index(machine, at, lane, place.at[lane], bytes * access.elements.len(), Doing::Reading)?;
        let warp = &mut machine.warps[at.warp];
        for (i, element) in access.elements.iter().enumerate() {
            put(&mut warp.registers, element, scalar, lane, read_bytes(&warp.local, index + i * bytes, bytes));
        }
    }
    Ok(())
}

fn load_parameter(machine: &mut Machine<'_>, at: At, access: &Access, place: &Place) -> Result<(), Fault> {
    let (scalar, bytes) = (access.scalar, access.scalar.bytes());
    let (total, size) = (bytes * access.elements.len(), machine.setup.parameters.len());
    for lane in each(place.mask) {
        let address = place.at[lane];
        if !address.is_multiple_of(total as u64) {
            return Err(machine.fault(at, lane, FaultKind::Misaligned, misaligned(Doing::Reading, total, "parameter", address)));
        }
        if address > size as u64 || total > size - address as usize {
            let message = format!("reads {total} bytes at offset {address} of {size} bytes of parameters");
            return Err(machine.fault(at, lane, FaultKind::OutOfBounds, message));
        }
        let registers = &mut machine.warps[at.warp].registers;
        for (i, element) in access.elements.iter().enumerate() {
            put(registers, element, scalar, lane, read_bytes(&machine.setup.parameters, address as usize + i * bytes, bytes));
        }
    }
    Ok(())
}

pub(super) fn store(machine: &mut Machine<'_>, at: At, access: &Access) -> Result<(), Fault> {
    let mut rest = at.mask;
    while rest != 0 {
        let place = place(&machine.warps[at.warp].registers, access.space, &access.address, rest);
        rest &= !place.mask;
        match place.space {
            Space::Shared => store_shared(machine, at, access, &place)?,
            Space::Local => store_local(machine, at, access, &place)?,
            Space::Parameter => {
                let message = "writes to the parameters, which cannot be written";
                return Err(machine.fault(at, first(place.mask), FaultKind::OutOfBounds, message));
            }
            Space::Global | Space::Constant => store_global(machine, at, access, &place)?,
        }
    }
    Ok(())
}

fn store_global(machine: &mut Machine<'_>, at: At, access: &Access, place: &Place) -> Result<(), Fault> {
    let bytes = access.scalar.bytes();
    let total = bytes * access.elements.len();
    let (crowded, trusting) = (machine.setup.crowded, machine.setup.trusting);
    for lane in each(place.mask) {
        let address = place.at[lane];
        if address & (total as u64 - 1) != 0 {
            return Err(misaligned_global(machine, at, lane, address, total, Doing::Writing));
        }
        let Some((allocation, offset)) = machine.global.find(address, total as u64) else {
            return Err(lost(machine, at, lane, address, total, Doing::Writing));
        };
        let registers = &machine.warps[at.warp].registers;
        for (i, element) in access.elements.iter().enumerate() {
            allocation.store(offset + (i * bytes) as u64, bytes, get(registers, element, lane), crowded);
        }
        if trusting {
            allocation.trust();
        }
    }
    touch(machine, at, touched(access, place, Doing::Writing))
}

fn store_shared(machine: &mut Machine<'_>, at: At, access: &Access, place: &Place) -> Result<(), Fault> {
    let bytes = access.scalar.bytes();
    for lane in each(place.mask) {
        let index = shared_index(machine, at, lane, place.at[lane], bytes * access.elements.len(), Doing::Writing)?;
        let registers = &machine.warps[at.warp].registers;
        for (i, element) in access.elements.iter().enumerate() {
            write_bytes(&mut machine.shared, index + i * bytes, bytes, get(registers, element, lane));
        }
    }
    touch(machine, at, touched(access, place, Doing::Writing))
}

fn store_local(machine: &mut Machine<'_>, at: At, access: &Access, place: &Place) -> Result<(), Fault> {
    let bytes = access.scalar.bytes();
    for lane in each(place.mask) {
        let index = local_index(machine, at, lane, place.at[lane], bytes * access.elements.len(), Doing::Writing)?;
        let warp = &mut machine.warps[at.warp];
        for (i, element) in access.elements.iter().enumerate() {
            let value = get(&warp.registers, element, lane);
            write_bytes(&mut warp.local, index + i * bytes, bytes, value);
        }
    }
    Ok(())
}
